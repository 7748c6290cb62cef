"""Time and memory of the loss tail, predicted from shapes, a device and an interconnect.

    python -m bench.paper.model [RESULTS.json …]

first against what was measured, then up to 1,024 GPUs.

Kernels come one after the other. Each takes the longest of what it does: multiplying, at the
device's GEMM rate; moving, at its copy bandwidth; of a row kernel, whose instructions the compile
report counts, issuing and exponentials. Of the rest a GPU hides all but a share. Small kernels take
what a launch takes. A GPU is not faster than its host launches; then come collectives, at the
link's rate.

Rates of a results file are those of its own bare GEMMs and bare copy; of the predictions, those of
``H100`` and ``B200`` below, none of which this library was measured on. On a CPU the softmax's
arithmetic is left out, and the errors printed say by how much that is wrong.
"""

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from bench.cases import Case
from bench.machine_code.cards import CARDS, Card
from bench.machine_code.row_kernels import TOLD, reports
from bench.paper.costs import COSTS, Cost, Kernel, Tail, with_columns_left_out
from bench.paper.layouts import (
    Collective,
    engines_sum,
    gathered_head,
    shared_rows,
    split_vocabulary,
    travelling_rows,
)
from bench.peers import OURS
from bench.report import floor, markdown, megabytes, seconds
from bench.run import Results, committed
from humanline.ops import WORKSPACE_BYTES
from humanline.ops.hidden.gathered import rows_send_less


@dataclass(frozen=True)
class RowLoop:
    """A pass of a row kernel: instructions and exponentials an element of the row; bytes that its
    loads keep in flight on an SM."""

    instructions: float
    exponentials: float
    in_flight: float


def compiled_loops(target: str) -> dict[tuple[str, int], RowLoop]:
    """Those of the committed compile report, by the kernel's name and the pass."""
    return {
        (r["name"], i): RowLoop(
            loop["instructions"] / loop["elements"],
            loop["pipes"].get("MUFU", 0) / loop["elements"],
            r["bytes_in_flight"],
        )
        for r in reports()[TOLD]["results"]
        if r["target"] == target
        for i, loop in enumerate(r["loops"])
    }


@dataclass(frozen=True)
class Device:
    """What predictions are made from.

    Attributes:
        gemm: FLOP/s of the inputs' dtype.
        copy: bytes/s, read and written.
        gemm_float32: FLOP/s.
        exposed: share of what a kernel does beside its longest part that adds to its time.
        launch: seconds that a kernel too small to take any still takes on the device.
        host_launch: seconds that the host takes to launch any.
        card: what issues the row kernels' instructions; None to leave them out.
        loops: of row kernels.
    """

    name: str
    gemm: float
    copy: float
    gemm_float32: float
    is_cpu: bool = False
    exposed: float = 0
    launch: float = 0
    host_launch: float = 0
    card: Card | None = None
    loops: dict[tuple[str, int], RowLoop] = field(default_factory=dict, repr=False)

    def seconds(self, kernel: Kernel) -> float:
        """Of a kernel whose parts overlap, but for a share."""
        rate = self.gemm_float32 if kernel.wide else self.gemm
        parts = [kernel.flops / rate, *self._row_seconds(kernel)]
        longest = max(parts)
        return longest + self.exposed * (sum(parts) - longest)

    def _row_seconds(self, kernel: Kernel) -> Iterator[float]:
        """Moving; of a row kernel, issuing and exponentials."""
        moving = kernel.bytes / self.copy
        loop = self.loops.get(kernel.loop)
        if loop is None or self.card is None:
            yield moving
            return
        yield max(moving, self.card.waiting(kernel.read, loop.in_flight))
        yield self.card.issuing(kernel.elements * loop.instructions)
        yield self.card.exponentials(kernel.elements * loop.exponentials)


@dataclass(frozen=True)
class Link:
    """What a collective moves, bytes/s out of one GPU, and what it costs to start, seconds."""

    bandwidth: float
    latency: float

    def seconds(self, collective: Collective) -> float:
        """Of a ring."""
        return collective.sent / self.bandwidth + (collective.ways - 1) * self.latency


