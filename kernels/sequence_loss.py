"""A sequence-level objective on the ``[N]`` floats between forward and backward, in one launch.

A program takes a pair of sequences (or one sequence): it sums the perceived log-ratios of its rows,
evaluates the loss, and writes each row's coefficient. 9 bytes a row are read twice, 4 written:
nothing beside the rows' logits. The same in torch is more than a hundred launches, each of
them as long (counted with a perception that has no kernel, tests/bench/test_launches.py).
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import dense
from .policy_loss import perceive
from .preference_loss import PAIR_KINDS, PER_TOKEN_KINDS, SINGLE_KINDS, pair_loss, single_loss

LAUNCH = {"BLOCK": 1024, "num_warps": 8}  # with fewer warps, Triton 3.9 spills on sm_100
KINDS = (*PAIR_KINDS, *SINGLE_KINDS)
# What the batch reports, in this order: the mean loss; means over pairs, or over the desirable (as
# the chosen) and the undesirable single sequences, NaN where there are none; the share of unclamped
# tokens; the number of active rows.
REPORT = (
    "loss",
    "chosen",  # reward: β times the perceived log-ratio of the sequence (SimPO: per token)
    "rejected",
    "margins",
    "wins",  # is the chosen reward the higher one; of single sequences: is it desirable, at all
    "chosen_logps",
    "rejected_logps",
    "unclamped",
    "active_rows",
)


@triton.jit
def sequence_rows(cu_seqlens_ptr, rows_per_sequence, sequence, PACKED: tl.constexpr):
    """First row of a sequence, and the row after its last."""
    if PACKED:
        start = tl.load(cu_seqlens_ptr + sequence).to(tl.int64)
        end = tl.load(cu_seqlens_ptr + sequence + 1).to(tl.int64)
    else:
        start = sequence.to(tl.int64) * rows_per_sequence
        end = start + rows_per_sequence
    return start, end


@triton.jit
def log_ratios(logps_ptr, ref_ptr, mask_ptr, rows, inside):
    """Log-probs, log-ratios (to a reference, if any) and mask of some rows; 0 where masked."""
    mask = tl.load(mask_ptr + rows, inside, other=0) != 0
    logps = tl.load(logps_ptr + rows, mask, other=0.0).to(tl.float32)
    d = logps
    if ref_ptr is not None:  # the caller's may be float64
        d = logps - tl.load(ref_ptr + rows, mask, other=0.0).to(tl.float32)
    return logps, d, mask


@triton.jit
def sequence_sums(
    logps_ptr, ref_ptr, mask_ptr, start, end, log_eps_P, log_eps_R, BLOCK: tl.constexpr
):
    """Over a sequence's completion rows: sums of c and log-probs; their number; the unclamped."""
    c_sum = tl.zeros([BLOCK], tl.float32)
    logp_sum = tl.zeros([BLOCK], tl.float32)
    length = tl.zeros([BLOCK], tl.float32)
    unclamped = tl.zeros([BLOCK], tl.float32)
    for row in range(start, end, BLOCK):
        rows = row + tl.arange(0, BLOCK)
        logps, d, mask = log_ratios(logps_ptr, ref_ptr, mask_ptr, rows, rows < end)
        c, _ = perceive(d, log_eps_P, log_eps_R)
        c_sum += tl.where(mask, c, 0.0)  # bounds need not bracket 0
        logp_sum += logps
        length += tl.where(mask, 1.0, 0.0)
        unclamped += tl.where(mask & (d > log_eps_P) & (d < log_eps_R), 1.0, 0.0)
    return tl.sum(c_sum, 0), tl.sum(logp_sum, 0), tl.sum(length, 0), tl.sum(unclamped, 0)


@triton.jit
def write_coefficients(
    g_ptr,
    logps_ptr,
    ref_ptr,
    mask_ptr,
    start,
    end,
    coefficient,
    log_eps_P,
    log_eps_R,
    BLOCK: tl.constexpr,
):
    """The coefficient on each row that kept its gradient; returns how many are not 0."""
    active = tl.zeros([BLOCK], tl.float32)
    for row in range(start, end, BLOCK):
        rows = row + tl.arange(0, BLOCK)
        inside = rows < end
        _, d, mask = log_ratios(logps_ptr, ref_ptr, mask_ptr, rows, inside)
        _, slope = perceive(d, log_eps_P, log_eps_R)
        g = tl.where(mask, coefficient * slope, 0.0)
        tl.store(g_ptr + rows, g, inside)
        active += tl.where(g != 0, 1.0, 0.0)
    return tl.sum(active, 0)


