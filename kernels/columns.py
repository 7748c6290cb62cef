"""The energy of each column of the logits' gradient: what it would lack without that column.

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
LAUNCH = {"PART": 128, "ROWS": 16, "COLUMNS": 512, "num_warps": 8}


@triton.jit(do_not_specialize=["n"])
def humanline_column_energies(
    lines_ptr,
    dz_ptr,
    dz_stride,
    weights_ptr,
    n,
    V,
    PART: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    line = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    there = columns < V
    # One sum a thread and column, added up at the end: no thread waits for another in the loop.
    energy = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, PART, ROWS):
        rows = line * PART + start + tl.arange(0, ROWS)
        inside = (rows < n)[:, None] & there[None, :]
        dz = tl.load(dz_ptr + rows[:, None] * dz_stride + columns[None, :], inside, other=0.0)
        weight = tl.load(weights_ptr + rows, rows < n, other=0.0)
        dz = dz.to(tl.float32)
        energy += dz * dz * weight[:, None]
    tl.store(lines_ptr + line * V + columns, tl.sum(energy, 0), there)


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
    n, vocab = dz.shape
    lines = dz.new_empty(triton.cdiv(n, LAUNCH["PART"]), vocab, dtype=torch.float32)
    if n:
        with torch.cuda.device_of(dz):
            humanline_column_energies[(triton.cdiv(vocab, LAUNCH["COLUMNS"]), len(lines))](
                lines,
                dz,
                dz.stride(0),
                dense(weights),
                n,
                vocab,
                **LAUNCH,
            )
    return lines.sum(0)
