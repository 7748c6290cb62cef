"""Plots of the committed results, PNG and SVG: legible in print and to the colour-blind.

    python -m bench.plots [FOLDER …]        # of results; all in bench/results/ if left out

A peer has one colour, marker and name in all of them. What was measured has a marker; what was
predicted is dotted, paler and without one. Each file carries a digest of the numbers it was drawn
from, which a test compares with the results beside it.
"""

import hashlib
import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from bench import columns
from bench.cases import QWEN, Case
from bench.measure import Result
from bench.paper.costs import COSTS
from bench.paper.model import H100, calibrated, predict, work
from bench.peers import OURS
from bench.run import ROOT, Results, committed

STYLE = {"font.size": 9, "axes.grid": True, "grid.alpha": 0.3, "svg.hashsalt": "humanline"}
PREDICTED = ", predicted"  # ends the names of lines that nobody measured
FLOOR = "bare rates"  # of a roofline: what bare GEMMs and a bare copy attain

#: Colour, marker and dashes of each peer. Libraries have a colour family, floors are grey.
PEERS = {
    OURS: ("#0072B2", "o", "-"),
    "humanline, log-probs alone": ("#56B4E9", "o", "--"),
    "bare GEMMs": ("#000000", "s", "-"),
    "bare GEMMs, active rows": ("#888888", "s", "--"),
    "bare copy": ("#444444", "s", "-."),
    FLOOR: ("#000000", "", "-"),
    "eager": ("#D55E00", "D", "-"),
    "torch.compile": ("#E69F00", "v", "--"),
    "torch linear_cross_entropy": ("#B8860B", "^", "-."),
    "TRL selective_log_softmax": ("#009E73", "P", "-"),
    "TRL ChunkedLogProbFunction": ("#44AA99", "X", "--"),
    "Liger chunked": ("#CC79A7", "<", "-"),
    "Liger grpo_loss": ("#AA4499", ">", "--"),
    "Liger fused linear CE": ("#882255", "d", "-."),
    "cut-cross-entropy": ("#8C510A", "p", "-"),
    "verl": ("#999933", "h", "--"),
    "quack": ("#332288", "*", "-"),
    "quack, one launch": ("#6655BB", "*", "--"),
}

Points = dict[str, list[tuple[float, float]]]


class Plot(NamedTuple):
    """One file: what it is called and shows, the numbers, and how they are drawn."""

    name: str
    title: str
    points: Points
    draw: Callable[[plt.Figure, Points], None]


def style_of(name: str) -> dict:
    """How a peer, or the prediction for it, is drawn."""
    colour, marker, dashes = PEERS[name.removesuffix(PREDICTED)]
    if name.endswith(PREDICTED):
        return {"color": colour, "marker": "", "linestyle": ":", "linewidth": 1.3, "alpha": 0.7}
    width = 2.2 if name == OURS else 1.3
    return {"color": colour, "marker": marker, "linestyle": dashes, "linewidth": width}


def _varying(results: Results, field: str) -> Iterable[tuple[Case, list[Result]]]:
    """Groups of results that differ in one field of the case alone, at three values or more."""
    groups: dict[Case, list[Result]] = {}
    default = getattr(Case(), field)
    for r in results.results:
        if r.seconds is not None:
            groups.setdefault(replace(r.case, **{field: default}), []).append(r)
    for base, members in groups.items():
        if len({getattr(r.case, field) for r in members}) >= 3:
            yield base, members


def _points(members: list[Result], field: str, value: Callable[[Result], float | None]) -> Points:
    points: Points = {}
    for r in sorted(members, key=lambda r: getattr(r.case, field)):
        if value(r) is not None:
            points.setdefault(r.peer, []).append((getattr(r.case, field), value(r)))
    return points


def lines(x: str, y: str, log: str = "xy") -> Callable:
    """A line a peer."""

    def draw(figure: plt.Figure, points: Points) -> None:
        axes = figure.subplots()
        for name, line in points.items():
            axes.plot(*zip(*line, strict=True), label=name, markersize=5, **style_of(name))
        _label(figure, axes, x, y, log)

    return draw


