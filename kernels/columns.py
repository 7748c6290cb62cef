"""The energy of each column of the logits' gradient: what it would lack without that column; and
sums of columns, that put back what is left out.

Where the gradient is formed by a GEMM's epilogue (linear_logps.py) energies come along. Where a
program walks a row of logits they cannot, short of a float a logit or atomics: this kernel reads
what was written once more, 2 bytes a logit in half precision (the pass before it has moved 6).

Either way a program sums the rows of its tile and writes them to a line of its own, 4 bytes for
every 128 logits, and the lines are summed in order: the same bits on a rerun.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .interpreter import correct_interpreter
from .launch import dense

correct_interpreter()

# A line is of PART rows; a program adds up ROWS of them at a time.
LAUNCH = {"PART": 128, "ROWS": 8, "COLUMNS": 512, "num_warps": 4}


@triton.jit(do_not_specialize=["n"])
def humanline_column_sums(
    lines_ptr,
    x_ptr,
    x_stride,
    weights_ptr,
    n,
    V,
    SQUARED: tl.constexpr,
    PART: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    line = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    there = columns < V
    # One sum a thread and column, added up at the end: no thread waits for another in the loop.
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, PART, ROWS):
        rows = line * PART + start + tl.arange(0, ROWS)
        inside = (rows < n)[:, None] & there[None, :]
        x = tl.load(x_ptr + rows[:, None] * x_stride + columns[None, :], inside, other=0.0)
        x = x.to(tl.float32)
        weight = tl.load(weights_ptr + rows, rows < n, other=0.0)
        sums += x * (x if SQUARED else 1.0) * weight[:, None]
    tl.store(lines_ptr + line * V + columns, tl.sum(sums, 0), there)


@triton.jit
def weighted_squares(dz, weight):
    """``Σ weight · dz²`` over the rows of a tile, ``[C]``."""
    dz = dz.to(tl.float32)
    return tl.sum(dz * dz * weight[:, None], 0)


def column_energies(dz: Tensor, weights: Tensor) -> Tensor:
    """``Σ_t weights[t] · dz[t, v]²``, float32 ``[V]``.

    Args:
        dz: ``[n, V]``, any floating dtype, rows contiguous.
        weights: float32 ``[n]``.
    """
    return _column_sums(dz, weights, squared=True)


def weighted_sum(x: Tensor, weights: Tensor) -> Tensor:
    """``Σ_t weights[t] · x[t, v]``, float32 ``[V]``; arguments as of :func:`column_energies`."""
    return _column_sums(x, weights, squared=False)


def _column_sums(x: Tensor, weights: Tensor, squared: bool) -> Tensor:
    n, width = x.shape
    x = x if x.stride(1) == 1 else x.contiguous()  # a head's weight may lie in any way
    lines = x.new_empty(triton.cdiv(n, LAUNCH["PART"]), width, dtype=torch.float32)
    if n:
        with torch.cuda.device_of(x):
            humanline_column_sums[(triton.cdiv(width, LAUNCH["COLUMNS"]), len(lines))](
                lines, x, x.stride(0), dense(weights), n, width, SQUARED=squared, **LAUNCH
            )
    return lines.sum(0)
