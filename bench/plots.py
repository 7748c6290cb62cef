"""Plots of the committed results, PNG and SVG: legible in print and to the colour-blind.

    python -m bench.plots [FOLDER …]        # of results; all in bench/results/ if left out

Okabe and Ito's colours, and for every line its own marker and dash; what was predicted, not
measured, is dotted without a marker. Each file carries a digest of
the numbers it was drawn from, which a test compares with the results beside it.
"""

import hashlib
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from bench.cases import Case
from bench.measure import Result
from bench.paper.costs import COSTS
from bench.paper.model import H100, calibrated, predict, work
from bench.peers import OURS
from bench.run import ROOT, Results, committed

COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
MARKERS, DASHES = "osD^vPX*<>", ["-", "--", "-.", ":"]
STYLE = {"font.size": 9, "axes.grid": True, "grid.alpha": 0.3, "svg.hashsalt": "humanline"}
PREFERRED = (OURS, "eager")  # the same style in every plot
PREDICTED = ", predicted"  # ends the names of lines that nobody measured

Points = dict[str, list[tuple[float, float]]]


def _style(name: str, index: int) -> dict:
    if name.endswith(PREDICTED):
        measured = _style(name.removesuffix(PREDICTED), index)
        return measured | {"marker": "", "linestyle": (0, (1, 2)), "linewidth": 1.3}
    i = PREFERRED.index(name) if name in PREFERRED else 2 + index
    return {
        "color": COLOURS[i % len(COLOURS)],
        "marker": MARKERS[i % len(MARKERS)],
        "linestyle": DASHES[i % len(DASHES)],
        "linewidth": 2.2 if name == OURS else 1.3,
        "markersize": 5,
    }


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


def _lines(
    path: Path,
    title: str,
    points: Points,
    x: str,
    y: str,
    log: str = "xy",
    only_line: str | None = None,
) -> Path:
    """``only_line``: the one name drawn as a line, the others as points; all have both if None."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(6.4, 4.6), layout="constrained")
        others = [name for name in points if name not in PREFERRED]
        for name, line in points.items():
            index = others.index(name) if name in others else 0
            style = _style(name, index)
            if name == only_line:
                style |= {"color": "black", "marker": ""}
            elif only_line is not None:
                style["linestyle"] = "none"
            axes.plot(*zip(*line, strict=True), label=name, **style)
        if "x" in log:
            axes.set_xscale("log", base=2)
        if "y" in log:
            axes.set_yscale("log")
        axes.set(title=title, xlabel=x, ylabel=y)
        figure.legend(loc="outside lower center", ncols=3, fontsize=7, frameon=False)
        return _save(figure, path, points)


def _save(figure, path: Path, points: Points) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    digest = digest_of(points)
    figure.savefig(path.with_suffix(".png"), dpi=200, metadata={"Description": digest})
    figure.savefig(path.with_suffix(".svg"), metadata={"Description": digest, "Date": None})
    plt.close(figure)
    return path.with_suffix(".png")


def digest_of(points: Points) -> str:
    return hashlib.sha256(repr(sorted(points.items())).encode()).hexdigest()


# Each of these yields (name, title, points, axes) of one file


def tokens(results: Results):
    for base, members in _varying(results, "tokens"):
        for what, unit, value in (
            ("time", "milliseconds", lambda r: r.seconds * 1e3),
            ("memory", "MB", lambda r: r.peak_bytes / 1e6),
        ):
            points = _points(members, "tokens", value) | _predicted(results, base, what)
            title = f"Peak memory, {_title(base)}" if what == "memory" else _title(base)
            yield f"{what}-tokens-{_slug(base)}", title, points, ("tokens", unit, "xy")


def _predicted(results: Results, base: Case, what: str) -> Points:
    """humanline up to 1 M tokens as the model has it, once a device's floors are measured."""
    device = calibrated(results, base)
    if device is None:
        return {}
    line = []
    for n in (2**k for k in range(9, 21)):
        p = predict(replace(base, tokens=n), device)
        line.append((n, p.seconds * 1e3 if what == "time" else p.bytes / 1e6))
    return {OURS + PREDICTED: line}


def active(results: Results):
    for base, members in _varying(results, "active"):
        points = _points(members, "active", lambda r: r.seconds * 1e3)
        axes = ("rows with a gradient", "milliseconds", "")
        yield f"time-active-{_slug(base)}", _title(base), points, axes


def scale(results: Results):
    for base, members in _varying(results, "logit_std"):
        points = _points(members, "logit_std", lambda r: r.gradient_error)
        axes = ("standard deviation of the logits", "gradient's relative error", "xy")
        yield f"error-scale-{_slug(base)}", _title(base), points, axes


def roofline(results: Results):
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
        points["bare rates"] = roof
        axes = ("FLOP a byte moved", "FLOP/s", "xy", "bare rates")
        title = f"Roofline, {dtype}, {results.environment['device']}"
        yield f"roofline-{dtype}", title, points, axes


def memory_at_scale():
    """The model alone, on an H100: what no machine here can hold."""
    points: Points = {}
    for who in (OURS, "eager"):
        for n in (2**k for k in range(11, 21)):
            p = predict(Case("grpo", "hidden", n, 4096, 151_936, "bfloat16"), H100, who)
            points.setdefault(who + PREDICTED, []).append((n, p.bytes / 1e9))
    title = "Predicted, one H100: GRPO from hidden states, H=4096, V=151,936, bf16"
    return "predicted-memory-tokens", title, points, ("tokens", "GB beside the inputs", "xy")


def figures(results: Results):
    """All that these results have the numbers for."""
    for plot in (tokens, active, scale, roofline):
        yield from plot(results)


def _title(case: Case) -> str:
    head = ", frozen head" if case.frozen_head else ""
    shape = f"V={case.vocab:,}" + (f", H={case.hidden:,}" if case.entry == "hidden" else "")
    return f"{case.objective.upper()} from {case.entry}, {shape}, {case.dtype}{head}"


def _slug(case: Case) -> str:
    frozen = "-frozen" if case.frozen_head else ""
    return f"{case.objective}-{case.entry}-{case.vocab}-{case.dtype}{frozen}"


def draw(folder: Path, drawn: Iterable) -> list[Path]:
    """Write each figure into a folder."""
    return [_lines(folder / name, title, points, *axes) for name, title, points, axes in drawn]


def main(folders: list[str]) -> None:
    found = [Results.load(Path(f) / "results.json") for f in folders] or committed()
    for results in found:
        for path in draw(results.path.parent / "plots", figures(results)):
            print(path)
    if not folders:
        print(*draw(ROOT / "bench/results/model", [memory_at_scale()]))


if __name__ == "__main__":
    main(sys.argv[1:])
