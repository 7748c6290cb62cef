"""Log-probs of a block of rows from hidden states, and the gradient of its logits, by backend.

A block of either kind has ``index``, its rows; ``hidden``, theirs; ``logps`` and ``entropy`` of
them; ``keep``, which forgets all rows but some and says which are left, in what order; and
``gradient``, that of the head's product, ready for the GEMMs of the backward. ``count`` is None:
all its rows matter.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from humanline import checks
from humanline.dtypes import compute_dtype
from humanline.ops.hidden.gemms import form_logits
from humanline.ops.hidden.head import Head
from humanline.ops.logits.blocks import indices
from humanline.ops.softmax import SoftmaxBlock, front_order, to_front_
from humanline.ops.temperature import divide_by_temperature

# On a CPU, more rows gain a block's GEMMs nothing. A GPU takes as many as the workspace holds:
# each block reads and writes the whole gradient of the weight.
CPU_BLOCK_ROWS = 512
TILE_ROWS = 128  # of a GPU's GEMMs
MIN_ROWS = 256  # to multiply a weight by while it is read, on an H100
# What an H100 multiplies in the time that it moves a byte: half precision; float32.
FLOPS_A_BYTE, FLOPS_A_BYTE_FLOAT32 = 230, 20
# The widest head whose logits are cheaper formed twice than written, on a GPU: a product more is 2H
# FLOPs a logit, the bytes it spares are 12 (written and read twice in float32, less what the GEMM
# that forms them again writes).
NARROW = 1280

#: Looks at a block: the indices ``[n]`` of its rows and their logits ``[n, V]``, which it may read
#: but neither keep nor change.
Observer = Callable[[Tensor, Tensor], None]


class TorchBlock:
    """In the logits' own memory, a pass of torch a step."""

    count = None

    def __init__(
        self, memory, hidden, weight, labels, head: Head, index, with_entropy: bool, observe=None
    ):
        self.hidden, self.index, self._head = hidden[index], index, head
        z = form_logits(self.hidden, weight, memory[: len(self.hidden)])
        if head.bias is not None:
            z += head.bias
        if head.logit_scale != 1:
            z *= head.logit_scale
        self._softcap_slope = None
        if head.logit_softcap is not None:
            z.div_(head.logit_softcap).tanh_()
            self._softcap_slope = (z * z).neg_().add_(1)
            z *= head.logit_softcap
        divide_by_temperature(z, head.temperature, index)
        if observe is not None:
            observe(indices(index, labels), z)
        self._softmax = SoftmaxBlock(z, labels[index].long(), with_entropy, head.shard)
        self.logps, self.entropy = self._softmax.logps, self._softmax.entropy

    @staticmethod
    def bytes_per_row(weight: Tensor, head: Head, with_entropy: bool) -> int:
        dtype = compute_dtype(weight.dtype)
        narrowed = weight.dtype != dtype  # a copy of the gradient for the GEMMs
        buffers = 1 + with_entropy + (head.logit_softcap is not None) + narrowed
        return buffers * len(weight) * dtype.itemsize

    @staticmethod
    def memory(weight: Tensor, rows: int) -> Tensor:
        return weight.new_empty(rows, len(weight), dtype=compute_dtype(weight.dtype))

    def keep(self, active: Tensor) -> Tensor:
        kept = front_order(active)
        self.hidden, self.index = self.hidden[kept], self.index[kept]
        self._softmax.keep(kept)
        if self._softcap_slope is not None:
            self._softcap_slope = to_front_(self._softcap_slope, kept)
        return kept

    def gradient(self, of_logp: Tensor | None = None, of_entropy: Tensor | None = None) -> Tensor:
        dz = self._softmax.gradient(of_logp, of_entropy)
        divide_by_temperature(dz, self._head.temperature, self.index)
        if self._softcap_slope is not None:
            dz *= self._softcap_slope
        if self._head.logit_scale != 1:
            dz *= self._head.logit_scale
        return dz


class TritonBlock:
    """Two kernels between the GEMMs, see kernels/head_rows.py."""

    count = None

    def __init__(self, memory, hidden, weight, labels, head: Head, index, with_entropy: bool):
        from humanline.kernels.head_rows import HeadRows

        vocab, temperature = len(weight), head.temperature
        self.hidden, self.index, self._kept = hidden[index], index, None
        self._dz = memory.view(weight.dtype)[:, :vocab]  # over the logits it is made of
        self._rows = HeadRows(
            form_logits(self.hidden, weight, memory[: len(self.hidden), :vocab]),
            labels[index],
            temperature[index] if temperature.dim() else temperature,
            head.bias,
            head.logit_scale,
            head.logit_softcap,
            with_entropy,
        )
        if head.shard is not None:
            self._rows.merge(head.shard)
        self.logps, self.entropy = self._rows.logps, self._rows.entropy

    @staticmethod
    def bytes_per_row(weight: Tensor, head: Head, with_entropy: bool) -> int:
        return padded_length(weight) * torch.float32.itemsize

    @staticmethod
    def memory(weight: Tensor, rows: int) -> Tensor:
        return weight.new_empty(rows, padded_length(weight), dtype=torch.float32)

    def keep(self, active: Tensor) -> Tensor:
        kept = self._kept = front_order(active)
        self.hidden, self.index = self.hidden[kept], self.index[kept]
        return kept

    def gradient(self, of_logp: Tensor | None = None, of_entropy: Tensor | None = None) -> Tensor:
        return self._rows.gradient(self._dz, self._kept, of_logp, of_entropy)


