"""The three GEMMs of a head on a block of rows: logits, gradient of hidden, gradient of weight.

Logits are formed in float32 (float64 from float64), and never rounded before the log-sum-exp: half
precision loses up to 0.05 nats of a log-prob. Gradients of the weight are summed in float32.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from humanline.dtypes import compute_dtype

_TILE_FLOATS = 2**20  # of the weight, widened at a time


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


def hidden_gradient(
    dz: Tensor, weight: Tensor, labels: Tensor, index: Tensor, scale: Tensor | None = None
) -> Tensor:
    """``scale · (dz @ weight)``, rows ``index``: one reduction over the vocabulary, in float32
    but on its way out.

    A CPU has no GEMM from half precision to float32, and what it rounds would be rounded again by
    the scale. Most of a row comes from its label: that part is added in float32, unrounded.
    """
    dtype = compute_dtype(weight.dtype)
    if _on_tensor_cores(weight):
        product = torch.mm(dz.to(weight.dtype), weight, out_dtype=dtype)
    elif weight.dtype == dtype:
        product = dz @ weight
    else:
        of_rows = labels[index].long()
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
) -> None:
    """``dh[index] = scale · (dz @ weight)``, of the first ``count`` rows if that is given."""
    if count is None:
        dh[index] = hidden_gradient(dz, weight, labels, index, scale).to(dh.dtype)
    else:
        from humanline.kernels.matmul import hidden_gradient_

        hidden_gradient_(dh, dz, weight, count, scale=scale, index=index)


def add_weight_gradient_(
    total: Tensor, dz: Tensor, scale: Tensor, h: Tensor, count: Tensor | None = None
) -> None:
    """``total += dzᵀ @ (scale·h)``, accumulated in ``total``'s float32 or float64; the sum is over
    the first ``count`` rows if that is given.

    The row scale goes to ``h``, so that ``dz`` stays within [-1, 1], where half precision is best.
    """
    scaled = h.to(total.dtype) * scale[:, None]
    if count is not None:
        from humanline.kernels.matmul import add_weight_gradient_ as add

        top = _top(scale)
        add(total, dz, (scaled / top).to(dz.dtype), count, factor=top)
    elif not _on_tensor_cores(h):
        with _bfloat16_products(h.dtype):
            total.addmm_(dz.T.to(total.dtype), scaled)
    elif h.dtype == torch.bfloat16:
        torch.addmm(total, dz.to(h.dtype).T, scaled.to(h.dtype), out_dtype=total.dtype, out=total)
    else:  # float16 underflows where coefficients are small: bring them to 1 and back
        top = _top(scale)
        total += torch.mm(dz.to(h.dtype).T, (scaled / top).to(h.dtype), out_dtype=total.dtype) * top


def _top(scale: Tensor) -> Tensor:
    return scale.abs().amax().clamp(min=torch.finfo(scale.dtype).tiny)


@dataclass
class HeadGradients:
    """Gradients summed up block by block: of the weight, of the bias; None if not asked for."""

    weight: Tensor | None
    bias: Tensor | None

    @classmethod
    def zeros(
        cls, weight: Tensor, bias: Tensor | None, need_weight: bool, need_bias: bool
    ) -> "HeadGradients":
        dtype = compute_dtype(weight.dtype)
        return cls(
            torch.zeros_like(weight, dtype=dtype) if need_weight else None,
            torch.zeros_like(bias, dtype=dtype) if need_bias else None,
        )

    def add(self, dz: Tensor, scale: Tensor, h: Tensor, count: Tensor | None = None) -> None:
        """Add a block: ``dz [n, V]``, its rows still to be multiplied by ``scale [n]``; of them
        the first ``count`` if that is given."""
        if self.weight is not None:
            add_weight_gradient_(self.weight, dz, scale, h, count)
        if self.bias is not None:  # the weight of a hidden state that is always 1
            add_weight_gradient_(self.bias[:, None], dz, scale, torch.ones_like(h[:, :1]), count)
