"""A training run from its options to its summary."""

import math
import os
import shlex
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from humanline.idle import IdleBounds
from humanline.reference import REFERENCES
from humanline.training import checkpoint, data, effects, evaluate, examples, report, score
from humanline.training.config import TrainConfig, flag, resumed
from humanline.training.errors import UserError
from humanline.training.model import check_fits, load_model, load_tokenizer, model_folder, moved

CONFIG, BEFORE, MODEL, ADAPTER = "config.json", "before.json", "model", "adapter"


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
            does not allow to go on.
        Interrupted: the user asked to stop; the run is saved.
    """
    _require_one_process()
    try:
        config, output = _configure(options, output, resume)
        if strict:
            effects.require(config, options)
        _check_output(output, config, resume, overwrite)
        _warn(config)
        device = pick_device(config)
        objective = score.make_objective(config)
        dataset, questions, hashes = _read_data(config)
        folder = model_folder(config)
        tokenizer = load_tokenizer(folder)
        groups, measure = _prepare(dataset, questions, tokenizer, config)
        torch.manual_seed(config.seed)
        policy = load_model(folder, config, device)
        check_fits(policy, tokenizer, config)
        _start(output, config, hashes, resume, overwrite)  # whatever could fail before, did
        before = _measure_before(output, measure, policy)
        pad = tokenizer.tokenizer.pad_token_id
        metrics = _loop(config, output, objective, policy, groups, pad)
        return _finish(config, output, folder, policy, tokenizer, measure, before, metrics)
    except OSError as error:
        where = error.filename or f"cannot write into {output}"
        raise UserError(f"{where}: {error.strerror or error}") from error


# Before the first step


def _require_one_process() -> None:
    """Each of several processes would train the whole run by itself, into the same folder."""
    count = os.environ.get("WORLD_SIZE", "1")
    if count != "1":
        raise UserError(
            f"humanline train works in one process, and was launched as one of {count} "
            "(WORLD_SIZE): start it without torchrun or accelerate launch, or use the TRL trainers "
            "of humanline.integrations.trl, which work under DDP"
        )


def _configure(
    options: dict[str, Any], output: Path | None, resume: bool
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
        config = resumed(stored["options"], options)
        done = checkpoint.last_step(output)
        if done > config.max_steps:
            raise UserError(f"--max-steps {config.max_steps}, but {done} steps are already done")
    return config, output


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
    print(f"humanline: warning: {text}", file=sys.stderr)


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
    output: Path, config: TrainConfig, hashes: dict[str, str], resume: bool, overwrite: bool
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
    report.write_json(output / CONFIG, {"options": config.as_dict(), "sha256": hashes})


def _remove_run(output: Path) -> None:
    """Remove what a run writes and nothing else; last what tells that it is a run."""
    written = [*output.glob(f"{checkpoint.PREFIX}*"), *output.glob(f".{checkpoint.PREFIX}*")]
    names = (MODEL, ADAPTER, report.METRICS, report.CURVES, report.SUMMARY, BEFORE, CONFIG)
    for path in [*written, *(output / name for name in names)]:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def pick_device(config: TrainConfig) -> torch.device:
    """The device asked for, or the best there is.

    Raises:
        UserError: it is not there.
    """
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(config.device)
        torch.empty(0, device=device)
    except Exception as error:  # torch raises AssertionError, RuntimeError, NotImplementedError …
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"--device {config.device} is not there: {reason}") from error
    return device


def _read_data(config: TrainConfig):
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


def _prepare(dataset, questions, tokenizer, config):
    """Units to train on, and how to measure (None: not at all)."""
    pad = tokenizer.tokenizer.pad_token_id
    rows = len(dataset.examples) + len(dataset.skipped)
    measure = None
    if config.eval_limit == 0:
        pass
    elif questions is not None:
        measure = evaluate.answers(questions[: config.eval_limit], tokenizer, config)
    elif config.heldout_fraction > 0:
        kept, heldout = examples.split(dataset, config.heldout_fraction, config.seed)
        pairs = examples.heldout_pairs(heldout, tokenizer, config)[: config.eval_limit]
        if pairs:
            dataset, measure = kept, evaluate.preferences(pairs, pad, config)
        else:
            print("humanline: too little data to hold any pair out", file=sys.stderr)
    groups, warnings = examples.make_units(dataset, tokenizer, config)
    left_out = examples.check_skipped(dataset.skipped, rows, config)
    for warning in [*([left_out] if left_out else []), *warnings]:
        _warning(warning)
    if config.objective == "kto" and len({u.value for group in groups for u in group}) == 1:
        _warning("all labels are the same: nothing to contrast")
    return groups, measure


def _measure_before(output: Path, measure: evaluate.Measure | None, policy: nn.Module):
    path = output / BEFORE
    if measure is None:
        return None
    if not path.exists():
        report.write_json(path, measure(policy, None))
    before = report.read_json(path)
    if before is None or not {"measured", "accuracy"} <= before.keys():
        raise UserError(f"{path} is not what a run writes; remove it to measure again")
    return before


# The loop


def _loop(
    config: TrainConfig,
    output: Path,
    objective,
    policy: nn.Module,
    groups: list[list[examples.Unit]],
    pad: int,
) -> list[dict[str, Any]]:
    """Train from the last checkpoint, or from the start; the metrics of all steps."""
    device = next(policy.parameters()).device
    torch.manual_seed(config.seed)  # whatever was measured before, or not
    trained = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.learning_rate, weight_decay=0.0, fused=True)
    scorer = partial(score.reference_scores, bf16=config.bf16)
    reference = REFERENCES[config.reference](policy, scorer, config.sync_every)
    first = _restore(checkpoint.load_latest(output, device), policy, optimizer, reference)
    metrics = report.Metrics(output / report.METRICS, first)
    idle = IdleBounds(objective.perception)
    for row in metrics.rows:  # of a run that is resumed, the first steps are those
        _watch(idle, row)

    def save(done: int) -> None:
        metrics.flush()
        checkpoint.save(output, done, _state(done, policy, optimizer, reference))

    on_device = (
        [moved(batch, device) for batch in batches]
        for batches in examples.optimizer_steps(groups, config, pad, first)
    )
    with stop_requests() as stop, report.progress(first, config.max_steps) as bar:
        begun = time.perf_counter()
        for step, (batches, scores) in enumerate(reference.steps(on_device), first):
            row = _gradients(objective, policy, batches, scores, config)
            row["grad_norm"] = float(nn.utils.clip_grad_norm_(trained, config.max_grad_norm))
            _require_finite(step, row)
            reference.before_step()
            for group in optimizer.param_groups:
                group["lr"] = row["learning_rate"] = learning_rate(config, step)
            optimizer.step()
            optimizer.zero_grad()

            now = time.perf_counter()
            timing = {
                "seconds": now - begun,
                "tokens_per_second": sum(b.tokens() for b in batches) / (now - begun),
                "peak_memory_bytes": report.peak_memory_bytes(device),
                "reference_bytes": reference.memory_bytes(),
            }
            metrics.write({"step": step, **row, "timing": timing})
            report.show(bar, metrics.rows[-1])
            if found := _watch(idle, row):
                with bar.external_write_mode(sys.stderr):
                    _warning(found)
            done = step + 1
            last = done == config.max_steps
            if last or stop() or (config.save_steps and done % config.save_steps == 0):
                save(done)
            if stop() and not last:
                raise Interrupted(
                    f"stopped and saved after {done} of {config.max_steps} steps; go on with: "
                    f"humanline train --output-dir {shlex.quote(str(output))} --resume"
                )
            begun = time.perf_counter()  # saving is not training
    return metrics.rows


def _gradients(objective, policy, batches, scores, config) -> dict[str, Any]:
    """Backward through all micro-batches; the step's statistics."""
    rows, how = [], (config.bf16, config.gradient_tolerance)
    for batch, of_reference in zip(batches, scores, strict=True):
        loss, stats = score.loss(objective, policy, batch, of_reference, batches, *how)
        loss.backward()
        rows.append(
            {"loss": loss.detach()} | stats | {"humanline/rows": batch.completions.written.sum()}
        )
    return report.merge([{name: float(value) for name, value in row.items()} for row in rows])


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
        print("\nhumanline: finishing this step, then saving", file=sys.stderr)

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    previous = signal.signal(signal.SIGINT, on_signal)
    try:
        yield lambda: bool(asked)
    finally:
        signal.signal(signal.SIGINT, previous)


