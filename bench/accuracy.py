"""How far a peer is from float64 on the same inputs, loss and gradients."""

from dataclasses import dataclass

import torch
from torch import Tensor

from bench.cases import Batch, Case, inputs
from bench.peers import Peer, eager_hidden, eager_logits

CHECKED_TOKENS = 512  # of a longer case, so many: the truth holds all logits in float64
WRONG = 0.1  # a relative error beyond this is no rounding


@dataclass(frozen=True)
class Errors:
    """Of the loss, over ``max(1, |loss|)``, since it may be 0; of the gradient, ``‖g − g64‖ /
    ‖g64‖``, that of the worst input."""

    loss: float
    gradient: float

    @property
    def wrong(self) -> bool:
        return not (self.loss <= WRONG and self.gradient <= WRONG)


@dataclass(frozen=True)
class Truth:
    """A batch, and its loss and gradients by the trainers' code in float64."""

    batch: Batch
    loss: Tensor
    gradients: tuple[Tensor, ...]


def truth(case: Case, device: str) -> Truth:
    """Of (at most ``CHECKED_TOKENS`` of) the case's inputs; one serves all peers of the case."""
    batch = inputs(case.shortened(CHECKED_TOKENS), device)
    eager = eager_logits if case.entry == "logits" else eager_hidden
    return Truth(batch, *_evaluate(eager, batch.to_float64()))


def errors(peer: Peer, true: Truth) -> Errors:
    """Compare a peer with the truth, on the truth's batch."""
    loss, gradients = _evaluate(peer.run, true.batch)
    return Errors(
        (abs(loss.double() - true.loss) / true.loss.abs().clamp(min=1)).item(),
        max(_relative(g, t) for g, t in zip(gradients, true.gradients, strict=True)),
    )


def _evaluate(run, batch: Batch) -> tuple[Tensor, tuple[Tensor, ...]]:
    loss = run(batch)
    return loss.detach(), torch.autograd.grad(loss, batch.leaves)


def _relative(x: Tensor, truth: Tensor) -> float:
    norm = truth.norm().item()
    error = (x.double() - truth).norm().item()
    return error / norm if norm else error
