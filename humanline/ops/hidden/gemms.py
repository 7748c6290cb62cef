"""The three GEMMs of a head on a block of rows: logits, gradient of hidden, gradient of weight.

Logits are formed in float32 (float64 from float64), and never rounded before the log-sum-exp: half
precision loses up to 0.05 nats of a log-prob. Gradients of the weight are summed in float32.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from humanline.dtypes import compute_dtype

if TYPE_CHECKING:
    from humanline.ops.hidden.columns import Kept

_TILE_FLOATS = 2**20  # of the weight, widened at a time
_FLOAT16_TILES = 8  # of the weight's gradient, in float32 one at a time
RANK = 16  # blocks whose left-out columns are added to the weight's gradient together


def _on_tensor_cores(x: Tensor) -> bool:
    return x.is_cuda and x.dtype in (torch.bfloat16, torch.float16)


@contextmanager
def _bfloat16_products(dtype: torch.dtype) -> Iterator[None]:
    """On a CPU, float32 GEMMs whose factors are bfloat16 anyway: let oneDNN multiply them as such.

    It rounds the factors, which changes nothing where they are widened bfloat16, accumulates in
    float32 and returns float32: what a CPU has no other GEMM for. Without the instructions (AMX,
    AVX512-BF16) it is a float32 GEMM.
    """
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    if dtype == torch.bfloat16:
        matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def form_logits(hidden: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    """``hidden [n, H] @ weight [V, H].T`` into ``out [n, V]``."""
    if weight.dtype == out.dtype:
        return torch.mm(hidden, weight.T, out=out)
    if _on_tensor_cores(weight):
        return torch.mm(hidden, weight.T, out_dtype=out.dtype, out=out)
    hidden = hidden.to(out.dtype)
    columns = max(1, _TILE_FLOATS // weight.shape[1])
    with _bfloat16_products(weight.dtype):
        for start in range(0, len(weight), columns):
            tile = slice(start, start + columns)
            torch.mm(hidden, weight[tile].to(out.dtype).T, out=out[:, tile])
    return out


def rounds_products(weight: Tensor) -> bool:
    """Whether a GEMM with this weight comes back in half precision: on a CPU."""
    return not _on_tensor_cores(weight) and weight.dtype != compute_dtype(weight.dtype)


def add_product_(total: Tensor, dz: Tensor, weight: Tensor) -> Tensor:
    """``total [n, H] += dz [n, C] @ weight [C, H]``, the sum in float32 (float64 from float64)."""
    if weight.dtype == total.dtype:
        return total.addmm_(dz, weight)
    if _on_tensor_cores(weight):
        return total.add_(torch.mm(dz.to(weight.dtype), weight, out_dtype=total.dtype))
    return total.add_(dz.to(weight.dtype) @ weight)


def hidden_gradient(
    dz: Tensor,
    weight: Tensor,
    labels: Tensor,
    index: Tensor,
    scale: Tensor | None = None,
    kept: "Kept | None" = None,
) -> Tensor:
    """``scale · (dz @ weight)``, rows ``index``: one reduction over the vocabulary, in float32
    but on its way out. With ``kept``, ``dz [n, K]`` has these columns; nearly over the others, too.

    A CPU has no GEMM from half precision to float32, and what it rounds would be rounded again by
    the scale. Most of a row comes from its label: that part is added in float32, unrounded.
    """
    dtype = compute_dtype(weight.dtype)
    if kept is not None:
        product = kept.hidden_gradient(dz, weight, labels[index])
    elif _on_tensor_cores(weight):
        product = torch.mm(dz.to(weight.dtype), weight, out_dtype=dtype)
    elif weight.dtype == dtype:
        product = dz @ weight
    else:
        # where a shard has not the label, its last column, which is no worse than any
        of_rows = labels[index].long().clamp(max=len(weight) - 1)
        at_label = of_rows[:, None]
        # zeros, not 0: torch scatters a number far slower than a tensor
        zeros = torch.zeros_like(at_label, dtype=weight.dtype)
        rest = dz.to(weight.dtype, copy=True).scatter_(1, at_label, zeros) @ weight
        product = rest.to(dtype).addcmul_(dz.gather(1, at_label).to(dtype), weight[of_rows])
    return product if scale is None else product.mul_(scale[:, None])


def write_hidden_gradient_(
    dh: Tensor,
    dz: Tensor,
    weight: Tensor,
    labels: Tensor,
    scale: Tensor,
    index: Tensor,
    count: Tensor | None,
    kept: "Kept | None" = None,
) -> None:
    """``dh[index] = scale · (dz @ weight)``, of the first ``count`` rows if that is given;
    ``kept`` as in :func:`hidden_gradient`."""
    if count is None:
        dh[index] = hidden_gradient(dz, weight, labels, index, scale, kept).to(dh.dtype)
    else:
        from humanline.kernels.matmul import hidden_gradient_

        hidden_gradient_(dh, dz, weight, count, scale=scale, index=index)


def weight_gradient(
    dz: Tensor,
    scale: Tensor | None,
    h: Tensor,
    total: Tensor | None = None,
    count: Tensor | None = None,
) -> Tensor:
    """``dzᵀ @ (scale·h)``, accumulated in float32 (float64 from float64).

    The row scale goes to ``h``, so that ``dz`` stays within [-1, 1], where half precision is best.

    Args:
        dz: ``[n, V]``; scale: ``[n]``, or None after :func:`scaled_once`; h: ``[n, H]``.
        total: ``[V, H]`` in float32 or float64, to add to, in place; None for 0.
        count: the sum is over the first ``count`` rows if that is given, on the device.
    """
    dtype = compute_dtype(h.dtype)
    if count is not None:
        from humanline.kernels.matmul import add_weight_gradient_

        if total is None:
            total = h.new_zeros(dz.shape[1], h.shape[1], dtype=dtype)
        factor = top(scale)
        scaled = _scaled(h, scale / factor, dz.dtype)
        return add_weight_gradient_(total, dz, scaled, count, factor=factor)
    if not _on_tensor_cores(h):
        with _bfloat16_products(h.dtype):
            factors = dz.T.to(dtype), _scaled(h, scale, dtype)
            return torch.mm(*factors) if total is None else total.addmm_(*factors)
    if h.dtype == torch.bfloat16:
        factors = dz.to(h.dtype).T, _scaled(h, scale, h.dtype)
        if total is None:
            return torch.mm(*factors, out_dtype=dtype)
        return torch.addmm(total, *factors, out_dtype=dtype, out=total)
    add = total is not None
    total = total if add else h.new_empty(dz.shape[1], h.shape[1], dtype=dtype)
    for tile, product, factor in _float16_tiles(dz, scale, h):
        if add:
            total[tile].addcmul_(product, factor)
        else:
            torch.mul(product, factor, out=total[tile])
    return total


def rounded_weight_gradient(
    dz: Tensor, scale: Tensor | None, h: Tensor, kept: "Kept | None" = None
) -> Tensor:
    """The same in the dtype of ``h``, rounded once, without a float32 matrix of the weight's size
    where the GEMM can do so; ``kept`` as in :func:`hidden_gradient`."""
    if kept is not None:
        return kept.rounded_weight_gradient(dz, scale, h)
    if not _on_tensor_cores(h):
        return weight_gradient(dz, scale, h).to(h.dtype)
    if h.dtype == torch.bfloat16:
        with _float32_reductions():
            return torch.mm(dz.T, _scaled(h, scale, h.dtype))
    dw = h.new_empty(dz.shape[1], h.shape[1])
    for tile, product, factor in _float16_tiles(dz, scale, h):
        torch.mul(product, factor, out=dw[tile])
    return dw


def scaled_once(scale: Tensor, h: Tensor) -> tuple[Tensor | None, Tensor]:
    """``scale`` and ``h`` for products with one part of the vocabulary after another: multiplied
    here if each of them would."""
    if _on_tensor_cores(h) and h.dtype == torch.bfloat16:
        return None, _scaled(h, scale, h.dtype)
    return scale, h


def _scaled(h: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``scale·h``, multiplied in float32 at least and rounded once."""
    if scale is None:
        return h
    return torch.mul(h, scale[:, None], out=torch.empty_like(h, dtype=dtype))


