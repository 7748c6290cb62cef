"""Every public call but those of the trainers, as a user's script has it.

Runs. Wrong calls come last, each marked with the complaint that a type checker must have:
``mypy --strict`` complains of a mark that is not needed.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import humanline as hl


@dataclass(frozen=True)
class Reinforce(hl.TokenObjective):
    scale: float = 1.0

    needs_reference = False

    def prepare(
        self, layout: hl.Layout, ref_logps: Tensor | None, *, advantages: Tensor
    ) -> dict[str, Tensor]:
        return {"advantages": layout.rows(advantages, "advantages")}

    def token_loss(self, rows: hl.Rows, advantages: Tensor) -> Tensor:
        return rows.token_mean(-self.scale * advantages * rows.logps)

    def stats(self, rows: hl.Rows, advantages: Tensor) -> dict[str, Tensor]:
        return {"advantages": rows.token_mean(advantages).sum()}


@dataclass(frozen=True)
class Margin(hl.Objective):
    def loss(self, rows: hl.Rows, *, margin: float) -> Tensor:
        return (rows.sum(rows.log_ratio) - margin).square().mean()


@dataclass(frozen=True)
class Shrink(hl.Perception):
    by: float = 0.5

    def perceive(self, log_ratio: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        return self.by * log_ratio, torch.ones_like(mask)


hidden = torch.randn(4, 3, 8, requires_grad=True)
weight = torch.randn(16, 8, requires_grad=True)
token_ids = torch.randint(16, (4, 3))
labels = hl.shift(token_ids)
mask = labels != -100
logits = hidden @ weight.T
ref_logps = hl.token_logps(logits, labels, 1.0).detach()
advantages = hl.group_advantages(torch.randn(4), torch.tensor([0, 0, 1, 1]), "batch")


def every_objective() -> Iterator[Tensor]:
    perceptions = hl.Identity(), hl.Clip(-1.5, 1.5), hl.BetaRejection(seed=0), hl.ProspectWeight()
    for perception in perceptions:
        dpo = hl.DPO(beta=0.1, loss_type="sigmoid", perception=perception)
        yield dpo.from_logps(hl.token_logps(logits, labels), ref_logps, mask)[0]
        yield dpo.from_logits(logits, labels, ref_logps, temperature=0.9)[0]
        loss, stats = dpo.from_hidden(hidden, weight, labels, ref_logps, logit_softcap=30.0)
        yield loss + stats["humanline/unclamped"]
    desirable = torch.tensor([True, False, True, False])
    yield hl.KTO(perception=Shrink()).from_logits(
        logits, labels, ref_logps, desirable=desirable, z0=0.0
    )[0]
    for policy in (hl.GRPO(epsilon=0.2, loss_type="dapo"), hl.PPO(entropy_coef=0.01)):
        yield policy.from_hidden(hidden, weight, labels, ref_logps, advantages=advantages)[0]
    for reference_free in (hl.SFT(), hl.SimPO(beta=2.0), hl.SLiC(delta=1.0)):
        yield reference_free.from_hidden(hidden, weight, labels)[0]
    yield Reinforce(scale=2.0).from_hidden(hidden, weight, labels, advantages=advantages)[0]
    yield Margin(perception=hl.Clip()).from_logits(logits, labels, ref_logps, margin=1.0)[0]


def every_function(return_entropy: bool) -> Iterator[Tensor]:
    yield hl.token_logps(logits, labels).sum()
    yield hl.linear_token_logps(hidden, weight, labels, observe=lambda z, y: None).sum()
    logps, entropy = hl.token_logps(logits, labels, return_entropy=True)
    yield (logps + entropy).sum()
    logps, entropy = hl.linear_token_logps(hidden, weight, labels, return_entropy=True)
    yield (logps + entropy).sum()
    either = hl.linear_token_logps(hidden, weight, labels, return_entropy=return_entropy)
    yield either.sum() if isinstance(either, Tensor) else either[0].sum()
    alone = hl.Parallel(vocab=None)
    yield hl.token_logps(logits, labels, parallel=alone).sum()
    yield hl.group_advantages(torch.randn(2), torch.tensor([0, 0]), parallel=alone).sum()
    mean = hl.Parallel(sequence=None, data=None, grad="mean")
    yield hl.SFT().from_logits(logits, labels, parallel=mean)[0]
    yield hl.linear_token_logps(hidden, weight, labels, parallel=alone).sum()
    yield hl.DPO().from_hidden(hidden, weight, labels, ref_logps, parallel=alone)[0]
    completion = token_ids.index_fill(1, torch.tensor([0]), -100)
    rows = hl.mismatched_rows(token_ids, completion, torch.ones_like(token_ids), pad_token_id=1)
    yield rows["input_ids"].sum()


with hl.debug():
    losses = [loss.item() for loss in [*every_objective(), *every_function(False)]]
pairs: list[tuple[str, str]] = hl.mismatched_pairs(["a", "b"], ["c", "d"])
print(hl.__version__, losses, pairs)

if TYPE_CHECKING:  # what follows does not run
    with hl.patch_trl(gradient_tolerance=0.01):
        pass

    hl.DOP()  # type: ignore[attr-defined]
    hl.DPO(bta=0.1)  # type: ignore[call-arg]
    hl.DPO(beta="0.1")  # type: ignore[arg-type]
    hl.DPO(perception=-1.5)  # type: ignore[arg-type]
    hl.Clip(eps=1.5)  # type: ignore[call-arg]
    hl.DPO().from_logps(ref_logps, ref_logps)  # type: ignore[call-arg]
    hl.DPO().from_logits(logits, labels, temperature="hot")  # type: ignore[arg-type]
    hl.DPO().from_hidden(hidden, labels)  # type: ignore[call-arg]
    hl.DPO().from_hidden(hidden, weight, labels, logit_softcap="30")  # type: ignore[arg-type]
    hl.DPO().from_hidden([1.0], weight, labels)  # type: ignore[arg-type]
    hl.token_logps(logits, labels, entropy=True)  # type: ignore[call-overload]
    hl.linear_token_logps(hidden, weight)  # type: ignore[call-overload]
    hl.linear_token_logps(hidden, weight, labels, capturabel=True)  # type: ignore[call-overload]
    hl.linear_token_logps(hidden, weight, labels).foo()  # type: ignore[attr-defined]
    hl.group_advantages(advantages)  # type: ignore[call-arg]
    hl.mismatched_rows(token_ids, labels, pad=0)  # type: ignore[call-arg]
    hl.Parallel(tensor=None)  # type: ignore[call-arg]
    hl.token_logps(logits, labels, parallel="tp")  # type: ignore[call-overload]
    hl.shift([1, 2])  # type: ignore[arg-type]
    hl.patch_trl(0.01)  # type: ignore[call-arg]
    hl.patch_trl(tolerance=0.01)  # type: ignore[call-arg]

    class Wrong(hl.TokenObjective):
        def token_loss(self, rows: Tensor) -> Tensor:  # type: ignore[override]
            return rows
