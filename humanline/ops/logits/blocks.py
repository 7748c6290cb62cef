"""Rows a block at a time, for the torch backend: several passes over a block stay in the cache."""

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK_BYTES = 8 * 2**20

Selection = slice | Tensor


def row_blocks(logits: Tensor, wanted: Tensor) -> Iterator[tuple[Tensor, Selection, Selection]]:
    """Blocks of the rows of ``logits [..., V]`` where ``wanted [N]`` holds, without copying logits.

    Yields:
        a matrix of rows that is a view of ``logits``; the block's rows within that view; and the
        same rows counted from the start of ``logits``. A run of rows is a slice, else indices.
    """
    rows = max(1, BLOCK_BYTES // (4 * logits.shape[-1]))
    for start, view in row_views(logits):
        here = wanted[start : start + len(view)].nonzero().squeeze(1)
        for index in here.split(rows):
            if len(index) == 0:
                continue
            local = _as_slice(index)
            yield view, local, _shift(local, start)


def row_views(logits: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Matrices of rows of ``[..., V]``, each with the number of its first row: as few as there can
    be without a copy, for up to three dimensions."""
    vocab = logits.shape[-1]
    if logits.dim() == 3 and not logits.is_contiguous():  # such as logits[:, :-1]
        for b, view in enumerate(logits):
            yield b * logits.shape[1], view
    else:
        yield 0, logits.reshape(-1, vocab)


def can_be_overwritten(logits: Tensor) -> bool:
    """Whether all rows lie one after the other, in the batch or in each of its sequences, which do
    not overlap: then :func:`row_views` are dense, and the kernels take the tensor as it is."""
    if logits.is_contiguous() or logits.dim() != 3:
        return logits.is_contiguous()
    _, length, vocab = logits.shape
    batch_stride, *row_strides = logits.stride()
    whole_rows = batch_stride % vocab == 0 and batch_stride >= length * vocab
    return row_strides == [vocab, 1] and whole_rows


def _as_slice(index: Tensor) -> Selection:
    """A slice if the indices are a run and looking is free."""
    if index.device.type == "cpu" and index[-1] - index[0] + 1 == len(index):
        return slice(int(index[0]), int(index[-1]) + 1)
    return index


def _shift(rows: Selection, by: int) -> Selection:
    return slice(rows.start + by, rows.stop + by) if isinstance(rows, slice) else rows + by


def zero_rows_(rows: Tensor, which: Tensor) -> None:
    """Set the rows of ``[N, V]`` where ``which [N]`` holds to 0, and touch no others."""
    rows.index_fill_(0, which.nonzero().squeeze(1), 0)


def indices(rows: Selection, like: Tensor) -> Tensor:
    """The selection as an index tensor."""
    if isinstance(rows, Tensor):
        return rows
    return torch.arange(rows.start, rows.stop, device=like.device)