def _float16_tiles(dz: Tensor, scale: Tensor, h: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """``dzᵀ @ (scale·h)`` as float32 products of some rows of the weight at a time, each still to
    be multiplied by a number: float16 underflows where coefficients are small, so they are brought
    to 1 and back."""
    factor, dz = top(scale), dz.to(h.dtype)
    scaled = _scaled(h, scale / factor, h.dtype)
    rows = -(-dz.shape[1] // _FLOAT16_TILES)
    for start in range(0, dz.shape[1], rows):
        tile = slice(start, start + rows)
        yield tile, torch.mm(dz[:, tile].T, scaled, out_dtype=compute_dtype(h.dtype)), factor


@contextmanager
def _float32_reductions() -> Iterator[None]:
    """cuBLAS may split a sum over rows; let it add the parts in float32, not in bfloat16."""
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_bf16_reduced_precision_reduction
    matmul.allow_bf16_reduced_precision_reduction = False
    try:
        yield
    finally:
        matmul.allow_bf16_reduced_precision_reduction = before


def top(scale: Tensor) -> Tensor:
    """The largest of the rows' scales by size, and no 0 to divide by."""
    return scale.abs().amax().clamp(min=torch.finfo(scale.dtype).tiny)


class HeadGradients:
    """Gradients summed up block by block, in float32 (float64 from float64)."""

    def __init__(self, weight: Tensor, bias: Tensor | None, need_weight: bool, need_bias: bool):
        self._of_weight = weight if need_weight else None
        self._of_bias = bias if need_bias else None
        self._weight = self._bias = None  # until there is something to sum: no zeros are written
        self._kept: Kept | None = None  # of the last block, and of blocks what is to be added
        self._left_out: list[tuple[Tensor, Tensor]] = []

    def add_bias(self, dz: Tensor, scale: Tensor, h: Tensor, count: Tensor | None = None) -> None:
        """Add a block: ``dz [n, V]``, its rows still to be multiplied by ``scale [n]``; of them
        the first ``count`` if that is given."""
        if self._of_bias is not None:
            self._bias = weight_gradient(dz, scale, ones_of(h), self._bias, count)

    def add_weight(
        self,
        dz: Tensor,
        scale: Tensor,
        h: Tensor,
        count: Tensor | None = None,
        kept: "Kept | None" = None,
    ) -> None:
        """The same; with ``kept``, ``dz [n, K]`` has these columns."""
        if self._of_weight is None:
            return
        if kept is None:
            self._weight = weight_gradient(dz, scale, h, self._weight, count)
            return
        self._weight = kept.add_weight_gradient_(self._total(), dz, scale, h)
        self._kept = kept
        self._left_out.append(kept.left_out(scale, h))
        if len(self._left_out) == RANK:
            self._add_left_out()

    def _add_left_out(self) -> None:
        if self._left_out:
            self._kept.add_left_out_(self._total(), self._left_out)
            self._left_out.clear()

    def _total(self) -> Tensor:
        if self._weight is None:
            of = self._of_weight
            self._weight = torch.zeros_like(of, dtype=compute_dtype(of.dtype))
        return self._weight

    @property
    def weight(self) -> Tensor | None:
        """Of the weight ``[V, H]``; None if not asked for."""
        if self._of_weight is None:
            return None
        self._add_left_out()
        return self._total()

    @property
    def bias(self) -> Tensor | None:
        """Of the bias ``[V]``; None if not asked for."""
        if self._of_bias is None or self._bias is not None:
            return None if self._bias is None else self._bias[:, 0]
        return torch.zeros_like(self._of_bias, dtype=compute_dtype(self._of_bias.dtype))


def ones_of(h: Tensor) -> Tensor:
    """Hidden states that are always 1: a bias is their weight."""
    return torch.ones_like(h[:, :1])
