"""DTensors whose mesh names axes: what of one a rank computes with, and how its gradient lies."""

from typing import Any

from humanline import checks
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
    axes = _axes(x, parallel, split)
    if axes is None:
        checks.require_tensors(**{name: x})
    from torch.distributed.tensor import Partial, Replicate

    needed, of_gradient = list(x.placements), list(x.placements)
    for i, axis in enumerate(axes):
        if axis is None:
            continue
        dim = split[axis.name]
        if dim is None:
            needed[i], of_gradient[i] = Replicate(), Partial()
            continue
        placement, dim = x.placements[i], dim % x.dim()
        checks.require(
            placement.is_shard(dim),
            lambda axis=axis, dim=dim, placement=placement: (
                f"{name} must be split over the {axis} along dimension {dim}, got {placement}"
            ),
        )
    return x.redistribute(placements=needed).to_local(grad_placements=of_gradient)


def spans(x: Any, axis: Axis) -> bool:
    """Whether it is a DTensor on whose mesh the ranks of this axis are a dimension."""
    return is_dtensor(x) and any(
        axis.is_dimension(x.device_mesh, i) for i in range(x.device_mesh.ndim)
    )


def _axes(x: Any, parallel: Parallel, split: Split) -> list[Axis | None] | None:
    """Of each dimension of its mesh the axis, None where that is one rank; None for all of them if
    one dimension is neither."""
    named = [name for name in split if x.dim() > 1 or name not in ROWS]  # a row is not split
    given = [axis for name in named if (axis := parallel.axis(name)) is not None]
    found = []
    for i in range(x.device_mesh.ndim if given else 0):
        of_dimension = [axis for axis in given if axis.is_dimension(x.device_mesh, i)]
        if not of_dimension and x.device_mesh.size(i) > 1:
            return None
        found.append(of_dimension[0] if of_dimension and of_dimension[0].size > 1 else None)
    return found or None
