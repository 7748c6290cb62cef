"""From the gradient of logits to those of hidden states, weight and bias, while blocks come along.

Each product over some rows reads and writes the whole sum for the weight, V·H floats: what an H100
multiplies over some 1,000 rows in the same time. Rows without a gradient make it worse, as a block
has fewer left to multiply. So on a GPU the rows that have one wait, one behind the other in half
the memory of their logits, until no more fit.
"""

import torch
from torch import Tensor

from humanline.ops.hidden.blocks import Block, TritonBlock, padded_length
from humanline.ops.hidden.gemms import HeadGradients, hidden_gradient
from humanline.ops.hidden.recomputed import wanted_first
from humanline.seam import Coefficients


def split_scale(coefficients: Coefficients) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """A row's coefficients as (scale, of_logp, of_entropy), the latter two within [-1, 1].

    Without entropy the scale is the coefficient itself and ``of_logp`` is None for 1: then ``dz``
    does not depend on the coefficient at all.
    """
    g, g_entropy = coefficients.logps, coefficients.entropy
    if g_entropy is None:
        return g, None, None
    scale = torch.maximum(g.abs(), g_entropy.abs())
    safe = scale.clamp(min=torch.finfo(scale.dtype).tiny)
    return scale, g / safe, g_entropy / safe


class BlockGradients:
    """Each block multiplied as it comes.

    Attributes:
        hidden: the gradient of hidden states ``[N, H]``, or None if not asked for.
        scales: what its rows are still to be multiplied by, ``[N]``, or None.
        head: those of weight and bias.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        need_hidden: bool,
        need_weight: bool,
        need_bias: bool,
    ):
        self._hidden, self._weight, self._labels = hidden, weight, labels
        self.head = HeadGradients.zeros(weight, bias, need_weight, need_bias)
        self.hidden = torch.zeros_like(hidden) if need_hidden else None
        # float16 would flush small coefficients to 0 before a loss scale could lift them: there a
        # row's gradient stays that of a unit coefficient until the backward.
        late = need_hidden and hidden.dtype == torch.float16
        self.scales = hidden.new_zeros(len(labels), dtype=torch.float32) if late else None

    def add(self, block: Block, coefficients: Coefficients) -> None:
        kept = block.keep(coefficients.active())
        if len(kept):
            scale, *of = split_scale(coefficients.take(kept))
            self._multiply(block.gradient(*of), scale, block.index)

    def finish(self) -> None:
        """To be called after the last block."""

    def _multiply(self, dz: Tensor, scale: Tensor, index: Tensor) -> None:
        self.head.add(dz, scale, self._hidden[index])
        if self.hidden is not None:
            if self.scales is not None:
                self.scales[index], scale = scale, None
            of_rows = hidden_gradient(dz, self._weight, self._labels, index, scale)
            self.hidden[index] = of_rows.to(self.hidden.dtype)


class StackedGradients(BlockGradients):
    """Rows that have a gradient multiplied once ``rows`` of them are there, or might be.

    How many there are is known on the device, and on the host by a bound: it is read back when, by
    that, the next block could not be taken.
    """

    def __init__(self, rows: int, *args):
        super().__init__(*args)
        weight = self._weight
        self._dz = weight.new_empty(rows, padded_length(weight))[:, : len(weight)]
        self._index = torch.zeros(rows, dtype=torch.int64, device=weight.device)
        self._scale = weight.new_zeros(rows, dtype=torch.float32)
        self._waiting = torch.zeros((), dtype=torch.int64, device=weight.device)
        self._at_most = 0

    def add(self, block: TritonBlock, coefficients: Coefficients) -> None:
        n = len(block.index)
        if self._at_most + n > len(self._index):
            self._at_most = int(self._waiting)
        if self._at_most + n > len(self._index):
            self._empty()
        order, count = wanted_first(coefficients.active())
        scale, *of = split_scale(coefficients.take(order))
        block.write_gradient(self._dz, order, count, self._waiting, *of)
        # Behind the counted ones come others, which the next block overwrites.
        places = self._waiting + torch.arange(n, device=order.device)
        self._index.index_copy_(0, places, block.index[order])
        self._scale.index_copy_(0, places, scale)
        self._waiting = self._waiting + count
        self._at_most += n

    def finish(self) -> None:
        self._at_most = int(self._waiting)
        self._empty()

    def _empty(self) -> None:
        k, self._at_most = self._at_most, 0
        if k:
            self._multiply(self._dz[:k], self._scale[:k], self._index[:k])
        self._waiting = torch.zeros_like(self._waiting)
