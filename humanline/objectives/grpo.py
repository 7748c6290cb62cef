"""GRPO and its relatives: clipped policy-gradient surrogates on token log-ratios."""

import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from humanline import checks
from humanline.dtypes import at_least_float32
from humanline.gradients import clamp, minimum
from humanline.objectives.base import TokenObjective, as_count
from humanline.perception import Identity
from humanline.rows import Layout, Rows

# Beyond this an exponential is held constant: a ratio of 1e34 still multiplies to finite numbers.
MAX_EXPONENT = 80.0
# Log-ratios below this count as this: finite, while their exponential is 0 in any dtype.
MIN_LOG_RATIO = -1e4


@dataclass(frozen=True)
class PolicyObjective(TokenObjective):
    """What GRPO and PPO share: advantages, the policy the ratio is taken to, entropy bonus.

    Batch arguments:
        advantages: ``[S]`` or row-shaped.
        old_logps: log-probs the ratio ``r = exp(c)`` is taken to, row-shaped. Left out, it is taken
            to ``ref_logps`` (humanline: the synced reference); with neither, or with
            ``old_logps="policy"``, to the policy itself (exactly on-policy: ``r = 1``), where a
            perception has nothing to perceive: a warning says so.
    """

    epsilon: float = 0.2
    epsilon_high: float | None = None

    def __post_init__(self):
        super().__post_init__()
        for name in ("epsilon", "epsilon_high"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ValueError(f"{name} must not be negative, got {value}")

    @property
    def upper_epsilon(self) -> float:
        return self.epsilon if self.epsilon_high is None else self.epsilon_high

    @property
    def needs_entropy(self) -> bool:
        return self.entropy_coef != 0

    def prepare(
        self,
        layout: Layout,
        ref_logps: Tensor | None,
        *,
        advantages: Tensor | None = None,
        old_logps: Tensor | str | None = None,
    ) -> dict[str, Any]:
        name = type(self).__name__
        checks.require(advantages is not None, lambda: f"{name} needs advantages, [S] or one a row")
        checks.require_tensors(advantages=advantages)
        if self.beta != 0:
            self.require_ref_logps(ref_logps)
        if isinstance(old_logps, str):
            checks.require(
                old_logps == "policy",
                lambda: f'old_logps must be a tensor or "policy", got {old_logps!r}',
            )
        elif old_logps is not None:
            checks.require_tensors(old_logps=old_logps)
            checks.require_floating(old_logps=old_logps)
            checks.require(
                tuple(old_logps.shape) == layout.shape,
                lambda: (
                    f"old_logps must have the rows' shape {list(layout.shape)}, got "
                    f"{list(old_logps.shape)}"
                ),
            )
            old_logps = at_least_float32(old_logps.detach()).reshape(-1)
        if not isinstance(old_logps, Tensor) and (old_logps == "policy" or ref_logps is None):
            self._warn_of_no_reference()
        checks.require_floating(advantages=advantages)
        advantages = at_least_float32(advantages.detach())
        checks.require_same_device(
            rows=layout.mask,
            advantages=advantages,
            old_logps=old_logps if isinstance(old_logps, Tensor) else None,
        )
        if isinstance(old_logps, Tensor):
            checks.require_finite("old_logps", old_logps, layout.mask)
        return {"advantages": layout.rows(advantages, "advantages"), "old_logps": old_logps}

    def _warn_of_no_reference(self) -> None:
        if self.perception != Identity() and not checks.is_compiling():
            # The text is the same for every batch, so that Python says it once.
            warnings.warn(
                f"{self.perception} perceives nothing: the ratio is the policy's to itself, and "
                "every log-ratio is 0. Pass the reference's log-probs, or leave perception out",
                stacklevel=2,
            )

    def anchor(self, logps, ref_logps, *, old_logps=None, **batch) -> Tensor:
        if isinstance(old_logps, Tensor):
            return old_logps
        return logps.detach() if old_logps == "policy" or ref_logps is None else ref_logps

    def common_kernel_arguments(
        self, layout: Layout, ref_logps: Tensor | None, advantages: Tensor, old_logps
    ) -> dict[str, Any] | None:
        """What GRPO's and PPO's calls of the kernel share; None where perception is no clamp."""
        if self.perception.bounds is None:
            return None
        if not isinstance(old_logps, Tensor):
            old_logps = None if old_logps == "policy" else ref_logps
        log_eps_P, log_eps_R = self.perception.bounds
        return {
            "advantages": advantages,
            "anchor": old_logps,
            "ref": ref_logps if self.beta != 0 else None,
            "entropy_weight": layout.over_tokens(-self.entropy_coef)
            if self.needs_entropy
            else None,
            "log_eps_P": log_eps_P,
            "log_eps_R": log_eps_R,
            "low": self.epsilon,
            "high": self.upper_epsilon,
            "beta": self.beta,
        }

    def reported_means(self, report: dict[str, Tensor]) -> dict[str, Tensor]:
        """Statistics of what this objective adds to the surrogate, see ``token_stats_of``."""
        stats = {"kl": report["kl"]} if self.beta != 0 else {}
        return stats | ({"entropy": report["entropy"]} if self.needs_entropy else {})

    def minus_entropy_bonus(self, rows: Rows) -> Tensor | float:
        """Each row's share of ``−entropy_coef · mean entropy``, the mean over completion tokens."""
        return -self.entropy_coef * rows.token_mean(rows.entropy) if self.needs_entropy else 0.0


def clipped_surrogate(
    ratio: Tensor, advantages: Tensor, low: float, high: float, delta: float | None = None
) -> Tensor:
    """``−min(A·r, A·clamp(r, 1−low, 1+high))``; ``delta`` bounds the first ``r`` from above."""
    clipped = clamp(ratio, 1 - low, 1 + high)
    if delta is not None:
        ratio = clamp(ratio, high=delta)
    return -minimum(ratio * advantages, clipped * advantages)


def bounded_exp(x: Tensor) -> Tensor:
    """``exp(x)``, held constant beyond 80."""
    return clamp(x, high=MAX_EXPONENT).exp()


def k3(d: Tensor) -> Tensor:
    """Schulman's unbiased, non-negative estimate of ``KL(π_θ ‖ π_ref)`` from ``d``.

    Below −80 held constant as a whole: were its exponential alone, it would fall as ``d`` does.
    """
    d = clamp(d, low=-MAX_EXPONENT)
    return (-d).exp() + d - 1


def k3_times_ratio(d: Tensor, c: Tensor) -> Tensor:
    """``k3(d) · exp(c)``, as ``exp(c − d) + (d − 1) exp(c)``.

    Usually ``c = d``, and below −80, where ``k3`` is held but tends to infinity, the product tends
    to 1. Where ``c − d`` is more than 80, which takes another anchor or a perception, the product
    is held as ``k3`` is.
    """
    d, c = clamp(d, low=MIN_LOG_RATIO), clamp(c, MIN_LOG_RATIO, MAX_EXPONENT)
    apart = c - d
    d = torch.where(apart > MAX_EXPONENT, c - MAX_EXPONENT, d)
    return bounded_exp(apart) + (d - 1) * c.exp()


@dataclass(frozen=True)
class GRPO(PolicyObjective):
    """Group relative policy optimization (arXiv 2402.03300) and the losses TRL groups with it.

    Per token ``−min(A r, A clamp(r, 1−ε, 1+ε_high)) + β·k3``, with ``r = exp(c)``. The k3 penalty
    is taken on the unperceived log-ratio to the reference.

    Args:
        epsilon: ``ε``, lower clipping range.
        epsilon_high: upper clipping range, ``epsilon`` if None. For ``cispo``, the bound itself.
        delta: upper bound of the unclipped ratio (two-sided clipping, INTELLECT-2).
        beta: weight of the KL penalty; other than 0, ``ref_logps`` are needed.
        loss_type: the loss of a token and its normaliser, as TRL defines them: "grpo" (mean over
            sequences of token means), "bnpo" (mean over tokens), "dr_grpo" (sum over sequences ×
            ``max_completion_length``), "dapo" (sum over ``num_items_in_batch``), "cispo" (dapo's
            normaliser, detached clamped ratio), "sapo" (sigmoid gate), "luspo" (sum over tokens,
            mean over sequences), "vespo" (gamma weights of the sequence ratio).
        importance_sampling_level: "token", or "sequence" (GSPO, arXiv 2507.18071): one ratio a
            sequence, from the mean of its perceived log-ratios.
        use_bias_correction_kl: multiply the penalty by the ratio, as TRL does.
        max_completion_length: ``dr_grpo``'s constant length, in tokens.
        entropy_coef: weight of the entropy bonus.
        sapo_temperature_pos, sapo_temperature_neg: ``sapo``'s gate, by sign of the advantage.
        vespo_k_pos, vespo_lambda_pos, vespo_k_neg, vespo_lambda_neg: ``vespo``'s weights.
        perception: how a token's log-ratio to the reference is perceived: Clip, BetaRejection,
            ProspectWeight or a Perception of one's own; Identity() for as it is.

    Batch arguments:
        advantages: ``[S]`` or row-shaped.
        old_logps: log-probs the ratio ``r = exp(c)`` is taken to, row-shaped. Left out, it is taken
            to ``ref_logps`` (humanline: the synced reference); with neither, or with
            ``old_logps="policy"``, to the policy itself (exactly on-policy: ``r = 1``), where a
            perception has nothing to perceive: a warning says so.
        num_items_in_batch: normaliser of "dapo", "cispo" and "vespo": completion tokens in the
            whole accumulated batch; this batch's if left out.

    Raises:
        ValueError: an unknown name, a missing ``max_completion_length``, missing batch arguments.
    """

    delta: float | None = None
    beta: float = 0.0
    loss_type: str = "grpo"
    importance_sampling_level: str = "token"
    use_bias_correction_kl: bool = True
    max_completion_length: int | None = None
    entropy_coef: float = 0.0
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05
    vespo_k_pos: float = 2.0
    vespo_lambda_pos: float = 3.0
    vespo_k_neg: float = 3.0
    vespo_lambda_neg: float = 2.0

    def __post_init__(self):
        super().__post_init__()
        if self.loss_type not in SHARES:
            raise ValueError(
                f"unknown GRPO loss_type {self.loss_type!r}; known: {', '.join(SHARES)}"
            )
        if self.importance_sampling_level not in ("token", "sequence"):
            raise ValueError(
                'importance_sampling_level must be "token" or "sequence", got '
                f"{self.importance_sampling_level!r}"
            )
        if self.loss_type == "dr_grpo" and self.max_completion_length is None:
            raise ValueError('loss_type "dr_grpo" needs max_completion_length, its constant length')

    @property
    def coupling(self) -> str:
        alone = self.importance_sampling_level == "token" and self.loss_type != "vespo"
        return "token" if alone else "sequence"

    def prepare(
        self,
        layout: Layout,
        ref_logps: Tensor | None,
        *,
        num_items_in_batch: int | Tensor | None = None,
        **batch: Any,
    ) -> dict[str, Any]:
        prepared = super().prepare(layout, ref_logps, **batch)
        return prepared | {"num_items_in_batch": as_count(num_items_in_batch)}

    def kernel_arguments(
        self, layout: Layout, ref_logps: Tensor | None, advantages, old_logps, num_items_in_batch
    ) -> dict[str, Any] | None:
        common = self.common_kernel_arguments(layout, ref_logps, advantages, old_logps)
        if common is None or type(self) is not GRPO or self.loss_type == "vespo":
            return None  # a subclass may define another loss
        penalty = "k3·ratio" if self.use_bias_correction_kl else "k3"
        if self.coupling == "token":
            like, length = layout.mask, layout.length_of_row
        else:
            like = length = layout.lengths
        share = SHARES[self.loss_type](Rows.blank(layout, length), 1.0, self, num_items_in_batch)
        return common | {
            "kind": self.loss_type if self.loss_type in ("cispo", "sapo") else "clipped",
            "penalty": penalty if self.beta != 0 else None,
            "weight": layout.weights(share, like),
            "delta": self.delta,
            "temperature_pos": self.sapo_temperature_pos,
            "temperature_neg": self.sapo_temperature_neg,
        }

    def token_loss(self, rows: Rows, advantages, old_logps, num_items_in_batch) -> Tensor:
        loss = self._policy_loss(rows, self._ratio(rows), advantages)
        if self.beta != 0:
            loss = loss + self.beta * self._kl(rows)
        share = SHARES[self.loss_type](rows, loss, self, num_items_in_batch)
        return share + self.minus_entropy_bonus(rows)

    def _log_ratio(self, rows: Rows) -> Tensor:
        if self.importance_sampling_level == "token":
            return rows.log_ratio
        return rows.expand(rows.mean(rows.log_ratio))

    def _ratio(self, rows: Rows) -> Tensor:
        return bounded_exp(self._log_ratio(rows))

    def _kl(self, rows: Rows) -> Tensor:
        d = rows.logps - rows.ref_logps
        return k3_times_ratio(d, self._log_ratio(rows)) if self.use_bias_correction_kl else k3(d)

    def _policy_loss(self, rows: Rows, ratio: Tensor, advantages: Tensor) -> Tensor:
        if self.loss_type == "cispo":
            weight = -ratio.clamp(max=self.upper_epsilon).detach() * advantages
            # Of probability 0, and so of weight 0, is a token whose log-prob is minus infinity.
            return torch.where(weight == 0, 0, weight * rows.perceived_logps)
        if self.loss_type == "sapo":
            return -self._sapo_gate(ratio, advantages) * advantages
        if self.loss_type == "vespo":
            return -self._vespo_weight(rows, advantages) * advantages * rows.perceived_logps
        return clipped_surrogate(ratio, advantages, self.epsilon, self.upper_epsilon, self.delta)

    def _sapo_gate(self, ratio: Tensor, advantages: Tensor) -> Tensor:
        temperature = _choose(
            advantages > 0, self.sapo_temperature_pos, self.sapo_temperature_neg, ratio.dtype
        )
        return torch.sigmoid(temperature * (ratio - 1)) * 4 / temperature

    def _vespo_weight(self, rows: Rows, advantages: Tensor) -> Tensor:
        """``φ(w) = e^λ w^k e^{−λw}`` of the sequence ratio ``w``, detached, one value a row."""
        bounded = rows.log_ratio.detach().clamp(-20, 20)
        log_w = rows.expand(rows.sum(bounded).clamp(math.log(1e-8), 20))
        gain = advantages >= 0
        k = _choose(gain, self.vespo_k_pos, self.vespo_k_neg, log_w.dtype)
        lam = _choose(gain, self.vespo_lambda_pos, self.vespo_lambda_neg, log_w.dtype)
        log_phi = lam.clamp(min=1e-4) * (1 - log_w.exp()) + k * log_w
        return log_phi.exp().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)

    def stats(self, rows: Rows, advantages, old_logps, num_items_in_batch) -> dict[str, Tensor]:
        ratio = self._ratio(rows)
        stats = {}
        if self.beta != 0:
            stats["kl"] = rows.token_mean(self._kl(rows)).sum()
        if rows.entropy is not None:
            stats["entropy"] = rows.token_mean(rows.entropy).sum()
        if self.loss_type == "cispo":
            clipped = rows.mask & (ratio > self.upper_epsilon) & (advantages > 0)
            stats["cispo_clip_ratio"] = share_of(rows, clipped, self.importance_sampling_level)
        elif self.loss_type == "vespo":
            weight = self._vespo_weight(rows, advantages)
            stats["vespo/phi_seq_mean"] = rows.mean(torch.where(rows.mask, weight, 0)).mean()
        elif self.loss_type != "sapo":
            level = self.importance_sampling_level
            if self.delta is not None:
                ratio = ratio.clamp(max=self.delta)  # TRL counts after delta
            stats |= clip_stats(rows, ratio, advantages, self.epsilon, self.upper_epsilon, level)
        return stats

    def token_stats_of(self, report: dict[str, Tensor]) -> dict[str, Tensor]:
        stats = self.reported_means(report)
        if self.loss_type == "cispo":
            stats["cispo_clip_ratio"] = report["too_high"]
        elif self.loss_type != "sapo":
            stats |= reported_clip_stats(report)
        return stats


