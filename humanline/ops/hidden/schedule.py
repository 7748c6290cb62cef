"""Which rows go through the head together, where their gradient is formed before the next come.

A row's coefficient depends on its own log-prob alone, on those of its sequence, of its pair, or on
the whole batch (``coupling`` of an objective): what is known together has to be in one block.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from humanline.seam import Problem


def split_rows(wanted: Tensor, rows: int) -> list[Tensor]:
    """Indices of the rows where ``wanted [N]`` holds, so many a block. Reads their number."""
    return [index for index in wanted.nonzero().squeeze(1).split(rows) if len(index)]


@dataclass(frozen=True)
class Sizes:
    """Rows of a block: the most it can have, and how many it should where that is up to us; and
    how many with a gradient may wait for those of other blocks."""

    fitting: int
    comfortable: int
    waiting: int = 0


def blocks_with_gradient(
    problem: Problem, wanted: Tensor, sizes: Sequence[Sizes]
) -> tuple[Sizes, list[Tensor]] | None:
    """Blocks of the rows where ``wanted [N]`` holds, no row's coefficient depending on two of them.

    Args:
        sizes: those to choose from, first the one to prefer where there are many blocks, last the
            one with the largest.

    Returns:
        The sizes chosen, and indices of each block's rows; None if what depends on one another
        does not fit.
    """
    many, largest = sizes[0], sizes[-1]
    if problem.coupling == "token":
        chosen = largest if len(wanted) <= largest.comfortable else many
        return chosen, split_rows(wanted, chosen.comfortable)
    if len(wanted) <= largest.fitting:
        return largest, split_rows(wanted, largest.fitting)
    if problem.coupling == "batch":
        return None
    lengths = problem.layout.lengths.tolist()  # with that the number of rows is known, too
    sequences, half = range(len(lengths)), len(lengths) // 2
    pairs = problem.coupling == "pair"
    groups = [(s, s + half) for s in sequences[:half]] if pairs else [(s,) for s in sequences]
    rows = [sum(lengths[s] for s in group) for group in groups]
    chosen = next((s for s in sizes if max(rows) <= s.fitting), None)
    if chosen is None:
        return None
    of_sequence = torch.nonzero_static(wanted, size=sum(lengths)).squeeze(1).split(lengths)
    return chosen, [
        torch.cat([of_sequence[s] for group in block for s in group])
        for block in _packed(groups, rows, chosen.comfortable)
    ]


def _packed(groups: list[tuple], sizes: list[int], limit: int) -> Iterator[list[tuple]]:
    """The groups in their order, as many together as stay within the limit, at least one."""
    block, rows = [], 0
    for group, size in zip(groups, sizes, strict=True):
        if size == 0:
            continue
        if block and rows + size > limit:
            yield block
            block, rows = [], 0
        block.append(group)
        rows += size
    if block:
        yield block
