"""Time and memory of the loss tail, predicted from shapes, a device and an interconnect.

    python -m bench.model [RESULTS.json …]     # against what was measured, then up to 1,024 GPUs

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

from bench.cases import SEQUENCES, Case
from bench.peers import OURS
from bench.report import floor, markdown, megabytes, seconds
from bench.run import Results
from humanline.ops import WORKSPACE_BYTES
from humanline.ops.blocks import BLOCK_BYTES
from humanline.ops.head_blocks import CPU_BLOCK_ROWS, stacked_rows, whole_tiles


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


@dataclass(frozen=True)
class Kernel:
    """A launch, or a chain of passes over the same logits: what it multiplies, what it moves."""

    flops: float
    bytes: float

    def seconds(self, device: Device) -> float:
        """Multiplying and moving go on at once."""
        return max(self.flops / device.gemm, self.bytes / device.copy)


@dataclass(frozen=True)
class Work:
    """The loss tail of ``rows × vocab`` logits on one GPU.

    Args:
        block: rows of a block, whose logits are formed together.
        waiting: rows whose gradient is multiplied together, see ops/head_gradients.py.
        fits: what hangs together fits a block, see ops/linear_objective.py.
    """

    case: Case
    rows: float
    vocab: float
    block: float = math.inf
    waiting: float = math.inf
    fits: bool = True

    @property
    def logits(self) -> float:
        return self.rows * self.vocab

    @property
    def weight(self) -> float:
        return self.vocab * self.case.hidden

    @property
    def by_row(self) -> bool:
        """Whether a row's gradient depends on no other row."""
        return self.case.objective in ("grpo", "sft")

    def known(self, who: str) -> bool:
        """Whether rows' coefficients are known while their logits are there."""
        return who == OURS and (self.fits or self.by_row)

    def again(self, who: str) -> bool:
        """Whether the backward forms the logits again."""
        ours = who.startswith(OURS) and not self.known(who) and not self.case.frozen_head
        return ours or who == TRL_CHUNKED

    def product(self, share: float, rows: float, a_logit: float, a_weight: float) -> Kernel:
        """A GEMM over a share of all rows, so many at a time: bytes it moves a logit, and every
        time a weight."""
        times = max(math.ceil(self.rows * share / rows), 1)
        moved = self.logits * share * a_logit + self.weight * a_weight * times
        return Kernel(2 * self.logits * self.case.hidden * share, moved)

    def gemms(self, who: str) -> list[Kernel]:
        """Those of forward and backward. The sum over rows for the weight is float32, read and
        written every time."""
        if self.case.entry == "logits":
            return []
        b, frozen, active = self.case.torch_dtype.itemsize, self.case.frozen_head, self.case.active
        ours = who.startswith(OURS)
        share = active if ours or who.endswith("active rows") else 1
        summed = 8 if ours or who == TRL_CHUNKED else b
        wide = 4 if ours else b  # logits, as the GEMM writes them
        if ours and frozen and not self.known(who):
            share = 1
        again = self.again(who)
        forward = self.product(1, self.block, 0 if ours and again else wide, b)
        of_hidden = self.product(share, self.waiting, b, b)  # which costs what forming logits does
        of_weight = self.product(share, self.waiting, b, summed)
        return [forward] + [of_hidden] * (1 + again) + [of_weight] * (not frozen)

    def passes(self, who: str) -> list[Kernel]:
        """What moves logits beside the GEMMs."""
        b, active = self.case.torch_dtype.itemsize, self.case.active
        half = b < 4
        if who.startswith("bare"):
            moved = [2 * b] if self.case.entry == "logits" else []
        elif who == "eager":  # a float32 copy, log_softmax, backward, the way back to b
            moved = [(b + 4) * half, 4 + 4, 4 + 4 + 4, (4 + b) * half]
        elif who == "torch.compile":  # read twice, then read and written
            moved = [b + b, b + b]
        elif who in (TRL_SELECTIVE, TRL_CHUNKED):  # read; read again, the gradient written
            moved = [b, b + b]
        elif self.case.entry == "logits":  # the second read of a row finds it on the chip
            moved = [b + b] if self.by_row and who == OURS else [b, b * active + b]
        elif self.again(who):  # the GEMMs' epilogues do it
            moved = []
        else:
            moved = [4, (4 + b) * (1 if who != OURS else active)]
        return [Kernel(0, self.logits * x) for x in moved if x]

    def peak(self, who: str, device: Device) -> float:
        """The highest sum of what is allocated beside the inputs, gradients included."""
        case, logits, b = self.case, self.logits, self.case.torch_dtype.itemsize
        half, trained = b < 4, not case.frozen_head
        softmax = {  # at once: of eager log-probs, their gradient, that of what they came from
            "eager": 12,
            "torch.compile": b + 4,
            TRL_SELECTIVE: 2 * b if half or case.entry == "logits" else 3 * b,
        }
        if case.entry == "logits":
            if who.startswith(OURS) and device.is_cpu and half:
                return logits * b + 2 * BLOCK_BYTES  # a block's logits and gradient in float32
            in_torch = who != TRL_SELECTIVE or device.is_cpu
            return logits * (softmax.get(who, b) if in_torch else b)
        dh, dw = self.rows * case.hidden * b, self.weight * b * trained
        if who in softmax:
            return max(logits * softmax[who], logits * b + dh + dw)
        if who == TRL_CHUNKED:  # in torch with seven floats a logit of a tile
            tile = min(self.rows, TRL_TILE[0]) * min(self.vocab, TRL_TILE[1])
            sums = 4 * (self.rows * case.hidden + self.weight * trained)
            return tile * (b + 28 * device.is_cpu) + sums
        if who.startswith("bare"):
            return logits * b + dh * (case.active if "active" in who else 1) + dw
        narrowed = self.block * case.active * device.is_cpu * half  # a copy of the gradient
        if self.waiting > self.block:
            narrowed = self.waiting
        held = self.block * 4 + narrowed * b
        return held * self.vocab + dh + dw + self.weight * 4 * (half and trained)


