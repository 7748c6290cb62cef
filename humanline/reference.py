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

where ``optimizer_steps`` yields, for each optimizer step, the list of its micro-batches. The three
classes give the same numbers and differ in what they hold:

| class | holds besides the policy |
|---|---|
| :class:`ReferenceCopy` | a second set of weights |
| :class:`ReferenceAdapter` | a second set of the weights that train, such as a LoRA adapter |
| :class:`ReferenceLookahead` | no weights: the scores of the next ``sync_every`` steps' batches |
"""

import copy
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from humanline.checks import require

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
        require(
            sync_every >= 0, lambda: f"sync_every must be 0 (never) or positive, got {sync_every}"
        )
        self.policy, self.score, self.sync_every = policy, score, sync_every
        self.model = policy  # what is scored with
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
        """Gradients are ready, the optimizer is about to step: sync if it is time."""
        if self.sync_every and self.step % self.sync_every == 0:
            self._sync()
        self.step += 1

    def memory_bytes(self) -> int:
        """Bytes held besides the policy."""
        return sum(t.nbytes for t in tree_leaves(self._held()) if isinstance(t, Tensor))

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


class ReferenceCopy(Reference):
    """A second set of weights. Args, raises: see :class:`Reference`; besides:

    Args:
        model: the reference to begin with, which becomes this object's own; a copy of the policy
            if None.

    Raises:
        ValueError: ``model`` has other weights than the policy.
    """

    def __init__(
        self,
        policy: nn.Module,
        score: Score,
        sync_every: int = 1,
        model: nn.Module | None = None,
    ):
        super().__init__(policy, score, sync_every)
        model = copy.deepcopy(policy) if model is None else model
        _require_same_weights(_tensors(policy), _tensors(model), "model")
        self.model = model.eval().requires_grad_(False)

    def _sync(self) -> None:
        _copy(list(_tensors(self.policy).values()), list(_tensors(self.model).values()))

    def _held(self) -> Any:
        return _tensors(self.model)

    def _state(self) -> dict[str, Any]:
        # Frozen weights, such as a LoRA base, are the policy's too: no need to save them.
        ours = _tensors(self.model)
        return {"model": {name: ours[name] for name in _changing(self.policy)}}

    def _load(self, state: dict[str, Any]) -> None:
        _restore(state["model"], self._state()["model"])


class ReferenceAdapter(Reference):
    """A snapshot of the weights that train (a LoRA adapter) and of the buffers; for scoring it
    trades places with the policy's own. Args, raises: see :class:`Reference`."""

    def __init__(self, policy: nn.Module, score: Score, sync_every: int = 1):
        super().__init__(policy, score, sync_every)
        self.snapshot = {name: t.detach().clone() for name, t in _changing(policy).items()}

    def _scores(self, batches: list[Any]) -> list[Any]:
        with self._in_place_of_the_policy():
            return super()._scores(batches)

    @contextmanager
    def _in_place_of_the_policy(self) -> Iterator[None]:
        self._trade()
        try:
            yield
        finally:
            self._trade()

    def _trade(self) -> None:
        for name, live in _changing(self.policy).items():
            kept = self.snapshot[name]
            live.data, kept.data = kept.data, live.data

    def _sync(self) -> None:
        _copy(list(_changing(self.policy).values()), list(self.snapshot.values()))

    def _held(self) -> Any:
        return self.snapshot

    def _state(self) -> dict[str, Any]:
        return {"adapter": self.snapshot}

    def _load(self, state: dict[str, Any]) -> None:
        _restore(state["adapter"], self.snapshot)


class ReferenceLookahead(Reference):
    """No second set of weights. At a sync the *next* ``sync_every`` steps' batches go through the
    policy as it stands, before it steps; their scores are kept until they are due.

    ``steps`` is called once, with the steps of all epochs; again only after ``load_state_dict``.

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
            require(
                self.step == 0,
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
        return [scores for _, scores in self._coming]

    def _state(self) -> dict[str, Any]:
        return {"scores": self._held() or self._loaded}

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


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


def _changing(model: nn.Module) -> dict[str, Tensor]:
    """Weights that train, each once however often it is tied, and buffers."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return trained | dict(model.named_buffers())


@torch.no_grad()
def _copy(source: list[Tensor], target: list[Tensor]) -> None:
    if target:
        torch._foreach_copy_(target, source)


def _require_same_weights(ours: dict[str, Tensor], given: dict[str, Tensor], what: str) -> None:
    require(
        ours.keys() == given.keys() and all(ours[name].shape == given[name].shape for name in ours),
        lambda: (
            f"the {what} is that of a reference with other weights: "
            f"{sorted(ours.keys() ^ given.keys())[:5] or 'their shapes'} differ"
        ),
    )


def _restore(stored: dict[str, Tensor], ours: dict[str, Tensor]) -> None:
    _require_same_weights(ours, stored, "state")
    _copy([stored[name] for name in ours], list(ours.values()))
