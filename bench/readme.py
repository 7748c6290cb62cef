"""README.md's tables, from the committed results: between ``<!-- bench:NAME -->`` and
``<!-- /bench -->``.

    python -m bench.readme           # write them
    python -m bench.readme --check   # exit code 1 if README.md says something else
"""

import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from bench.cases import SUITES
from bench.machine_code.cards import CARDS
from bench.machine_code.row_kernels import ROW_KERNELS, TOLD, reports
from bench.measure import Result
from bench.memory import long_context, reference_memory
from bench.paper import model
from bench.peers import OURS
from bench.report import find, markdown, megabytes, note_on, seconds
from bench.run import ROOT, Results, committed
from humanline.training.errors import UserError

BLOCK = re.compile(r"(<!-- bench:([\w-]+) -->\n)(.*?)(<!-- /bench -->)", re.S)
NO_GPU = "On a GPU nothing has been measured yet."


def cpu() -> str:
    return _measured("cpu") or "On a CPU nothing is committed."


def gpu() -> str:
    return _measured("gpu") or NO_GPU


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
    """Of each device the plots from hidden states; the others lie beside them."""
    found = sorted(ROOT.glob("bench/results/*/plots/*.png"))
    names = [p.relative_to(ROOT) for p in found if "-hidden-" in p.name or "roofline" in p.name]
    return "\n".join(f'<img src="{p}" alt="{p.stem}" width="49%">' for p in names)


def reference() -> str:
    return _recorded("reference-memory.json", reference_memory)


def context() -> str:
    return _recorded("long-context.json", long_context)


BLOCKS = {
    "cpu": cpu,
    "gpu": gpu,
    "plots": plots,
    "predicted": predicted,
    "scale": scale,
    "machine-code": machine_code,
    "reference": reference,
    "long-context": context,
}


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
            raise UserError(f"README.md has a block bench:{name}; known: {', '.join(BLOCKS)}")
        return f"{start}{BLOCKS[name]()}\n{end}"

    return BLOCK.sub(fill, text)


def main(argv: list[str]) -> int:
    readme = Path(ROOT / "README.md")
    text = readme.read_text(encoding="utf-8")
    wanted = generated(text)
    if "--check" in argv:
        return int(text != wanted)
    readme.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