def dots(x: str, y: str) -> Callable:
    """A dot a measurement, under the line of the floor's rates."""

    def draw(figure: plt.Figure, points: Points) -> None:
        axes = figure.subplots()
        for name, line in points.items():
            style = style_of(name)
            if name != FLOOR:
                style["linestyle"] = "none"
            axes.plot(*zip(*line, strict=True), label=name, markersize=5, **style)
        _label(figure, axes, x, y, "xy")

    return draw


def _label(figure: plt.Figure, axes: plt.Axes, x: str, y: str, log: str) -> None:
    if "x" in log:
        axes.set_xscale("log", base=2)
    if "y" in log:
        axes.set_yscale("log")
    axes.set(xlabel=x, ylabel=y)
    figure.legend(loc="outside lower center", ncols=3, fontsize=7, frameon=False)


def bars(figure: plt.Figure, points: Points) -> None:
    """A row of panels a case, time beside memory; a bar a peer, with its number."""
    cases = list(dict.fromkeys(name.rpartition(": ")[0] for name in points))
    figure.set_size_inches(9, 1.35 * len(cases) + 0.4)
    for row, case in zip(figure.subplots(len(cases), 2, squeeze=False), cases, strict=True):
        for axes, (what, scale, unit) in zip(row, QUANTITIES, strict=True):
            _bars(axes, [(n, v / scale) for n, v in points[f"{case}: {what}"]], unit)
            axes.set_title(f"{case}: {what}", fontsize=9, loc="left")
        row[1].set_yticklabels([])  # the same peers as beside it


def _bars(axes: plt.Axes, values: list[tuple[str, float]], unit: str) -> None:
    limit = scale_end([value for _, value in values])
    for name, value in values:
        shown = min(value, limit)
        axes.barh(name, shown, color=PEERS[name][0], height=0.75)
        told = f" {value:#.3g} {unit}".replace(". ", " ")
        if value > limit:
            axes.text(limit, name, f"{told}, off the scale →  ", ha="right", va="center", color="w")
        else:
            axes.text(shown, name, told, va="center")
    axes.set(xlim=(0, 1.25 * limit), xticks=[])
    axes.grid(False)
    axes.invert_yaxis()
    axes.spines[["top", "right", "bottom"]].set_visible(False)


def scale_end(values: list[float]) -> float:
    """Where bars end: at the largest, unless that alone would take more than half of the width."""
    second, largest = sorted([0.0, *values])[-2:]
    return 1.3 * second if largest > 2 * second > 0 else largest


def write(path: Path, plot: Plot) -> Path:
    """Both files of a plot; the PNG's path."""
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(6.4, 4.6), layout="constrained")
        plot.draw(figure, plot.points)
        figure.suptitle(plot.title, fontsize=10)
        path.parent.mkdir(parents=True, exist_ok=True)
        digest = digest_of(plot.points)
        figure.savefig(path.with_suffix(".png"), dpi=200, metadata={"Description": digest})
        figure.savefig(path.with_suffix(".svg"), metadata={"Description": digest, "Date": None})
        plt.close(figure)
    return path.with_suffix(".png")


def digest_of(points: Points) -> str:
    return hashlib.sha256(repr(sorted(points.items())).encode()).hexdigest()


# Each of these yields the plots of one kind


def tokens(results: Results) -> Iterable[Plot]:
    for base, members in _varying(results, "tokens"):
        for what, unit, value in (
            ("time", "milliseconds", lambda r: r.seconds * 1e3),
            ("memory", "MB beside the inputs", lambda r: r.peak_bytes / 1e6),
        ):
            points = _points(members, "tokens", value)
            predicted = _predicted(results, base, what, [r.case.tokens for r in members])
            title = f"{what.capitalize()} by tokens: {_title(base, results)}"
            if predicted:
                title += "\n(dotted: predicted, not measured)"
            name = f"{what}-tokens-{_slug(base)}"
            yield Plot(name, title, points | predicted, lines("tokens", unit))


def _predicted(results: Results, base: Case, what: str, measured: list[int]) -> Points:
    """humanline as the model has it, to four times what was measured, once a device's floors
    are."""
    device = calibrated(results, base)
    if device is None:
        return {}
    line, n = [], min(measured)
    while n <= 4 * max(measured):
        p = predict(replace(base, tokens=n), device)
        line.append((n, p.seconds * 1e3 if what == "time" else p.bytes / 1e6))
        n *= 2
    return {OURS + PREDICTED: line}


