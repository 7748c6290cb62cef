"""Log-probs from hidden states: the head's GEMM with the softmax in its epilogue, no logits kept.

    z = softcap(logit_scale · (hidden [N, H] @ weight [V, H]ᵀ + bias)),   log p = log_softmax(z / T)

A tile of logits lives in the registers that accumulated it, in float32. The forward folds it into
its rows' running maximum and sum and forgets it; the gradient forms it again, turns it into
``∂/∂logits`` and writes that once, in half precision.

What an H100 SXM should make of it (NVIDIA's figures: 989 TFLOP/s dense bf16, 3.35 TB/s of HBM,
50 MB of L2; estimates, not measurements), for N = 8,192, V = 151,936, tiles of 128 × 256:

                                          H = 4096      H = 1024
    FLOPs, 2·N·V·H                        10.2e12       2.55e12
    the same at 989 TFLOP/s               10.3 ms       2.6 ms
    a tile's operands from L2             384 · 2H bytes for 2 · 128 · 256 · H FLOPs: 85 FLOPs/byte
    all of them                           119 GB        30 GB
    weight from HBM, once a row group     4 · 1.24 GB   1 · 0.31 GB
    hidden from HBM, once                 67 MB         17 MB
    a tile's 2^15 exponentials            1.2 of 45 µs  1.2 of 11 µs
    gradient: dz written once             2.5 GB        2.5 GB

- Registers: 128 × 256 float32 are all that 256 threads can accumulate; it is the tile that asks
  least of L2. At 85 FLOPs a byte the tensor cores' peak would take 11.6 TB/s of L2, more than it
  gives (5,120 bytes a clock, about 9 TB/s). So L2 bounds a kernel without multicast at about three
  quarters of peak; 60 to 70 % is what to expect at H = 4096, 50 to 60 % at H = 1024, where the
  epilogue, during which the tensor cores idle, takes a tenth.
  Measured since, on an H100 (bench/results/h100-sxm/explored.jsonl): 671 and 632 TFLOP/s, 68 and
  64 % of it.
- HBM: programs that run at once share a group of rows whose hidden states stay in L2 (16 MiB: 16
  row tiles at H = 4096), and walk the vocabulary together. A tile of the weight comes from HBM once
  a group: 5 GB take 1.5 ms, hidden under 10.
- The log-probs written and read as logits instead would move 2 · 4 · N · V = 10 GB more.

A program of the forward takes one row tile and one of at most 64 chunks of the vocabulary. The
chunks depend on V alone and a row's numbers on its own tile row alone, so that a row's bits do not
depend on the rows around it; a second kernel merges a row's chunks in a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .columns import weighted_squares
from .launch import GemmConfig, dense, gemm_config, gemm_target, operand, row_group
from .rows import (
    IGNORE_INDEX,
    LOG2E,
    add_tile,
    head_options,
    inverse_temperature,
    logit_gradient,
    merge,
    one_minus_exp,
    row_entropy,
)

_MAX_CHUNKS = 64
# Of tiles in shared memory: on an H100 a fourth made both kernels slower, by 1 to 9 % (H = 1,024,
# 2,048, 4,096).
STAGES = 3
_LENGTHS = ["n", "group"]


@triton.jit
def program_tile(program, row_tiles, column_tiles, group):
    """The (row tile, column tile) of a program: ``group`` row tiles go through all columns
    together, then the next ``group``."""
    in_group = group * column_tiles
    first = program // in_group * group
    size = tl.minimum(row_tiles - first, group)
    within = program % in_group
    return first + within % size, within // size


@triton.jit
def load_tile(x, first, rows, stride, depth, DEPTH, BLOCK: tl.constexpr, DESCRIPTOR: tl.constexpr):
    """``x[rows, depth : depth + BLOCK]``, zeros beyond DEPTH; ``rows`` int64 and within ``x``.

    By a descriptor, rows ``first …`` are read instead, zeros where there are none.
    """
    if DESCRIPTOR:
        tile = x.load([first, depth])
    else:
        at = depth + tl.arange(0, BLOCK)
        tile = tl.load(x + rows[:, None] * stride + at[None, :], (at < DEPTH)[None, :], other=0.0)
    return tile


@triton.jit
def tile_rows(
    row_tile,
    index_ptr,
    count_ptr,
    n,
    INDEX: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Rows of a tile as (position in the output, row of hidden, whether there is one)."""
    position = row_tile * BLOCK + tl.arange(0, BLOCK)
    inside = position < (tl.load(count_ptr) if COUNT else n)
    if INDEX:
        source = tl.load(index_ptr + position, inside, other=0)
    else:
        source = tl.where(inside, position, 0)
    return position, source.to(tl.int64), inside


