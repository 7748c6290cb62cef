"""A training run from its options to its summary."""

import copy
import math
import shlex
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

import humanline as hl
from humanline.idle import IdleBounds
from humanline.reference import REFERENCES, Reference
from humanline.sharding import is_dtensor
from humanline.training import (
    checkpoint,
    curves,
    data,
    effects,
    evaluate,
    examples,
    header,
    report,
    score,
    state,
)
from humanline.training.config import TrainConfig, flag, resumed
from humanline.training.errors import UserError
from humanline.training.launch import is_first, other_engine
from humanline.training.model import (
    check_fits,
    device_of,
    folder_dtype,
    load_model,
    load_tokenizer,
    model_folder,
    moved,
)
from humanline.training.ranks import ALONE, Ranks, Root, joined, no_sync, shard, whole_weights

CONFIG, BEFORE, MODEL, ADAPTER = "config.json", "before.json", "model", "adapter"
TIMED = 3  # the first step is slower; the third says how long the others take


class Interrupted(Exception):
    """Ctrl-C; the run was saved and can be resumed."""


def train(
    options: dict[str, Any],
    output: Path | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    strict: bool = False,
) -> dict[str, Any]:
    """Train, or go on training.

    Args:
        options: fields of :class:`TrainConfig`; those left out take their defaults, or when
            resuming, the values the run was started with.
        output: where to write; ``runs/<objective>-<perception>`` if None.
        resume: go on with the run in ``output``.
        overwrite: replace the run in ``output``.
        strict: whether an option without effect is an error, as it is where users type them.

    Returns:
        What summary.json holds.

    Raises:
        UserError: something about options, data, model, disk or the way the process was launched
            does not allow to go on; or another process of the run did not come.
        Interrupted: the user asked to stop; the run is saved.
    """
    timeout = options.get("ddp_timeout", TrainConfig.ddp_timeout)
    with joined(max(timeout, 1)) as ranks:

        def prepare():
            config, folder = _configure(options, output, resume, ranks)
            if strict:
                effects.require(config, options)
            _check_output(folder, config, resume, overwrite)
            _warn(config)
            return config, folder, pick_device(config, ranks), read_data(config)

        try:
            prepared = ranks.together("reading options and data", prepare)
            return _train(*prepared, resume, overwrite, ranks)
        except OSError as error:
            where = error.filename or f"cannot write into {output or 'runs'}"
            raise UserError(f"{where}: {error.strerror or error}") from error


def _train(
    config: TrainConfig,
    output: Path,
    device: torch.device,
    read: tuple,
    resume: bool,
    overwrite: bool,
    ranks: Ranks,
) -> dict[str, Any]:
    dataset, questions, hashes = read
    ranks.by_the_first("the model being fetched", lambda: model_folder(config))

    def load():
        folder = model_folder(config)
        tokenizer = load_tokenizer(folder)
        work = prepare_data(dataset, questions, tokenizer, config, ranks)
        torch.manual_seed(config.seed)
        policy = load_model(folder, config, torch.device("cpu") if config.fsdp else device)
        check_fits(policy, tokenizer, config)
        return folder, tokenizer, work, policy

    folder, tokenizer, work, policy = ranks.together("loading the model", load)
    if ranks.first:
        units = sum(map(len, work.groups))
        said = header.lines(config, output, folder, policy, device, units, work.measured, ranks)
        print(*said, sep="\n", flush=True)
    root, second = _on_device(policy, config, device)
    # Whatever could fail before, did.
    ranks.by_the_first(
        "making the folder", lambda: _start(output, config, hashes, resume, overwrite, ranks)
    )
    before, seconds = _measure_before(output, work, root, ranks)
    metrics = _loop(config, output, root, second, work, before, seconds, ranks)
    policy.zero_grad(set_to_none=True)
    kept = _round(policy, folder, config)
    after = _measure_after(work, root, before)
    policy.to(kept)
    weights = whole_weights(policy)
    return ranks.by_the_first(
        "writing the model",
        lambda: _finish(config, output, folder, policy, weights, tokenizer, before, after, metrics),
    )


