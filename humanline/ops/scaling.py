"""Multiplying gradients by what comes in, in their own memory and rounded once."""

import math

import torch
from torch import Tensor

from humanline import autograd, checks

_FLOATS = 2**18  # a MiB: what a CPU widens at a time


def multiply(x: Tensor, factor: Tensor, out: Tensor) -> Tensor:
    """``out = x · factor``, in float32 at least, for one factor or one a row; ``out`` may be ``x``.

    On a CPU torch widens all of a half-precision tensor before it multiplies, unless by a number:
    there it is given a few rows at a time.
    """
    if factor.device.type == "cpu" and factor.dim() == 0 and out.dtype == x.dtype:
        return torch.mul(x, factor, out=out)
    factor = factor.reshape(-1, *[1] * (x.dim() - 1)).expand(len(x), *x.shape[1:])
    rows = len(x)
    if checks.free_to_read(x):
        rows = max(1, _FLOATS // max(1, math.prod(x.shape[1:])))
    for start in range(0, len(x), rows):
        some = slice(start, start + rows)
        torch.mul(x[some], factor[some], out=out[some])
    return out


def scaled_gradient(x: Tensor, factor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """``x · factor`` in the given dtype, of a gradient that the forward saved; for a backward.

    In the memory of ``x``, unless another backward may come for it or the dtype is another: then it
    is a copy. Nothing is multiplied where the factor is the number 1 and looking is free: on a CPU.
    """
    dtype = dtype or x.dtype
    ours = dtype == x.dtype and not autograd.graph_is_kept()
    if checks.free_to_read(factor) and factor.dim() == 0 and factor == 1:
        return x.to(dtype, copy=not ours)
    return multiply(x, factor, x if ours else torch.empty_like(x, dtype=dtype))
