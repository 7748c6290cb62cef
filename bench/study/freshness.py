"""Sampling rarely, on a pretrained model: how often must the policy's own completions be fresh?

    python -m bench.study.freshness [--jobs N] [--objective GRPO]    results/freshness.jsonl
    python -m bench.study.freshness --rules judged [--jobs N]        results/judged.jsonl

With the rules of freshness.json answers are right or wrong; with those of judged.json nobody knows,
and a judge who errs compares two (judge.py). Every arm trains on the same prompts in the same order
and draws the same number of completions; it draws those of its next n steps at once, so that only
their age differs. Every run is a line, written as it ends: after an interruption the same command
goes on with the runs that are missing, those that the main contrasts need first. A process uses one
thread and some 3 GB (an estimate). ``python -m bench.study.freshness_report`` writes the reports.
"""

import argparse
import functools
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import humanline as hl
from bench.environment import device_name
from bench.study import blocks, judge
from bench.study.freshness_arms import (
    PLAIN,
    RULES,
    WITHIN,
    Arm,
    Done,
    Job,
    config_of,
    lines_of,
    slope_of,
    wanted,
)
from bench.study.freshness_world import Run, answer, draw, parts, run_of, some
from bench.study.run import added, read_results, recipe, workers
from humanline.reference import ReferenceCopy
from humanline.training.config import TrainConfig
from humanline.training.model import model_folder


def steps(
    arm: Arm, run: Run, policy: blocks.Policy, cost: dict[str, float]
) -> Iterator[tuple[blocks.Texts, Tensor, slice]]:
    """Completions of each step, the rewards ``[P, G]`` they get, and which of the prompts they are
    of. A reward is 1 for the right number and nothing else, or minus the wrong digits."""
    recipe, world = run.config["training"], run.world
    total, size = recipe["steps"], recipe["prompts"]
    every = arm.every or total
    generator = torch.Generator()
    generator.set_state(world.draws)
    for first in range(0, total, every):
        span = slice(first * size, (first + every) * size)
        start = time.process_time()
        if first == 0:  # from the model before training, whatever the arm
            texts = world.pool[span]
        else:
            policy.eval()
            texts = draw(run.frozen, policy, run.read, span, run.config, run.end, generator)
            cost["sampling_seconds"] += time.process_time() - start
            cost["tokens_sampled"] += int(texts.mask.sum())
        answers = world.answers[span]
        if slope_of(run.config) is not None:
            rewards = -judge.wrong_digits(texts, answers).float()
        else:
            rewards = right(texts, answers)
        for step in range(0, len(rewards), size):
            few = slice(step, step + size)
            yield texts[few], rewards[few], slice(span.start + step, span.start + step + size)


def right(texts: blocks.Texts, answers: Tensor) -> Tensor:
    """Rewards ``[P, G]``."""
    written = answers.shape[1]
    same = (texts.ids[:, :, :written] == answers[:, None]).all(2)
    return (same & (texts.mask.sum(2) == written)).float()


