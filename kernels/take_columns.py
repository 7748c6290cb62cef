"""Some columns of a matrix, moved to its front: one launch, in place."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .interpreter import correct_interpreter

correct_interpreter()

LAUNCH = {"BLOCK": 2048, "num_warps": 4}


@triton.jit(do_not_specialize=["K"])
def humanline_take_columns(x_ptr, x_stride, columns_ptr, K, BLOCK: tl.constexpr):
    row = x_ptr + tl.program_id(0).to(tl.int64) * x_stride
    for start in range(0, K, BLOCK):
        at = start + tl.arange(0, BLOCK)
        column = tl.load(columns_ptr + at, at < K, other=0)
        x = tl.load(row + column, at < K)
        tl.debug_barrier()  # a thread reads what another is about to write over
        tl.store(row + at, x, at < K)


def take_columns_(x: Tensor, columns: Tensor) -> Tensor:
    """``x[:, i] = x[:, columns[i]]`` for all i at once; returns the columns ``x[:, :K]`` written.

    Args:
        x: ``[n, V]``, rows contiguous.
        columns: integer ``[K]``, increasing: none that is still to be read is written before.
    """
    n, k = len(x), len(columns)
    if n and k:
        columns = columns.int()  # half the bytes, which every program reads
        with torch.cuda.device_of(x):
            humanline_take_columns[(n,)](x, x.stride(0), columns, k, **LAUNCH)
    return x[:, :k]
