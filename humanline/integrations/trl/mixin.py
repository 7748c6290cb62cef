"""What makes a TRL trainer a humanline one, without a copy of any of its code.

TRL's losses are functions of "policy minus reference". Each mixin hands them such log-probs that
this difference is the perceived one, with its gradient: all loss types, weights and metrics come
along. Sync, checkpoints and the fused head are what the trainers share.
"""

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl.trainer.utils import FusedCausalLMOutput

from humanline.checks import require
from humanline.gradients import moving
from humanline.idle import IdleBounds
from humanline.integrations.perceived import perceived_log_ratio, share
from humanline.integrations.trl import checks
from humanline.integrations.trl.head import causal_model, fused_head
from humanline.integrations.trl.mismatched import mismatched
from humanline.perception import Perception
from humanline.reference import Reference, ReferenceLookahead
from humanline.sharding import is_sharded

logger = get_logger(__name__)

STATE = "humanline_reference"


class HumanlineMixin:
    """Shared by all trainers. Where ``humanline`` is off, TRL's code runs, and nothing else."""

    #: How log-ratios are perceived; None where humanline is off.
    perception: Perception | None = None
    #: Makes the reference; None where humanline is off.
    make_reference: Callable[[], Reference] | None = None
    _reference: Reference | None = None
    #: Counts, in the first steps, what the perception's bounds do.
    idle: IdleBounds | None = None
    #: Of the head's backward, see :func:`~humanline.linear_token_logps`.
    gradient_tolerance: float = 0.0
    _kept_columns: Tensor | None = None
    #: Whether the reference is the model without its adapter until it is synced, as TRL's is.
    begins_at_base = False

    @property
    def humanline(self) -> bool:
        """Whether the loss perceives its log-ratios."""
        return self.perception is not None

    @property
    def reference(self) -> Reference | None:
        """Made when first asked for: of a model that is sharded, once it is; else from the
        beginning. None where humanline is off."""
        if self._reference is None and self.make_reference is not None:
            require(
                not checks.shards(self) or is_sharded(self.model),
                "the reference is made of the sharded model, which train() and evaluate() shard: "
                "there is none before",
                error=RuntimeError,
            )
            self._reference = self.make_reference()
        return self._reference

    def perceived(self, logps: Tensor, ref_logps: Tensor, mask: Tensor) -> Tensor:
        """Perceived log-ratios ``c``, row-shaped and 0 outside ``mask``; counts the unclamped."""
        c, *self._unclamped = perceived_log_ratio(self.perception, logps, ref_logps, mask)
        return c

    def _as_reference(self, model: nn.Module) -> AbstractContextManager:
        """Around a call of what holds the reference's weights, with humanline's head."""
        stack = ExitStack()
        if self.begins_at_base and not self.reference.synced:
            stack.enter_context(model.disable_adapter())  # which need not begin at zero
        stack.enter_context(fused_head(model, only=()))
        return stack

    @contextmanager
    def _perceiving(self):
        """Around TRL's computation of a loss."""
        assert self.reference is not None  # made by now, at the latest: before any forward
        model = self.accelerator.unwrap_model(self.model)
        entropy_gradient = getattr(self, "_entropy_bonus_enabled", False)
        tolerance = self.gradient_tolerance
        with fused_head(
            model, entropy_gradient=entropy_gradient, gradient_tolerance=tolerance
        ) as head:
            yield
        self._kept_columns, head.kept_columns = head.kept_columns, None
        mode = "train" if self.model.training else "eval"
        counts = [self.accelerator.gather(x).sum() for x in self._unclamped]
        self._metrics[mode]["humanline/unclamped"].append(share(*counts).item())
        if mode == "train":
            self.idle.saw(*counts)
        if mode == "train" and self.is_deepspeed_enabled and self.accelerator.sync_gradients:
            # DeepSpeed steps inside backward(): this is the last moment before it.
            self.reference.before_step()

    def training_step(self, *args, **kwargs):
        """TRL's; logs besides which share of the gradient's columns its backward has kept."""
        loss = super().training_step(*args, **kwargs)
        if self._kept_columns is not None:  # known now that the backward has run
            share = self.accelerator.gather(self._kept_columns).mean().item()
            self._metrics["train"]["humanline/kept_columns"].append(share)
            self._kept_columns = None
        return loss

    # Checkpoints: the reference goes first, so that a folder with a trainer state has one.

    def _save_checkpoint(self, model, trial):
        saves = self.humanline and (self.args.should_save or self._each_rank_saves)
        if saves and not self.args.save_only_model:
            name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            folder = Path(self._get_output_dir(trial=trial)) / name
            folder.mkdir(parents=True, exist_ok=True)
            # Clones, as a shard is a part of a buffer, which would be saved whole.
            state = tree_map_only(Tensor, torch.clone, self.reference.state_dict())
            torch.save(state, folder / self._state_file)
        super()._save_checkpoint(model, trial)

    @property
    def _each_rank_saves(self) -> bool:
        """Whether ranks hold different parts of the reference: shards, or scores of their rows."""
        own = checks.shards(self) or isinstance(self.reference, ReferenceLookahead)
        return own and self.accelerator.num_processes > 1

    @property
    def _state_file(self) -> str:
        rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
        return f"{STATE}_{rank}_of_{ranks}.pt" if self._each_rank_saves else f"{STATE}.pt"

    def _load_from_checkpoint(self, resume_from_checkpoint, *args, **kwargs):
        if self.humanline:  # says what is wrong before anything else can be
            self._state_in(resume_from_checkpoint)
        return super()._load_from_checkpoint(resume_from_checkpoint, *args, **kwargs)

    def _state_in(self, checkpoint: str) -> Path:
        path = Path(checkpoint) / self._state_file
        require(path.is_file(), lambda: _missing(path))
        return path

    def _load_optimizer_and_scheduler(self, checkpoint):
        if self.humanline and checkpoint is not None:
            path = self._state_in(checkpoint)
        super()._load_optimizer_and_scheduler(checkpoint)
        if self.humanline and checkpoint is not None:
            device = self.accelerator.device  # "cpu:0" under DDP, which torch.load does not know
            state = torch.load(path, map_location="cpu", weights_only=True)
            state = tree_map_only(Tensor, lambda t: t.to(device), state)
            self.reference.load_state_dict(state)


