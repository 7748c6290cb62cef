"""An objective from hidden states where rows wait for one another: the Triton backend.

Without an entropy term the gradient of a row's logits is that of a unit coefficient times its
coefficient, which can be multiplied to the row's hidden state, or its gradient, instead: H numbers,
not V. So a block's gradient is formed while its logits are there, whatever its rows depend on, and
kept in the dtype of the GEMMs that follow (:class:`Stack`). Once what hangs together is complete
the coefficients are known, and rows without one leave the stack. With an entropy term, coefficients
have to be known first: those of token-level objectives that exist as a device function are.

While all rows fit, nothing is multiplied before the backward, where the incoming gradient is known:
one product for the hidden states, one for the weight, each rounded once. Else the stack is emptied
into float32 sums whenever it is full.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from humanline import autograd
from humanline.ops.hidden.blocks import (
    StackSizes,
    TritonBlock,
    formed_twice,
    padded_length,
    stack_sizes,
    whole_blocks,
)
from humanline.ops.hidden.columns import Columns
from humanline.ops.hidden.gemms import (
    form_logits,
    hidden_gradient,
    ones_of,
    rounded_weight_gradient,
    weight_gradient,
)
from humanline.ops.hidden.gradients import BlockGradients
from humanline.ops.hidden.head import Head
from humanline.ops.hidden.schedule import groups, labelled_rows
from humanline.ops.scaling import scaled_gradient
from humanline.ops.softmax import front_order
from humanline.ops.whole_batch import evaluate as evaluate_batch
from humanline.ops.whole_batch import token_evaluation
from humanline.seam import Evaluation, Problem


@dataclass(frozen=True)
class Plan:
    """Which rows go through the head, in which order, and how many wait.

    Attributes:
        rows: indices of the ``n`` labelled rows; None for all, as they are.
        n: their number.
        groups: how many in turn depend on one another; None where a row is free.
        sizes: of blocks and stack.
        arguments: of the objective's device function, or None.
    """

    rows: Tensor | None
    n: int
    groups: list[int] | None
    sizes: StackSizes
    arguments: dict | None

    def ends(self) -> Iterator[int]:
        """Where the stack may be emptied, after so many rows."""
        end = 0
        for rows in self.groups:
            end += rows
            yield end

    def end(self, start: int, room: int) -> int:
        """As many rows from ``start`` on as fit and hang together, at best."""
        if self.groups is None:
            return min(start + room, self.n)
        return max((e for e in self.ends() if e <= start + room), default=start)


def plan(
    problem: Problem, weight: Tensor, head: Head, trains: bool, workspace_bytes: int
) -> Plan | None:
    """How the rows of a problem are stacked; None where another way has to be found, as they depend
    on one another and do not fit, or coefficients are needed too early; or is faster."""
    arguments = None
    if problem.coupling == "token" and head.shard is None:  # else log-probs are still to be merged
        arguments = problem.kernel_arguments()
    weight = head.as_wide(weight)
    if problem.objective.needs_entropy and arguments is None:
        return None
    rows, lengths = labelled_rows(problem)
    n, hangs_together = len(rows), None
    length = padded_length(weight)
    sizes = stack_sizes(n, length, weight.shape[1], weight.element_size(), trains, workspace_bytes)
    if n > sizes.stack and problem.coupling == "batch":
        return None
    without_entropy = not problem.objective.needs_entropy
    if (
        trains
        and without_entropy
        and formed_twice(n, weight.shape[1], weight.element_size(), sizes)
    ):
        return None
    if n > sizes.stack and lengths is not None:
        rows, hangs_together = groups(problem, rows, lengths)
        sizes = next(
            (
                s
                for s in (sizes, whole_blocks(length, workspace_bytes))
                if max(hangs_together) <= s.stack
            ),
            None,
        )
        if sizes is None:
            return None
    in_order = n == len(problem.layout.mask) and hangs_together is None
    return Plan(None if in_order else rows, n, hangs_together, sizes, arguments)


def stacked_objective(
    problem: Problem,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    head: Head,
    plan: Plan,
    columns: Columns,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and statistics from ``hidden [N, H]``; differentiable."""
    return _Stacked.apply(hidden, weight, head.bias, labels, head, problem, plan, columns)


def _take(x: Tensor | None, rows: Tensor | None) -> Tensor | None:
    return x if x is None or rows is None or x.dim() == 0 else x[rows]


