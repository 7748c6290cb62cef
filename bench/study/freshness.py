"""Sampling rarely, on a pretrained model: how often must the policy's own completions be fresh?

    python -m bench.study.freshness [--jobs N] [--objective GRPO]    results/freshness.jsonl

Every arm trains on the same prompts in the same order and draws the same number of completions;
it draws those of its next n steps at once, so that only their age differs. Every run is a line,
written as it ends: after an interruption the same command goes on with the runs that are missing,
those that the main contrasts need first. A process uses one thread and 1.5 GB. Rules are in
freshness.json; ``python -m bench.study.freshness_report`` writes the report.
"""

import argparse
import copy
import functools
import math
import random
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import humanline as hl
from bench.environment import device_name
from bench.study import blocks
from bench.study.run import HERE, RESULTS, WORLDS, added, read_config, read_results, recipe, workers
from humanline.reference import ReferenceCopy
from humanline.training import arithmetic, data
from humanline.training.config import TrainConfig
from humanline.training.model import model_folder

CONFIG, LINES = HERE / "freshness.json", RESULTS / "freshness.jsonl"
PLAIN, SYNC, HUMANLINE, NARROW = "plain", "sync only", "humanline", "narrow humanline"

#: Of the methods that clip, the share of tokens that lay within the bounds in the twin's drift.
WITHIN = {HUMANLINE: "drift_quantile", NARROW: "narrow_quantile"}


@dataclass(frozen=True)
class Arm:
    """One cell of the grid.

    Args:
        objective: "GRPO" or "DPO".
        every: optimizer steps between draws of completions; 0: all are drawn before the first.
        method: "plain", "sync only", "humanline" or "narrow humanline".
        sync_every: optimizer steps between syncs; 0 for plain.
    """

    objective: str
    every: int
    method: str
    sync_every: int

    def __str__(self) -> str:
        k = f" k={self.sync_every}" if self.sync_every else ""
        return f"{self.objective} {age(self.every)}, {self.method}{k}"

    @property
    def twin(self) -> "Arm":
        """The arm without clipping, whose drift sets this one's bound."""
        return Arm(self.objective, self.every, SYNC, self.sync_every)


def age(every: int) -> str:
    return f"every {every}" if every else "once"


def grid(config: dict[str, Any], objective: str) -> list[Arm]:
    """All arms, the ones of the contrasts first. Fresh completions are trained on plainly."""
    first, *others = config["sync_every"]
    rare = [every for every in config["sample_every"] if every != 1]
    arms = [Arm(objective, 1, PLAIN, 0)]
    arms += [Arm(objective, every, PLAIN, 0) for every in rare]
    arms += [Arm(objective, n, m, first) for m in (HUMANLINE, SYNC, NARROW) for n in rare]
    return arms + [Arm(objective, n, HUMANLINE, k) for k in others for n in rare]


# Data


@dataclass(frozen=True)
class World:
    """What all arms of a seed share.

    Attributes:
        prompts: tokens ``[steps · P, T]`` to train on, in their order, without their beginning.
        answers: tokens ``[steps · P, C]`` of the right answers, ended.
        pool: completions of all of them, drawn from the model before training.
        measured: right answers to the questions to measure with.
        draws: state of the generator after the pool was drawn.
    """

    prompts: Tensor
    answers: Tensor
    pool: blocks.Texts
    measured: blocks.Texts
    draws: Tensor


@functools.cache
def model(folder: str) -> tuple[Any, Any]:
    """Model and tokenizer, once a process."""
    return (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(),
        AutoTokenizer.from_pretrained(folder),
    )


def parts(folder: str, config: dict[str, Any]) -> tuple[blocks.Frozen, blocks.Policy]:
    """The frozen part and a policy of its own."""
    whole, tokenizer = model(folder)
    ids = encode(tokenizer, [["10", "11", "12"], ["97", "98", "99"]])
    differs = (ids[0] != ids[1]).nonzero()[0].item()
    frozen, policy = blocks.split(whole, config["task"]["blocks"], ids[0, :differs])
    return frozen, copy.deepcopy(policy)  # the model serves the next run too