def _on_device(
    policy: nn.Module, config: TrainConfig, device: torch.device
) -> tuple[Root, Root | None]:
    """The policy, and where it is split over ranks, the second model of ``--reference copy``."""
    if not config.fsdp:
        return Root(policy), None
    second = Root(copy.deepcopy(policy)) if config.reference == "copy" else None
    return shard(Root(policy), device), second and shard(second, device)


# Before the first step


def _configure(
    options: dict[str, Any], output: Path | None, resume: bool, ranks: Ranks
) -> tuple[TrainConfig, Path]:
    if not resume or output is None:
        config = TrainConfig(**options)
        output = output or Path("runs") / f"{config.objective}-{config.perception}"
    if resume:
        stored = _stored(output)
        if stored is None:
            raise UserError(f"there is no run to resume in {output}")
        if (output / report.SUMMARY).exists():
            raise UserError(f"the run in {output} is finished; there is nothing to resume")
        started = stored.get("processes", 1)
        if started != ranks.count:
            raise UserError(
                f"--resume continues the same run, which was started in {started} processes, not "
                f"in {ranks.count}: torchrun --nproc-per-node {started} -m humanline train …"
            )
        config = resumed(stored["options"], options)
        done = checkpoint.last_step(output)
        if done > config.max_steps:
            raise UserError(f"--max-steps {config.max_steps}, but {done} steps are already done")
    _check_launch(config, ranks)
    score.make_objective(config)  # refuses what it does not know
    return config, output


def _check_launch(config: TrainConfig, ranks: Ranks) -> None:
    if config.fsdp and ranks.count == 1:
        raise UserError(
            "--fsdp has no effect: it splits the model over processes, and this run has one; start "
            "several with torchrun --nproc-per-node N -m humanline train"
        )
    engine = other_engine()
    if engine and not (engine == "FSDP" and config.fsdp):
        raise UserError(
            f"accelerate's configuration asks for {engine}, and humanline train knows "
            "DistributedDataParallel and, with --fsdp, FSDP2: configure accelerate for several "
            "processes without it"
        )
    if ranks.count > 1 and config.loss_type in ("aot", "aot_unpaired"):
        raise UserError(
            f"--loss-type {config.loss_type} sorts the pairs of a whole batch, which lie on "
            f"{ranks.count} processes: start it in one"
        )


def _warn(config: TrainConfig) -> None:
    if config.dtype == "bfloat16" and not config.lora:
        _warning(
            "with bfloat16 weights, most updates of the size of "
            f"--learning-rate {config.learning_rate} round away; use --bf16"
        )
    if config.loss_type == "sft" and config.perception != "none":
        _warning(
            f"--perception {config.perception} does nothing: --loss-type sft has no reference, and "
            "none of its tokens a log-ratio"
        )


def _warning(text: str) -> None:
    _say(f"warning: {text}")


def _say(text: str) -> None:
    if is_first():
        print(f"humanline: {text}", file=sys.stderr)


def _aside(bar: tqdm, text: str) -> None:
    """Said above a bar; which is drawn again, wherever it goes."""
    with bar.external_write_mode(sys.stderr):
        _say(text)


def _stored(output: Path) -> dict[str, Any] | None:
    """What a run's config.json holds; None if it is not there, or not a run's."""
    stored = report.read_json(output / CONFIG)
    parts = [stored.get(name) for name in ("options", "sha256")] if stored else [None]
    return stored if all(isinstance(part, dict) for part in parts) else None


def _check_output(output: Path, config: TrainConfig, resume: bool, overwrite: bool) -> None:
    if resume or not output.exists():
        return
    if not output.is_dir():
        raise UserError(f"{output} is a file; --output-dir must be a folder")
    if not any(output.iterdir()):
        return
    if not overwrite:
        raise UserError(
            f"{output} is not empty: pass --resume to go on with its run, --overwrite to replace "
            "it, or another --output-dir"
        )
    if _stored(output) is None:
        raise UserError(f"{output} holds something else than a run: it will not be overwritten")
    for name in ("model", "data", "heldout"):
        path = getattr(config, name)
        if path is not None and Path(path).resolve().is_relative_to(output.resolve()):
            raise UserError(f"{flag(name)} {path} is in {output}: --overwrite would remove it")


