"""What a batch reports of a token-level objective, in two launches.

A program takes a sequence and adds up its rows; another takes these sums together. 20 to 30 bytes a
row are read: nothing beside the rows' logits. The same in torch is dozens of launches, by
estimate, each of them as long.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import dense
from .policy_loss import (
    K1,
    K3_TIMES_RATIO,
    MAX_EXPONENT,
    NO_KL,
    PENALTIES,
    k3,
    k3_times_ratio,
    perceive,
)
from .sequence_loss import sequence_rows

LAUNCH = {"BLOCK": 1024, "num_warps": 4}
# All but the last two are means over the batch's tokens, or the sum of the rows' losses and the
# number of active rows; the last two are the extremes over sequences that have tokens, else 0. With
# a ratio a sequence (sequence_policy.py) what is clipped is a mean over sequences instead.
REPORT = (
    "loss",
    "active_rows",
    "logps",
    "entropy",
    "kl",
    "unclamped",
    "too_low",  # tokens whose surrogate is clipped, below and above
    "too_high",
    "clipped",  # either
    "too_low_min",
    "too_high_max",
)


@triton.jit
def penalty(logp, ref, c, PENALTY: tl.constexpr):
    """The KL estimate of each token."""
    d = logp - ref
    if PENALTY == K1:
        kl = d
    elif PENALTY == K3_TIMES_RATIO:
        kl, _ = k3_times_ratio(d, c, 0.0)
    else:
        kl, _ = k3(d)
    return kl


@triton.jit
def store_report(
    report_ptr,
    tokens_ptr,
    loss,
    active,
    logps,
    entropy,
    kl,
    unclamped,
    low,
    high,
    length,
    PER_SEQUENCE: tl.constexpr,
):
    """A sequence's part of REPORT, from sums that are still to be taken over lanes."""
    tokens = tl.maximum(tl.load(tokens_ptr), 1).to(tl.float32)
    rows_here = tl.sum(length, 0)
    low_here, high_here = tl.sum(low, 0), tl.sum(high, 0)
    sequences = tl.num_programs(0)
    share = 1.0 / tl.maximum(rows_here, 1.0)
    out = report_ptr + tl.program_id(0)
    tl.store(out, tl.sum(loss, 0))
    tl.store(out + sequences, tl.sum(active, 0))
    tl.store(out + 2 * sequences, tl.sum(logps, 0) / tokens)
    tl.store(out + 3 * sequences, tl.sum(entropy, 0) / tokens)
    tl.store(out + 4 * sequences, tl.sum(kl, 0) / tokens)
    tl.store(out + 5 * sequences, tl.sum(unclamped, 0) / tokens)
    of_clipped = tokens
    if PER_SEQUENCE:
        of_clipped = tl.maximum(rows_here, 1.0) * sequences
    tl.store(out + 6 * sequences, low_here / of_clipped)
    tl.store(out + 7 * sequences, high_here / of_clipped)
    tl.store(out + 8 * sequences, (low_here + high_here) / of_clipped)
    tl.store(out + 9 * sequences, tl.where(rows_here > 0, low_here * share, float("inf")))
    tl.store(out + 10 * sequences, high_here * share)


