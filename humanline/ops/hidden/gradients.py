"""From the gradient of logits to those of hidden states, weight and bias, block by block."""

import torch
from torch import Tensor

from humanline import checks
from humanline.ops.hidden.blocks import CPU_BLOCK_ROWS, Block
from humanline.ops.hidden.columns import Columns
from humanline.ops.hidden.gemms import HeadGradients, hidden_gradient
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
        columns: Columns,
    ):
        self._hidden, self._weight, self._labels = hidden, weight, labels
        self._columns = columns
        self.head = HeadGradients(weight, bias, need_weight, need_bias)
        self.hidden = torch.zeros_like(hidden) if need_hidden else None
        # float16 would flush small coefficients to 0 before a loss scale could lift them: there a
        # row's gradient stays that of a unit coefficient until the backward.
        late = need_hidden and hidden.dtype == torch.float16
        self.scales = hidden.new_zeros(len(labels), dtype=torch.float32) if late else None

    def add(self, block: Block, coefficients: Coefficients) -> None:
        kept = block.keep(coefficients.active())
        if len(kept):
            scale, *of = split_scale(coefficients.take(kept))
            dz = block.gradient(*of)
            rows = len(dz)
            if self._columns.tolerance and checks.free_to_read(dz):
                rows = CPU_BLOCK_ROWS  # enough for a GEMM, and fewer rows need fewer columns
            for some in zip(*(x.split(rows) for x in (dz, scale, block.index)), strict=True):
                self.multiply(*some)

    def multiply(self, dz: Tensor, scale: Tensor, index: Tensor) -> None:
        """Add what rows ``index [n]`` contribute, ``dz [n, V]`` to be multiplied by ``scale``."""
        h = self._hidden[index]
        kept = self._columns.choose(dz, scale, self._labels[index])
        self.head.add_bias(dz, scale, h)
        if kept is not None:
            dz = kept.take_(dz)
        self.head.add_weight(dz, scale, h, kept=kept)
        if self.hidden is not None:
            if self.scales is not None:
                self.scales[index], scale = scale, None
            of_rows = hidden_gradient(dz, self._weight, self._labels, index, scale, kept)
            self.hidden[index] = of_rows.to(self.hidden.dtype)
