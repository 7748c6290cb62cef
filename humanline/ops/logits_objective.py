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
from humanline.seam import Coefficients, Evaluation, Problem, evaluate


def logits_objective(
    problem: Problem, logits: Tensor, labels: Tensor, temperature: float | Tensor, backend: str
) -> tuple[Tensor, dict[str, Tensor]] | None:
    """Loss and statistics of a token-level problem from ``logits [..., V]``, checked.

    None where the gradient cannot be formed in the forward: it is not wanted, the coefficients need
    other rows, or the objective has no device function. Then: log-probs, objective, backward.
    """
    wanted = torch.is_grad_enabled() and logits.requires_grad
    if not wanted or not problem.token_level or torch.compiler.is_compiling():
        return None
    kernel_arguments = problem.kernel_arguments() if backend == "triton" else None
    if backend == "triton" and kernel_arguments is None:
        return None
    return _LogitsObjective.apply(
        logits,
        labels.reshape(-1),
        row_temperature(temperature, labels),
        problem,
        kernel_arguments,
    )


class _LogitsObjective(torch.autograd.Function):
    @staticmethod
    @autograd.forward
    def forward(ctx, logits, labels, temperature, problem, kernel_arguments):
        ctx.by_kernel, ctx.spent = kernel_arguments is not None, False
        if ctx.by_kernel:
            grad, evaluation = _in_triton(problem, logits, labels, temperature, kernel_arguments)
        else:
            grad, evaluation = _in_torch(problem, logits, labels, temperature)
        ctx.save_for_backward(grad)
        return evaluation.loss, problem.stats(evaluation)

    @staticmethod
    @autograd.backward
    def backward(ctx, upstream, _):
        (grad,) = ctx.saved_tensors
        if not ctx.by_kernel:
            return scaled(grad, upstream), None, None, None, None
        from humanline.kernels.scale import scale_

        if ctx.spent:
            raise RuntimeError(
                "the gradient of from_logits was scaled in place and handed out by the first "
                "backward: call from_logits again for a second one"
            )
        ctx.spent = True
        return scale_(grad, upstream), None, None, None, None


def _in_triton(problem, logits, labels, temperature, arguments) -> tuple[Tensor, Evaluation]:
    from humanline.kernels.token_loss import token_loss

    loss, grad, g, logps, entropy = token_loss(logits, labels, temperature, **arguments)
    g_entropy = None
    if entropy is not None:
        g_entropy = torch.where(problem.layout.mask, arguments["entropy_weight"], 0)
    rows = problem.rows(logps, entropy)
    return grad, Evaluation(loss.sum(), Coefficients(g, g_entropy), rows)


def _in_torch(problem, logits, labels, temperature) -> tuple[Tensor, Evaluation]:
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
    return grad, evaluate(problem, logps, entropy)


def scaled(x: Tensor, upstream: Tensor) -> Tensor:
    """``x · upstream``; on the CPU, where looking is free, ``x`` itself if that is 1."""
    if upstream.device.type == "cpu" and upstream == 1:
        return x
    return (x * upstream).to(x.dtype)