def _choose(condition: Tensor, yes: float, no: float, dtype: torch.dtype) -> Tensor:
    """``torch.where`` of two numbers, which by itself would round them to float32."""
    yes, no = (torch.full((), x, dtype=dtype, device=condition.device) for x in (yes, no))
    return torch.where(condition, yes, no)


def share_of(rows: Rows, chosen: Tensor, level: str) -> Tensor:
    """Share of the completion tokens that are chosen; at level "sequence", of the sequences."""
    chosen = chosen.to(rows.logps.dtype)
    if level == "token":
        return rows.token_mean(chosen).sum()
    return rows.mean(chosen).sum() / max(rows.num_sequences, 1)


def clip_stats(
    rows: Rows, ratio: Tensor, advantages: Tensor, low: float, high: float, level: str = "token"
) -> dict[str, Tensor]:
    """TRL's clip ratios: completion tokens (or sequences) whose surrogate is clipped."""
    too_low = rows.mask & (ratio < 1 - low) & (advantages < 0)
    too_high = rows.mask & (ratio > 1 + high) & (advantages > 0)
    # The extremes are taken over sequences that have tokens, and are 0 where none has.
    lows, highs = (rows.mean(x.to(ratio.dtype)) for x in (too_low, too_high))
    lows = lows.masked_fill(rows.layout.lengths == 0, math.inf)
    lowest = torch.cat([lows, lows.new_full((1,), math.inf)]).amin()
    return {
        "clip_ratio/low_mean": share_of(rows, too_low, level),
        "clip_ratio/low_min": torch.where(lowest.isfinite(), lowest, 0),
        "clip_ratio/high_mean": share_of(rows, too_high, level),
        "clip_ratio/high_max": torch.cat([highs, highs.new_zeros(1)]).amax(),
        "clip_ratio/region_mean": share_of(rows, too_low | too_high, level),
    }


