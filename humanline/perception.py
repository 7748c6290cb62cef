"""Perception: how the log-ratio of a token, ``d = log π_θ − log π_ref``, is perceived.

A perception is a small frozen value that maps per-token log-ratios to perceived ones and decides
what share of each token's gradient survives. It acts upstream of every loss ("Humanline: Online
Alignment as Perceptual Loss", arXiv 2509.24207).
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from humanline import checks, gradients, philox

__all__ = ["BetaRejection", "Clip", "Identity", "Perception", "ProspectWeight", "capacity"]


@dataclass(frozen=True)
class Perception:
    """Base of all perceptions: subclass it and define :meth:`perceive`.

    Raises:
        TypeError: a field declared as a number is none, such as ``Clip("a", 1)``.
    """

    #: Whether a token's perception depends on the other tokens of the batch. If so, an objective
    #: cannot decide a row's gradient before all rows are known.
    needs_batch: ClassVar[bool] = False

    def __post_init__(self):
        checks.require_fields(self)

    @property
    def bounds(self) -> tuple[float, float] | None:
        """Lower and upper bound if the perception is a clamp, which kernels have; else None."""
        return None

    def perceive(self, log_ratio: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Perceived log-ratios, and which tokens kept their gradient.

        Args:
            log_ratio: ``d``, floating point, shape ``[N]``; 0 where ``mask`` is False.
            mask: completion tokens, bool, shape ``[N]``. Tokens outside it are not looked at; the
                caller sets their perceived log-ratio to 0 afterwards.

        Returns:
            ``c`` of shape ``[N]``, differentiable with respect to ``log_ratio``, and a bool tensor
            ``[N]`` that is True where the token is not clamped or rejected.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define perceive()")


@dataclass(frozen=True)
class Identity(Perception):
    """``c = d``: no perceptual bias."""

    @property
    def bounds(self) -> tuple[float, float]:
        return -math.inf, math.inf

    def perceive(self, log_ratio: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        return log_ratio, torch.ones_like(mask)


@dataclass(frozen=True)
class Clip(Perception):
    """Humanline clipping: ``c = clamp(d, log_eps_P, log_eps_R)`` (arXiv 2509.24207).

    The gradient is 1 on the closed interval and 0 outside it.

    Args:
        log_eps_P: lower bound of the log-ratio, in nats.
        log_eps_R: upper bound of the log-ratio, in nats.

    Raises:
        ValueError: a bound is NaN, or the lower one lies above the upper one.
    """

    log_eps_P: float = -1.5
    log_eps_R: float = 1.5

    def __post_init__(self):
        super().__post_init__()
        if math.isnan(self.log_eps_P) or math.isnan(self.log_eps_R):
            raise ValueError(
                f"Clip bounds must be numbers, got log_eps_P={self.log_eps_P}, "
                f"log_eps_R={self.log_eps_R}"
            )
        if self.log_eps_P > self.log_eps_R:
            raise ValueError(
                f"Clip needs log_eps_P <= log_eps_R, got log_eps_P={self.log_eps_P}, "
                f"log_eps_R={self.log_eps_R}"
            )

    @property
    def bounds(self) -> tuple[float, float]:
        return self.log_eps_P, self.log_eps_R

    def perceive(self, log_ratio: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        unclamped = (log_ratio > self.log_eps_P) & (log_ratio < self.log_eps_R)
        return gradients.clamp(log_ratio, self.log_eps_P, self.log_eps_R), unclamped


@dataclass(frozen=True)
class BetaRejection(Perception):
    """Humanline sampling: tokens are rejected at random, most likely those at the extremes.

    With ``M_P = max exp(d)`` and ``M_R = max exp(−d)`` over the batch's completion tokens, a token
    is rejected iff ``exp(d) < M_P·B_P`` or ``exp(−d) < M_R·B_R``, where ``B_P ~ Beta(gamma_P,
    beta_P)`` and ``B_R ~ Beta(gamma_R, beta_R)`` are drawn per token (arXiv 2509.24207).
    A rejected token keeps its value and loses its gradient.

    Args:
        gamma_P, beta_P: shape parameters of the Beta that thins out improbable tokens.
        gamma_R, beta_R: shape parameters of the Beta that thins out over-probable tokens.
        seed: seed of the draws; a row's draw depends on it and on the row's index in the batch,
            masked rows counted. ``None`` takes a fresh one from torch's default CPU generator at
            every call, so that ``torch.manual_seed`` makes a whole run reproducible.

    Raises:
        ValueError: a shape parameter is not positive and finite.
    """

    gamma_P: float = 0.5
    gamma_R: float = 0.01
    beta_P: float = 1.0
    beta_R: float = 1.0
    seed: int | None = None

    needs_batch: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        for name in ("gamma_P", "gamma_R", "beta_P", "beta_R"):
            value = getattr(self, name)
            if not (0 < value < math.inf):
                raise ValueError(f"BetaRejection needs {name} > 0 and finite, got {value}")

    def perceive(self, log_ratio: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        seed = philox.fresh_seed() if self.seed is None else self.seed
        d = log_ratio.detach()
        rejected = mask & (
            _falls_short(d, mask, philox.log_beta(self.gamma_P, self.beta_P, d, seed, stream=0))
            | _falls_short(-d, mask, philox.log_beta(self.gamma_R, self.beta_R, d, seed, stream=1))
        )
        return torch.where(rejected, d, log_ratio), ~rejected


def _falls_short(d: Tensor, mask: Tensor, log_b: Tensor) -> Tensor:
    """``exp(d) < max(exp(d))·B`` in log space, the maximum taken over the mask."""
    if d.numel() == 0:
        return torch.zeros_like(mask)
    log_m = d.masked_fill(~mask, -math.inf).max()
    return d - log_m < log_b


@dataclass(frozen=True)
class ProspectWeight(Perception):
    """Each token's gradient weighted by what cumulative prospect theory makes of its probability.

    The batch's ``n`` completion tokens are ranked by ``d``: gains (``d ≥ 0``) from the top, losses
    from the bottom. The token of rank ``i`` has decision weight ``Ω(i/n) − Ω((i−1)/n)`` with the
    capacity function of Tversky and Kahneman (1992), ``Ω(a) = a^γ / (a^γ + (1−a)^γ)^{1/γ}``; tied
    tokens share theirs. The weights are scaled to mean 1 and detached; the value stays ``c = d``.

    Args:
        gamma_gain: curvature of the capacity function for gains.
        gamma_loss: curvature for losses.

    Raises:
        ValueError: a curvature outside ``(0.28, 1]``, where Ω is not increasing (Rieger and Wang,
            2006) or not inverse-S shaped.
    """

    gamma_gain: float = 0.61
    gamma_loss: float = 0.69

    needs_batch: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        for name in ("gamma_gain", "gamma_loss"):
            value = getattr(self, name)
            if not 0.28 < value <= 1:
                raise ValueError(f"ProspectWeight needs 0.28 < {name} <= 1, got {value}")

    def perceive(self, log_ratio: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        weight = self.weights(log_ratio.detach(), mask)
        # Value d, gradient `weight`: the second term is zero in the forward.
        perceived = log_ratio.detach() + weight * gradients.moving(log_ratio)
        return perceived, torch.ones_like(mask)

    def weights(self, d: Tensor, mask: Tensor) -> Tensor:
        """Decision weights of shape ``[N]``, mean 1 over the mask and 0 outside it."""
        n = mask.sum()
        ascending = d.masked_fill(~mask, math.inf).sort().values
        below = torch.searchsorted(ascending, d.contiguous()).minimum(n)
        not_above = torch.searchsorted(ascending, d.contiguous(), right=True).minimum(n)
        gain = d >= 0
        n = n.to(torch.float64)  # neighbouring capacities differ by 1/n: float32 has no digits left
        before = torch.where(gain, n - not_above, below)
        ties = (not_above - below).clamp(min=1)
        total = n.clamp(min=1)
        first, last = before / total, (before + ties) / total
        weight = torch.where(
            gain,
            capacity(last, self.gamma_gain) - capacity(first, self.gamma_gain),
            capacity(last, self.gamma_loss) - capacity(first, self.gamma_loss),
        )
        weight = torch.where(mask, weight / ties, 0)
        scaled = weight * total / weight.sum().clamp(min=torch.finfo(torch.float64).tiny)
        return scaled.to(d.dtype)


def capacity(a: Tensor, gamma: float) -> Tensor:
    """Capacity function ``Ω(a) = a^γ / (a^γ + (1−a)^γ)^{1/γ}`` (Tversky and Kahneman, 1992, eq. 6).

    Args:
        a: probabilities in ``[0, 1]``, floating point, any shape.
        gamma: curvature; 1 gives the identity, smaller values an inverse S.
    """
    a = a.clamp(0, 1)
    powered = a**gamma
    return powered / (powered + (1 - a) ** gamma) ** (1 / gamma)
