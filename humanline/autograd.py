"""Decorators for the library's autograd functions, and for the entry points that call them."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def uncompiled(function: Callable[P, R]) -> Callable[P, R]:
    """A graph break around an entry point: ``torch.compile`` runs it as it stands.

    Which rows go through a GEMM depends on values, and an objective's coefficients on autograd
    within the forward: Dynamo traces neither.
    """
    eager: Callable[P, R] | None = None

    @wraps(function)  # which torch.compile, given the entry point itself, must not see through
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        nonlocal eager
        if eager is None:  # at the first call, because it imports Dynamo: a second
            # If this is while Dynamo traces, and must not break the graph, it shows this line.
            eager = torch.compiler.disable(function, reason="as many rows as there are labels")
        return eager(*args, **kwargs)

    return run


def forward(function):
    """Run outside autocast: the function has chosen its dtypes itself."""

    @wraps(function)
    def run(ctx, *args):
        with _no_autocast(args):
            return function(ctx, *args)

    return run


def backward(function):
    """Run outside autocast, and refuse a graph of the gradient: it is formed in place, not traced.

    Raises:
        RuntimeError: the backward runs with ``create_graph=True``.
    """

    @wraps(function)
    def run(ctx, *grads):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "humanline losses cannot be differentiated twice: call backward without "
                "create_graph=True"
            )
        with _no_autocast(grads):
            return function(ctx, *grads)

    return run


def graph_is_kept() -> bool:
    """Within a backward: whether another may come for what is saved (``retain_graph=True``).

    Autograd tells its own compiler alone; should that cease, the answer is yes, which costs a copy.
    """
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)
    return ask()


def _no_autocast(args):
    device = next(x.device.type for x in args if isinstance(x, Tensor))
    if not torch.amp.is_autocast_available(device):  # meta, for one
        return nullcontext()
    return torch.autocast(device, enabled=False)
