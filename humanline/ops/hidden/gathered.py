"""A head that FSDP2 has split over ranks with rows of their own: gathered whole for a call.

Its gradient is what every rank's rows give: summed over ranks in float32 (float64 from float64),
each rank keeping its part. A parameter that is read where it lies has no hooks of FSDP's: what the
engine would do to the gradient is done here.
"""

import torch
from torch import Tensor

from humanline import autograd
from humanline.dtypes import at_least_float32
from humanline.parallel import Axis, Parallel
from humanline.sharding import is_dtensor


def gathered(x: Tensor | None, dtype: torch.dtype, parallel: Parallel) -> Tensor | None:
    """All rows of a DTensor that the ranks of ``data`` have split along its first dimension, in
    this dtype: as many bytes are sent as that takes. Any other value is returned as it is."""
    axis = parallel.axis("data")
    if axis is None or not is_dtensor(x) or not axis.is_of(x.device_mesh):
        return x
    if not x.placements[0].is_shard(0):
        return x  # refused with the advice that goes for any DTensor
    local = x.to_local(grad_placements=x.placements)
    sizes = [n for (n,) in axis.exchange(len(local), device=local.device)]
    factor = 1 / axis.size if parallel.grad == "mean" else 1.0
    return _Gathered.apply(local, dtype, axis, sizes, factor)


class _Gathered(torch.autograd.Function):
    @staticmethod
    @autograd.forward
    def forward(ctx, local, dtype: torch.dtype, axis: Axis, sizes: list[int], factor: float):
        ctx.axis, ctx.sizes, ctx.factor, ctx.dtype = axis, sizes, factor, local.dtype
        return axis.gather_rows(local.to(dtype), sizes)

    @staticmethod
    @autograd.backward
    def backward(ctx, grad):
        own = ctx.axis.sum_rows(at_least_float32(grad), ctx.sizes)
        return own.mul_(ctx.factor).to(ctx.dtype), *[None] * 4
