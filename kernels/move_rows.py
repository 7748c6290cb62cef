"""Rows of a matrix moved to where others are not needed any more, in one launch and in place."""

import torch
import triton
import triton.language as tl
from torch import Tensor

LAUNCH = {"BLOCK": 4096, "num_warps": 8}


@triton.jit
def humanline_move_rows(x_ptr, order_ptr, stride, width, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64)
    row = tl.load(order_ptr + place).to(tl.int64)
    if row == place:
        return
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < width
        tl.store(x_ptr + place * stride + at, tl.load(x_ptr + row * stride + at, inside), inside)


def move_rows_(x: Tensor, order: Tensor) -> Tensor:
    """``x[i] = x[order[i]]`` for all i at once; returns the rows ``x[:k]`` written.

    Args:
        x: ``[n, width]``, rows contiguous.
        order: integer ``[k]``; each ``order[i]`` is i, or at least k: no row that is read is
            written.
    """
    k = len(order)
    if k:
        with torch.cuda.device_of(x):
            humanline_move_rows[(k,)](x, order, x.stride(0), x.shape[1], **LAUNCH)
    return x[:k]