def encode(tokenizer, questions: list[list[str]]) -> Tensor:
    """Tokens ``[P, B + T]``: all numbers have two digits, and all prompts the same length."""
    prompts = [arithmetic.make_prompt(numbers) for numbers in questions]
    ids, mask = arithmetic.encode_left_padded(tokenizer, prompts)
    assert mask.all(), "prompts differ in length"
    return ids


def questions(seed: int, number: int, taken: set[frozenset[str]]) -> list[list[str]]:
    """So many sets of three numbers, none of them in ``taken``, to which they are added."""
    draw, found = random.Random(seed), []
    while len(found) < number:
        numbers = [str(n) for n in draw.sample(range(10, 100), 3)]
        if frozenset(numbers) not in taken:
            taken.add(frozenset(numbers))
            found.append(numbers)
    return found


def held_out() -> list[list[str]]:
    """The held-out questions of humanline train."""
    texts = [q.prompt[-1]["content"] for q in data.read_questions(data.DEFAULT_HELDOUT)]
    return [text.split(", ") for text in texts]


def asked(seed: int, config: dict[str, Any]) -> tuple[list[list[str]], list[list[str]]]:
    """Questions to train on and to measure with. Rates are tuned on questions of their own."""
    recipe, tuning = config["training"], config["tuning"]
    measured = held_out()
    taken = {frozenset(q) for q in measured} | {frozenset(arithmetic.EXAMPLE[0].split(", "))}
    others = questions(0, len(measured), taken)
    if seed in tuning["seeds"]:
        measured = others
    return questions(seed + 1, recipe["steps"] * recipe["prompts"], taken), measured


def answers(tokenizer, asked: list[list[str]]) -> Tensor:
    """Tokens ``[P, C]`` of the largest numbers, ended."""
    ids = [tokenizer(max(q, key=int), add_special_tokens=False).input_ids for q in asked]
    return torch.tensor([[*row, tokenizer.eos_token_id] for row in ids])


def build_world(folder: str, config: dict[str, Any], seed: int) -> World:
    """A function of its arguments."""
    _, tokenizer = model(folder)
    frozen, policy = parts(folder, config)
    train, measured = asked(seed, config)
    beginning = frozen.beginning.shape[1]
    prompts = encode(tokenizer, train)[:, beginning:]
    draws = torch.Generator().manual_seed(seed)
    read = read_prompts(frozen, prompts, config)
    span = slice(0, len(prompts))
    pool = draw(frozen, policy, read, span, config, tokenizer.eos_token_id, draws)
    right = blocks.known(
        frozen, encode(tokenizer, measured)[:, beginning:], answers(tokenizer, measured)
    )
    return World(prompts, answers(tokenizer, train), pool, right, draws.get_state())


def read_prompts(
    frozen: blocks.Frozen, prompts: Tensor, config: dict[str, Any]
) -> list[blocks.Prompts]:
    """As many at a time as are drawn from."""
    return [frozen.read_prompts(few) for few in prompts.split(config["task"]["at_once"])]


