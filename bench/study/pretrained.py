"""The claim on a pretrained model: `humanline train`'s model and task, offline, humanline, online.

    python -m bench.study.pretrained [--jobs N]    results/pretrained.jsonl, then PRETRAINED.md

Every run is a line, written as it ends: after an interruption the same command goes on with the
runs that are missing. A process uses one thread and 3.5 GB; a run takes it about four minutes, an
online one ten. Rules and rates are in pretrained.json.
"""

import argparse
import json
import random
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from torch import nn

from bench.environment import device_name
from bench.report import markdown
from bench.study.analyse import interval, shown
from bench.study.run import HERE, RESULTS, added, read_config, read_results, recipe, workers
from humanline.reference import REFERENCES
from humanline.training import arithmetic, data, evaluate, examples, score
from humanline.training.config import TrainConfig
from humanline.training.model import load_model, load_tokenizer, model_folder
from humanline.training.ranks import Root
from humanline.training.run import learning_rate

CONFIG, LINES, REPORT = HERE / "pretrained.json", RESULTS / "pretrained.jsonl", "PRETRAINED.md"
ARMS = {
    "offline": {"perception": "none", "sync_every": 0},
    "humanline": {"perception": "clip", "sync_every": 1},
    "online": {"perception": "none", "sync_every": 0},
}
CPU = torch.device("cpu")

Run = tuple[str, str, int, float]  # objective, arm, seed, learning rate


# Data


def read_rows() -> list[dict[str, Any]]:
    """The rows of the default data, with the answers that an online arm needs."""
    return [json.loads(line) for line in data.DEFAULT_TRAIN.read_text("utf-8").splitlines()]


def tuning_questions(count: int) -> list[data.Question]:
    """Questions of the same kind that neither file of the default data has."""
    taken = {frozenset(arithmetic.EXAMPLE[0].split(", "))}
    for path in (data.DEFAULT_TRAIN, data.DEFAULT_HELDOUT):
        for line in path.read_text("utf-8").splitlines():
            taken.add(frozenset(json.loads(line)["prompt"][-1]["content"].split(", ")))
    draw, questions = random.Random(0), []
    while len(questions) < count:
        numbers = [str(n) for n in draw.sample(range(10, 100), 3)]
        if frozenset(numbers) not in taken:
            taken.add(frozenset(numbers))
            prompt = arithmetic.make_prompt(numbers)
            questions.append(data.Question(prompt, max(numbers, key=int), "drawn"))
    return questions


def sampled_steps(
    policy: nn.Module,
    tokenizer: examples.Tokenizer,
    options: TrainConfig,
    task: dict[str, int],
    prompts: int,
    cost: dict[str, int],
) -> Iterator[list[examples.Batch]]:
    """The batch of each step, sampled when it is asked for from the policy as it then stands: of at
    most so many prompts, so that a policy that is always right or always wrong comes to an end."""
    rows, size = read_rows(), options.per_device_train_batch_size
    pad = tokenizer.tokenizer.pad_token_id
    draws = torch.Generator().manual_seed(options.seed + 1)
    order = torch.Generator().manual_seed(options.seed)
    waiting: list[int] = []
    while True:
        units: list[examples.Unit] = []
        for _ in range(prompts):
            if len(units) >= size:
                break
            waiting = waiting or torch.randperm(len(rows), generator=order).tolist()
            row = rows[waiting.pop()]
            policy.eval()
            [completions] = arithmetic.sample_batch(
                policy, tokenizer.tokenizer, [row["prompt"]], generator=draws, **task
            )
            policy.train()
            cost["sampled"] += len(completions)
            texts = arithmetic.kept_texts(tokenizer.tokenizer, completions)
            row = arithmetic.make_row(row, texts)
            if row is not None:
                example = data.Example(
                    row["prompt"], tuple(row["completions"]), tuple(row["rewards"]), "sampled"
                )
                dataset = data.Dataset("rewards", [example])
                groups, _ = examples.make_units(dataset, tokenizer, options)
                units += [unit for group in groups for unit in group]
        if not units:
            yield []  # nothing to learn from: the step changes nothing
            continue
        batch = examples.collate(units[:size], options.objective, pad)
        if options.objective == "grpo":
            batch = replace(batch, extra=batch.extra | {"old_logps": "policy"})
        yield [batch]


