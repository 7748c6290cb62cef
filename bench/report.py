"""Results as a table, in a terminal or in Markdown."""

from statistics import median

from bench.measure import Result
from bench.peers import OURS, peers_of
from bench.run import Results

WIDTHS = [8, 8, 9, 8, 7, 8, 7]
NAMES = ["loss err", "grad err", "seconds", "/ floor", "× ours", "peak MB", "× ours"]
HEAD = " " * 28 + " ".join(f"{n:>{w}s}" for n, w in zip(NAMES, WIDTHS, strict=True))


def terminal(results: Results) -> str:
    """All results, a block a case. ``× ours`` is how many times humanline's own, on a GPU that of
    the same rounds: for humanline's own, the second time in each round, the distance from 1 is the
    noise."""
    lines = [f"{k}: {v}" for k, v in results.environment.items()]
    for case in results.cases:
        lines += ["", case.name, HEAD]
        of_case = sorted(results.of(case), key=lambda r: r.why_not is not None)
        lines += [_terminal_line(r, floor(of_case), ours(of_case)) for r in of_case]
    return "\n".join(lines)


def _terminal_line(result: Result, floor: Result | None, ours: Result | None) -> str:
    if result.why_not is not None:
        return f"  {result.peer:26s} {result.why_not}"
    errors = [_error(result.loss_error), _error(result.gradient_error)]
    beside = median(result.ours_seconds) if result.ours_seconds else ours and ours.seconds
    notes = "; ".join(filter(None, [note_on(result), _card(result)]))
    return (
        f"  {result.peer:26s} {errors[0]:>8s} {errors[1]:>8s} {result.seconds:9.4g} "
        f"{_ratio(result.seconds, floor and floor.seconds):>8s} "
        f"{_ratio(result.seconds, beside):>7s} "
        f"{result.peak_bytes / 1e6:8.0f} {_ratio(result.peak_bytes, ours and ours.peak_bytes):>7s}"
        f"{'  ' + notes if notes else ''}"
    )


def _card(result: Result) -> str:
    """The GPU's clock and power over the rounds, such as ``1,980 MHz, 640 W``."""
    cards = [c for c in result.cards if c is not None]
    means = []
    for name, unit in (("sm_mhz", "MHz"), ("watts", "W")):
        values = [v for c in cards if (v := getattr(c, name)) is not None]
        means += [f"{sum(values) / len(values):,.0f} {unit}"] if values else []
    return ", ".join(means)


def _error(x: float | None) -> str:
    return "" if x is None else f"{x:.1e}"


def note_on(result: Result) -> str:
    """What the reader of a peer's numbers should know."""
    return next((p.note for p in peers_of(result.case) if p.name == result.peer), "")


def floor(results: list[Result]) -> Result | None:
    """The bare GEMMs or the bare copy of a case."""
    return find(results, "bare GEMMs") or find(results, "bare copy")


def ours(results: list[Result]) -> Result | None:
    return find(results, OURS)


def find(results: list[Result], peer: str) -> Result | None:
    return next((r for r in results if r.peer == peer and r.seconds is not None), None)


def _ratio(x: float, base: float | None) -> str:
    return f"{x / base:.2f}" if base else ""


def seconds(x: float) -> str:
    """Three digits, in the unit that suits."""
    return f"{x:#.3g} s" if x >= 0.1 else f"{x * 1e3:#.3g} ms" if x >= 1e-4 else f"{x * 1e6:.0f} µs"


def megabytes(x: float) -> str:
    return f"{x / 1e6:,.0f} MB"


def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
