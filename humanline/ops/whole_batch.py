"""From the log-probs of a whole batch to its loss and coefficients: the seam, or one launch.

On a GPU a sequence-level objective that exists as a device function takes one small kernel, where
the seam's torch and autograd on ``[N]`` floats take more than a hundred
(tests/bench/test_launches.py). One with a ratio a sequence takes two; a token-level one takes one
where its log-probs did not find its coefficients on the way, and two for its statistics.
"""

from dataclasses import replace
from functools import partial
from typing import Any

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
    if problem.share is not None:
        return problem.share.evaluate(partial(evaluate, backend=backend), logps, entropy)
    if backend != "triton" or logps.dtype != torch.float32 or torch.compiler.is_compiling():
        return seam.evaluate(problem, logps, entropy)
    arguments = problem.objective.sequence_kernel_arguments(**problem.batch)
    if arguments is not None:
        return _evaluate_sequences(problem, arguments, logps)
    arguments = problem.kernel_arguments() if problem.coupling in ("token", "sequence") else None
    if arguments is not None and problem.coupling == "sequence":
        return _evaluate_ratios(problem, arguments, logps, entropy)
    if arguments is not None and entropy is None:
        return _evaluate_tokens(problem, arguments, logps)
    return seam.evaluate(problem, logps, entropy)


def _evaluate_sequences(problem: Problem, arguments: dict[str, Any], logps: Tensor) -> Evaluation:
    """By kernels/sequence_loss.py."""
    from humanline.kernels.sequence_loss import REPORT

    objective, layout = problem.objective, problem.layout
    log_eps_P, log_eps_R = objective.perception.bounds
    g, report = _sequence_loss(
        logps.detach(),
        problem.ref_logps if objective.needs_reference else None,
        layout.mask,
        layout.tokens,
        layout.num_sequences,
        layout.cu_seqlens,
        log_eps_P=log_eps_P,
        log_eps_R=log_eps_R,
        **arguments,
    )
    named = dict(zip(REPORT, report.unbind(), strict=True))
    stats = objective.stats_of(named, **problem.batch)
    if objective.needs_reference:
        stats["humanline/unclamped"] = named["unclamped"]
    stats["humanline/active_rows"] = named["active_rows"].long()
    return Evaluation(named["loss"], Coefficients(g, None), stats=stats)


def _evaluate_ratios(
    problem: Problem, arguments: dict[str, Any], logps: Tensor, entropy: Tensor | None
) -> Evaluation:
    """By kernels/sequence_policy.py."""
    layout = problem.layout
    g, g_entropy, report, active_rows = _sequence_policy(
        logps.detach(),
        None if entropy is None else entropy.detach(),
        *(layout.mask, layout.tokens, layout.num_sequences, layout.cu_seqlens),
        **arguments,
    )
    coefficients = Coefficients(g, None if entropy is None else g_entropy)
    return _reported(problem, coefficients, report, active_rows)


def _evaluate_tokens(problem: Problem, arguments: dict[str, Any], logps: Tensor) -> Evaluation:
    """By kernels/token_policy.py."""
    logps = logps.detach()
    of_loss = {k: x for k, x in arguments.items() if k != "entropy_weight"}
    loss, g = _token_policy(logps, problem.layout.mask, **of_loss)
    return token_evaluation(problem, arguments, logps, None, loss, g)


def token_evaluation(
    problem: Problem,
    arguments: dict[str, Any],
    logps: Tensor,
    entropy: Tensor | None,
    loss: Tensor,
    g: Tensor,
) -> Evaluation:
    """Of a token-level objective whose coefficients a kernel has found: its loss and statistics.

    Args:
        arguments: of the objective's device function.
        logps, entropy, loss, g: float32 ``[N]`` of all rows.
    """
    if problem.share is not None:
        whole = evaluate(problem, logps, entropy, "triton")
        return replace(whole, coefficients=Coefficients(g, None))
    layout = problem.layout
    report, active_rows = _token_stats(
        *(logps, entropy, loss, g),
        *(layout.mask, layout.tokens, layout.num_sequences, layout.cu_seqlens),
        **{k: x for k, x in arguments.items() if k in _OF_STATS},
    )
    return _reported(problem, Coefficients(g, None), report, active_rows)


