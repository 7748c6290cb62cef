"""The reference: the policy as it stood before an optimizer step, renewed every so many steps.

At 0-based step ``s`` with ``s % sync_every == 0``, after backward and gradient clipping, the
reference becomes ``θ_s``; then ``θ_{s+1} = step(θ_s)``, and the losses of steps ``s+1 … s+k`` use
``θ_s``. A copy taken *after* the step is a different method: with ``sync_every=1`` it equals the
policy, so that the ratio is 1 for ever.

A training loop reads::

    for batches, scores in reference.steps(optimizer_steps):
        for batch, score in zip(batches, scores):
            (loss of batch, with the reference's log-probs in score).backward()
        clip gradients
        reference.before_step()
        optimizer.step()

where ``optimizer_steps`` yields, for each optimizer step, the list of its micro-batches
(:func:`humanline.steps.optimizer_steps` makes such of a DataLoader). The three classes give the
same numbers and differ in what they hold:

| class | holds besides the policy |
|---|---|
| :class:`ReferenceCopy` | a second model; frozen weights, such as a LoRA base, are shared with it |
| :class:`ReferenceAdapter` | no second model: the weights that train, such as a LoRA adapter |
| :class:`ReferenceLookahead` | no weights: the next ``sync_every`` steps' batches and scores |

Several processes: make the reference after the policy was wrapped or sharded. DDP's wrapper is
taken off for scoring. Under FSDP2 and DeepSpeed ZeRO-3 tensors are copied shard to shard, a sync
gathers nothing; as a sharded model cannot be deep-copied, :class:`ReferenceCopy` is given a second
one, sharded alike. DeepSpeed's optimizer: see :meth:`Reference.before_step`.
"""

import copy
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from humanline import copies
from humanline.checks import require, require_integers
from humanline.sharding import is_partitioned, is_sharded, local_shard, reshard

Score = Callable[[nn.Module, Any], Any]
Step = tuple[list[Any], list[Any]]


