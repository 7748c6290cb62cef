"""PPO: the clipped surrogate with per-token advantages."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from humanline.objectives.grpo import (
    PolicyObjective,
    bounded_exp,
    clip_stats,
    clipped_surrogate,
    k3,
    reported_clip_stats,
)
from humanline.rows import Layout, Rows


@dataclass(frozen=True)
class PPO(PolicyObjective):
    """Proximal policy optimization (arXiv 1707.06347), the policy's part of its loss.

    Mean over completion tokens of ``−min(A r, A clamp(r, 1−ε, 1+ε_high)) + β·kl − entropy_coef·H``.

    Args:
        epsilon: ``ε``, lower clipping range.
        epsilon_high: upper clipping range, ``epsilon`` if None.
        beta: weight of the penalty on ``KL(π_θ ‖ π_ref)``; other than 0, ``ref_logps`` are needed.
        kl_estimator: "k1" (``d``) or "k3" (``e^{−d} + d − 1``), on the unperceived log-ratio.
        entropy_coef: weight of the entropy bonus.
        perception: how a token's log-ratio to the reference is perceived: Clip, BetaRejection,
            ProspectWeight or a Perception of one's own; Identity() for as it is.

    Batch arguments:
        advantages: ``[S]`` or, usually, row-shaped.
        old_logps: log-probs the ratio ``r = exp(c)`` is taken to, row-shaped. Left out, it is taken
            to ``ref_logps`` (humanline: the synced reference); with neither, or with
            ``old_logps="policy"``, to the policy itself (exactly on-policy: ``r = 1``), where a
            perception has nothing to perceive: a warning says so.
    """

    beta: float = 0.0
    kl_estimator: str = "k3"
    entropy_coef: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        if self.kl_estimator not in ("k1", "k3"):
            raise ValueError(f'kl_estimator must be "k1" or "k3", got {self.kl_estimator!r}')

    def _kl(self, rows: Rows) -> Tensor:
        d = rows.logps - rows.ref_logps
        return d if self.kl_estimator == "k1" else k3(d)

    def kernel_arguments(
        self, layout: Layout, ref_logps: Tensor | None, advantages, old_logps
    ) -> dict[str, Any] | None:
        common = self.common_kernel_arguments(layout, ref_logps, advantages, old_logps)
        if common is None or type(self) is not PPO:  # a subclass may define another loss
            return None
        return common | {
            "kind": "clipped",
            "penalty": self.kl_estimator if self.beta != 0 else None,
            "weight": layout.weights(layout.over_tokens(1.0), layout.mask),
        }

    def token_loss(self, rows: Rows, advantages, old_logps) -> Tensor:
        ratio = bounded_exp(rows.log_ratio)
        loss = clipped_surrogate(ratio, advantages, self.epsilon, self.upper_epsilon)
        if self.beta != 0:
            loss = loss + self.beta * self._kl(rows)
        return rows.token_mean(loss) + self.minus_entropy_bonus(rows)

    def stats(self, rows: Rows, advantages, old_logps) -> dict[str, Tensor]:
        ratio = bounded_exp(rows.log_ratio)
        stats = clip_stats(rows, ratio, advantages, self.epsilon, self.upper_epsilon)
        if self.beta != 0:
            stats["kl"] = rows.token_mean(self._kl(rows)).sum()
        if rows.entropy is not None:
            stats["entropy"] = rows.token_mean(rows.entropy).sum()
        return stats

    def token_stats_of(self, report: dict[str, Tensor]) -> dict[str, Tensor]:
        return reported_clip_stats(report) | self.reported_means(report)
