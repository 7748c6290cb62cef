"""The rows of several ranks as one batch: what an objective sees where ranks share it.

To the head a row is H numbers, to an objective a handful. So the latter are gathered, masks and
reference before the head, log-probs after it, and every rank evaluates the objective on all rows,
in one order. Whatever an objective does with its rows, sort them, or take their maximum, comes out
as in one process, the same on every rank bit for bit. Of the coefficients a rank takes those of its
own rows: no gradient crosses a collective.

A token-level objective, whose rows depend on no others, knows them before all log-probs are there.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from humanline import checks
from humanline.parallel import Axis, Parallel
from humanline.rows import Layout
from humanline.seam import Evaluation, Problem


@dataclass(frozen=True)
class Share:
    """A rank's part in a batch of all ranks of an axis.

    Attributes:
        problem: that of all ranks' rows, packed.
        sizes: how many rows each rank has.
        order: of the rows of all ranks, one rank after the other, where the batch has them.
        own: where the batch has this rank's, ``[n]``.
    """

    problem: Problem
    axis: Axis
    sizes: list[int]
    order: Tensor
    own: Tensor

    def evaluate(
        self,
        evaluate: Callable[..., Evaluation],
        logps: Tensor,
        entropy: Tensor | None,
        index: Tensor | None = None,
    ) -> Evaluation:
        """``evaluate`` the batch, a collective; or own rows in ``index`` alone, which is none."""
        if index is not None:
            return evaluate(self.problem, logps, entropy, self.own[index])
        values = [x.detach() for x in (logps, entropy) if x is not None]
        rows = self.axis.gather_rows(torch.stack(values, 1), self.sizes)[self.order]
        everyones = [x.contiguous() for x in rows.unbind(1)]
        whole = evaluate(self.problem, everyones[0], None if entropy is None else everyones[1])
        coefficients = whole.coefficients
        if coefficients.logps is not None:
            coefficients = coefficients.take(self.own)
        return Evaluation(whole.loss, coefficients, stats=self.problem.stats(whole))

    def kernel_arguments(self) -> dict[str, Any] | None:
        """Those of own rows."""
        arguments = self.problem.kernel_arguments()
        if arguments is None:
            return None
        return {
            name: x[self.own] if isinstance(x, Tensor) and x.dim() else x
            for name, x in arguments.items()
        }


def join(problem: Problem, parallel: Parallel) -> Problem:
    """The problem, with how ranks share its rows. Collectives.

    Raises:
        ValueError: the ranks have not as many of the same sequences; a tensor of the batch has
            neither a value a row nor, where the objective says so, a sequence.
    """
    return _join(problem, parallel.rows)


def _join(problem: Problem, axes: list[Axis]) -> Problem:
    if not axes:
        return problem
    share = _share(problem, axes[0])  # the rows of sequences first, then those of others
    return replace(problem, share=replace(share, problem=_join(share.problem, axes[1:])))


def _share(problem: Problem, axis: Axis) -> Share:
    layout, objective, splits = problem.layout, problem.objective, axis.name == "sequence"
    mask, device = layout.mask, layout.mask.device
    rows, of_sequences = _row_values(problem), _sequence_values(problem)
    met = axis.exchange(len(mask), layout.num_sequences, device=device)
    sizes, sequences = ([numbers[i] for numbers in met] for i in range(2))
    if splits:
        checks.require(
            len(set(sequences)) == 1,
            lambda: f"ranks of the {axis} have rows of the same sequences, got {sequences} of them",
        )
        numbers = torch.arange(sequences[0], device=device)
        own_numbers, total = numbers, sequences[0]
    else:
        numbers, total = _numbers(sequences, objective.in_pairs, device), sum(sequences)
        own_numbers = numbers.split(sequences)[axis.rank]
        places = numbers.argsort()
        of_sequences = {
            name: axis.gather_rows(x, sequences)[places] for name, x in of_sequences.items()
        }
    number = axis.gather_rows(layout.expand(own_numbers), sizes)
    order = number.argsort(stable=True)
    everyones = {name: axis.gather_rows(x, sizes)[order] for name, x in rows.items()}
    lengths = torch.bincount(number, minlength=total)
    cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    whole = Problem(
        objective,
        Layout.of(everyones.pop(_MASK), cu_seqlens),
        everyones.pop(_REF, None),
        {name: {**of_sequences, **everyones}.get(name, x) for name, x in problem.batch.items()},
    )
    return Share(whole, axis, sizes, order, order.argsort()[axis.own(sizes)])


_MASK, _REF = "completion mask", "reference's log-probs"  # no names of arguments


def _row_values(problem: Problem) -> dict[str, Tensor]:
    """What a batch has one a row, ``[n, …]``."""
    layout, objective = problem.layout, problem.objective
    rows = {_MASK: layout.mask.to(torch.uint8)}
    if problem.ref_logps is not None:
        rows[_REF] = problem.ref_logps
    n, shape = len(layout.mask), layout.shape
    for name, x in problem.batch.items():
        if not isinstance(x, Tensor) or x.dim() == 0 or name in objective.per_sequence:
            continue
        if tuple(x.shape[: len(shape)]) == shape:
            x = x.reshape(n, *x.shape[len(shape) :])
        checks.require(
            len(x) == n,
            lambda name=name, x=x: (
                f"{name} must begin with the rows' shape {list(shape)} to be shared between ranks, "
                f"or {type(objective).__name__}.per_sequence name it, where it has one value a "
                f"sequence; got {list(x.shape)}"
            ),
        )
        rows[name] = x
    return rows


def _sequence_values(problem: Problem) -> dict[str, Tensor]:
    per_sequence = problem.objective.per_sequence
    return {name: x for name, x in problem.batch.items() if name in per_sequence}


def _numbers(sequences: list[int], in_pairs: bool, device: torch.device) -> Tensor:
    """Each rank's sequences as the batch counts them, one rank after the other: in this order; or
    the first half of every rank before the second halves."""
    numbers = torch.arange(sum(sequences), device=device)
    if not in_pairs:
        return numbers
    first, second = numbers.chunk(2)
    halves = [n // 2 for n in sequences]
    pairs = zip(first.split(halves), second.split(halves), strict=True)
    return torch.cat([part for pair in pairs for part in pair])
