"""The seam: log-probs in; loss, one coefficient a row, and statistics out.

The gradient of every objective with respect to the logits of row ``t`` is ``g_t (onehot(y_t) −
softmax_t)`` (plus an entropy term if asked for), with ``g_t = ∂L/∂logp_t``. So whatever computes
log-probs needs nothing of an objective but these ``[N]`` floats, and autograd finds them on ``[N]``
floats, at no cost beside the rows' logits.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from humanline import autograd, checks
from humanline.dtypes import at_least_float32
from humanline.rows import Layout, Rows


@dataclass(frozen=True)
class Problem:
    """An objective and all of a batch that is known before the policy's log-probs are.

    Attributes:
        objective: the :class:`~humanline.objectives.Objective`.
        layout: mask and grouping of the rows.
        ref_logps: log-probs of the reference, flat ``[N]``, or None.
        batch: what the objective's ``prepare`` returned, row values being 0 where masked.
        share: a :class:`humanline.joined.Share` where other ranks have rows of the batch.
    """

    objective: Any
    layout: Layout
    ref_logps: Tensor | None
    batch: dict[str, Any]
    share: Any = None

    def rows(self, logps: Tensor, entropy: Tensor | None, index: Tensor | None = None) -> Rows:
        """The rows an objective sees, from flat log-probs of all rows or of those in ``index``."""

        def take(x):
            return x if index is None or x is None else x[index]

        mask = take(self.layout.mask)
        logps = torch.where(mask, logps, 0)
        entropy = None if entropy is None else torch.where(mask, entropy, 0)
        ref_logps = d = c = unclamped = None
        if self.ref_logps is not None:
            ref_logps = torch.where(mask, take(self.ref_logps), 0)
        if self.objective.needs_reference:
            anchor = self.objective.anchor(logps, ref_logps, **self.batch_of(index))
            d = torch.where(mask, logps - anchor, 0)
            c, unclamped = self.objective.perception.perceive(d, mask)
            c = torch.where(mask, c, 0)  # after perception: bounds need not bracket 0
        length = take(self.layout.length_of_row)
        return Rows(logps, ref_logps, c, d, unclamped, entropy, mask, length, self.layout)

    def batch_of(self, index: Tensor | None) -> dict[str, Any]:
        """The batch, its row tensors cut down to ``index``."""
        if index is None:
            return self.batch
        return {
            k: v[index] if isinstance(v, Tensor) and v.dim() else v for k, v in self.batch.items()
        }

    @property
    def coupling(self) -> str:
        """Which rows a row's coefficient depends on: the objective's, or all of the batch if its
        perception looks at that, or they may be on another rank."""
        coupling = self.objective.coupling
        shared = self.share is not None and coupling != "token"
        return "batch" if self.objective.perception.needs_batch or shared else coupling

    def kernel_arguments(self) -> dict[str, Any] | None:
        """Arguments of the one-launch kernel, if the objective exists as a device function."""
        if self.share is not None:
            return self.share.kernel_arguments()
        return self.objective.kernel_arguments(self.layout, self.ref_logps, **self.batch)

    def stats(self, evaluation: "Evaluation") -> dict[str, Tensor]:
        """The objective's statistics and the library's own, detached."""
        if evaluation.stats is not None:
            return evaluation.stats
        rows, coefficients = evaluation.rows, evaluation.coefficients
        with torch.no_grad():
            rows = Rows(**{f.name: _detach(getattr(rows, f.name)) for f in fields(rows)})
            stats = self.objective.stats(rows, **self.batch)
            if rows.unclamped is not None:
                kept = rows.token_mean(rows.unclamped.to(rows.logps.dtype)).sum()
                stats["humanline/unclamped"] = kept
            if coefficients.logps is not None:
                stats["humanline/active_rows"] = coefficients.active().sum()
        return stats


@dataclass(frozen=True)
class Coefficients:
    """``∂L/∂logp_t`` and ``∂L/∂entropy_t`` of each row; None where not computed."""

    logps: Tensor | None
    entropy: Tensor | None

    def active(self) -> Tensor:
        """Rows that take part in the backward, bool ``[n]``."""
        active = self.logps != 0
        return active if self.entropy is None else active | (self.entropy != 0)

    def take(self, index: Tensor) -> "Coefficients":
        """The coefficients of some rows."""
        entropy = None if self.entropy is None else self.entropy[index]
        return Coefficients(self.logps[index], entropy)


@dataclass(frozen=True)
class Evaluation:
    """What the seam gives back: the detached loss, each row's coefficients, and the rows themselves
    or the statistics already made of them."""

    loss: Tensor
    coefficients: Coefficients
    rows: Rows | None = None
    stats: dict[str, Tensor] | None = None


def evaluate(
    problem: Problem, logps: Tensor, entropy: Tensor | None, index: Tensor | None = None
) -> Evaluation:
    """The seam itself, for flat log-probs ``[N]`` of all rows, or of those in ``index``.

    Raises:
        TypeError, ValueError: what the objective returns is no loss; within
            :func:`~humanline.debug`, it depends on the policy, or on other rows, unseen.
    """
    if problem.share is not None:
        return problem.share.evaluate(evaluate, logps, entropy, index)
    evaluation = _evaluate(problem, logps, entropy, index)
    if checks.debugging() and index is None and evaluation.coefficients.logps is not None:
        _check_coupling(problem, logps, entropy, evaluation.coefficients)
    return evaluation


def _evaluate(
    problem: Problem, logps: Tensor, entropy: Tensor | None, index: Tensor | None = None
) -> Evaluation:
    objective, batch = problem.objective, problem.batch_of(index)
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
        # Dynamo does not trace autograd.grad: there the loss stays a plain graph, and autograd
        # finds the coefficients in the backward.
        rows = problem.rows(logps, entropy, index)
        loss = _scalar(objective, objective.loss(rows, **batch))
        return Evaluation(loss, Coefficients(None, None), rows)
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in (logps, entropy) if x is not None]
        rows = problem.rows(leaves[0], leaves[1] if entropy is not None else None, index)
        loss = _scalar(objective, objective.loss(rows, **batch))
        if loss.requires_grad:
            grads = list(torch.autograd.grad(loss, leaves, materialize_grads=True))
        else:  # nothing in it depends on the policy
            grads = [torch.zeros_like(leaf) for leaf in leaves]
            if checks.debugging() and entropy is None:
                _check_detached(problem, logps, index, loss)
    if entropy is None:
        grads.append(None)
    return Evaluation(loss.detach(), Coefficients(*grads), rows)


def _scalar(objective: Any, loss: Any) -> Tensor:
    name = f"{type(objective).__name__}.loss()"
    checks.require(
        isinstance(loss, Tensor),
        lambda: f"{name} must return a scalar tensor, got {checks.given(loss)}",
        error=TypeError,
    )
    checks.require(
        loss.dim() == 0 and loss.is_floating_point(),
        lambda: f"{name} must return a floating-point scalar, got {loss.dtype} {list(loss.shape)}",
    )
    return loss


# What is taken at an objective's word, looked at within debug()


def _check_detached(problem: Problem, logps: Tensor, index: Tensor | None, loss: Tensor) -> None:
    """A loss that autograd does not connect with the policy is the same for another policy."""
    rows = problem.rows(logps.detach() - 1, None, index)
    moved = problem.objective.loss(rows, **problem.batch_of(index))
    checks.require(
        torch.allclose(moved, loss, equal_nan=True),
        lambda: (
            f"{type(problem.objective).__name__}.loss() depends on the policy and is detached from "
            f"it: {loss.item()} becomes {moved.item()} with all log-probs 1 less, and it has no "
            "gradient"
        ),
    )


def _check_coupling(
    problem: Problem, logps: Tensor, entropy: Tensor | None, coefficients: Coefficients
) -> None:
    """Half the rows, sequences or pairs get the same coefficients when the others are not there."""
    coupling, layout = problem.coupling, problem.layout
    if coupling == "batch":
        return
    unit = torch.arange(len(logps), device=logps.device)
    if coupling != "token":
        sequences = layout.num_sequences
        of_sequence = torch.arange(sequences, device=logps.device)
        unit = layout.expand(of_sequence % (sequences // 2) if coupling == "pair" else of_sequence)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.rand(len(logps), generator=generator).to(logps.device) < 0.5
    kept = drawn[unit]
    rows = kept.nonzero().squeeze(1)
    name = type(problem.objective).__name__
    what = {
        "token": f"{name} is a TokenObjective: a row's share of the loss",
        "sequence": f'{name} has coupling "sequence": a row\'s gradient',
        "pair": f'{name} has coupling "pair": a row\'s gradient',
    }[coupling]
    whose = "that row" if coupling == "token" else f"the rows of its {coupling}"
    told = f'{what} must depend on {whose} alone; for more, it is an Objective of coupling "batch"'
    try:
        alone = _alone(problem, logps, entropy, kept, rows)
    except (RuntimeError, ValueError, IndexError) as error:
        raise ValueError(f"{told}. Without the other rows: {error}") from error
    for ours, theirs in ((coefficients.logps, alone.logps), (coefficients.entropy, alone.entropy)):
        if ours is None or not len(rows):
            continue
        ours = ours[rows]
        off = (ours - theirs).abs() > 1e-4 * ours.nan_to_num(0, 0, 0).abs().amax()
        if off.any():
            i = int(off.nonzero()[0])
            raise ValueError(
                f"{told}. The coefficient of row {int(rows[i])} is {ours[i].item()}, and "
                f"{theirs[i].item()} without the other rows"
            )


def _alone(problem, logps, entropy, kept: Tensor, rows: Tensor) -> Coefficients:
    """Coefficients of some rows as those get them who know no others yet."""
    if problem.coupling == "token":
        some = None if entropy is None else entropy[rows]
        return _evaluate(problem, logps[rows], some, rows).coefficients
    some = None if entropy is None else torch.where(kept, entropy, 0)
    return _evaluate(problem, torch.where(kept, logps, 0), some).coefficients.take(rows)


def finish(
    problem: Problem,
    logps: Tensor,
    entropy: Tensor | None,
    evaluate: Callable[[Problem, Tensor, Tensor | None], Evaluation] = evaluate,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss, differentiable with respect to row-shaped log-probs and entropy, and statistics."""
    logps = at_least_float32(logps).reshape(-1)
    entropy = None if entropy is None else at_least_float32(entropy).reshape(-1)
    evaluation = evaluate(problem, logps, entropy)
    loss, coefficients = evaluation.loss, evaluation.coefficients
    if coefficients.logps is not None:
        loss = _Attach.apply(loss, logps, entropy, coefficients.logps, coefficients.entropy)
    return loss, problem.stats(evaluation)


class _Attach(torch.autograd.Function):
    @staticmethod
    @autograd.forward
    def forward(ctx, loss, logps, entropy, grad_logps, grad_entropy):
        ctx.save_for_backward(grad_logps, grad_entropy)
        return loss.clone()

    @staticmethod
    @autograd.backward
    def backward(ctx, grad):
        grad_logps, grad_entropy = ctx.saved_tensors
        entropy = None if grad_entropy is None else grad * grad_entropy
        return None, grad * grad_logps, entropy, None, None


def _detach(x):
    return x.detach() if isinstance(x, Tensor) else x