def active(results: Results) -> Iterable[Plot]:
    for base, members in _varying(results, "active"):
        points = _points(members, "active", lambda r: r.seconds * 1e3)
        title = f"Time by share of rows with a gradient: {_title(base, results)}"
        draw = lines("share of rows with a gradient", "milliseconds", "y")
        yield Plot(f"time-active-{_slug(base)}", title, points, draw)


def scale(results: Results) -> Iterable[Plot]:
    for base, members in _varying(results, "logit_std"):
        points = _points(members, "logit_std", lambda r: r.gradient_error)
        title = f"Error of the gradient by size of the logits: {_title(base, results)}"
        draw = lines("standard deviation of the logits", "relative error, from float64")
        yield Plot(f"error-scale-{_slug(base)}", title, points, draw)


def roofline(results: Results) -> Iterable[Plot]:
    """What each peer attains of the floors' rates, at the arithmetic it has to do."""
    for dtype in dict.fromkeys(r.case.dtype for r in results.results):
        found = [
            r
            for r in results.results
            if (r.case.dtype, r.case.entry) == (dtype, "hidden")
            and r.seconds
            and r.peer in COSTS
            and not r.peer.startswith("bare")
        ]
        device = calibrated(results, found[0].case) if found else None
        if device is None:
            continue
        points: Points = {}
        for r in found:
            flops, _ = work(r.case, "bare GEMMs, active rows", device.is_cpu)
            _, moved = work(r.case, r.peer, device.is_cpu)
            points.setdefault(r.peer, []).append((flops / moved, flops / r.seconds))
        ridge = device.gemm / device.copy
        roof = [(x, min(device.gemm, x * device.copy)) for x in (ridge / 9, ridge, 9 * ridge)]
        points[FLOOR] = roof
        title = (
            "Arithmetic a second by arithmetic a byte, losses from hidden states\n"
            f"(measured times, modelled bytes; {dtype}, {_device(results)})"
        )
        yield Plot(f"roofline-{dtype}", title, points, dots("FLOP a byte moved", "FLOP/s"))


QUANTITIES = [("time", 1e-3, "ms"), ("memory", 1e9, "GB")]


def loss_tail(results: Results) -> Iterable[Plot]:
    """Of a GPU: what the loss costs beside the peers, of each case with three of them or more."""
    if results.on_cpu:
        return
    points: Points = {}
    for case in results.cases:
        ran = [r for r in results.of(case) if r.seconds is not None]
        sizes = case.tokens, case.vocab
        if case.active < 1 or sizes != (TAIL_TOKENS, TAIL_VOCAB) or len(ran) < 3:
            continue
        ran.sort(key=lambda r: (r.peer != OURS, r.seconds))
        for (what, _, _), value in zip(QUANTITIES, ("seconds", "peak_bytes"), strict=True):
            points[f"{_tail(case)}: {what}"] = [(r.peer, getattr(r, value)) for r in ran]
    if points:
        title = f"What the loss costs, forward and backward, measured on an {_device(results)}"
        yield Plot("loss-tail", title, points, bars)


TAIL_TOKENS, TAIL_VOCAB = 8192, QWEN  # as the front page says


def _tail(case: Case) -> str:
    where = f"hidden states, H={case.hidden:,}" if case.entry == "hidden" else "logits"
    return f"{case.objective.upper()} from {where}"


def memory_at_scale() -> Plot:
    """The model on an H100, up to what nothing here can hold, and what was measured on one."""
    base = Case("grpo", "hidden", 2048, 4096, 151_936, "bfloat16")
    points: Points = {}
    for who in (OURS, "eager"):
        line = points.setdefault(who + PREDICTED, [])
        for n in (2**k for k in range(11, 21)):
            line.append((n, predict(replace(base, tokens=n), H100, who).bytes / 1e9))
        for results in committed():
            for r in results.results:
                same = replace(r.case, tokens=base.tokens) == base
                if same and r.peer == who and r.seconds and "H100" in results.environment["device"]:
                    points.setdefault(who, []).append((r.case.tokens, r.peak_bytes / 1e9))
    title = (
        "Memory by tokens on one H100: GRPO from hidden states, H=4,096, V=151,936, bfloat16\n"
        "(dotted: predicted; markers: measured)"
    )
    draw = lines("tokens", "GB beside the inputs")
    return Plot("predicted-memory-tokens", title, points, draw)


