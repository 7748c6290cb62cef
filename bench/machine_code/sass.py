"""The hot loops of a kernel, read from NVIDIA machine code as ``cuobjdump -sass`` prints it.

A hot loop of a row kernel is one that loads tiles of a row. Its loads of the row carry a cache
policy (``.EF``, ``.EL``), which no other load does; a loop has as many of them as tiles are in
flight. Beside the main loop over whole tiles there is one for what is left of the row, whose loads
are predicated.
"""

import re
from collections import Counter
from dataclasses import dataclass

# Pipes of an SM's quarter, by the instruction's name up to its first dot.
PIPES = {
    "FMA": r"FFMA\d*|FADD\d*|FMUL\d*|IMAD|HFMA2|HADD2|HMUL2",
    "MUFU": r"MUFU",
    "LSU": r"LDG|STG|LDS|STS|LDL|STL|SHFL|ATOM\w*|RED",
    "control": r"BRA|BAR|BSSY|BSYNC|EXIT|NOP|WARPSYNC|DEPBAR",
    "uniform": r"U[A-Z]\w*|R2UR|S2UR",
}
WIDTHS = {"64": 8, "128": 16, "256": 32, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);", re.M)


@dataclass(frozen=True)
class Loop:
    """A hot loop.

    ``elements`` of a row that a thread takes an iteration, in ``loads`` of ``load_bytes``, of which
    ``loads_before_use`` are issued before the first of them is used; instructions an iteration in
    all and by pipe (``ALU`` is what no other pipe does); shuffles and barriers among them.
    """

    elements: int
    loads: int
    load_bytes: int
    loads_before_use: int
    instructions: int
    pipes: dict[str, int]
    shuffles: int
    barriers: int

    @property
    def per_element(self) -> float:
        return self.instructions / self.elements


def hot_loops(code: str, element_bytes: int) -> list[Loop]:
    """The main loops over a row, one a pass; those for what is left of it if there are no others
    (an odd length, a head's options)."""
    found: dict[bool, list[Loop]] = {False: [], True: []}
    lines = [(int(at, 16), *rest) for at, *rest in INSTRUCTION.findall(code)]
    place = {at: i for i, (at, *_) in enumerate(lines)}
    for end, (at, _, name, rest) in enumerate(lines):
        target = re.search(r"0x([0-9a-f]+)\s*$", rest.strip()) if name.startswith("BRA") else None
        if target and int(target[1], 16) < at:
            body = lines[place[int(target[1], 16)] : end + 1]
            loads = [predicate for _, predicate, name, _ in body if _is_row_load(name)]
            if loads:
                found[any(loads)].append(_loop([line[2:] for line in body], element_bytes))
    return found[False] or found[True]


def _is_row_load(name: str) -> bool:
    return bool(re.match(r"LDG\.E\.E[FL]", name))


def _loop(body: list[tuple], element_bytes: int) -> Loop:
    loads = [i for i, (name, _) in enumerate(body) if _is_row_load(name)]
    size = min(_width(body[i][0]) for i in loads)
    names = [name.split(".")[0] for name, _ in body]
    pipes = Counter(_pipe(name) for name in names)
    return Loop(
        elements=len(loads) * size // element_bytes,
        loads=len(loads),
        load_bytes=size,
        loads_before_use=_before_use(body, loads),
        instructions=len(body),
        pipes=dict(sorted(pipes.items())),
        shuffles=names.count("SHFL"),
        barriers=names.count("BAR"),
    )


def _width(name: str) -> int:
    return next((WIDTHS[part] for part in name.split(".") if part in WIDTHS), 4)


def _pipe(name: str) -> str:
    return next((pipe for pipe, pattern in PIPES.items() if re.fullmatch(pattern, name)), "ALU")


def _before_use(body: list[tuple], loads: list[int]) -> int:
    """Loads issued before an instruction reads what one of them has loaded."""
    loaded: set[int] = set()
    count = 0
    for i, (name, rest) in enumerate(body[loads[0] :], loads[0]):
        if i in loads:
            first = int(re.match(r"\s*R(\d+)", rest)[1])
            loaded.update(range(first, first + max(_width(name) // 4, 1)))
            count += 1
        elif loaded.intersection(map(int, re.findall(r"\bR(\d+)", rest))):
            return count
    return count
