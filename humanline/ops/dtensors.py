"""DTensors whose mesh names axes: what of one a rank computes with, and how its gradient lies."""

from typing import Any

import torch

from humanline import autograd, checks
from humanline.parallel import Axis, Parallel
from humanline.sharding import is_dtensor

#: For each axis that may split a tensor: along which dimension. None: its ranks compute with all of
#: it, and each finds a part of the gradient.
Split = dict[str, int | None]

ROWS: Split = {"data": 0, "sequence": -2}
HIDDEN: Split = {**ROWS, "vocab": None}
LOGITS: Split = {**ROWS, "vocab": -1}
HEAD: Split = {"vocab": 0}


def own_part(x: Any, name: str, parallel: Parallel, split: Split) -> Any:
    """What this rank has of a DTensor each dimension of whose mesh is one of these axes, or one
    rank alone; gathered over those that need all of it. Anything else is returned as it is.

    Raises:
        ValueError: a DTensor of another mesh, or split along another dimension.
    """
    if not is_dtensor(x):
        return x
    if not parallel.shares or x.dim() == 0:
        checks.require_tensors(**{name: x})
    from torch.distributed.tensor import Partial, Replicate

    needed, of_gradient = list(x.placements), list(x.placements)
    for i, axis in enumerate(_axes(x, name, parallel, split)):
        if axis is None:
            continue
        placement, dim = x.placements[i], split[axis.name]
        if dim is None:
            _require_sum(name, placement, axis)
            needed[i], of_gradient[i] = Replicate(), Partial()
        else:
            _require_split(name, placement, axis, dim % x.dim())
    return _Arrived.apply(x.redistribute(placements=needed).to_local(grad_placements=of_gradient))


def spans(x: Any, axis: Axis) -> bool:
    """Whether it is a DTensor on whose mesh the ranks of this axis are a dimension."""
    return is_dtensor(x) and any(
        axis.is_dimension(x.device_mesh, i) for i in range(x.device_mesh.ndim)
    )


def _axes(x: Any, name: str, parallel: Parallel, split: Split) -> list[Axis | None]:
    """Of each dimension of its mesh the axis, None where that is one rank."""
    mesh = x.device_mesh
    named = [name for name in split if x.dim() > 1 or name not in ROWS]  # a row is not split
    given = [axis for name in named if (axis := parallel.axis(name)) is not None]
    found = []
    for i in range(mesh.ndim):
        of_dimension = [axis for axis in given if axis.is_dimension(mesh, i)]
        checks.require(
            of_dimension or (mesh.size(i) == 1 and mesh.get_coordinate() is not None),
            lambda i=i: (
                f"{name} is a DTensor with placements {x.placements}, and dimension {i} of its "
                f"mesh {mesh.mesh.tolist()} is none of {list(map(str, given))}, the axes given "
                f"that may split it: {checks.unsharding(name)}"
            ),
        )
        found.append(of_dimension[0] if of_dimension and of_dimension[0].size > 1 else None)
    return found


def _require_split(name: str, placement: Any, axis: Axis, dim: int) -> None:
    # Rows that are split a second time count their parts with strides: they are rows all the same.
    is_split = placement.is_shard(dim) or (
        axis.name in ROWS and getattr(placement, "dim", None) == dim
    )
    checks.require(
        is_split,
        lambda: f"{name} must be split over the {axis} along dimension {dim}, got {placement}",
    )


def _require_sum(name: str, placement: Any, axis: Axis) -> None:
    checks.require(
        getattr(placement, "reduce_op", "sum") == "sum",
        lambda: (
            f"{name} may lie on the {axis} split, whole or as parts of a sum, whose gradient goes "
            f"back; got {placement}"
        ),
    )


class _Arrived(torch.autograd.Function):
    """The same when a collective that it may come of is done: a kernel takes an address."""

    @staticmethod
    @autograd.forward
    def forward(ctx, x):
        return x.wait() if hasattr(x, "trigger_wait") else x.view_as(x)

    @staticmethod
    @autograd.backward
    def backward(ctx, grad):
        return grad
