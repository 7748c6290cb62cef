"""An objective straight from hidden states: its loss inside the op, so its coefficients are known
while the logits are still there.

| backend | what needs a gradient, what the objective is | GEMMs | how |
|---|---|---|---|
| | nothing | 1F | log-probs |
| triton | head trains, no entropy term | 1F + 2F·active | rows wait for one another, stacked.py |
| triton | token-level, exists as a device function | 1F + 2F·active | the same |
| torch, or entropy | what hangs together fits a block | 1F + 2F·active | in the forward, here |
| | else, frozen head, no entropy term | 2F | log-probs, which form dH in the forward |
| | else | 1F + 3F·active | log-probs, which recompute the active rows in the backward |

Rows depend on no other (token-level), on those of their sequence, of their pair, or of the batch
(``coupling``); to be stacked, those that do must fit the stack, and of a narrow head all must, for
there the last line is faster (blocks.formed_twice). One F·active less where the head or
the body is frozen. ``capturable``, which must not know the number of active rows, always takes the
last line.

Read back from the device: how many rows are labelled (in each sequence, where groups go by these),
once a call; and how many are active: of those stacked each time all that hang together are known,
once up to 2H rows; in blocks of their own once each; in the last line once, in the backward. With
a ``gradient_tolerance``, which makes of each F in the gradients ρF (columns.py), also how many
columns are kept: once for each block of rows that is multiplied together.
"""

import torch
from torch import Tensor

from humanline import autograd
from humanline.dtypes import compute_dtype
from humanline.ops.hidden import stacked
from humanline.ops.hidden.blocks import BLOCKS, block_rows, comfortable_rows, head_blocks
from humanline.ops.hidden.columns import Columns
from humanline.ops.hidden.gradients import BlockGradients
from humanline.ops.hidden.head import Head
from humanline.ops.hidden.schedule import blocks_with_gradient
from humanline.ops.hidden.token_logps import check_capturable, head_logps, under_autocast
from humanline.ops.whole_batch import evaluate as evaluate_batch
from humanline.ops.whole_batch import finish
from humanline.seam import Problem, evaluate


def linear_objective(
    problem: Problem,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    head: Head,
    workspace_bytes: int,
    backend: str,
    capturable: bool,
    gradient_tolerance: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and statistics of a problem from ``hidden [..., H]`` and ``weight [V, H]``, checked."""
    columns = Columns(gradient_tolerance, hidden, backend)
    loss, stats = _linear_objective(
        problem, hidden, weight, labels, head, workspace_bytes, backend, capturable, columns
    )
    if columns.tolerance and loss.requires_grad:
        stats["humanline/kept_columns"] = columns.share
    return loss, stats


def _linear_objective(
    problem, hidden, weight, labels, head, workspace_bytes, backend, capturable, columns
):
    with_entropy = problem.objective.needs_entropy
    hidden, weight = under_autocast(hidden, weight)
    check_capturable(capturable, backend)
    fitting = block_rows(BLOCKS[backend], head.as_wide(weight), head, with_entropy, workspace_bytes)
    rows = hidden.reshape(-1, hidden.shape[-1]), weight
    flat = labels.reshape(-1), head.for_rows(labels)
    blocks = plan = None
    if _trains(hidden, weight, head.bias) and not capturable:
        head_trains = _trains(weight, head.bias)
        if backend == "triton" and (head_trains or problem.coupling == "token"):
            plan = stacked.plan(problem, weight, head, head_trains, workspace_bytes)
        if plan is not None:
            return stacked.stacked_objective(problem, *rows, *flat, plan, columns)
        if backend == "torch" or with_entropy:  # else it takes a second pass over the logits
            comfortable = comfortable_rows(fitting, backend == "torch")
            blocks = blocks_with_gradient(problem, problem.layout.mask, fitting, comfortable)
    if blocks is not None:
        return _LinearObjective.apply(*rows, head.bias, *flat, problem, blocks, backend, columns)
    result = head_logps(
        *(hidden, weight, labels, head),
        return_entropy=with_entropy,
        workspace_bytes=workspace_bytes,
        backend=backend,
        capturable=capturable,
        columns=columns,
    )
    logps, entropy = result if with_entropy else (result, None)
    return finish(problem, logps, entropy, backend)


def _trains(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


class _LinearObjective(torch.autograd.Function):
    """Gradients formed in the forward; scaled by the incoming gradient in the backward."""

    @staticmethod
    @autograd.forward
    def forward(ctx, hidden, weight, bias, labels, head, problem, blocks, backend, columns):
        with_entropy = problem.objective.needs_entropy
        need = ctx.needs_input_grad[:3]
        gradients = BlockGradients(hidden, weight, bias, labels, *need, columns)
        logps = hidden.new_zeros(len(labels), dtype=compute_dtype(weight.dtype))
        entropy = torch.zeros_like(logps) if with_entropy else None
        whole = None

        for block in head_blocks(
            BLOCKS[backend], hidden, weight, head, labels, blocks, with_entropy
        ):
            logps[block.index] = block.logps
            if with_entropy:
                entropy[block.index] = block.entropy
            if problem.coupling == "token":
                coefficients = evaluate(
                    problem, block.logps, block.entropy, block.index
                ).coefficients
            else:  # right for this block's rows, whatever is still missing; at last, for all
                whole = evaluate_batch(problem, logps, entropy, backend)
                coefficients = whole.coefficients.take(block.index)
            gradients.add(block, coefficients)

        whole = whole or evaluate_batch(problem, logps, entropy, backend)
        of_head = gradients.head
        ctx.save_for_backward(gradients.hidden, gradients.scales, of_head.weight, of_head.bias)
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        return whole.loss, problem.stats(whole)

    @staticmethod
    @autograd.backward
    def backward(ctx, grad, _):
        return *stacked.summed(ctx, grad), *[None] * 6
