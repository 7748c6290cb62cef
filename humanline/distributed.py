"""What several processes ask for: reductions that an objective's definition needs."""

import torch
import torch.distributed as dist
from torch import Tensor


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


def gather_over_ranks(x: Tensor) -> tuple[Tensor, slice]:
    """Detached ``[n]`` of all ranks, one after the other, and where this rank's own are in it.

    ``n`` may differ from rank to rank.
    """
    if world_size() == 1:
        return x, slice(0, len(x))
    lengths = [x.new_empty((), dtype=torch.int64) for _ in range(world_size())]
    dist.all_gather(lengths, torch.tensor(len(x), device=x.device))
    lengths = torch.stack(lengths).tolist()
    padded = x.new_zeros(max(lengths))
    padded[: len(x)] = x
    gathered = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(gathered, padded)
    start = sum(lengths[: dist.get_rank()])
    own = slice(start, start + len(x))
    return torch.cat([g[:n] for g, n in zip(gathered, lengths, strict=True)]), own
