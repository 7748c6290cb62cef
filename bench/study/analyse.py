"""The study's report and figures, from results/final.jsonl and config.json alone.

python -m bench.study.analyse
"""

import itertools
import math
import statistics
from typing import Any

import torch

from bench.report import markdown
from bench.study import arms, task
from bench.study.run import HERE, RESULTS, final_runs, key, read_config, read_results

#: 97.5 % quantiles of Student's t for 2, 3, … degrees of freedom (any textbook's table).
T975 = (
    "4.303 3.182 2.776 2.571 2.447 2.365 2.306 2.262 2.228 2.201 2.179 2.160 2.145 2.131 2.120 "
    "2.110 2.101 2.093 2.086"
)

# Okabe and Ito's colours, told apart by every eye; the dashes tell them apart in grey.
STYLES = {
    "offline": ("#000000", ":"),
    "clip only": ("#CC79A7", (0, (6, 2, 1, 2))),
    "sync only k=1": ("#E69F00", "--"),
    "humanline k=1": ("#0072B2", "-"),
    "online": ("#009E73", "-."),
    "online + humanline k=1": ("#D55E00", (0, (5, 1, 1, 1, 1, 1))),
}
SHOWN_RATIOS = ["humanline k=1", "humanline k=16", "clip only", "sampling k=1"]


class Results:
    """The final runs, by arm; an arm's values are in the order of the seeds.

    Attributes:
        digest: of the configuration and the runs.
    """

    def __init__(self, config: dict[str, Any], lines: list[dict[str, Any]]):
        found = {key(r): r for r in lines}
        wanted = [(str(arm), *rest) for arm, *rest in final_runs(config)]
        missing = [name for name in wanted if name not in found]
        if missing:
            raise SystemExit(
                f"{len(missing)} of {len(wanted)} final runs are missing: {missing[0]} …"
            )
        self.by_arm: dict[str, list[dict]] = {}
        for name in wanted:
            self.by_arm.setdefault(name[0], []).append(found[name])
        self.digest = task.fingerprint([config, self.by_arm])

    def values(self, arm: str, name: str) -> list[float]:
        """Of each seed: the last value of a curve, its "mean", or a number."""
        if name == "mean":
            return [statistics.mean(r["pass@1"]) for r in self.by_arm[arm]]
        values = [r[name] for r in self.by_arm[arm]]
        return [v[-1] if isinstance(v, list) else v for v in values]

    def summed(self, arm: str, name: str) -> list[int]:
        return [sum(counts) for counts in zip(*(r[name] for r in self.by_arm[arm]), strict=True)]


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half of its 95 % interval, Student's t."""
    n = len(values)
    t = float(T975.split()[n - 3])
    return statistics.mean(values), t * statistics.stdev(values) / math.sqrt(n)


def sign_flip_test(differences: list[float]) -> float:
    """Two-sided p of the mean paired difference: the share of all flips of signs that give a mean
    at least as far from 0."""
    d = torch.tensor(differences, dtype=torch.float64)
    signs = torch.tensor(list(itertools.product((1.0, -1.0), repeat=len(d))), dtype=torch.float64)
    means = (signs @ d).abs()
    return (means >= d.sum().abs() - 1e-12).double().mean().item()


def holm(p_values: list[float]) -> list[float]:
    """Adjusted p-values (Holm, 1979), in the order given."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted, highest = [0.0] * len(order), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - rank) * p_values[i]))
        adjusted[i] = highest
    return adjusted


def verdict(kind: str, mean: float, half: float, p: float, margin: float) -> str:
    """What a contrast says, by the configuration's reading."""
    low, high = mean - half, mean + half
    if kind == "greater":
        return "not shown" if p >= 0.05 else "**shown**" if mean > 0 else "**the opposite**"
    if kind == "not worse":
        return "**shown**" if low > -margin else "**worse**" if high < -margin else "undecided"
    if -margin < low and high < margin:
        return "**shown**"
    apart = low > margin or high < -margin
    return f"**{'higher' if mean > 0 else 'lower'}**" if apart else "undecided"