def _start(
    output: Path,
    config: TrainConfig,
    hashes: dict[str, str],
    resume: bool,
    overwrite: bool,
    ranks: Ranks,
) -> None:
    """Make the output folder, or check that it holds the same run on the same data."""
    if resume:
        stored = (_stored(output) or {"sha256": {}})["sha256"]
        changed = [name for name in hashes if stored.get(name) != hashes[name]]
        if changed:
            raise UserError(
                f"--resume continues the same run, but the contents of {', '.join(changed)} differ"
            )
        checkpoint.remove_partial(output)
        shutil.rmtree(output / (ADAPTER if config.lora else MODEL), ignore_errors=True)
    elif overwrite:
        _remove_run(output)
    output.mkdir(parents=True, exist_ok=True)
    stored = {"options": config.as_dict(), "sha256": hashes, "processes": ranks.count}
    report.write_json(output / CONFIG, stored)


def _remove_run(output: Path) -> None:
    """Remove what a run writes and nothing else; last what tells that it is a run."""
    written = [*output.glob(f"{checkpoint.PREFIX}*"), *output.glob(f".{checkpoint.PREFIX}*")]
    names = (MODEL, ADAPTER, report.METRICS, report.CURVES, report.SUMMARY, BEFORE, CONFIG)
    for path in [*written, *(output / name for name in names)]:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def pick_device(config: TrainConfig, ranks: Ranks) -> torch.device:
    """The device asked for, or the best there is; of several GPUs each rank has its own.

    Raises:
        UserError: it is not there, or one GPU was asked for by several ranks.
    """
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if ranks.count > 1 and device.type == "cuda":
            if device.index is not None:
                raise UserError(
                    f"--device {name} is one GPU, and each of {ranks.count} processes takes its "
                    "own: pass --device cuda, or leave it out"
                )
            device = torch.device("cuda", ranks.local)
            torch.cuda.set_device(device)
        torch.empty(0, device=device)
    except UserError:
        raise
    except Exception as error:  # torch raises AssertionError, RuntimeError, NotImplementedError …
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"--device {config.device} is not there: {reason}") from error
    return device


def read_data(config: TrainConfig):
    """Training data, held-out questions (or None), and the hashes of their files."""
    path = Path(config.data) if config.data else data.DEFAULT_TRAIN
    heldout = Path(config.heldout) if config.heldout else None
    if config.data is None and config.heldout is None:
        heldout = data.DEFAULT_HELDOUT
    dataset = data.read_examples(path)
    if config.reward_threshold is not None and dataset.kind != "rewards":
        raise UserError(
            f"--reward-threshold {config.reward_threshold:g} has no effect: it needs data with "
            f"rewards, and {path} holds {dataset.kind}"
        )
    questions = None if heldout is None else data.read_questions(heldout)
    files = {"data": path, "heldout": heldout}
    return dataset, questions, {n: data.fingerprint(p) for n, p in files.items() if p is not None}


@dataclass(frozen=True)
class Work:
    """What there is to do.

    Attributes:
        groups: units to train on.
        pad: the token that fills batches up.
        measure: how to measure the model; None: not at all.
        measured: what is measured, in words.
        since_start: pairs to watch while it trains; None: there are none.
    """

    groups: list[list[examples.Unit]]
    pad: int
    measure: evaluate.Measure | None = None
    measured: str | None = None
    since_start: evaluate.SinceStart | None = None


