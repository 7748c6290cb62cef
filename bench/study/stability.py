"""How often a run of the miniature falls, on seeds that its rates were not chosen with.

    python -m bench.study.stability [--jobs N]    results/stability.jsonl, seed by seed

Rules are in stability.json; an interrupted study goes on with the runs that are missing.
"""

import argparse
import statistics
from typing import Any

from bench.study import arms
from bench.study.run import HERE, RESULTS, TWINS, Run, execute_all, read_config, read_results

CONFIG, LINES = HERE / "stability.json", RESULTS / "stability.jsonl"


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=1, help="processes, of one thread each")
    jobs = parser.parse_args().jobs
    study, config = read_config(CONFIG), read_config()
    for seed in study["seeds"]:  # whole seeds first
        execute_all(list(runs(study, config, seed).values()), LINES, jobs)


if __name__ == "__main__":
    main()
