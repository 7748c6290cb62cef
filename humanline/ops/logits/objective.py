"""A token-level objective straight from logits: each row's gradient formed while it is at hand.

A row is read once, its gradient written once; nothing else of size ``[N, V]`` exists.
"""

import torch
from torch import Tensor

from humanline import autograd, checks
from humanline.dtypes import compute_dtype
from humanline.ops.logits.blocks import (
    can_be_overwritten,
    indices,
    row_blocks,
    row_views,
    zero_rows_,
)
from humanline.ops.scaling import multiply, scaled_gradient
from humanline.ops.softmax import SoftmaxBlock
from humanline.ops.temperature import divide_by_temperature, row_temperature
from humanline.ops.whole_batch import token_evaluation
from humanline.rows import IGNORE_INDEX
from humanline.seam import Evaluation, Problem, evaluate


def logits_objective(
    problem: Problem,
    logits: Tensor,
    labels: Tensor,
    temperature: float | Tensor,
    backend: str,
    inplace: bool = False,
) -> tuple[Tensor, dict[str, Tensor]] | None:
    """Loss and statistics of a token-level problem from ``logits [..., V]``, checked.

    None where the gradient cannot be formed in the forward: it is not wanted, the coefficients need
    other rows, or the objective has no device function. Then: log-probs, objective, backward.
    """
    # float16 would flush small coefficients to 0 before a loss scale could lift them: there, the
    # backward is another launch, which multiplies by the incoming gradient in float32.
    wanted = torch.is_grad_enabled() and logits.requires_grad and logits.dtype != torch.float16
    token_level = problem.coupling == "token"
    checks.require(
        not inplace or token_level or not wanted,
        lambda: (
            f"inplace=True needs a token-level objective, whose gradient is formed while the "
            f"logits are at hand; got {problem.objective!r}"
        ),
    )
    if not wanted or not token_level or torch.compiler.is_compiling():
        return None
    kernel_arguments = problem.kernel_arguments() if backend == "triton" else None
    if backend == "triton" and kernel_arguments is None and not inplace:
        return None  # the log-prob kernels are faster than blocks in torch, but need a buffer
    if inplace:
        _check_inplace(logits)
    return _LogitsObjective.apply(
        logits,
        labels.reshape(-1),
        row_temperature(temperature, labels),
        problem,
        kernel_arguments,
        inplace,
    )


def _of_a_leaf(x: Tensor) -> bool:
    return x.is_leaf or (x._is_view() and x._base.is_leaf)


def _check_inplace(logits: Tensor) -> None:
    checks.require(
        not _of_a_leaf(logits) and can_be_overwritten(logits),
        lambda: (
            "inplace=True overwrites logits: they must be contiguous, or cut from such along T as "
            "logits[:, :-1] is, and the result of a computation rather than a leaf; got "
            f"{'a leaf' if _of_a_leaf(logits) else 'a tensor'} of shape {list(logits.shape)} and "
            f"strides {list(logits.stride())}"
        ),
    )


class _LogitsObjective(torch.autograd.Function):
    @staticmethod
    @autograd.forward
    def forward(ctx, logits, labels, temperature, problem, kernel_arguments, inplace):
        ctx.by_kernel, ctx.inplace, ctx.spent = kernel_arguments is not None, inplace, False
        out = (
            logits.detach()
            if inplace
            else torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        )
        if ctx.by_kernel:
            evaluation = _in_triton(problem, logits, labels, temperature, kernel_arguments, out)
        else:
            source = out if inplace else logits
            evaluation = _in_torch(problem, source, labels, temperature, out, inplace)
        if inplace:  # so that autograd notices if another backward wanted the logits
            torch.autograd.graph.increment_version(logits)
        ctx.save_for_backward(out)
        return evaluation.loss, problem.stats(evaluation)

    @staticmethod
    @autograd.backward
    def backward(ctx, upstream, _):
        if ctx.spent:
            raise RuntimeError(
                "the gradient of from_logits was scaled in place and handed out by the first "
                "backward: call from_logits again for a second one"
            )
        (grad,) = ctx.saved_tensors
        ctx.spent = ctx.by_kernel or ctx.inplace
        if ctx.by_kernel:
            for _, rows in row_views(grad):
                _scale_(rows, upstream)
        elif ctx.inplace:
            multiply(grad, upstream, grad)
        else:
            grad = scaled_gradient(grad, upstream)
        return grad, *[None] * 5


def _in_triton(problem, logits, labels, temperature, arguments, out: Tensor) -> Evaluation:
    loss, g, logps, entropy = _token_loss(logits, labels, temperature, out, **arguments)
    entropy = entropy if problem.objective.needs_entropy else None
    return token_evaluation(problem, arguments, logps, entropy, loss, g)


@torch.library.custom_op("humanline::token_loss", mutates_args=("grad",))
def _token_loss(
    logits: Tensor,
    labels: Tensor,
    temperature: Tensor,
    grad: Tensor,
    weight: Tensor,
    kind: str,
    advantages: Tensor | None = None,
    anchor: Tensor | None = None,
    ref: Tensor | None = None,
    entropy_weight: Tensor | None = None,
    penalty: str | None = None,
    log_eps_P: float = 0.0,
    log_eps_R: float = 0.0,
    low: float = 0.0,
    high: float = 0.0,
    delta: float | None = None,
    beta: float = 0.0,
    temperature_pos: float = 1.0,
    temperature_neg: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    arguments = dict(locals())  # the op's schema has to spell out what the launcher takes
    from humanline.kernels import token_loss as kernel

    loss, g, logps, entropy = kernel.token_loss(**arguments)
    return loss, g, logps, logits.new_empty(0) if entropy is None else entropy


@_token_loss.register_fake
def _(
    logits,
    labels,
    temperature,
    grad,
    weight,
    kind,
    advantages=None,
    anchor=None,
    ref=None,
    entropy_weight=None,
    *_,
    **__,
):
    loss, g, logps = (logits.new_empty(labels.numel(), dtype=torch.float32) for _ in range(3))
    entropy = logits.new_empty(0) if entropy_weight is None else torch.empty_like(loss)
    return loss, g, logps, entropy


@torch.library.custom_op("humanline::scale_", mutates_args=("x",))
def _scale_(x: Tensor, factor: Tensor) -> None:
    from humanline.kernels.scale import scale_

    scale_(x, factor)


def _in_torch(problem, logits, labels, temperature, out: Tensor, inplace: bool) -> Evaluation:
    dtype, with_entropy = compute_dtype(logits.dtype), problem.objective.needs_entropy
    masked = labels == IGNORE_INDEX
    for start, view in row_views(out):
        zero_rows_(view, masked[start : start + len(view)])
    logps = logits.new_zeros(len(labels), dtype=dtype)
    entropy = torch.zeros_like(logps) if with_entropy else None
    for view, local, rows in row_blocks(logits, ~masked):
        # Rows of the gradient: of the logits' own memory, or of a contiguous buffer.
        grad, here = (view, local) if inplace else (out.view(-1, logits.shape[-1]), rows)
        in_place = out.dtype == dtype and isinstance(here, slice)
        z = grad[here].copy_(view[local]) if in_place else view[local].to(dtype, copy=True)
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
            grad[here] = dz.to(out.dtype)
    return evaluate(problem, logps, entropy)