@dataclass(frozen=True)
class Batch:
    """What a step trains on.

    Attributes:
        texts: read whole, each prompt once.
        rows: which of the completions ``[P·G]`` count, for DPO the chosen ones first.
        arguments: the objective's own.
        mismatched: how many of the rows, the last ones, are completions of other prompts.
    """

    texts: blocks.Texts
    rows: Tensor
    arguments: dict[str, Any]
    mismatched: int = 0

    @property
    def own(self) -> int:
        """How many rows are trained on."""
        return len(self.rows) - self.mismatched

    @property
    def mask(self) -> Tensor:
        return self.texts.mask.flatten(0, 1)[self.rows]

    def loss(
        self, objective: hl.Objective, logps: Tensor, ref_logps: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """And statistics, of log-probs ``[S, C]`` of its rows."""
        own, given = self.own, dict(self.arguments)
        if self.mismatched:
            given["kl_logps"], given["kl_ref_logps"] = logps[own:], ref_logps[own:]
            given["kl_mask"] = self.mask[own:]
        ref_logps = None if ref_logps is None else ref_logps[:own]
        return objective.from_logps(logps[:own], ref_logps, self.mask[:own], **given)


def make_batch(
    arm: Arm,
    texts: blocks.Texts,
    rewards: Tensor,
    slope: float | None,
    others: Callable[[], blocks.Texts],
    generator: torch.Generator,
) -> Batch | None:
    """GRPO takes all completions, DPO and KTO a better and a worse one of each prompt that has
    such (None: there is no such prompt, and nothing to learn from).

    Args:
        slope: of the judge who says which of two is better; None: a right one is better than a
            wrong one.
        others: the completions of other prompts, read after these: KTO's mismatched pairs.
    """
    prompts, each = rewards.shape
    if arm.objective == "GRPO":
        advantages = (rewards - rewards.mean(1, True)) / (rewards.std(1, keepdim=True) + 1e-4)
        arguments: dict[str, Any] = {"advantages": advantages.flatten()}
        if arm.method == PLAIN:
            arguments["old_logps"] = texts.logps.flatten(0, 1)
        return Batch(texts, torch.arange(prompts * each), arguments)
    if slope is None:
        of, chosen, rejected = right_and_wrong(rewards, generator)
        texts = texts[of]
    else:
        chosen, rejected = judge.pairs(-rewards, slope, generator)
    start = torch.arange(len(chosen)) * each
    rows = torch.cat([start + chosen, start + rejected])
    if not len(rows):
        return None
    if arm.objective == "DPO":
        return Batch(texts, rows, {})
    desirable = torch.arange(len(rows)) < len(chosen)
    both = blocks.Texts.cat([texts, others()])
    rows = torch.cat([rows, rows + len(texts.ids) * each])
    return Batch(both, rows, {"desirable": desirable}, len(desirable))


def right_and_wrong(rewards: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Which prompts have both, and of each a right and a wrong completion, drawn at random."""
    lottery = torch.rand(rewards.shape, generator=generator)
    both = (rewards.any(1) & ~rewards.all(1)).nonzero()[:, 0]
    good = rewards[both].bool()
    chosen = lottery[both].masked_fill(~good, -1).argmax(1)
    rejected = lottery[both].masked_fill(good, -1).argmax(1)
    return both, chosen, rejected


def mismatched(run: Run, texts: blocks.Texts, span: slice) -> blocks.Texts:
    """Each prompt with the completions of the one before it."""
    read = list(some(run.read, span, run.config["task"]["at_once"]))
    ids, mask = (x.roll(1, 0).split(list(map(len, read))) for x in (texts.ids, texts.mask))
    few = zip(read, ids, mask, strict=True)
    return blocks.Texts.cat([blocks.known(run.frozen, *each) for each in few])


def score(policy: blocks.Policy, batch: Batch) -> Tensor:
    """Log-probs ``[S, C]`` of the completions that count."""
    return policy.logps(batch.texts)[batch.rows]


# A run


def make_objective(arm: Arm, options: dict[str, Any], bound: float | None) -> hl.Objective:
    perception = hl.Clip(-bound, bound) if arm.method in WITHIN else hl.Identity()
    return getattr(hl, arm.objective)(**options, perception=perception)


def train(
    arm: Arm, run: Run, policy: blocks.Policy, seed: int, lr: float, bound: float | None
) -> dict[str, Any]:
    """Train in place; what came of it, as a JSON object. A run whose loss is not finite ends there
    and counts as worth nothing."""
    config, recipe, slope = run.config, run.config["training"], slope_of(run.config)
    trained = list(policy.body.requires_grad_(True).parameters())
    objective = make_objective(arm, config["objectives"][arm.objective], bound)
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0, fused=True)
    needs_reference = arm.method != PLAIN or arm.objective != "GRPO"
    reference = ReferenceCopy(policy, score, arm.sync_every) if needs_reference else None
    cost = dict.fromkeys(("sampling_seconds", "training_seconds"), 0.0)
    cost |= dict.fromkeys(("tokens_sampled", "trained_on"), 0)
    pairing = torch.Generator().manual_seed(seed + 2)
    curve, mean_rewards, unclamped, early = [], [], [], []
    for step, (texts, rewards, span) in enumerate(steps(arm, run, policy, cost)):
        if step % recipe["evaluate_every"] == 0:
            curve.append(measure(policy, run))
        start = time.process_time()
        mean_rewards.append(rewards.mean().item())
        others = functools.partial(mismatched, run, texts, span)
        batch = make_batch(arm, texts, rewards, slope, others, pairing)
        if batch is None:
            continue
        [ref_logps] = reference.scores([batch]) if reference else [None]
        logps = score(policy, batch)
        loss, stats = batch.loss(objective, logps, ref_logps)
        if not math.isfinite(loss.item()):
            break
        loss.backward()
        nn.utils.clip_grad_norm_(trained, recipe["max_grad_norm"])
        if reference:
            reference.before_step()
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / recipe["warmup"])
        optimizer.step()
        optimizer.zero_grad()
        cost["training_seconds"] += time.process_time() - start
        cost["trained_on"] += batch.own
        if step and ref_logps is not None:  # at first the reference is the policy
            unclamped.append(float(stats["humanline/unclamped"]))
            if step <= config["tuning"]["drift_steps"]:
                moved = (logps.detach() - ref_logps)[: batch.own]
                early.append(moved[batch.mask[: batch.own]].abs())
    else:
        curve.append(measure(policy, run))
    evaluations = recipe["steps"] // recipe["evaluate_every"] + 1
    result = {
        name: [round(found[name], 5) for found in curve] + [0.0] * (evaluations - len(curve))
        for name in config["analysis"]["measures"]
    }
    result |= {"reward": round(statistics.mean(mean_rewards), 4)}
    result |= {name: round(value, 2) for name, value in cost.items()}
    if early:
        ratios, tuning = torch.cat(early), config["tuning"]
        drift = {name: ratios.quantile(tuning[name]).item() for name in WITHIN.values()}
        result |= {"drift": drift, "unclamped": round(statistics.mean(unclamped), 4)}
    return result


@torch.no_grad()
def measure(policy: blocks.Policy, run: Run) -> dict[str, float]:
    """Mean probability of the right answers (Pass@1 at temperature 1, exact: there is one answer)
    and the share that greedy decoding gives; where answers are judged, how often one that is drawn
    wins against one of the model before training."""
    texts, sampled, greedy = run.world.measured, [], []
    for start in range(0, len(texts.ids), 60):
        few = texts[start : start + 60]
        scores = (policy.hidden(few) @ policy.weight.T).log_softmax(-1)
        ids = few.ids.flatten(0, 1)
        sampled.append(scores.gather(2, ids[:, :, None])[:, :, 0].sum(1).exp())
        greedy.append((scores.argmax(2) == ids).all(1))
    found = {
        "pass@1": torch.cat(sampled).mean().item(),
        "greedy": torch.cat(greedy).double().mean().item(),
    }
    if (slope := slope_of(run.config)) is not None:
        told = answer(run.frozen, policy, run.asked, run.config, run.end)
        wrong = judge.wrong_digits(told, texts.ids[:, 0])
        found["win rate"] = judge.win_rate(wrong, run.world.wrong, slope)
    return found


def execute(rules: str, job: Job) -> dict[str, Any]:
    """One run, in a worker process."""
    arm, seed, lr, bound = job
    folder = str(model_folder(TrainConfig()))
    run = run_of(rules, folder, seed)
    _, policy = parts(folder, run.config)
    torch.manual_seed(seed)
    result = train(arm, run, policy, seed, lr, bound)
    head = {"arm": str(arm), "seed": seed, "lr": lr, "bound": bound}
    where = {"device": device_name("cpu"), "torch": torch.__version__.split("+")[0]}
    return head | {"recipe": recipe(run.config)} | where | result


def run_all(rules: str, objectives: list[str], jobs: int) -> None:
    """All runs that the file does not hold, added to it."""
    config, lines = config_of(rules), lines_of(rules)
    for objective in objectives:
        with workers(jobs) as pool:
            while True:
                done = Done(read_results(lines, config), config)
                missing = done.missing(wanted(done, objective))
                if not missing:
                    break
                one = functools.partial(execute, rules)
                for _ in added(pool, one, missing, lines, list(done.values())):
                    pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=1, help="processes, of one thread each")
    parser.add_argument("--rules", choices=RULES, default=RULES[0])
    parser.add_argument("--objective", help="only this one")
    args = parser.parse_args()
    objectives = [args.objective] if args.objective else list(config_of(args.rules)["objectives"])
    run_all(args.rules, objectives, args.jobs)


if __name__ == "__main__":
    main()