def _reported(
    problem: Problem, coefficients: Coefficients, report: Tensor, active_rows: Tensor
) -> Evaluation:
    """With the loss and the statistics in a report of kernels/token_stats.py."""
    from humanline.kernels.token_stats import REPORT

    named = dict(zip(REPORT, report.unbind(), strict=True))
    stats = problem.objective.token_stats_of(named)
    if problem.objective.needs_reference:
        stats["humanline/unclamped"] = named["unclamped"]
    stats["humanline/active_rows"] = active_rows
    return Evaluation(named["loss"], coefficients, stats=stats)


@torch.library.custom_op("humanline::sequence_loss", mutates_args=())
def _sequence_loss(
    logps: Tensor,
    ref_logps: Tensor | None,
    mask: Tensor,
    tokens: Tensor,
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


@torch.library.custom_op("humanline::sequence_policy", mutates_args=())
def _sequence_policy(
    logps: Tensor,
    entropy: Tensor | None,
    mask: Tensor,
    tokens: Tensor,
    num_sequences: int,
    cu_seqlens: Tensor | None,
    kind: str,
    weight: Tensor,
    advantages: Tensor,
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
    arguments = dict(locals())
    from humanline.kernels import sequence_policy as kernel

    g, g_entropy, report, active_rows = kernel.sequence_policy(**arguments)
    return g, logps.new_empty(0) if g_entropy is None else g_entropy, report, active_rows


@_sequence_policy.register_fake
def _(logps, entropy, *_, **__):
    from humanline.kernels.token_stats import REPORT

    g_entropy = logps.new_empty(0) if entropy is None else torch.empty_like(logps)
    active_rows = logps.new_empty((), dtype=torch.int64)
    return torch.empty_like(logps), g_entropy, logps.new_empty(len(REPORT)), active_rows


@torch.library.custom_op("humanline::token_policy", mutates_args=())
def _token_policy(
    logps: Tensor,
    mask: Tensor,
    kind: str,
    weight: Tensor,
    advantages: Tensor | None = None,
    anchor: Tensor | None = None,
    ref: Tensor | None = None,
    penalty: str | None = None,
    log_eps_P: float = 0.0,
    log_eps_R: float = 0.0,
    low: float = 0.0,
    high: float = 0.0,
    delta: float | None = None,
    beta: float = 0.0,
    temperature_pos: float = 1.0,
    temperature_neg: float = 1.0,
) -> tuple[Tensor, Tensor]:
    arguments = dict(locals())
    from humanline.kernels import token_policy as kernel

    return kernel.token_policy(**arguments)


@_token_policy.register_fake
def _(logps, *_, **__):
    return torch.empty_like(logps), torch.empty_like(logps)


@torch.library.custom_op("humanline::token_stats", mutates_args=())
def _token_stats(
    logps: Tensor,
    entropy: Tensor | None,
    loss: Tensor,
    g: Tensor,
    mask: Tensor,
    tokens: Tensor,
    num_sequences: int,
    cu_seqlens: Tensor | None,
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
) -> tuple[Tensor, Tensor]:
    arguments = dict(locals())
    from humanline.kernels import token_stats as kernel

    return kernel.token_stats(**arguments)


@_token_stats.register_fake
def _(logps, *_, **__):
    from humanline.kernels.token_stats import REPORT

    return logps.new_empty(len(REPORT)), logps.new_empty((), dtype=torch.int64)


# What of a token's loss its statistics depend on, beside the loss itself.
_OF_STATS = {"kind", "advantages", "anchor", "ref", "entropy_weight", "penalty", "delta"} | {
    *("log_eps_P", "log_eps_R", "low", "high")
}
