"""The processes of a run: one, or as many as torchrun or accelerate launch has started.

Each rank reads its own part of every batch, and holds the whole model, whose gradients
DistributedDataParallel averages, or a part of it (FSDP2). What ranks tell one another besides
(statistics, answers, errors) goes through the launcher's key-value store, where it shows which of
them did not come: it is an error that names them, not a wait without end.
"""

import itertools
import pickle
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from humanline.sharding import is_sharded
from humanline.training.errors import SharedError, UserError
from humanline.training.launch import launched

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among those of a run.

    Attributes:
        rank: its number.
        count: how many there are.
        local: its number on its machine.
        timeout: how many seconds it waits for the others.
        store: what they tell one another through; None where there is one process.
    """

    rank: int = 0
    count: int = 1
    local: int = 0
    timeout: float = 1800.0
    store: Any = None
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    @property
    def first(self) -> bool:
        """Whether it is the one that writes and prints."""
        return self.rank == 0

    def gather(self, what: str, value: Any = None) -> list[Any]:
        """The values of all ranks, in their order; every rank calls it as often as the others.

        Raises:
            UserError: some have not come to it within ``timeout`` seconds; they are named.
        """
        if self.count == 1:
            return [value]
        number = next(self._numbers)
        keys = [f"{number}/{rank}" for rank in range(self.count)]
        self.store.set(keys[self.rank], pickle.dumps(value))
        try:
            self.store.wait(keys, timedelta(seconds=self.timeout))
        except dist.DistError as error:
            missing = [str(i) for i, key in enumerate(keys) if not self._has(key)]
            raise UserError(
                f"of {self.count} ranks, {', '.join(missing)} did not come to {what} within "
                f"{self.timeout:g} s (--ddp-timeout) of rank {self.rank}; what is wrong there, its "
                "own output may tell"
            ) from error
        values = [pickle.loads(part) for part in self.store.multi_get(keys)]
        if number > 1:  # whoever came here has read what was said before the last time
            self.store.delete_key(f"{number - 2}/{self.rank}")
        return values

    def _has(self, key: str) -> bool:
        try:
            return self.store.check([key])
        except dist.DistError:  # the store went with the process that held it
            return False

    def together(self, what: str, work: Callable[[], T]) -> T:
        """The result of ``work``, which runs on every rank. Where it fails on one it fails on all.

        Raises:
            UserError: as ``work`` did.
            SharedError: the same, of several ranks.
        """
        if self.count == 1:
            return work()
        result, failed = None, None
        try:
            result = work()
        except (UserError, OSError) as error:
            failed = str(error)
        found = {i: text for i, text in enumerate(self.gather(what, failed)) if text is not None}
        if len(found) == self.count and len({*found.values()}) == 1:
            raise SharedError(found[0])
        if found:
            raise SharedError("; ".join(f"rank {i}: {text}" for i, text in found.items()))
        return result

    def by_the_first(self, what: str, work: Callable[[], T]) -> T | None:
        """The same of work that the first rank does for all; None on the others."""
        return self.together(what, lambda: work() if self.first else None)

    def wrapped(self, root: "Root") -> nn.Module:
        """What to call in place of ``root``, for gradients that are averaged over ranks."""
        if self.count == 1 or is_sharded(root):
            return root
        return DistributedDataParallel(root, gradient_as_bucket_view=True)


#: A run of one process.
ALONE = Ranks()
_joined = itertools.count()  # the store keeps what earlier runs of these processes said
# Groups that were left, kept: gloo's destructor holds the interpreter's lock while it waits for its
# threads, one of which may want it to let go of the last reduction, when DDP's reducer goes.
_left = []


class Root(nn.Module):
    """A model as DDP and FSDP2 wrap it: whatever reads its weights runs as the root's forward.

    Body and head are called one by one, by functions that are no module's forward, and it is at the
    root's that FSDP2 gathers the weights outside of layers, and DDP looks for a backward.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, function: Callable[..., T], *arguments: Any) -> T:
        """``function(model, *arguments)``."""
        return function(self.model, *arguments)


def shard(root: Root, device: torch.device) -> Root:
    """Split the weights over ranks by FSDP2, each layer a unit, and move them to the device."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    named = {name for m in root.modules() for name in getattr(m, "_no_split_modules", None) or ()}
    for module in [m for m in root.modules() if type(m).__name__ in named]:
        fully_shard(module, mesh=mesh)
    # The root's weights too go after each forward: scoring has no backward that would drop them.
    return fully_shard(root, mesh=mesh, reshard_after_forward=True)


def whole_weights(model: nn.Module) -> dict[str, Any] | None:
    """On the first rank the weights of a model that is split, for ``save_pretrained``; None where
    it is not. Every rank calls it."""
    if not is_sharded(model):
        return None
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    found = get_model_state_dict(model, options=whole)
    once = dict(model.named_parameters())  # a tied weight has two names
    tied = dict(model.named_parameters(remove_duplicate=False)).keys() - once
    return {name: weight for name, weight in found.items() if name not in tied}


def no_sync(wrapped: nn.Module) -> AbstractContextManager:
    """Within this context DDP sums gradients where they are; FSDP2 has no place for whole ones."""
    ddp = isinstance(wrapped, DistributedDataParallel)
    return wrapped.no_sync() if ddp else nullcontext()


@contextmanager
def joined(timeout: float) -> Iterator[Ranks]:
    """The ranks that were launched with this one, with a process group if they are several; for
    what they wait so many seconds at most."""
    rank, ranks, local = launched()
    if ranks == 1:
        yield ALONE
        return
    from torch.distributed.rendezvous import rendezvous

    try:
        store, rank, ranks = next(rendezvous("env://"))
        store = dist.PrefixStore(f"run {next(_joined)}", store)
        of_torch = dist.PrefixStore("torch", store)
        how = {"rank": rank, "world_size": ranks, "timeout": timedelta(seconds=timeout)}
        dist.init_process_group(store=of_torch, **how)
    except (dist.DistError, ValueError) as error:
        raise UserError(f"rank {rank} of {ranks} could not join the others: {error}") from error
    try:
        yield Ranks(rank, ranks, local, timeout, dist.PrefixStore("humanline", store))
    finally:
        _left.append(dist.group.WORLD)
        dist.destroy_process_group()