def prepare_data(dataset, questions, tokenizer, config, ranks=ALONE) -> Work:
    pad = tokenizer.tokenizer.pad_token_id
    rows = len(dataset.examples) + len(dataset.skipped)
    measure, measured, heldout_pairs = None, None, []
    if config.eval_limit == 0:
        pass
    elif questions is not None:
        questions = questions[: config.eval_limit]
        measure = evaluate.answers(questions, tokenizer, config, ranks)
        measured = f"{len(questions)} questions"
    elif config.heldout_fraction > 0:
        kept, heldout = examples.split(dataset, config.heldout_fraction, config.seed)
        heldout_pairs = examples.heldout_pairs(heldout, tokenizer, config)[: config.eval_limit]
        if heldout_pairs:
            dataset, measure = kept, evaluate.preferences(heldout_pairs, pad, config, ranks)
            measured = f"{len(heldout_pairs)} pairs"
        else:
            _say("There are too few data to hold any pair out.")
    groups, warnings = examples.make_units(dataset, tokenizer, config)
    left_out = examples.check_skipped(dataset.skipped, rows, config)
    for warning in [*([left_out] if left_out else []), *warnings]:
        _warning(warning)
    if config.objective == "kto" and len({u.value for group in groups for u in group}) == 1:
        _warning("all labels are the same: there is nothing to contrast")
    pairs = heldout_pairs or examples.contrasts(groups)
    of = "held-out" if heldout_pairs else "training"
    watched = evaluate.SinceStart(pairs, of, pad, config, ranks) if measure and pairs else None
    return Work(groups, pad, measure, measured, watched)


def _measure_before(
    output: Path, work: Work, root: Root, ranks: Ranks
) -> tuple[dict[str, Any] | None, float]:
    """What the model is worth, measured now or when the run began; and how long it took now."""
    path, begun, seconds = output / BEFORE, time.perf_counter(), 0.0
    if work.measure is None:
        return None, 0.0
    if not ranks.gather("looking for what was measured", path.exists())[0]:
        before = work.measure(root, None)
        if work.since_start:
            before["since_start"] = work.since_start.start(root)
        seconds = time.perf_counter() - begun
        ranks.by_the_first("writing what was measured", lambda: report.write_json(path, before))

    def read():
        before = report.read_json(path)
        if before is None or not {"measured", "accuracy"} <= before.keys():
            raise UserError(f"{path} is not what a run writes; remove it to measure again")
        _say(f"Before training: {report.share(before)} ({before['measured']}, n = {before['n']}).")
        return before

    what = "reading what was measured"
    return ranks.gather(what, ranks.by_the_first(what, read))[0], seconds


def _measure_after(work: Work, root: Root, before: dict[str, Any] | None) -> dict[str, Any] | None:
    if work.measure is None:
        return None
    after = work.measure(root, before)
    start = (before or {}).get("since_start")
    if work.since_start and start:
        found, pairs = work.since_start.now(root, start), len(work.since_start.pairs)
        after["since_start"] = {
            "pairs": pairs,
            "of": start["of"],
            "preferred": round(found["since_start/accuracies"] * pairs),
            "margin": found["since_start/margins"],
        }
    return after


def _round(policy: nn.Module, folder: Path, config: TrainConfig) -> torch.dtype:
    """Round the weights to the dtype they are saved in, so that it is that model which is measured:
    that of the model's folder where it is narrower than the one that was trained in."""
    trained = getattr(torch, config.dtype)
    kept = folder_dtype(folder)
    if config.lora or kept is None or kept.itemsize >= trained.itemsize:
        return trained
    with torch.no_grad():
        for p in policy.parameters():
            p.copy_(p.to(kept))
    return kept


# The loop


