"""Run the study: tune the learning rates, then train every arm with every seed.

    python -m bench.study.run tune [--jobs N]     writes the chosen rates and bounds to config.json
    python -m bench.study.run final [--jobs N]    writes results/final.jsonl
    python -m bench.study.analyse                 writes REPORT.md and the figures

Every run is a line of results/*.jsonl, written as it ends: after an interruption the same command
goes on with the runs that are missing. A process uses one thread. Models and data that the arms of
a seed share are built first and kept in runs/.
"""

import argparse
import functools
import json
import statistics
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from bench.environment import device_name
from bench.study import arms, task

HERE = Path(__file__).parent
CONFIG, RESULTS, WORLDS = HERE / "config.json", HERE / "results", HERE / "runs"

#: Of each method that clips, the one without clipping whose drift sets the bound.
TWINS = {"humanline": "sync only", "online + humanline": "sync only", "clip only": "offline"}

Run = tuple[arms.Arm, int, float, float | None]  # arm, seed, learning rate, clip bound


def read_config(path: Path = CONFIG) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def write_config(config: dict[str, Any]) -> None:
    """A line for each value of depth one or, of the nested ones, two."""
    nested = ("analysis", "rules", "tuned")
    parts = []
    for key, value in config.items():
        text = json.dumps(value, ensure_ascii=False)
        if key in nested:
            lines = (
                f"{json.dumps(k)}: {json.dumps(v, ensure_ascii=False)}" for k, v in value.items()
            )
            text = "{\n " + ",\n ".join(lines) + "\n}"
        parts.append(f"{json.dumps(key)}: {text}")
    CONFIG.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")


def recipe(config: dict[str, Any]) -> str:
    """What a run's outcome depends on, besides its arm, seed, rate and bound."""
    return task.fingerprint([config[k] for k in ("task", "training", "objectives")])


def read_results(path: Path, config: dict[str, Any]) -> list[dict[str, Any]]:
    """Whole lines of a result file, all of them made with this configuration."""
    results = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            results.append(json.loads(line))
        except ValueError:
            break  # a killed run's half line, the last one
    if any(r["recipe"] != recipe(config) for r in results):
        raise SystemExit(f"{path} was made with another configuration: move it away")
    return results


@functools.cache
def world(seed: int) -> task.World:
    return task.load_world(read_config()["task"], seed, WORLDS)


def build(seed: int) -> None:
    world(seed)


def execute(run: Run) -> dict[str, Any]:
    """One run, in a worker process."""
    arm, seed, lr, bound = run
    config = read_config()
    result = arms.train(arm, world(seed), config, seed, lr, bound)
    head = {"arm": str(arm), "seed": seed, "lr": lr, "bound": bound}
    return head | {"recipe": recipe(config), "device": device_name("cpu")} | result


def execute_all(runs: Iterable[Run], path: Path, jobs: int) -> list[dict[str, Any]]:
    """The results of all runs: those that ``path`` holds, and the others, which are added to it."""
    done = {key(r): r for r in read_results(path, read_config())}
    runs = {(str(arm), *rest): (arm, *rest) for arm, *rest in runs}
    missing = [run for name, run in runs.items() if name not in done]
    with workers(jobs) as pool:
        seeds = sorted({seed for _, seed, _, _ in missing})
        list(tqdm(pool.map(build, seeds), "base models", len(seeds), unit="seed"))
        for result in added(pool, execute, missing, path, list(done.values())):
            done[key(result)] = result
    return [done[name] for name in runs]


def workers(jobs: int) -> ProcessPoolExecutor:
    """Processes of one thread each."""
    return ProcessPoolExecutor(jobs, get_context("spawn"), torch.set_num_threads, (1,))


def added(
    pool: ProcessPoolExecutor,
    execute: Callable[[Any], dict[str, Any]],
    missing: list[Any],
    path: Path,
    done: list[dict[str, Any]],
) -> Iterator[dict[str, Any]]:
    """The results of the missing runs as they end, each added to ``path``, which holds ``done``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:  # without a half line at the end
        file.writelines(json.dumps(r) + "\n" for r in done)
        file.flush()
        futures = [pool.submit(execute, run) for run in missing]
        for future in tqdm(as_completed(futures), path.stem, len(futures), unit="run"):
            result = future.result()
            file.write(json.dumps(result) + "\n")
            file.flush()
            yield result


def key(result: dict[str, Any]) -> tuple:
    return result["arm"], result["seed"], result["lr"], result["bound"]


def tune(config: dict[str, Any], jobs: int) -> dict[str, dict[str, Any]]:
    """Rate and bound of each arm, by the configuration's rules."""
    seeds, lrs = config["tuning"]["seeds"], config["tuning"]["lrs"]
    path = RESULTS / "tuning.jsonl"
    grid = arms.grid(config)
    clipping = [arm for arm in grid if arm.perception == "clip"]
    twins = [(arm, s, lr, None) for arm in grid if arm not in clipping for s in seeds for lr in lrs]
    results = execute_all(twins, path, jobs)

    def mean(name: str, arm: arms.Arm, lr: float) -> float:
        values = [
            r[name][-1] if name == "pass@1" else r[name]
            for r in results
            if r["arm"] == str(arm) and r["lr"] == lr
        ]
        return statistics.mean(values)

    def bound(arm: arms.Arm, lr: float) -> float | None:
        if arm not in clipping:
            return None
        twin = arms.Arm(arm.objective, TWINS[arm.method], arm.sync_every)
        return round(mean("drift", twin, lr), 5)

    clipped = [(arm, s, lr, bound(arm, lr)) for arm in clipping for s in seeds for lr in lrs]
    results += execute_all(clipped, path, jobs)
    tuned = {}
    for arm in grid:
        scores = {lr: mean("pass@1", arm, lr) for lr in lrs}
        best = max(scores, key=scores.get)
        tuned[str(arm)] = {
            "lr": best,
            "bound": bound(arm, best),
            "pass@1": {lr: round(s, 4) for lr, s in scores.items()},
        }
    return tuned


def final_runs(config: dict[str, Any]) -> list[Run]:
    if "tuned" not in config:
        raise SystemExit(
            "config.json holds no learning rates yet: run `python -m bench.study.run tune` first"
        )
    tuned = config["tuned"]
    return [
        (arm, seed, tuned[str(arm)]["lr"], tuned[str(arm)]["bound"])
        for seed in config["seeds"]
        for arm in arms.grid(config)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=["tune", "final"])
    parser.add_argument("--jobs", type=int, default=1, help="processes, of one thread each")
    args = parser.parse_args()
    config = read_config()
    if args.part == "tune":
        write_config(config | {"tuned": tune(config, args.jobs)})
    else:
        execute_all(final_runs(config), RESULTS / "final.jsonl", args.jobs)


if __name__ == "__main__":
    main()
