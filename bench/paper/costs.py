"""What each way to compute the loss tail multiplies, moves and holds on one device: what
bench/paper/model.py predicts from. A function a peer of bench/peers.py, named as there.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from bench.cases import SEQUENCES, Case
from humanline.ops import WORKSPACE_BYTES
from humanline.ops.hidden.blocks import (
    comfortable_rows,
    formed_twice,
    stack_sizes,
    whole_blocks,
)
from humanline.ops.hidden.gemms import RANK
from humanline.ops.logits.blocks import BLOCK_BYTES


@dataclass(frozen=True)
class Kernel:
    """A launch, or a chain of passes over the same logits.

    Attributes:
        flops: multiplied.
        bytes: read and written.
        wide: multiplied in float32, whatever the inputs' dtype.
        loop: of a row kernel: its name in the compile report, and which of its passes.
        elements: of rows, which such a pass takes.
        read: bytes of these that come from memory, not from a cache.
    """

    flops: float
    bytes: float
    wide: bool = False
    loop: tuple[str, int] | None = None
    elements: float = 0
    read: float = 0


@dataclass(frozen=True)
class Cost:
    """Forward and backward.

    Attributes:
        gemms: the products of hidden states, head and logits.
        passes: what moves logits, or sums as large as the weight, beside them.
        peak: the highest sum of what is allocated beside the inputs, gradients included; bytes.
        small: launches of kernels that take no time but their launch's; counted of humanline alone.
    """

    gemms: list[Kernel]
    passes: list[Kernel]
    peak: float
    small: int = 0


@dataclass(frozen=True)
class Tail:
    """The loss tail of ``rows × vocab`` logits of a case on one device."""

    case: Case
    rows: float
    vocab: float
    is_cpu: bool
    workspace: int = WORKSPACE_BYTES

    @property
    def b(self) -> int:
        """Bytes an element of the inputs."""
        return self.case.torch_dtype.itemsize

    @property
    def half(self) -> bool:
        return self.b < 4

    @property
    def widened(self) -> int:
        """Bytes that a copy in float32, or back from it, moves an element; 0 where none is made."""
        return (self.b + 4) * self.half

    @property
    def from_logits(self) -> bool:
        return self.case.entry == "logits"

    @property
    def trained(self) -> bool:
        """Whether the head's weight takes a gradient."""
        return not self.case.frozen_head

    @property
    def logits(self) -> float:
        return self.rows * self.vocab

    @property
    def hidden(self) -> float:
        return self.rows * self.case.hidden

    @property
    def weight(self) -> float:
        return self.vocab * self.case.hidden

    @property
    def gradients(self) -> float:
        """Bytes of those of hidden states and weight."""
        return (self.hidden + self.weight * self.trained) * self.b

    @property
    def sequence(self) -> float:
        """Rows of one."""
        return self.rows / SEQUENCES

    @property
    def group(self) -> float:
        """Rows that depend on one another: of a pair or a sequence; 0 where none do."""
        return {"dpo": 2, "kto": 1}.get(self.case.objective, 0) * self.sequence

    def product(
        self, a_logit: float, a_weight: float, at_once=math.inf, share=1.0, wide=False
    ) -> Kernel:
        """A GEMM over a share of all rows, so many at a time.

        Args:
            a_logit: bytes it moves for each of its logits.
            a_weight: bytes it moves for each of the head's elements, every time.
        """
        times = max(math.ceil(self.rows * share / at_once), 1)
        moved = self.logits * share * a_logit + self.weight * a_weight * times
        return Kernel(2 * self.logits * self.case.hidden * share, moved, wide)

    def products(
        self, rows: Iterable[float], a_logit: float, a_weight: float, kept: float = 1
    ) -> list[Kernel]:
        """GEMMs of so many rows each, which move so many bytes for each logit and element of the
        head; over a share of the vocabulary."""
        return [
            Kernel(
                2 * n * self.weight * kept,
                (n * self.vocab * a_logit + self.weight * a_weight) * kept,
            )
            for n in rows
        ]

    def row_kernel(
        self, name: str, read: float, written: float, rows: float, step: int = 0
    ) -> Kernel:
        """A pass of a row kernel, which moves so many bytes of each logit from and to memory."""
        n = rows * self.vocab
        return Kernel(0, n * (read + written), loop=(name, step), elements=n, read=n * read)

    def copies_of_weight(self, *an_element: float) -> list[Kernel]:
        """Passes over something as large as the weight, each moving so many bytes of an element."""
        return [Kernel(0, self.weight * x) for x in an_element]

    def moved(self, *a_logit: float) -> list[Kernel]:
        """Passes over all logits, each moving so many bytes of one."""
        return [Kernel(0, self.logits * x) for x in a_logit if x]


