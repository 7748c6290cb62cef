"""Multiply a gradient by the incoming one, in place; free where that is 1, and without looking.

Whether the incoming gradient is 1 is known on the device alone: each program reads it and returns
at once if so, which spares a synchronisation as well as the bytes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .interpreter import correct_interpreter

correct_interpreter()

LAUNCH = {"BLOCK": 8192, "num_warps": 8}
# As many as a GPU of 132 SMs holds at once: where the factor is 1, a program for each block would
# only come and go, which on an H100 took a twentieth of the loss that came before.
PROGRAMS = 1024


@triton.jit(do_not_specialize=["rows"])
def humanline_scale(x_ptr, factor_ptr, rows, V, BLOCK: tl.constexpr):
    factor = tl.load(factor_ptr).to(tl.float32)
    if factor == 1.0:
        return
    n = rows.to(tl.int64) * V
    for start in range(tl.program_id(0).to(tl.int64) * BLOCK, n, tl.num_programs(0) * BLOCK):
        index = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + index, index < n)
        tl.store(x_ptr + index, (x.to(tl.float32) * factor).to(x.dtype), index < n)


def scale_(x: Tensor, factor: Tensor) -> Tensor:
    """``x *= factor`` for a contiguous ``x [..., V]`` and a scalar tensor; returns ``x``."""
    vocab = x.shape[-1]
    if x.numel():
        grid = (min(triton.cdiv(x.numel(), LAUNCH["BLOCK"]), PROGRAMS),)
        with torch.cuda.device_of(x):
            humanline_scale[grid](x, factor, x.numel() // vocab, vocab, **LAUNCH)
    return x
