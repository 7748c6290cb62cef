"""``curves.png``: what a run was worth, and how it went."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from humanline.training import header
from humanline.training.config import TrainConfig

_BLUE, _VERMILLION, _GREY = "#0072B2", "#D55E00", "#999999"  # Okabe and Ito's, and a grey


def draw(
    path: Path,
    config: TrainConfig,
    rows: list[dict[str, Any]],
    before: dict[str, Any] | None,
    after: dict[str, Any] | None,
) -> None:
    """Above, what counts: accuracy before and after, preferences against the policy before
    training, the loss. Below, what each step saw of its own reference.

    Args:
        path: the file.
        config: of the run.
        rows: its metrics.
        before, after: what was measured; None: nothing.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 3, figsize=(14, 7), layout="constrained")
    (accuracy, since_start, loss), below = axes
    _draw_accuracy(accuracy, before, after)
    _draw_since_start(since_start, rows, after)
    of_reference = f"against {header.reference(config)}"
    for axis, name, title in (
        (loss, "loss", "loss"),
        (below[0], "rewards/margins", f"reward margin of a step's batch,\n{of_reference}"),
        (below[1], "rewards/accuracies", f"share of a step's batch preferred,\n{of_reference}"),
        (below[2], "humanline/unclamped", "share of tokens not clamped or rejected"),
    ):
        _draw_steps(axis, rows, name, title)
    for axis in below[1:]:
        axis.set_ylim(0, 1.05)  # shares
    loss.legend(fontsize=9)
    title = f"{config.objective}, perception {config.perception}, sync every {config.sync_every}"
    figure.suptitle(title, fontsize=12)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _draw_accuracy(axis, before: dict[str, Any] | None, after: dict[str, Any] | None) -> None:
    if before is None or after is None:
        axis.set_title("accuracy", fontsize=11)
        return _say(axis, "nothing was measured")
    axis.set_title(f"{before['measured']}, held out (n = {after['n']})", fontsize=11)
    for place, result, color in ((0, before, _GREY), (1, after, _VERMILLION)):
        value, (low, high) = result["accuracy"], result["interval95"]
        error = [[max(value - low, 0)], [max(high - value, 0)]]
        axis.bar(place, value, color=color, width=0.6, yerr=error, capsize=5)
        axis.annotate(
            f"{value:.1%}", (place, high), (0, 4), textcoords="offset points", ha="center"
        )
    axis.set_xticks([0, 1], ["before", "after"])
    axis.set_ylim(0, 1.1)
    axis.set_ylabel("right, with 95 % intervals")
    return None


def _draw_since_start(axis, rows: list[dict[str, Any]], after: dict[str, Any] | None) -> None:
    since = (after or {}).get("since_start")
    axis.set_title("better over worse completion,\nagainst the policy before training", fontsize=11)
    if not since:
        return _say(axis, "not measured")
    name = "since_start/margins"
    points = [(0, 0.0), *((row["step"] + 1, row[name]) for row in rows if name in row)]
    points.append((len(rows), since["margin"]))
    axis.plot(*zip(*points, strict=True), color=_VERMILLION, lw=2, marker="o", ms=3)
    axis.axhline(0, color=_GREY, lw=1)
    axis.set_ylabel(f"nats, mean of {since['pairs']} {since['of']} pairs")
    axis.set_xlabel("optimizer steps done")
    axis.grid(alpha=0.3)
    return None


def _draw_steps(axis, rows: list[dict[str, Any]], name: str, title: str) -> None:
    """A number of each step, with its running mean."""
    axis.set_title(title, fontsize=11)
    points = [(row["step"], row[name]) for row in rows if name in row]
    if not points:
        return _say(axis, "not defined here")
    steps, values = zip(*points, strict=True)
    window = max(1, len(values) // 10)
    axis.plot(steps, values, color=_BLUE, alpha=0.45, lw=1, label="each step")
    label = f"mean of the last {window}"
    axis.plot(steps, running_mean(values, window), color=_VERMILLION, lw=2, label=label)
    axis.set_xlabel("optimizer step")
    axis.grid(alpha=0.3)
    return None


def _say(axis, text: str) -> None:
    axis.text(0.5, 0.5, text, ha="center", transform=axis.transAxes)


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Mean of each value and those before it, ``window`` in all where there are as many."""
    return [
        sum(values[max(0, i + 1 - window) : i + 1]) / min(i + 1, window) for i in range(len(values))
    ]
