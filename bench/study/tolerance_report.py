"""TOLERANCE.md and its figure, from results/tolerance.jsonl and tolerance.json alone.

python -m bench.study.tolerance_report
"""

import math
import statistics
from collections.abc import Callable
from itertools import product
from typing import Any

from bench.report import markdown
from bench.study import task
from bench.study.analyse import interval, new_figure, save, shown, verdict
from bench.study.run import HERE, read_config, read_results
from bench.study.tolerance import CONFIG, FULL, LINES, key, runs

REPORT, FIGURE = "TOLERANCE.md", "tolerance.png"
HOLDS = "What holds"  # the section that bench/README.md has too
ROWS = ("own", "others")
ENOUGH = 3  # seeds, for an interval

# Of δ = 0 and the others, in their order.
LOOKS = [("#000000", "-"), ("#0072B2", "--"), ("#E69F00", "-."), ("#D55E00", ":")]

Line = dict[str, Any]
Setting = tuple[str, str]  # objective, weights


def pass_at_1(line: Line) -> float:
    return line["after"]["pass@1"]


def greedy(line: Line) -> float:
    return line["after"]["greedy"]


def loss(line: Line) -> float:
    """The mean of all steps."""
    return statistics.mean(line["loss"])


def grad_norm(line: Line) -> float:
    """The mean of all steps, before gradients are clipped to a norm."""
    return statistics.mean(line["grad_norm"])


class Runs:
    """The runs that are done.

    Attributes:
        settings: what every δ is run with.
        of: lines by setting and δ, then by seed.
    """

    def __init__(self, lines: list[Line], config: dict[str, Any]):
        self.config = config
        self.settings = list(product(config["objectives"], config["training"]["weights"]))
        self.exact, *self.others = config["tolerances"]
        found = {key(line): line for line in lines}
        self.of: dict[tuple[Setting, float], dict[int, Line]] = {
            (s, d): {
                seed: found[(*s, d, seed)] for seed in config["seeds"] if (*s, d, seed) in found
            }
            for s in self.settings
            for d in config["tolerances"]
        }

    @property
    def counted(self) -> tuple[int, int]:
        """Runs that are done, and all."""
        return sum(map(len, self.of.values())), sum(map(len, runs(self.config)))

    def differences(
        self, settings: list[Setting], tolerance: float, value: Callable[[Line], float]
    ) -> list[float]:
        """From δ = 0, of each seed that has run all of it; the mean over settings."""
        pairs = [(self.of[s, tolerance], self.of[s, self.exact]) for s in settings]
        seeds = [d for d in self.config["seeds"] if all(d in a and d in b for a, b in pairs)]
        return [statistics.mean(value(a[d]) - value(b[d]) for a, b in pairs) for d in seeds]

    def said(self, settings: list[Setting], tolerance: float) -> str:
        """By the rule of reading; nothing as long as seeds are missing."""
        found = self.differences(settings, tolerance, pass_at_1)
        if len(found) < len(self.config["seeds"]):
            return "not run yet" if not found else "seeds are missing"
        return verdict("not worse", *interval(found), 0.0, self.config["analysis"]["margin"])

    def recommended(self) -> float | None:
        """By the rule; None: no tolerance."""
        best = None
        for tolerance in sorted(self.others):
            in_the_mean = self.said(self.settings, tolerance)
            each = [self.said([setting], tolerance) for setting in self.settings]
            if in_the_mean != "**shown**" or "**worse**" in each:
                break
            best = tolerance
        return best


def spread(values: list[float], sign: str = "") -> str:
    """Mean and interval; of fewer than three values these themselves."""
    if len(values) < ENOUGH:
        return ", ".join(f"{value:{sign}.3f}" for value in values)
    return shown(*interval(values), sign)


def name(setting: Setting) -> str:
    objective, weights = setting
    return f"{objective.upper()}, {weights}"


# Tables


def reading(found: Runs) -> str:
    """Whether a tolerance is worse than none."""
    groups = {f"all {len(found.settings)}": found.settings}
    groups |= {name(setting): [setting] for setting in found.settings}
    rows = []
    for (label, settings), tolerance in product(groups.items(), found.others):
        kept = [line["kept_columns"] for s in settings for line in found.of[s, tolerance].values()]
        sampled, right = (
            found.differences(settings, tolerance, value) for value in (pass_at_1, greedy)
        )
        row = [label, f"{tolerance:g}", f"{len(sampled)}"]
        row += [f"{statistics.mean(kept):.1%}" if kept else "", spread(sampled, "+")]
        rows.append([*row, found.said(settings, tolerance), spread(right, "+")])
    head = ["", "δ", "seeds", "columns kept", "Pass@1, δ − 0", "not worse", "greedy, δ − 0"]
    return markdown(head, rows)