# One H100 SXM was measured, by others, to copy at 3.0 TB/s and to multiply 8192³ in bf16 at 798
# TFLOP/s. All else are estimates, chosen to reproduce a review of an earlier schedule from its
# machine code (tests/bench/test_model_review.py): 700 TFLOP/s when multiplying goes on for long,
# what overlaps, what a launch costs. float32, which torch multiplies without tensor cores unless
# told otherwise, is of the datasheet.
H100 = Device(
    "H100",
    gemm=700e12,
    copy=3.0e12,
    gemm_float32=67e12,
    exposed=0.22,
    launch=2.2e-6,
    host_launch=10e-6,
    card=CARDS["sm_90"],
    loops=compiled_loops("sm_90"),
)
# The same shares of the datasheet's rates.
B200 = replace(
    H100,
    name="B200",
    gemm=1590e12,
    copy=7.2e12,
    gemm_float32=80e12,
    card=CARDS["sm_100"],
    loops=compiled_loops("sm_100"),
)
# Datasheet rates, one direction: NVLink 4 within a node of 8, one 400 Gb/s port a GPU beyond.
NVLINK, NETWORK = Link(450e9, 5e-6), Link(50e9, 20e-6)
NODE = 8
VALUES = {"sft": 0, "dpo": 1, "kto": 1, "grpo": 2}  # floats a row of a batch


@dataclass(frozen=True)
class Layout:
    """How tokens and vocabulary are spread over ``tokens × vocab`` GPUs.

    Args:
        tokens: ways the tokens are split, by data or sequence parallelism: for the loss tail the
            two are one.
        vocab: ways the head's rows are split (tensor parallel); every GPU of such a group has all
            of the group's tokens.
        sharded: the head is split over the ``tokens`` ways too, by FSDP2.
    """

    tokens: int = 1
    vocab: int = 1
    sharded: bool = False

    @property
    def gpus(self) -> int:
        return self.tokens * self.vocab

    def rows_travel(self, case: Case) -> bool:
        """Whether ``from_hidden`` leaves a sharded head where it lies."""
        b, alone = case.torch_dtype.itemsize, self.vocab == 1
        fewer = rows_send_less(case.tokens, case.vocab, b, b, head_trains=not case.frozen_head)
        return self.sharded and alone and fewer

    def collectives(self, case: Case) -> dict[str, list[Collective]]:
        """Of a step, on each GPU: over the ``vocab`` ways, and over the ``tokens`` ways."""
        b, width = case.torch_dtype.itemsize, case.hidden
        rows, vocab = case.tokens / self.tokens, case.vocab / self.vocab
        found: dict[str, list[Collective]] = {"vocab": [], "tokens": []}
        if self.vocab > 1:
            found["vocab"] += split_vocabulary(rows, width, b, self.vocab)
        if self.tokens > 1:
            travel = self.rows_travel(case)
            values = VALUES[case.objective] + (not travel)
            found["tokens"] += shared_rows(rows, values, self.tokens)
            if travel:
                found["tokens"] += travelling_rows(rows, case.tokens, width, b, self.tokens)
            elif self.sharded:
                found["tokens"] += gathered_head(vocab, width, b, self.tokens)
            elif not case.frozen_head:
                found["tokens"] += engines_sum(vocab, width, b, self.tokens)
        return found


@dataclass(frozen=True)
class Prediction:
    """Of one GPU: seconds by term, bytes beside hidden states, labels and the head's own shard.

    Attributes:
        launches: of small kernels, on the device.
        host: all launches, while the device works.
    """

    gemm: float
    passes: float
    collectives: float
    bytes: float
    launches: float = 0
    host: float = 0

    @property
    def seconds(self) -> float:
        return max(self.gemm + self.passes + self.launches, self.host) + self.collectives


def work(case: Case, who: str, is_cpu: bool) -> tuple[float, float]:
    """FLOPs multiplied and bytes moved by forward and backward on one device."""
    cost = COSTS[who](Tail(case, case.tokens, case.vocab, is_cpu))
    kernels = cost.gemms + cost.passes
    return sum(k.flops for k in kernels), sum(k.bytes for k in kernels)


