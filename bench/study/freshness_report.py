"""FRESHNESS.md, JUDGED.md and their figures, from results/*.jsonl and the rules alone.

python -m bench.study.freshness_report
"""

import statistics
from typing import Any

from bench.report import markdown
from bench.study import task
from bench.study.analyse import interval, new_figure, save, shown, verdict
from bench.study.freshness_arms import (
    HUMANLINE,
    NARROW,
    PLAIN,
    RULES,
    SYNC,
    WITHIN,
    Arm,
    Done,
    age,
    config_of,
    grid,
    lines_of,
)
from bench.study.run import HERE, read_results

LOOKS = {
    PLAIN: ("#000000", ":"),
    SYNC: ("#E69F00", "--"),
    HUMANLINE: ("#0072B2", "-"),
    NARROW: ("#CC79A7", (0, (6, 2, 1, 2))),
}


class Runs:
    """The final runs that are done, by arm and seed."""

    def __init__(self, rules: str, done: Done):
        self.rules, self.done, self.config = rules, done, done.config
        self.measure, self.also = self.config["analysis"]["measures"]
        self.of: dict[Arm, dict[int, dict[str, Any]]] = {}
        for objective in self.config["objectives"]:
            for arm in grid(self.config, objective):
                lr = done.rate(arm)
                names = {s: (str(arm), s, lr, done.bound(arm, lr)) for s in self.config["seeds"]}
                found = {s: done[n] for s, n in names.items() if lr is not None and n in done}
                self.of[arm] = found

    @property
    def counted(self) -> tuple[int, int]:
        """Runs that are done, and all."""
        return sum(map(len, self.of.values())), len(self.of) * len(self.config["seeds"])

    def started(self, objective: str) -> bool:
        """Whether one of its final runs is done."""
        return any(arm.objective == objective and of for arm, of in self.of.items())

    def values(self, arm: Arm, name: str) -> dict[int, float]:
        """Of each seed: the last value of a curve, its "mean", or a number."""

        def value(run):
            found = run[self.measure if name == "mean" else name]
            if isinstance(found, list):
                return statistics.mean(found) if name == "mean" else found[-1]
            return found

        return {seed: value(run) for seed, run in self.of[arm].items()}

    def curves(self, arm: Arm) -> list[list[float]]:
        """Of each seed; none of an arm that the rules do not have."""
        return [run[self.measure] for run in self.of.get(arm, {}).values()]


def arm_of(config: dict[str, Any], objective: str, name: str) -> Arm:
    """Of a name without the objective."""
    return next(a for a in grid(config, objective) if str(a) == f"{objective} {name}")


def contrast_rows(runs: Runs, objective: str, contrasts: list, measure: str) -> list[list[str]]:
    rows = []
    for one, other, claim, kind in contrasts:
        pair = [runs.values(arm_of(runs.config, objective, a), measure) for a in (one, other)]
        both = sorted(pair[0].keys() & pair[1].keys())
        row = [claim, f"{one} − {other}", f"{len(both)}"]
        if len(both) < 3:
            rows.append([*row, "", "not run yet"])
            continue
        mean, half = interval([pair[0][s] - pair[1][s] for s in both])
        apart = 0.0 if abs(mean) > half else 1.0  # in place of a p: the interval excludes 0
        said = verdict(kind, mean, half, apart, runs.config["analysis"]["margin"])
        if len(both) < len(runs.config["seeds"]):
            said = "seeds are missing"
        rows.append([*row, shown(mean, half, "+"), said])
    return rows


def arm_table(runs: Runs, objective: str) -> str:
    rows = []
    for arm in grid(runs.config, objective):
        of, lr = runs.of[arm], runs.done.rate(arm)
        if lr is None:
            continue
        row = [str(arm).removeprefix(f"{objective} "), f"{lr:g}"]
        bound = runs.done.bound(arm, lr)
        row.append(f"±{bound:.3f}" if bound else "")
        row.append(f"{len(of)}")
        if not of:
            rows.append([*row, *[""] * 7])
            continue
        for name in (runs.measure, "mean", runs.also):
            values = list(runs.values(arm, name).values())
            row.append(shown(*interval(values)) if len(values) > 2 else _plain(values))
        removed = [1 - r["unclamped"] for r in of.values() if "unclamped" in r]
        row.append(f"{statistics.mean(removed):.1%}" if arm.method in WITHIN else "")

        def mean(name, of=of):
            return statistics.mean(r[name] for r in of.values())

        row += [f"{mean('trained_on'):,.0f}", f"{mean('tokens_sampled'):,.0f}"]
        row.append(f"{mean('sampling_seconds'):.0f} + {mean('training_seconds'):.0f}")
        rows.append(row)
    head = ["arm", "rate", "clip", "seeds", runs.measure, "mean of its curve", runs.also, "clipped"]
    return markdown([*head, "trained on", "tokens sampled", "CPU s"], rows)


def _plain(values: list[float]) -> str:
    return ", ".join(f"{value:.3f}" for value in values)


def tuning_table(runs: Runs, objective: str) -> str:
    rows, k = [], runs.config["sync_every"][0]
    tried = {a: runs.done.tried(a) for a in grid(runs.config, objective) if a.sync_every in (0, k)}
    lrs = sorted({lr for scores, _ in tried.values() for lr in scores})
    for arm, (scores, settled) in tried.items():
        best = runs.done.rate(arm) if settled else None
        cells = []
        for lr in lrs:
            score = scores.get(lr)
            text = "" if score is None else f"{score:.3f}"
            cells.append(f"**{text}**" if lr == best else text)
        end = " (an end of its list)" if settled and best in (min(scores), max(scores)) else ""
        rows.append([str(arm) + end, *cells])
    return markdown(["arm", *(f"{lr:g}" for lr in lrs)], rows)


