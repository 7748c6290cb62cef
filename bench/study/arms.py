"""The arms of the study, and one run of one: objective × perception × data × when to sync."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import humanline as hl
from bench.study import task
from humanline.reference import Reference, ReferenceCopy

#: Of each method: whether its completions are fresh, how it perceives, whether it syncs.
METHODS = {
    "offline": (False, "none", False),
    "clip only": (False, "clip", False),
    "sync only": (False, "none", True),
    "humanline": (False, "clip", True),
    "sampling": (False, "rejection", True),
    "prospect": (False, "prospect", True),
    "online": (True, "none", False),
    "online + humanline": (True, "clip", True),
}

#: Those that are run with every value of ``sync_every``.
CROSSED = ("sync only", "humanline", "online + humanline")

#: Edges of the log-ratio histograms: ±10^-4 … ±10, four a decade; what lies beyond joins the ends.
MAGNITUDES = [10 ** (i / 4) for i in range(-16, 5)]
EDGES = torch.tensor([-x for x in reversed(MAGNITUDES)] + MAGNITUDES)


@dataclass(frozen=True)
class Arm:
    """One cell of the grid.

    Args:
        objective: "DPO", "KTO" or "GRPO".
        method: a key of ``METHODS``.
        sync_every: optimizer steps between syncs; 0 for the methods that do not sync.
    """

    objective: str
    method: str
    sync_every: int

    def __str__(self) -> str:
        k = f" k={self.sync_every}" if self.sync_every else ""
        return f"{self.objective} {self.method}{k}"

    @property
    def online(self) -> bool:
        return METHODS[self.method][0]

    @property
    def perception(self) -> str:
        return METHODS[self.method][1]

    @property
    def on_policy(self) -> bool:
        """Plain online GRPO: the ratio is to the policy that sampled, hence 1; no reference."""
        return self.objective == "GRPO" and self.method == "online"

    def build(self, options: dict[str, Any], bound: float | None) -> hl.Objective:
        """The library's objective, clipping at ``±bound`` if it clips."""
        perception = {
            "none": hl.Identity,
            "clip": lambda: hl.Clip(-bound, bound),
            "rejection": hl.BetaRejection,
            "prospect": hl.ProspectWeight,
        }[self.perception]()
        return getattr(hl, self.objective)(**options, perception=perception)


def grid(config: dict[str, Any]) -> list[Arm]:
    """All arms; the first value of ``sync_every`` serves the others that sync."""
    ks = config["sync_every"]
    return [
        Arm(objective, method, k)
        for objective in config["objectives"]
        for method, (_, _, syncs) in METHODS.items()
        for k in (ks if method in CROSSED else ks[:1] if syncs else [0])
    ]


# Data: an optimizer step's completions [P, G, 3] of P prompts, and what an objective makes of them


def groups(
    arm: Arm, world: task.World, policy: task.Adder, per_step: int, seed: int, cost: dict
) -> Iterator[tuple[Tensor, Tensor]]:
    """Prompt numbers ``[P]`` and completions ``[P, G, 3]``, without end: from the pool, or from the
    policy as it stands. All arms of a seed see the same prompts in the same order."""
    order = torch.Generator().manual_seed(seed)
    draws = torch.Generator().manual_seed(seed + 1)
    per_prompt = world.pool.shape[1]
    while True:
        for index in torch.randperm(len(world.prompts), generator=order).split(per_step):
            numbers = world.prompts[index]
            if not arm.online:
                yield numbers, world.pool[index]
                continue
            start = time.process_time()
            ids = task.prompt_ids(numbers).repeat_interleave(per_prompt, 0)
            policy.eval()
            answers = task.sample(policy, ids, draws)
            policy.train()
            cost["sampling_seconds"] += time.process_time() - start
            cost["sampled"] += len(ids)
            yield numbers, answers.view(-1, per_prompt, task.ANSWER)


def make_batch(arm: Arm, numbers: Tensor, answers: Tensor, generator: torch.Generator) -> dict:
    """What a step trains on: prompts ``[B, 6]``, answers ``[B, 3]``, the objective's arguments.

    GRPO takes all completions, their advantages normalised within each prompt's group; DPO and KTO
    a right and a wrong one, drawn at random, of each prompt that has both.
    """
    right = (answers == task.right_answers(numbers)[:, None]).all(2)
    if arm.objective == "GRPO":
        reward = right.float()
        advantages = (reward - reward.mean(1, True)) / (reward.std(1, keepdim=True) + 1e-4)
        prompts = task.prompt_ids(numbers).repeat_interleave(answers.shape[1], 0)
        arguments = {"advantages": advantages.flatten()}
        if arm.on_policy:
            arguments["old_logps"] = "policy"
        return {"prompts": prompts, "answers": answers.flatten(0, 1), "arguments": arguments}
    both = right.any(1) & ~right.all(1)
    prompts, answers, right = task.prompt_ids(numbers)[both], answers[both], right[both]
    lottery = torch.rand(right.shape, generator=generator)
    rows = torch.arange(len(right))
    chosen = answers[rows, lottery.masked_fill(~right, -1).argmax(1)]
    rejected = answers[rows, lottery.masked_fill(right, -1).argmax(1)]
    batch = {"prompts": torch.cat([prompts] * 2), "answers": torch.cat([chosen, rejected])}
    if arm.objective == "DPO":
        return batch | {"arguments": {}}
    mismatched = batch["answers"].roll(1, 0)  # each prompt with another's completion
    desirable = torch.arange(2 * len(rows)) < len(rows)
    return batch | {"mismatched": mismatched, "arguments": {"desirable": desirable}}