def predict(
    case: Case,
    device: Device,
    who: str = OURS,
    layout: Layout = Layout(),
    workspace: int = WORKSPACE_BYTES,
) -> Prediction:
    """The loss tail of one step, ``case.tokens`` over all GPUs, on each of them.

    Raises:
        KeyError: ``who`` is not one of ``COSTS``.
    """
    rows, vocab = case.tokens / layout.tokens, case.vocab / layout.vocab
    travel = layout.rows_travel(case)
    if travel:
        rows, vocab = case.tokens, case.vocab / layout.tokens
    t = Tail(case, rows, vocab, device.is_cpu, workspace)
    p = combined(COSTS[who](t), device)
    held = 2 * t.hidden * t.b * travel  # hidden states of all ranks, and their gradient
    held += t.weight * t.b * (layout.sharded and not travel)
    sent = {} if t.from_logits else layout.collectives(case)
    links = {
        "vocab": NVLINK if layout.vocab <= NODE else NETWORK,
        "tokens": NVLINK if layout.gpus <= NODE else NETWORK,
    }
    collectives = sum(links[axis].seconds(c) for axis, found in sent.items() for c in found)
    return replace(p, collectives=collectives, bytes=p.bytes + held)


def combined(cost: Cost, device: Device) -> Prediction:
    """What a device by itself makes of it."""
    launches = len(cost.gemms) + len(cost.passes) + cost.small
    return Prediction(
        gemm=sum(map(device.seconds, cost.gemms)),
        passes=sum(map(device.seconds, cost.passes)),
        launches=cost.small * device.launch,
        host=launches * device.host_launch,
        collectives=0,
        bytes=cost.peak,
    )


def calibrated(results: Results, case: Case) -> Device | None:
    """The device of a results file, from the floors measured in the case's dtype; None without
    them."""
    base = _base(results)
    copies = _rates(results, base, "logits")
    base = replace(base, copy=copies.get(case.dtype, math.inf))
    gemms = _rates(results, base, "hidden")
    if case.dtype not in copies or (case.entry == "hidden" and case.dtype not in gemms):
        return None
    gemm = gemms.get(case.dtype, math.inf)  # from logits nothing is multiplied
    return replace(base, gemm=gemm, gemm_float32=gemms.get("float32", gemm))


def _base(results: Results) -> Device:
    """What a file of results does not say: a GPU that is not listed is taken for an H100."""
    name = results.environment["device"]
    if results.on_cpu:
        return Device(name, math.inf, math.inf, math.inf, is_cpu=True)
    return replace(B200 if B200.name in name else H100, name=name)


def _rates(results: Results, base: Device, entry: str) -> dict[str, float]:
    """The highest that floors attain, by dtype: bytes/s from logits; from hidden states FLOP/s,
    without what of their moving is exposed."""
    rates: dict[str, float] = {}
    for case in results.cases:
        found = floor(results.of(case))
        if case.entry == entry and found is not None:
            flops, moved = work(case, found.peer, results.on_cpu)
            if entry == "logits":
                rate = moved / found.seconds
            else:
                rate = flops / (found.seconds - base.exposed * moved / base.copy)
            rates[case.dtype] = max(rates.get(case.dtype, 0.0), rate)
    return rates


def check(results: Results) -> list[str]:
    """Every measured point beside its prediction, with the error of time and of memory."""
    lines = [f"{results.environment['device']}: predicted / measured"]
    for case in results.cases:
        device = calibrated(results, case)
        for r in results.of(case):
            if r.peer not in COSTS or r.seconds is None:
                continue
            rates = device or Device("memory only", 1, 1, 1, results.on_cpu)
            p = predict(case, rates, r.peer)
            time = f"{p.seconds / r.seconds - 1:+7.0%}" if device else "no floor"
            measured = r.recorded_peak_bytes or r.peak_bytes
            lines.append(
                f"  {case.name + ', ' + r.peer:76s} time {time:>8s}  "
                f"memory {p.bytes / measured - 1:+7.0%}"
            )
    return lines


SCALES = [  # tokens, hidden, vocabulary, layout
    (8_192, 4_096, 151_936, Layout()),
    (131_072, 4_096, 151_936, Layout(tokens=8)),
    (131_072, 4_096, 151_936, Layout(tokens=8, sharded=True)),
    (131_072, 4_096, 151_936, Layout(vocab=8)),
    (1_048_576, 8_192, 262_144, Layout(tokens=64, sharded=True)),
    (1_048_576, 8_192, 262_144, Layout(tokens=8, vocab=8, sharded=True)),
    (1_048_576, 8_192, 262_144, Layout(tokens=128, vocab=8)),
    (1_048_576, 8_192, 262_144, Layout(tokens=128, vocab=8, sharded=True)),
    (1_048_576, 8_192, 262_144, Layout(tokens=1024, sharded=True)),
]


