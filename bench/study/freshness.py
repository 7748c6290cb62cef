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
import copy
import functools
import itertools
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import humanline as hl
from bench.environment import device_name
from bench.study import blocks, judge
from bench.study.run import HERE, RESULTS, WORLDS, added, read_config, read_results, recipe, workers
from humanline.reference import ReferenceCopy
from humanline.training import arithmetic, data
from humanline.training.config import TrainConfig
from humanline.training.model import model_folder

RULES = "freshness", "judged"
PLAIN, SYNC, HUMANLINE, NARROW = "plain", "sync only", "humanline", "narrow humanline"

#: Of the methods that clip, the share of tokens that lay within the bounds in the twin's drift.
WITHIN = {HUMANLINE: "drift_quantile", NARROW: "narrow_quantile"}


def config_of(rules: str) -> dict[str, Any]:
    return read_config(HERE / f"{rules}.json")


def lines_of(rules: str) -> Path:
    """Where its runs are."""
    return RESULTS / f"{rules}.jsonl"


def slope_of(config: dict[str, Any]) -> float | None:
    """Of the judge who compares answers; None where these are right or wrong."""
    return config["task"].get("slope")


@dataclass(frozen=True)
class Arm:
    """One cell of the grid.

    Args:
        objective: "GRPO", "DPO" or "KTO".
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
    arms += [Arm(objective, n, m, first) for m in config["methods"] for n in rare]
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
        wrong: where answers are judged, how many digits ``[P, G]`` are wrong in those that the
            model gives to these questions before training.
        draws: state of the generator after the pool was drawn.
    """

    prompts: Tensor
    answers: Tensor
    pool: blocks.Texts
    measured: blocks.Texts
    wrong: Tensor | None
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
    end = tokenizer.eos_token_id
    pool = draw(frozen, policy, read, slice(0, len(prompts)), config, end, draws)
    again = encode(tokenizer, measured)[:, beginning:]
    right = answers(tokenizer, measured)[:, None]
    every = torch.ones_like(right, dtype=torch.bool)
    texts, wrong = blocks.known(frozen, frozen.read_prompts(again), right, every), None
    if slope_of(config) is not None:
        told = answer(frozen, policy, read_prompts(frozen, again, config), config, end)
        wrong = judge.wrong_digits(told, right[:, 0])
    return World(prompts, answers(tokenizer, train), pool, texts, wrong, draws.get_state())


def read_prompts(
    frozen: blocks.Frozen, prompts: Tensor, config: dict[str, Any]
) -> list[blocks.Prompts]:
    """As many at a time as are drawn from."""
    return [frozen.read_prompts(few) for few in prompts.split(config["task"]["at_once"])]


def some(read: list[blocks.Prompts], span: slice, size: int) -> Iterator[blocks.Prompts]:
    """Those in a span, at most ``size`` at a time, as many as were read together."""
    for start in range(0, size * len(read), size):
        few = slice(max(span.start - start, 0), max(span.stop - start, 0))
        if few.start < size and few.stop:
            yield read[start // size][few]


def draw(frozen, policy, read, span: slice, config, end, generator) -> blocks.Texts:
    """Completions of some of the prompts, a few of these at a time."""
    options = config["task"]
    how = options["samples"], options["tokens"], end, generator
    prompts = some(read, span, options["at_once"])
    return blocks.Texts.cat([blocks.sample(frozen, policy, few, *how) for few in prompts])


def answer(frozen, policy, read, config, end) -> blocks.Texts:
    """Completions of all prompts, by the same draws whenever it is called."""
    span = slice(0, sum(map(len, read)))
    return draw(frozen, policy, read, span, config, end, torch.Generator().manual_seed(0))


@functools.cache
def world(rules: str, folder: str, seed: int) -> World:
    """Built at the first call and read from ``runs/`` at later ones."""
    config = config_of(rules)
    path = WORLDS / f"{rules}-{recipe(config)}-{seed}.pt"
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


@dataclass(frozen=True)
class Run:
    """What a run is made of, beside its policy.

    Attributes:
        read: the world's prompts.
        asked: where answers are judged, the questions to measure with.
        end: the token that ends a completion.
    """

    config: dict[str, Any]
    world: World
    frozen: blocks.Frozen
    read: list[blocks.Prompts]
    asked: list[blocks.Prompts]
    end: int


@functools.lru_cache(1)
def run_of(rules: str, folder: str, seed: int) -> Run:
    """The same of all runs of a seed. That prompts are read once takes more memory than the model
    does; by estimate, reading them for each draw would double the time of sampling."""
    config, shared = config_of(rules), world(rules, folder, seed)
    tokenizer, (frozen, _) = model(folder)[1], parts(folder, config)
    asked_again = []
    if slope_of(config) is not None:
        ids = encode(tokenizer, asked(seed, config)[1])[:, frozen.beginning.shape[1] :]
        asked_again = read_prompts(frozen, ids, config)
    read = read_prompts(frozen, shared.prompts, config)
    return Run(config, shared, frozen, read, asked_again, tokenizer.eos_token_id)


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
    def mask(self) -> Tensor:
        return self.texts.mask.flatten(0, 1)[self.rows]

    def loss(
        self, objective: hl.Objective, logps: Tensor, ref_logps: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """And statistics, of log-probs ``[S, C]`` of its rows."""
        own, given = len(self.rows) - self.mismatched, dict(self.arguments)
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
    ids, mask = iter(texts.ids.roll(1, 0)), iter(texts.mask.roll(1, 0))
    parts = []
    for prompts in some(run.read, span, run.config["task"]["at_once"]):
        few = (torch.stack(list(itertools.islice(x, len(prompts)))) for x in (ids, mask))
        parts.append(blocks.known(run.frozen, prompts, *few))
    return blocks.Texts.cat(parts)


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
        cost["trained_on"] += len(batch.rows) - batch.mismatched
        if step and ref_logps is not None:  # at first the reference is the policy
            unclamped.append(float(stats["humanline/unclamped"]))
            if step <= config["tuning"]["drift_steps"]:
                early.append((logps.detach() - ref_logps)[batch.mask].abs())
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


Job = tuple[Arm, int, float, float | None]  # arm, seed, learning rate, clip bound


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
        measure = self.config["analysis"]["measures"][0]
        return None if None in runs else statistics.mean(r[measure][-1] for r in runs)

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


def wanted(done: Done, objective: str) -> list[Job]:
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


def run_all(rules: str, objectives: list[str], jobs: int) -> None:
    """All runs that the file does not hold, added to it."""
    config, lines = config_of(rules), lines_of(rules)
    for objective in objectives:
        with workers(jobs) as pool:
            while True:
                done = Done(read_results(lines, config), config)
                runs = wanted(done, objective)
                missing = [run for run in runs if (str(run[0]), *run[1:]) not in done]
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
