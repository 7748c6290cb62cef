"""What a definition asks of several processes where nobody says who shares what: all ranks do."""

import torch.distributed as dist
from torch import Tensor

from humanline.parallel import Axis


def world_size() -> int:
    """Ranks of the default process group; 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def mean_over_ranks(x: Tensor) -> Tensor:
    """Mean of a detached tensor over all ranks; the tensor itself without a process group."""
    if world_size() == 1:
        return x
    x = x.clone()
    dist.all_reduce(x)
    return x / world_size()


def everyone() -> Axis | None:
    """All ranks of the default process group; None without another one."""
    return Axis("data", dist.group.WORLD) if world_size() > 1 else None