# Runs


def execute(run: Run) -> dict[str, Any]:
    """Train as the arm says, in a worker process; what came of it, as a JSON object."""
    objective, arm, seed, lr = run
    config = read_config(CONFIG)
    options = TrainConfig(
        objective=objective, learning_rate=lr, seed=seed, **ARMS[arm], **config["training"]
    )
    folder = model_folder(options)
    tokenizer = load_tokenizer(folder)
    torch.manual_seed(seed)
    policy = load_model(folder, options, CPU)
    cost, start = {"sampled": 0}, time.process_time()
    if arm == "online":
        task = {name: config["task"][name] for name in ("samples", "max_new_tokens")}
        prompts = config["online"]["prompts"]
        steps = sampled_steps(policy, tokenizer, options, task, prompts, cost)
    else:
        dataset = data.read_examples(data.DEFAULT_TRAIN)
        groups, _ = examples.make_units(dataset, tokenizer, options)
        steps = examples.optimizer_steps(groups, options, tokenizer.tokenizer.pad_token_id)
    unclamped = train(policy, options, steps)
    seconds = time.process_time() - start
    measured = evaluate.answers(questions_of(seed, config), tokenizer, options)(Root(policy))
    return {
        "objective": objective,
        "arm": arm,
        "seed": seed,
        "lr": lr,
        "recipe": recipe(config),
        "accuracy": measured["accuracy"],
        "n": measured["n"],
        "unclamped": round(sum(unclamped) / len(unclamped), 4),
        "cpu_seconds": round(seconds),
        "device": device_name("cpu"),
        "torch": torch.__version__.split("+")[0],
        **cost,
    }


def questions_of(seed: int, config: dict[str, Any]) -> list[data.Question]:
    """Rates are tuned on questions that the results are not measured with."""
    tuning = config["tuning"]
    if seed == tuning["seed"]:
        return tuning_questions(tuning["questions"])
    return data.read_questions(data.DEFAULT_HELDOUT)


def train(policy: nn.Module, options: TrainConfig, steps: Iterator) -> list[float]:
    """Train in place; the unclamped fraction of every step."""
    objective = score.make_objective(options)
    trained = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=options.learning_rate, weight_decay=0.0)
    reference = REFERENCES[options.reference](policy, score.reference_scores, options.sync_every)
    unclamped = []
    for step, (batches, scores) in zip(
        range(options.max_steps), reference.steps(steps), strict=False
    ):
        for batch, of_reference in zip(batches, scores, strict=True):
            loss, stats = score.loss(objective, policy, batch, of_reference, batches)
            loss.backward()
            unclamped.append(float(stats["humanline/unclamped"]))
        nn.utils.clip_grad_norm_(trained, options.max_grad_norm)
        reference.before_step()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(options, step)
        optimizer.step()
        optimizer.zero_grad()
    return unclamped


def run_all(config: dict[str, Any], jobs: int) -> dict[Run, dict[str, Any]]:
    """The results of all runs; those that are missing are added to the file."""
    done = {key(r): r for r in read_results(LINES, config)}
    for runs in (tuning_runs, final_runs):  # whose rates come of the former
        missing = [run for run in runs(config, done) if run not in done]
        with workers(jobs) as pool:
            for result in added(pool, execute, missing, LINES, list(done.values())):
                done[key(result)] = result
    return done


def tuning_runs(config: dict[str, Any], done: dict[Run, dict[str, Any]]) -> list[Run]:
    tuning = config["tuning"]
    choices = product(config["objectives"], ARMS, [tuning["seed"]], tuning["lrs"])
    return list(choices)


