"""``token_logps``: log-probs (and entropy) of labels from logits, differentiable."""

import math
from typing import Literal, overload

import torch
from torch import Tensor

from humanline import autograd, checks
from humanline.dtypes import compute_dtype
from humanline.ops.backend import choose_backend
from humanline.ops.dtensors import LOGITS, own_part
from humanline.ops.logits.blocks import row_blocks, zero_rows_
from humanline.ops.softmax import SoftmaxBlock
from humanline.ops.temperature import (
    check_temperature,
    divide_by_temperature,
    row_temperature,
)
from humanline.ops.vocabulary import Shard
from humanline.parallel import Parallel, check_parallel
from humanline.rows import IGNORE_INDEX
from humanline.seam import Coefficients


@overload
def token_logps(
    logits: Tensor,
    labels: Tensor,
    temperature: float | Tensor = 1.0,
    *,
    return_entropy: Literal[False] = False,
    backend: str | None = None,
    parallel: Parallel | None = None,
) -> Tensor: ...
@overload
def token_logps(
    logits: Tensor,
    labels: Tensor,
    temperature: float | Tensor = 1.0,
    *,
    return_entropy: Literal[True],
    backend: str | None = None,
    parallel: Parallel | None = None,
) -> tuple[Tensor, Tensor]: ...
@overload
def token_logps(
    logits: Tensor,
    labels: Tensor,
    temperature: float | Tensor = 1.0,
    *,
    return_entropy: bool,
    backend: str | None = None,
    parallel: Parallel | None = None,
) -> Tensor | tuple[Tensor, Tensor]: ...
def token_logps(
    logits: Tensor,
    labels: Tensor,
    temperature: float | Tensor = 1.0,
    *,
    return_entropy: bool = False,
    backend: str | None = None,
    parallel: Parallel | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probs of ``labels`` under ``softmax(logits / temperature)``.

    Args:
        logits: ``[..., V]``, any strides. Row ``t`` predicts ``labels[t]``.
        labels: integer ``[...]``; rows labelled -100 give 0 and take no gradient.
        temperature: a float, or a tensor with one value a row, ``[...]``.
        return_entropy: also return the entropy of each row, in nats.
        backend: "triton" or "torch"; None chooses by device.
        parallel: its ``vocab`` says whose slices of the vocabulary the logits are;
            not under ``torch.compile``.

    Returns:
        ``[...]`` log-probs in nats, float32 (float64 from float64 logits); with ``return_entropy``
        a tuple of log-probs and entropies. Both are differentiable with respect to ``logits``.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; a label outside ``[0, V)`` that is not
            -100; a temperature that is not positive; a DTensor that no axis says how to read.
        TypeError: something else than a tensor or a number.
    """
    logits, shard = sliced_logits(logits, parallel)
    check_logits(logits, labels, temperature, shard)
    backend = choose_backend(logits, backend)
    logps, entropy = logits_logps(logits, labels, temperature, return_entropy, backend, shard)
    return (logps, entropy) if return_entropy else logps


def logits_logps(
    logits: Tensor,
    labels: Tensor,
    temperature: float | Tensor,
    with_entropy: bool,
    backend: str,
    shard: Shard | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Log-probs and, if asked for, entropies, of what is checked."""
    temperature = row_temperature(temperature, labels)
    if shard is None:
        logps, entropy, *_ = _token_logps(logits, labels, temperature, with_entropy, backend)
    else:
        labels = shard.labels(labels)
        logps, entropy = _OfShard.apply(logits, labels, temperature, with_entropy, backend, shard)
    return logps, entropy if with_entropy else None


def shift(labels: Tensor) -> Tensor:
    """Labels aligned with the rows that predict them, from Hugging Face's unshifted ones.

    Args:
        labels: integer ``[B, T]``, ``labels[b, t]`` being the token at position ``t``.

    Returns:
        ``[B, T]``: ``labels[b, t+1]`` at position ``t``, -100 at the last.
    """
    checks.require_tensors(labels=labels)
    checks.require(
        labels.dim() == 2, lambda: f"labels must have shape [B, T], got {list(labels.shape)}"
    )
    return torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)