def _loop(
    config: TrainConfig,
    output: Path,
    root: Root,
    second: Root | None,
    work: Work,
    before: dict[str, Any] | None,
    measuring: float,
    ranks: Ranks,
) -> list[dict[str, Any]]:
    """Train from the last checkpoint, or from the start; the metrics of all steps.

    ``before`` was measured in so many seconds, ``measuring``; 0: it was there.
    """
    device = device_of(root)
    torch.manual_seed(config.seed + ranks.rank)  # whatever was measured before, or not
    objective = score.make_objective(config)
    loss = _loss(objective, root, config, ranks)
    trained = [p for p in root.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.learning_rate, weight_decay=0.0, fused=True)
    reference = _reference(config, root, second, ranks)
    stored = ranks.together(
        "loading the checkpoint", lambda: checkpoint.load_latest(output, device, ranks.rank)
    )
    if stored and "optimizer" not in stored:
        _warning("the checkpoint was made with --save-optimizer never: Adam's moments begin anew")
    first = state.put_back(stored, root.model, optimizer, reference)
    path = output / report.METRICS if ranks.first else None
    metrics = ranks.together("opening the metrics", lambda: report.Metrics(path, first))
    idle = IdleBounds(objective.perception)
    for row in metrics.rows:  # of a run that is resumed, the first steps are those
        _watch(idle, row)

    def save(done: int) -> None:
        metrics.flush()
        kept = optimizer if config.save_optimizer == "always" else None
        taken = state.taken(done, root.model, kept, reference, ranks)
        checkpoint.save(output, done, taken, ranks)

    on_device = (
        [moved(batch, device) for batch in batches]
        for batches in examples.optimizer_steps(work.groups, config, work.pad, first, ranks)
    )
    start = (before or {}).get("since_start")
    progress = report.counting(config.max_steps, "training", first, "step")
    with stop_requests() as stop, progress as bar:
        begun = time.perf_counter()
        for step, (batches, scores) in enumerate(reference.steps(on_device), first):
            row, tokens = _gradients(loss, batches, scores, step, ranks)
            row["grad_norm"] = _clip_gradients(trained, config.max_grad_norm)
            _require_finite(step, row)
            reference.before_step()
            for group in optimizer.param_groups:
                group["lr"] = row["learning_rate"] = learning_rate(config, step)
            optimizer.step()
            optimizer.zero_grad()

            now = time.perf_counter()
            timing = {
                "seconds": now - begun,
                "tokens_per_second": tokens / (now - begun),
                "peak_memory_bytes": report.peak_memory_bytes(device),
                "reference_bytes": reference.memory_bytes(),
            }
            done = step + 1
            if work.since_start and start and evaluate.is_due(done):
                row |= work.since_start.now(root, start)
            metrics.write({"step": step, **row, "timing": timing})
            report.show(bar, metrics.rows[-1])
            left = config.max_steps - done
            if found := _watch(idle, row):
                _aside(bar, f"warning: {found}")
            if left and done == first + TIMED:
                _aside(bar, report.time_left(left, timing["seconds"], measuring))
            stopping = any(ranks.gather(f"the end of step {step}", stop()))
            if not left or stopping or (config.save_steps and done % config.save_steps == 0):
                save(done)
            if stopping and left:
                raise Interrupted(
                    f"stopped and saved after {done} of {config.max_steps} steps; go on with: "
                    f"humanline train --output-dir {shlex.quote(str(output))} --resume"
                )
            begun = time.perf_counter()  # saving is not training
    return metrics.rows


