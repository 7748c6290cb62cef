"""What a checkpoint holds: how it is taken of a run, and put back.

The first rank writes what all have alike; each rank writes its random numbers, what it has looked
ahead to and, where FSDP2 splits the model, its shards.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

from humanline.reference import Reference, ReferenceLookahead
from humanline.sharding import is_dtensor, is_sharded, local_shard
from humanline.training.config import TrainConfig
from humanline.training.ranks import Ranks


def taken(
    step: int,
    policy: nn.Module,
    optimizer: Optimizer | None,
    reference: Reference,
    ranks: Ranks,
) -> dict[str, Any]:
    """What this rank writes after ``step`` steps; None: an optimizer that is not kept."""
    shared: dict[str, Any] = {
        "step": step,
        "policy": _changing(policy),
        "reference": reference.state_dict(),
    }
    if optimizer is not None:
        shared["optimizer"] = optimizer.state_dict()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    own: dict[str, Any] = {"rng": {"cpu": torch.get_rng_state(), "cuda": cuda}}
    if is_sharded(policy):
        own |= tree_map_only(Tensor, local_shard, shared)
    elif isinstance(reference, ReferenceLookahead):
        own["reference"] = shared["reference"]
    return shared | own if ranks.first else own


def put_back(
    state: dict[str, Any] | None, policy: nn.Module, optimizer: Optimizer, reference: Reference
) -> int:
    """Put a state back that :func:`taken` took; the number of steps already done."""
    if state is None:
        return 0
    with torch.no_grad():
        for name, tensor in _changing(policy).items():
            local_shard(tensor).copy_(state["policy"][name])
    if "optimizer" in state:
        optimizer.load_state_dict(_sharded(state["optimizer"], optimizer))
    reference.load_state_dict(state["reference"])
    torch.set_rng_state(state["rng"]["cpu"].cpu())
    if state["rng"]["cuda"]:
        torch.cuda.set_rng_state_all([s.cpu() for s in state["rng"]["cuda"]])
    return state["step"]


def expected_bytes(policy: nn.Module, config: TrainConfig) -> int:
    """What a checkpoint takes on the disk, but for a look-ahead's batches, which are small."""
    trained = sum(p.nbytes for p in policy.parameters() if p.requires_grad)
    moments = 2 * trained if config.save_optimizer == "always" else 0
    reference = 0 if config.reference == "lookahead" else trained
    return trained + moments + reference + sum(b.nbytes for b in policy.buffers())


def _changing(model: nn.Module) -> dict[str, Tensor]:
    """What training changes: weights that are not frozen, and buffers."""
    trained = {name: p.data for name, p in model.named_parameters() if p.requires_grad}
    return trained | dict(model.named_buffers())


def _sharded(stored: dict[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """An optimizer's state whose tensors are split as the weights are that they belong to."""
    weights = [p for group in optimizer.param_groups for p in group["params"]]

    def of(p: Tensor, x: Any) -> Any:
        if not (is_dtensor(p) and isinstance(x, Tensor) and x.ndim):  # a count of steps has no dim
            return x
        how = p.device_mesh, p.placements
        return DTensor.from_local(x, *how, run_check=False, shape=p.shape, stride=p.stride())

    split = {
        i: {name: of(weights[i], x) for name, x in values.items()}
        for i, values in stored["state"].items()
    }
    return stored | {"state": split}