# Tables


def shown(mean: float, half: float, sign: str = "") -> str:
    return f"{mean:{sign}.3f} ± {half:.3f}"


def arm_table(results: Results, config: dict, objective: str) -> str:
    rows = []
    for arm in arms.grid(config):
        name = str(arm)
        if arm.objective != objective:
            continue
        tuned, runs = config["tuned"][name], results.by_arm[name]
        removed = [1 - r["unclamped"] for r in runs if "unclamped" in r]
        seconds = [r["training_seconds"] + r["sampling_seconds"] for r in runs]
        ends = tuned["lr"] in (min(config["tuning"]["lrs"]), max(config["tuning"]["lrs"]))
        rows.append(
            [
                name.removeprefix(f"{objective} "),
                shown(*interval(results.values(name, "pass@1"))),
                shown(*interval(results.values(name, "mean"))),
                shown(*interval(results.values(name, "greedy"))),
                f"{tuned['lr']:g}" + ("†" if ends else ""),
                f"±{tuned['bound']:.3f}" if tuned["bound"] else "",
                f"{statistics.mean(removed):.1%}"
                if arm.perception in ("clip", "rejection")
                else "",
                f"{statistics.mean(results.values(name, 'trained_on')):,.0f}",
                f"{statistics.mean(results.values(name, 'sampled')):,.0f}",
                f"{statistics.mean(seconds):.2f}",
            ]
        )
    head = ["arm", "Pass@1", "mean of the curve", "greedy", "rate", "clip", "removed"]
    return markdown([*head, "trained on", "sampled", "CPU s"], rows)


def contrast_rows(
    results: Results, objective: str, measure: str, contrasts: list, margin: float
) -> list[list[str]]:
    """A row a contrast ``[arm, other arm, claim, kind]``, Holm over those given."""
    differences = []
    for one, other, *_ in contrasts:
        pair = (results.values(f"{objective} {arm}", measure) for arm in (one, other))
        differences.append([a - b for a, b in zip(*pair, strict=True)])
    p_values = [sign_flip_test(d) for d in differences]
    rows = []
    for (one, other, claim, kind), d, p, q in zip(
        contrasts, differences, p_values, holm(p_values), strict=True
    ):
        mean, half = interval(d)
        line = [claim, f"{one} − {other}", shown(mean, half, "+"), f"{p:.3f}", f"{q:.3f}"]
        rows.append([objective, *line, verdict(kind, mean, half, q, margin)])
    return rows


def contrast_table(results: Results, config: dict, contrasts: list, measure: str = "pass@1") -> str:
    margin = config["analysis"]["margin"]
    rows = [
        row
        for o in config["objectives"]
        for row in contrast_rows(results, o, measure, contrasts, margin)
    ]
    return markdown(["", "claim", "contrast", "difference", "p", "p, Holm", ""], rows)


def sync_contrasts(config: dict, *methods: str) -> list:
    first, *others = config["sync_every"]
    return [
        [f"{method} k={k}", f"{method} k={first}", f"k={k} costs nothing", "not worse"]
        for method in methods
        for k in others
    ]


# Figures


def new_figure(rows: int, columns: int, height: float):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"font.size": 10, "axes.grid": True, "grid.alpha": 0.3})
    return pyplot.subplots(
        rows,
        columns,
        figsize=(11, height),
        layout="constrained",
        squeeze=False,
        sharex="row",
        sharey="row",
    )


def save(figure, file: str, digest: str) -> None:
    """With a digest of what it was drawn from, which a test compares with the results."""
    figure.savefig(HERE / file, dpi=150, metadata={"Description": digest})