def speed(runs: Runs) -> str:
    """Tokens a second, of all runs that sampled."""
    tokens = sum(r["tokens_sampled"] for r in runs.done.values())
    seconds = sum(r["sampling_seconds"] for r in runs.done.values())
    return f"{tokens / seconds:.0f} tokens a CPU second" if tokens else "nothing was sampled yet"


def report(runs: Runs) -> str:
    config, (got, all_) = runs.config, runs.counted
    training, options, analysis = config["training"], config["task"], config["analysis"]
    where = dict.fromkeys(f"{r['device']}, torch {r['torch']}" for r in runs.done.values())
    unfinished = (
        f"**Unfinished: {got} of {all_} final runs are done. A contrast says what holds "
        "where all its seeds are there, and nothing before.** The command of the first line goes "
        "on with the rest."
    )
    parts = [
        f"# {config['title']}",
        f"Generated by `python -m bench.study.freshness_report` from `results/{runs.rules}.jsonl`, "
        f"which `python -m bench.study.freshness --rules {runs.rules}` writes; the rules are in "
        f"`{runs.rules}.json`.",
        *([unfinished] if got < all_ else []),
        f"The last {options['blocks']} blocks of SmolLM2-135M-Instruct, {training['steps']} steps "
        f"of {training['prompts']} prompts × {options['samples']} completions, seeds "
        f"{config['seeds']}. All arms of a seed train on the same prompts in the same order and "
        "draw as many completions; an arm draws those of its next n steps at once. Measured: "
        f"{analysis['primary']}. ± is half a 95 % interval over seeds. Sampling, of prompts that "
        f"are read once for all arms of a seed: {speed(runs)}. "
        f"Run on {'; '.join(where) or 'nothing yet'}.",
    ]
    for objective in config["objectives"]:
        parts.append(f"## {objective}")
        started = runs.started(objective)
        for kind in ("contrasts", "further") if started else ():
            rows = contrast_rows(runs, objective, analysis[kind], runs.measure)
            parts += [f"{analysis['titles'][kind]}:", _contrasts(rows)]
        if started:
            rows = contrast_rows(runs, objective, analysis["contrasts"], "mean")
            parts += ["The main contrasts on the mean of the curve (speed):", _contrasts(rows)]
            parts.append(arm_table(runs, objective))
        tuned = any(name[0].startswith(objective) for name in runs.done)
        parts.append(
            f"Tuning, seed {config['tuning']['seeds'][0]}:\n\n{tuning_table(runs, objective)}"
            if tuned
            else "Not run yet."
        )
    if got:
        parts.insert(4 if got < all_ else 3, f"![learning curves]({runs.rules}.png)")
    parts += [
        "## Rules, fixed before the final runs",
        "\n".join(f"- {name}: {text}." for name, text in config["rules"].items()),
    ]
    return "\n\n".join(parts) + "\n"


def _contrasts(rows: list[list[str]]) -> str:
    return markdown(["claim", "contrast", "seeds", "difference", ""], rows)


def digest(runs: Runs) -> str:
    """Of what the figure is drawn from."""
    return task.fingerprint([runs.config, {str(arm): of for arm, of in runs.of.items()}])


def draw(runs: Runs) -> None:
    """A panel a sampling interval, a line an arm (k=1); bands where there are three seeds."""
    config = runs.config
    rare = [every for every in config["sample_every"] if every != 1]
    objectives = list(filter(runs.started, config["objectives"]))
    figure, axes = new_figure(len(objectives), len(rare), 3.4 * len(objectives))
    recipe, k = config["training"], config["sync_every"][0]
    x = range(0, recipe["steps"] + 1, recipe["evaluate_every"])
    for line, objective in zip(axes, objectives, strict=True):
        for axis, every in zip(line, rare, strict=True):
            _curve(axis, x, runs.curves(Arm(objective, 1, PLAIN, 0)), "fresh", "#009E73", "-.")
            for method, (colour, dashes) in LOOKS.items():
                arm = Arm(objective, every, method, 0 if method == PLAIN else k)
                _curve(axis, x, runs.curves(arm), method, colour, dashes)
            axis.set(title=f"{objective}, sampled {age(every)}", xlabel="optimizer step")
            axis.set_ylim(bottom=0)
        line[0].set_ylabel(f"{config['analysis']['titles']['measure']}, held out")
    handles = {}
    for line in axes:
        for axis in line:
            handles |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=5)
    save(figure, f"{runs.rules}.png", digest(runs))


def _curve(axis, x, of: list[list[float]], label: str, colour: str, dashes: str) -> None:
    if not of:
        return
    curves = list(zip(*of, strict=True))
    means = [statistics.mean(values) for values in curves]
    axis.plot(x, means, color=colour, ls=dashes, lw=2, label=label)
    if len(of) > 2:
        halves = [interval(list(values))[1] for values in curves]
        bounds = ([m + s * h for m, h in zip(means, halves, strict=True)] for s in (-1, 1))
        axis.fill_between(x, *bounds, color=colour, alpha=0.12, lw=0)


def read(rules: str) -> Runs:
    config = config_of(rules)
    return Runs(rules, Done(read_results(lines_of(rules), config), config))


def main() -> None:
    for rules in RULES:
        runs = read(rules)
        (HERE / f"{rules.upper()}.md").write_text(report(runs), encoding="utf-8")
        if runs.counted[0]:
            draw(runs)


if __name__ == "__main__":
    main()