def optimizer_steps(arm: Arm, source, seed: int) -> Iterator[list[dict]]:
    """Batches, one a step. Where fewer than two prompts have a right and a wrong completion there
    is no batch of pairs: the prompts are passed over."""
    generator = torch.Generator().manual_seed(seed + 2)
    for numbers, answers in source:
        batch = make_batch(arm, numbers, answers, generator)
        if len(batch["answers"]) >= 4:
            yield [batch]


def score(model: task.Adder, batch: dict) -> dict[str, Tensor]:
    """What a loss needs of the reference."""
    scores = {"ref_logps": model.logps(batch["prompts"], batch["answers"])}
    if "mismatched" in batch:
        scores["kl_ref_logps"] = model.logps(batch["prompts"], batch["mismatched"])
    return scores


# A run


class LogRatios:
    """Log-ratios of the completion tokens of a run: histogram, what was removed, early drift."""

    def __init__(self, drift_steps: int):
        self.drift_steps = drift_steps
        self.all, self.removed = (torch.zeros(len(EDGES) + 1, dtype=torch.int64) for _ in range(2))
        self.early: list[Tensor] = []
        self.kept: list[float] = []

    def add(self, step: int, d: Tensor, kept: Tensor) -> None:
        if step == 0:
            return  # the reference is the policy: all are 0
        where = torch.bucketize(d, EDGES)
        self.all += torch.bincount(where, minlength=len(self.all))
        self.removed += torch.bincount(where[~kept], minlength=len(self.all))
        self.kept.append(kept.double().mean().item())
        if step <= self.drift_steps:
            self.early.append(d.abs())

    def summary(self, quantile: float) -> dict[str, Any]:
        if not self.early:
            return {}
        return {
            "drift": torch.cat(self.early).quantile(quantile).item(),
            "histogram": self.all.tolist(),
            "removed": self.removed.tolist(),
            "unclamped": round(sum(self.kept) / len(self.kept), 4),
        }


def train(
    arm: Arm,
    world: task.World,
    config: dict[str, Any],
    seed: int,
    lr: float,
    bound: float | None = None,
    reference_class: type[Reference] = ReferenceCopy,
    measure: Callable[[task.Adder, Tensor], tuple[float, float]] = task.accuracy,
) -> dict[str, Any]:
    """Train the world's base model as the arm says; what came of it, as a JSON object.

    ``measure`` is called with the policy and the held-out prompts at every evaluation. A run whose
    loss is not finite ends there and counts as right on no prompt.
    """
    recipe = config["training"]
    torch.manual_seed(seed)  # BetaRejection's draws
    policy = task.Adder(config["task"]["width"], config["task"]["layers"])
    policy.load_state_dict(world.base)
    reference = reference_class(policy, score, arm.sync_every)
    objective = arm.build(config["objectives"][arm.objective], bound)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=lr, weight_decay=0.0)
    warmup = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / recipe["warmup"])
    )
    cost = {"sampled": 0, "trained_on": 0, "sampling_seconds": 0.0, "training_seconds": 0.0}
    ratios, curve = LogRatios(config["tuning"]["drift_steps"]), []
    source = groups(arm, world, policy, recipe["prompts"], seed, cost)
    batches = optimizer_steps(arm, source, seed)
    scored = ((b, [{}]) for b in batches) if arm.on_policy else reference.steps(batches)

    for step in range(recipe["steps"]):
        if step % recipe["evaluate_every"] == 0:
            curve.append(measure(policy, world.held_out))
        start, sampling = time.process_time(), cost["sampling_seconds"]
        [batch], [scores] = next(scored)
        loss, d, kept = loss_of(objective, policy, batch, scores)
        if not math.isfinite(loss.item()):
            break
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), recipe["max_grad_norm"])
        reference.before_step()
        optimizer.step()
        warmup.step()
        cost["training_seconds"] += (
            time.process_time() - start - (cost["sampling_seconds"] - sampling)
        )
        cost["trained_on"] += len(batch["answers"])
        if d is not None:
            ratios.add(step, d, kept)
    else:
        curve.append(measure(policy, world.held_out))
    evaluations = recipe["steps"] // recipe["evaluate_every"] + 1
    curve += [(0.0, 0.0)] * (evaluations - len(curve))  # a run that broke off
    return {
        "pass@1": [round(sampled, 5) for sampled, _ in curve],
        "greedy": [round(greedy, 5) for _, greedy in curve],
        **{name: round(value, 2) for name, value in cost.items()},
        **ratios.summary(config["tuning"]["drift_quantile"]),
    }


def loss_of(objective: hl.Objective, policy: task.Adder, batch: dict, scores: dict):
    """The loss; the log-ratios ``[N]`` and which of them perception left alone, or None twice."""
    logps = policy.logps(batch["prompts"], batch["answers"])
    arguments = dict(batch["arguments"])
    if "mismatched" in batch:
        with torch.no_grad():
            arguments["kl_logps"] = policy.logps(batch["prompts"], batch["mismatched"])
        arguments["kl_ref_logps"] = scores["kl_ref_logps"]
        arguments["kl_mask"] = torch.ones_like(logps, dtype=torch.bool)
    ref_logps, mask = scores.get("ref_logps"), torch.ones_like(logps, dtype=torch.bool)
    loss, _ = objective.from_logps(logps, ref_logps, mask, **arguments)
    if ref_logps is None:
        return loss, None, None
    d = (logps.detach() - ref_logps).flatten()
    # BetaRejection draws anew here: other tokens than in the loss, of the same distribution.
    return loss, d, objective.perception.perceive(d, mask.flatten())[1]
