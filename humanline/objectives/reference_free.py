"""SimPO and SLiC-HF: losses on preference pairs that need no reference."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from humanline.gradients import positive_part
from humanline.objectives.base import Objective
from humanline.objectives.dpo import check_pairs, pair_stats, reported_pair_stats
from humanline.rows import Layout, Rows


@dataclass(frozen=True)
class _ReferenceFreePairs(Objective):
    needs_reference: ClassVar[bool] = False
    in_pairs: ClassVar[bool] = True

    def prepare(self, layout: Layout, ref_logps: Tensor | None) -> dict[str, Any]:
        check_pairs(layout, type(self).__name__)
        return {}

    def scores(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """Implicit rewards ``[S/2]`` of the chosen and the rejected sequences."""
        raise NotImplementedError

    def stats(self, rows: Rows) -> dict[str, Tensor]:
        half = rows.num_sequences // 2
        return pair_stats(*self.scores(rows), *rows.sum(rows.logps).split(half))

    def stats_of(self, report: dict[str, Tensor]) -> dict[str, Tensor]:
        return reported_pair_stats(report)


@dataclass(frozen=True)
class SimPO(_ReferenceFreePairs):
    """SimPO (arXiv 2405.14734): ``−log σ(β (mean logp_w − mean logp_l) − γ)``, mean over pairs.

    Args:
        beta: scale of the length-normalised log-probs (the paper: 2 to 10).
        gamma: target reward margin.
        perception: stays Identity(): without a reference there is no log-ratio to perceive.
    """

    beta: float = 2.0
    gamma: float = 0.5

    coupling: ClassVar[str] = "pair"

    def scores(self, rows: Rows) -> tuple[Tensor, Tensor]:
        return (self.beta * rows.mean(rows.logps)).split(rows.num_sequences // 2)

    def sequence_kernel_arguments(self) -> dict[str, Any] | None:
        if type(self) is not SimPO:  # a subclass may define another loss
            return None
        return {"kind": "simpo", "beta": self.beta, "p": self.gamma}

    def loss(self, rows: Rows) -> Tensor:
        chosen, rejected = self.scores(rows)
        return -F.logsigmoid(chosen - rejected - self.gamma).mean()


@dataclass(frozen=True)
class SLiC(_ReferenceFreePairs):
    """SLiC-HF (arXiv 2305.10425): ``max(0, δ − logp_w + logp_l) − λ logp_w``, mean over pairs.

    Args:
        delta: margin of the sequence log-probs, in nats.
        lambda_coef: weight of the log-likelihood of the chosen sequences.
        perception: stays Identity(): without a reference there is no log-ratio to perceive.
    """

    delta: float = 1.0
    lambda_coef: float = 0.1

    coupling: ClassVar[str] = "pair"

    def scores(self, rows: Rows) -> tuple[Tensor, Tensor]:
        return rows.sum(rows.logps).split(rows.num_sequences // 2)

    def sequence_kernel_arguments(self) -> dict[str, Any] | None:
        if type(self) is not SLiC:
            return None
        return {"kind": "slic", "beta": 1.0, "p": self.delta, "q": self.lambda_coef}

    def loss(self, rows: Rows) -> Tensor:
        chosen, rejected = self.scores(rows)
        hinge = positive_part(self.delta - chosen + rejected)
        return (hinge - self.lambda_coef * chosen).mean()
