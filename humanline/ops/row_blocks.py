"""Which rows go through the head together, where their gradient is formed before the next come.

A row's coefficient depends on its own log-prob alone, on those of its sequence, of its pair, or on
the whole batch (``coupling`` of an objective): what is known together has to be in one block.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from humanline.seam import Problem


def split_rows(wanted: Tensor, rows: int) -> list[Tensor]:
    """Indices of the rows where ``wanted [N]`` holds, so many a block. Reads their number."""
    return [index for index in wanted.nonzero().squeeze(1).split(rows) if len(index)]


def blocks_with_gradient(
    problem: Problem, wanted: Tensor, fitting: int, comfortable: int
) -> list[Tensor] | None:
    """Blocks of the rows where ``wanted [N]`` holds, no row's coefficient depending on two of them.

    Args:
        fitting: the most rows a block can have.
        comfortable: how many it should have where that is up to us.

    Returns:
        Indices of each block's rows; None if what depends on one another does not fit.
    """
    if problem.coupling == "token":
        return split_rows(wanted, comfortable)
    if len(wanted) <= fitting:
        return split_rows(wanted, fitting)
    if problem.coupling == "batch":
        return None
    lengths = problem.layout.lengths.tolist()  # with that the number of rows is known, too
    sequences, half = range(len(lengths)), len(lengths) // 2
    pairs = problem.coupling == "pair"
    groups = [(s, s + half) for s in sequences[:half]] if pairs else [(s,) for s in sequences]
    sizes = [sum(lengths[s] for s in group) for group in groups]
    if max(sizes) > fitting:
        return None
    of_sequence = torch.nonzero_static(wanted, size=sum(lengths)).squeeze(1).split(lengths)
    return [
        torch.cat([of_sequence[s] for group in block for s in group])
        for block in _packed(groups, sizes, comfortable)
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
