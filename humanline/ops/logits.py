"""``token_logps``: log-probs (and entropy) of labels from logits, differentiable."""

import math

import torch
from torch import Tensor

from humanline import checks
from humanline.dtypes import compute_dtype
from humanline.ops.softmax import SoftmaxBlock
from humanline.rows import IGNORE_INDEX

# Rows are taken a block at a time, so that what is computed in float32 stays small.
BLOCK_BYTES = 64 * 2**20


def token_logps(
    logits: Tensor,
    labels: Tensor,
    temperature: float | Tensor = 1.0,
    *,
    return_entropy: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probs of ``labels`` under ``softmax(logits / temperature)``.

    Args:
        logits: ``[..., V]``, any strides. Row ``t`` predicts ``labels[t]``.
        labels: integer ``[...]``; rows labelled -100 give 0 and take no gradient.
        temperature: a float, or a tensor with one value a row, ``[...]``.
        return_entropy: also return the entropy of each row, in nats.
        backend: "triton" or "torch"; None chooses by device.

    Returns:
        ``[...]`` log-probs in nats, float32 (float64 from float64 logits); with ``return_entropy``
        a tuple of log-probs and entropies. Both are differentiable with respect to ``logits``.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; a label outside ``[0, V)`` that is not
            -100; a temperature that is not positive.
    """
    check_logits(logits, labels, temperature)
    choose_backend(logits, backend)
    temperature = row_temperature(temperature, labels)
    logps, entropy = _token_logps(logits, labels, temperature, return_entropy)
    return (logps, entropy) if return_entropy else logps


def shift(labels: Tensor) -> Tensor:
    """Labels aligned with the rows that predict them, from Hugging Face's unshifted ones.

    Args:
        labels: integer ``[B, T]``, ``labels[b, t]`` being the token at position ``t``.

    Returns:
        ``[B, T]``: ``labels[b, t+1]`` at position ``t``, -100 at the last.
    """
    checks.require(labels.dim() == 2, f"labels must have shape [B, T], got {list(labels.shape)}")
    return torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)


def choose_backend(x: Tensor, backend: str | None) -> str:
    """The backend that runs ``x``: the one asked for, or the best for its device."""
    checks.require(
        backend in (None, "torch"),
        f'backend must be "torch" or None, got {backend!r}',
    )
    return "torch"


def check_logits(logits: Tensor, labels: Tensor, temperature: float | Tensor) -> None:
    checks.require_floating(logits=logits)
    checks.require(
        logits.dim() >= 2 and logits.shape[:-1] == labels.shape,
        f"logits [..., V] and labels [...] must agree, got {list(logits.shape)} and "
        f"{list(labels.shape)}",
    )
    checks.require_same_device(logits=logits, labels=labels)
    checks.require_labels(labels, logits.shape[-1], IGNORE_INDEX)
    check_temperature(temperature, labels)


def check_temperature(temperature: float | Tensor, labels: Tensor) -> None:
    if not isinstance(temperature, Tensor):
        checks.require(
            temperature > 0 and math.isfinite(temperature),
            f"temperature must be positive and finite, got {temperature}",
        )
        return
    checks.require(
        temperature.dim() == 0 or temperature.shape == labels.shape,
        f"temperature must be a float or have one value a row, {list(labels.shape)}; got "
        f"{list(temperature.shape)}",
    )
    checks.require(
        lambda: bool((temperature > 0).all()),
        lambda: f"temperature must be positive, got {temperature.min().item()}",
        on=temperature,
    )


def row_temperature(temperature: float | Tensor, labels: Tensor) -> Tensor:
    """Temperatures as a flat tensor with one value a row, or a scalar tensor for all rows."""
    if not isinstance(temperature, Tensor):
        return torch.tensor(temperature, dtype=torch.float64)
    return temperature.detach().to(labels.device).reshape(-1 if temperature.dim() else ())


def divide_by_temperature(z: Tensor, temperature: Tensor, rows: Tensor) -> None:
    """In place, ``z [n, V]`` being the rows of these indices."""
    z.div_(temperature if temperature.dim() == 0 else temperature[rows, None])


def _blocks(logits: Tensor, labels: Tensor):
    """Index tensors of unmasked rows, block by block."""
    rows = max(1, BLOCK_BYTES // (4 * logits.shape[-1]))
    return (labels.reshape(-1) != IGNORE_INDEX).nonzero().squeeze(1).split(rows)


def _rows_of(logits: Tensor, index: Tensor) -> Tensor:
    """The rows ``[n, V]`` of these flat indices, whatever the strides: a copy of these alone."""
    return logits[torch.unravel_index(index, logits.shape[:-1])]


@torch.library.custom_op("humanline::token_logps", mutates_args=())
def _token_logps(
    logits: Tensor, labels: Tensor, temperature: Tensor, with_entropy: bool
) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(logits.dtype)
    logps = logits.new_zeros(labels.numel(), dtype=dtype)
    entropy = torch.zeros_like(logps) if with_entropy else logps.new_empty(0)
    for index in _blocks(logits, labels):
        block = _softmax_of(logits, labels, temperature, index, with_entropy)
        logps[index] = block.logps
        if with_entropy:
            entropy[index] = block.entropy
    shape = labels.shape
    return logps.view(shape), entropy.view(shape) if with_entropy else entropy


def _softmax_of(logits, labels, temperature, index, with_entropy) -> SoftmaxBlock:
    z = _rows_of(logits, index).to(compute_dtype(logits.dtype))
    divide_by_temperature(z, temperature, index)
    return SoftmaxBlock(z, labels.reshape(-1)[index].long(), with_entropy)


@_token_logps.register_fake
def _(logits, labels, temperature, with_entropy):
    dtype = compute_dtype(logits.dtype)
    logps = logits.new_empty(labels.shape, dtype=dtype)
    return logps, torch.empty_like(logps) if with_entropy else logps.new_empty(0)


@torch.library.custom_op("humanline::token_logps_backward", mutates_args=())
def _token_logps_backward(
    grad_logps: Tensor,
    grad_entropy: Tensor | None,
    logits: Tensor,
    labels: Tensor,
    temperature: Tensor,
) -> Tensor:
    grad = torch.zeros(logits.shape, dtype=logits.dtype, device=logits.device)
    flat = grad.view(-1, logits.shape[-1])
    g = grad_logps.reshape(-1)
    ge = None if grad_entropy is None else grad_entropy.reshape(-1)
    for index in _blocks(logits, labels):
        active = g[index] != 0 if ge is None else (g[index] != 0) | (ge[index] != 0)
        index = index[active]
        block = _softmax_of(logits, labels, temperature, index, ge is not None)
        dz = block.gradient(g[index], None if ge is None else ge[index])
        divide_by_temperature(dz, temperature, index)
        flat[index] = dz.to(grad.dtype)
    return grad


@_token_logps_backward.register_fake
def _(grad_logps, grad_entropy, logits, labels, temperature):
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _setup_context(ctx, inputs, output):
    logits, labels, temperature, ctx.with_entropy = inputs
    ctx.save_for_backward(logits, labels, temperature)


def _backward(ctx, grad_logps, grad_entropy):
    grad_entropy = grad_entropy if ctx.with_entropy else None
    grad = torch.ops.humanline.token_logps_backward(grad_logps, grad_entropy, *ctx.saved_tensors)
    return grad, None, None, None


_token_logps.register_autograd(_backward, setup_context=_setup_context)