def conclusion(found: Runs) -> str:
    """What is recommended, or that it is too early."""
    got, all_ = found.counted
    if got < all_:
        return (
            f"**Unfinished: {got} of {all_} runs are done. What follows says what there is, not "
            "what holds; nothing is recommended from it.**"
        )
    best = found.recommended()
    what = "no tolerance but 0" if best is None else f"a tolerance of up to {best:g}"
    return f"By the rule that was fixed before the runs, **{what} is recommended**."


def run_table(found: Runs) -> str:
    rows = []
    for (setting, tolerance), lines in found.of.items():
        cells = [
            spread([value(line) for line in lines.values()])
            for value in (pass_at_1, greedy, grad_norm)
        ]
        change = found.differences([setting], tolerance, loss) if tolerance else []
        seconds = [line["seconds_training"] for line in lines.values()]
        row = [name(setting), f"{tolerance:g}", f"{len(lines)}", *cells]
        row += [small(change), f"{statistics.mean(seconds):.0f}" if seconds else ""]
        rows.append(row)
    head = ["", "δ", "seeds", "Pass@1", "greedy", "gradient norm", "loss, δ − 0", "seconds"]
    return markdown(head, rows)


def small(values: list[float]) -> str:
    """As :func:`spread`, of differences far below 0.001."""
    if len(values) < ENOUGH:
        return ", ".join(f"{value:+.1e}" for value in values)
    mean, half = interval(values)
    return f"{mean:+.1e} ± {half:.1e}"


def head_table(found: Runs) -> str:
    """How far the head's rows went in the runs that train it; that of a row is the root of the mean
    square."""
    rows = []
    for ((objective, weights), tolerance), lines in found.of.items():
        if weights != FULL or not lines:
            continue
        exact = found.of[(objective, weights), found.exact]
        for label in ROWS:
            heads = {seed: line["head"][label] for seed, line in lines.items()}
            longer = [
                head["norm"] / exact[seed]["head"][label]["norm"]
                for seed, head in heads.items()
                if seed in exact
            ]
            count, moved = (
                statistics.mean(head[what] for head in heads.values()) for what in ("rows", "moved")
            )
            norm = statistics.mean(h["norm"] / math.sqrt(h["rows"]) for h in heads.values())
            cells = [label, f"{count:,.0f}", f"{moved / count:.2%}", f"{norm:.1e}"]
            cells += [spread(longer), spread([head["cosine"] for head in heads.values()])]
            rows.append([objective.upper(), f"{tolerance:g}", f"{len(lines)}", *cells])
    head = ["", "δ", "seeds", "tokens", "rows", "that moved", "change of a row"]
    return markdown([*head, "norm, × that of δ = 0", "cosine with it"], rows)


def untouched(found: Runs) -> str:
    """What Adam does to rows of the head whose token is in no batch, in a sentence."""
    parts = []
    for tolerance in found.config["tolerances"]:
        heads = [
            line["head"]["others"]
            for ((_, weights), of), lines in found.of.items()
            for line in lines.values()
            if weights == FULL and of == tolerance
        ]
        if heads:
            share = sum(head["moved"] for head in heads) / sum(head["rows"] for head in heads)
            cosines = [head["cosine"] for head in heads]
            how = f" (cosine {min(cosines):.2f} to {max(cosines):.2f})" if tolerance else ""
            parts.append(f"{share:.2%} at δ = {tolerance:g}{how}")
    return (
        "Rows of the head whose token is in no batch and that Adam moves all the same, where all "
        f"weights train: {', '.join(parts) or 'not run yet'}; cosine: of their change with that at "
        "δ = 0, run by run. With LoRA the head is frozen, and no row moves."
    )


# Page and figure


