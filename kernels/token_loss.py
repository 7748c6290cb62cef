"""A token-level objective from logits in one launch: log-prob, loss, gradient.

A program takes a row: it reads it once for the log-sum-exp, knows the token's loss and coefficient,
and writes the gradient, reading the row again out of L2. Bytes moved per logit of 2 bytes: 4; 2 for
rows whose coefficient is 0 (read once, zeros written: 4, masked rows 2).
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import READ_AGAIN, RowTensor, dense, row_config
from .policy_loss import KINDS, PENALTIES
from .rows import (
    IGNORE_INDEX,
    LN2,
    LOG2E,
    inverse_temperature,
    label_logp,
    row_entropy,
    row_offset,
    row_statistics,
    write_gradient,
    write_zeros,
)
from .token_epilogue import row_loss

_LENGTHS = ["rows_per_batch", "batch_stride_rows", "grad_rows_per_batch", "grad_batch_stride_rows"]


@triton.jit(do_not_specialize=_LENGTHS)
def humanline_token_loss(
    grad_ptr,
    grad_rows_per_batch,
    grad_batch_stride_rows,
    grad_row_stride,
    logits_ptr,
    rows_per_batch,
    batch_stride_rows,
    row_stride,
    labels_ptr,
    temperature_ptr,
    anchor_ptr,
    ref_ptr,
    advantages_ptr,
    weight_ptr,
    entropy_weight_ptr,
    logps_ptr,
    entropy_ptr,
    loss_ptr,
    g_ptr,
    V,
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
    TEMPERATURE_PER_ROW: tl.constexpr,
    ENTROPY: tl.constexpr,
    LANES: tl.constexpr,
    PER_LANE: tl.constexpr,
):
    row = tl.program_id(0)
    grad_ptr += row_offset(row, grad_rows_per_batch, grad_batch_stride_rows, grad_row_stride)
    label = tl.load(labels_ptr + row).to(tl.int32)
    if label == IGNORE_INDEX:
        tl.store(logps_ptr + row, 0.0)
        tl.store(loss_ptr + row, 0.0)
        tl.store(g_ptr + row, 0.0)
        if ENTROPY:
            tl.store(entropy_ptr + row, 0.0)
        write_zeros(grad_ptr, V, LANES, PER_LANE)
        return
    row_ptr = logits_ptr + row_offset(row, rows_per_batch, batch_stride_rows, row_stride)
    inverse = inverse_temperature(temperature_ptr, row, TEMPERATURE_PER_ROW)
    m, s, t = row_statistics(row_ptr, V, inverse * LOG2E, "evict_last", ENTROPY, LANES, PER_LANE)
    logp = label_logp(row_ptr, label, inverse, m, s, V)
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
    entropy = 0.0
    g_entropy = 0.0
    if ENTROPY:
        entropy = row_entropy(LN2, s, t)
        g_entropy = tl.load(entropy_weight_ptr).to(tl.float32)
        loss += g_entropy * entropy
        tl.store(entropy_ptr + row, entropy)
    tl.store(logps_ptr + row, logp)
    tl.store(loss_ptr + row, loss)
    tl.store(g_ptr + row, g)
    if (g == 0) & (g_entropy == 0):
        write_zeros(grad_ptr, V, LANES, PER_LANE)
        return
    write_gradient(
        grad_ptr,
        row_ptr,
        V,
        label,
        inverse,
        m,
        s,
        logp,
        entropy,
        g,
        g_entropy,
        ENTROPY,
        LANES,
        PER_LANE,
    )


def token_loss(
    logits: Tensor,
    labels: Tensor,
    temperature: Tensor,
    grad: Tensor,
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
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Loss shares, coefficients, log-probs and entropies; the gradient of the sum into ``grad``.

    Args:
        logits: ``[..., V]``, any strides.
        labels: integer, ``N`` of them; rows labelled -100 take no part; the log-prob of
            another that is not in ``[0, V)`` is NaN.
        temperature: a scalar, or ``N`` values.
        grad: where to write the gradient; the logits themselves will do.
        kind: "clipped", "cispo", "sapo" or "nll"; the latter looks at nothing below but weight.
        weight: ``[N]``, each row's factor.
        advantages: ``[N]``; for all kinds but "nll".
        anchor: ``[N]``, log-probs the ratio is taken to; the policy's own if None.
        ref: ``[N]``, log-probs the penalty is taken to.
        entropy_weight: a scalar tensor, the factor of each row's entropy in the loss.
        penalty: None, "k1", "k3" or "k3·ratio".

    Returns:
        loss, g, logps, entropy (or None), float32 ``[N]`` each.
    """
    rows = RowTensor.of(logits)
    loss, g, logps = (logits.new_empty(rows.rows, dtype=torch.float32) for _ in range(3))
    entropy = torch.empty_like(loss) if entropy_weight is not None else None
    if rows.rows:
        with torch.cuda.device_of(logits):
            humanline_token_loss[(rows.rows,)](
                *RowTensor.of(grad).arguments,
                *rows.arguments,
                dense(labels),
                dense(temperature),
                dense(anchor),
                dense(ref),
                dense(advantages),
                dense(weight),
                entropy_weight,
                logps,
                entropy,
                loss,
                g,
                logits.shape[-1],
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
                TEMPERATURE_PER_ROW=temperature.dim() > 0,
                ENTROPY=entropy is not None,
                **row_config(logits.shape[-1], logits.dtype, rows.aligned, READ_AGAIN),
            )
    return loss, g, logps, entropy