def gemms(case: Case, who: str, fits: bool) -> float:
    """N×H×V products of forward and backward."""
    work = Work(case, case.tokens, case.vocab, fits=fits)
    return sum(k.flops for k in work.gemms(who)) / (2 * work.logits * case.hidden)


def logit_bytes(case: Case, who: str) -> float:
    """Bytes moved a logit, those that GEMMs read and write included."""
    work = Work(case, case.tokens, case.vocab)
    moved = sum(k.bytes for k in work.passes(who) + work.gemms(who))
    return moved / work.logits


def work_of(
    case: Case,
    device: Device,
    who: str = OURS,
    layout: Layout = Layout(),
    workspace: int = WORKSPACE_BYTES,
) -> Work:
    """What one GPU of a layout does of a case."""
    n, v = case.tokens / layout.tokens, case.vocab / layout.vocab
    if case.entry == "logits":
        return Work(case, n, v)
    if who == TRL_CHUNKED:
        return Work(case, n, v, TRL_TILE[0], TRL_TILE[0])
    if not who.startswith(OURS):
        return Work(case, n, v)
    b = case.torch_dtype.itemsize
    fitting = int(workspace / (v * (4 + 4 * (b < 4 and device.is_cpu))))
    group = {"dpo": 2, "kto": 1}.get(case.objective, 0) * n / SEQUENCES  # what hangs together
    if group and who == OURS and n <= fitting:
        return Work(case, n, v, n, n)
    if device.is_cpu:
        rows = min(n, fitting, max(group, CPU_BLOCK_ROWS) if group <= fitting else CPU_BLOCK_ROWS)
        return Work(case, n, v, rows, rows, group <= fitting)
    if who != OURS or group > fitting:  # logits are not kept, their gradient is formed again
        rows = min(n, whole_tiles(int(workspace / (v * b))))
        return Work(case, n, v, n, rows, False)
    block, waiting = stacked_rows(int(v), b, workspace)
    if case.frozen_head or n <= whole_tiles(fitting) or group > block:
        block = waiting = min(n, max(group, whole_tiles(fitting)))
    return Work(case, n, v, block, waiting)


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
    work, b = work_of(case, device, who, layout, workspace), case.torch_dtype.itemsize
    exchanged = 2 * work.rows * case.hidden * b if layout.vocab > 1 else 0  # and its gradient
    gathered = work.weight * b if layout.gathered else 0
    return Prediction(
        gemm=sum(k.seconds(device) for k in work.gemms(who)),
        passes=sum(k.seconds(device) for k in work.passes(who)),
        collectives=0 if case.entry == "logits" else _collectives(case, layout, work.rows),
        bytes=work.peak(who, device) + exchanged + gathered,
    )


TRL_SELECTIVE, TRL_CHUNKED = "TRL selective_log_softmax", "TRL ChunkedLogProbFunction"
TRL_TILE = 4096, 32768  # of tokens and vocabulary
PREDICTED = (
    "bare copy",
    "bare GEMMs",
    "bare GEMMs, active rows",
    "eager",
    "torch.compile",
    TRL_SELECTIVE,
    TRL_CHUNKED,
    "humanline, log-probs alone",
    OURS,
)


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
    gemm = rates["gemm"] or math.inf  # from logits nothing is multiplied
    return Device(results.environment["device"], gemm, rates["copy"], is_cpu)


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
