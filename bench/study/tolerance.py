"""Does training notice what is left out? `humanline train` with δ = 0 and with a tolerance.

    python -m bench.study.tolerance [--jobs N]    results/tolerance.jsonl

DPO and GRPO, all weights and LoRA. Every run is a line, written as it ends: after an interruption
the same command goes on with the runs that are missing. All runs of a seed come before those of the
next, hence what there is compares like with like. A process uses one thread, and about 4 GB of
memory and for a moment 1 GB of disk (estimates). Rules are in tolerance.json;
``python -m bench.study.tolerance_report`` writes the report.
"""

import argparse
import functools
import io
import os
import statistics
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from itertools import product, takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from bench.environment import device_name
from bench.study.run import HERE, RESULTS, WORLDS, added, read_config, read_results, recipe, workers
from humanline.conversation import Tokens
from humanline.training import data, examples
from humanline.training.config import TrainConfig
from humanline.training.model import load_tokenizer, model_folder, parts
from humanline.training.report import METRICS, read_metrics
from humanline.training.run import train

CONFIG, LINES = HERE / "tolerance.json", RESULTS / "tolerance.jsonl"
FULL = "all weights"
NAMES = ("objective", "weights", "tolerance", "seed")
MEASURED_AT_ONCE = 24  # questions

Run = tuple[str, str, float, int]  # by NAMES


def runs(config: dict[str, Any]) -> list[list[Run]]:
    """All of them, a list a seed and stage: of a seed first those at δ = 0, with which the heads of
    the others are compared."""
    exact, *others = config["tolerances"]
    stages = []
    for seed, some in product(config["seeds"], ([exact], others)):
        choices = product(some, config["training"]["weights"], config["objectives"])
        stages.append([(o, weights, tolerance, seed) for tolerance, weights, o in choices])
    return stages


def options(run: Run, config: dict[str, Any]) -> dict[str, Any]:
    """What humanline train is given."""
    objective, weights, tolerance, seed = run
    training = config["training"]
    own = {"objective": objective, "gradient_tolerance": tolerance, "seed": seed}
    return own | training["options"] | training["weights"][weights]


# A run


def execute(run: Run) -> dict[str, Any]:
    """One run of humanline train, in a worker process; what came of it, as a JSON object."""
    config = read_config(CONFIG)
    with tempfile.TemporaryDirectory() as folder:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            summary = train(options(run, config), Path(folder))
        metrics = read_metrics(Path(folder) / METRICS)
        policy = load(summary["trained"])
        result = dict(zip(NAMES, run, strict=True)) | {
            "recipe": recipe(config),
            "device": device_name("cpu"),
            "torch": torch.__version__.split("+")[0],
            "seconds_training": summary["seconds_training"],
            "before": worth_before(),
            "after": worth(policy),
            "loss": [round(row["loss"], 6) for row in metrics],
            "grad_norm": [round(row["grad_norm"], 4) for row in metrics],
        }
        _, weights, tolerance, _ = run
        if tolerance:
            kept = statistics.mean(row["humanline/kept_columns"] for row in metrics)
            result["kept_columns"] = round(kept, 4)
        if weights == FULL:
            result["head"] = rows_moved(policy, run, config)
    return result