def _missing(path: Path) -> str:
    found = sorted(other.name for other in path.parent.glob(f"{STATE}*.pt"))
    if not found:
        return (
            f"{path.parent} holds no {path.name}: it was not written by a humanline trainer, so "
            "the reference at that step is not known; train from its weights instead"
        )
    return (
        f"{path.parent} holds {', '.join(found[:3])}{', …' if len(found) > 3 else ''}, and this "
        f"run needs {path.name}: the reference was saved in parts, or whole, by another number of "
        "processes or another way of sharding; resume with the same"
    )


class SyncBeforeStep(TrainerCallback):
    """Tells the reference that gradients are accumulated and clipped, the optimizer about to step.

    Not for DeepSpeed, which steps inside ``backward``, before this: see ``_perceiving``.
    """

    def __init__(self, trainer: HumanlineMixin):
        self.trainer = trainer

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.trainer.reference.before_step()


class WarnOfIdleBounds(TrainerCallback):
    """Says once, after the first steps, if the perception's bounds have not acted on any token."""

    def __init__(self, idle: IdleBounds):
        self.idle = idle

    def on_step_end(self, args, state, control, **kwargs):
        found = self.idle.stepped()
        if found:
            logger.warning(f"humanline: {found}")


class PreferenceMixin(HumanlineMixin):
    """DPO and KTO. They call policy and reference as models: ``lp − ref`` is all their losses see.

    The reference's log-probs become ``lp − c``, with gradient: then ``lp − ref`` is ``c``, and
    terms in ``lp`` alone (the "sft" loss, WPO's weights) are untouched. What is not in the paper:
    an f-divergence is taken of the perceived sequence ratio, and LD-DPO weights tokens once they
    are perceived.
    """

    def _compute_loss(self, model, inputs, *args, **kwargs):
        if not self.humanline:
            return super()._compute_loss(model, inputs, *args, **kwargs)
        inputs = {**inputs, "completion_mask": _scored(inputs["completion_mask"])}
        policy = Remembered(model)
        reference = partial(self._call_reference, policy, self._ref_logps_of(inputs))
        with self._perceiving(), self._reference_as(reference):
            return super()._compute_loss(policy, inputs, *args, **kwargs)

    def _call_reference(
        self, policy: "Remembered", ref_logps_of: Callable[[dict], Tensor], **kwargs: Any
    ) -> FusedCausalLMOutput:
        """Stands in for TRL's call of its reference model."""
        outputs = policy.outputs_of(kwargs["input_ids"])
        with torch.enable_grad():  # TRL calls its reference without
            # An adapter's virtual tokens are there once the reference has them.
            ref_logps = ref_logps_of(kwargs)
            virtual = outputs.log_probs.shape[1] - ref_logps.shape[1]
            ref_logps = nn.functional.pad(ref_logps, (virtual, 0))
            c = self.perceived(outputs.log_probs, ref_logps, outputs.label_mask)
            return FusedCausalLMOutput(log_probs=outputs.log_probs - c)

    def _ref_logps_of(self, inputs: dict[str, Any]) -> Callable[[dict], Tensor]:
        """What gives the reference's log-probs, from the arguments of TRL's call."""
        return lambda kwargs: self.reference.scores([kwargs])[0]

    def score(self, model: nn.Module, kwargs: dict[str, Any]) -> Tensor:
        """The reference's score of a batch: its log-probs."""
        with self.accelerator.autocast(), self._as_reference(model):
            return model(**kwargs).log_probs

    @contextmanager
    def _reference_as(self, reference: Callable[..., FusedCausalLMOutput]):
        """What TRL takes for its reference model is this, for a while."""
        theirs, self.ref_model = self.ref_model, reference
        try:
            yield
        finally:
            self.ref_model = theirs

    def _precompute_ref_logps(self, dataset, *args, **kwargs):
        if self.humanline and self.make_reference is None:  # TRL is building: scored after that
            return dataset
        return super()._precompute_ref_logps(dataset, *args, **kwargs)

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        checks.check_chat_template(processing_class, checks.first_row(dataset), dataset_name)
        dataset = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        if self.humanline:
            dataset = mismatched(dataset, args.per_device_train_batch_size, dataset_name)
        return dataset


