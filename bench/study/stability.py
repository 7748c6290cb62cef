"""How often a run of the miniature falls, on seeds that its rates were not chosen with, and why.

    python -m bench.study.stability [--jobs N]    results/stability.jsonl, falls.jsonl, STABILITY.md

Rules are in stability.json; an interrupted study goes on with the runs that are missing.
"""

import argparse
import math
import statistics
from typing import Any

import torch

from bench.environment import device_name
from bench.report import markdown
from bench.study import arms, task
from bench.study.analyse import interval, shown
from bench.study.run import (
    HERE,
    RESULTS,
    TWINS,
    WORLDS,
    Run,
    added,
    execute_all,
    key,
    read_config,
    read_results,
    recipe,
    workers,
)

CONFIG, LINES, FALLS = HERE / "stability.json", RESULTS / "stability.jsonl", RESULTS / "falls.jsonl"
REPORT = "STABILITY.md"


def runs(study: dict[str, Any], config: dict[str, Any], seed: int) -> dict[str, Run]:
    """Of each arm's name, its run with a seed."""
    grid = {str(arm): arm for arm in arms.grid(config)}
    found = {}
    for name, change in study["arms"].items():
        arm = grid[name.partition(",")[0]]
        tuned = config["tuned"][str(arm)]
        lr, bound = tuned["lr"], tuned["bound"]
        if "rate" in change:
            lr *= change["rate"]
            bound = drift(arm, lr, config)
        if "bound" in change:
            bound = round(bound * change["bound"], 5)
        found[name] = (arm, seed, lr, bound)
    return found


def drift(arm: arms.Arm, lr: float, config: dict[str, Any]) -> float:
    """The bound that the miniature's rule gives at a rate, from its tuning runs."""
    twin = str(arms.Arm(arm.objective, TWINS[arm.method], arm.sync_every))
    tuning = read_results(RESULTS / "tuning.jsonl", config)
    return round(
        statistics.mean(r["drift"] for r in tuning if r["arm"] == twin and r["lr"] == lr), 5
    )


# What happens in a run


def look(seed: int) -> dict[str, Any]:
    """Humanline GRPO with k=1 once more: at every evaluation, log-probs of the right and the wrong
    completions of 512 prompts of the pool, and greedy answers that are right, by digit."""
    config, study = read_config(), read_config(CONFIG)
    world = task.load_world(config["task"], seed, WORLDS)
    numbers, pool = world.prompts[:512], world.pool[:512]
    good = (pool == task.right_answers(numbers)[:, None]).all(2).flatten()
    ids = task.prompt_ids(numbers).repeat_interleave(pool.shape[1], 0)
    seen: dict[str, list] = {"right": [], "wrong": [], "digits": []}

    @torch.no_grad()
    def measure(policy, held_out):
        logps = policy.logps(ids, pool.flatten(0, 1)).sum(1)
        seen["right"].append(round(logps[good].mean().item(), 3))
        seen["wrong"].append(round(logps[~good].mean().item(), 3))
        prompts, answers = task.prompt_ids(held_out), task.right_answers(held_out)
        scores = policy(torch.cat([prompts, answers[:, :-1]], 1))
        digits = (scores.argmax(-1) == answers).double().mean(0)
        seen["digits"].append([round(share, 3) for share in digits.tolist()])
        return task.accuracy(policy, held_out)

    arm, _, lr, bound = runs(study, config, seed)["GRPO humanline k=1"]
    result = arms.train(arm, world, config, seed, lr, bound, measure=measure)
    head = {"seed": seed, "recipe": recipe(config), "device": device_name("cpu")}
    return head | {"greedy": result["greedy"]} | seen


# The report


class Results:
    """The runs of each arm, in the order of the seeds."""

    def __init__(self, study: dict[str, Any], config: dict[str, Any], lines: list, falls: list):
        found = {key(line): line for line in lines}
        self.study, self.of = study, {name: [] for name in study["arms"]}
        for seed in study["seeds"]:
            for name, (arm, *rest) in runs(study, config, seed).items():
                self.of[name].append(found[(str(arm), *rest)])
        seen = {line["seed"]: line for line in falls}
        self.falls = [seen[seed] for seed in study["seeds"]]

    def last(self, name: str) -> list[float]:
        return [run["pass@1"][-1] for run in self.of[name]]

    def fallen(self, name: str) -> list[bool]:
        return [run["greedy"][-1] < self.study["fallen"] for run in self.of[name]]


def mcnemar(one: list[bool], other: list[bool]) -> float:
    """Two-sided exact p that two kinds of run fall equally often, on paired seeds."""
    apart = [a for a, b in zip(one, other, strict=True) if a != b]
    n, fewer = len(apart), min(sum(apart), len(apart) - sum(apart))
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(fewer + 1)) / 2**n)


