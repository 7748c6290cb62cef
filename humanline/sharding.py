"""Models whose weights are split over ranks, by FSDP2 or by DeepSpeed ZeRO-3: what a rank holds.

Both gather a module's weights for its forward and its backward, and keep some longer. What writes
into shards has them let go first, or the next forward takes what was gathered for current.
"""

from torch import Tensor, nn


def local_shard(t: Tensor) -> Tensor:
    """What this rank holds of a DTensor or of a parameter that ZeRO-3 partitions, which is flat
    and padded; any other tensor is returned as it is."""
    if is_partitioned(t):
        return t.ds_tensor
    return t.to_local() if is_dtensor(t) else t


def is_dtensor(t: Tensor) -> bool:
    """Whether it is a DTensor; imports nothing to find out."""
    return hasattr(t, "to_local")


def is_partitioned(t: Tensor) -> bool:
    """Whether DeepSpeed ZeRO-3 partitions this parameter, gathered as it may be now."""
    return hasattr(t, "ds_tensor")


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 or ZeRO-3 has split any of a model's weights."""
    return bool(_fsdp_modules(model)) or any(
        is_partitioned(p) or is_dtensor(p) for p in model.parameters()
    )


def reshard(model: nn.Module) -> None:
    """Let go of the weights that are gathered; what needs them gathers them again.

    FSDP2 keeps the root's after a forward without a backward, and takes them for current even when
    the optimizer has stepped since. ZeRO-3 keeps small ones, and those that are soon used again.
    """
    for module in _fsdp_modules(model):
        module.reshard()
    partitioned = [p for p in model.parameters() if is_partitioned(p)]
    if partitioned:
        _partition(model, partitioned)


def _fsdp_modules(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if hasattr(module, "reshard")]


def _partition(model: nn.Module, parameters: list[nn.Parameter]) -> None:
    """As DeepSpeed's own ``release_and_reset_all`` does, which belongs to an engine's offload."""
    in_flight = getattr(model, "ds_inflight_param_registry", {})  # gathered ahead, not arrived yet
    for p in parameters:
        if p in in_flight:
            in_flight.pop(p).wait()
    for p in parameters:
        p.ds_active_sub_modules.clear()
        p.partition()
