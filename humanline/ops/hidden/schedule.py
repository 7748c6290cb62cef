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


def split_runs(wanted: Tensor, rows: int) -> list[Tensor] | list[slice]:
    """The same; where all rows are wanted, as runs of them, for which nothing is gathered."""
    blocks = split_rows(wanted, rows)
    if sum(map(len, blocks)) < len(wanted):
        return blocks
    return [slice(i, min(i + rows, len(wanted))) for i in range(0, len(wanted), rows)]


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
    rows, lengths = labelled_rows(problem)
    order, sizes = groups(problem, rows, lengths)
    if max(sizes) > fitting:
        return None
    return list(order.split(list(_packed(sizes, comfortable))))


def labelled_rows(problem: Problem) -> tuple[Tensor, list[int] | None]:
    """Indices of the labelled rows; how many each sequence has, where groups of rows hang together.
    One read."""
    mask = problem.layout.mask
    if problem.coupling in ("token", "batch"):
        return mask.nonzero().squeeze(1), None
    lengths = problem.layout.lengths.tolist()  # with that the number of rows is known, too
    return torch.nonzero_static(mask, size=sum(lengths)).squeeze(1), lengths


def groups(problem: Problem, rows: Tensor, lengths: list[int]) -> tuple[Tensor, list[int]]:
    """The labelled rows with those that depend on one another side by side, and how many these are
    in turn."""
    if problem.coupling != "pair":
        return rows, lengths
    half = len(lengths) // 2
    of_sequence = rows.split(lengths)
    pairs = [x for s in range(half) for x in (of_sequence[s], of_sequence[s + half])]
    return torch.cat(pairs), [a + b for a, b in zip(lengths[:half], lengths[half:], strict=True)]


def _packed(sizes: list[int], limit: int) -> Iterator[int]:
    """Rows of blocks of whole groups in their order, as many as stay within the limit, or one."""
    rows = 0
    for size in sizes:
        if rows and rows + size > limit:
            yield rows
            rows = 0
        rows += size
    if rows:
        yield rows