COSTS: dict[str, Callable[[Tail], Cost]] = {}


def _cost(name: str):
    def register(function):
        COSTS[name] = function
        return function

    return register


# All logits at once


def _products(t: Tail, share: float = 1.0) -> list[Kernel]:
    """Logits and, of a share of the rows, both gradients."""
    backward = t.product(t.b, t.b, share=share)
    return [t.product(t.b, t.b)] + [backward] * (1 + t.trained)


def _from_all_logits(t: Tail, passes: Iterable[float], held: float) -> Cost:
    """The softmax's passes, and the bytes a logit it holds at once."""
    if t.from_logits:
        return Cost([], t.moved(*passes), t.logits * held)
    peak = max(t.logits * held, t.logits * t.b + t.gradients)
    return Cost(_products(t), t.moved(*passes), peak)


@_cost("bare copy")
def bare_copy(t: Tail) -> Cost:
    return Cost([], t.moved(2 * t.b), t.logits * t.b)


@_cost("bare GEMMs")
def bare_gemms(t: Tail) -> Cost:
    return Cost(_products(t), [], t.logits * t.b + t.gradients)


@_cost("bare GEMMs, active rows")
def bare_active_gemms(t: Tail) -> Cost:
    share = t.case.active
    unneeded = t.hidden * (1 - share) * t.b
    return Cost(_products(t, share), [], t.logits * t.b + t.gradients - unneeded)


@_cost("eager")
def eager(t: Tail) -> Cost:
    """A float32 copy, log_softmax, its backward, the way back; at once the log-probs, their
    gradient, and that of what they came from."""
    return _from_all_logits(t, [t.widened, 8, 12, t.widened], 12)


@_cost("torch.compile")
def compiled(t: Tail) -> Cost:
    """Read twice, then read and written."""
    return _from_all_logits(t, [2 * t.b, 2 * t.b], t.b + 4)


@_cost("TRL selective_log_softmax")
def trl_selective(t: Tail) -> Cost:
    """Read; read again, the gradient written. On CPUs in torch."""
    if t.from_logits:
        held = 2 * t.b if t.is_cpu else t.b
    else:
        held = 2 * t.b if t.half else 3 * t.b
    return _from_all_logits(t, [t.b, 2 * t.b], held)


# Some logits at a time


@_cost("TRL ChunkedLogProbFunction")
def trl_chunked(t: Tail) -> Cost:
    """Tiles of logits, formed again in the backward. On CPUs its kernels are torch, with seven
    floats a logit of a tile, and the gradients' products float32."""
    rows, columns = 4096, 32768
    tile = min(t.rows, rows) * min(t.vocab, columns)
    forward = t.product(t.b, t.b, rows)
    of_hidden, of_weight = (
        t.product(t.b, a_weight, rows, wide=t.half and t.is_cpu) for a_weight in (t.b, 8)
    )
    passes = [t.b, 2 * t.b]
    if t.is_cpu:  # statement by statement
        passes = [t.widened + 8 + 8 + 4 + 8 + 8 + 4, t.widened + 94 + t.b, 2 * t.widened]
    return Cost(
        [forward] * 2 + [of_hidden] + [of_weight] * t.trained,
        t.moved(*passes),
        tile * (t.b + 28 * t.is_cpu) + 4 * (t.hidden + t.weight * t.trained),
    )