_PANELS = {"time": "time, × bare GEMMs", "hidden": "error of dH", "weight": "error of dW"}


def columns_left_out(path: Path) -> Plot:
    """What bench/columns.py measured: time and errors against the tolerance, beside the peer that
    comes nearest."""
    record = json.loads(path.read_text(encoding="utf-8"))
    found = [columns.Line(**result) for result in record["results"]]
    bare = columns.bare_seconds(found)
    points: Points = {}
    for x in found:
        values = x.median / bare[x.rows, x.dtype], x.hidden_error, x.weight_error
        if x.peer == NEAREST or (x.peer == OURS and x.tolerance):
            for panel, value in zip(_PANELS, values, strict=True):
                line = points.setdefault(f"{x.rows}, {x.dtype}: {panel}: {x.peer}", [])
                line.append((x.tolerance, value))
    where = record["environment"]["device"]
    title = f"GRPO with columns left out, on a real model's rows: time and errors ({where})"
    return Plot("columns", title, points, _columns)


NEAREST = "torch.compile"


def _columns(figure: plt.Figure, points: Points) -> None:
    """A row of panels for each kind of rows and dtype; a peer without a tolerance is a level."""
    rows = list(dict.fromkeys(name.partition(": ")[0] for name in points))
    figure.set_size_inches(9, 1.9 * len(rows) + 0.6)
    grid = figure.subplots(len(rows), len(_PANELS), squeeze=False, sharex=True)
    for name, line in points.items():
        row, panel, who = name.split(": ")
        axes = grid[rows.index(row), list(_PANELS).index(panel)]
        if who == OURS:
            axes.plot(*zip(*line, strict=True), label=who, markersize=4, **style_of(who))
        else:
            axes.axhline(line[0][1], label=who, **style_of(who) | {"marker": ""})
        axes.set(xscale="log", yscale="linear" if panel == "time" else "log")
        axes.set_title(f"{row}: {_PANELS[panel]}", fontsize=9, loc="left")
    for axes in grid[:, 0]:
        axes.set_ylim(bottom=0)
    for axes in grid[-1]:
        axes.set_xlabel("gradient_tolerance")
    handles = grid[0, 0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=2, fontsize=7, frameon=False)


def figures(results: Results) -> Iterable[Plot]:
    """All that these results have the numbers for."""
    for plots in (loss_tail, tokens, active, scale, roofline):
        yield from plots(results)


def _title(case: Case, results: Results) -> str:
    head = ", frozen head" if case.frozen_head else ""
    source = "hidden states" if case.entry == "hidden" else "logits"
    shape = f"V={case.vocab:,}" + (f", H={case.hidden:,}" if case.entry == "hidden" else "")
    what = f"{case.objective.upper()} from {source}"
    return f"{what}\n({shape}, {case.dtype}{head}; {_device(results)})"


def _device(results: Results) -> str:
    return results.environment["device"]


def _slug(case: Case) -> str:
    frozen = "-frozen" if case.frozen_head else ""
    return f"{case.objective}-{case.entry}-{case.vocab}-{case.dtype}{frozen}"


def draw(folder: Path, plots: Iterable[Plot]) -> list[Path]:
    """Write each plot into a folder."""
    return [write(folder / plot.name, plot) for plot in plots]


def main(folders: list[str]) -> None:
    found = [Results.load(Path(f) / "results.json") for f in folders] or committed()
    for results in found:
        for path in draw(results.path.parent / "plots", figures(results)):
            print(path)
    if not folders:
        print(*draw(ROOT / "bench/results/model", [memory_at_scale()]))
        for path in ROOT.glob(f"bench/results/*/{columns.FILE}"):
            print(*draw(path.parent / "plots", [columns_left_out(path)]))


if __name__ == "__main__":
    main(sys.argv[1:])
