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

where ``optimizer_steps`` yields, for each optimizer step, the list of its micro-batches.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from humanline.checks import require

Score = Callable[[nn.Module, Any], Any]


class ReferenceCopy:
    """A second set of weights.

    Args:
        policy: the model being trained.
        score: ``score(model, batch)`` computes what a loss needs of the reference, its log-probs;
            called without gradients, the model in eval mode.
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
        self.model = copy.deepcopy(policy).eval().requires_grad_(False)
        self.step = 0

    def steps(self, optimizer_steps: Iterable[list[Any]]) -> Iterator[tuple[list[Any], list[Any]]]:
        """Each optimizer step's micro-batches, with the reference's scores of them."""
        for batches in optimizer_steps:
            with torch.no_grad():
                scores = [self.score(self.model, batch) for batch in batches]
            yield batches, scores

    def before_step(self) -> None:
        """Gradients are ready, the optimizer is about to step: sync if it is time."""
        if self.sync_every and self.step % self.sync_every == 0:
            self._copy()
        self.step += 1

    @torch.no_grad()
    def _copy(self) -> None:
        for ours, theirs in (
            (self.model.parameters(), self.policy.parameters()),
            (self.model.buffers(), self.policy.buffers()),
        ):
            ours, theirs = list(ours), list(theirs)
            if ours:
                torch._foreach_copy_(ours, theirs)

    def memory_bytes(self) -> int:
        """Bytes held besides the policy."""
        held = [*self.model.parameters(), *self.model.buffers()]
        return sum(t.numel() * t.element_size() for t in held)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: the step, and of the reference's weights those that change
        (the policy's frozen ones, such as a LoRA base, are the reference's too)."""
        return {"step": self.step, "model": self._changing()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what :meth:`state_dict` returned.

        Raises:
            ValueError: it is the state of a different model.
        """
        ours, theirs = self._changing(), state["model"]
        require(
            ours.keys() == theirs.keys()
            and all(ours[name].shape == theirs[name].shape for name in ours),
            lambda: (
                "the state is that of a reference with other weights: "
                f"{sorted(ours.keys() ^ theirs.keys())[:5] or 'their shapes'} differ"
            ),
        )
        for name, tensor in ours.items():
            tensor.copy_(theirs[name])
        self.step = state["step"]

    def _changing(self) -> dict[str, torch.Tensor]:
        trained = {name for name, p in self.policy.named_parameters() if p.requires_grad}
        weights = {name: p for name, p in self.model.named_parameters() if name in trained}
        return weights | dict(self.model.named_buffers())
