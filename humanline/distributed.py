"""What several processes ask for: reductions that an objective's definition needs, and shards."""

import torch
import torch.distributed as dist
from torch import Tensor, nn


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


def local_shard(t: Tensor) -> Tensor:
    """What this rank holds of a DTensor; any other tensor is returned as it is."""
    return t.to_local() if hasattr(t, "to_local") else t


def sharded_modules(model: nn.Module) -> list[nn.Module]:
    """Those that FSDP2 has sharded."""
    return [module for module in model.modules() if hasattr(module, "reshard")]


def reshard(model: nn.Module) -> None:
    """Have FSDP2 let go of the weights it has gathered. It keeps the root's after a forward without
    a backward, and takes them for current even when the optimizer has stepped since."""
    for module in sharded_modules(model):
        module.reshard()