def reported_clip_stats(report: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same from what ``kernels.token_stats`` reports."""
    return {
        "clip_ratio/low_mean": report["too_low"],
        "clip_ratio/low_min": report["too_low_min"],
        "clip_ratio/high_mean": report["too_high"],
        "clip_ratio/high_max": report["too_high_max"],
        "clip_ratio/region_mean": report["clipped"],
    }


# Each loss type's normaliser: (rows, per-token loss, objective, num_items_in_batch) -> row shares.


def _over_items(rows: Rows, loss: Tensor, objective: GRPO, num_items) -> Tensor:
    return rows.token_mean(loss) if num_items is None else loss / num_items


def _over_constant_length(rows: Rows, loss: Tensor, objective: GRPO, num_items) -> Tensor:
    return loss / (max(rows.num_sequences, 1) * objective.max_completion_length)


SHARES = {
    "grpo": lambda rows, loss, objective, num_items: rows.sequence_mean(loss),
    "sapo": lambda rows, loss, objective, num_items: rows.sequence_mean(loss),
    "bnpo": lambda rows, loss, objective, num_items: rows.token_mean(loss),
    "luspo": lambda rows, loss, objective, num_items: loss / max(rows.num_sequences, 1),
    "dr_grpo": _over_constant_length,
    "dapo": _over_items,
    "cispo": _over_items,
    "vespo": _over_items,
}