def _loss(
    objective: hl.Objective, root: Root, config: TrainConfig, ranks: Ranks
) -> Callable[..., tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    """The loss of a micro-batch, given the reference's scores and the step's micro-batches, and its
    statistics. Its backward is the same on all ranks once the last micro-batch's is done."""
    wrapped, how = ranks.wrapped(root), (config.bf16, config.gradient_tolerance, ranks)

    def of_model(model, *batch):
        return score.loss(objective, model, *batch, *how)

    def loss(batch, scores, batches):
        if config.fsdp:
            ranks.gather("the loss of a batch")  # whose forward waits for all ranks
        with nullcontext() if batch is batches[-1] else no_sync(wrapped):
            return wrapped(of_model, batch, scores, batches)

    return loss


def _reference(config: TrainConfig, root: Root, second: Root | None, ranks: Ranks) -> Reference:
    def scores(model: Root, batch: examples.Batch) -> dict[str, torch.Tensor]:
        if config.fsdp:
            ranks.gather("the reference's scores of a batch")
        return model(score.reference_scores, batch, config.bf16)

    given = {} if second is None else {"model": second}
    return REFERENCES[config.reference](root, scores, config.sync_every, **given)


def _gradients(
    loss: Callable,
    batches: list[examples.Batch],
    scores: list[dict[str, torch.Tensor]],
    step: int,
    ranks: Ranks,
) -> tuple[dict[str, Any], int]:
    """Backward through all micro-batches; of all ranks the step's statistics and its tokens."""
    rows = []
    for batch, of_reference in zip(batches, scores, strict=True):
        value, stats = loss(batch, of_reference, batches)
        ranks.gather(f"the gradients of step {step}")  # the backward waits for all ranks
        value.backward()
        row = {"loss": value.detach() / ranks.count} | stats
        rows.append(row | {"humanline/rows": batch.completions.written.sum()})
    rows = [{name: float(value) for name, value in row.items()} for row in rows]
    tokens = sum(batch.tokens() for batch in batches)
    told = ranks.gather(f"the statistics of step {step}", (rows, tokens))
    merged = report.merge([row for rows, _ in told for row in rows])
    return merged, sum(tokens for _, tokens in told)


def _clip_gradients(trained: list[nn.Parameter], max_norm: float) -> float:
    """Clip to a norm over all weights; what the norm was."""
    norm = nn.utils.clip_grad_norm_(trained, max_norm)
    return float(norm.full_tensor() if is_dtensor(norm) else norm)


def _watch(idle: IdleBounds, row: dict[str, Any]) -> str | None:
    """What to warn of once a step has these metrics."""
    tokens = row["humanline/rows"]
    idle.saw(row.get("humanline/unclamped", 1.0) * tokens, tokens)
    return idle.stepped()


def learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up, then constant."""
    return config.learning_rate * min(1.0, (step + 1) / max(config.warmup_steps, 1))


def _require_finite(step: int, row: dict[str, Any]) -> None:
    if not (math.isfinite(row.get("loss", math.nan)) and math.isfinite(row["grad_norm"])):
        raise UserError(
            f"the loss or its gradient is not finite at step {step} (loss {row.get('loss')}, "
            f"gradient norm {row['grad_norm']}); a smaller --learning-rate may help"
        )


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Ctrl-C asks to stop after the step; a second one stops at once."""
    asked: list[int] = []

    def on_signal(number, frame):
        if asked:
            raise KeyboardInterrupt
        asked.append(number)
        if is_first():
            print("\nhumanline: This step is finished, then the run is saved.", file=sys.stderr)

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    previous = signal.signal(signal.SIGINT, on_signal)
    try:
        yield lambda: bool(asked)
    finally:
        signal.signal(signal.SIGINT, previous)


# After the last step


def _finish(
    config, output, folder, policy, weights, tokenizer, before, after, metrics
) -> dict[str, Any]:
    final = output / (ADAPTER if config.lora else MODEL)
    with checkpoint.atomic_folder(final) as partial_folder:
        policy.save_pretrained(partial_folder, state_dict=weights)
        tokenizer.tokenizer.save_pretrained(partial_folder)
    curves.draw(output / report.CURVES, config, metrics, before, after)
    summary = {
        "before": _without_logps(before),
        "after": _without_logps(after),
        "steps": len(metrics),
        "seconds_training": round(sum(row["timing"]["seconds"] for row in metrics), 1),
        "peak_memory_bytes": max(row["timing"]["peak_memory_bytes"] for row in metrics),
        "reference_bytes": max(row["timing"]["reference_bytes"] for row in metrics),
        "base_model": str(folder),
        "trained": str(final),
        "options": config.as_dict(),
        "versions": report.versions(),
    }
    report.write_json(output / report.SUMMARY, summary)
    checkpoint.remove_all(output)
    print(report.describe(before, after))
    print(
        f"Memory was {report.size(summary['peak_memory_bytes'])} at its peak, of which the "
        f"reference ({config.reference}) held {report.size(summary['reference_bytes'])}."
    )
    dtype = str(next(policy.parameters()).dtype).removeprefix("torch.")
    print(f"The trained {'adapter' if config.lora else 'model'}, in {dtype}, is in {final}.")
    print(f"{report.METRICS}, {report.CURVES} and {report.SUMMARY} are in {output}.")
    return summary


def _without_logps(result: dict[str, Any] | None) -> dict[str, Any] | None:
    """Those of single pairs have their place in before.json."""
    if result is None:
        return None
    return {
        name: value
        for name, value in result.items()
        if name != "logps" and not (isinstance(value, dict) and "logps" in value)
    }
