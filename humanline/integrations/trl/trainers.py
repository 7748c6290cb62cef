"""The trainers, their configs, and the way to make one of a trainer that someone else built."""

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from humanline.integrations.trl.version import require_known_trl  # first: says if TRL is missing

# isort: split
from accelerate.utils import is_peft_model
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, KTOConfig, KTOTrainer
from trl.trainer.base_trainer import _BaseTrainer

from humanline.checks import require
from humanline.idle import IdleBounds
from humanline.integrations.trl import checks, noise
from humanline.integrations.trl.lookahead import LookaheadMixin
from humanline.integrations.trl.mismatched import mismatched
from humanline.integrations.trl.mixin import (
    HumanlineMixin,
    PolicyGradientMixin,
    PreferenceMixin,
    SyncBeforeStep,
    WarnOfIdleBounds,
    logger,
)
from humanline.integrations.trl.offline import (
    COLUMNS,
    OfflineMixin,
    check_offline,
    dataset_reward,
    is_offline,
)
from humanline.integrations.trl.precomputed import Precomputed, PrecomputedMixin
from humanline.ops import check_tolerance
from humanline.perception import Clip, Perception
from humanline.reference import REFERENCES, Reference, ReferenceCopy

C = TypeVar("C")


@dataclass
class HumanlineOptions:
    """What humanline adds to TRL's options. A config of TRL's own means these defaults."""

    humanline: bool = field(
        default=True,
        metadata={
            "help": "Clip each token's log-ratio upstream of the loss and sync the reference."
        },
    )
    log_eps_P: float = field(
        default=-1.5, metadata={"help": "Lower bound of a token's log-ratio, in nats."}
    )
    log_eps_R: float = field(
        default=1.5, metadata={"help": "Upper bound of a token's log-ratio, in nats."}
    )
    sync_every: int = field(
        default=1,
        metadata={"help": "Optimizer steps between syncs of the reference; 0 for never."},
    )
    reference: str | None = field(
        default=None,
        metadata={
            "help": "What holds the reference: 'copy' (a second model), 'adapter' (a second set of "
            "the weights that train), 'lookahead' (nothing; scores batches ahead). Default: "
            "'adapter' with PEFT, else 'copy'.",
            "choices": list(REFERENCES),
        },
    )
    gradient_tolerance: float = field(
        default=0.0,
        metadata={
            "help": "The head's backward may leave out columns of the logits' gradient that hold "
            "less than this share of its norm; 0 is exact."
        },
    )

    def __post_init__(self):
        Clip(self.log_eps_P, self.log_eps_R)  # raises where they are no bounds
        check_tolerance(self.gradient_tolerance, capturable=False)
        require(
            self.humanline or not self.gradient_tolerance,
            lambda: (
                f"gradient_tolerance={self.gradient_tolerance} is of humanline's head, and with "
                "humanline=False TRL's own runs: leave one of them out, or use patch_trl"
            ),
        )
        if hasattr(super(), "__post_init__"):
            super().__post_init__()

    @property
    def perception(self) -> Perception:
        """The perception these options describe."""
        return Clip(self.log_eps_P, self.log_eps_R)


def _documented(cls: type[C]) -> type[C]:
    """Its docstring with the help of humanline's options, and of those it adds itself."""
    ours = inspect.get_annotations(HumanlineOptions) | inspect.get_annotations(cls)
    of = {f.name: f.metadata["help"] for f in fields(cls) if f.name in ours}
    lines = [f"    {name}: {of[name]}" for name in ours]
    cls.__doc__ = "\n".join([inspect.getdoc(cls), "", "Args:", *lines])
    return cls


@_documented
@dataclass
class HumanlineDPOConfig(HumanlineOptions, DPOConfig):
    """TRL's DPOConfig with humanline's options."""


@_documented
@dataclass
class HumanlineKTOConfig(HumanlineOptions, KTOConfig):
    """TRL's KTOConfig with humanline's options."""


@_documented
@dataclass
class HumanlineGRPOConfig(HumanlineOptions, GRPOConfig):
    """TRL's GRPOConfig with humanline's options and ``generate_every``. With humanline
    ``disable_dropout`` is True by default, as TRL has it for DPO and KTO."""

    generate_every: int | None = field(
        default=None,
        metadata={
            "help": "Optimizer steps between generations. The completions for all of them are "
            "sampled at once. Default: as steps_per_generation and generation_batch_size say."
        },
    )
    disable_dropout: bool | None = field(
        default=None,
        metadata={"help": "Whether to disable dropout in the model. Default: as humanline."},
    )

    def __post_init__(self):
        if self.disable_dropout is None:
            self.disable_dropout = self.humanline
        if self.generate_every is not None:
            self._set_steps_per_generation()
        super().__post_init__()

    def _set_steps_per_generation(self) -> None:
        require(
            self.generate_every > 0 and self.generate_every % self.num_iterations == 0,
            f"generate_every must be a positive multiple of num_iterations={self.num_iterations}, "
            f"got {self.generate_every}",
        )
        require(
            self.steps_per_generation is None and self.generation_batch_size is None,
            "generate_every says how often to generate: leave out steps_per_generation and "
            "generation_batch_size",
        )
        batches = self.generate_every // self.num_iterations
        self.steps_per_generation = batches * self.gradient_accumulation_steps