@_cost("Liger chunked")
def liger_chunked(t: Tail) -> Cost:
    return (_liger_grpo if t.case.objective == "grpo" else _liger_preference)(t)


def _liger_grpo(t: Tail) -> Cost:
    """A sequence at a time, in tiles of logits; the backward forms them again and multiplies in
    float32. The sum over sequences has the weight's dtype, each one's share of it is float32.
    """
    tile = 4 * min(t.sequence, 2048) * min(t.vocab, 4096)
    forward = t.product(t.b, t.b, t.sequence)
    of_hidden = t.product(4, t.b + 4 + 4, t.sequence, wide=True)
    # zeros, a product, added; narrowed; added
    of_weight = t.product(4, 4 + 16 + t.widened + 3 * t.b, t.sequence, wide=True)
    share = t.weight * t.trained
    return Cost(
        [forward] * 2 + [of_hidden] + [of_weight] * t.trained,
        t.moved(t.widened + 8 + 4 + 8 + 8 + 4, t.widened + 8 + 8 + 8 + 8 + 8),
        (t.hidden + share) * t.b + share * 4 + max(5 * tile, share * t.b * t.half),
    )


def _liger_preference(t: Tail) -> Cost:
    """A pair of sequences at a time, or one for KTO, and the reference's logits too; compiled."""
    forward, of_weight = (t.product(t.b, a_weight, t.group) for a_weight in (t.b, 4 * t.b))
    logits = t.group * t.vocab * t.b
    share = t.weight * t.b * t.trained
    return Cost(
        [forward] * 3 + [of_weight] * t.trained,
        t.moved(2 * t.b, 2 * t.b, 2 * t.b),
        t.gradients + max(3 * logits, logits + share),
    )


