"""What ranks send one another for a loss from hidden states, by what they share: the collectives of
``humanline.Parallel`` in their order.

Floating-point values alone: beside them each call exchanges a few sizes, and where rows are shared
their masks, the numbers of their sequences and, where they travel, labels.
"""

import math
from dataclasses import dataclass

FLOAT32 = 4


@dataclass(frozen=True)
class Collective:
    """One that a rank takes part in.

    Attributes:
        kind: "gather", "scatter" (of the sum) or "sum" (to all).
        given: bytes of the tensor that a rank gives.
        ways: ranks.
    """

    kind: str
    given: float
    ways: int

    @property
    def sent(self) -> float:
        """Bytes that leave a rank, in a ring."""
        share = (self.ways - 1) / self.ways
        return self.given * {"gather": self.ways, "scatter": 1, "sum": 2}[self.kind] * share


def statistics(rows: float, ways: int, blocks: int = 1, entropy: bool = False) -> list[Collective]:
    """Of a slice of the vocabulary: label's log-prob, maximum, sum and entropy of each row, once a
    block of rows."""
    given = (4 if entropy else 3) * FLOAT32 * rows / blocks
    return [Collective("gather", given, ways)] * blocks


def split_vocabulary(
    rows: float, hidden: int, itemsize: int, ways: int, blocks: int = 1, entropy: bool = False
) -> list[Collective]:
    """``vocab``: statistics, then the gradient of hidden states, which all ranks have."""
    gradient = Collective("sum", rows * hidden * itemsize, ways)
    return [*statistics(rows, ways, blocks, entropy), gradient]


def shared_rows(rows: float, values: int, ways: int) -> list[Collective]:
    """``sequence``, ``data``: floats of each row, what the batch has, reference and the like, then
    its log-prob. As many rows as the rank has that has the most."""
    return [Collective("gather", rows * FLOAT32, ways)] * values


def gathered_head(vocab: float, hidden: int, itemsize: int, ways: int) -> list[Collective]:
    """A head that FSDP2 has split over ``data``, gathered for the call, and its gradient."""
    part = math.ceil(vocab / ways) * hidden
    gradient = Collective("scatter", ways * part * max(itemsize, FLOAT32), ways)
    return [Collective("gather", part * itemsize, ways), gradient]


def travelling_rows(
    rows: float, everyones: float, hidden: int, itemsize: int, ways: int, entropy: bool = False
) -> list[Collective]:
    """The same head where it lies: hidden states of all ranks, statistics of ``everyones`` rows,
    whose log-probs every rank then has, and the gradient of the hidden states. ``rows`` are those
    of the rank that has the most."""
    given = rows * hidden * itemsize
    return [
        Collective("gather", given, ways),
        *statistics(everyones, ways, entropy=entropy),
        Collective("scatter", ways * given, ways),
    ]


def engines_sum(vocab: float, hidden: int, itemsize: int, ways: int) -> list[Collective]:
    """Of the gradient of a head that every rank has: the engine's, such as DDP's."""
    return [Collective("sum", vocab * hidden * itemsize, ways)]