@triton.jit
def number_of(flags_ptr, n, BLOCK: tl.constexpr):
    """How many of n flags are set."""
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, n, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.where(tl.load(flags_ptr + at, at < n, other=0) != 0, 1.0, 0.0)
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=["rows_per_sequence"])
def humanline_sequence_loss(
    logps_ptr,
    ref_ptr,
    mask_ptr,
    cu_seqlens_ptr,
    desirable_ptr,
    z0_ptr,
    tokens_ptr,
    g_ptr,
    report_ptr,
    rows_per_sequence,
    log_eps_P,
    log_eps_R,
    beta,
    p,
    q,
    KIND: tl.constexpr,
    PAIRED: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    unit = tl.program_id(0)
    units = tl.num_programs(0)
    start, end = sequence_rows(cu_seqlens_ptr, rows_per_sequence, unit, PACKED)
    w, w_logps, w_length, unclamped = sequence_sums(
        logps_ptr, ref_ptr, mask_ptr, start, end, log_eps_P, log_eps_R, BLOCK
    )
    if PAIRED:
        l_start, l_end = sequence_rows(cu_seqlens_ptr, rows_per_sequence, unit + units, PACKED)
        l, l_logps, l_length, l_unclamped = sequence_sums(
            logps_ptr, ref_ptr, mask_ptr, l_start, l_end, log_eps_P, log_eps_R, BLOCK
        )
        unclamped += l_unclamped
        w_per = tl.maximum(w_length, 1.0) if PER_TOKEN else 1.0
        l_per = tl.maximum(l_length, 1.0) if PER_TOKEN else 1.0
        loss, by_w, by_l = pair_loss(w / w_per, l / l_per, beta, p, q, KIND)
        by_w /= w_per
        if KIND == "simpo":
            w /= w_per
            l /= l_per
        wins = tl.where(w > l, 1.0, 0.0) / units
        w_share = units.to(tl.float32)
        l_share = w_share
        active = write_coefficients(
            g_ptr,
            logps_ptr,
            ref_ptr,
            mask_ptr,
            l_start,
            l_end,
            by_l / l_per / units,
            log_eps_P,
            log_eps_R,
            BLOCK,
        )
    else:
        desirable = tl.load(desirable_ptr + unit) != 0
        z0 = tl.load(z0_ptr).to(tl.float32)
        loss, by_w = single_loss(w, z0, desirable, beta, p, q, KIND)
        wins = tl.where(desirable, 1.0, 0.0)
        w_share = number_of(desirable_ptr, units, BLOCK)
        l_share = units - w_share
        l = tl.where(desirable, 0.0, w)
        l_logps = tl.where(desirable, 0.0, w_logps)
        w = tl.where(desirable, w, 0.0)
        w_logps = tl.where(desirable, w_logps, 0.0)
        active = 0.0
    active += write_coefficients(
        g_ptr,
        logps_ptr,
        ref_ptr,
        mask_ptr,
        start,
        end,
        by_w / units,
        log_eps_P,
        log_eps_R,
        BLOCK,
    )
    chosen = beta * w / w_share
    rejected = beta * l / l_share
    tokens = tl.maximum(tl.load(tokens_ptr), 1).to(tl.float32)
    report_ptr += unit
    tl.store(report_ptr, loss / units)
    tl.store(report_ptr + units, chosen)
    tl.store(report_ptr + 2 * units, rejected)
    tl.store(report_ptr + 3 * units, chosen - rejected)
    tl.store(report_ptr + 4 * units, wins)
    tl.store(report_ptr + 5 * units, w_logps / w_share)
    tl.store(report_ptr + 6 * units, l_logps / l_share)
    tl.store(report_ptr + 7 * units, unclamped / tokens)
    tl.store(report_ptr + 8 * units, active)


def sequence_loss(
    logps: Tensor,
    ref_logps: Tensor | None,
    mask: Tensor,
    tokens: Tensor,
    *,
    kind: str,
    num_sequences: int,
    cu_seqlens: Tensor | None,
    log_eps_P: float,
    log_eps_R: float,
    beta: float,
    p: float = 0.0,
    q: float = 0.0,
    desirable: Tensor | None = None,
    z0: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Coefficients of all rows, and what the batch reports.

    Args:
        logps: float32 ``[N]``.
        ref_logps: the same, or None for 0; computed with in float32 whatever its dtype.
        mask: completion rows, bool ``[N]``.
        tokens: their number, an integer scalar on the device.
        kind: one of ``KINDS``.
        num_sequences: of pairs, the chosen come in the first half. Unless packed, all are of the
            same number of rows.
        cu_seqlens: row offsets ``[S+1]`` of packed sequences.
        beta, p, q: see preference_loss.py.
        desirable: bool ``[S]``; of kinds on single sequences.
        z0: the reference point, a scalar; of "kto".

    Returns:
        ``∂loss/∂logp [N]`` and what REPORT names, ``[9]``; float32.
    """
    paired = kind in PAIR_KINDS
    units = num_sequences // 2 if paired else num_sequences
    g = torch.empty_like(logps) if units else torch.zeros_like(logps)
    report = logps.new_empty(len(REPORT), units)
    if units:
        with torch.cuda.device_of(logps):
            humanline_sequence_loss[(units,)](
                dense(logps),
                dense(ref_logps),
                dense(mask),
                cu_seqlens,
                dense(desirable),
                z0,
                tokens,
                g,
                report,
                logps.numel() // num_sequences,
                float(log_eps_P),
                float(log_eps_R),
                float(beta),
                float(p),
                float(q),
                KIND=kind,
                PAIRED=paired,
                PER_TOKEN=kind in PER_TOKEN_KINDS,
                PACKED=cu_seqlens is not None,
                **LAUNCH,
            )
    else:  # means over nothing
        report = logps.new_full((len(REPORT), 1), math.nan)
        for name in ("loss", "unclamped", "active_rows"):
            report[REPORT.index(name)] = 0.0
    return g, report.sum(1)
