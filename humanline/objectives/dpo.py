"""DPO and its relatives: losses on pairs of sequences, chosen and rejected."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from humanline import checks
from humanline.gradients import positive_part
from humanline.objectives.base import Objective
from humanline.rows import Layout, Rows


@dataclass(frozen=True)
class Pairs:
    """Per-pair values ``[S/2]``: ``w`` of the chosen sequence, ``l`` of the rejected one.

    Attributes:
        w, l: perceived sequence log-ratios.
        w_mean, l_mean: the same per completion token.
        w_logps, l_logps: sequence log-probs of the policy.
        sft: mean negative log-likelihood of the batch's chosen tokens, a scalar.
    """

    w: Tensor
    l: Tensor
    w_mean: Tensor
    l_mean: Tensor
    w_logps: Tensor
    l_logps: Tensor
    sft: Tensor

    @classmethod
    def of(cls, rows: Rows) -> "Pairs":
        half = rows.num_sequences // 2
        logps = rows.sum(rows.logps)
        chosen_tokens = rows.layout.lengths[:half].sum()
        return cls(
            *rows.sum(rows.log_ratio).split(half),
            *rows.mean(rows.log_ratio).split(half),
            *logps.split(half),
            sft=-logps[:half].sum() / chosen_tokens.clamp(min=1),
        )

    @property
    def delta(self) -> Tensor:
        return self.w - self.l


def check_pairs(layout: Layout, name: str) -> None:
    """The batch holds as many chosen sequences (first half) as rejected ones (second half)."""
    checks.require(
        layout.num_sequences % 2 == 0 and (layout.num_sequences > 0 or layout.parallel is not None),
        lambda: (
            f"{name} needs chosen sequences in the first half of the batch and rejected ones in "
            f"the second, so an even number of sequences; got {layout.num_sequences}"
        ),
    )


# Each loss: (pairs, objective) -> one value a pair. Formulas and names are those of TRL, which
# cites the papers; ``x`` is β times the difference of the two sequence log-ratios.


def _smoothed(x: Tensor, e: float) -> Tensor:
    return -(1 - e) * F.logsigmoid(x) - e * F.logsigmoid(-x)


def _sigmoid(p: Pairs, o: "DPO") -> Tensor:
    return _smoothed(o.beta * p.delta, o.label_smoothing)  # cDPO where label_smoothing > 0


def _hinge(p: Pairs, o: "DPO") -> Tensor:
    return positive_part(1 - o.beta * p.delta)


def _ipo(p: Pairs, o: "DPO") -> Tensor:
    return (p.w_mean - p.l_mean - 1 / (2 * o.beta)) ** 2


def _exo_pair(p: Pairs, o: "DPO") -> Tensor:
    x, e = o.beta * p.delta, o.label_smoothing
    win = torch.sigmoid(x) * (F.logsigmoid(x) - math.log1p(-e))
    return win + torch.sigmoid(-x) * (F.logsigmoid(-x) - math.log(e))


def _nca_pair(p: Pairs, o: "DPO") -> Tensor:
    w, l = o.beta * p.w, o.beta * p.l
    return -F.logsigmoid(w) - 0.5 * F.logsigmoid(-w) - 0.5 * F.logsigmoid(-l)


def _robust(p: Pairs, o: "DPO") -> Tensor:
    x, e = o.beta * p.delta, o.label_smoothing
    return (-(1 - e) * F.logsigmoid(x) + e * F.logsigmoid(-x)) / (1 - 2 * e)


def _bco_pair(p: Pairs, o: "DPO") -> Tensor:
    return -F.logsigmoid(o.beta * p.w) - F.logsigmoid(-o.beta * p.l)


def _sppo_hard(p: Pairs, o: "DPO") -> Tensor:
    return (p.w - 0.5 / o.beta) ** 2 + (p.l + 0.5 / o.beta) ** 2


def _sorted(x: Tensor) -> Tensor:
    return x.sort(stable=True).values  # which of equal values has which gradient is no accident


def _aot(p: Pairs, o: "DPO") -> Tensor:
    # The reference's log-probs as perception leaves them: policy minus perceived log-ratio.
    ref = (p.w_logps - p.w) - (p.l_logps - p.l)
    delta = _sorted(p.w_logps - p.l_logps) - _sorted(ref)
    return _smoothed(o.beta * delta, o.label_smoothing)


def _aot_unpaired(p: Pairs, o: "DPO") -> Tensor:
    return _smoothed(o.beta * (_sorted(p.w) - _sorted(p.l)), o.label_smoothing)


def _apo_zero(p: Pairs, o: "DPO") -> Tensor:
    return 1 - torch.sigmoid(o.beta * p.w) + torch.sigmoid(o.beta * p.l)


def _apo_down(p: Pairs, o: "DPO") -> Tensor:
    return torch.sigmoid(o.beta * p.w) + 1 - torch.sigmoid(o.beta * p.delta)


def _discopop(p: Pairs, o: "DPO") -> Tensor:
    x = o.beta * p.delta
    modulation = torch.sigmoid(x / o.discopop_tau)
    # exp(−x)·modulation as one exponential: far below 0 the first alone would overflow.
    exponential = torch.exp(F.logsigmoid(x / o.discopop_tau) - x)
    return -F.logsigmoid(x) * (1 - modulation) + exponential


def _sft(p: Pairs, o: "DPO") -> Tensor:
    return p.sft.expand(p.w.shape)


def _sigmoid_norm(p: Pairs, o: "DPO") -> Tensor:
    return -F.logsigmoid(o.beta * (p.w_mean - p.l_mean))


LOSSES = {
    "sigmoid": _sigmoid,
    "hinge": _hinge,
    "ipo": _ipo,
    "exo_pair": _exo_pair,
    "nca_pair": _nca_pair,
    "robust": _robust,
    "bco_pair": _bco_pair,
    "sppo_hard": _sppo_hard,
    "aot": _aot,
    "aot_unpaired": _aot_unpaired,
    "apo_zero": _apo_zero,
    "apo_down": _apo_down,
    "discopop": _discopop,
    "sft": _sft,
    "sigmoid_norm": _sigmoid_norm,
}

# Those whose pairs do not look at each other exist in kernels/preference_loss.py as well.
DEVICE_LOSSES = LOSSES.keys() - {"aot", "aot_unpaired", "sft"}


@dataclass(frozen=True)
class DPO(Objective):
    """Direct preference optimization (arXiv 2305.18290) and the losses TRL groups with it.

    The batch holds the chosen sequences in its first half, the rejected ones in its second.
    ``R = Σ_t c_t`` is a sequence's perceived log-ratio; the default loss is the mean over pairs of
    ``−log σ(β (R_w − R_l))``.

    Args:
        beta: strength of the pull towards the reference.
        loss_type: a name, or several, whose weighted losses are summed (MPO): "sigmoid", "hinge",
            "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
            "apo_zero", "apo_down", "discopop", "sft" or "sigmoid_norm", as TRL defines them.
        loss_weights: weights of several loss types; 1 each if None.
        label_smoothing: probability that a pair's labels are swapped. Turns ``sigmoid`` into cDPO;
            used by ``robust``, ``exo_pair``, ``aot`` and ``aot_unpaired`` as well.
        discopop_tau: temperature of the ``discopop`` blend.
        perception: how a token's log-ratio to the reference is perceived: Clip, BetaRejection,
            ProspectWeight or a Perception of one's own; Identity() for as it is.

    Raises:
        ValueError: unknown loss type; a smoothing outside ``[0, 0.5)``, or 0 for ``exo_pair``; an
            odd number of sequences.
    """

    beta: float = 0.1
    loss_type: str | tuple[str, ...] = "sigmoid"
    loss_weights: tuple[float, ...] | None = None
    label_smoothing: float = 0.0
    discopop_tau: float = 0.05

    def __post_init__(self):
        super().__post_init__()
        if not isinstance(self.loss_type, str):
            object.__setattr__(self, "loss_type", tuple(self.loss_type))
            if not self.loss_type:
                raise ValueError("DPO needs a loss_type, got none")
        if not self.beta > 0:
            raise ValueError(f"beta must be positive, got {self.beta}")
        for name in self.loss_types:
            if name not in LOSSES:
                raise ValueError(f"unknown DPO loss_type {name!r}; known: {', '.join(LOSSES)}")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing must lie in [0, 0.5), got {self.label_smoothing}")
        if "exo_pair" in self.loss_types and self.label_smoothing == 0:
            raise ValueError("loss_type 'exo_pair' needs label_smoothing > 0 (TRL suggests 1e-3)")
        if len(self.weights) != len(self.loss_types):
            raise ValueError(
                f"{len(self.loss_types)} loss types need as many loss_weights, got {self.weights}"
            )

    in_pairs: ClassVar[bool] = True

    @property
    def coupling(self) -> str:
        sorts = {"aot", "aot_unpaired"}.intersection(self.loss_types)
        return "batch" if sorts else "pair"

    @property
    def loss_types(self) -> tuple[str, ...]:
        return (self.loss_type,) if isinstance(self.loss_type, str) else tuple(self.loss_type)

    @property
    def weights(self) -> tuple[float, ...]:
        return (1.0,) * len(self.loss_types) if self.loss_weights is None else self.loss_weights

    def prepare(self, layout: Layout, ref_logps: Tensor | None) -> dict[str, Any]:
        self.require_ref_logps(ref_logps)
        check_pairs(layout, "DPO")
        return {}

    def sequence_kernel_arguments(self) -> dict[str, Any] | None:
        is_clamp = self.perception.bounds is not None
        if type(self) is not DPO or self.loss_type not in DEVICE_LOSSES or not is_clamp:
            return None  # a subclass may define another loss
        p = self.discopop_tau if self.loss_type == "discopop" else self.label_smoothing
        return {"kind": self.loss_type, "beta": self.beta, "p": p}

    def stats_of(self, report: dict[str, Tensor]) -> dict[str, Tensor]:
        return reported_pair_stats(report)

    def loss(self, rows: Rows) -> Tensor:
        pairs = Pairs.of(rows)
        terms = zip(self.loss_types, self.weights, strict=True)
        return sum(weight * LOSSES[name](pairs, self).mean() for name, weight in terms)

    def stats(self, rows: Rows) -> dict[str, Tensor]:
        pairs = Pairs.of(rows)
        return pair_stats(self.beta * pairs.w, self.beta * pairs.l, pairs.w_logps, pairs.l_logps)


def pair_stats(chosen: Tensor, rejected: Tensor, w_logps: Tensor, l_logps: Tensor) -> dict:
    """TRL's statistics of preference pairs, from implicit rewards and sequence log-probs."""
    return {
        "rewards/chosen": chosen.mean(),
        "rewards/rejected": rejected.mean(),
        "rewards/accuracies": (chosen > rejected).to(chosen.dtype).mean(),
        "rewards/margins": (chosen - rejected).mean(),
        "logps/chosen": w_logps.mean(),
        "logps/rejected": l_logps.mean(),
    }


def reported_pair_stats(report: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same from what ``kernels.sequence_loss`` reports."""
    return {
        "rewards/chosen": report["chosen"],
        "rewards/rejected": report["rejected"],
        "rewards/accuracies": report["wins"],
        "rewards/margins": report["margins"],
        "logps/chosen": report["chosen_logps"],
        "logps/rejected": report["rejected_logps"],
    }
