"""A token's loss and coefficients in the epilogue of the kernel that has just found its log-prob.

What the log-probs of a block of rows are needed for is known there and then, so nothing else is
launched for it: see policy_loss.py for the losses.
"""

import math
from dataclasses import dataclass, fields, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import dense
from .policy_loss import KINDS, PENALTIES, policy_loss
from .rows import row_value


@triton.jit
def row_loss(
    row,
    logp,
    anchor_ptr,
    ref_ptr,
    advantages_ptr,
    weight_ptr,
    log_eps_P,
    log_eps_R,
    low,
    high,
    delta,
    beta,
    temperature_pos,
    temperature_neg,
    KIND: tl.constexpr,
    PENALTY: tl.constexpr,
):
    """A row's share of the loss, without an entropy term, and its derivative by the log-prob."""
    loss, g = policy_loss(
        logp,
        row_value(anchor_ptr, row, anchor_ptr is not None, logp),
        row_value(ref_ptr, row, PENALTY != 0, 0.0),
        row_value(advantages_ptr, row, KIND != 3, 0.0),
        log_eps_P,
        log_eps_R,
        low,
        high,
        delta,
        beta,
        temperature_pos,
        temperature_neg,
        KIND,
        PENALTY,
    )
    weight = tl.load(weight_ptr + row).to(tl.float32)
    return loss * weight, g * weight


@triton.jit
def write_token_loss(
    row,
    logp,
    entropy,
    anchor_ptr,
    ref_ptr,
    advantages_ptr,
    weight_ptr,
    entropy_weight_ptr,
    loss_ptr,
    g_ptr,
    scale_ptr,
    of_logp_ptr,
    of_entropy_ptr,
    log_eps_P,
    log_eps_R,
    low,
    high,
    delta,
    beta,
    temperature_pos,
    temperature_neg,
    KIND: tl.constexpr,
    PENALTY: tl.constexpr,
    ENTROPY: tl.constexpr,
):
    """A row's loss, its coefficient ``g``, and what :class:`TokenLoss` names besides."""
    loss, g = row_loss(
        row,
        logp,
        anchor_ptr,
        ref_ptr,
        advantages_ptr,
        weight_ptr,
        log_eps_P,
        log_eps_R,
        low,
        high,
        delta,
        beta,
        temperature_pos,
        temperature_neg,
        KIND,
        PENALTY,
    )
    if ENTROPY:
        g_entropy = tl.load(entropy_weight_ptr).to(tl.float32)
        loss += g_entropy * entropy
        scale = tl.maximum(tl.abs(g), tl.abs(g_entropy))
        safe = tl.where(scale > 0, scale, 1.0)
        tl.store(scale_ptr + row, scale)
        tl.store(of_logp_ptr + row, g / safe)
        tl.store(of_entropy_ptr + row, g_entropy / safe)
    tl.store(loss_ptr + row, loss)
    tl.store(g_ptr + row, g)


@dataclass(frozen=True)
class TokenLoss:
    """The loss of some rows, and where the epilogue writes what comes of it; float32 ``[n]`` each.

    Attributes:
        weight, advantages, anchor, ref, entropy_weight: see kernels/token_loss.py.
        loss: each row's share.
        g: its coefficient.
        scale, of_logp, of_entropy: with an entropy term, the larger of a row's two coefficients,
            and both divided by it; else ``scale`` is ``g`` and the others are None.
        scalars: the loss's numbers, in the kernel's order.
        constants: its compile-time constants.
    """

    weight: Tensor
    advantages: Tensor | None
    anchor: Tensor | None
    ref: Tensor | None
    entropy_weight: Tensor | None
    loss: Tensor
    g: Tensor
    scale: Tensor
    of_logp: Tensor | None
    of_entropy: Tensor | None
    scalars: tuple[float, ...]
    constants: dict[str, int]

    @classmethod
    def of(
        cls,
        *,
        kind: str,
        weight: Tensor,
        advantages: Tensor | None = None,
        anchor: Tensor | None = None,
        ref: Tensor | None = None,
        entropy_weight: Tensor | None = None,
        penalty: str | None = None,
        log_eps_P: float = 0.0,
        log_eps_R: float = 0.0,
        low: float = 0.0,
        high: float = 0.0,
        delta: float | None = None,
        beta: float = 0.0,
        temperature_pos: float = 1.0,
        temperature_neg: float = 1.0,
    ) -> "TokenLoss":
        """From the arguments of ``kernels.token_loss``."""
        n, by_entropy = len(weight), entropy_weight is not None

        def row():
            return torch.empty(n, dtype=torch.float32, device=weight.device)

        g = row()
        numbers = log_eps_P, log_eps_R, low, high, math.inf if delta is None else delta, beta
        return cls(
            *map(dense, (weight, advantages, anchor, ref)),
            *(entropy_weight, row(), g),
            row() if by_entropy else g,
            row() if by_entropy else None,
            row() if by_entropy else None,
            tuple(map(float, (*numbers, temperature_pos, temperature_neg))),
            {"KIND": KINDS[kind], "PENALTY": PENALTIES[penalty]},
        )

    def rows(self, some: slice) -> "TokenLoss":
        """The same of a run of the rows."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(
            self,
            **{k: x[some] for k, x in tensors.items() if isinstance(x, Tensor) and x.dim()},
        )

    @property
    def arguments(self) -> tuple:
        """As write_token_loss takes them from the anchor on."""
        return (
            *(self.anchor, self.ref, self.advantages, self.weight, self.entropy_weight),
            *(self.loss, self.g, self.scale, self.of_logp, self.of_entropy),
            *self.scalars,
        )


NO_TOKEN_LOSS = (*[None] * 10, *[0.0] * 8)
