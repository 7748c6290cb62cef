"""From the log-probs of a whole batch to its loss and coefficients: the seam, or one launch.

On a GPU a sequence-level objective that exists as a device function takes one small kernel, where
the seam's torch and autograd on ``[N]`` floats take some fifty.
"""

from functools import partial

import torch
from torch import Tensor

from humanline import seam
from humanline.seam import Coefficients, Evaluation, Problem


def finish(
    problem: Problem, logps: Tensor, entropy: Tensor | None, backend: str
) -> tuple[Tensor, dict[str, Tensor]]:
    """As :func:`humanline.seam.finish`, by the kernel where there is one."""
    return seam.finish(problem, logps, entropy, partial(evaluate, backend=backend))


def evaluate(problem: Problem, logps: Tensor, entropy: Tensor | None, backend: str) -> Evaluation:
    """As :func:`humanline.seam.evaluate` for all rows ``[N]``, by the kernel where there is one."""
    arguments = None
    if backend == "triton" and logps.dtype == torch.float32 and not torch.compiler.is_compiling():
        arguments = problem.objective.sequence_kernel_arguments(**problem.batch)
    if arguments is None:
        return seam.evaluate(problem, logps, entropy)
    from humanline.kernels.sequence_loss import REPORT

    objective, layout = problem.objective, problem.layout
    log_eps_P, log_eps_R = objective.perception.bounds
    g, report = _sequence_loss(
        logps.detach(),
        problem.ref_logps if objective.needs_reference else None,
        layout.mask,
        layout.num_sequences,
        layout.cu_seqlens,
        log_eps_P=log_eps_P,
        log_eps_R=log_eps_R,
        **arguments,
    )
    named = dict(zip(REPORT, report.unbind(), strict=True))
    stats = objective.stats_of(named, **problem.batch)
    if objective.needs_reference:
        stats["humanline/unclamped"] = named["unclamped"] / layout.tokens.clamp(min=1)
    stats["humanline/active_rows"] = named["active_rows"].long()
    return Evaluation(named["loss"], Coefficients(g, None), stats=stats)


@torch.library.custom_op("humanline::sequence_loss", mutates_args=())
def _sequence_loss(
    logps: Tensor,
    ref_logps: Tensor | None,
    mask: Tensor,
    num_sequences: int,
    cu_seqlens: Tensor | None,
    kind: str,
    log_eps_P: float,
    log_eps_R: float,
    beta: float,
    p: float = 0.0,
    q: float = 0.0,
    desirable: Tensor | None = None,
    z0: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    arguments = dict(locals())  # the op's schema has to spell out what the launcher takes
    from humanline.kernels import sequence_loss as kernel

    return kernel.sequence_loss(**arguments)


@_sequence_loss.register_fake
def _(logps, *_, **__):
    from humanline.kernels.sequence_loss import REPORT

    return torch.empty_like(logps), logps.new_empty(len(REPORT))