@triton.jit(do_not_specialize=["rows_per_sequence"])
def humanline_token_stats(
    logps_ptr,
    entropy_ptr,
    loss_ptr,
    g_ptr,
    entropy_weight_ptr,
    anchor_ptr,
    ref_ptr,
    advantages_ptr,
    mask_ptr,
    cu_seqlens_ptr,
    tokens_ptr,
    report_ptr,
    rows_per_sequence,
    log_eps_P,
    log_eps_R,
    ratio_low,
    ratio_high,
    delta,
    PENALTY: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    start, end = sequence_rows(cu_seqlens_ptr, rows_per_sequence, tl.program_id(0), PACKED)
    entropy_weight = 0.0
    if entropy_weight_ptr is not None:
        entropy_weight = tl.load(entropy_weight_ptr).to(tl.float32)
    zero = tl.zeros([BLOCK], tl.float32)
    loss, active, logps, entropy, kl = zero, zero, zero, zero, zero
    unclamped, low, high, length = zero, zero, zero, zero
    for row in range(start, end, BLOCK):
        rows = row + tl.arange(0, BLOCK)
        mask = tl.load(mask_ptr + rows, rows < end, other=0) != 0
        logp = tl.load(logps_ptr + rows, mask, other=0.0)
        length += tl.where(mask, 1.0, 0.0)
        logps += logp
        loss += tl.load(loss_ptr + rows, mask, other=0.0)
        g = tl.abs(tl.load(g_ptr + rows, mask, other=0.0)) + tl.abs(entropy_weight)
        active += tl.where(mask & (g != 0), 1.0, 0.0)
        if entropy_ptr is not None:
            entropy += tl.load(entropy_ptr + rows, mask, other=0.0)
        if advantages_ptr is not None:
            advantage = tl.load(advantages_ptr + rows, mask, other=0.0).to(tl.float32)
            d = tl.zeros([BLOCK], tl.float32)
            if anchor_ptr is not None:
                d = logp - tl.load(anchor_ptr + rows, mask, other=0.0).to(tl.float32)
            c, _ = perceive(d, log_eps_P, log_eps_R)
            unclamped += tl.where(mask & (d > log_eps_P) & (d < log_eps_R), 1.0, 0.0)
            ratio = tl.minimum(tl.exp(tl.minimum(c, MAX_EXPONENT)), delta)
            low += tl.where(mask & (ratio < ratio_low) & (advantage < 0), 1.0, 0.0)
            high += tl.where(mask & (ratio > ratio_high) & (advantage > 0), 1.0, 0.0)
            if PENALTY != NO_KL:
                ref = tl.load(ref_ptr + rows, mask, other=0.0).to(tl.float32)
                kl += tl.where(mask, penalty(logp, ref, c, PENALTY), 0.0)
    store_report(
        report_ptr,
        tokens_ptr,
        loss,
        active,
        logps,
        entropy,
        kl,
        unclamped,
        low,
        high,
        length,
        False,
    )


@triton.jit(do_not_specialize=["sequences"])
def humanline_token_stats_total(
    out_ptr, active_rows_ptr, report_ptr, sequences, BLOCK: tl.constexpr
):
    column = tl.program_id(0)
    total = tl.zeros([BLOCK], tl.float32)
    least = tl.full([BLOCK], float("inf"), tl.float32)
    most = tl.zeros([BLOCK], tl.float32)
    for start in range(0, sequences, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < sequences
        x = tl.load(report_ptr + column * sequences + at, inside, other=0.0)
        total += x
        least = tl.minimum(least, tl.where(inside, x, float("inf")))
        most = tl.maximum(most, x)
    least_of_all = tl.min(least, 0)
    value = tl.sum(total, 0)
    value = tl.where(column == 9, tl.where(least_of_all < float("inf"), least_of_all, 0.0), value)
    value = tl.where(column == 10, tl.max(most, 0), value)
    tl.store(out_ptr + column, value)
    if column == 1:
        tl.store(active_rows_ptr, value.to(tl.int64))


def total(report: Tensor) -> tuple[Tensor, Tensor]:
    """REPORT's values ``[11]`` and the active rows, an int64 scalar, from those ``[11, S]`` of
    sequences."""
    out = report.new_empty(len(REPORT))
    active_rows = torch.empty((), dtype=torch.int64, device=report.device)
    with torch.cuda.device_of(report):
        humanline_token_stats_total[(len(REPORT),)](
            out, active_rows, report, report.shape[1], **LAUNCH
        )
    return out, active_rows


def clipping(kind: str, low: float, high: float, delta: float | None) -> tuple[float, float, float]:
    """Below and above which ratios count as clipped; what bounds them from above before."""
    if kind == "cispo":  # which looks at no delta
        return -math.inf, float(high), math.inf
    return 1.0 - low, 1.0 + high, math.inf if delta is None else float(delta)


def token_stats(
    logps: Tensor,
    entropy: Tensor | None,
    loss: Tensor,
    g: Tensor,
    mask: Tensor,
    tokens: Tensor,
    num_sequences: int,
    cu_seqlens: Tensor | None,
    *,
    kind: str,
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
) -> tuple[Tensor, Tensor]:
    """What REPORT names, float32 ``[11]``; and of that the active rows, an int64 scalar.

    Args:
        logps, entropy, loss, g: float32 ``[N]`` of all rows, see kernels/token_loss.py; entropy
            may be None.
        mask: completion rows, bool ``[N]``; values of the others are not looked at.
        tokens: their number, an integer scalar on the device.
        num_sequences: unless packed, all are of the same number of rows.
        cu_seqlens: row offsets ``[S+1]`` of packed sequences.
        kind, advantages, …: the arguments of ``kernels.token_loss``.
    """
    report = logps.new_empty(len(REPORT), num_sequences)
    if num_sequences:
        with torch.cuda.device_of(logps):
            humanline_token_stats[(num_sequences,)](
                logps,
                entropy,
                loss,
                g,
                entropy_weight,
                dense(anchor),
                dense(ref),
                dense(advantages),
                mask,
                cu_seqlens,
                tokens,
                report,
                len(logps) // num_sequences,
                float(log_eps_P),
                float(log_eps_R),
                *clipping(kind, low, high, delta),
                PENALTY=PENALTIES[penalty],
                PACKED=cu_seqlens is not None,
                **LAUNCH,
            )
    return total(report)