def load(folder: Path | str) -> nn.Module:
    """A model, or an adapter on the model that it names."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@functools.cache
def base() -> nn.Module:
    """The model that every run begins with, once a process."""
    return load(model_folder(TrainConfig()))


@functools.cache
def worth_before() -> dict[str, float]:
    return worth(base())


@torch.no_grad()
def worth(policy: nn.Module) -> dict[str, float]:
    """Of the held-out questions: the mean probability of the right answer, ended (Pass@1 at
    temperature 1, exact: there is one answer), and the share that greedy decoding gives."""
    tokenizer = load_tokenizer(model_folder(TrainConfig()))
    answers, pad = right_answers(tokenizer), tokenizer.tokenizer.pad_token_id
    model, sampled, greedy = parts(policy), [], []
    for start in range(0, len(answers), MEASURED_AT_ONCE):
        batch = examples.make_batch(answers[start : start + MEASURED_AT_ONCE], pad)
        ids, written = batch.completions.ids, batch.completions.written
        hidden = model.rows(model.read_prompts(batch), batch.completions)["hidden"]
        scores = model.logits(hidden[written]).log_softmax(1)
        logps = scores.gather(1, ids[written][:, None])
        sampled.append(torch.zeros(ids.shape).masked_scatter_(written, logps).sum(1).exp())
        wrong = scores.argmax(1) != ids[written]
        greedy.append(~written.masked_scatter(written, wrong).any(1))
    shares = {"pass@1": torch.cat(sampled), "greedy": torch.cat(greedy)}
    return {name: round(share.double().mean().item(), 5) for name, share in shares.items()}


def right_answers(tokenizer: examples.Tokenizer) -> list[Tokens]:
    """Right answers to the held-out questions. How all of these begin is the prompt, so that it is
    read once a batch."""
    rows = [
        data.Example(q.prompt, ([{"role": "assistant", "content": q.answer}],), (1.0,), q.where)
        for q in data.read_questions(data.DEFAULT_HELDOUT)
    ]
    found = tokenizer.sequences([(row, 0) for row in rows])
    together = zip(*(tokens.prompt for tokens in found), strict=False)
    shared = [ids[0] for ids in takewhile(lambda ids: len(set(ids)) == 1, together)]
    asked = [tokens.prompt[len(shared) :] for tokens in found]
    return [
        Tokens(shared, a + t.completion, [False] * len(a) + [True] * len(t.completion))
        for a, t in zip(asked, found, strict=True)
    ]


# The head's rows


def rows_moved(policy: nn.Module, run: Run, config: dict[str, Any]) -> dict[str, Any]:
    """How far the rows of the head went, those of tokens that the run has read or was to write, and
    the others, which nothing but the softmax's denominator moves."""
    objective, _, tolerance, seed = run
    change = weight_of(policy) - weight_of(base())
    path = WORLDS / f"tolerance-{recipe(config)}-{objective}-{seed}.pt"
    if not tolerance:
        write(change, path)
    elif not path.exists():  # it was run elsewhere
        execute((objective, FULL, 0, seed))
    exact = torch.load(path) if tolerance else change
    own = tokens(TrainConfig(**options(run, config)), len(change))
    some = {"own": own, "others": ~own}
    return {name: moved(change[rows], exact[rows]) for name, rows in some.items()}


def weight_of(model: nn.Module) -> Tensor:
    return model.get_output_embeddings().weight.detach()


def write(change: Tensor, path: Path) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")
    torch.save(change, partial)
    partial.rename(path)


def tokens(options: TrainConfig, vocab: int) -> Tensor:
    """Bool ``[V]``: which tokens are in the batches of a run."""
    tokenizer = load_tokenizer(model_folder(options))
    groups, _ = examples.make_units(data.read_examples(data.DEFAULT_TRAIN), tokenizer, options)
    found = torch.zeros(vocab, dtype=torch.bool)
    for [batch] in examples.optimizer_steps(groups, options, tokenizer.tokenizer.pad_token_id):
        found[batch.prompt_ids[batch.prompt_mask]] = True
        found[batch.completions.ids[batch.completions.mask]] = True
    return found


def moved(change: Tensor, exact: Tensor) -> dict[str, float]:
    """Of the change ``[R, H]`` of rows: how many there are, how many of them moved, its norm, and
    its cosine with the ``exact`` one."""
    norm, norm_exact = change.double().norm(), exact.double().norm()
    cosine = (change.double() * exact.double()).sum() / (norm * norm_exact)
    return {
        "rows": len(change),
        "moved": int(change.any(1).sum()),
        "norm": float(f"{norm.item():.4g}"),
        "cosine": round(cosine.item(), 4),
    }


# The study


def key(result: dict[str, Any]) -> Run:
    return tuple(result[name] for name in NAMES)


def run_all(config: dict[str, Any], jobs: int) -> None:
    """All runs that the file does not hold, added to it."""
    with workers(jobs) as pool:
        for stage in runs(config):
            done = read_results(LINES, config)
            missing = [run for run in stage if run not in map(key, done)]
            for _ in added(pool, execute, missing, LINES, done):
                pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=1, help="processes, of one thread each")
    run_all(read_config(CONFIG), parser.parse_args().jobs)


if __name__ == "__main__":
    main()
