"""An objective straight from hidden states: its loss inside the op, so its coefficients are known
while the logits are still there.

| what needs a gradient, what the objective is | GEMMs | how |
|---|---|---|
| nothing | 1F | log-probs |
| the body alone (frozen head), no entropy term | 2F | log-probs, which form dH in the forward |
| token-level, or all rows fit one block | 3F | gradient in the forward, here |
| else | 1F + 3F·active | log-probs, which recompute the active rows in the backward |
"""

import torch
from torch import Tensor

from humanline import autograd
from humanline.dtypes import compute_dtype
from humanline.ops.backend import choose_backend
from humanline.ops.head import (
    Head,
    block_rows,
    comfortable_rows,
    hidden_gradient,
)
from humanline.ops.linear import (
    HeadGradients,
    linear_token_logps,
    softmax_blocks,
    split_scale,
    under_autocast,
)
from humanline.ops.logits_objective import scaled
from humanline.ops.whole_batch import finish
from humanline.rows import IGNORE_INDEX
from humanline.seam import Problem, evaluate


def linear_objective(
    problem: Problem,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    head: Head,
    workspace_bytes: int,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and statistics of a problem from ``hidden [..., H]`` and ``weight [V, H]``, checked."""
    with_entropy = problem.objective.needs_entropy
    hidden, weight = under_autocast(hidden, weight)
    fitting = block_rows(weight, head, with_entropy, workspace_bytes)
    rows = _rows_with_gradient(problem, hidden, weight, head, labels.numel(), fitting)
    if rows is not None:
        return _LinearObjective.apply(
            hidden.reshape(-1, hidden.shape[-1]),
            weight,
            head.bias,
            labels.reshape(-1),
            head.for_rows(labels),
            problem,
            rows,
        )
    result = linear_token_logps(
        hidden,
        weight,
        labels,
        head.bias,
        head.temperature,
        logit_scale=head.logit_scale,
        logit_softcap=head.logit_softcap,
        return_entropy=with_entropy,
        workspace_bytes=workspace_bytes,
    )
    return finish(
        problem, *(result if with_entropy else (result, None)), backend=choose_backend(hidden)
    )


def _rows_with_gradient(
    problem: Problem, hidden: Tensor, weight: Tensor, head: Head, rows: int, fitting: int
) -> int | None:
    """Rows a block if the gradient is formed in the forward (the table above), else None."""
    head_trains = any(x is not None and x.requires_grad for x in (weight, head.bias))
    if not torch.is_grad_enabled() or not (hidden.requires_grad or head_trains):
        return None
    if not head_trains and not problem.objective.needs_entropy:
        return None
    if problem.token_level:
        return comfortable_rows(weight, fitting)
    return fitting if rows <= fitting else None


class _LinearObjective(torch.autograd.Function):
    """Gradients formed in the forward, per unit of the row's scale; scaled in the backward."""

    @staticmethod
    @autograd.forward
    def forward(ctx, hidden, weight, bias, labels, head, problem, rows):
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        with_entropy = problem.objective.needs_entropy
        sums = HeadGradients.zeros(weight, bias, need_weight, need_bias)
        dh = torch.zeros_like(hidden) if need_hidden else None
        logps = hidden.new_zeros(len(labels), dtype=compute_dtype(weight.dtype))
        entropy = torch.zeros_like(logps) if with_entropy else None
        scale = torch.zeros_like(logps)
        whole = None

        for index, block, softmax in softmax_blocks(
            hidden, weight, head, labels, labels != IGNORE_INDEX, rows, with_entropy
        ):
            logps[index] = softmax.logps
            if with_entropy:
                entropy[index] = softmax.entropy
            if problem.token_level:
                coefficients = evaluate(problem, softmax.logps, softmax.entropy, index).coefficients
            else:  # the only block
                whole = evaluate(problem, logps, entropy)
                coefficients = whole.coefficients.take(index)
            kept = coefficients.active().nonzero().squeeze(1)
            if len(kept) == 0:
                continue
            if len(kept) < len(index):
                block.keep(kept)
                softmax.keep(kept)
                index, coefficients = index[kept], coefficients.take(kept)
            scale[index], of_logp, of_entropy = split_scale(coefficients)
            dz = block.through_options_(softmax.gradient(of_logp, of_entropy))
            sums.add(dz, scale[index], block.hidden)
            if need_hidden:
                dh[index] = hidden_gradient(dz, weight).to(dh.dtype)

        whole = whole or evaluate(problem, logps, entropy)
        ctx.save_for_backward(dh, scale, sums.weight, sums.bias)
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        return whole.loss, problem.stats(whole)

    @staticmethod
    @autograd.backward
    def backward(ctx, grad, _):
        dh, scale, dw, db = ctx.saved_tensors
        weight_dtype, bias_dtype = ctx.dtypes
        return (
            None if dh is None else (dh * (scale * grad)[:, None]).to(dh.dtype),
            None if dw is None else scaled(dw, grad).to(weight_dtype),
            None if db is None else scaled(db, grad).to(bias_dtype),
            *[None] * 4,
        )