@triton.jit
def logits_tile(
    hidden,
    hidden_stride,
    weight,
    weight_stride,
    bias_ptr,
    row,
    source,
    column,
    V,
    H,
    logit_scale,
    logit_softcap,
    BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HIDDEN_DESCRIPTOR: tl.constexpr,
    WEIGHT_DESCRIPTOR: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Logits ``[ROWS, COLUMNS]`` of rows ``row …`` (by pointer: ``source``) and columns
    ``column …``, before the temperature, and their slopes by the product, see head_options.

    Beyond V they are those of other columns, or 0.
    """
    columns = column + tl.arange(0, COLUMNS)
    weight_rows = tl.minimum(columns, V - 1).to(tl.int64)
    z = tl.zeros([ROWS, COLUMNS], tl.float32)
    for k in range(0, H, DEPTH):
        h = load_tile(hidden, row, source, hidden_stride, k, H, DEPTH, HIDDEN_DESCRIPTOR)
        w = load_tile(weight, column, weight_rows, weight_stride, k, H, DEPTH, WEIGHT_DESCRIPTOR)
        z = tl.dot(h, w.T, z, input_precision="ieee")
    return head_options(
        z,
        columns[None, :],
        (columns < V)[None, :],
        bias_ptr if BIAS else None,
        logit_scale,
        logit_softcap,
        SOFTCAP,
    )


@triton.jit(do_not_specialize=_LENGTHS)
def humanline_linear_logps(
    hidden,
    hidden_stride,
    weight,
    weight_stride,
    bias_ptr,
    labels_ptr,
    temperature_ptr,
    index_ptr,
    count_ptr,
    max_ptr,
    sum_ptr,
    t_ptr,
    picked_ptr,
    n,
    V,
    H,
    chunks,
    tiles_per_chunk,
    group,
    logit_scale,
    logit_softcap,
    INDEX: tl.constexpr,
    COUNT: tl.constexpr,
    BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    TEMPERATURE_PER_ROW: tl.constexpr,
    HIDDEN_DESCRIPTOR: tl.constexpr,
    WEIGHT_DESCRIPTOR: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    row_tile, chunk = program_tile(tl.program_id(0), tl.cdiv(n, ROWS), chunks, group)
    position, source, inside = tile_rows(row_tile, index_ptr, count_ptr, n, INDEX, COUNT, ROWS)
    label = tl.load(labels_ptr + source, inside, other=-1).to(tl.int32)
    if tl.max(label, 0) < 0:
        return
    inverse = inverse_temperature(temperature_ptr, source, TEMPERATURE_PER_ROW)
    scale = tl.zeros([ROWS], tl.float32) + inverse * LOG2E
    m = tl.full([ROWS], float("-inf"), tl.float32)
    s = tl.zeros([ROWS], tl.float32)
    t = tl.zeros([ROWS], tl.float32)
    picked = tl.zeros([ROWS], tl.float32)
    first = chunk * tiles_per_chunk * COLUMNS
    last = tl.minimum(first + tiles_per_chunk * COLUMNS, V)
    for column in range(first, last, COLUMNS):
        z, _ = logits_tile(
            hidden,
            hidden_stride,
            weight,
            weight_stride,
            bias_ptr,
            row_tile * ROWS,
            source,
            column,
            V,
            H,
            logit_scale,
            logit_softcap,
            BIAS,
            SOFTCAP,
            HIDDEN_DESCRIPTOR,
            WEIGHT_DESCRIPTOR,
            ROWS,
            COLUMNS,
            DEPTH,
        )
        columns = column + tl.arange(0, COLUMNS)
        picked += tl.sum(tl.where(columns[None, :] == label[:, None], z, 0.0), 1)
        z = tl.where(columns[None, :] < V, z, float("-inf"))
        m, s, t = add_tile(m, s, t, z, scale, ENTROPY)
    out = position.to(tl.int64) * chunks + chunk
    tl.store(max_ptr + out, m, inside)
    tl.store(sum_ptr + out, s, inside)
    if ENTROPY:
        tl.store(t_ptr + out, t, inside)
    # A label that is none is nowhere picked: the last chunk answers for it. (Numbers are compared:
    # a scalar's truth, spread over rows, is no mask in the interpreter of Triton 3.9.)
    none = label >= tl.where(last == V, V, 0x7FFFFFFF)
    picked = tl.where(none, float("nan"), picked)
    tl.store(picked_ptr + position, picked, ((label >= first) & (label < last)) | none)


@triton.jit
def humanline_linear_merge(
    max_ptr,
    sum_ptr,
    t_ptr,
    picked_ptr,
    labels_ptr,
    temperature_ptr,
    index_ptr,
    count_ptr,
    logps_ptr,
    row_max_ptr,
    row_sum_ptr,
    entropy_ptr,
    chunks,
    INDEX: tl.constexpr,
    COUNT: tl.constexpr,
    ENTROPY: tl.constexpr,
    TEMPERATURE_PER_ROW: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    inside = row < tl.load(count_ptr) if COUNT else True
    source = tl.load(index_ptr + row, inside, other=0).to(tl.int64) if INDEX else row
    label = tl.load(labels_ptr + source, inside, other=IGNORE_INDEX)
    if label == IGNORE_INDEX:
        tl.store(logps_ptr + row, 0.0)
        tl.store(row_max_ptr + row, 0.0)
        tl.store(row_sum_ptr + row, 1.0)
        if ENTROPY:
            tl.store(entropy_ptr + row, 0.0)
        return
    chunk = tl.arange(0, CHUNKS)
    at, there = row * chunks + chunk, chunk < chunks
    m = tl.load(max_ptr + at, there, other=float("-inf"))
    s = tl.load(sum_ptr + at, there, other=0.0)
    t = tl.load(t_ptr + at, there, other=0.0) if ENTROPY else m
    picked = tl.load(picked_ptr + row, label >= 0, other=float("nan"))
    inverse = inverse_temperature(temperature_ptr, source, TEMPERATURE_PER_ROW)
    m, s, t = merge(m, s, t, inverse * LOG2E, ENTROPY)
    tl.store(logps_ptr + row, (picked - m) * inverse - tl.log(s))
    tl.store(row_max_ptr + row, m)
    tl.store(row_sum_ptr + row, s)
    if ENTROPY:
        tl.store(entropy_ptr + row, row_entropy(inverse, s, t))


@triton.jit(do_not_specialize=_LENGTHS)
def humanline_linear_gradient(
    dz_ptr,
    dz_stride,
    hidden,
    hidden_stride,
    weight,
    weight_stride,
    bias_ptr,
    labels_ptr,
    temperature_ptr,
    count_ptr,
    logps_ptr,
    max_ptr,
    sum_ptr,
    entropy_ptr,
    g_ptr,
    g_entropy_ptr,
    weights_ptr,
    energies_ptr,
    n,
    V,
    H,
    group,
    logit_scale,
    logit_softcap,
    COUNT: tl.constexpr,
    BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    COEFFICIENT: tl.constexpr,
    ENTROPY: tl.constexpr,
    ENERGIES: tl.constexpr,
    TEMPERATURE_PER_ROW: tl.constexpr,
    HIDDEN_DESCRIPTOR: tl.constexpr,
    WEIGHT_DESCRIPTOR: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    row_tile, column_tile = program_tile(
        tl.program_id(0), tl.cdiv(n, ROWS), tl.cdiv(V, COLUMNS), group
    )
    position, source, inside = tile_rows(row_tile, None, count_ptr, n, False, COUNT, ROWS)
    if row_tile * ROWS >= (tl.load(count_ptr) if COUNT else n):
        return
    column = column_tile * COLUMNS
    z, slope = logits_tile(
        hidden,
        hidden_stride,
        weight,
        weight_stride,
        bias_ptr,
        row_tile * ROWS,
        source,
        column,
        V,
        H,
        logit_scale,
        logit_softcap,
        BIAS,
        SOFTCAP,
        HIDDEN_DESCRIPTOR,
        WEIGHT_DESCRIPTOR,
        ROWS,
        COLUMNS,
        DEPTH,
    )
    label = tl.load(labels_ptr + source, inside, other=-1).to(tl.int32)
    active = label >= 0
    inverse = tl.zeros([ROWS], tl.float32) + inverse_temperature(
        temperature_ptr, source, TEMPERATURE_PER_ROW
    )
    logp = tl.load(logps_ptr + position, active, other=0.0)
    m = tl.load(max_ptr + position, active, other=0.0)
    s = tl.load(sum_ptr + position, active, other=1.0)
    g = tl.full([ROWS], 1.0, tl.float32)
    if COEFFICIENT:
        g = tl.load(g_ptr + position, active, other=0.0).to(tl.float32)
    g_entropy = tl.zeros([ROWS], tl.float32)
    entropy = tl.zeros([ROWS], tl.float32)
    if ENTROPY:
        g_entropy = tl.load(g_entropy_ptr + position, active, other=0.0).to(tl.float32)
        entropy = tl.load(entropy_ptr + position, active, other=0.0)
    columns = column + tl.arange(0, COLUMNS)
    dz = logit_gradient(
        z,
        columns[None, :] == label[:, None],
        (g * one_minus_exp(logp))[:, None],
        m[:, None],
        tl.log2(s)[:, None],
        (inverse * LOG2E)[:, None],
        entropy[:, None],
        g[:, None],
        g_entropy[:, None],
        ENTROPY,
    )
    dz *= inverse[:, None] * slope
    dz = tl.where(active[:, None], dz, 0.0).to(dz_ptr.dtype.element_ty)
    out = dz_ptr + position.to(tl.int64)[:, None] * dz_stride + columns[None, :]
    tl.store(out, dz, (position < n)[:, None] & (columns < V)[None, :])
    if ENERGIES:
        row_weight = tl.load(weights_ptr + position, active, other=0.0)
        at = energies_ptr + tl.cast(row_tile, tl.int64) * V + columns
        tl.store(at, weighted_squares(dz, row_weight), columns < V)


_NEWER = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 8)


def forward_columns(bias: bool, softcap: bool) -> int:
    """Columns of a tile that leave the epilogue enough registers: those of the compile report.

    From Triton 3.8 on the compiler needs more of them for the same code.
    """
    return 128 if bias or softcap or _NEWER else 256


def gradient_columns(entropy: bool, softcap: bool, energies: bool = False) -> int:
    return 64 if softcap else 128 if entropy or energies else 256


def _chunks(vocab: int, config: GemmConfig) -> tuple[int, int]:
    """(chunks, tiles a chunk): at most 64, which bounds the partial results by 768 bytes a row."""
    tiles = triton.cdiv(vocab, config.columns)
    tiles_per_chunk = triton.cdiv(tiles, _MAX_CHUNKS)
    return triton.cdiv(tiles, tiles_per_chunk), tiles_per_chunk


def _gemm_arguments(hidden: Tensor, weight: Tensor, index: Tensor | None, config: GemmConfig):
    """Operands with their strides, and whether each comes as a descriptor."""
    hidden = hidden if hidden.stride(1) == 1 else hidden.contiguous()
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    h = operand(hidden, (config.rows, config.depth), config) if index is None else hidden
    w = operand(weight, (config.columns, config.depth), config)
    flags = {"HIDDEN_DESCRIPTOR": h is not hidden, "WEIGHT_DESCRIPTOR": w is not weight}
    return (h, hidden.stride(0), w, weight.stride(0)), flags


def linear_logps_forward(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: Tensor,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    with_entropy: bool = False,
    index: Tensor | None = None,
    count: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Log-probs and entropies (nats), maximum and sum of exponentials of each row.

    All float32 ``[n]``; the maximum in units of the logits before the temperature, the sum relative
    to it. Beside them it takes ``12 · 64`` bytes a row at most (16 with entropy).

    Args:
        hidden: ``[N, H]``, float32, bfloat16 or float16; copied unless its rows are contiguous.
        weight: ``[V, H]``, the same dtype. Both are read by TMA on sm_90 and sm_100 where rows are
            aligned to 16 bytes. float32 is multiplied in full float32, without tensor cores.
        labels: integer ``[N]``; rows labelled -100 give 0 (maximum 0, sum 1), others that
            are not in ``[0, V)`` NaN.
        bias: ``[V]``.
        temperature: a scalar, or ``[N]``.
        index: integer ``[n]``, the rows to take, gathered as they are read; all N in order if None.
        count: int32 scalar on the device: only the first ``count`` of the n rows are computed, the
            rest give what masked rows give. Nothing is read back to the host.
    """
    columns = forward_columns(bias is not None, logit_softcap is not None)
    config = gemm_config(weight.dtype, gemm_target(weight), columns, STAGES)
    n, (vocab, width) = len(labels if index is None else index), weight.shape
    chunks, tiles_per_chunk = _chunks(vocab, config)
    logps, row_max, row_sum, picked = (hidden.new_empty(n, dtype=torch.float32) for _ in range(4))
    entropy = torch.empty_like(logps) if with_entropy else None
    if n == 0:
        return logps, entropy, row_max, row_sum
    # one allocation each: parts of one would be aligned or not with n, and compile anew
    partials = [hidden.new_empty(n, chunks, dtype=torch.float32) for _ in range(2 + with_entropy)]
    partials = (*partials, None)[:3]
    labels, index = dense(labels), dense(index)
    operands, descriptors = _gemm_arguments(hidden, weight, index, config)
    rows = {
        "INDEX": index is not None,
        "COUNT": count is not None,
        "ENTROPY": with_entropy,
        "TEMPERATURE_PER_ROW": temperature.dim() > 0,
    }
    with torch.cuda.device_of(hidden):
        humanline_linear_logps[(triton.cdiv(n, config.rows) * chunks,)](
            *operands,
            dense(bias),
            labels,
            dense(temperature),
            index,
            count,
            *partials,
            picked,
            n,
            vocab,
            width,
            chunks,
            tiles_per_chunk,
            row_group(config, width, hidden.dtype),
            float(logit_scale),
            float(logit_softcap or 0),
            BIAS=bias is not None,
            SOFTCAP=logit_softcap is not None,
            **rows,
            **descriptors,
            **config.launch,
        )
        humanline_linear_merge[(n,)](
            *partials,
            picked,
            labels,
            dense(temperature),
            index,
            count,
            logps,
            row_max,
            row_sum,
            entropy,
            chunks,
            **rows,
            CHUNKS=triton.next_power_of_2(chunks),
            num_warps=1,
        )
    return logps, entropy, row_max, row_sum


def linear_logits_gradient(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    logps: Tensor,
    entropy: Tensor | None,
    row_max: Tensor,
    row_sum: Tensor,
    *,
    of_logp: Tensor | None = None,
    of_entropy: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: Tensor,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    count: Tensor | None = None,
    out: Tensor | None = None,
    dtype: torch.dtype | None = None,
    weights: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Gradient ``dz [n, V]`` of ``Σ of_logp·logp + of_entropy·entropy`` with respect to
    ``hidden @ weight.T + bias``, the logits formed again.

    Args:
        hidden, weight, labels, bias, temperature, count: as in the forward, of these n rows. Rows
            labelled below 0 are zeros. Of rows beyond ``count`` those in the last row tile are
            zeros, the others are not written.
        logps, entropy, row_max, row_sum: ``[n]``, of these n rows, by the forward.
        of_logp: ``[n]``; None for 1.
        of_entropy: ``[n]``; None for 0, then ``entropy`` is not looked at.
        out: ``[n, V]`` (or more rows), rows contiguous, to write to; if None, one is made in
            ``dtype``, or that of the weight.
        weights: float32 ``[n]``; then a tuple of the gradient and of each column's
            ``Σ_t weights[t] · dz[t, v]²``, float32 ``[V]``, is returned. Not with ``count``.
    """
    columns = gradient_columns(
        of_entropy is not None, logit_softcap is not None, weights is not None
    )
    config = gemm_config(weight.dtype, gemm_target(weight), columns, STAGES)
    n, (vocab, width) = len(labels), weight.shape
    if out is None:
        out = hidden.new_empty(n, vocab, dtype=dtype or weight.dtype)
    out = out[:n]
    row_tiles, energies = triton.cdiv(n, config.rows), None
    if weights is not None:
        energies = hidden.new_empty(row_tiles, vocab, dtype=torch.float32)
    if n == 0:
        return out if energies is None else (out, energies.sum(0))
    operands, descriptors = _gemm_arguments(hidden, weight, None, config)
    with torch.cuda.device_of(hidden):
        tiles = row_tiles * triton.cdiv(vocab, config.columns)
        humanline_linear_gradient[(tiles,)](
            out,
            out.stride(0),
            *operands,
            dense(bias),
            dense(labels),
            dense(temperature),
            count,
            logps,
            row_max,
            row_sum,
            entropy,
            dense(of_logp),
            dense(of_entropy),
            dense(weights),
            energies,
            n,
            vocab,
            width,
            row_group(config, width, hidden.dtype),
            float(logit_scale),
            float(logit_softcap or 0),
            COUNT=count is not None,
            BIAS=bias is not None,
            SOFTCAP=logit_softcap is not None,
            COEFFICIENT=of_logp is not None,
            ENTROPY=of_entropy is not None,
            ENERGIES=weights is not None,
            TEMPERATURE_PER_ROW=temperature.dim() > 0,
            **descriptors,
            **config.launch,
        )
    return out if energies is None else (out, energies.sum(0))