class _Built(HumanlineMixin):
    """Construction, shared by the three trainers: check, let TRL build, install."""

    if not TYPE_CHECKING:  # which shows the arguments of TRL's constructors

        def __init__(self, *args, **kwargs):
            given = inspect.signature(super().__init__).bind(*args, **kwargs).arguments
            options = given.get("args")
            if not isinstance(options, HumanlineOptions):
                options = HumanlineOptions()
            given = self._checked(given)
            if not options.humanline:
                super().__init__(**given)
                return
            require_known_trl()
            checks.check_options(given.get("args"), options.sync_every, options.reference)
            ref_given = given.get("ref_model") is not None
            syncs = options.sync_every > 0 or getattr(given.get("args"), "sync_ref_model", False)
            if ref_given and syncs:  # which write into it, and it is the caller's
                given = {**given, "ref_model": copy.deepcopy(given["ref_model"])}
            self.perception = options.perception  # TRL prepares data for a humanline trainer
            with checks.adapter_on_head_allowed(type(self)):
                super().__init__(**given)
            own = type(self)  # has all it needs
            schedule = options.sync_every, options.reference
            _install(
                self, own, options.perception, *schedule, ref_given, options.gradient_tolerance
            )

    def _checked(self, given: dict[str, Any]) -> dict[str, Any]:
        """The arguments for TRL, once they have been looked at."""
        checks.check_columns(given, *self._layouts)
        return given


class HumanlineDPOTrainer(_Built, PreferenceMixin, DPOTrainer):
    """TRL's DPOTrainer with humanline. Takes what that takes."""

    _layouts = (("prompt", "chosen", "rejected"), ("chosen", "rejected"))


class HumanlineKTOTrainer(_Built, PreferenceMixin, KTOTrainer):
    """TRL's KTOTrainer with humanline. Takes what that takes."""

    _layouts = (("prompt", "completion", "label"), ("chosen", "rejected"))


class HumanlineGRPOTrainer(_Built, OfflineMixin, PolicyGradientMixin, GRPOTrainer):
    """TRL's GRPOTrainer with humanline. Takes what that takes; besides, a dataset with the columns
    prompt, completions and rewards, from which it trains without generating."""

    if not TYPE_CHECKING:

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            if self.offline:
                self.rollout_func = self._rollout
            for name, dataset in checks.datasets_of(vars(self)):
                checks.check_chat_template(self.processing_class, checks.first_row(dataset), name)

    def _checked(self, given: dict[str, Any]) -> dict[str, Any]:
        self.offline = is_offline(given)
        if self.offline:
            checks.check_columns(given, COLUMNS)
            check_offline(given)
            return {**given, "reward_funcs": [dataset_reward]}
        if given.get("environment_factory") is None:  # which may bring the prompts
            checks.check_columns(given, ("prompt",))
        return given


CLIP = Clip()

#: Trainers of TRL, and what makes one of them or of their subclasses a humanline one.
MIXINS = {
    DPOTrainer: PreferenceMixin,
    KTOTrainer: PreferenceMixin,
    GRPOTrainer: PolicyGradientMixin,
}


def apply_humanline(
    trainer: _BaseTrainer,
    *,
    perception: Perception = CLIP,
    sync_every: int = 1,
    reference: str | None = None,
    gradient_tolerance: float = 0.0,
) -> None:
    """Turn a trainer that is already built into a humanline one, in place. Call it before training.

    Unless ``reference`` is "copy", the trainer's ``ref_model`` is dropped, and the policy as it is
    begins as the reference. With full fine-tuning TRL loads a ``ref_model`` where none was given,
    so one of the caller's own, dropped too, cannot be told from it. For the same reason a copy of
    it is what syncs write into.

    Args:
        trainer: TRL's DPOTrainer, KTOTrainer or GRPOTrainer, or an instance of a subclass.
        perception: how log-ratios are perceived, ``Clip()`` by default.
        sync_every: optimizer steps between syncs of the reference; 0 for never.
        reference: what holds it: "copy" (a second model), "adapter" (a second set of the weights
            that train), "lookahead" (nothing; scores batches ahead). None is "adapter" with PEFT,
            else "copy".
        gradient_tolerance: the head's backward may leave out columns of the logits' gradient that
            hold less than this share of its norm; 0 is exact.

    Raises:
        TypeError: another trainer.
        ValueError: an option of the trainer contradicts humanline; it has humanline already.
    """
    require_known_trl()
    check_tolerance(gradient_tolerance, capturable=False)
    mixin = next((mixin for base, mixin in MIXINS.items() if isinstance(trainer, base)), None)
    checks.check_instance(trainer, mixin, MIXINS)
    checks.check_options(trainer.args, sync_every, reference)
    # Under PEFT TRL loads none.
    ref_given = is_peft_model(trainer.model) and trainer.ref_model is not None
    if sync_every and reference in (None, "copy") and mixin is PreferenceMixin:
        trainer.ref_model = copy.deepcopy(trainer.ref_model)  # it may be the caller's
    _install(trainer, mixin, perception, sync_every, reference, ref_given, gradient_tolerance)


