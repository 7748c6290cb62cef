"""Who shares what among processes, and the collectives that follow from it.

Along an axis the ranks share

    vocab       the same rows, each has a slice of the vocabulary: of the head's weight, of logits
    sequence    the same sequences, each has some rows of every one
    data        the objective: each has sequences of its own

Sums over ranks are taken in the order of the ranks, from what all of them have gathered, so that
every rank has the same bits and decides alike. Gradients alone are left to the backend's sums.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from humanline import autograd, checks

_SECONDS = 2.0  # that ranks which gave up have to say so
# The same under its names before and after torch 2.13.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Axis:
    """The ranks of a process group, and collectives among them, in which all have to take part.

    Attributes:
        ranks: of the default group.
        rank: this one's place among them.
        size: how many they are.
    """

    def __init__(self, name: str, group: Any):
        self.name, self._group = name, group
        self.ranks = dist.get_process_group_ranks(group)
        self.rank, self.size = dist.get_rank(group), len(self.ranks)

    def exchange(self, *numbers: int, device: torch.device) -> list[list[int]]:
        """What each rank says: some whole numbers. Read back from the device."""
        return self.gather(torch.tensor(numbers, dtype=torch.int64, device=device)).tolist()

    def gather(self, x: Tensor) -> Tensor:
        """``[P, …]`` of ``x``, of one shape on all ranks."""
        everyones = x.new_empty(self.size, *x.shape)
        if x.numel():
            self._run(_all_gather, everyones.view(-1), x.reshape(-1).contiguous())
        return everyones

    def gather_rows(self, x: Tensor, sizes: list[int]) -> Tensor:
        """``[Σ sizes, …]``: what ranks have ``sizes`` rows of, one rank after the other."""
        padded = x.new_zeros(max(sizes), *x.shape[1:])
        padded[: len(x)] = x
        everyones = self.gather(padded)
        return torch.cat([rows[:n] for rows, n in zip(everyones, sizes, strict=True)])

    def sum_rows(self, x: Tensor, sizes: list[int]) -> Tensor:
        """``[sizes[rank], …]``: this rank's rows of the sum over ranks of ``x [Σ sizes, …]``."""
        most = max(sizes)
        padded = x.new_zeros(self.size, most, *x.shape[1:])
        for rows, part in zip(padded, x.split(sizes), strict=True):
            rows[: len(part)] = part
        mine = torch.empty_like(padded[0])
        if mine.numel():
            self._run(_reduce_scatter, mine, padded.view(self.size * most, *x.shape[1:]))
        return mine[: sizes[self.rank]]

    def gather_objects(self, x: Any) -> list[Any]:
        """What each rank gives, pickled."""
        everyones = [None] * self.size
        self._run(dist.all_gather_object, everyones, x)
        return everyones

    def own(self, sizes: list[int]) -> slice:
        """Where this rank's values are among those of all, which have so many each."""
        start = sum(sizes[: self.rank])
        return slice(start, start + sizes[self.rank])

    def sum_(self, x: Tensor) -> Tensor:
        """The sum over ranks, in place; contiguous."""
        if x.numel():
            self._run(dist.all_reduce, x)
        return x

    def is_dimension(self, mesh: Any, number: int) -> bool:
        """Whether these are the ranks of a dimension of a DeviceMesh."""
        if mesh.get_coordinate() is None:  # this rank is none of the mesh's
            return False
        return dist.get_process_group_ranks(mesh.get_group(number)) == self.ranks

    def _run(self, collective: Callable, *tensors: Tensor) -> None:
        try:
            collective(*tensors, group=self._group)
        except RuntimeError as error:
            raise RuntimeError(
                f"{self}: {self._missing()} {collective.__name__} on rank "
                f"{self.ranks[self.rank]} ended with: {error}"
            ) from error

    def _missing(self) -> str:
        """Who gives up says so in the group's store; who does not, is late or gone."""
        try:
            store = self._group.get_group_store()
            keys = {rank: f"humanline/{self.name}/gave up/{rank}" for rank in self.ranks}
            store.set(keys[self.ranks[self.rank]], "")
            end = time.monotonic() + _SECONDS
            while missing := [rank for rank in self.ranks if not store.check([keys[rank]])]:
                if time.monotonic() > end:
                    return f"rank {', '.join(map(str, missing))} did not come."
                time.sleep(_SECONDS / 20)
        except Exception:  # the store may have gone with the rank that held it
            return "a rank did not come."
        return "all ranks gave up."

    def __str__(self) -> str:
        return f"{self.name} axis of ranks {self.ranks}"


