"""Time and memory of the loss tail, predicted from shapes, a device and an interconnect.

    python -m bench.model [RESULTS.json …]     # against what was measured, then up to 1,024 GPUs

Time is the sum of three terms that are taken not to overlap: GEMMs at the device's GEMM rate,
passes over logits at its copy bandwidth, collectives at the link's. Rates are measured ones: of a
results file, its own bare GEMMs and bare copy; of the predictions, those of ``H100`` below. The
softmax's arithmetic is taken to hide behind its bytes, as on GPUs; on a CPU it does not, and the
errors printed say by how much.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from bench.cases import SEQUENCES, Case
from bench.peers import OURS
from bench.report import floor, markdown, megabytes, seconds
from bench.run import Results
from humanline.ops import WORKSPACE_BYTES
from humanline.ops.head_blocks import CPU_BLOCK_ROWS


@dataclass(frozen=True)
class Device:
    """Rates in FLOP/s and bytes/s (read + write), memory in bytes."""

    name: str
    gemm: float
    copy: float
    is_cpu: bool = False


@dataclass(frozen=True)
class Link:
    """What a collective moves, bytes/s out of one GPU, and what it costs to start, seconds."""

    bandwidth: float
    latency: float


# bf16 GEMM and copy as measured on one H100 SXM: 8192³ at 798 TFLOP/s, 3.0 TB/s.
H100 = Device("H100", gemm=798e12, copy=3.0e12)
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


def gemms(case: Case, who: str, fits: bool) -> float:
    """N×H×V products of forward and backward."""
    head = 0 if case.frozen_head else 1
    if who == "bare GEMMs, active rows":
        return 1 + (1 + head) * case.active
    if who == OURS:
        if case.objective in ("grpo", "sft") or fits:
            return 1 + (1 + head) * case.active
        return 2 if case.frozen_head else 1 + 3 * case.active
    if who in ("TRL ChunkedLogProbFunction", "humanline, log-probs alone"):
        active = case.active if who.startswith(OURS) else 1
        return 2 if who.startswith(OURS) and case.frozen_head else 1 + (2 + head) * active
    return 2 + head


def logit_bytes(case: Case, who: str, fits: bool) -> float:
    """Bytes moved a logit beside those of the GEMMs themselves.

    Eager: the float32 copy (b + 4), log_softmax (4 + 4), its backward (4 + 4 + 4), the way back to
    the inputs' dtype (4 + b). From hidden, humanline: per block the softmax reads the float32
    logits twice and writes their gradient; a second time where they are recomputed. A GEMM's own
    logits, float32 out and operands in, are counted with the passes.
    """
    b = case.torch_dtype.itemsize
    if who.startswith("bare"):
        return 2 * b if case.entry == "logits" else 0
    if who == "eager":
        return (b + 4) * (b < 4) + 8 + 12 + (4 + b) * (b < 4)
    if case.entry == "logits":
        by_row = case.objective in ("grpo", "sft") and who == OURS
        return 2 * b if by_row else b + b * case.active + b
    one_pass = 4 + 8 + (4 + b) * (b < 4)
    return (
        one_pass if case.frozen_head or gemms(case, who, fits) <= 3 else 4 + one_pass * case.active
    )


def predict(
    case: Case,
    device: Device,
    who: str = OURS,
    layout: Layout = Layout(),
    workspace: int = WORKSPACE_BYTES,
) -> Prediction:
    """The loss tail of one step, ``case.tokens`` over all GPUs, on each of them.

    Raises:
        KeyError: ``who`` is not one of ``PREDICTED``.
    """
    if who not in PREDICTED:
        raise KeyError(who)
    b = case.torch_dtype.itemsize
    n, v, h = case.tokens / layout.tokens, case.vocab / layout.vocab, case.hidden
    if case.entry == "logits":
        return Prediction(
            0,
            n * v * logit_bytes(case, who, True) / device.copy,
            0,
            _bytes(case, device, who, n, v, 0),
        )
    rows = min(n, workspace / (v * (4 + 4 * (b < 4))))
    group = {"dpo": 2, "kto": 1}.get(case.objective, 0) * n / SEQUENCES  # what hangs together
    fits = rows >= group
    if device.is_cpu:
        rows = min(rows, max(group, CPU_BLOCK_ROWS) if fits else CPU_BLOCK_ROWS)
    blocks = -(-n // rows)
    weight_passes = 0 if case.frozen_head else 8 * v * h * blocks  # float32 sum, read and written
    time = n * v * logit_bytes(case, who, fits) + (weight_passes if who == OURS else 0)
    return Prediction(
        gemm=gemms(case, who, fits) * 2 * n * h * v / device.gemm,
        passes=time / device.copy,
        collectives=_collectives(case, layout, n),
        bytes=_bytes(case, device, who, n, v, rows)
        + (2 * n * h * b if layout.vocab > 1 else 0)  # gathered tokens and their gradient
        + (v * h * b if layout.gathered else 0),
    )


PREDICTED = (
    "bare copy",
    "bare GEMMs",
    "bare GEMMs, active rows",
    "eager",
    "humanline, log-probs alone",
    OURS,
)


def _bytes(case: Case, device: Device, who: str, n: float, v: float, rows: float) -> float:
    """Highest sum of what is allocated beside the inputs, gradients included."""
    b, h = case.torch_dtype.itemsize, case.hidden
    softmax = 12 * n * v  # float32 log-probs, their gradient, that of the logits
    if case.entry == "logits":
        return softmax if who == "eager" else n * v * b
    dh, dw = n * h * b, 0 if case.frozen_head else v * h * b
    if who == "eager":
        return max(softmax, n * v * b + dh + dw)
    if who.startswith("bare"):
        active = case.active if "active" in who else 1
        return n * v * b + dh * active + dw
    buffers = 4 + (4 if b < 4 and not device.is_cpu else 0)
    half_sum = 0 if case.frozen_head or b == 4 else v * h * 4  # float32 sum beside the result
    return rows * v * buffers + dh + dw + half_sum


def _collectives(case: Case, layout: Layout, n: float) -> float:
    """Ring collectives: each moves ``(p − 1)/p`` of the bytes named, all-reduce twice that."""
    b = case.torch_dtype.itemsize
    total = 0.0

    def ring(ways: int, size: float, link: Link) -> float:
        return (ways - 1) / ways * size / link.bandwidth + (ways - 1) * link.latency

    if layout.vocab > 1:
        link = NVLINK if layout.vocab <= NODE else NETWORK
        rows = 2 * ring(layout.vocab, n * 3 * 4, link)  # maximum, sum, picked logit of each row
        total += rows + 2 * ring(layout.vocab, n * case.hidden * b, link)  # tokens in, gradient out
    if layout.tokens > 1:
        link = NVLINK if layout.gpus <= NODE else NETWORK
        head = case.vocab / layout.vocab * case.hidden
        if layout.gathered:
            total += ring(layout.tokens, head * b, link)
        if not case.frozen_head:  # scattered if gathered, else reduced to all
            total += (1 if layout.gathered else 2) * ring(layout.tokens, head * 4, link)
        if case.objective in ("dpo", "kto"):
            total += 2 * ring(layout.tokens, 8 * 4, link)
    return total


def calibrated(results: Results, case: Case) -> Device | None:
    """The device of a results file, from the floors measured in that dtype; None without one."""
    is_cpu = "cores" in results.environment["device"]
    rates = {"gemm": 0.0, "copy": 0.0}
    for other in results.cases:
        base = floor(results.of(other))
        if base is None or other.dtype != case.dtype:
            continue
        if other.entry == "logits":
            rates["copy"] = max(rates["copy"], 2 * other.logits_bytes / base.seconds)
        else:
            flops = gemms(other, base.peer, True) * 2 * other.tokens * other.hidden * other.vocab
            rates["gemm"] = max(rates["gemm"], flops / base.seconds)
    if not rates["copy"] or (case.entry == "hidden" and not rates["gemm"]):
        return None
    return Device(results.environment["device"], is_cpu=is_cpu, **rates)


def check(results: Results) -> list[str]:
    """Every measured point beside its prediction, with the error of time and of memory."""
    lines = [f"{results.environment['device']}: predicted / measured"]
    for case in results.cases:
        device = calibrated(results, case)
        for r in results.of(case):
            if r.peer not in PREDICTED or r.seconds is None:
                continue
            rates = device or Device("memory only", 1, 1, "cores" in results.environment["device"])
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
    from bench.readme import committed

    main(sys.argv[1:] or [str(r.path) for r in committed()])