def draw(frozen, policy, read, span: slice, config, end, generator) -> blocks.Texts:
    """Completions of some of the prompts, a few of these at a time."""
    options, size = config["task"], config["task"]["at_once"]
    parts = []
    for start in range(0, size * len(read), size):
        few = slice(max(span.start - start, 0), max(span.stop - start, 0))
        if few.start < size and few.stop:
            parts.append(
                blocks.sample(
                    frozen,
                    policy,
                    read[start // size][few],
                    options["samples"],
                    options["tokens"],
                    end,
                    generator,
                )
            )
    return blocks.Texts.cat(parts)


@functools.cache
def world(folder: str, seed: int) -> World:
    """Built at the first call and read from ``runs/`` at later ones."""
    config = read_config(CONFIG)
    path = WORLDS / f"freshness-{recipe(config)}-{seed}.pt"
    if not path.exists():
        WORLDS.mkdir(parents=True, exist_ok=True)
        built = vars(build_world(folder, config, seed))
        plain = {k: vars(v) if isinstance(v, blocks.Texts) else v for k, v in built.items()}
        partial = path.with_suffix(".partial")
        torch.save(plain, partial)
        partial.rename(path)
    stored = torch.load(path)
    texts = {name: blocks.Texts(**stored.pop(name)) for name in ("pool", "measured")}
    return World(**stored, **texts)


@functools.lru_cache(1)
def prompts_read(folder: str, seed: int) -> list[blocks.Prompts]:
    """Of a seed's prompts: 0.7 GB by estimate, and in every draw half of its time."""
    config = read_config(CONFIG)
    return read_prompts(parts(folder, config)[0], world(folder, seed).prompts, config)


def steps(
    arm: Arm,
    world: World,
    read: list[blocks.Prompts],
    frozen: blocks.Frozen,
    policy: blocks.Policy,
    config: dict[str, Any],
    end: int,
    cost: dict[str, float],
) -> Iterator[tuple[blocks.Texts, Tensor]]:
    """Completions of each step and the rewards ``[P, G]`` they get: 1 for the right number and
    nothing else."""
    recipe = config["training"]
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
            texts = draw(frozen, policy, read, span, config, end, generator)
            cost["sampling_seconds"] += time.process_time() - start
            cost["tokens_sampled"] += int(texts.mask.sum())
        rewards = right(texts, world.answers[span])
        for step in range(0, len(rewards), size):
            few = slice(step, step + size)
            yield texts[few], rewards[few]


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
    """

    texts: blocks.Texts
    rows: Tensor
    arguments: dict[str, Any]

    @property
    def mask(self) -> Tensor:
        return self.texts.mask.flatten(0, 1)[self.rows]


def make_batch(
    arm: Arm, texts: blocks.Texts, rewards: Tensor, generator: torch.Generator
) -> Batch | None:
    """GRPO takes all completions; DPO a right and a wrong one, drawn at random, of each prompt that
    has both (None: there is no such prompt, and nothing to learn from)."""
    prompts, each = rewards.shape
    if arm.objective == "GRPO":
        advantages = (rewards - rewards.mean(1, True)) / (rewards.std(1, keepdim=True) + 1e-4)
        arguments: dict[str, Any] = {"advantages": advantages.flatten()}
        if arm.method == PLAIN:
            arguments["old_logps"] = texts.logps.flatten(0, 1)
        return Batch(texts, torch.arange(prompts * each), arguments)
    lottery = torch.rand(rewards.shape, generator=generator)
    both = (rewards.any(1) & ~rewards.all(1)).nonzero()[:, 0]
    if not len(both):
        return None
    good = rewards[both].bool()
    chosen = lottery[both].masked_fill(~good, -1).argmax(1)
    rejected = lottery[both].masked_fill(good, -1).argmax(1)
    start = torch.arange(len(both)) * each
    return Batch(texts[both], torch.cat([start + chosen, start + rejected]), {})


def score(policy: blocks.Policy, batch: Batch) -> Tensor:
    """Log-probs ``[S, C]`` of the completions that count."""
    return policy.logps(batch.texts)[batch.rows]


# A run


def make_objective(arm: Arm, options: dict[str, Any], bound: float | None) -> hl.Objective:
    perception = hl.Clip(-bound, bound) if arm.method in WITHIN else hl.Identity()
    return getattr(hl, arm.objective)(**options, perception=perception)


def train(
    arm: Arm,
    world: World,
    read: list[blocks.Prompts],
    frozen: blocks.Frozen,
    policy: blocks.Policy,
    config: dict[str, Any],
    seed: int,
    lr: float,
    bound: float | None,
    end: int,
) -> dict[str, Any]:
    """Train in place; what came of it, as a JSON object. A run whose loss is not finite ends there
    and counts as right on no question."""
    recipe = config["training"]
    trained = list(policy.body.requires_grad_(True).parameters())
    objective = make_objective(arm, config["objectives"][arm.objective], bound)
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0, fused=True)
    needs_reference = arm.method != PLAIN or arm.objective == "DPO"
    reference = ReferenceCopy(policy, score, arm.sync_every) if needs_reference else None
    cost = dict.fromkeys(("sampling_seconds", "training_seconds"), 0.0)
    cost |= dict.fromkeys(("tokens_sampled", "trained_on"), 0)
    pairing = torch.Generator().manual_seed(seed + 2)
    curve, mean_rewards, unclamped, early = [], [], [], []
    source = steps(arm, world, read, frozen, policy, config, end, cost)
    for step, (texts, rewards) in enumerate(source):
        if step % recipe["evaluate_every"] == 0:
            curve.append(measure(policy, world.measured))
        start = time.process_time()
        mean_rewards.append(rewards.mean().item())
        batch = make_batch(arm, texts, rewards, pairing)
        if batch is None:
            continue
        [ref_logps] = reference.scores([batch]) if reference else [None]
        logps = score(policy, batch)
        loss, stats = objective.from_logps(logps, ref_logps, batch.mask, **batch.arguments)
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
        cost["trained_on"] += len(batch.rows)
        if step and ref_logps is not None:  # at first the reference is the policy
            unclamped.append(float(stats["humanline/unclamped"]))
            if step <= config["tuning"]["drift_steps"]:
                early.append((logps.detach() - ref_logps)[batch.mask].abs())
    else:
        curve.append(measure(policy, world.measured))
    evaluations = recipe["steps"] // recipe["evaluate_every"] + 1
    curve += [(0.0, 0.0)] * (evaluations - len(curve))  # a run that broke off
    result = {
        "pass@1": [round(sampled, 5) for sampled, _ in curve],
        "greedy": [round(greedy, 5) for _, greedy in curve],
        "reward": round(statistics.mean(mean_rewards), 4),
        **{name: round(value, 2) for name, value in cost.items()},
    }
    if early:
        ratios, tuning = torch.cat(early), config["tuning"]
        drift = {name: ratios.quantile(tuning[name]).item() for name in WITHIN.values()}
        result |= {"drift": drift, "unclamped": round(statistics.mean(unclamped), 4)}
    return result


@torch.no_grad()
def measure(policy: blocks.Policy, texts: blocks.Texts) -> tuple[float, float]:
    """Mean probability of the right answers (Pass@1 at temperature 1, exact: there is one answer)
    and the share that greedy decoding gives."""
    sampled, greedy = [], []
    for start in range(0, len(texts.ids), 60):
        few = texts[start : start + 60]
        scores = (policy.hidden(few) @ policy.weight.T).log_softmax(-1)
        ids = few.ids.flatten(0, 1)
        sampled.append(scores.gather(2, ids[:, :, None])[:, :, 0].sum(1).exp())
        greedy.append((scores.argmax(2) == ids).all(1))
    return torch.cat(sampled).mean().item(), torch.cat(greedy).double().mean().item()


Run = tuple[Arm, int, float, float | None]  # arm, seed, learning rate, clip bound


def execute(run: Run) -> dict[str, Any]:
    """One run, in a worker process."""
    arm, seed, lr, bound = run
    config = read_config(CONFIG)
    folder = str(model_folder(TrainConfig()))
    shared = world(folder, seed)
    frozen, policy = parts(folder, config)
    torch.manual_seed(seed)
    end = model(folder)[1].eos_token_id
    read = prompts_read(folder, seed)
    result = train(arm, shared, read, frozen, policy, config, seed, lr, bound, end)
    head = {"arm": str(arm), "seed": seed, "lr": lr, "bound": bound}
    where = {"device": device_name("cpu"), "torch": torch.__version__.split("+")[0]}
    return head | {"recipe": recipe(config)} | where | result


# Which runs there are: each needs what earlier ones found


class Done(dict[tuple, dict[str, Any]]):
    """Results by run: (arm's name, seed, rate, bound)."""

    def __init__(self, lines: list[dict[str, Any]], config: dict[str, Any]):
        super().__init__({key(line): line for line in lines})
        self.config, self.tuning = config, config["tuning"]

    def bound(self, arm: Arm, lr: float) -> float | None:
        """By the rule; None also where the twin has not run."""
        if arm.method not in WITHIN:
            return None
        twins = [self.get((str(arm.twin), seed, lr, None)) for seed in self.tuning["seeds"]]
        return None if None in twins else round(_drift(twins, arm), 5)

    def tuning_score(self, arm: Arm, lr: float) -> float | None:
        runs = [
            self.get((str(arm), seed, lr, self.bound(arm, lr))) for seed in self.tuning["seeds"]
        ]
        return None if None in runs else statistics.mean(r["pass@1"][-1] for r in runs)

    def tried(self, arm: Arm) -> tuple[dict[float, float | None], bool]:
        """Each rate's score, in their order, and whether that settles the arm's rate: the list is
        lengthened at the end where the best rate lies, up to twice."""
        lrs = sorted(self.tuning["lrs"])
        for _ in range(self.tuning["lengthened"] + 1):
            scores = {lr: self.tuning_score(arm, lr) for lr in lrs}
            if None in scores.values():
                return scores, False
            best = max(scores, key=scores.get)
            if best not in (lrs[0], lrs[-1]):
                return scores, True
            settled = scores
            lrs = [*lrs, 2 * best] if best == lrs[-1] else [best / 2, *lrs]
        return settled, True

    def rate(self, arm: Arm) -> float | None:
        """The chosen one; longer intervals between syncs take that of the first."""
        first = self.config["sync_every"][0] if arm.sync_every else 0
        scores, settled = self.tried(Arm(arm.objective, arm.every, arm.method, first))
        return max(scores, key=scores.get) if settled else None


def _drift(twins: list[dict[str, Any]], arm: Arm) -> float:
    return statistics.mean(twin["drift"][WITHIN[arm.method]] for twin in twins)


def key(result: dict[str, Any]) -> tuple:
    return result["arm"], result["seed"], result["lr"], result["bound"]


def wanted(done: Done, objective: str) -> list[Run]:
    """The runs that can be named by now, those that are done too, in the order to run them."""
    config, runs = done.config, []

    def add(arm: Arm, seeds: list[int], lr: float) -> None:
        bound = done.bound(arm, lr)
        if arm.method in WITHIN and bound is None:
            arm, seeds = arm.twin, done.tuning["seeds"]
        runs.extend((arm, seed, lr, bound) for seed in seeds)

    arms = grid(config, objective)
    for arm in arms:
        if arm.sync_every in (0, config["sync_every"][0]):
            for lr in done.tried(arm)[0]:
                add(arm, done.tuning["seeds"], lr)
    first = [arm for arm in arms if arm.sync_every in (0, config["sync_every"][0])]
    for some in (first, [arm for arm in arms if arm not in first]):
        for seed in config["seeds"]:
            for arm in some:
                if (lr := done.rate(arm)) is not None:
                    add(arm, [seed], lr)
    return list(dict.fromkeys(runs))


def run_all(config: dict[str, Any], objectives: list[str], jobs: int) -> None:
    """All runs that the file does not hold, added to it."""
    for objective in objectives:
        with workers(jobs) as pool:
            while True:
                done = Done(read_results(LINES, config), config)
                runs = wanted(done, objective)
                missing = [run for run in runs if (str(run[0]), *run[1:]) not in done]
                if not missing:
                    break
                for _ in added(pool, execute, missing, LINES, list(done.values())):
                    pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=1, help="processes, of one thread each")
    parser.add_argument("--objective", help="only this one")
    args = parser.parse_args()
    config = read_config(CONFIG)
    objectives = [args.objective] if args.objective else list(config["objectives"])
    run_all(config, objectives, args.jobs)


if __name__ == "__main__":
    main()
