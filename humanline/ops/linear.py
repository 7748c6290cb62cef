"""``linear_token_logps``: log-probs from hidden states and a head's weight, differentiable.

The forward is one GEMM, a block of rows at a time. The backward recomputes the logits of those rows
whose incoming gradient is not 0, and only of those: 1F + 3F·active, F being one N×H×V GEMM.

With a frozen head it is 2F, for any loss: the gradient of a row's hidden state is its incoming
gradient times that of a unit one, which the forward forms while it has the logits.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from humanline import autograd
from humanline.dtypes import compute_dtype
from humanline.ops.head import (
    WORKSPACE_BYTES,
    Head,
    HeadBlock,
    add_weight_gradient_,
    block_rows,
    check_hidden,
    comfortable_rows,
    hidden_gradient,
    workspace,
)
from humanline.ops.softmax import SoftmaxBlock
from humanline.rows import IGNORE_INDEX
from humanline.seam import Coefficients

#: Looks at a block: the indices ``[n]`` of its rows and their logits ``[n, V]``, which it may read
#: but neither keep nor change.
Observer = Callable[[Tensor, Tensor], None]


def linear_token_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    *,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    return_entropy: bool = False,
    observe: Observer | None = None,
    workspace_bytes: int = WORKSPACE_BYTES,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probs of ``labels`` under the head ``softmax((hidden @ weight.T + bias) / temperature)``.

    Never holds all logits: at most ``workspace_bytes`` of them.

    Args:
        hidden: ``[..., H]``. Row ``t`` predicts ``labels[t]``.
        weight: ``[V, H]``.
        labels: integer ``[...]``; rows labelled -100 give 0, take no gradient and cost nothing.
        bias: ``[V]``.
        temperature: a float, or a tensor with one value a row, ``[...]``.
        logit_scale: multiplies the logits.
        logit_softcap: ``cap · tanh(logits / cap)`` after the scale.
        return_entropy: also return the entropy of each row, in nats.
        observe: looks at the logits while they are there, a block of rows at a time, without
            gradient: for statistics a trainer logs, which would cost a GEMM of their own.
        workspace_bytes: bound of the memory for logits.

    Returns:
        ``[...]`` log-probs in nats, float32 (float64 from float64); with ``return_entropy`` a tuple
        of log-probs and entropies. Differentiable with respect to hidden, weight and bias.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; a label outside ``[0, V)`` that is not
            -100; a workspace that does not hold one row.
    """
    head = Head(bias, temperature, logit_scale, logit_softcap)
    check_hidden(hidden, weight, labels, head)
    hidden, weight = under_autocast(hidden, weight)
    logps, entropy = _LinearTokenLogps.apply(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        bias,
        labels.reshape(-1),
        head.for_rows(labels),
        return_entropy,
        observe,
        workspace_bytes,
        _only_hidden_trains(hidden, weight, bias) and not return_entropy,
    )
    logps = logps.view(labels.shape)
    return (logps, entropy.view(labels.shape)) if return_entropy else logps