def padded_length(weight: Tensor) -> int:
    """Elements from one row of a kernel's logits to the next."""
    from humanline.kernels.launch import row_length

    return row_length(len(weight))


Block = TorchBlock | TritonBlock
BLOCKS = {"torch": TorchBlock, "triton": TritonBlock}


def block_rows(
    kind: type, weight: Tensor, head: Head, with_entropy: bool, workspace_bytes: int
) -> int:
    """Rows whose logits, with what a block of that kind makes of them, fit the workspace.

    Raises:
        ValueError: not even one row fits.
    """
    checks.require_integers(workspace_bytes=workspace_bytes)
    per_row = kind.bytes_per_row(weight, head, with_entropy)
    checks.require(
        workspace_bytes >= per_row,
        lambda: (
            f"workspace_bytes must be at least {per_row} to hold the logits of one row "
            f"(V={len(weight)}), got {workspace_bytes}"
        ),
    )
    return workspace_bytes // per_row


def comfortable_rows(fitting: int, on_cpu: bool) -> int:
    """Rows a block where any number up to ``fitting`` will do."""
    return min(fitting, CPU_BLOCK_ROWS) if on_cpu else whole_tiles(fitting)


@dataclass(frozen=True)
class StackSizes:
    """Rows of a block, whose logits are formed together; and of the stack, in which those with a
    gradient wait to be multiplied together (stacked.py): where it is one block alone, it may lie
    over that block's logits."""

    block: int
    stack: int
    over_logits: bool = False


def stack_sizes(
    rows: int, length: int, width: int, itemsize: int, trains: bool, workspace_bytes: int
) -> StackSizes:
    """What a GPU holds of so many rows.

    Args:
        length: elements of a row of logits.
        width: H.
        itemsize: of the weight's elements, in bytes.
        trains: whether the head does.

    A product over some rows reads and writes the float32 sum for the weight, 4·V·H bytes: what an
    H100 multiplies over some 1,000 rows in the same time. So the gradient of all rows is kept, in
    half precision, while it is no larger than that sum: up to 2H rows, which are multiplied once,
    and there is no sum. Beyond, H rows are kept beside it: as much memory as the weight's gradient,
    rounded, takes when they have been multiplied. The workspace then holds logits alone.

    Where the sum is the result (float32), or there is none (a frozen head), blocks and stack share
    the workspace; so they do where it holds more rows than that. The stack takes as much of it as
    four blocks' gradients, if a block still has the rows that make it worth reading the weight. If
    the logits of all rows fit, their gradient takes their place.
    """
    whole = whole_blocks(length, workspace_bytes)
    if rows <= whole.block:
        return StackSizes(rows, rows, over_logits=True)
    shared = _sharing(length, itemsize, workspace_bytes)
    if trains and itemsize < torch.float32.itemsize:
        kept = rows if rows <= 2 * width else width
        block = whole_tiles(whole.block)
        if block and (shared is None or kept > shared.stack or kept == rows):
            return StackSizes(block, kept)
    return shared or whole


def formed_twice(rows: int, width: int, itemsize: int, sizes: StackSizes) -> bool:
    """Whether a head that trains had better form its logits again than stack their gradient: where
    these have to be summed for either, in half precision, and the head is narrow."""
    return rows > sizes.stack and itemsize < torch.float32.itemsize and width <= NARROW


def whole_blocks(length: int, workspace_bytes: int) -> StackSizes:
    """Blocks of all the rows whose logits fit, each multiplied by itself."""
    rows = workspace_bytes // (length * torch.float32.itemsize)
    return StackSizes(rows, rows, over_logits=True)


def _sharing(length: int, itemsize: int, workspace_bytes: int) -> StackSizes | None:
    logits, gradient = length * torch.float32.itemsize, length * itemsize
    block = whole_tiles(workspace_bytes // (logits + 4 * gradient))
    if block < MIN_ROWS <= workspace_bytes // (logits + gradient):
        block = MIN_ROWS
    return StackSizes(block, (workspace_bytes - block * logits) // gradient) if block else None


def whole_tiles(rows: int) -> int:
    return rows // TILE_ROWS * TILE_ROWS or rows


def rows_of(index: Tensor | slice) -> int:
    return index.stop - index.start if isinstance(index, slice) else len(index)


def head_blocks(
    kind: type[Block],
    hidden: Tensor,
    weight: Tensor,
    head: Head,
    labels: Tensor,
    blocks: list[Tensor | slice],
    with_entropy: bool,
    observe: Observer | None = None,
) -> Iterator[Block]:
    """Blocks of rows, given by their indices, or as runs of rows (which ``keep`` does not take).

    One workspace serves all blocks: a block ends where the next begins. Only the torch backend has
    logits to ``observe``.
    """
    extra = () if observe is None else (observe,)
    memory = kind.memory(weight, max(map(rows_of, blocks), default=0))
    for index in blocks:
        yield kind(memory, hidden, weight, labels, head, index, with_entropy, *extra)
