"""A reference that is never synced, scored before training: its log-probs come with the batches.

TRL keeps a sequence's sum. Perception is of tokens, so here each completion token's is kept.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader
from trl import DPOTrainer

from humanline.integrations.trl.head import fused_head
from humanline.integrations.trl.mixin import PreferenceMixin, Remembered, name_of
from humanline.reference import Reference, scoring

#: TRL's columns, by the tokens whose log-probs they hold; each is an equal part of a batch's.
Columns = Mapping[str, tuple[str, ...]]
DPO: Columns = {"input_ids": ("ref_chosen_logps", "ref_rejected_logps")}
KTO: Columns = {"input_ids": ("ref_logps",), "KL_input_ids": ("ref_KL_logps",)}


class Precomputed(Reference):
    """Holds nothing: its scores are the data's."""

    def _held(self) -> Any:
        return ()

    def _state(self) -> dict[str, Any]:
        return {}

    def _load(self, state: dict[str, Any]) -> None:
        pass


class PrecomputedMixin(PreferenceMixin):
    """DPO and KTO with ``precompute_ref_log_probs``."""

    def precompute(self, dataset: Any, name: str) -> Any:
        """The dataset with the reference's log-probs: TRL's reference model's, else the policy's as
        it is, without its adapter if it has one.

        Raises:
            ValueError: it is a stream.
        """
        batch_size = self.args.per_device_eval_batch_size
        if name == "train":
            batch_size = self.args.per_device_train_batch_size
        batch_size = self.args.precompute_ref_batch_size or batch_size
        return self._precompute_ref_logps(dataset, name, batch_size)

    @property
    def _columns(self) -> Columns:
        return DPO if isinstance(self, DPOTrainer) else KTO

    def _precompute_ref_logps(self, dataset, name, batch_size):
        if not isinstance(dataset, Dataset):
            return super()._precompute_ref_logps(dataset, name, batch_size)  # which refuses it
        if not isinstance(self.data_collator, WithLogps):
            self.data_collator = WithLogps(self.data_collator, self._columns)
        names = [column for part in self._columns.values() for column in part]
        dataset = dataset.remove_columns([c for c in names if c in dataset.column_names])
        loader = DataLoader(
            dataset,
            batch_size=batch_size,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )
        scored: dict[str, list[np.ndarray]] = {}
        for batch in self.accelerator.prepare(loader):
            for column, rows in self._scores(batch).items():
                rows = self.accelerator.gather_for_metrics(rows, use_gather_object=True)
                scored.setdefault(column, []).extend(rows)
        for column, rows in scored.items():
            dataset = dataset.add_column(column, rows)
        return dataset

    def _scores(self, batch: dict[str, Tensor]) -> dict[str, list[np.ndarray]]:
        """Log-probs of each completion's tokens, by column."""
        model = self.ref_model or self.model
        calls = Remembered(model)
        with scoring(model), fused_head(model, only=()):
            self.compute_ref_log_probs(calls, batch)
        result = {}
        for ids, outputs in calls.calls:
            columns = self._columns[name_of(ids, batch)]
            logps, mask = (x.chunk(len(columns)) for x in (outputs.log_probs, outputs.label_mask))
            for column, *part in zip(columns, logps, mask, strict=True):
                result[column] = [x[of].float().cpu().numpy() for x, of in zip(*part, strict=True)]
        return result

    def _compute_loss(self, model, inputs, *args, **kwargs):
        if not self.humanline:
            return super()._compute_loss(model, inputs, *args, **kwargs)
        self.precompute_ref_logps = (
            False  # TRL is to ask the reference, for which the batch answers
        )
        try:
            return super()._compute_loss(model, inputs, *args, **kwargs)
        finally:
            self.precompute_ref_logps = True

    def _ref_logps_of(self, inputs: dict[str, Any]) -> Callable[[dict], Tensor]:
        def logps(kwargs: dict[str, Any]) -> Tensor:
            columns = self._columns[name_of(kwargs["input_ids"], inputs)]
            return torch.cat([inputs[column] for column in columns])

        return logps


class WithLogps:
    """A collator of TRL's, which takes a number a sequence; here there is one a token."""

    def __init__(self, collator: Callable[[list[dict]], dict[str, Any]], columns: Columns):
        self.collator, self.columns = collator, columns

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """TRL's batch; where the rows are scored, with log-probs ``[B, T-1]`` by column, float32,
        0 outside the completions."""
        kept = {column for columns in self.columns.values() for column in columns}
        batch = self.collator([{k: v for k, v in x.items() if k not in kept} for x in examples])
        for tokens, columns in self.columns.items():
            mask = batch.get(tokens.replace("input_ids", "completion_mask"))
            for i, column in enumerate(columns):
                if column in examples[0]:
                    scored = mask.chunk(len(columns))[i][:, 1:].bool()
                    logps = torch.zeros(scored.shape)
                    logps[scored] = torch.tensor([x for row in examples for x in row[column]])
                    batch[column] = logps
        return batch
