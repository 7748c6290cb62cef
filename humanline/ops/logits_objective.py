"""A token-level objective straight from logits: each row's gradient formed while it is at hand.

A row is read once, its gradient written once; nothing else of size ``[N, V]`` exists.
"""

import torch
from torch import Tensor

from humanline import autograd
from humanline.dtypes import compute_dtype
from humanline.ops.blocks import empty_gradient, indices, row_blocks
from humanline.ops.logits import divide_by_temperature, row_temperature
from humanline.ops.softmax import SoftmaxBlock
from humanline.rows import IGNORE_INDEX
from humanline.seam import Problem, evaluate


def logits_objective(
    problem: Problem, logits: Tensor, labels: Tensor, temperature: float | Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and statistics of a token-level problem from ``logits [..., V]``, checked."""
    temperature = row_temperature(temperature, labels)
    return _LogitsObjective.apply(logits, labels.reshape(-1), temperature, problem)


class _LogitsObjective(torch.autograd.Function):
    @staticmethod
    @autograd.forward
    def forward(ctx, logits, labels, temperature, problem):
        dtype, with_entropy = compute_dtype(logits.dtype), problem.objective.needs_entropy
        grad, grad_rows = empty_gradient(logits, labels == IGNORE_INDEX)
        logps = logits.new_zeros(len(labels), dtype=dtype)
        entropy = torch.zeros_like(logps) if with_entropy else None
        for view, local, rows in row_blocks(logits, labels != IGNORE_INDEX):
            in_place = grad.dtype == dtype and isinstance(rows, slice)
            z = grad_rows[rows].copy_(view[local]) if in_place else view[local].to(dtype, copy=True)
            divide_by_temperature(z, temperature, rows)
            block = SoftmaxBlock(z, labels[rows].long(), with_entropy)
            logps[rows] = block.logps
            if with_entropy:
                entropy[rows] = block.entropy
            coefficients = evaluate(
                problem, block.logps, block.entropy, indices(rows, labels)
            ).coefficients
            dz = block.gradient(coefficients.logps, coefficients.entropy)
            divide_by_temperature(dz, temperature, rows)
            dz.index_fill_(0, (~coefficients.active()).nonzero().squeeze(1), 0)
            if not in_place:
                grad_rows[rows] = dz.to(grad.dtype)
        ctx.save_for_backward(grad)
        whole = evaluate(problem, logps, entropy)
        return whole.loss, problem.stats(whole)

    @staticmethod
    @autograd.backward
    def backward(ctx, upstream, _):
        (grad,) = ctx.saved_tensors
        return scaled(grad, upstream), None, None, None


def scaled(x: Tensor, upstream: Tensor) -> Tensor:
    """``x · upstream``; on the CPU, where looking is free, ``x`` itself if that is 1."""
    if upstream.device.type == "cpu" and upstream == 1:
        return x
    return (x * upstream).to(x.dtype)
