"""The arms of bench/study/freshness.py, and by its rules which runs there are: each needs what
earlier ones found, rates and bounds.
"""

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.study.run import HERE, RESULTS, read_config

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


Job = tuple[Arm, int, float, float | None]  # arm, seed, learning rate, clip bound


class Done(dict[tuple, dict[str, Any]]):
    """Results by run: (arm's name, seed, rate, bound)."""

    def __init__(self, lines: list[dict[str, Any]], config: dict[str, Any]):
        super().__init__({key(line): line for line in lines})
        self.config, self.tuning = config, config["tuning"]

    def missing(self, runs: list[Job]) -> list[Job]:
        """Those that are not done."""
        return [run for run in runs if (str(run[0]), *run[1:]) not in self]

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


def stages(config: dict[str, Any], objective: str) -> list[list[Arm]]:
    """All arms in the order in which they are run: those that the main contrasts are about, then
    the tighter bounds, then the longer intervals between syncs."""
    arms, others = grid(config, objective), config["sync_every"][1:]
    late = [arm for arm in arms if arm.sync_every in others]
    narrow = [arm for arm in arms if arm.method == NARROW]
    return [[arm for arm in arms if arm not in late + narrow], narrow, late]


def wanted(done: Done, objective: str) -> list[Job]:
    """The runs that can be named by now, those that are done too, in the order to run them. A stage
    begins when the one before it is done."""
    runs: list[Job] = []
    for arms in stages(done.config, objective):
        runs += _of_stage(done, arms)
        if done.missing(runs):
            break
    return list(dict.fromkeys(runs))


def _of_stage(done: Done, arms: list[Arm]) -> list[Job]:
    config, runs = done.config, []

    def add(arm: Arm, seeds: list[int], lr: float) -> None:
        bound = done.bound(arm, lr)
        if arm.method in WITHIN and bound is None:
            arm, seeds = arm.twin, done.tuning["seeds"]
        runs.extend((arm, seed, lr, bound) for seed in seeds)

    for arm in arms:
        if arm.sync_every in (0, config["sync_every"][0]):
            for lr in done.tried(arm)[0]:
                add(arm, done.tuning["seeds"], lr)
    for seed in config["seeds"]:
        for arm in arms:
            if (lr := done.rate(arm)) is not None:
                add(arm, [seed], lr)
    return runs
