"""Rows of a matrix, put to where they belong in a larger one or added to what is there."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .interpreter import correct_interpreter

correct_interpreter()

LAUNCH = {"ROWS": 8, "BLOCK": 512, "num_warps": 4}


@triton.jit(do_not_specialize=["n"])
def humanline_put_rows(
    to_ptr,
    to_stride,
    index_ptr,
    x_ptr,
    x_stride,
    n,
    width,
    ADD: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row = tl.load(index_ptr + place, place < n, other=0).to(tl.int64)
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)[None, :]
        inside = (place < n)[:, None] & (at < width)
        to = to_ptr + row[:, None] * to_stride + at
        x = tl.load(x_ptr + place[:, None] * x_stride + at, inside)
        if ADD:
            x = x.to(tl.float32) + tl.load(to, inside).to(tl.float32)
        tl.store(to, x, inside)


def put_rows_(to: Tensor, rows: Tensor, x: Tensor, add: bool = False) -> Tensor:
    """``to[rows[i]] = x[i]``, or ``+=``; returns ``to``.

    Args:
        to: ``[V, H]``; x: ``[k, H]`` in the same dtype; the rows of both contiguous.
        rows: integer ``[k]``, none of them twice.
    """
    n, width = len(rows), to.shape[1]
    if n:
        with torch.cuda.device_of(to):
            humanline_put_rows[(triton.cdiv(n, LAUNCH["ROWS"]),)](
                to, to.stride(0), rows, x, x.stride(0), n, width, ADD=add, **LAUNCH
            )
    return to
