"""The output head on a block of rows: its options, its checks, its three GEMMs.

Logits are formed in float32 (float64 from float64), and never rounded before the log-sum-exp: half
precision loses up to 0.05 nats of a log-prob. On CUDA, half-precision GEMMs accumulate into
float32; elsewhere the weight is widened a tile at a time.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from humanline import checks
from humanline.dtypes import compute_dtype
from humanline.ops.logits import check_temperature, divide_by_temperature, row_temperature
from humanline.rows import IGNORE_INDEX

WORKSPACE_BYTES = 512 * 2**20
# On a CPU, more rows gain a block's GEMMs nothing. A GPU takes as many as the workspace holds:
# each block reads and writes the whole gradient of the weight.
CPU_BLOCK_ROWS = 512
_TILE = 8192  # columns of the vocabulary widened at a time


@dataclass(frozen=True)
class Head:
    """What happens to ``hidden @ weight.T`` before the softmax, in this order: ``+ bias``,
    ``· logit_scale``, ``logit_softcap · tanh(· / logit_softcap)``, ``/ temperature``."""

    bias: Tensor | None = None
    temperature: float | Tensor = 1.0
    logit_scale: float = 1.0
    logit_softcap: float | None = None

    def for_rows(self, labels: Tensor) -> "Head":
        """The same with the temperature as a tensor, flat or scalar."""
        return replace(self, temperature=row_temperature(self.temperature, labels))


def check_hidden(hidden: Tensor, weight: Tensor, labels: Tensor, head: Head) -> None:
    """Raise ValueError unless these fit together."""
    checks.require_floating(hidden=hidden, weight=weight, bias=head.bias)
    checks.require(
        hidden.dim() >= 2 and hidden.shape[:-1] == labels.shape,
        lambda: (
            f"hidden [..., H] and labels [...] must agree, got {list(hidden.shape)} and "
            f"{list(labels.shape)}"
        ),
    )
    checks.require(
        weight.dim() == 2 and weight.shape[1] == hidden.shape[-1],
        lambda: (
            f"weight must have shape [V, {hidden.shape[-1]}] for this hidden, got "
            f"{list(weight.shape)}"
        ),
    )
    checks.require(
        head.bias is None or head.bias.shape == weight.shape[:1],
        lambda: (
            f"bias must have shape {list(weight.shape[:1])}, got "
            f"{list(head.bias.shape) if head.bias is not None else None}"
        ),
    )
    checks.require(
        hidden.dtype == weight.dtype or torch.is_autocast_enabled(hidden.device.type),
        lambda: f"hidden and weight must have one dtype, got {hidden.dtype} and {weight.dtype}",
    )
    checks.require(
        head.logit_softcap is None or head.logit_softcap > 0,
        lambda: f"logit_softcap must be positive or None, got {head.logit_softcap}",
    )
    checks.require_same_device(hidden=hidden, weight=weight, labels=labels, bias=head.bias)
    checks.require_labels(labels, weight.shape[0], IGNORE_INDEX)
    check_temperature(head.temperature, labels)


def block_rows(weight: Tensor, head: Head, with_entropy: bool, workspace_bytes: int) -> int:
    """Rows whose logits fit the workspace, with what softcap, entropy and half precision take.

    Where rows drop out of the backward, a copy of a block's active rows comes on top.

    Raises:
        ValueError: not even one row fits.
    """
    dtype = compute_dtype(weight.dtype)
    buffers = 1 + with_entropy + (head.logit_softcap is not None) + (weight.dtype != dtype)
    per_row = buffers * weight.shape[0] * dtype.itemsize
    checks.require(
        workspace_bytes >= per_row,
        lambda: (
            f"workspace_bytes must be at least {per_row} to hold the logits of one row "
            f"(V={weight.shape[0]}), got {workspace_bytes}"
        ),
    )
    return workspace_bytes // per_row


def comfortable_rows(weight: Tensor, fitting: int) -> int:
    """Rows a block where any number up to ``fitting`` will do."""
    return min(fitting, CPU_BLOCK_ROWS) if weight.device.type == "cpu" else fitting


def workspace(weight: Tensor, rows: int) -> Tensor:
    """Memory ``[rows, V]`` for the logits of a block, used by one block after the other."""
    return weight.new_empty(rows, len(weight), dtype=compute_dtype(weight.dtype))


class HeadBlock:
    """Logits ``[n, V]`` of the rows in ``index``, and the way back through them."""

    def __init__(self, hidden: Tensor, weight: Tensor, head: Head, index: Tensor, out: Tensor):
        self.hidden, self.head, self.index = hidden[index], head, index
        z = _logits(self.hidden, weight, out[: len(index)])
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
        self.logits = z

    def keep(self, kept: Tensor) -> None:
        """Forget all rows but those in ``kept`` (positions within the block)."""
        self.hidden, self.index = self.hidden[kept], self.index[kept]
        if self._softcap_slope is not None:
            self._softcap_slope = self._softcap_slope[kept]

    def through_options_(self, dz: Tensor) -> Tensor:
        """Gradient of ``hidden @ weight.T + bias`` from that of the logits, in place."""
        divide_by_temperature(dz, self.head.temperature, self.index)
        if self._softcap_slope is not None:
            dz *= self._softcap_slope
        if self.head.logit_scale != 1:
            dz *= self.head.logit_scale
        return dz


def _on_tensor_cores(x: Tensor) -> bool:
    return x.is_cuda and x.dtype in (torch.bfloat16, torch.float16)


def _logits(h: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    if weight.dtype == out.dtype:
        return torch.mm(h, weight.T, out=out)
    if _on_tensor_cores(weight):
        return torch.mm(h, weight.T, out_dtype=out.dtype, out=out)
    h = h.to(out.dtype)
    for tile in range(0, len(weight), _TILE):
        out[:, tile : tile + _TILE] = h @ weight[tile : tile + _TILE].to(out.dtype).T
    return out


def hidden_gradient(dz: Tensor, weight: Tensor) -> Tensor:
    """``dz @ weight``: one reduction over the vocabulary, so that it is rounded once."""
    if _on_tensor_cores(weight):
        return torch.mm(dz.to(weight.dtype), weight, out_dtype=dz.dtype)
    return dz.to(weight.dtype) @ weight


def add_weight_gradient_(total: Tensor, dz: Tensor, scale: Tensor, h: Tensor) -> None:
    """``total += dzᵀ @ (scale·h)``, accumulated in ``total``'s float32 or float64.

    The row scale goes to ``h``, so that ``dz`` stays within [-1, 1], where half precision is best.
    """
    scaled = h.to(total.dtype) * scale[:, None]
    if not _on_tensor_cores(h):
        total.addmm_(dz.T, scaled)
    elif h.dtype == torch.bfloat16:
        torch.addmm(total, dz.to(h.dtype).T, scaled.to(h.dtype), out_dtype=total.dtype, out=total)
    else:  # float16 underflows where coefficients are small: bring them to 1 and back
        top = scale.abs().amax()
        half = (scaled / top.clamp(min=torch.finfo(top.dtype).tiny)).to(h.dtype)
        total += torch.mm(dz.to(h.dtype).T, half, out_dtype=total.dtype) * top