def _become(trainer: _BaseTrainer, mixin: type[HumanlineMixin]) -> None:
    """Give an instance a mixin's methods."""
    if not isinstance(trainer, mixin):
        cls = type(trainer)
        trainer.__class__ = type(cls.__name__, (mixin, cls), {})


def _install(
    trainer: _BaseTrainer,
    mixin: type[HumanlineMixin],
    perception: Perception,
    sync_every: int,
    kind: str | None,
    ref_given: bool,
    gradient_tolerance: float,
) -> None:
    precomputed = getattr(trainer.args, "precompute_ref_log_probs", False)
    kind = kind or _default_kind(trainer, precomputed)
    checks.check_model(trainer, kind, ref_given)
    if precomputed:
        mixin = PrecomputedMixin
    elif kind == "lookahead":
        mixin = LookaheadMixin
    _become(trainer, mixin)
    trainer.begins_at_base = _begins_at_base(trainer)
    if kind != "copy" and isinstance(trainer, PreferenceMixin) and not precomputed:
        trainer.ref_model = None  # TRL has loaded one; GRPO's code insists on it
    if not checks.shards(trainer):
        _switch_off_noise(trainer)
    trainer.make_reference = partial(_make_reference, trainer, kind, sync_every)
    if not trainer.humanline:  # its data are as TRL alone prepares them
        size = trainer.args.per_device_train_batch_size
        _map_datasets(trainer, lambda dataset, name: mismatched(dataset, size, name))
    trainer.perception = perception
    trainer.gradient_tolerance = gradient_tolerance
    if precomputed:
        _map_datasets(trainer, trainer.precompute)
    if not checks.shards(trainer):
        assert trainer.reference is not None  # made here
    trainer.idle = IdleBounds(perception)
    trainer.add_callback(WarnOfIdleBounds(trainer.idle))
    if not trainer.is_deepspeed_enabled:
        trainer.add_callback(SyncBeforeStep(trainer))
    if isinstance(trainer, DPOTrainer) and set(trainer.loss_types) == {"sft"}:
        logger.warning(f'humanline: {perception} does nothing: the "sft" loss has no reference')


def _default_kind(trainer: _BaseTrainer, precomputed: bool) -> str:
    """Where there is no second model, a sharded one could not be made."""
    alone = is_peft_model(trainer.model) or (checks.shards(trainer) and trainer.ref_model is None)
    return "adapter" if alone and not precomputed else "copy"


def _switch_off_noise(trainer: HumanlineMixin) -> None:
    noisy = noise.switch_off(trainer)
    if noisy:
        logger.warning(
            f"humanline: what is random in {len(noisy)} modules, {noisy[0] or 'the model'} among "
            "them, is switched off: it would be taken for the policy's drift"
        )


def _map_datasets(trainer: _BaseTrainer, change: Callable[[Any, str], Any]) -> None:
    """Put ``change(dataset, name)`` in the place of each of a trainer's datasets."""
    if trainer.train_dataset is not None:
        trainer.train_dataset = change(trainer.train_dataset, "train")
    held_out = trainer.eval_dataset
    if isinstance(held_out, dict):
        trainer.eval_dataset = {name: change(data, name) for name, data in held_out.items()}
    elif held_out is not None:
        trainer.eval_dataset = change(held_out, "eval")


def _begins_at_base(trainer: _BaseTrainer) -> bool:
    """Whether TRL's reference is the model without its adapter.

    It is not, where the caller brings an adapter (TRL copies it as "ref") or a reference model, nor
    where TRL has no reference: GRPO without a KL penalty.
    """
    model = trainer.model
    return (
        is_peft_model(model)
        and "ref" not in model.peft_config
        and trainer.ref_model is None
        and not (isinstance(trainer, GRPOTrainer) and trainer.beta == 0)
    )


def _make_reference(trainer: HumanlineMixin, kind: str, sync_every: int) -> Reference:
    """The reference; of a model that is sharded, once it is."""
    if checks.shards(trainer):
        _switch_off_noise(trainer)  # until now the model could not be called
    arguments = trainer.model, trainer.score, sync_every
    if isinstance(trainer, PrecomputedMixin):
        kind, reference = "scored before training", Precomputed(*arguments)
    elif kind == "copy":
        theirs = trainer.ref_model
        if theirs is not None:
            theirs = trainer.accelerator.unwrap_model(theirs, keep_torch_compile=False)
        reference = ReferenceCopy(*arguments, model=theirs)
    else:
        reference = REFERENCES[kind](*arguments)
    steps = "optimizer step" if sync_every == 1 else f"{sync_every} optimizer steps"
    logger.info(
        f"humanline: {trainer.perception}; reference: {kind}, "
        f"{f'synced every {steps}' if sync_every else 'never synced'}, "
        f"holding {reference.memory_bytes() / 2**20:.1f} MiB; log-probs by humanline's fused head"
    )
    return reference