@dataclass(frozen=True)
class Parallel:
    """Who shares what: for each axis a process group, a one-dimensional DeviceMesh, or None.

    >>> hl.Parallel(vocab=mesh["tp"], sequence=mesh["cp"], data=mesh["dp"])  # doctest: +SKIP

    Every rank of an axis makes the same calls. Each reads some sizes back from the device.

    Args:
        vocab: ranks with the same rows, and a slice of the vocabulary each, in their order, of any
            sizes: ``weight [V/P, H]``, ``bias [V/P]``, ``logits [..., V/P]``, or DTensors of
            these. Labels count from the start of the whole vocabulary. Losses, statistics and
            log-probs are the same on all ranks to the last bit. The gradient of hidden states is
            summed over ranks, that of a slice is whole where it is.
        sequence: ranks with the same sequences in one order, and some rows of each one, in their
            order; any number of them, none included. What there is one of a sequence is given on
            every rank.
        data: ranks with sequences of their own, any number of them; of pairs, both. A head's weight
            and bias may be DTensors split over them along the vocabulary, as FSDP2 has them: they
            are gathered for the call and their gradient is summed over ranks, in float32 at least;
            or, where that sends fewer bytes, ``from_hidden`` gathers the hidden states. The
            gradient is left as the DTensors lie; with ``grad="mean"`` divided by the ranks, as
            FSDP2 would. Beside ``sequence``, the mesh may be one dimension of the ranks of both, as
            it is where FSDP2 splits over data and context parallel ranks. With ``vocab``, DTensors
            on a mesh of both, as FSDP2 makes them of a tensor-parallel head: each rank gathers its
            slice.
        grad: "sum": each rank's gradients are those that its rows give, and sum over the ranks of
            ``sequence`` and ``data`` to the gradient of the loss. "mean": multiplied by the number
            of these ranks, for an engine that averages over them, as DDP and FSDP do.

    Logits, hidden states and those of a reference may be DTensors on a mesh of these axes, split
    along their first dimension over ``data``, along the last but one over ``sequence``; over
    ``vocab`` logits along the last, and hidden states anyhow, also as parts of a sum: they are
    gathered. Gradients lie as they do.

    Over ``sequence`` and ``data`` a loss is that of all rows of all ranks, and so are its
    statistics: normalisers, KTO's reference point and whatever an objective sorts or counts. The
    batch's numbers, such as ``num_items_in_batch``, are those of all ranks. Every rank holds some
    floats a row of all of them.

    Raises:
        TypeError: what is given as an axis is none.
        ValueError: a mesh of several dimensions; a group without this rank; two axes that have more
            in common than this rank; a ``grad`` that is neither.
    """

    vocab: Any = None
    sequence: Any = None
    data: Any = None
    grad: str = "sum"

    def __post_init__(self):
        checks.require(
            self.grad in ("sum", "mean"),
            lambda: f'grad must be "sum" or "mean", got {self.grad!r}',
        )
        names = "vocab", "sequence", "data"
        groups = {name: _group(name, getattr(self, name)) for name in names}
        axes = {name: Axis(name, group) for name, group in groups.items() if group is not None}
        object.__setattr__(self, "_axes", axes)
        for one, other in combinations(axes.values(), 2):
            both = set(one.ranks) & set(other.ranks)
            checks.require(
                len(both) == 1,
                lambda one=one, other=other: (
                    f"two axes have this rank alone in common, got the {one} and the {other}"
                ),
            )

    @property
    def shares(self) -> bool:
        """Whether anything is shared."""
        return bool(self._axes)

    @property
    def rows(self) -> list[Axis]:
        """The axes of several ranks over which rows are shared."""
        return [axis for name, axis in self._axes.items() if name != "vocab" and axis.size > 1]

    def mean(self, x: Tensor) -> Tensor:
        """The mean of values ``[S]``, one a sequence or what this rank's rows add to it."""
        total, number = x.sum(), torch.full_like(x.sum(), len(x))
        for axis in self.rows:
            totals, numbers = axis.gather(torch.stack([total, number])).unbind(1)
            total = totals.sum(0)
            number = numbers[0] if axis.name == "sequence" else numbers.sum(0)
        return total / number

    def attach(self, loss: Tensor) -> Tensor:
        """The loss, its gradient multiplied for an engine that averages."""
        if self.grad == "sum" or not (self.rows and loss.requires_grad):
            return loss
        return _Scaled.apply(loss, math.prod(axis.size for axis in self.rows))

    def axis(self, name: str) -> Axis | None:
        """None where it is not shared."""
        return self._axes.get(name)


def check_parallel(parallel: Parallel | None) -> Parallel:
    """What an entry point was given, or one that shares nothing.

    Raises:
        TypeError, ValueError: something else; within ``torch.compile``.
    """
    if parallel is None:
        return ALONE
    checks.require(
        isinstance(parallel, Parallel),
        lambda: f"parallel must be a humanline.Parallel, got {checks.given(parallel)}",
        error=TypeError,
    )
    checks.require(
        not (parallel.shares and checks.is_compiling()),
        "parallel= communicates between launches, which torch.compile does not trace: call it from "
        "a function under torch.compiler.disable",
    )
    return parallel


def _group(name: str, given: Any) -> Any:
    """The process group of what is given as an axis."""
    if given is None:
        return None
    checks.require(
        given is not dist.GroupMember.NON_GROUP_MEMBER,
        lambda: f"the group given as {name} does not include this rank",
    )
    is_mesh = hasattr(given, "get_group")
    checks.require(
        is_mesh or isinstance(given, dist.ProcessGroup),
        lambda: (
            f"{name} must be a process group, a one-dimensional DeviceMesh or None, got "
            f"{checks.given(given)}"
        ),
        error=TypeError,
    )
    if not is_mesh:
        return given
    checks.require(
        given.ndim == 1,
        lambda: (
            f'{name} must be one dimension of a mesh, such as mesh["tp"], got a mesh of '
            f"{given.ndim}"
        ),
    )
    return given.get_group()


class _Scaled(torch.autograd.Function):
    @staticmethod
    @autograd.forward
    def forward(ctx, loss, factor):
        ctx.factor = factor
        return loss.clone()

    @staticmethod
    @autograd.backward
    def backward(ctx, grad):
        return grad * ctx.factor, None


ALONE = Parallel()