# Checkpoints


def _state(step: int, policy, optimizer, reference) -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {
        "step": step,
        "policy": _changing(policy),
        "optimizer": optimizer.state_dict(),
        "reference": reference.state_dict(),
        "rng": {"cpu": torch.get_rng_state(), "cuda": cuda},
    }


def _restore(state: dict[str, Any] | None, policy, optimizer, reference) -> int:
    """Put a state back; the number of steps already done."""
    if state is None:
        return 0
    with torch.no_grad():
        for name, tensor in _changing(policy).items():
            tensor.copy_(state["policy"][name])
    optimizer.load_state_dict(state["optimizer"])
    reference.load_state_dict(state["reference"])
    torch.set_rng_state(state["rng"]["cpu"].cpu())
    if state["rng"]["cuda"]:
        torch.cuda.set_rng_state_all([s.cpu() for s in state["rng"]["cuda"]])
    return state["step"]


def _changing(model: nn.Module) -> dict[str, torch.Tensor]:
    """What training changes: weights that are not frozen, and buffers."""
    trained = {name: p.data for name, p in model.named_parameters() if p.requires_grad}
    return trained | dict(model.named_buffers())


# After the last step


def _finish(config, output, folder, policy, tokenizer, measure, before, metrics) -> dict[str, Any]:
    policy.zero_grad(set_to_none=True)
    after = None if measure is None else measure(policy, before)
    final = output / (ADAPTER if config.lora else MODEL)
    with checkpoint.atomic_folder(final) as partial_folder:
        policy.save_pretrained(partial_folder)
        tokenizer.tokenizer.save_pretrained(partial_folder)
    title = f"{config.objective}, perception {config.perception}, sync every {config.sync_every}"
    if after is not None:
        title += f"; {before['measured']}: {before['accuracy']:.1%} → {after['accuracy']:.1%}"
    report.draw_curves(output / report.CURVES, metrics, title)
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
        f"memory: {report.size(summary['peak_memory_bytes'])} at its peak; the reference "
        f"({config.reference}) held {report.size(summary['reference_bytes'])}"
    )
    print(f"{final}: the trained {'adapter' if config.lora else 'model'}")
    print(f"{output}: {report.METRICS}, {report.CURVES}, {report.SUMMARY}")
    return summary


def _without_logps(result: dict[str, Any] | None) -> dict[str, Any] | None:
    return result and {name: value for name, value in result.items() if name != "logps"}