def draw_lines(config: dict, lines_of, file: str, digest: str, **labels: Any) -> None:
    """A panel an objective, a line an arm of ``STYLES``; ``lines_of`` an arm's name gives x, its
    means and, or None, half their intervals."""
    figure, axes = new_figure(1, len(config["objectives"]), 4.2)
    for axis, objective in zip(axes[0], config["objectives"], strict=True):
        for name, (colour, dashes) in STYLES.items():
            x, means, halves = lines_of(f"{objective} {name}")
            axis.plot(x, means, color=colour, ls=dashes, lw=2, label=name)
            if halves:
                bounds = ([m + s * h for m, h in zip(means, halves, strict=True)] for s in (-1, 1))
                axis.fill_between(x, *bounds, color=colour, alpha=0.12, lw=0)
        axis.set(title=objective, **labels)
    axes[0][0].set_ylabel("Pass@1, held out")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    save(figure, file, digest)


def draw_curves(results: Results, config: dict) -> None:
    recipe = config["training"]
    steps = range(0, recipe["steps"] + 1, recipe["evaluate_every"])

    def lines_of(name: str):
        runs = [r["pass@1"] for r in results.by_arm[name]]
        points = [interval(list(values)) for values in zip(*runs, strict=True)]
        return steps, *map(list, zip(*points, strict=True))

    draw_lines(config, lines_of, "curves.png", results.digest, xlabel="optimizer step")


def draw_rates(results: Results, config: dict) -> None:
    def lines_of(name: str):
        return config["tuning"]["lrs"], list(config["tuned"][name]["pass@1"].values()), None

    labels = {"xlabel": "learning rate", "xscale": "log"}
    draw_lines(config, lines_of, "rates.png", results.digest, **labels)


def draw_accuracy(results: Results, config: dict) -> None:
    figure, axes = new_figure(1, len(config["objectives"]), 4.2)
    for axis, objective in zip(axes[0], config["objectives"], strict=True):
        names = [str(a) for a in arms.grid(config) if a.objective == objective]
        for y, name in enumerate(names):
            values = results.values(name, "pass@1")
            mean, half = interval(values)
            axis.plot(values, [y] * len(values), "|", color="#888888", ms=7)
            axis.errorbar(mean, y, xerr=half, fmt="o", color="#0072B2", capsize=3)
        labels = [name.removeprefix(f"{objective} ") for name in names]
        axis.set(title=objective, xlabel="Pass@1 after the last step")
        axis.set_yticks(range(len(names)), labels)
    axes[0][0].invert_yaxis()
    save(figure, "accuracy.png", results.digest)


def draw_log_ratios(results: Results, config: dict) -> None:
    objectives = list(config["objectives"])
    figure, axes = new_figure(len(objectives), len(SHOWN_RATIOS), 7.5)
    centres = range(len(arms.EDGES) + 1)
    ticks = {f"{s * 10.0**e:g}": s * 10.0**e for s in (-1, 1) for e in (-3, -1, 1)}
    where = [torch.bucketize(torch.tensor(t), arms.EDGES).item() - 0.5 for t in ticks.values()]
    for line, objective in zip(axes, objectives, strict=True):
        for axis, name in zip(line, SHOWN_RATIOS, strict=True):
            every, removed = (
                results.summed(f"{objective} {name}", n) for n in ("histogram", "removed")
            )
            total = sum(every)
            axis.bar(centres, [x / total for x in every], 1.0, color="#56B4E9", label="all tokens")
            style = {"color": "#D55E00", "hatch": "////", "edgecolor": "white", "linewidth": 0}
            axis.bar(centres, [x / total for x in removed], 1.0, label="removed", **style)
            axis.set_title(f"{objective} {name}: {sum(removed) / total:.0%} removed", fontsize=9)
            axis.set_xticks(where, ticks, fontsize=8)
        line[0].set_ylabel("share of tokens")
    for axis in axes[-1]:
        axis.set_xlabel("log-ratio (bins even in its logarithm)", fontsize=8)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    save(figure, "log-ratios.png", results.digest)


# The report


def drift_table(results: Results, config: dict) -> str:
    rows = []
    for arm in arms.grid(config):
        if arm.method in ("offline", "sync only"):
            mean, half = interval(results.values(str(arm), "drift"))
            rows.append([str(arm), f"{config['tuned'][str(arm)]['lr']:g}", shown(mean, half)])
    quantile = config["tuning"]["drift_quantile"]
    return markdown(
        ["arm without clipping", "rate", f"{quantile:.0%} quantile of abs. log-ratio"], rows
    )


