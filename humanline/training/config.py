"""The configuration of a training run: every option, its default, its check."""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from humanline.training.errors import UserError

#: Defaults that depend on the objective. Batch sizes count what TRL counts: pairs for DPO,
#: completions for KTO and GRPO; so each of these is 8 sequences.
DEFAULTS: dict[str, dict[str, Any]] = {
    "dpo": {
        "loss_type": "sigmoid",
        "beta": 0.1,
        "learning_rate": 5e-6,
        "per_device_train_batch_size": 4,
        "max_steps": 50,
    },
    "kto": {
        "loss_type": "kto",
        "beta": 0.1,
        "learning_rate": 5e-6,
        "per_device_train_batch_size": 8,
        "max_steps": 40,
    },
    "grpo": {
        "loss_type": "grpo",
        "beta": 0.0,
        "learning_rate": 5e-6,
        "per_device_train_batch_size": 8,
        "max_steps": 50,
    },
}

OBJECTIVES = tuple(DEFAULTS)
PERCEPTIONS = ("clip", "none", "rejection")
REFERENCES = ("lookahead", "copy", "adapter")
SAVE_OPTIMIZER = ("always", "never")
DTYPES = ("float32", "bfloat16", "float16")

#: Options that may change when a run is resumed: the steps already taken do not depend on them.
FREE = (
    *("max_steps", "save_steps", "max_new_tokens", "per_device_eval_batch_size"),
    *("save_optimizer", "ddp_timeout"),
)


def _option(default: Any, type: type, help: str, choices: tuple[str, ...] | None = None) -> Any:
    return field(default=default, metadata={"type": type, "help": help, "choices": choices})


