"""What each row of the logits' gradient has in some columns: its sum over them."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .interpreter import correct_interpreter
from .launch import dense

correct_interpreter()

LAUNCH = {"BLOCK": 4096, "num_warps": 8}


@triton.jit
def humanline_masses(masses_ptr, x_ptr, x_stride, weights_ptr, V, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    mass = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + row * x_stride + columns, columns < V, other=0.0).to(tl.float32)
        mass += x * tl.load(weights_ptr + columns, columns < V, other=0.0)
    tl.store(masses_ptr + row, tl.sum(mass, 0))


def masses(x: Tensor, weights: Tensor) -> Tensor:
    """``Σ_v x[t, v] · weights[v]``, float32 ``[n]``.

    Args:
        x: ``[n, V]``, any floating dtype, rows contiguous.
        weights: float32 ``[V]``.
    """
    n, width = x.shape
    result = x.new_empty(n, dtype=torch.float32)
    if n:
        with torch.cuda.device_of(x):
            humanline_masses[(n,)](result, x, x.stride(0), dense(weights), width, **LAUNCH)
    return result
