"""A token-level objective on log-probs that are known: each row's share of the loss, and its
coefficient, on the ``[N]`` floats between forward and backward.

Where a kernel finds the log-prob, its epilogue does the same (token_epilogue.py). This is for
log-probs that a caller has, and for heads whose logits are formed twice.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import dense
from .policy_loss import KINDS, PENALTIES
from .token_epilogue import row_loss

LAUNCH = {"BLOCK": 256, "num_warps": 4}


@triton.jit(do_not_specialize=["n"])
def humanline_token_policy(
    logps_ptr,
    mask_ptr,
    anchor_ptr,
    ref_ptr,
    advantages_ptr,
    weight_ptr,
    loss_ptr,
    g_ptr,
    n,
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
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.minimum(at, n - 1)
    loss, g = row_loss(
        row,
        tl.load(logps_ptr + row),
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
    mask = tl.load(mask_ptr + row) != 0
    tl.store(loss_ptr + at, tl.where(mask, loss, 0.0), at < n)
    tl.store(g_ptr + at, tl.where(mask, g, 0.0), at < n)


def token_policy(
    logps: Tensor,
    mask: Tensor,
    *,
    kind: str,
    weight: Tensor,
    advantages: Tensor | None = None,
    anchor: Tensor | None = None,
    ref: Tensor | None = None,
    penalty: str | None = None,
    log_eps_P: float = 0.0,
    log_eps_R: float = 0.0,
    low: float = 0.0,
    high: float = 0.0,
    delta: float | None = None,
    beta: float = 0.0,
    temperature_pos: float = 1.0,
    temperature_neg: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Loss shares and coefficients of the rows, float32 ``[N]``; 0 where a row is masked.

    Args:
        logps: float32 ``[N]``.
        mask: bool ``[N]``.
        kind, weight and what follows: see :func:`kernels.token_loss.token_loss`.
    """
    loss, g = torch.empty_like(logps), torch.empty_like(logps)
    n = len(logps)
    if n:
        with torch.cuda.device_of(logps):
            humanline_token_policy[(triton.cdiv(n, LAUNCH["BLOCK"]),)](
                dense(logps),
                mask,
                dense(anchor),
                dense(ref),
                dense(advantages),
                dense(weight),
                loss,
                g,
                n,
                float(log_eps_P),
                float(log_eps_R),
                float(low),
                float(high),
                math.inf if delta is None else float(delta),
                float(beta),
                float(temperature_pos),
                float(temperature_neg),
                KIND=KINDS[kind],
                PENALTY=PENALTIES[penalty],
                **LAUNCH,
            )
    return loss, g
