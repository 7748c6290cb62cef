"""Time and memory of the loss tail, predicted from shapes, a device and an interconnect.

    python -m bench.paper.model [RESULTS.json …]

first against what was measured, then up to 1,024 GPUs.

Kernels come one after the other, each as slow as the slower of two: what it multiplies, at the
device's GEMM rate, or what it moves, at its copy bandwidth; then collectives at the link's. Rates
are measured ones: of a results file, its own bare GEMMs and bare copy; of the predictions, those of
``H100`` below. The softmax's arithmetic is taken to hide behind its bytes, as on GPUs; on a CPU it
does not, and the errors printed say by how much.
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path

from bench.cases import Case
from bench.paper.costs import COSTS, Kernel, Tail
from bench.peers import OURS
from bench.report import floor, markdown, megabytes, seconds
from bench.run import Results, committed
from humanline.ops import WORKSPACE_BYTES


@dataclass(frozen=True)
class Device:
    """Rates in FLOP/s, of the inputs' dtype and of float32, and bytes/s (read + write)."""

    name: str
    gemm: float
    copy: float
    gemm_float32: float
    is_cpu: bool = False

    def seconds(self, kernel: Kernel) -> float:
        """Multiplying and moving go on at once."""
        rate = self.gemm_float32 if kernel.wide else self.gemm
        return max(kernel.flops / rate, kernel.bytes / self.copy)


@dataclass(frozen=True)
class Link:
    """What a collective moves, bytes/s out of one GPU, and what it costs to start, seconds."""

    bandwidth: float
    latency: float


# bf16 GEMM and copy as measured on one H100 SXM: 8192³ at 798 TFLOP/s, 3.0 TB/s. float32, which
# torch multiplies without tensor cores unless told otherwise, of the datasheet.
H100 = Device("H100", gemm=798e12, copy=3.0e12, gemm_float32=67e12)
# Datasheet rates, one direction: NVLink 4 within a node of 8, one 400 Gb/s port a GPU beyond.
NVLINK, NETWORK = Link(450e9, 5e-6), Link(50e9, 20e-6)
NODE = 8


@dataclass(frozen=True)
class Layout:
    """How tokens and vocabulary are spread over ``tokens × vocab`` GPUs.

    Args:
        tokens: ways the tokens are split, by data or sequence parallelism: for the loss tail the
            two are one, but for a sum a sequence that sequence-level losses exchange.
        vocab: ways the head's rows are split (vocab-parallel); every GPU of such a group sees all
            of the group's tokens.
        gathered: the head is sharded over the ``tokens`` ways too (FSDP), gathered for use, and
            its gradient scattered back.
    """

    tokens: int = 1
    vocab: int = 1
    gathered: bool = False

    @property
    def gpus(self) -> int:
        return self.tokens * self.vocab


@dataclass(frozen=True)
class Prediction:
    """Of one GPU: seconds by term, bytes beside hidden states, labels and the head's own shard."""

    gemm: float
    passes: float
    collectives: float
    bytes: float

    @property
    def seconds(self) -> float:
        return self.gemm + self.passes + self.collectives


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
    t = Tail(case, rows, vocab, device.is_cpu, workspace)
    cost = COSTS[who](t)
    exchanged = 2 * t.hidden * t.b if layout.vocab > 1 else 0  # and its gradient
    gathered = t.weight * t.b if layout.gathered else 0
    return Prediction(
        gemm=sum(map(device.seconds, cost.gemms)),
        passes=sum(map(device.seconds, cost.passes)),
        collectives=0 if t.from_logits else _collectives(t, layout),
        bytes=cost.peak + exchanged + gathered,
    )


def _collectives(t: Tail, layout: Layout) -> float:
    """Ring collectives: each moves ``(p − 1)/p`` of the bytes named, all-reduce twice that."""
    total = 0.0

    def ring(ways: int, size: float, link: Link) -> float:
        return (ways - 1) / ways * size / link.bandwidth + (ways - 1) * link.latency

    if layout.vocab > 1:
        link = NVLINK if layout.vocab <= NODE else NETWORK
        rows = 2 * ring(layout.vocab, t.rows * 3 * 4, link)  # maximum, sum, picked logit of each
        total += rows + 2 * ring(layout.vocab, t.hidden * t.b, link)  # tokens in, gradient out
    if layout.tokens > 1:
        link = NVLINK if layout.gpus <= NODE else NETWORK
        if layout.gathered:
            total += ring(layout.tokens, t.weight * t.b, link)
        if t.trained:  # scattered if gathered, else reduced to all
            total += (1 if layout.gathered else 2) * ring(layout.tokens, t.weight * 4, link)
        if t.group:
            total += 2 * ring(layout.tokens, 8 * 4, link)
    return total


def calibrated(results: Results, case: Case) -> Device | None:
    """The device of a results file, from the floors measured in the case's dtype; None without
    them."""
    rates = _rates(results)
    copy, gemm = (rates.get((case.dtype, entry)) for entry in ("logits", "hidden"))
    if not copy or (case.entry == "hidden" and not gemm):
        return None
    gemm = gemm or math.inf  # from logits nothing is multiplied
    wide = rates.get(("float32", "hidden"), gemm)
    return Device(results.environment["device"], gemm, copy, wide, results.on_cpu)


def _rates(results: Results) -> dict[tuple[str, str], float]:
    """The highest that floors attain, by dtype and entry: bytes/s from logits, FLOP/s from hidden
    states."""
    rates: dict[tuple[str, str], float] = {}
    for case in results.cases:
        base = floor(results.of(case))
        if base is not None:
            flops, moved = work(case, base.peer, results.on_cpu)
            rate = (moved if case.entry == "logits" else flops) / base.seconds
            key = case.dtype, case.entry
            rates[key] = max(rates.get(key, 0.0), rate)
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
    (131_072, 4_096, 151_936, Layout(vocab=8)),
    (1_048_576, 8_192, 262_144, Layout(tokens=64, gathered=True)),
    (1_048_576, 8_192, 262_144, Layout(tokens=128, vocab=8)),
    (1_048_576, 8_192, 262_144, Layout(tokens=1024, gathered=True)),
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
    head += ["collectives", "memory a GPU", "eager's"]
    rows = []
    for case, layout, ours, eager in scales():
        split = f"{layout.tokens}{' (FSDP)' if layout.gathered else ''} / {layout.vocab}"
        times = [seconds(x) if x else "0" for x in (ours.gemm, ours.passes, ours.collectives)]
        shape = f"{case.tokens:,} × {case.hidden:,} × {case.vocab:,}"
        memory = [megabytes(ours.bytes), megabytes(eager.bytes)]
        rows.append([shape, f"{layout.gpus:,}", split, *times, *memory])
    return markdown(head, rows)


def main(paths: list[str]) -> None:
    for path in map(Path, paths):
        print("\n".join(check(Results.load(path))), "\n")
    print("Predicted: GRPO, bf16, a trainable head, forward and backward, a step on H100s\n")
    print(table())


if __name__ == "__main__":
    main(sys.argv[1:] or [str(r.path) for r in committed()])