class Stack:
    """The gradient of the logits of rows that have one, still to be multiplied by their scale.

    Attributes:
        waiting: how many there are, the first rows of ``dz [capacity, V]``.
    """

    def __init__(self, memory: Tensor):
        self._dz = memory
        self._kept: list[tuple[Tensor | slice, Tensor]] = []
        self.waiting = 0

    @property
    def room(self) -> int:
        return len(self._dz) - self.waiting

    def place(self, first: int, rows: int) -> Tensor:
        """Memory of so many rows, ``first`` behind those that wait."""
        return self._dz[self.waiting + first :][:rows]

    def settle(self, start: int, scale: Tensor) -> None:
        """The last rows, from ``start`` on, have this scale ``[n]``: those where it is 0 are
        forgotten, others move to their places. Reads how many are left."""
        from humanline.kernels.move_rows import move_rows_

        order = front_order(scale != 0)
        if len(order) == len(scale):
            self._kept.append((slice(start, start + len(scale)), scale))
        else:
            move_rows_(self.place(0, len(scale)), order)
            self._kept.append((order + start, scale[order]))
        self.waiting += len(order)

    def empty(self) -> tuple[Tensor, Tensor | slice, Tensor]:
        """What waits: ``dz [k, V]``, which rows these are, their scales ``[k]``."""
        dz, kept = self._dz[: self.waiting], self._kept
        self.waiting, self._kept = 0, []
        if len(kept) == 1:
            return dz, *kept[0]
        device = dz.device
        which = [
            torch.arange(x.start, x.stop, device=device) if isinstance(x, slice) else x
            for x, _ in kept
        ]
        return dz, torch.cat(which), torch.cat([scale for _, scale in kept])


class _Stacked(torch.autograd.Function):
    @staticmethod
    @autograd.forward
    def forward(ctx, hidden, weight, bias, labels, head, problem, plan, columns):
        some = _Rows(hidden, weight, labels, head, problem, plan)
        need = ctx.needs_input_grad[:3]
        stack = Stack(some.memory_of_stack())
        sums, start = None, 0
        while start < plan.n:
            end = plan.end(start, stack.room)
            # Little room is left to rows of which any may go: not worth a read.
            cramped = end - start < min(plan.n - start, stack.waiting)
            if start and (end == start or cramped or plan.sizes.over_logits):
                sums = sums or BlockGradients(hidden, weight, bias, labels, *need, columns)
                some.multiply(stack, sums)
                end = plan.end(start, stack.room)
            some.through_the_head(start, end, stack)
            stack.settle(start, some.scale(start, end))
            start = end
        evaluation = some.evaluation()
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        ctx.at_once = sums is None
        if ctx.at_once and plan.n:
            dz, kept, scale = stack.empty()
            ctx.rows = some.original(kept)
            ctx.columns = columns.choose(dz, scale, labels[ctx.rows])
            db = None
            if ctx.columns is not None:
                if need[2]:
                    db = weight_gradient(dz, scale, ones_of(hidden[ctx.rows]))[:, 0]
                dz = ctx.columns.take_(dz)
            ctx.save_for_backward(dz, scale, hidden, weight, bias, labels, db)
        else:
            sums = sums or BlockGradients(hidden, weight, bias, labels, *need, columns)
            some.multiply(stack, sums)
            of_head = sums.head
            ctx.at_once = False
            ctx.save_for_backward(sums.hidden, sums.scales, of_head.weight, of_head.bias)
        return evaluation.loss, problem.stats(evaluation)

    @staticmethod
    @autograd.backward
    def backward(ctx, grad, _):
        return *(_multiplied if ctx.at_once else summed)(ctx, grad), *[None] * 5