@dataclass(frozen=True)
class TrainConfig:
    """All of what a run depends on. Names follow TRL and transformers where they have the thing.

    Raises:
        UserError: a value out of range.
    """

    objective: str = _option("dpo", str, "what to optimize", OBJECTIVES)
    perception: str = _option(
        "clip", str, "how token log-ratios are perceived before the loss sees them", PERCEPTIONS
    )
    sync_every: int = _option(
        1, int, "the reference becomes the policy every so many steps; 0: never"
    )
    reference: str | None = _option(
        None,
        str,
        "what provides the reference: scores looked ahead to (default; no second set of weights), "
        "a copy of all weights, or of those that train (default with --sync-every 0)",
        REFERENCES,
    )
    log_eps_P: float = _option(-0.05, float, "lower bound of the clip, in nats")
    log_eps_R: float = _option(0.05, float, "upper bound of the clip, in nats")

    model: str | None = _option(
        None, str, "folder of a Hugging Face model; left out: SmolLM2-135M-Instruct, fetched"
    )
    data: str | None = _option(
        None, str, ".jsonl or .parquet in TRL's columns; left out: the arithmetic set"
    )
    heldout: str | None = _option(
        None, str, "file of prompts with numeric answers to measure accuracy on before and after"
    )
    heldout_fraction: float = _option(
        0.1, float, "without answers: the share of the data held out to measure preference accuracy"
    )
    reward_threshold: float | None = _option(
        None, float, "KTO from rewards: desirable above this; left out: above the prompt's mean"
    )

    loss_type: str | None = _option(None, str, "variant of the objective, as TRL names them")
    beta: float | None = _option(
        None, float, "strength of the pull towards the reference (GRPO: weight of the KL penalty)"
    )
    epsilon: float = _option(0.2, float, "GRPO's clipping range")
    desirable_weight: float = _option(1.0, float, "KTO's weight of desirable completions")
    undesirable_weight: float = _option(1.0, float, "KTO's weight of undesirable completions")

    learning_rate: float | None = _option(None, float, "AdamW's step size after the warm-up")
    warmup_steps: int = _option(5, int, "steps of linear warm-up")
    max_steps: int | None = _option(None, int, "optimizer steps")
    per_device_train_batch_size: int | None = _option(
        None, int, "pairs (dpo) or completions (kto, grpo) that go through the model at once"
    )
    gradient_accumulation_steps: int = _option(1, int, "such batches in an optimizer step")
    max_grad_norm: float = _option(1.0, float, "gradients are clipped to this norm")
    max_length: int = _option(1024, int, "longest prompt and completion, in tokens")
    max_bad_rows: float = _option(
        0.01, float, "share of the data's rows that may be empty or too long; they are left out"
    )
    seed: int = _option(0, int, "fixes everything random")

    lora: bool = _option(False, bool, "train LoRA adapters instead of all weights")
    lora_r: int = _option(16, int, "rank of the adapters")
    lora_alpha: float = _option(32.0, float, "scale of the adapters")
    lora_target_modules: str = _option(
        "all-linear", str, "comma-separated module names to adapt, or all-linear"
    )

    device: str = _option("auto", str, "cpu, cuda, cuda:1 …; auto: cuda where there is one")
    dtype: str = _option("float32", str, "dtype of the weights", DTYPES)
    bf16: bool = _option(False, bool, "compute in bfloat16 (autocast), whatever the weights are")
    padding_free: bool = _option(
        False, bool, "read a batch as one row without padding, each prompt once"
    )
    gradient_tolerance: float = _option(
        0.0,
        float,
        "leave out of the head's backward what holds less than this share of the gradient's norm; "
        "0: exact",
    )
    gradient_checkpointing: bool = _option(False, bool, "recompute activations to save memory")
    fsdp: bool = _option(
        False, bool, "split the model over the processes of the run (FSDP2); left out: DDP"
    )
    ddp_timeout: int = _option(
        1800, int, "seconds that the processes of a run wait for one another"
    )

    save_steps: int = _option(20, int, "steps between checkpoints to resume from; 0: none")
    save_optimizer: str = _option(
        "always",
        str,
        "whether checkpoints hold Adam's moments, two thirds of their bytes; never: a resumed run "
        "begins with new ones, and ends with other numbers",
        SAVE_OPTIMIZER,
    )
    eval_limit: int | None = _option(None, int, "measure on this many held-out rows at most")
    per_device_eval_batch_size: int = _option(32, int, "prompts generated from at once")
    max_new_tokens: int = _option(32, int, "longest answer generated")

    def __post_init__(self):
        for name in ("objective", "perception", "dtype", "save_optimizer"):
            choices = self.option(name).metadata["choices"]
            _require(getattr(self, name) in choices, self, name, f"one of {', '.join(choices)}")
        for name, value in DEFAULTS[self.objective].items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        if self.reference is None:
            kind = "lookahead" if self.sync_every else "adapter"
            object.__setattr__(self, "reference", kind)
        self._check_ranges()

    def _check_ranges(self) -> None:
        for name in ("sync_every", "warmup_steps", "save_steps", "seed"):
            _require(getattr(self, name) >= 0, self, name, "at least 0")
        for name in (
            "max_steps",
            "per_device_train_batch_size",
            "per_device_eval_batch_size",
            "gradient_accumulation_steps",
            "lora_r",
            "max_new_tokens",
            "ddp_timeout",
        ):
            _require(getattr(self, name) >= 1, self, name, "at least 1")
        _require(self.seed < 2**63, self, "seed", "less than 2**63")
        threshold = self.reward_threshold
        finite = threshold is None or math.isfinite(threshold)
        _require(finite, self, "reward_threshold", "finite")
        _require(self.max_length >= 2, self, "max_length", "at least 2")
        for name in ("learning_rate", "max_grad_norm", "lora_alpha"):
            _require(0 < getattr(self, name) < float("inf"), self, name, "positive and finite")
        for name in ("beta", "epsilon", "desirable_weight", "undesirable_weight"):
            _require(0 <= getattr(self, name) < float("inf"), self, name, "at least 0 and finite")
        _require(0 <= self.max_bad_rows <= 1, self, "max_bad_rows", "a share, in [0, 1]")
        _require(0 <= self.gradient_tolerance < 1, self, "gradient_tolerance", "in [0, 1)")
        _require(0 <= self.heldout_fraction < 1, self, "heldout_fraction", "in [0, 1)")
        _require(self.eval_limit is None or self.eval_limit >= 0, self, "eval_limit", "at least 0")
        _require(self.reference in REFERENCES, self, "reference", f"one of {', '.join(REFERENCES)}")
        if self.reference == "lookahead":
            _require(self.sync_every > 0, self, "sync_every", "positive with --reference lookahead")
        if self.dtype == "float16" and not self.lora:
            raise UserError(
                "--dtype float16: weights would be trained in float16, whose Adam moments "
                "underflow; use --bf16, or --lora"
            )
        if self.objective != "grpo":
            _require(self.beta > 0, self, "beta", f"positive for {self.objective}")
        if self.objective == "kto":
            _require(
                self.per_device_train_batch_size > 1,
                self,
                "per_device_train_batch_size",
                "at least 2 for kto, whose reference point comes from mismatched pairs of a batch",
            )

    @classmethod
    def option(cls, name: str) -> dataclasses.Field:
        """The field called ``name``, with its type, help and choices as metadata."""
        return cls.__dataclass_fields__[name]

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def flag(name: str) -> str:
    """The command line's spelling of a field."""
    return "--" + name.replace("_", "-")


def resumed(stored: dict[str, Any], given: dict[str, Any]) -> TrainConfig:
    """The configuration to go on with: the stored one, in which the free fields may be changed.

    Args:
        stored: what the run was started with.
        given: the options given now; those left out are taken from ``stored``.

    Raises:
        UserError: an option that is not free differs; all such are named.
    """
    free = set(FREE)
    if stored.get("reference") == "lookahead" and stored.get("sync_every") != 1:
        free.remove("max_steps")  # between syncs, no further step has been looked ahead to
    differing = [
        f"{flag(name)} (was {stored.get(name)!r}, now {value!r})"
        for name, value in given.items()
        if name not in free and stored.get(name) != value
    ]
    if differing:
        raise UserError(
            f"--resume continues the same run, but these options differ: {', '.join(differing)}"
        )
    try:
        return TrainConfig(**stored | given)
    except TypeError as error:
        raise UserError(f"config.json is not of this version's runs: {error}") from error


def _require(condition: bool, config: TrainConfig, name: str, expected: str) -> None:
    if not condition:
        raise UserError(f"{flag(name)} must be {expected}, got {getattr(config, name)!r}")
