"""The pages' tables, from the committed results: between ``<!-- bench:NAME -->`` and
``<!-- /bench -->``, on whatever page asks for one.

    python -m bench.readme           # write them
    python -m bench.readme --check   # exit code 1 if a page says something else
"""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from bench import columns
from bench.cases import SUITES
from bench.gpu import left_out
from bench.machine_code.cards import CARDS
from bench.machine_code.row_kernels import ROW_KERNELS, TOLD, reports
from bench.measure import Result
from bench.memory import long_context, reference_memory
from bench.objectives import OBJECTIVES
from bench.paper import model
from bench.peers import OURS, PEERS
from bench.report import find, markdown, megabytes, note_on, seconds
from bench.run import ROOT, Results, committed
from humanline.training.errors import UserError

BLOCK = re.compile(r"(<!-- bench:([\w-]+) -->\n)(.*?)(<!-- /bench -->)", re.S)
FOLDERS = ("kernels", "humanline", "bench", "tests")
NO_GPU = "On a GPU nothing has been measured yet."


def pages() -> list[Path]:
    """Every page of Markdown in the repository, the front page and what is beside the code."""
    beside = (p for folder in FOLDERS for p in sorted((ROOT / folder).rglob("*.md")))
    return [*sorted(ROOT.glob("*.md")), *beside]


def cpu() -> str:
    return _measured("cpu") or "On a CPU nothing is committed."


def gpu() -> str:
    return "\n".join([_measured("gpu") or NO_GPU, *_left_out()])


def predicted() -> str:
    left_out = "With a `gradient_tolerance` that keeps a share of the columns:"
    return f"{model.floors()}\n\n{left_out}\n\n{model.columns()}\n\n{model.bandwidths()}"


def scale() -> str:
    return model.table()


def machine_code() -> str:
    """What bounds each row kernel with one Triton, and what spills with each."""
    found = reports()
    told = found[TOLD]
    records = {(r["name"], r["target"]): r for r in told["results"]}
    rows = [
        [f"`{kernel}`", *(_bound(records[variant, target]) for target in CARDS)]
        for kernel, (variant, _) in ROW_KERNELS.items()
    ]
    e = told["environment"]
    head = ["row kernel", *(f"{target} ({card.name})" for target, card in CARDS.items())]
    spilled = [
        f"`{r['name']}` on {r['target']} ({version}: {r['spills']})"
        for version, report in found.items()
        for r in report["results"]
        if r["spills"]
    ]
    return (
        f"{markdown(head, rows)}\n\n"
        "Instructions a logit and what bounds a row, read from the machine code "
        f"(V={e['vocab']:,}, {e['dtype']}, Triton {TOLD}). Registers spilled with Triton "
        f"{', '.join(found)}: {', '.join(spilled) or 'none'}."
    )


def _bound(r: dict[str, Any]) -> str:
    return f"{r['instructions_per_element']:g}, {r['bound']}"


def plots() -> str:
    """For bench/README.md: of each device the plots from hidden states; others lie beside them."""
    found = sorted(ROOT.glob("bench/results/*/plots/*.png"))
    shown = "-hidden-", "roofline", "columns"
    names = [p.relative_to(ROOT) for p in found if any(part in p.name for part in shown)]
    return "\n".join(
        f'<img src="{p.relative_to("bench")}" alt="{p.stem}" width="49%">' for p in names
    )


def reference() -> str:
    return _recorded("reference-memory.json", reference_memory)


def context() -> str:
    return _recorded("long-context.json", long_context)


def columns_left_out() -> str:
    return _recorded(columns.FILE, columns)


def tolerance() -> str:
    """What the study of ``gradient_tolerance`` finds: a section of its report."""
    report = (ROOT / "bench/study/TOLERANCE.md").read_text(encoding="utf-8")
    return report.partition("## What holds\n\n")[2].partition("\n\n## ")[0]


def headline() -> str:
    """For README.md: the figure of what the loss costs on a GPU, and what nobody timed there."""
    found = [r for r in committed() if not r.on_cpu]
    lines = []
    for results in found:
        e = results.environment
        figure = (results.path.parent / "plots/loss-tail.png").relative_to(ROOT)
        lines += [
            f'<img src="{figure}" alt="{figure.stem}" width="100%">',
            "",
            f"Measured on one {e['device']} (torch {e['torch'].split('+')[0]}), forward and "
            "backward over 8,192 tokens with a vocabulary of 151,936, in bfloat16; memory is what "
            "comes on top of the inputs. The bare GEMMs, or the bare copy, are what nobody can do "
            "without; eager is how trainers write it. Liger computes the reference of DPO too; "
            "cut-cross-entropy the log-probs, the loss is then the trainers'. "
            "[All numbers](bench/README.md#on-a-gpu).",
            "",
        ]
    return "\n".join([*lines, _not_timed(found)])


def _not_timed(found: list[Results]) -> str:
    """What of the benchmark no GPU has run."""
    done = [r for results in found for r in results.results if r.seconds is not None]
    objectives = {r.case.objective for r in done}
    peers = {r.peer for r in done}
    wanted = {
        "rows without a gradient": any(r.case.active < 1 for r in done),
        "frozen heads": any(r.case.frozen_head for r in done),
        "dtypes other than bfloat16": any(r.case.dtype != "bfloat16" for r in done),
        "more than 8,192 tokens": any(r.case.tokens > 8192 for r in done),
    }
    left = [o.upper() for o in OBJECTIVES if o not in objectives]
    left += [what for what, is_done in wanted.items() if not is_done]
    left.append(f"cards other than {', '.join(r.environment['device'] for r in found) or 'none'}")
    left.append("several GPUs")
    others = [p for p in dict.fromkeys(p.name for p in PEERS) if p not in peers]
    floors = [p for p in others if p.startswith(("bare", OURS))]
    others = [p for p in others if p not in floors]
    return (
        f"Not timed on a GPU yet: {'; '.join(left)}; and, as peers, {'; '.join(others)}. What "
        "is said of these comes from counting, from a CPU, or is marked as predicted."
    )


