"""Which options act only together with others: given in vain, an option is an error.

To act is to change the model that comes out, what is measured of it or what the run costs.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from humanline.training.config import TrainConfig, flag
from humanline.training.errors import UserError


@dataclass(frozen=True)
class Needs:
    """What an option needs to act.

    Attributes:
        met: whether a configuration has it.
        what: the same in words.
        decided_by: the options that ``met`` looks at.
    """

    met: Callable[[TrainConfig], bool]
    what: str
    decided_by: tuple[str, ...]


def _answers(c: TrainConfig) -> bool:
    """Whether what is held out are questions; the default data bring theirs."""
    return c.heldout is not None or c.data is None


_LORA = Needs(lambda c: c.lora, "--lora", ("lora",))
_KTO = Needs(lambda c: c.objective == "kto", "--objective kto", ("objective",))
_CLIP = Needs(
    lambda c: c.perception == "clip" and c.loss_type != "sft",
    "--perception clip and a --loss-type other than sft, which has no reference",
    ("perception", "loss_type"),
)

#: The options that act only with others. All that are not here act always.
NEEDS = {
    "log_eps_P": _CLIP,
    "log_eps_R": _CLIP,
    "heldout": Needs(lambda c: c.eval_limit != 0, "an --eval-limit other than 0", ("eval_limit",)),
    "heldout_fraction": Needs(
        lambda c: not _answers(c) and c.eval_limit != 0,
        "--data, no --heldout and an --eval-limit other than 0",
        ("data", "heldout", "eval_limit"),
    ),
    "reward_threshold": _KTO,
    "epsilon": Needs(
        lambda c: c.objective == "grpo" and c.loss_type not in ("sapo", "vespo"),
        "--objective grpo and a --loss-type other than sapo and vespo, which do not clip",
        ("objective", "loss_type"),
    ),
    "desirable_weight": _KTO,
    "undesirable_weight": _KTO,
    "lora_r": _LORA,
    "lora_alpha": _LORA,
    "lora_target_modules": _LORA,
    "eval_limit": Needs(
        lambda c: _answers(c) or c.heldout_fraction > 0,
        "--heldout or a --heldout-fraction other than 0",
        ("heldout", "heldout_fraction"),
    ),
    "per_device_eval_batch_size": Needs(
        lambda c: (_answers(c) or c.heldout_fraction > 0) and c.eval_limit != 0,
        "something to measure: --heldout or a --heldout-fraction other than 0, and an --eval-limit "
        "other than 0",
        ("heldout", "heldout_fraction", "eval_limit"),
    ),
    "max_new_tokens": Needs(
        lambda c: _answers(c) and c.eval_limit != 0,
        "held-out questions: --heldout where there is --data, and an --eval-limit other than 0",
        ("data", "heldout", "eval_limit"),
    ),
}


def require(config: TrainConfig, given: Iterable[str]) -> None:
    """All options that the user gave act.

    Args:
        config: the whole configuration.
        given: names of the options that do not come from a default or a run that is resumed.

    Raises:
        UserError: some do not; each is named, with what it needs and what there is instead.
    """
    idle = [
        f"{flag(name)} has no effect: it needs {NEEDS[name].what}, and this run has "
        f"{', '.join(_shown(config, other) for other in NEEDS[name].decided_by)}"
        for name in given
        if name in NEEDS and not NEEDS[name].met(config)
    ]
    if idle:
        raise UserError("; ".join(idle))


def _shown(config: TrainConfig, name: str) -> str:
    value = getattr(config, name)
    return f"no {flag(name)}" if value is None or value is False else f"{flag(name)} {value}"
