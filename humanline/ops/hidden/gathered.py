"""A head that FSDP2 has split over ranks with rows of their own, by whichever way sends less.

Gathered whole for a call, its gradient is what every rank's rows give: summed over ranks in float32
(float64 from float64), each rank keeping its part. Or the rows travel: the head's part is a slice
of a vocabulary, so with hidden states of all ranks gathered and their gradient summed, it is used
where it lies, and its gradient is whole there.

A parameter that is read where it lies has no hooks of FSDP's: what the engine would do to the
gradient is done here.
"""

import math

import torch
from torch import Tensor

from humanline import autograd, checks
from humanline.dtypes import at_least_float32
from humanline.joined import Share
from humanline.ops.dtensors import HIDDEN, own_part
from humanline.ops.vocabulary import Shard
from humanline.parallel import Axis, Parallel
from humanline.sharding import is_dtensor


def gathered(x: Tensor | None, name: str, dtype: torch.dtype, parallel: Parallel) -> Tensor | None:
    """All rows of a DTensor that the ranks of ``data``, or with them those of ``sequence``, have
    split along its first dimension, in this dtype: as many bytes are sent as that takes. Where
    those of ``vocab`` have split it before, all rows of this rank's slice. Any other value is
    returned as it is.

    Raises:
        ValueError: it lies on the mesh of both axes and is not split so.
    """
    axis = parallel.axis("data")
    if not (_is_split(x, axis) or _is_split_slice(x, name, parallel)):
        axis = _both_row_axes(x, parallel)
        if axis is None:
            return x  # if it is a DTensor, refused with the advice that goes for any
    local = x.to_local(grad_placements=x.placements)
    sizes = [n for (n,) in axis.exchange(len(local), device=local.device)]
    return _Gathered.apply(local, dtype, axis, sizes, _factor(axis, parallel))


def _both_row_axes(x: Tensor | None, parallel: Parallel) -> Axis | None:
    """The ranks of ``data`` and ``sequence`` as one axis, where one dimension of a mesh has them
    all, as FSDP2 beside context parallelism has, and they have split it along the first."""
    mesh = x.device_mesh if is_dtensor(x) else None
    if mesh is None or mesh.ndim != 1 or not mesh.get_coordinate() or len(parallel.rows) != 2:
        return None
    axis = Axis("data and sequence", mesh.get_group())
    all_there = all(set(of_rows.ranks) <= set(axis.ranks) for of_rows in parallel.rows)
    as_many = axis.size == math.prod(of_rows.size for of_rows in parallel.rows)
    return axis if all_there and as_many and x.placements[0].is_shard(0) else None


def _is_split(x: Tensor | None, axis: Axis | None) -> bool:
    """Whether these ranks, and no others, have split it along its first dimension."""
    if axis is None or not is_dtensor(x):
        return False
    mesh = x.device_mesh
    [i, *others] = [i for i in range(mesh.ndim) if mesh.size(i) > 1] or [0]
    return not others and axis.is_dimension(mesh, i) and x.placements[i].is_shard(0)


def _is_split_slice(x: Tensor | None, name: str, parallel: Parallel) -> bool:
    """Whether it is a slice of a vocabulary that the ranks of ``data`` have split."""
    data, vocab = parallel.axis("data"), parallel.axis("vocab")
    both = data is not None and vocab is not None and min(data.size, vocab.size) > 1
    if not both or not is_dtensor(x) or x.device_mesh.ndim != 2:
        return False
    for of_data, of_vocab in ((0, 1), (1, 0)):
        if all(a.is_dimension(x.device_mesh, i) for a, i in ((data, of_data), (vocab, of_vocab))):
            break
    else:
        return False
    # Placements count from the left: where data's comes first, it is by a stride that the slices
    # are the vocabulary's.
    stride = vocab.size if of_data == 0 else 1
    along_rows = all(getattr(placement, "dim", None) == 0 for placement in x.placements)
    checks.require(
        along_rows and getattr(x.placements[of_data], "split_factor", 1) == stride,
        lambda: (
            f"{name} must be split along dimension 0, by the {vocab} and each slice by the {data}, "
            f"as FSDP2 splits a tensor-parallel head, got placements {x.placements}"
        ),
    )
    return True


def _factor(axis: Axis, parallel: Parallel) -> float:
    return 1 / axis.size if parallel.grad == "mean" else 1.0


def slice_for_all_rows(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, parallel: Parallel
) -> tuple[Shard, Tensor, Tensor, Tensor | None] | None:
    """Which slice of the vocabulary this rank's part of weight and bias is, its hidden states and
    these parts; None where the head is not split so, or had better travel itself."""
    axis = parallel.axis("data")
    if parallel.rows != [axis] or parallel.axis("vocab") is not None:
        return None
    tensors = (weight,) if bias is None else (weight, bias)
    same = isinstance(hidden, Tensor) and all(x.dtype == hidden.dtype for x in tensors)
    if not same or not all(_is_split(x, axis) for x in tensors) or hidden.dim() == 0:
        return None
    hidden = own_part(hidden, "hidden", parallel, HIDDEN)
    parts = [x.to_local(grad_placements=x.placements) for x in tensors]
    n = hidden.shape[:-1].numel()
    met = axis.exchange(len(parts[0]), n, device=hidden.device)
    columns, rows = (tuple(numbers[i] for numbers in met) for i in range(2))
    trains = (torch.is_grad_enabled() and x.requires_grad for x in (hidden, weight))
    sizes = hidden.element_size(), weight.element_size()
    if min(columns) == 0 or not rows_send_less(sum(rows), sum(columns), *sizes, *trains):
        return None
    parts = [_Weighted.apply(x, _factor(axis, parallel)) for x in parts]
    return Shard(axis, columns), hidden, *(*parts, None)[:2]


def rows_send_less(
    rows: int,
    columns: int,
    of_hidden: int,
    of_weight: int,
    body_trains: bool = True,
    head_trains: bool = True,
) -> bool:
    """Whether hidden states of all ranks and their gradient are fewer bytes than a whole weight and
    its gradient, which is summed in float32 at least; elements having so many bytes."""
    a_row = of_hidden * (1 + body_trains)
    a_column = of_weight + max(of_weight, 4) * head_trains
    return rows * a_row < columns * a_column


def rows_of_all_ranks(x: Tensor, share: Share) -> Tensor:
    """``[N, …]`` of rows ``[n, …]``, as ``share`` has them; differentiable."""
    return _Travelling.apply(x, share)


class _Travelling(torch.autograd.Function):
    @staticmethod
    @autograd.forward
    def forward(ctx, x, share: Share):
        ctx.share = share
        return share.axis.gather_rows(x, share.sizes)[share.order]

    @staticmethod
    @autograd.backward
    def backward(ctx, grad):
        share = ctx.share
        by_rank = torch.empty_like(grad).index_copy_(0, share.order, grad)
        return share.axis.sum_rows(by_rank, share.sizes), None


class _Weighted(torch.autograd.Function):
    @staticmethod
    @autograd.forward
    def forward(ctx, x, factor: float):
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    @autograd.backward
    def backward(ctx, grad):
        return grad * ctx.factor, None


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
