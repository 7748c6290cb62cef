"""Reductions across ranks that an objective's definition asks for."""

import torch.distributed as dist
from torch import Tensor


def mean_over_ranks(x: Tensor) -> Tensor:
    """Mean of a detached tensor over all ranks; the tensor itself without a process group."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return x
    x = x.clone()
    dist.all_reduce(x)
    return x / dist.get_world_size()