def scales() -> list[tuple[Case, Layout, Prediction, Prediction]]:
    """humanline and eager GRPO in bf16 on H100s, from one to 1,024."""
    rows = []
    for n, h, v, layout in SCALES:
        case = Case("grpo", "hidden", n, h, v, "bfloat16")
        rows.append((case, layout, *(predict(case, H100, who, layout) for who in (OURS, "eager"))))
    return rows


def table() -> str:
    """The predictions in Markdown."""
    head = ["tokens × H × V", "GPUs", "tokens / vocabulary split", "GEMMs", "logits"]
    head += ["sent by a GPU", "collectives", "memory a GPU", "eager's"]
    rows = []
    for case, layout, ours, eager in scales():
        times = [seconds(x) if x else "0" for x in (ours.gemm, ours.passes, ours.collectives)]
        sent = megabytes(sum(c.sent for axis in layout.collectives(case).values() for c in axis))
        shape = f"{case.tokens:,} × {case.hidden:,} × {case.vocab:,}"
        memory = [megabytes(ours.bytes), megabytes(eager.bytes)]
        split = f"{layout.tokens}{_head(layout, case)} / {layout.vocab}"
        rows.append([shape, f"{layout.gpus:,}", split, *times[:2], sent, times[2], *memory])
    return markdown(head, rows)


def _head(layout: Layout, case: Case) -> str:
    """What becomes of a head that is sharded."""
    if not layout.sharded:
        return ""
    return " (FSDP2, rows travel)" if layout.rows_travel(case) else " (FSDP2, head gathered)"


WIDTHS = 1_024, 2_048, 4_096, 8_192
KEPT = 0.25, 0.14  # on a real model's rows at a tolerance of 1e-3: of text, of its own samples


def floors() -> str:
    """8,192 rows of GRPO against the bare GEMMs, by the width of hidden states, in Markdown."""
    head = ["H", "humanline", "of it GEMMs", "row kernels, sums", "bare GEMMs", "ratio"]
    rows = []
    for width in WIDTHS:
        case = Case("grpo", "hidden", 8_192, width, 151_936, "bfloat16")
        ours, bare = (predict(case, H100, who) for who in (OURS, "bare GEMMs"))
        times = [ours.seconds, ours.gemm, ours.passes, bare.seconds]
        rows.append([f"{width:,}", *map(seconds, times), f"{ours.seconds / bare.seconds:.2f}"])
    return markdown(head, rows)


def columns() -> str:
    """The same with columns left out of the backward, in Markdown."""
    head = ["H", *(f"{kept:.0%} of the columns" for kept in KEPT), "bare GEMMs", "ratios"]
    rows = []
    for width in WIDTHS:
        case = Case("grpo", "hidden", 8_192, width, 151_936, "bfloat16")
        t = Tail(case, case.tokens, case.vocab, is_cpu=False)
        ours = [combined(with_columns_left_out(t, kept), H100).seconds for kept in KEPT]
        bare = predict(case, H100, "bare GEMMs").seconds
        ratios = ", ".join(f"{x / bare:.2f}" for x in ours)
        rows.append([f"{width:,}", *map(seconds, (*ours, bare)), ratios])
    return markdown(head, rows)


def bandwidths() -> str:
    """From logits: what is attained of a memory's bandwidth, in Markdown."""
    head = ["8,192 × 151,936 logits", "card", "time", "of a copy's bandwidth", "of the datasheet's"]
    rows = []
    for name, objective in (("GRPO, one launch", "grpo"), ("DPO, log-probs and gradient", "dpo")):
        case = Case(objective, "logits", 8_192, 4_096, 151_936, "bfloat16")
        for device in (H100, B200):
            time = predict(case, device).seconds
            rate = work(case, OURS, False)[1] / time
            shares = [f"{rate / x:.0%}" for x in (device.copy, device.card.bandwidth)]
            rows.append([name, device.name, seconds(time), *shares])
    return markdown(head, rows)


def main(paths: list[str]) -> None:
    for path in map(Path, paths):
        print("\n".join(check(Results.load(path))), "\n")
    print("Predicted, not measured: bf16, forward and backward. GRPO, one H100\n")
    print(floors(), "\n")
    print("with a gradient_tolerance that keeps a share of the columns\n")
    print(columns(), "\n")
    print(bandwidths(), "\n")
    print("GRPO, a trainable head, a step on H100s\n")
    print(table())


if __name__ == "__main__":
    main(sys.argv[1:] or [str(r.path) for r in committed()])
