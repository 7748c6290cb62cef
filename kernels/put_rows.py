"""Rows of a matrix, put to where they belong in a larger one or added to what is there."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .interpreter import correct_interpreter

correct_interpreter()

LAUNCH = {"BLOCK": 1024, "num_warps": 4}


@triton.jit
def humanline_put_rows(
    to_ptr, to_stride, index_ptr, x_ptr, x_stride, width, ADD: tl.constexpr, BLOCK: tl.constexpr
):
    place = tl.program_id(0).to(tl.int64)
    to = to_ptr + tl.load(index_ptr + place).to(tl.int64) * to_stride
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + place * x_stride + at, at < width)
        if ADD:
            x = x.to(tl.float32) + tl.load(to + at, at < width).to(tl.float32)
        tl.store(to + at, x, at < width)


def put_rows_(to: Tensor, rows: Tensor, x: Tensor, add: bool = False) -> Tensor:
    """``to[rows[i]] = x[i]``, or ``+=``; returns ``to``.

    Args:
        to: ``[V, H]``; x: ``[k, H]`` in the same dtype; the rows of both contiguous.
        rows: integer ``[k]``, none of them twice.
    """
    if len(rows):
        with torch.cuda.device_of(to):
            humanline_put_rows[(len(rows),)](
                to, to.stride(0), rows, x, x.stride(0), to.shape[1], ADD=add, **LAUNCH
            )
    return to