def _multiplied(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients from the stack, in which all rows are that have one."""
    dz, scale, hidden, weight, bias, labels, db = ctx.saved_tensors
    rows, (need_hidden, need_weight, need_bias) = ctx.rows, ctx.needs_input_grad[:3]
    scale = scale * grad
    h = hidden[rows]
    dh = dw = None
    if need_hidden:
        dh = hidden_gradient(dz, weight, labels, rows, scale, ctx.columns).to(hidden.dtype)
        if len(dh) < len(hidden):
            dh = torch.zeros_like(hidden).index_copy_(0, _indices(rows, dh), dh)
    if need_weight:
        dw = rounded_weight_gradient(dz, scale, h, ctx.columns)
    if db is not None:  # taken before columns were left out
        db = scaled_gradient(db, grad, bias.dtype)
    elif need_bias:
        db = weight_gradient(dz, scale, ones_of(h))[:, 0].to(bias.dtype)
    return dh, dw, db


def summed(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients from sums that the forward saved, scaled by the incoming gradient."""
    dh, scales, dw, db = ctx.saved_tensors
    weight_dtype, bias_dtype = ctx.dtypes
    return (
        None if dh is None else scaled_gradient(dh, grad if scales is None else scales * grad),
        None if dw is None else scaled_gradient(dw, grad, weight_dtype),
        None if db is None else scaled_gradient(db, grad, bias_dtype),
    )


def _indices(rows: Tensor | slice, like: Tensor) -> Tensor:
    if isinstance(rows, Tensor):
        return rows
    return torch.arange(rows.start, rows.stop, device=like.device)


class _Rows:
    """The labelled rows in the plan's order: log-probs, coefficients as they come to be known."""

    def __init__(self, hidden, weight, labels, head: Head, problem: Problem, plan: Plan):
        self._hidden, self._weight, self._head = hidden, weight, head
        self._problem, self._plan, self._whole = problem, plan, None
        self._labels = _take(labels, plan.rows)
        self._temperature = _take(head.temperature, plan.rows)
        self._logps = hidden.new_empty(plan.n, dtype=torch.float32)
        self._entropy = torch.empty_like(self._logps) if problem.objective.needs_entropy else None
        self._token_loss = None
        if plan.arguments is not None:
            from humanline.kernels.token_epilogue import TokenLoss

            self._token_loss = TokenLoss.of(
                **{
                    k: _take(x, plan.rows) if isinstance(x, Tensor) else x
                    for k, x in plan.arguments.items()
                }
            )
        self._memory = TritonBlock.memory(weight, min(plan.sizes.block, plan.n))

    def memory_of_stack(self) -> Tensor:
        """``[capacity, V]`` in the weight's dtype, rows at multiples of 16 elements."""
        weight, sizes = self._weight, self._plan.sizes
        if sizes.over_logits:
            return self._memory.view(weight.dtype)[:, : len(weight)]
        rows = min(self._plan.n, sizes.stack)
        return weight.new_empty(rows, padded_length(weight))[:, : len(weight)]

    def through_the_head(self, start: int, end: int, stack: Stack) -> None:
        """Log-probs of some rows, and the gradient of their logits to where it waits."""
        from humanline.kernels.head_rows import HeadRows

        vocab, rows, head = len(self._weight), self._plan.rows, self._head
        for first in range(start, end, self._plan.sizes.block):
            some = slice(first, min(first + self._plan.sizes.block, end))
            n = some.stop - some.start
            token = None if self._token_loss is None else self._token_loss.rows(some)
            temperature = self._temperature
            block = HeadRows(
                form_logits(
                    self._hidden[some if rows is None else rows[some]],
                    self._weight,
                    self._memory[:n, :vocab],
                ),
                self._labels[some],
                temperature[some] if temperature.dim() else temperature,
                head.bias,
                head.logit_scale,
                head.logit_softcap,
                self._entropy is not None,
                logps=self._logps[some],
                entropy=None if self._entropy is None else self._entropy[some],
                token_loss=token,
            )
            if head.shard is not None:
                block.merge(head.shard)
            block.gradient(
                stack.place(first - start, n),
                None,
                None if token is None else token.of_logp,
                None if token is None else token.of_entropy,
                active=None if token is None else token.scale,
            )

    def scale(self, start: int, end: int) -> Tensor:
        """What some rows' gradients are still to be multiplied by; what they depend on is known."""
        if self._token_loss is not None:
            return self._token_loss.scale[start:end]
        whole = self._whole = evaluate_batch(
            self._problem, self._spread(self._logps, end), None, "triton"
        )
        g, rows = whole.coefficients.logps, self._plan.rows
        return g[start:end] if rows is None else g[rows[start:end]]

    def multiply(self, stack: Stack, sums: BlockGradients) -> None:
        """Empty the stack into the sums."""
        if stack.waiting == 0:
            return
        dz, kept, scale = stack.empty()
        sums.multiply(dz, scale, self.original(kept))

    def original(self, kept: Tensor | slice) -> Tensor | slice:
        """Of rows in the plan's order, those of the batch."""
        return kept if self._plan.rows is None else self._plan.rows[kept]

    def evaluation(self) -> Evaluation:
        """Of the batch, once all rows are known."""
        if self._token_loss is None:
            return self._whole or evaluate_batch(
                self._problem, self._spread(self._logps, 0), self._entropy, "triton"
            )
        loss, n = self._token_loss, self._plan.n
        entropy = None if self._entropy is None else self._spread(self._entropy, n)
        all_rows = (
            self._spread(self._logps, n),
            entropy,
            *(self._spread(x, n) for x in (loss.loss, loss.g)),
        )
        return token_evaluation(self._problem, self._plan.arguments, *all_rows)

    def _spread(self, x: Tensor, known: int) -> Tensor:
        """The first values, of all rows of the batch; 0 elsewhere."""
        rows = self._plan.rows
        if known == len(x) and rows is None:
            return x
        spread = x.new_zeros(len(self._hidden))
        if rows is None:
            spread[:known] = x[:known]
            return spread
        return spread.index_copy_(0, rows[:known], x[:known])
