"""The two GEMMs of the backward where the number of rows is known on the device alone.

A CUDA graph cannot read a count back to size its launches. These run a grid for all n rows and
leave early beyond ``count``: tiles of the gradient of hidden states without a row are not computed,
the sum over rows in the gradient of the weight ends there. Where the count is known, a GEMM library
does the same. Each element is summed in order by one program, in float32: no atomics.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import dense, gemm_config, gemm_target, operand
from .linear_logps import load_tile, program_tile, tile_rows


@triton.jit
def load_block(
    x,
    row,
    rows,
    column,
    columns,
    stride,
    R: tl.constexpr,
    C: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
):
    """``x[row : row + R, column : column + C]``, zeros beyond ``rows`` (by a descriptor: those of
    ``x``) and ``columns``."""
    if DESCRIPTOR:
        block = x.load([row, column])
    else:
        down, along = row + tl.arange(0, R), column + tl.arange(0, C)
        inside = (down < rows)[:, None] & (along < columns)[None, :]
        block = tl.load(x + down.to(tl.int64)[:, None] * stride + along[None, :], inside, other=0.0)
    return block


@triton.jit(do_not_specialize=["n", "group"])
def humanline_matmul_hidden(
    out_ptr,
    out_stride,
    dz,
    dz_stride,
    weight,
    weight_stride,
    scale_ptr,
    index_ptr,
    count_ptr,
    n,
    V,
    H,
    group,
    SCALE: tl.constexpr,
    INDEX: tl.constexpr,
    DZ_DESCRIPTOR: tl.constexpr,
    WEIGHT_DESCRIPTOR: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    row_tile, column_tile = program_tile(
        tl.program_id(0), tl.cdiv(n, ROWS), tl.cdiv(H, COLUMNS), group
    )
    if row_tile * ROWS >= tl.load(count_ptr):
        return
    position, target, inside = tile_rows(row_tile, index_ptr, count_ptr, n, INDEX, True, ROWS)
    rows = tl.where(inside, position, 0).to(tl.int64)
    column = column_tile * COLUMNS
    dh = tl.zeros([ROWS, COLUMNS], tl.float32)
    for k in range(0, V, DEPTH):
        a = load_tile(dz, row_tile * ROWS, rows, dz_stride, k, V, DEPTH, DZ_DESCRIPTOR)
        b = load_block(weight, k, V, column, H, weight_stride, DEPTH, COLUMNS, WEIGHT_DESCRIPTOR)
        dh = tl.dot(a, b, dh, input_precision="ieee")
    if SCALE:
        dh *= tl.load(scale_ptr + position, inside, other=0.0).to(tl.float32)[:, None]
    columns = column + tl.arange(0, COLUMNS)
    out = out_ptr + target[:, None] * out_stride + columns[None, :]
    tl.store(out, dh.to(out_ptr.dtype.element_ty), inside[:, None] & (columns < H)[None, :])


@triton.jit
def humanline_matmul_weight(
    total_ptr,
    dz,
    dz_ptr,
    dz_stride,
    hidden,
    hidden_ptr,
    hidden_stride,
    count_ptr,
    factor_ptr,
    V,
    H,
    group,
    DESCRIPTORS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    row_tile, column_tile = program_tile(
        tl.program_id(0), tl.cdiv(V, ROWS), tl.cdiv(H, COLUMNS), group
    )
    row, column = row_tile * ROWS, column_tile * COLUMNS
    count = tl.load(count_ptr)
    if count == 0:
        return
    dw = tl.zeros([ROWS, COLUMNS], tl.float32)
    # A descriptor knows nothing of the count: it loads whole tiles of rows. The rest is masked, in
    # tiles whose addresses leave the sum its registers.
    REST: tl.constexpr = 16 if DESCRIPTORS else DEPTH
    whole = 0
    if DESCRIPTORS:
        whole = count // DEPTH * DEPTH
        for k in range(0, whole, DEPTH):
            dw = tl.dot(dz.load([k, row]).T, hidden.load([k, column]), dw)
    for k in range(whole, count, REST):
        a = load_block(dz_ptr, k, count, row, V, dz_stride, REST, ROWS, False)
        b = load_block(hidden_ptr, k, count, column, H, hidden_stride, REST, COLUMNS, False)
        dw = tl.dot(a.T, b, dw, input_precision="ieee")
    rows, columns = row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
    inside = (rows < V)[:, None] & (columns < H)[None, :]
    out = total_ptr + rows.to(tl.int64)[:, None] * H + columns[None, :]
    dw *= tl.load(factor_ptr)
    tl.store(out, tl.load(out, inside, other=0.0) + dw, inside)


def hidden_gradient_(
    out: Tensor,
    dz: Tensor,
    weight: Tensor,
    count: Tensor,
    *,
    scale: Tensor | None = None,
    index: Tensor | None = None,
) -> Tensor:
    """``out[index[i]] = scale[i] · (dz[i] @ weight)`` for ``i < count``; returns ``out``.

    Rows of ``out`` that are not named keep what they hold.

    Args:
        out: ``[N, H]``, any floating dtype, rows contiguous; written in it once, from float32.
        dz: ``[n, V]``, rows contiguous, in the weight's dtype.
        weight: ``[V, H]``, rows contiguous.
        count: int32 scalar on the device.
        scale: ``[n]``; None for 1.
        index: integer ``[n]``, no row twice; None for ``i`` itself.
    """
    config = gemm_config(weight.dtype, gemm_target(weight))
    n, (vocab, width) = len(dz), weight.shape
    if n == 0:
        return out
    a = operand(dz, (config.rows, config.depth), config)
    b = operand(weight, (config.depth, config.columns), config)
    with torch.cuda.device_of(out):
        tiles = triton.cdiv(n, config.rows) * triton.cdiv(width, config.columns)
        humanline_matmul_hidden[(tiles,)](
            out,
            out.stride(0),
            a,
            dz.stride(0),
            b,
            weight.stride(0),
            dense(scale),
            dense(index),
            count,
            n,
            vocab,
            width,
            8,
            SCALE=scale is not None,
            INDEX=index is not None,
            DZ_DESCRIPTOR=a is not dz,
            WEIGHT_DESCRIPTOR=b is not weight,
            **config.launch,
        )
    return out


def add_weight_gradient_(
    total: Tensor, dz: Tensor, hidden: Tensor, count: Tensor, *, factor: Tensor
) -> Tensor:
    """``total += factor · dz[:count]ᵀ @ hidden[:count]``; returns ``total``.

    Args:
        total: float32 ``[V, H]``, contiguous.
        dz: ``[n, V]``, rows contiguous.
        hidden: ``[n, H]``, of the same rows (gathered, and scaled where ``dz`` is not), in the
            dtype of ``dz``, rows contiguous.
        count: int32 scalar on the device. What lies beyond it in dz and hidden is not looked at.
        factor: float32 scalar on the device.
    """
    config = gemm_config(dz.dtype, gemm_target(dz), columns=128)
    vocab, width = total.shape
    a = operand(dz, (config.depth, config.rows), config)
    b = operand(hidden, (config.depth, config.columns), config)
    descriptors = a is not dz and b is not hidden
    with torch.cuda.device_of(total):
        tiles = triton.cdiv(vocab, config.rows) * triton.cdiv(width, config.columns)
        humanline_matmul_weight[(tiles,)](
            total,
            a if descriptors else dz,
            dz,
            dz.stride(0),
            b if descriptors else hidden,
            hidden,
            hidden.stride(0),
            count,
            factor,
            vocab,
            width,
            8,
            DESCRIPTORS=descriptors,
            **config.launch,
        )
    return total