def arm_rows(results: Results) -> list[list[str]]:
    rows = []
    for name, of in results.of.items():
        last = results.last(name)
        which = [str(r["seed"]) for r, fell in zip(of, results.fallen(name), strict=True) if fell]
        speed = [statistics.mean(r["pass@1"]) for r in of]
        row = [name, shown(*interval(last)), f"{statistics.stdev(last):.3f}", f"{min(last):.3f}"]
        rows.append([*row, shown(*interval(speed)), str(len(which)), ", ".join(which)])
    return rows


def cure_rows(results: Results) -> list[list[str]]:
    rows = []
    for name in results.of:
        base = f"{name.split()[0]} humanline k=1"
        if "humanline" not in name or name == base:
            continue
        differences = [a - b for a, b in zip(results.last(name), results.last(base), strict=True)]
        mean, half = interval(differences)
        p = mcnemar(results.fallen(name), results.fallen(base))
        fewer = sum(results.fallen(name)) < sum(results.fallen(base)) and p < 0.05
        free = mean - half > -results.study["margin"]
        counts = f"{sum(results.fallen(name))} of {sum(results.fallen(base))}"
        said = "**shown**" if fewer and free else "not shown"
        rows.append([name, counts, f"{p:.3f}", shown(mean, half, "+"), said])
    return rows


def look_rows(results: Results) -> list[list[str]]:
    rows = []
    fallen = results.fallen("GRPO humanline k=1")
    for label, wanted in (("fell", True), ("did not", False)):
        some = [f for f, fell in zip(results.falls, fallen, strict=True) if fell == wanted]

        def path(name, some=some):
            ends = [statistics.mean(f[name][i] for f in some) for i in (0, len(some[0][name]) - 1)]
            return f"{ends[0]:.2f} → {ends[1]:.2f}"

        digits = [statistics.mean(f["digits"][-1][i] for f in some) for i in range(task.ANSWER)]
        row = [label, str(len(some)), path("right"), path("wrong")] if some else [label, "0"]
        rows.append([*row, ", ".join(f"{d:.3f}" for d in digits)])
    return rows


def base_line(results: Results) -> str:
    """How much the base model's worth tells of falls."""
    names = list(results.of)
    counts = [sum(fell) for fell in zip(*map(results.fallen, names), strict=True)]
    base = [run["pass@1"][0] for run in results.of[names[0]]]
    table = sorted(zip(base, counts, results.study["seeds"], strict=True))
    cells = ", ".join(f"{seed}: {b:.3f}, {n}" for b, n, seed in table)
    return (
        f"Base model's Pass@1 and how many of the {len(names)} arms fell, by seed, the weakest "
        f"base first (correlation {statistics.correlation(base, counts):+.2f}): {cells}."
    )


def report(results: Results) -> str:
    study = results.study
    parts = [
        "# How often a run falls",
        "Generated by `python -m bench.study.stability` from `results/stability.jsonl` and "
        "`results/falls.jsonl`; the rules are in `stability.json`, what it means in "
        "[README.md](README.md).",
        f"The miniature with {len(study['seeds'])} other seeds, {study['seeds'][0]} to "
        f"{study['seeds'][-1]}, on {results.of['GRPO online'][0]['device']}. Fallen: after the "
        f"last step less than {study['fallen']} of the greedy answers are right. ± is half a 95 % "
        "interval over seeds.",
        markdown(
            ["arm", "Pass@1", "sd", "least", "mean of the curve", "fallen", "seeds"],
            arm_rows(results),
        ),
        "## Cures",
        f"Against humanline k=1; {study['rules']['cure']}.",
        markdown(
            ["", "fallen, of k=1's", "p", "Pass@1, difference", "cure at no cost"],
            cure_rows(results),
        ),
        "## What happens",
        "Humanline GRPO, k=1, before → after: log-probs of the offline completions, and greedy "
        "answers that are right after the last step, by digit. Means over the runs that fell and "
        "those that did not.",
        markdown(["", "runs", "right ones", "wrong ones", "digits"], look_rows(results)),
        base_line(results),
        "## Rules, fixed before the runs",
        "\n".join(f"- {name}: {text}." for name, text in study["rules"].items()),
    ]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=1, help="processes, of one thread each")
    jobs = parser.parse_args().jobs
    study, config = read_config(CONFIG), read_config()
    for seed in study["seeds"]:  # whole seeds first
        execute_all(list(runs(study, config, seed).values()), LINES, jobs)
    falls = read_results(FALLS, config)
    missing = [seed for seed in study["seeds"] if seed not in {f["seed"] for f in falls}]
    with workers(jobs) as pool:
        falls += list(added(pool, look, missing, FALLS, falls))
    results = Results(study, config, read_results(LINES, config), falls)
    (HERE / REPORT).write_text(report(results), encoding="utf-8")


if __name__ == "__main__":
    main()