def sliced_logits(logits: Tensor, parallel: Parallel | None) -> tuple[Tensor, Shard | None]:
    """This rank's logits, and the slice of the vocabulary that they are, if it is split."""
    parallel = check_parallel(parallel)
    logits = own_part(logits, "logits", parallel, LOGITS)
    checks.require_tensors(logits=logits)
    *rows, columns = logits.shape if logits.dim() else (0,)
    return logits, Shard.of(parallel, columns, math.prod(rows), logits.device)


def check_logits(
    logits: Tensor, labels: Tensor, temperature: float | Tensor, shard: Shard | None = None
) -> None:
    checks.require_tensors(logits=logits, labels=labels)
    checks.require_floating(logits=logits)
    checks.require(
        logits.dim() >= 1 and logits.shape[:-1] == labels.shape,
        lambda: (
            f"logits [..., V] and labels [...] must agree, got {list(logits.shape)} and "
            f"{list(labels.shape)}"
        ),
    )
    checks.require_same_device(logits=logits, labels=labels)
    vocab = logits.shape[-1] if shard is None else shard.total
    checks.require_labels(labels, vocab, IGNORE_INDEX)
    check_temperature(temperature, labels)


# The op and its backward. Each has two implementations, kernels and blocks of rows in torch; both
# keep each row's maximum and sum of exponentials for the backward.


@torch.library.custom_op("humanline::token_logps", mutates_args=())
def _token_logps(
    logits: Tensor, labels: Tensor, temperature: Tensor, with_entropy: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    forward = _forward_in_triton if backend == "triton" else _forward_in_torch
    outputs = forward(logits, labels, temperature, with_entropy)
    shape = labels.shape
    return tuple(x.view(shape) if x is not None else logits.new_empty(0) for x in outputs)


@_token_logps.register_fake
def _(logits, labels, temperature, with_entropy, backend):
    dtype = compute_dtype(logits.dtype)
    row, nothing = logits.new_empty(labels.shape, dtype=dtype), logits.new_empty(0)
    entropy = torch.empty_like(row) if with_entropy else nothing
    return row, entropy, torch.empty_like(row), torch.empty_like(row)


@torch.library.custom_op("humanline::token_logps_backward", mutates_args=())
def _token_logps_backward(
    g: Tensor,
    g_entropy: Tensor | None,
    logits: Tensor,
    labels: Tensor,
    temperature: Tensor,
    logps: Tensor,
    entropy: Tensor,
    row_max: Tensor,
    row_sum: Tensor,
    backend: str,
) -> Tensor:
    arguments = (
        g.contiguous(),
        None if g_entropy is None else g_entropy.contiguous(),
        logits,
        labels,
        temperature,
        logps,
        entropy,
        row_max,
        row_sum,
    )
    return (_backward_in_triton if backend == "triton" else _backward_in_torch)(*arguments)


@_token_logps_backward.register_fake
def _(g, g_entropy, logits, *_):
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _setup_context(ctx, inputs, output):
    logits, labels, temperature, ctx.with_entropy, ctx.backend = inputs
    ctx.save_for_backward(logits, labels, temperature, *output)
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)  # of a maximum and a sum, too, zeros would be written


@autograd.backward
def _backward(ctx, g, g_entropy, *_):
    logps = ctx.saved_tensors[3]
    g = torch.zeros_like(logps) if g is None else g
    if ctx.with_entropy and g_entropy is None:
        g_entropy = torch.zeros_like(logps)
    elif not ctx.with_entropy:
        g_entropy = None
    grad = _token_logps_backward(g, g_entropy, *ctx.saved_tensors, ctx.backend)
    return grad, None, None, None, None


_token_logps.register_autograd(_backward, setup_context=_setup_context)