class Reference:
    """The schedule, which all references share.

    Args:
        policy: the model being trained.
        score: ``score(model, batch)`` computes what a loss needs of the reference, its log-probs,
            as tensors in any nesting of dicts, lists and tuples; called without gradients, the
            model in eval mode, its use of random numbers without effect on training's.
        sync_every: optimizer steps between syncs; 0 for never (the initial policy stays the
            reference).

    Raises:
        ValueError: ``sync_every`` is negative.
    """

    def __init__(self, policy: nn.Module, score: Score, sync_every: int = 1):
        require_integers(sync_every=sync_every)
        require(
            sync_every >= 0, lambda: f"sync_every must be 0 (never) or positive, got {sync_every}"
        )
        # DDP's own forward would broadcast buffers, which hangs where ranks score unequal numbers.
        self.policy = policy.module if isinstance(policy, DistributedDataParallel) else policy
        self.score, self.sync_every = score, sync_every
        self.model = self.policy  # what is scored with
        self.step = 0

    def steps(self, optimizer_steps: Iterable[list[Any]]) -> Iterator[Step]:
        """Each optimizer step's micro-batches, with the reference's scores of them.

        ``optimizer_steps`` begins at the step the reference is at: the first one, or after
        :meth:`load_state_dict` the first that was not taken.
        """
        for batches in optimizer_steps:
            yield batches, self._scores(batches)

    def scores(self, batches: list[Any]) -> list[Any]:
        """The scores of micro-batches as they come, for trainers that do not hand out theirs.

        A look-ahead, which holds no weights, scores with the policy as it stands.
        """
        return self._scores(batches)

    def before_step(self) -> None:
        """Gradients are ready, the optimizer is about to step: sync if it is time.

        Once per optimizer step, whatever the gradient accumulation. From the end of one step to the
        next the policy is ``θ_s``, so any moment between them gives the same reference. Where the
        optimizer steps inside ``backward`` (DeepSpeed's engine, driven by accelerate), call it when
        the loss of the step's last micro-batch has been computed, before its ``backward``.
        """
        due = self.sync_every and self.step % self.sync_every == 0
        self.step += 1
        if due:
            self._sync()

    @property
    def synced(self) -> bool:
        """Whether the reference is a policy that a sync took, no longer the one it began with."""
        return self.sync_every > 0 and self.step > 0

    def memory_bytes(self) -> int:
        """Bytes this process holds besides the policy."""
        held = {id(t): local_shard(t) for t in _tensors_in(self._held())}
        return sum(t.nbytes for t in held.values())

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs. The tensors are the reference's own: clone what you keep."""
        return {"step": self.step, **self._state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what :meth:`state_dict` returned.

        Raises:
            ValueError: it is the state of a reference to a different model, or of another kind.
        """
        require(
            state.keys() == self.state_dict().keys(),
            lambda: (
                f"{type(self).__name__} needs a state with {', '.join(self.state_dict())}; got "
                f"{', '.join(state)}"
            ),
        )
        self._load(state)
        self.step = state["step"]

    # What the kinds of reference define

    def _scores(self, batches: list[Any]) -> list[Any]:
        with scoring(self.model):
            return [self.score(self.model, batch) for batch in batches]

    def _sync(self) -> None:
        raise NotImplementedError

    def _held(self) -> Any:
        raise NotImplementedError

    def _state(self) -> dict[str, Any]:
        raise NotImplementedError

    def _load(self, state: dict[str, Any]) -> None:
        raise NotImplementedError


class _ReferenceWithWeights(Reference):
    """Holds ``snapshot``: by name, what of the policy changes, as it was at the last sync."""

    snapshot: dict[str, Tensor]

    def __init__(self, policy: nn.Module, score: Score, sync_every: int = 1):
        super().__init__(policy, score, sync_every)
        require(
            not any(_is_away(p) for p in self.policy.parameters()),
            lambda: (
                f"{type(self).__name__} copies shards, and DeepSpeed keeps some of the policy's on "
                "NVMe: offload parameters to the CPU, or use ReferenceLookahead, which holds none"
            ),
        )

    def _live(self) -> dict[str, Tensor]:
        """The policy's own, which the snapshot is of."""
        return _changing(self.policy)

    def _sync(self) -> None:
        _copy(self._live(), self.snapshot, "policy")

    def _held(self) -> Any:
        return self.snapshot

    def _state(self) -> dict[str, Any]:
        return {"weights": {name: local_shard(t) for name, t in self.snapshot.items()}}

    def _load(self, state: dict[str, Any]) -> None:
        _copy(state["weights"], self.snapshot, "state")


class ReferenceCopy(_ReferenceWithWeights):
    """A second model.

    Args:
        policy, score, sync_every: see :class:`Reference`.
        model: the reference to begin with, which becomes this object's own; sharded as the policy
            is. None: a copy of the policy, whose frozen weights the two share.

    Raises:
        ValueError: see :class:`Reference`; ``model`` has other weights than the policy, or shards
            them otherwise, or is the policy itself; it is missing, and FSDP2 or ZeRO-3 shards the
            policy or the policy holds computed tensors, neither of which can be copied; DeepSpeed
            keeps shards of the policy on NVMe. The model computes with the policy's weights,
            because its ``forward`` was replaced by a function that calls the policy's: found here,
            or when the first batches are scored.
    """

    def __init__(
        self,
        policy: nn.Module,
        score: Score,
        sync_every: int = 1,
        model: nn.Module | None = None,
    ):
        super().__init__(policy, score, sync_every)
        self.shares_frozen = model is None
        # Weights keep requires_grad: without gradients too, matmul picks its algorithm by it.
        self.model = (_copy_of(self.policy) if model is None else model).eval()
        ours = _tensors(self.model)
        _require_alike(ours, _tensors(self.policy), "model")
        self.snapshot = {name: ours[name] for name in self._live()}
        self._require_apart()
        self._apart = is_sharded(self.policy)  # seen to be so; shards are not watched

    def _require_apart(self) -> None:
        own = {id(t) for t in self.snapshot.values()}
        shared = [name for name, t in _changing(self.policy).items() if id(t) in own]
        require(
            not shared,
            lambda: (
                f"model holds the policy's own {shared[0]}, which changes with the policy: pass "
                "another model, or leave it out for a copy"
            ),
        )
        borrowed = copies.borrowed_forward(self.model, self.policy)
        if borrowed is not None:
            what = f"the forward of {borrowed or type(self.model).__name__} was replaced"
            raise self._borrows(f"{what} by a function that calls the policy's")

    def _borrows(self, how: str) -> ValueError:
        return ValueError(f"the reference would be scored with the policy: {how}. {copies.ADVICE}")

    def _scores(self, batches: list[Any]) -> list[Any]:
        if self._apart or not batches:
            return super()._scores(batches)
        with copies.watched(
            _changing(self.policy),
            lambda name: self._borrows(f"scoring {type(self.model).__name__} used its {name}"),
        ):
            scores = super()._scores(batches)
        self._apart = True
        return scores

    def _live(self) -> dict[str, Tensor]:
        return _changing(self.policy) if self.shares_frozen else _tensors(self.policy)


class ReferenceAdapter(_ReferenceWithWeights):
    """The weights that train (a LoRA adapter) and the buffers; for scoring they trade places with
    the policy's own. Args, raises: see :class:`ReferenceCopy`."""

    def __init__(self, policy: nn.Module, score: Score, sync_every: int = 1):
        super().__init__(policy, score, sync_every)
        live = {name: local_shard(t) for name, t in self._live().items()}
        self.snapshot = {name: t.detach().clone() for name, t in live.items()}

    def _scores(self, batches: list[Any]) -> list[Any]:
        with self._in_place_of_the_policy():
            return super()._scores(batches)

    @contextmanager
    def _in_place_of_the_policy(self) -> Iterator[None]:
        live = self._live()
        _require_alike(live, self.snapshot, "policy")
        _trade(live, self.snapshot)
        try:
            yield
        finally:
            _trade(live, self.snapshot)


class ReferenceLookahead(Reference):
    """No second set of weights. At a sync the *next* ``sync_every`` steps' batches go through the
    policy as it stands, before it steps; they and their scores are kept until they are due.

    ``steps`` is called once, with the steps of all epochs; again only after ``load_state_dict``.
    Batches are drawn earlier than they are trained on: if drawing them uses training's random
    numbers, these come in another order than without look-ahead
    (:func:`humanline.steps.optimizer_steps` draws with random numbers of its own).

    Args, raises: see :class:`Reference`; besides, ``sync_every=0`` is an error: all the batches
    there will ever be would have to be scored in advance.
    """

    def __init__(self, policy: nn.Module, score: Score, sync_every: int = 1):
        super().__init__(policy, score, sync_every)
        require(
            sync_every > 0,
            "a look-ahead scores the steps up to the next sync: sync_every must be positive, got 0",
        )
        self._coming: deque[Step] = deque()
        self._loaded: list[list[Any]] = []
        self._source: Iterator[list[Any]] = iter(())

    def steps(self, optimizer_steps: Iterable[list[Any]]) -> Iterator[Step]:
        self._source = iter(optimizer_steps)
        again = islice(self._source, len(self._loaded))
        self._coming = deque(zip(again, self._loaded, strict=False))
        self._loaded = []
        if not self._coming:  # the very first step: its reference is the policy at hand
            require(  # or there is none left: what was saved was the end
                self.step == 0 or next(self._source, None) is None,
                lambda: (
                    f"nothing was looked ahead to for step {self.step}: pass the steps of all "
                    "epochs as one iterable"
                ),
                error=RuntimeError,
            )
            self._look_ahead(1)
        while self._coming:
            yield self._coming.popleft()
        require(
            next(self._source, None) is None,
            lambda: (
                f"step {self.step} was not looked ahead to: optimizer_steps grew after the sync, "
                "or before_step() was not called"
            ),
            error=RuntimeError,
        )

    def _sync(self) -> None:
        self._look_ahead(self.sync_every)

    def _look_ahead(self, count: int) -> None:
        for batches in islice(self._source, count):
            self._coming.append((batches, self._scores(batches)))

    def _held(self) -> Any:
        return self._coming

    def _state(self) -> dict[str, Any]:
        return {"scores": [scores for _, scores in self._coming] or self._loaded}

    def _load(self, state: dict[str, Any]) -> None:
        self._coming.clear()
        self._loaded = list(state["scores"])


REFERENCES = {
    "copy": ReferenceCopy,
    "adapter": ReferenceAdapter,
    "lookahead": ReferenceLookahead,
}


@contextmanager
def scoring(model: nn.Module) -> Iterator[None]:
    """No gradients, the model in eval mode; training's modes and random numbers as they were."""
    modes = [(module, module.training) for module in model.modules()]
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
        model.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training
            reshard(model)  # else a weight gathered before an optimizer step is used after it


def _copy_of(policy: nn.Module) -> nn.Module:
    require(
        not is_sharded(policy),
        "FSDP2 or ZeRO-3 shards the policy, and such a model cannot be copied: pass model=, a "
        "second one sharded alike, or use ReferenceAdapter or ReferenceLookahead",
    )
    frozen = {id(p): p for p in policy.parameters() if not p.requires_grad}
    try:
        return copy.deepcopy(policy, memo=frozen)  # what the memo knows is not copied
    except RuntimeError as error:
        raise ValueError(
            "the policy cannot be copied: it holds tensors that were computed, as PEFT's "
            "ensure_weight_tying with an adapter on tied embeddings makes it, or a weight norm; "
            f'take ReferenceAdapter, in trainers reference="adapter" ({error})'
        ) from error


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Weights, each once however often it is tied, and buffers; of a sharded model the shards."""
    reshard(model)
    return dict(model.named_parameters()) | dict(model.named_buffers())


def _changing(model: nn.Module) -> dict[str, Tensor]:
    """The same without frozen weights."""
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    return {name: t for name, t in _tensors(model).items() if name not in frozen}


def _is_away(p: Tensor) -> bool:
    return is_partitioned(p) and getattr(p.ds_tensor, "final_location", None) == "nvme"


def _tensors_in(x: Any) -> Iterator[Tensor]:
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, Mapping):
        yield from _tensors_in(list(x.values()))
    elif is_dataclass(x):
        yield from _tensors_in([getattr(x, field.name) for field in fields(x)])
    elif isinstance(x, list | tuple | deque):
        for item in x:
            yield from _tensors_in(item)


@torch.no_grad()
def _copy(source: dict[str, Tensor], target: dict[str, Tensor], what: str) -> None:
    """Shard to shard, in few launches."""
    _require_alike(source, target, what)
    if target:
        torch._foreach_copy_(
            [local_shard(t) for t in target.values()], [local_shard(source[n]) for n in target]
        )


@torch.no_grad()
def _trade(live: dict[str, Tensor], snapshot: dict[str, Tensor]) -> None:
    for name, a in live.items():
        b = snapshot[name]
        if local_shard(a) is a:
            a.data, b.data = b.data, a.data
        else:  # it is gathered from the memory the shard was born in: values have to move
            a = local_shard(a)
            values = a.clone()
            a.copy_(b)
            b.copy_(values)


def _require_alike(theirs: dict[str, Tensor], ours: dict[str, Tensor], what: str) -> None:
    def shapes(tensors):
        return {name: tuple(local_shard(t).shape) for name, t in tensors.items()}

    a, b = shapes(theirs), shapes(ours)
    require(
        a == b,
        lambda: (
            f"the {what} is that of a reference with other weights (wrap, shard, freeze, unfreeze "
            f"before making it): {_some(dict(a.items() - b.items()))} instead of "
            f"{_some(dict(b.items() - a.items()))}"
        ),
    )


def _some(shapes: dict[str, tuple[int, ...]]) -> str:
    named = [f"{name} {list(shape)}" for name, shape in sorted(shapes.items())]
    return ", ".join(named[:3] + ["…"] * (len(named) > 3)) or "nothing"