def tuning_table(config: dict) -> str:
    lrs = config["tuning"]["lrs"]
    rows = [
        [
            arm,
            *(
                f"**{s:.3f}**" if float(lr) == t["lr"] else f"{s:.3f}"
                for lr, s in t["pass@1"].items()
            ),
        ]
        for arm, t in config["tuned"].items()
    ]
    return markdown(["arm", *(f"{lr:g}" for lr in lrs)], rows)


def report(results: Results, config: dict) -> str:
    analysis, recipe, pool = config["analysis"], config["training"], config["task"]
    first = next(iter(results.by_arm))
    base = interval([r["pass@1"][0] for r in results.by_arm[first]])
    greedy = interval([r["greedy"][0] for r in results.by_arm[first]])
    cpu = sum(
        r["training_seconds"] + r["sampling_seconds"]
        for runs in results.by_arm.values()
        for r in runs
    )
    parts = [
        "# Humanline in miniature: the report",
        "Generated by `analyse.py`; what it means is in [README.md](README.md).",
        f"{len(config['seeds'])} seeds, {recipe['steps']} steps of {recipe['prompts']} prompts × "
        f"{pool['samples']} completions. The base model's Pass@1 is {shown(*base)}, greedy "
        f"{shown(*greedy)}. {sum(map(len, results.by_arm.values()))} runs, {cpu / 60:.1f} CPU "
        "minutes of training and sampling (one thread a process). ± is half a 95 % interval over "
        "seeds, which differ in their base models too.",
        "## Contrasts",
        f"Pass@1 after the last step, paired by seed. Test: {analysis['test']}. Reading: "
        f"{analysis['reading']}.",
        contrast_table(results, config, analysis["contrasts"]),
        "![accuracy](accuracy.png)\n\nA tick is a seed, a dot the mean with its 95 % interval.",
        "## Sync interval",
        contrast_table(results, config, sync_contrasts(config, "humanline", "sync only")),
        "Added later (see the rules), descriptive:",
        contrast_table(results, config, sync_contrasts(config, "online + humanline")),
        "## Learning curves",
        "![learning curves](curves.png)\n\nBands: 95 % intervals over seeds.",
        "The contrasts once more on the secondary measure, the mean of the curve (speed):",
        contrast_table(results, config, analysis["contrasts"], "mean"),
        "## Arms",
        "Mean of the curve: speed. Removed: share of completion tokens clipped or rejected (for "
        "sampling in a second draw). Trained on, sampled: completions a run. The offline pool cost "
        f"{pool['prompts'] * pool['samples']:,} samples once a seed. CPU seconds of a run, "
        "evaluation left out. †: a rate at an end of the list.",
        *(f"### {o}\n\n{arm_table(results, config, o)}" for o in config["objectives"]),
        "## Log-ratios and what perception removed",
        "![log-ratios](log-ratios.png)\n\nOver all steps but the first and all seeds.",
        f"Drift, from which the clip bounds were set on the tuning seeds: first "
        f"{config['tuning']['drift_steps']} steps, here on the final seeds.",
        drift_table(results, config),
        "## Tuning",
        f"Pass@1 after the last step, mean of seeds {config['tuning']['seeds']}, by learning rate; "
        "the chosen one in bold.",
        "![learning rates](rates.png)",
        tuning_table(config),
        "## Rules, fixed before the final run",
        "\n".join(f"- {name}: {text}." for name, text in config["rules"].items()),
    ]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    config = read_config()
    results = Results(config, read_results(RESULTS / "final.jsonl", config))
    draw_accuracy(results, config)
    draw_curves(results, config)
    draw_log_ratios(results, config)
    draw_rates(results, config)
    (HERE / "REPORT.md").write_text(report(results, config), encoding="utf-8")


if __name__ == "__main__":
    main()
