"""A reference without weights in TRL's trainers: the next steps' batches, scored ahead.

TRL draws the batches of an optimizer step when the step begins; here they are drawn when the
reference syncs, up to ``sync_every`` steps earlier.
"""

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from transformers.trainer_utils import has_length

from humanline.checks import require
from humanline.integrations.trl.mixin import PreferenceMixin, Remembered, name_of


class LookaheadMixin(PreferenceMixin):
    """DPO and KTO with ``ReferenceLookahead``."""

    _epoch: Iterator | None = None

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The micro-batches of an optimizer step; their scores become due."""
        if self._epoch is not epoch_iterator:
            self._epoch = epoch_iterator
            self._steps = self.reference.steps(self._drawn(epoch_iterator, device))
        batches, scores = next(self._steps, (None, None))
        require(
            batches is not None,
            lambda: (
                f"the stream ended after {self.state.global_step} optimizer steps of max_steps="
                f'{self.state.max_steps}, and reference="lookahead" cannot begin it anew: lower '
                'max_steps, or use "copy" or "adapter"'
            ),
        )
        self._due = deque(scores)
        return batches, self._get_num_items_in_batch(batches, device)

    def _drawn(self, epoch_iterator: Iterator, device: Any) -> Iterator[list[Any]]:
        # Of a stream TRL begins as many epochs as max_steps asks for: one, if it lasts.
        streamed = not has_length(self.callback_handler.train_dataloader)
        require(
            streamed or self.state.num_train_epochs == 1,
            lambda: (
                'reference="lookahead" trains for one epoch at most: the next one\'s batches are '
                f"not drawn before it begins; this run has {self.state.num_train_epochs}. Use "
                '"copy" or "adapter"'
            ),
        )
        count = self.args.gradient_accumulation_steps
        while batches := super().get_batch_samples(epoch_iterator, count, device)[0]:
            yield batches

    def _ref_logps_of(self, inputs: dict[str, Any]) -> Callable[[dict], Tensor]:
        require(
            self.model.training,
            'reference="lookahead" holds no weights to score an evaluation with: use "copy" or '
            '"adapter"',
        )
        scores = self._due.popleft()
        return lambda kwargs: scores[name_of(kwargs["input_ids"], inputs)]

    def score(self, model: nn.Module, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """Log-probs of every sequence of a batch, by the name of its tokens among the inputs."""
        inputs = self._prepare_inputs(inputs)
        calls = Remembered(model)
        with self._reference_as(calls), self._as_reference(model):
            self.compute_ref_log_probs(calls, inputs)
        return {name_of(ids, inputs): outputs.log_probs for ids, outputs in calls.calls}