def _only_hidden_trains(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    head_trains = weight.requires_grad or (bias is not None and bias.requires_grad)
    return torch.is_grad_enabled() and hidden.requires_grad and not head_trains


def under_autocast(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Cast as autocast does for a linear layer, where it is on."""
    device = hidden.device.type
    if not torch.is_autocast_enabled(device):
        return hidden, weight
    dtype = torch.get_autocast_dtype(device)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in (hidden, weight))


def softmax_blocks(
    hidden: Tensor,
    weight: Tensor,
    head: Head,
    labels: Tensor,
    wanted: Tensor,
    rows: int,
    with_entropy: bool,
    observe: Observer | None = None,
) -> Iterator[tuple[Tensor, HeadBlock, SoftmaxBlock]]:
    """The rows where ``wanted [N]`` holds, so many at a time: their indices, head and softmax.

    One workspace serves all blocks: a block ends where the next begins. The number of rows is read
    from the device.
    """
    blocks = [index for index in wanted.nonzero().squeeze(1).split(rows) if len(index)]
    memory = workspace(weight, max(map(len, blocks), default=0))
    for index in blocks:
        block = HeadBlock(hidden, weight, head, index, memory)
        if observe is not None:
            observe(index, block.logits)
        yield index, block, SoftmaxBlock(block.logits, labels[index].long(), with_entropy)


@dataclass
class HeadGradients:
    """Gradients summed up block by block: of the weight, of the bias; None if not asked for."""

    weight: Tensor | None
    bias: Tensor | None

    @classmethod
    def zeros(cls, weight: Tensor, bias: Tensor | None, need_weight: bool, need_bias: bool):
        dtype = compute_dtype(weight.dtype)
        return cls(
            torch.zeros_like(weight, dtype=dtype) if need_weight else None,
            torch.zeros_like(bias, dtype=dtype) if need_bias else None,
        )

    def add(self, dz: Tensor, scale: Tensor, h: Tensor) -> None:
        """Add a block: ``dz [n, V]``, its rows still to be multiplied by ``scale [n]``."""
        if self.weight is not None:
            add_weight_gradient_(self.weight, dz, scale, h)
        if self.bias is not None:
            self.bias.addmv_(dz.T, scale)


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


class _LinearTokenLogps(torch.autograd.Function):
    @staticmethod
    @autograd.forward
    def forward(
        ctx, hidden, weight, bias, labels, head, with_entropy, observe, workspace_bytes, unit
    ):
        fitting = block_rows(weight, head, with_entropy, workspace_bytes)
        rows = comfortable_rows(weight, fitting)
        logps = hidden.new_zeros(len(labels), dtype=compute_dtype(weight.dtype))
        entropy = torch.zeros_like(logps) if with_entropy else None
        dh = torch.zeros_like(hidden) if unit else None
        for index, block, softmax in softmax_blocks(
            hidden, weight, head, labels, labels != IGNORE_INDEX, rows, with_entropy, observe
        ):
            logps[index] = softmax.logps
            if with_entropy:
                entropy[index] = softmax.entropy
            if unit:
                dz = block.through_options_(softmax.gradient())
                dh[index] = hidden_gradient(dz, weight).to(dh.dtype)
        ctx.unit, ctx.head, ctx.with_entropy, ctx.rows = unit, head, with_entropy, rows
        ctx.save_for_backward(labels, *((dh,) if unit else (hidden, weight, bias)))
        return logps, entropy

    @staticmethod
    @autograd.backward
    def backward(ctx, g, g_entropy):
        if ctx.unit:
            labels, dh = ctx.saved_tensors
            active = ((g != 0) & (labels != IGNORE_INDEX))[:, None]
            return torch.where(active, dh * g[:, None], 0).to(dh.dtype), *[None] * 8
        g_entropy = g_entropy if ctx.with_entropy else None
        return *_recompute(ctx, Coefficients(g, g_entropy)), *[None] * 6


def _recompute(ctx, coefficients: Coefficients) -> tuple[Tensor | None, ...]:
    """Gradients of hidden, weight and bias from the logits of the active rows, formed again."""
    labels, hidden, weight, bias = ctx.saved_tensors
    need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
    dh = torch.zeros_like(hidden) if need_hidden else None
    sums = HeadGradients.zeros(weight, bias, need_weight, need_bias)
    active = coefficients.active() & (labels != IGNORE_INDEX)
    for index, block, softmax in softmax_blocks(
        hidden, weight, ctx.head, labels, active, ctx.rows, ctx.with_entropy
    ):
        scale, of_logp, of_entropy = split_scale(coefficients.take(index))
        dz = block.through_options_(softmax.gradient(of_logp, of_entropy))
        sums.add(dz, scale, block.hidden)
        if need_hidden:
            dh[index] = (hidden_gradient(dz, weight) * scale[:, None]).to(dh.dtype)
    return (
        dh,
        sums.weight.to(weight.dtype) if need_weight else None,
        sums.bias.to(bias.dtype) if need_bias else None,
    )
