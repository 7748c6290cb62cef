"""Log-probs of labels from logits, and their gradient: a row read once a kernel.

Bytes moved per logit of 2 bytes: forward 2, backward 4 (2 for rows whose coefficient is 0: they
are written as zeros and not read).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import READ_AGAIN, READ_ONCE, RowTensor, dense, row_config
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

# Lengths are not specialised on: a new one must not compile anew.
_LENGTHS = ["rows_per_batch", "batch_stride_rows"]


@triton.jit(do_not_specialize=_LENGTHS)
def humanline_token_logps(
    logits_ptr,
    rows_per_batch,
    batch_stride_rows,
    row_stride,
    labels_ptr,
    temperature_ptr,
    logps_ptr,
    max_ptr,
    sum_ptr,
    entropy_ptr,
    V,
    TEMPERATURE_PER_ROW: tl.constexpr,
    ENTROPY: tl.constexpr,
    LANES: tl.constexpr,
    PER_LANE: tl.constexpr,
):
    row = tl.program_id(0)
    label = tl.load(labels_ptr + row).to(tl.int32)
    if label == IGNORE_INDEX:
        tl.store(logps_ptr + row, 0.0)
        tl.store(max_ptr + row, 0.0)
        tl.store(sum_ptr + row, 1.0)
        if ENTROPY:
            tl.store(entropy_ptr + row, 0.0)
        return
    row_ptr = logits_ptr + row_offset(row, rows_per_batch, batch_stride_rows, row_stride)
    inverse = inverse_temperature(temperature_ptr, row, TEMPERATURE_PER_ROW)
    m, s, t = row_statistics(row_ptr, V, inverse * LOG2E, "evict_first", ENTROPY, LANES, PER_LANE)
    tl.store(logps_ptr + row, label_logp(row_ptr, label, inverse, m, s, V))
    tl.store(max_ptr + row, m)
    tl.store(sum_ptr + row, s)
    if ENTROPY:
        tl.store(entropy_ptr + row, row_entropy(LN2, s, t))


@triton.jit(do_not_specialize=[*_LENGTHS, "grad_rows_per_batch", "grad_batch_stride_rows"])
def humanline_token_logps_gradient(
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
    logps_ptr,
    max_ptr,
    sum_ptr,
    entropy_ptr,
    g_ptr,
    g_entropy_ptr,
    V,
    TEMPERATURE_PER_ROW: tl.constexpr,
    ENTROPY: tl.constexpr,
    LANES: tl.constexpr,
    PER_LANE: tl.constexpr,
):
    row = tl.program_id(0)
    grad_ptr += row_offset(row, grad_rows_per_batch, grad_batch_stride_rows, grad_row_stride)
    label = tl.load(labels_ptr + row).to(tl.int32)
    g = tl.load(g_ptr + row).to(tl.float32)
    g_entropy = 0.0
    entropy = 0.0
    active = g != 0
    if ENTROPY:
        g_entropy = tl.load(g_entropy_ptr + row).to(tl.float32)
        entropy = tl.load(entropy_ptr + row)
        active = active | (g_entropy != 0)
    if (label == IGNORE_INDEX) | (active == 0):
        write_zeros(grad_ptr, V, LANES, PER_LANE)
        return
    row_ptr = logits_ptr + row_offset(row, rows_per_batch, batch_stride_rows, row_stride)
    inverse = inverse_temperature(temperature_ptr, row, TEMPERATURE_PER_ROW)
    write_gradient(
        grad_ptr,
        row_ptr,
        V,
        label,
        inverse,
        tl.load(max_ptr + row),
        tl.load(sum_ptr + row),
        tl.load(logps_ptr + row),
        entropy,
        g,
        g_entropy,
        ENTROPY,
        LANES,
        PER_LANE,
    )


def token_logps_forward(
    logits: Tensor, labels: Tensor, temperature: Tensor, with_entropy: bool
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Log-probs and entropies (nats), maximum and sum of exponentials of each row.

    All float32 ``[N]``; the maximum in units of the logits, the sum relative to it.

    Args:
        logits: ``[..., V]``, any strides, float32, bfloat16 or float16.
        labels: integer, ``N`` of them; rows labelled -100 give 0, others that are
            not in ``[0, V)`` NaN.
        temperature: a scalar, or ``N`` values.
    """
    rows = RowTensor.of(logits)
    logps, row_max, row_sum = (logits.new_empty(rows.rows, dtype=torch.float32) for _ in range(3))
    entropy = torch.empty_like(logps) if with_entropy else None
    if rows.rows:
        with torch.cuda.device_of(logits):
            humanline_token_logps[(rows.rows,)](
                *rows.arguments,
                dense(labels),
                dense(temperature),
                logps,
                row_max,
                row_sum,
                entropy,
                logits.shape[-1],
                TEMPERATURE_PER_ROW=temperature.dim() > 0,
                ENTROPY=with_entropy,
                **row_config(logits.shape[-1], logits.dtype, rows.aligned, READ_ONCE),
            )
    return logps, entropy, row_max, row_sum


def token_logps_backward(
    g: Tensor,
    g_entropy: Tensor | None,
    logits: Tensor,
    labels: Tensor,
    temperature: Tensor,
    logps: Tensor,
    entropy: Tensor | None,
    row_max: Tensor,
    row_sum: Tensor,
) -> Tensor:
    """Gradient, shape and dtype of ``logits``, contiguous, of ``Σ g·logps + g_entropy·entropy``."""
    rows = RowTensor.of(logits)
    grad = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    if rows.rows:
        with torch.cuda.device_of(logits):
            humanline_token_logps_gradient[(rows.rows,)](
                *RowTensor.of(grad).arguments,
                *rows.arguments,
                dense(labels),
                dense(temperature),
                logps,
                row_max,
                row_sum,
                entropy,
                dense(g),
                dense(g_entropy),
                logits.shape[-1],
                TEMPERATURE_PER_ROW=temperature.dim() > 0,
                ENTROPY=g_entropy is not None,
                **row_config(logits.shape[-1], logits.dtype, rows.aligned, READ_AGAIN),
            )
    return grad