class _OfShard(torch.autograd.Function):
    """The same of a slice of the vocabulary, statistics merged after the forward's launch."""

    @staticmethod
    @autograd.forward
    def forward(ctx, logits, labels, temperature, with_entropy, backend, shard):
        flat = labels.reshape(-1)
        if backend == "triton":
            outputs = _forward_in_triton(logits, flat, temperature, with_entropy)
            nats = 1 / temperature
        else:
            # where another rank has the label, some column's log-prob, which the merge leaves out
            here = flat.clamp(max=shard.size - 1)
            outputs, nats = _forward_in_torch(logits, here, temperature, with_entropy), 1.0
        logps, entropy, row_max, row_sum = outputs
        merged = shard.merge(flat, logps, row_max, row_sum, entropy, nats)
        ctx.backend, ctx.shard = backend, shard
        ctx.save_for_backward(logits, labels, temperature, *merged)
        logps, _, _, entropy = merged
        shape = labels.shape
        return logps.view(shape), None if entropy is None else entropy.view(shape)

    @staticmethod
    @autograd.backward
    def backward(ctx, g, g_entropy):
        logits, labels, temperature, logps, row_max, row_sum, entropy = ctx.saved_tensors
        arguments = (
            *(g.contiguous(), None if entropy is None else g_entropy.contiguous()),
            *(logits, labels, temperature, logps, entropy, row_max, row_sum),
        )
        if ctx.backend == "triton":
            return _backward_in_triton(*arguments), *[None] * 5
        return _backward_in_torch(*arguments, ctx.shard), *[None] * 5


def _forward_in_triton(logits, labels, temperature, with_entropy):
    from humanline.kernels.token_logps import token_logps_forward

    return token_logps_forward(logits, labels, temperature, with_entropy)


def _backward_in_triton(*arguments) -> Tensor:
    from humanline.kernels.token_logps import token_logps_backward

    return token_logps_backward(*arguments)


def _forward_in_torch(logits, labels, temperature, with_entropy):
    labels, dtype = labels.reshape(-1), compute_dtype(logits.dtype)
    logps, row_max, row_sum = (logits.new_zeros(len(labels), dtype=dtype) for _ in range(3))
    entropy = torch.zeros_like(logps) if with_entropy else None
    for view, local, rows in row_blocks(logits, labels != IGNORE_INDEX):
        z = view[local].to(dtype, copy=True)
        divide_by_temperature(z, temperature, rows)
        block = SoftmaxBlock(z, labels[rows].long(), with_entropy)
        logps[rows], row_max[rows], row_sum[rows] = block.logps, block.row_max, block.row_sum
        if with_entropy:
            entropy[rows] = block.entropy
    return logps, entropy, row_max, row_sum


def _backward_in_torch(
    g, g_entropy, logits, labels, temperature, logps, entropy, row_max, row_sum, shard=None
) -> Tensor:
    labels = labels.reshape(-1)
    coefficients = Coefficients(g.reshape(-1), None if g_entropy is None else g_entropy.reshape(-1))
    logps, row_max, row_sum = (x.reshape(-1) for x in (logps, row_max, row_sum))
    entropy = None if entropy is None else entropy.reshape(-1)
    active = coefficients.active() & (labels != IGNORE_INDEX)
    grad = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    grad_rows = grad.view(-1, logits.shape[-1])
    zero_rows_(grad_rows, ~active)
    for view, local, rows in row_blocks(logits, active):
        z = view[local].to(logps.dtype, copy=True)
        divide_by_temperature(z, temperature, rows)
        block = SoftmaxBlock.again(
            z,
            labels[rows].long(),
            logps[rows],
            row_max[rows],
            row_sum[rows],
            None if g_entropy is None else entropy[rows],
            shard,
        )
        some = coefficients.take(rows)
        dz = block.gradient(some.logps, some.entropy)
        divide_by_temperature(dz, temperature, rows)
        grad_rows[rows] = dz.to(grad.dtype)
    return grad
