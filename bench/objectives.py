"""The objectives of the benchmark: humanline's, and the same loss as a trainer writes it.

The trainers' code is also the truth, run in float64.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

import humanline as hl

BOUND = 1.5  # of humanline clipping, in nats
CLIP = hl.Clip(-BOUND, BOUND)
BETA = 0.1
EPSILON = 0.2


def grpo(logps: Tensor, batch) -> Tensor:
    ratio = (logps - batch.ref_logps).clamp(-BOUND, BOUND).exp()
    a = batch.advantages[:, None].to(ratio.dtype)
    per_token = -torch.min(a * ratio, a * ratio.clamp(1 - EPSILON, 1 + EPSILON))
    return per_token.mean(1).mean()


def dpo(logps: Tensor, batch) -> Tensor:
    rewards = BETA * (logps - batch.ref_logps).clamp(-BOUND, BOUND).sum(1)
    chosen, rejected = rewards.chunk(2)
    return -logsigmoid(chosen - rejected).mean()


def kto(logps: Tensor, batch) -> Tensor:
    rewards = BETA * (logps - batch.ref_logps).clamp(-BOUND, BOUND).sum(1)
    sign = torch.where(batch.desirable, 1.0, -1.0).to(rewards.dtype)
    return (1 - torch.sigmoid(sign * (rewards - BETA * batch.z0))).mean()


def sft(logps: Tensor, batch) -> Tensor:
    return -logps.mean()


@dataclass(frozen=True)
class BenchObjective:
    """One objective in both forms.

    Attributes:
        ours: humanline's.
        loss: the trainers', from log-probs ``[B, T]`` and a :class:`~bench.cases.Batch`.
        extra: names of the batch's attributes that ``ours`` takes besides the reference.
    """

    ours: hl.Objective
    loss: Callable[..., Tensor]
    extra: tuple[str, ...] = field(default=())


OBJECTIVES = {
    "grpo": BenchObjective(hl.GRPO(epsilon=EPSILON, perception=CLIP), grpo, ("advantages",)),
    "dpo": BenchObjective(hl.DPO(beta=BETA, perception=CLIP), dpo),
    "kto": BenchObjective(hl.KTO(beta=BETA, perception=CLIP), kto, ("desirable", "z0")),
    "sft": BenchObjective(hl.SFT(), sft),
}