def _scored(completion_mask: Tensor) -> Tensor:
    """Without a sequence's first token, which nothing predicts.

    It belongs to the completion where truncation has left none of the prompt, and TRL's means over
    a completion's tokens would count it.
    """
    mask = completion_mask.clone()
    mask[:, 0] = 0
    return mask


class Remembered:
    """The policy as TRL calls it, its outputs kept until TRL asks the reference about them."""

    def __init__(self, model: nn.Module):
        self.model, self.calls = model, []

    def __call__(self, **kwargs: Any) -> Any:
        outputs = self.model(**kwargs)
        if "fused_lm_head" in kwargs:
            self.calls.append((kwargs["input_ids"], outputs))
        return outputs

    def outputs_of(self, input_ids: Tensor) -> FusedCausalLMOutput:
        return next(outputs for seen, outputs in self.calls if seen is input_ids)


def name_of(input_ids: Tensor, inputs: dict[str, Any]) -> str:
    """What these tokens are called among the inputs."""
    return next(name for name, value in inputs.items() if value is input_ids)


class PolicyGradientMixin(HumanlineMixin):
    """GRPO. The ratio is taken to the synced reference, whatever policy sampled the completions.

    TRL's losses see ``lp`` alone too ("cispo", "vespo"), so it is ``lp`` that carries perception's
    gradient, and the old log-probs become ``lp − c``, constant. The KL penalty is of the log-ratio
    as it is: its reference takes back what perception took from ``lp``'s gradient. What is not in
    the paper: with sequence-level importance the ratio is the mean of perceived log-ratios.
    """

    _perceived_inputs: dict[str, Any] | None = None

    def _compute_loss(self, model, inputs, *args, **kwargs):
        if not self.humanline:
            return super()._compute_loss(model, inputs, *args, **kwargs)
        self._perceived_inputs = dict(inputs)
        try:
            with self._perceiving():
                return super()._compute_loss(model, self._perceived_inputs, *args, **kwargs)
        finally:
            self._perceived_inputs = None

    def _get_per_token_logps_and_entropies(self, model, *args, **kwargs):
        score = super()._get_per_token_logps_and_entropies
        if not self.humanline:
            return score(model, *args, **kwargs)
        inputs = self._perceived_inputs
        if inputs is None:
            return self._at_sampling(model, *args, **kwargs)
        logps, *rest = score(self._with_positions(model), *args, **kwargs)
        if self.off_policy_mask_threshold is not None:
            sampled = inputs.get("old_per_token_logps")
            sampled = logps.detach() if sampled is None else sampled
            inputs.setdefault("sampling_per_token_logps", sampled)
        (ref_logps,) = self.reference.scores([(args, kwargs)])
        mask = inputs["completion_mask"] * inputs.get("tool_mask", 1)
        c = self.perceived(logps, ref_logps, mask)
        perceived_logps = logps.detach() + moving(c)
        inputs["old_per_token_logps"] = (logps - c).detach()
        inputs["ref_per_token_logps"] = ref_logps + (perceived_logps - logps)
        return perceived_logps, *rest

    def _at_sampling(self, model: nn.Module, *args: Any, **kwargs: Any) -> tuple:
        """What TRL keeps with the completions: log-probs that the next sync makes stale.

        Those of the policy that sampled do not serve as reference, but two corrections for what it
        is not: from vLLM to it, and of how far the policy has gone from it.
        """
        of_vllm = self.use_vllm and self.vllm_importance_sampling_correction
        needed = of_vllm or self.off_policy_mask_threshold is not None
        if not needed or model is self.ref_model:
            return None, None, None
        with fused_head(model, only=()):
            score = super()._get_per_token_logps_and_entropies
            return score(self._with_positions(model), *args, **kwargs)

    def score(self, model: nn.Module, batch: tuple[tuple, dict[str, Any]]) -> Tensor:
        """The reference's score of a batch: its log-probs."""
        args, kwargs = batch
        kwargs = kwargs | {"compute_entropy": False, "compute_aux_loss": False}
        with self._as_reference(model):
            model = self._with_positions(model)
            return super()._get_per_token_logps_and_entropies(model, *args, **kwargs)[0]

    def _with_positions(self, model: nn.Module) -> Callable[..., Any]:
        """The model, told where each token stands.

        Prompts are padded on their left, and positions that count the padding are not those at
        which the sampler saw the tokens: with learned positions they have other log-probs. Models
        that do not take positions, or make them of images too, are left to themselves.
        """
        plain = causal_model(self.accelerator.unwrap_model(model))
        if (
            "position_ids" not in inspect.signature(plain.forward).parameters
            or plain.config.get_text_config() is not plain.config
            or getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False)
        ):
            return model

        def call(*, attention_mask: Tensor, **inputs: Any) -> Any:
            positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
            return model(attention_mask=attention_mask, position_ids=positions, **inputs)

        return call