def report(found: Runs) -> str:
    """TOLERANCE.md."""
    config, (got, _) = found.config, found.counted
    lines = [line for of in found.of.values() for line in of.values()]
    where = dict.fromkeys(f"{line['device']}, torch {line['torch']}" for line in lines)
    before = {(line["before"]["pass@1"], line["before"]["greedy"]) for line in lines}
    begins = "; ".join(f"Pass@1 {sampled:.3f}, greedy {right:.3f}" for sampled, right in before)
    steps = config["training"]["options"]["max_steps"]
    rates = [f"{w} at {o['learning_rate']:g}" for w, o in config["training"]["weights"].items()]
    parts = [
        "# Does training notice what is left out?",
        "Generated by `python -m bench.study.tolerance_report` from `results/tolerance.jsonl`, "
        "which `python -m bench.study.tolerance` writes; the rules are in `tolerance.json`.",
        f"`humanline train` on its own model and task, {steps} steps, {', '.join(rates)}, with "
        f"`--gradient-tolerance` δ in {config['tolerances']}, seeds {config['seeds']}. ± is half a "
        f"95 % interval over seeds. Before training: {begins or 'not measured yet'}. Run on "
        f"{'; '.join(where) or 'nothing yet'}.",
        f"## {HOLDS}",
        conclusion(found),
        *([reading(found), untouched(found)] if got else []),
    ]
    if got:
        parts += [
            "## Runs",
            f"![accuracy and loss]({FIGURE})\n\nAbove: Pass@1 less that of δ = 0, by seed. Below: "
            "the loss of each step, means over seeds. Bands and bars: 95 % intervals.",
            "Pass@1 and greedy: after the last step. Gradient norm, before it is clipped, and loss "
            "are means over steps; the loss is against the policy of one step ago. Seconds: of "
            "training, one thread.",
            run_table(found),
            "## The head's rows",
            f"Last step less first; {config['rules']['head']}.",
            head_table(found),
        ]
    parts += [
        "## Rules, fixed before the runs",
        "\n".join(f"- {rule}: {text}." for rule, text in config["rules"].items()),
    ]
    return "\n\n".join(parts) + "\n"


def digest(found: Runs) -> str:
    """Of what the figure is drawn from."""
    return task.fingerprint([found.config, [[*map(str, k), v] for k, v in found.of.items()]])


def draw(found: Runs) -> None:
    """A column a kind of weights: differences of Pass@1, then the loss of each objective."""
    objectives = found.config["objectives"]
    columns = list(found.config["training"]["weights"])
    figure, axes = new_figure(1 + len(objectives), len(columns), 3.2 * (1 + len(objectives)))
    for place, weights in enumerate(columns):
        _draw_differences(axes[0][place], found, weights)
        for axis, objective in zip(axes[1:, place], objectives, strict=True):
            _draw_losses(axis, found, (objective, weights))
    axes[0][0].set_ylabel("Pass@1, less that of δ = 0")
    figure.legend(*axes[1][0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    save(figure, FIGURE, digest(found))


def _draw_differences(axis, found: Runs, weights: str) -> None:
    axis.axhline(0, color="#000000", lw=0.8)
    axis.axhline(-found.config["analysis"]["margin"], color="#888888", ls=":")
    for i, (objective, marker) in enumerate(zip(found.config["objectives"], "os", strict=True)):
        for x, (tolerance, (colour, _)) in enumerate(zip(found.others, LOOKS[1:], strict=True)):
            values = found.differences([(objective, weights)], tolerance, pass_at_1)
            place = x + (i - 0.5) / 4
            axis.plot([place] * len(values), values, "_", color="#888888", ms=9)
            if len(values) >= ENOUGH:
                mean, half = interval(values)
                axis.errorbar(place, mean, yerr=half, fmt=marker, color=colour, capsize=3)
    names = " left, ".join(o.upper() for o in found.config["objectives"])
    axis.set_xticks(range(len(found.others)), [f"δ = {d:g}" for d in found.others])
    axis.set_title(f"{weights} ({names} right)")


def _draw_losses(axis, found: Runs, setting: Setting) -> None:
    for tolerance, (colour, dashes) in zip(found.config["tolerances"], LOOKS, strict=True):
        curves = list(zip(*(r["loss"] for r in found.of[setting, tolerance].values()), strict=True))
        if not curves:
            continue
        means, x = [statistics.mean(values) for values in curves], range(1, len(curves) + 1)
        axis.plot(x, means, color=colour, ls=dashes, lw=2, label=f"δ = {tolerance:g}")
        if len(curves[0]) >= ENOUGH:
            halves = [interval(list(values))[1] for values in curves]
            bounds = ([m + s * h for m, h in zip(means, halves, strict=True)] for s in (-1, 1))
            axis.fill_between(x, *bounds, color=colour, alpha=0.12, lw=0)
    axis.set(title=f"{name(setting)}: loss", xlabel="step")


def main() -> None:
    config = read_config(CONFIG)
    found = Runs(read_results(LINES, config), config)
    (HERE / REPORT).write_text(report(found), encoding="utf-8")
    if found.counted[0]:
        draw(found)


if __name__ == "__main__":
    main()