def final_runs(config: dict[str, Any], done: dict[Run, dict[str, Any]]) -> list[Run]:
    choices = product(config["objectives"], config["seeds"], ARMS)
    return [(o, arm, seed, best_rate(done, config, o, arm)) for o, seed, arm in choices]


def key(result: dict[str, Any]) -> Run:
    return tuple(result[name] for name in ("objective", "arm", "seed", "lr"))


def best_rate(done: dict, config: dict[str, Any], objective: str, arm: str) -> float:
    """By the rule in the configuration."""
    tuning = config["tuning"]
    return max(
        sorted(tuning["lrs"]),
        key=lambda lr: done[objective, arm, tuning["seed"], lr]["accuracy"],
    )


# The report


def report(done: dict[tuple, dict[str, Any]], config: dict[str, Any]) -> str:
    """PRETRAINED.md."""
    seeds = config["seeds"]
    where = dict.fromkeys(f"{r['device']}, torch {r['torch']}" for r in done.values())
    parts = [
        "# On a pretrained model",
        "Generated by `python -m bench.study.pretrained` from `results/pretrained.jsonl`; the "
        "rules are in `pretrained.json`.",
        f"SmolLM2-135M-Instruct, all weights, {config['training']['max_steps']} steps of 8 "
        f"sequences, {len(seeds)} seeds. {config['rules']['measure'].capitalize()}. ± is half a "
        f"95 % interval over seeds. Run on {'; '.join(where)}: elsewhere rounding differs, "
        "and with it single answers.",
    ]
    for objective in config["objectives"]:
        section = _section(objective, done, config) if _complete(objective, done, config) else None
        parts += [f"## {objective.upper()}", *(section or ["Not run yet."])]
    return "\n\n".join(parts) + "\n"


def _complete(objective: str, done: dict[tuple, dict[str, Any]], config: dict) -> bool:
    runs = len(ARMS) * (len(config["tuning"]["lrs"]) + len(config["seeds"]))
    return sum(name[0] == objective for name in done) >= runs


def _section(objective: str, done: dict[tuple, dict[str, Any]], config: dict) -> list[str]:
    seeds, tuning = config["seeds"], config["tuning"]
    values, rows, rates = {}, [], []
    for arm in ARMS:
        lr = best_rate(done, config, objective, arm)
        runs = [done[objective, arm, seed, lr] for seed in seeds]
        values[arm] = [r["accuracy"] for r in runs]
        at_an_end = lr in (min(tuning["lrs"]), max(tuning["lrs"]))

        def mean(name, runs=runs):
            return sum(r[name] for r in runs) / len(runs)

        rows.append(
            [
                arm,
                f"{lr:g}" + (" (an end of the list)" if at_an_end else ""),
                shown(*interval(values[arm])),
                ", ".join(f"{v:.3f}" for v in values[arm]),
                f"{1 - mean('unclamped'):.1%}",
                f"{mean('sampled'):.0f}",
                f"{mean('cpu_seconds'):.0f} s",
            ]
        )
        tried = [done[objective, arm, tuning["seed"], x]["accuracy"] for x in tuning["lrs"]]
        rates.append([arm, *(f"{x:.3f}" for x in tried)])
    head = ["", "rate", "right", "by seed", "clipped tokens", "sampled", "CPU time"]
    contrasts = []
    for other in ("offline", "online"):
        d = [a - b for a, b in zip(values["humanline"], values[other], strict=True)]
        contrasts.append(f"humanline − {other}: {shown(*interval(d), '+')}")
    return [
        markdown(head, rows),
        f"Paired by seed, {'; '.join(contrasts)}.",
        markdown([f"tuning, seed {tuning['seed']}", *(f"{x:g}" for x in tuning["lrs"])], rates),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=1, help="processes, of one thread each")
    config = read_config(CONFIG)
    done = run_all(config, parser.parse_args().jobs)
    (HERE / REPORT).write_text(report(done, config), encoding="utf-8")


if __name__ == "__main__":
    main()