@_cost("torch linear_cross_entropy")
def torch_linear_cross_entropy(t: Tail) -> Cost:
    """Blocks no larger than the hidden states. On CPUs narrow inputs are multiplied in float32,
    with such a share of the weight's gradient. Autograd copies the gradients of the forward.
    """
    wide = t.half and t.is_cpu
    as_hidden = 2 ** math.ceil(math.log2(max(t.hidden / t.vocab, 1)))
    rows = max(as_hidden // (1 if wide else 2), 1)
    forward = t.product(4, t.b, rows, wide=wide)
    of_weight = t.product(4, 2 * t.b + 8 * wide, rows, wide=wide)
    block = rows * t.vocab * 4
    scratch = 8 * t.weight * t.trained * wide  # and the weight
    return Cost(
        [forward] * 2 + [of_weight] * t.trained,
        t.moved(4, 8, 12, 8),
        t.gradients + max(t.gradients, block + scratch),
    )


# humanline


@dataclass(frozen=True)
class Blocks:
    """How humanline divides the rows from hidden states.

    Attributes:
        rows: of a block, whose logits are formed together.
        waiting: of several blocks, whose gradient is multiplied together (ops/hidden/stacked.py);
            0 if each block's is by itself.
        again: whether logits are formed only for their gradient, once it is known; the log-probs
            come from a first pass, see ops/hidden/objective.py.
        once: whether all rows wait for one product each, so that there is no sum for the weight.
    """

    rows: float
    waiting: float = 0
    again: bool = False
    once: bool = False


def _fitting(t: Tail) -> int:
    """Rows whose logits, with a copy where the gradient does not overwrite them, fit."""
    return int(t.workspace / (t.vocab * (4 + 4 * (t.half and t.is_cpu))))


def _blocks(t: Tail) -> Blocks:
    """Those of an objective."""
    return _blocks_in_torch(t) if t.is_cpu else _blocks_of_kernels(t)


def _blocks_in_torch(t: Tail) -> Blocks:
    fitting = _fitting(t)
    if t.group and t.rows <= fitting:
        return Blocks(t.rows)
    if t.group > fitting:
        return _blocks_of_logps(t)
    return Blocks(min(t.rows, max(t.group, comfortable_rows(fitting, True))))


def _blocks_of_kernels(t: Tail) -> Blocks:
    if t.group and not t.trained:
        return _blocks_of_logps(t)
    whole = whole_blocks(int(t.vocab), t.workspace)
    sizes = stack_sizes(int(t.rows), int(t.vocab), t.case.hidden, t.b, t.trained, t.workspace)
    if t.trained and formed_twice(int(t.rows), t.case.hidden, t.b, sizes):
        return _blocks_of_logps(t)
    if t.rows > sizes.stack and t.group > sizes.stack:
        return Blocks(whole.block) if t.group <= whole.block else _blocks_of_logps(t)
    waiting = 0 if sizes.over_logits else sizes.stack
    return Blocks(sizes.block, waiting, once=t.rows <= sizes.stack)


def _blocks_of_logps(t: Tail) -> Blocks:
    """Those of log-probs alone. With a frozen head the gradient for each is formed with it, of
    all rows."""
    fitting = _fitting(t)
    if t.trained and not t.is_cpu:  # the GEMM that forms logits again writes their gradient
        fitting = int(t.workspace / (t.vocab * t.b))
    return Blocks(min(t.rows, comfortable_rows(fitting, t.is_cpu)), again=t.trained)


@_cost("humanline, log-probs alone")
def our_logps(t: Tail) -> Cost:
    if t.from_logits:
        return _ours_from_logits(t, fused=False)
    return _ours_from_hidden(t, _blocks_of_logps(t), t.case.active if t.trained else 1)


@_cost("humanline")
def ours(t: Tail) -> Cost:
    if t.from_logits:
        return _ours_from_logits(t, fused=not t.group)
    return _ours_from_hidden(t, _blocks(t), t.case.active)


# Small launches of GRPO, counted: tests/bench/test_launches.py holds them to what
# bench/machine_code/launches.py finds. For other objectives they are an estimate.
SMALL_FROM_LOGITS = 13
SMALL_AT_ONCE = 19
SMALL_SUMMED, SMALL_A_FLUSH = 16, 6
SMALL_TWICE, SMALL_A_BLOCK = 23, 12


def _ours_from_logits(t: Tail, fused: bool) -> Cost:
    """In one launch a row's second read finds it on the chip."""
    if fused:
        passes = [
            t.row_kernel("loss, clipped", t.b, 0, t.rows),
            t.row_kernel("loss, clipped", 0, t.b, t.rows, step=1),
        ]
    else:
        active = t.case.active
        forward = t.row_kernel("forward", t.b, 0, t.rows)
        passes = [forward, t.row_kernel("backward", t.b * active, t.b, t.rows)]
    float32 = 2 * BLOCK_BYTES * (t.is_cpu and t.half)  # a block's logits and gradient
    return Cost([], passes, t.logits * t.b + float32, SMALL_FROM_LOGITS)


def pieces(rows: float, at_once: float) -> list[float]:
    """So many rows at a time, at last what is left."""
    whole, rest = divmod(rows, at_once)
    return [at_once] * int(whole) + [rest] * (rest > 0)


def block_pieces(rows: float, blocks: Blocks, share: float = 1) -> list[float]:
    """Rows of each block. None spans two fillings of the stack, in which only the share of the rows
    with a gradient stays."""
    filling = blocks.waiting / max(share, 1e-3) or rows
    return [n for some in pieces(rows, filling) for n in pieces(some, blocks.rows)]


def small_launches(blocks: Blocks, flushes: int) -> int:
    """Of humanline from hidden states."""
    if blocks.again:
        return SMALL_TWICE + SMALL_A_BLOCK * flushes
    return SMALL_AT_ONCE if blocks.once else SMALL_SUMMED + SMALL_A_FLUSH * flushes


def with_columns_left_out(t: Tail, kept: float) -> Cost:
    """humanline's from hidden states with a ``gradient_tolerance``, which keeps a share of the
    vocabulary in the products of the backward."""
    return _ours_from_hidden(t, _blocks(t), t.case.active, kept)


def _left_out(t: Tail, products: int, kept: float, fused: bool) -> list[Kernel]:
    """What ops/hidden/columns.py adds: passes for the energies, for what each row leaves out and
    the fit to it, for columns moved to the front; and of the weight, for each time that it is
    multiplied, the sum over its rows, rows gathered, and rows of its gradient put in place."""
    energies = 0 if fused else t.b
    # A CPU sums what it widens some rows at a time, a GPU's kernels read it as it is.
    a_weight = [t.widened + 4 if t.is_cpu else t.b, 2 * t.b * kept]
    passes = t.moved(energies, t.widened + 8 if t.is_cpu else 2 * t.b)
    passes += t.moved(2 * t.b * kept * (1 + t.is_cpu))
    if t.trained and products == 1:
        a_weight += [2 * t.b * kept, t.b]
    elif t.trained:
        a_weight.append(12 * kept)
        passes += t.copies_of_weight(8) * (products if t.is_cpu else math.ceil(products / RANK))
    return passes + t.copies_of_weight(*a_weight) * products


def _ours_from_hidden(t: Tail, blocks: Blocks, share: float, kept: float = 1) -> Cost:
    """The sum over rows for the weight is float32, read and written for all that wait, and rounded
    at the end.

    Args:
        share: of the rows whose gradient is multiplied.
        kept: of the vocabulary.
    """
    fused = blocks.again and not t.is_cpu  # into the GEMMs, which write no logits
    in_blocks = block_pieces(t.rows, blocks, share)
    multiplied = pieces(t.rows * share, blocks.waiting or blocks.rows)
    again = t.products(multiplied, t.b, t.b) * blocks.again
    of_hidden = t.products(multiplied, t.b, t.b, kept)
    of_weight = t.products(multiplied[:1], t.b, t.b if blocks.once else 4, kept)
    of_weight += t.products(multiplied[1:], t.b, 8, kept)
    forward = t.products([t.rows], 0, t.b) if fused else t.products(in_blocks, 4, t.b)
    passes = []
    if not fused:
        passes += [t.row_kernel("block, softmax", 4, 0, n) for n in in_blocks]
        passes += [t.row_kernel("block, dz", 4 * share, t.b * share, n) for n in in_blocks]
    if t.half and t.trained and not blocks.once:
        passes += t.copies_of_weight(4 + t.b)
    if kept < 1:
        passes += _left_out(t, len(multiplied), kept, fused)
    return Cost(
        forward + again + of_hidden + of_weight * t.trained,
        passes,
        _peak(t, blocks, share, fused),
        small_launches(blocks, len(multiplied)),
    )


def _peak(t: Tail, blocks: Blocks, share: float, fused: bool) -> float:
    """While blocks are formed, and while gradients are."""
    logits = t.vocab * blocks.rows * 4 * (not fused)
    waiting = t.vocab * blocks.waiting * t.b
    if blocks.once:  # nothing but the gradient of logits outlives the forward
        kept = waiting or logits
        product = t.hidden * (4 * t.half + t.b)  # the gradient of hidden states, in float32 first
        return max(logits + waiting, kept + product, kept + t.gradients)
    summed = t.weight * 4 * (t.half and t.trained)
    if blocks.waiting:
        return max(t.hidden * t.b + summed + logits + waiting, t.gradients + summed)
    if fused:  # the workspace goes before the sum is rounded
        of_blocks = t.vocab * _bytes_a_column(t, blocks, share)
        return max(t.hidden * t.b + summed + of_blocks, t.gradients + summed)
    return max(t.gradients + summed + t.vocab * _bytes_a_column(t, blocks, share), logits)


def _bytes_a_column(t: Tail, blocks: Blocks, share: float) -> float:
    """Of logits in float32 and of their gradient, at once, while gradients are summed."""
    copied = t.is_cpu and t.half  # for the GEMMs; a GPU's kernels write it where the logits were
    if blocks.again:  # blocks of their own, of rows with a gradient alone
        rows = min(blocks.rows, t.rows * share)
        return rows * (4 + t.b * copied if t.is_cpu else t.b)
    return blocks.rows * (4 + t.b * share * copied)
