"""What a run shows and writes: progress, metrics.jsonl, curves.png, summary.json."""

import json
import math
import os
import platform
import re
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from humanline.training.errors import UserError
from humanline.training.launch import is_first
from humanline.version import __version__

METRICS, CURVES, SUMMARY = "metrics.jsonl", "curves.png", "summary.json"

#: Statistics that add up over micro-batches; of all others the mean is taken.
_SUMMED = ("loss", "humanline/active_rows", "humanline/rows")


def merge(micro_batches: list[dict[str, float]]) -> dict[str, float]:
    """The statistics of an optimizer step. One that is NaN in a micro-batch (say, the reward of
    chosen completions where there is none) is taken from the others, or left out."""
    merged = {}
    for name in micro_batches[0]:
        values = [m[name] for m in micro_batches if not math.isnan(m[name])]
        if values:
            merged[name] = sum(values) / (1 if name in _SUMMED else len(values))
    return merged


class Metrics:
    """``metrics.jsonl``: one JSON object a step. All but its ``timing`` is a function of the
    configuration alone.

    Args:
        path: the file; whatever it holds of steps from ``step`` on is dropped. None: nothing is
            read or written, as on all ranks but the first.
        step: the first step that will be written.
    """

    def __init__(self, path: Path | None, step: int):
        self.rows: list[dict[str, Any]] = []
        self.file = None
        if path is None:
            return
        kept = read_metrics(path)[:step] if path.exists() else []
        if len(kept) < step:
            raise UserError(f"{path} holds {len(kept)} steps, but the checkpoint is at {step}")
        write_atomically(path, "".join(json.dumps(row) + "\n" for row in kept))
        self.rows = kept
        self.file = path.open("a", encoding="utf-8")

    def write(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        if self.file is not None:
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()

    def flush(self) -> None:
        """Onto the disk: a checkpoint is about to say that these steps are done."""
        if self.file is not None:
            os.fsync(self.file.fileno())


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file; a killed run may leave half a line at its end."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def write_atomically(path: Path, text: str) -> None:
    """The whole text, or nothing changes."""
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(partial, 0o644)  # mkstemp makes it private
        os.replace(partial, path)
    except BaseException:
        os.unlink(partial)
        raise


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a file; None if there is no such file, or something else in it."""
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def write_json(path: Path, value: Any) -> None:
    write_atomically(path, json.dumps(value, indent=2) + "\n")


# On the terminal


def counting(total: int, what: str, first: int = 0, unit: str = "it", leave: bool = True) -> tqdm:
    """A bar; where nobody watches, it is drawn rarely."""
    interval = 0.5 if sys.stderr.isatty() else 15.0
    return tqdm(
        total=total,
        initial=first,
        desc=what,
        unit=unit,
        mininterval=interval,
        leave=leave,
        disable=not is_first(),
    )


def show(bar: tqdm, row: dict[str, Any]) -> None:
    """Advance the bar by a step."""
    timing = row["timing"]
    shown = {
        "loss": _number(row.get("loss"), ".4f"),
        "margin": _number(row.get("rewards/margins"), "+.4f"),
        "acc": _number(row.get("rewards/accuracies"), ".2f"),
        "unclamped": _number(row.get("humanline/unclamped"), ".2f"),
        "active": f"{row.get('humanline/active_rows', 0):.0f}/{row['humanline/rows']:.0f}",
        "tok/s": _number(timing["tokens_per_second"], ".0f"),
        "mem": f"{timing['peak_memory_bytes'] / 2**30:.1f}G",
    }
    bar.set_postfix(shown, refresh=False)
    bar.update()


def count(n: int) -> str:
    """A number of weights, to read."""
    for unit, scale in (("billion", 1e9), ("million", 1e6)):
        if n >= scale:
            return f"{n / scale:.3g} {unit}"
    return f"{n:,}"


def size(n: int) -> str:
    """A number of bytes, to read."""
    for unit in ("B", "KiB", "MiB"):
        if n < 1024:
            return f"{n:.4g} {unit}"
        n /= 1024
    return f"{n:.4g} GiB"


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory held so far: the allocator's on a GPU, else the process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # rusage has what the process that started this one held, if that is more.
    own = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", own.read_text()) if own.exists() else None
    if found:
        return int(found[1]) * 1024
    import resource  # not on Windows, where the GPU's allocator may still be asked

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


# At the end


def versions() -> dict[str, str]:
    """Versions of what the numbers of a run may depend on."""
    found = {"humanline": __version__, "python": platform.python_version()}
    for name in ("torch", "triton", "transformers", "peft"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def describe(before: dict[str, Any] | None, after: dict[str, Any] | None) -> str:
    """Before and after, in a few lines."""
    if before is None or after is None:
        return "Nothing was measured: no data were held out."
    lines = list(_samples(before, after))
    lines.append(
        f"Held out, {before['measured']}: {share(before)} before, {share(after)} after (n = "
        f"{after['n']}, with 95 % intervals)."
    )
    reward = after.get("by implicit reward")
    if reward:
        lines.append(
            f"The better completion has the higher implicit reward in {share(reward)} of them, by "
            f"{reward['mean_margin']:+.4f} in the mean."
        )
    since = after.get("since_start")
    if since:
        lines.append(
            f"Against the policy before training, the better completion has gained on the worse "
            f"one in {since['preferred']} of {since['pairs']} {since['of']} pairs, "
            f"{since['margin']:+.3g} nats in the mean."
        )
    return "\n".join(lines)


def _samples(before: dict[str, Any], after: dict[str, Any]) -> Iterator[str]:
    for was, now in zip(before.get("samples", []), after.get("samples", []), strict=True):
        yield f"asked       {_short(was['prompt'])} (right: {was['answer']})"
        yield f"  before    {_short(was['text'])}"
        yield f"  after     {_short(now['text'])}"


def _short(text: str, width: int = 120) -> str:
    """On one line, cut to a width."""
    text = " ".join(text.split()) or "(nothing)"
    return text if len(text) <= width else text[: width - 2] + " …"


def share(result: dict[str, Any]) -> str:
    """A proportion with its interval."""
    low, high = result["interval95"]
    return f"{result['accuracy']:.1%} [{low:.1%}, {high:.1%}]"


def time_left(steps: int, seconds_a_step: float, measuring: float) -> str:
    """How long a run still takes, in words: so many steps, then so many seconds of measuring."""
    again = f", then about {duration(measuring)} to measure again" if measuring else ""
    return f"The {steps} steps to go take about {duration(steps * seconds_a_step)}{again}."


def duration(seconds: float) -> str:
    """A time, to read."""
    if seconds < 90:
        return f"{max(round(seconds), 1)} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes / 60:.1f} h"