BLOCKS = {
    "headline": headline,
    "cpu": cpu,
    "gpu": gpu,
    "plots": plots,
    "predicted": predicted,
    "scale": scale,
    "machine-code": machine_code,
    "reference": reference,
    "long-context": context,
    "columns": columns_left_out,
    "tolerance": tolerance,
}


def _left_out() -> Iterator[str]:
    """Of each GPU: what a tolerance spared where some tokens are far likelier than others."""
    for path in sorted(ROOT.glob(f"bench/results/*/{left_out.FILE}")):
        found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        rows = [
            [
                r["case"].partition(",")[0],
                f"{r['tolerance']:g}",
                f"{r['kept']:.0%}",
                seconds(r["wall"] / 1e3),
                f"{r['hidden_error']:.1e}, {r['weight_error']:.1e}" if r["kept"] < 1 else "—",
            ]
            for r in found
        ]
        head = ["from hidden", "`gradient_tolerance`", "columns kept", "time", "errors of dH, dW"]
        yield (
            "\nWith a `gradient_tolerance`, where tokens differ in frequency as words do "
            f"(`python -m bench.gpu left_out`, `{path.relative_to(ROOT)}`; errors are relative, "
            f"from the exact gradients):\n\n{markdown(head, rows)}"
        )


def _recorded(name: str, benchmark: ModuleType) -> str:
    """Of each file of that name: where it was measured, and the benchmark's own table."""
    lines = []
    for path in sorted(ROOT.glob(f"bench/results/*/{name}")):
        record = json.loads(path.read_text(encoding="utf-8"))
        lines.append(_where(path.relative_to(ROOT), record, benchmark.COMMAND))
        lines += ["", markdown(benchmark.HEAD, benchmark.table(record["results"]))]
    return "\n".join(lines)


def _where(path: Path, record: dict[str, Any], command: str) -> str:
    e = record["environment"]
    sizes = ", ".join(f"{k.replace('_', ' ')} {v:g}" for k, v in record["sizes"].items())
    return f"`{command}` on {e['device']}, torch {e['torch'].split('+')[0]} ({sizes}; `{path}`):"


def _measured(suite: str) -> str:
    """The cases of a suite, as measured on such a device; sweeps are plots."""
    on_cpu = suite == "cpu"
    found = [r for r in committed() if r.on_cpu == on_cpu]
    return "\n".join(_tables(results, suite) for results in found)


def _tables(results: Results, suite: str) -> str:
    """A line on what and where, then a table for each entry point: cases by the peers that ran
    them."""
    e = results.environment
    path = results.path.relative_to(ROOT)
    lines = [
        f"Measured, forward + backward, torch {e['torch'].split('+')[0]}, {e['device']} "
        f"(`humanline bench --show {path}`): time; memory, what a process takes beside its inputs, "
        "gradients included; error of the gradient, relative, from float64."
    ]
    cases = [c for c in results.cases if c in SUITES[suite]]
    for entry in dict.fromkeys(c.entry for c in cases):
        of_case = {c: results.of(c) for c in cases if c.entry == entry}
        ran = _notes([r for rs in of_case.values() for r in rs if r.seconds])
        peers = sorted(ran, key=lambda name: name != OURS)
        rows = [[c.name, *(_cell(find(rs, p)) for p in peers)] for c, rs in of_case.items()]
        lines += ["", markdown([f"from {entry}", *peers], rows)]
        notes = "; ".join(f"{peer}: {ran[peer]}" for peer in peers if ran[peer])
        lines += ["", notes[0].upper() + notes[1:] + "."] if notes else []
    return "\n".join(lines)


def _notes(results: list[Result]) -> dict[str, str]:
    """Each peer's note; a peer may have one in some of its cases only."""
    notes: dict[str, str] = {}
    for r in results:
        notes[r.peer] = note_on(r) or notes.get(r.peer, "")
    return notes


def _cell(r: Result | None) -> str:
    if r is None:
        return "—"
    lines = [f"**{seconds(r.seconds)}**" if r.peer == OURS else seconds(r.seconds)]
    lines.append(megabytes(r.peak_bytes))
    if r.gradient_error is not None:
        lines.append(f"{r.gradient_error:.1e}")
    return "<br>".join(lines)


def generated(text: str) -> str:
    """``text`` with every block as it should be.

    Raises:
        UserError: a block of a name that nothing generates.
    """

    def fill(match: re.Match) -> str:
        start, name, _, end = match.groups()
        if name not in BLOCKS:
            raise UserError(f"a page has a block bench:{name}; known: {', '.join(BLOCKS)}")
        return f"{start}{BLOCKS[name]()}\n{end}"

    return BLOCK.sub(fill, text)


def main(argv: list[str]) -> int:
    differ = False
    for page in pages():
        text = page.read_text(encoding="utf-8")
        wanted = generated(text)
        if text != wanted:
            differ = True
            if "--check" not in argv:
                page.write_text(wanted, encoding="utf-8")
    return int(differ and "--check" in argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
