"""Policy losses with one ratio a sequence (GSPO) on the ``[N]`` floats between forward and
backward: coefficients and what the batch reports, in two launches.

A program takes a sequence three times: for its ratio, for its loss and the derivative by the mean
log-ratio, and for the rows' coefficients. A few numbers a row: nothing beside the rows' logits. The
same in torch is more than a hundred launches (an estimate), each of them as long.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import dense
from .policy_loss import (
    CISPO,
    K3_TIMES_RATIO,
    KINDS,
    MAX_EXPONENT,
    NO_KL,
    PENALTIES,
    k3,
    k3_times_ratio,
    perceive,
    surrogate,
)
from .sequence_loss import sequence_rows
from .token_stats import REPORT, clipping, store_report, total

LAUNCH = {"BLOCK": 256, "num_warps": 4}  # larger, each Triton spills some kind


@triton.jit
def perceived(logps_ptr, anchor_ptr, mask, rows, log_eps_P, log_eps_R):
    """Log-probs of some rows, log-ratios to the anchor (else to themselves), what is perceived of
    these, and its slope."""
    logp = tl.load(logps_ptr + rows, mask, other=0.0)
    anchor = logp
    if anchor_ptr is not None:  # the caller's may be float64
        anchor = tl.load(anchor_ptr + rows, mask, other=0.0).to(tl.float32)
    d = logp - anchor
    c, slope = perceive(d, log_eps_P, log_eps_R)
    return logp, d, c, slope


@triton.jit
def penalty(logp, ref_ptr, mask, rows, mean, PENALTY: tl.constexpr):
    """The KL estimate of some rows, its derivatives by their log-probs and by the mean of c."""
    d = logp - tl.load(ref_ptr + rows, mask, other=0.0).to(tl.float32)
    if PENALTY == K3_TIMES_RATIO:
        kl, by_logp = k3_times_ratio(d, mean, 0.0)
        _, by_both = k3_times_ratio(d, mean, 1.0)
        by_mean = by_both - by_logp
    else:
        kl, by_logp = k3(d)
        by_mean = tl.zeros_like(kl)
    return kl, by_logp, by_mean


@triton.jit(do_not_specialize=["weight_stride", "rows_per_sequence"])
def humanline_sequence_policy(
    logps_ptr,
    entropy_ptr,
    anchor_ptr,
    ref_ptr,
    advantages_ptr,
    weight_ptr,
    entropy_weight_ptr,
    mask_ptr,
    cu_seqlens_ptr,
    tokens_ptr,
    g_ptr,
    g_entropy_ptr,
    report_ptr,
    weight_stride,
    rows_per_sequence,
    log_eps_P,
    log_eps_R,
    low,
    high,
    delta,
    beta,
    temperature_pos,
    temperature_neg,
    ratio_low,
    ratio_high,
    ratio_bound,
    KIND: tl.constexpr,
    PENALTY: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sequence = tl.program_id(0)
    start, end = sequence_rows(cu_seqlens_ptr, rows_per_sequence, sequence, PACKED)
    zero = tl.zeros([BLOCK], tl.float32)
    c_sum, length = zero, zero
    for row in range(start, end, BLOCK):
        rows = row + tl.arange(0, BLOCK)
        mask = tl.load(mask_ptr + rows, rows < end, other=0) != 0
        _, _, c, _ = perceived(logps_ptr, anchor_ptr, mask, rows, log_eps_P, log_eps_R)
        c_sum += tl.where(mask, c, 0.0)  # bounds need not bracket 0
        length += tl.where(mask, 1.0, 0.0)
    share = 1.0 / tl.maximum(tl.sum(length, 0), 1.0)
    mean = tl.sum(c_sum, 0) * share
    ratio = tl.exp(tl.minimum(mean, MAX_EXPONENT))
    ratio_slope = tl.where(mean <= MAX_EXPONENT, ratio, 0.0)
    counted = tl.minimum(ratio, ratio_bound)
    is_low = tl.where(counted < ratio_low, 1.0, 0.0)
    is_high = tl.where(counted > ratio_high, 1.0, 0.0)

    weight = 0.0  # which is infinite where nothing is to be weighed
    if tl.sum(length, 0) > 0:
        weight = tl.load(weight_ptr + sequence * weight_stride).to(tl.float32)
    g_entropy = 0.0
    if entropy_ptr is not None:
        g_entropy = tl.load(entropy_weight_ptr).to(tl.float32)
    loss, by_mean, logps, entropy, kl = zero, zero, zero, zero, zero
    unclamped, too_low, too_high = zero, zero, zero
    for row in range(start, end, BLOCK):
        rows = row + tl.arange(0, BLOCK)
        mask = tl.load(mask_ptr + rows, rows < end, other=0) != 0
        logp, d, _, _ = perceived(logps_ptr, anchor_ptr, mask, rows, log_eps_P, log_eps_R)
        advantage = tl.load(advantages_ptr + rows, mask, other=0.0).to(tl.float32)
        x, slope = surrogate(
            logp, ratio, advantage, low, high, delta, temperature_pos, temperature_neg, KIND
        )
        slope = 0.0 if KIND == CISPO else slope * ratio_slope
        if PENALTY != NO_KL:
            kl_here, _, kl_slope = penalty(logp, ref_ptr, mask, rows, mean, PENALTY)
            kl += tl.where(mask, kl_here, 0.0)
            x += beta * kl_here
            slope += beta * kl_slope
        # Minimum, maximum and comparisons lose a NaN: a policy that has diverged would not show.
        known = mean + logp + advantage
        loss += tl.where(mask, weight * tl.where(known == known, x, known), 0.0)
        by_mean += tl.where(mask, tl.where(known == known, slope, known), 0.0)
        if entropy_ptr is not None:
            entropy_here = tl.load(entropy_ptr + rows, mask, other=0.0)
            entropy += entropy_here
            loss += tl.where(mask, g_entropy * entropy_here, 0.0)
        logps += logp
        unclamped += tl.where(mask & (d > log_eps_P) & (d < log_eps_R), 1.0, 0.0)
        too_low += tl.where(mask & (advantage < 0), is_low, 0.0)
        too_high += tl.where(mask & (advantage > 0), is_high, 0.0)
    by_c = weight * share * tl.sum(by_mean, 0)

    active = zero
    for row in range(start, end, BLOCK):
        rows = row + tl.arange(0, BLOCK)
        mask = tl.load(mask_ptr + rows, rows < end, other=0) != 0
        logp, _, _, slope = perceived(logps_ptr, anchor_ptr, mask, rows, log_eps_P, log_eps_R)
        g = by_c * slope
        if KIND == CISPO:
            advantage = tl.load(advantages_ptr + rows, mask, other=0.0).to(tl.float32)
            g -= weight * tl.minimum(ratio, high) * advantage * slope
        if PENALTY != NO_KL:
            _, kl_slope, _ = penalty(logp, ref_ptr, mask, rows, mean, PENALTY)
            g += weight * beta * kl_slope
        g = tl.where(mask, g, 0.0)
        tl.store(g_ptr + rows, g, rows < end)
        if entropy_ptr is not None:
            tl.store(g_entropy_ptr + rows, tl.where(mask, g_entropy, 0.0), rows < end)
        active += tl.where(mask & (tl.abs(g) + tl.abs(g_entropy) != 0), 1.0, 0.0)
    store_report(
        report_ptr,
        tokens_ptr,
        loss,
        active,
        logps,
        entropy,
        kl,
        unclamped,
        too_low,
        too_high,
        length,
        True,
    )


def sequence_policy(
    logps: Tensor,
    entropy: Tensor | None,
    mask: Tensor,
    tokens: Tensor,
    num_sequences: int,
    cu_seqlens: Tensor | None,
    *,
    kind: str,
    weight: Tensor,
    advantages: Tensor,
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
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Coefficients of all rows, of their entropies too (or None), and what the batch reports.

    Args:
        logps, entropy: float32 ``[N]``; entropy is None without ``entropy_weight``.
        mask, tokens, num_sequences, cu_seqlens: see kernels/token_stats.py.
        weight: ``[S]``, the factor of each sequence's rows.
        kind, advantages, …: the arguments of ``kernels.token_loss``; no "nll", no "k1".

    Returns:
        ``∂loss/∂logp`` and ``∂loss/∂entropy``, float32 ``[N]``; what ``token_stats.REPORT`` names,
        and of that the active rows, an int64 scalar.
    """
    g = torch.empty_like(logps) if num_sequences else torch.zeros_like(logps)
    g_entropy = None if entropy is None else torch.empty_like(g)
    report = logps.new_empty(len(REPORT), num_sequences)
    if num_sequences:
        bounds = clipping(kind, low, high, delta)
        numbers = log_eps_P, log_eps_R, low, high, float("inf") if delta is None else delta, beta
        with torch.cuda.device_of(logps):
            humanline_sequence_policy[(num_sequences,)](
                *map(dense, (logps, entropy, anchor, ref, advantages)),
                *(weight, entropy_weight, dense(mask), cu_seqlens, tokens, g, g_entropy, report),
                weight.stride(0),
                len(logps) // num_sequences,
                *map(float, (*numbers, temperature_pos, temperature_neg, *bounds)),
                KIND=KINDS[kind],
                PENALTY=PENALTIES[penalty],
                PACKED=cu_seqlens is not None,
                **LAUNCH,
            )
    return g, g_entropy, *total(report)
