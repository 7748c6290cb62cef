"""Products of columns and rows, summed into a matrix in one pass over it, rounded once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .interpreter import correct_interpreter
from .launch import dense

correct_interpreter()

LAUNCH = {"ROWS": 8, "BLOCK": 1024, "num_warps": 8}


@triton.jit(do_not_specialize=["rank"])
def humanline_outer(
    out_ptr,
    left_ptr,
    right_ptr,
    rank,
    V,
    width,
    ADD: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    v = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (v < V)[:, None] & (at < width)[None, :]
    out = out_ptr + v.to(tl.int64)[:, None] * width + at[None, :]
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for k in range(rank):
        column = tl.load(left_ptr + k * V + v, v < V, other=0.0)
        row = tl.load(right_ptr + k * width + at, at < width, other=0.0)
        total += column[:, None] * row[None, :]
    if ADD:
        total += tl.load(out, inside, other=0.0)
    tl.store(out, total, inside)


def outer_(out: Tensor, columns: Tensor, rows: Tensor, add: bool = False) -> Tensor:
    """``out[v, h] = Σ_k columns[k, v] · rows[k, h]``, or ``+=``; returns ``out``.

    Args:
        out: ``[V, H]``, any floating dtype, contiguous.
        columns: float32 ``[K, V]``; rows: float32 ``[K, H]``.
    """
    vocab, width = out.shape
    if out.numel():
        grid = triton.cdiv(vocab, LAUNCH["ROWS"]), triton.cdiv(width, LAUNCH["BLOCK"])
        with torch.cuda.device_of(out):
            humanline_outer[grid](
                out, dense(columns), dense(rows), len(columns), vocab, width, ADD=add, **LAUNCH
            )
    return out
