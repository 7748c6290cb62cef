"""How fast the row kernels are with each number of warps, on the GPU at hand."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from triton.testing import do_bench

from humanline.kernels import launch
from humanline.kernels.token_logps import token_logps_backward, token_logps_forward
from humanline.kernels.token_loss import token_loss

WARPS = (4, 8, 16, 32)


def time_warps(
    vocab: int, dtype: torch.dtype, device: str, rows: int
) -> dict[str, dict[int, float]]:
    """Milliseconds of each row kernel for each number of warps; random rows, all with a gradient.

    On a CPU (the interpreter) each runs once and its time means nothing.
    """
    timed = {}
    for name, run in _kernels(vocab, dtype, device, rows):
        timed[name] = {}
        for warps in WARPS:
            with _warps(warps):
                run()
                timed[name][warps] = 0.0 if device == "cpu" else do_bench(run, return_mode="median")
    return timed


def _kernels(
    vocab: int, dtype: torch.dtype, device: str, rows: int
) -> Iterator[tuple[str, Callable[[], object]]]:
    logits = torch.randn(rows, vocab, device=device).to(dtype)
    labels = torch.randint(vocab, (rows,), device=device)
    temperature = torch.ones((), dtype=torch.float64, device=device)
    row, of = torch.rand(rows, device=device), (logits, labels, temperature)
    kept = token_logps_forward(*of, False)
    grad = torch.empty_like(logits)
    clip = {"low": 0.2, "high": 0.2, "log_eps_P": -1.5, "log_eps_R": 1.5}
    values = {"weight": row, "advantages": row, "anchor": kept[0]}  # a ratio of 1: a gradient
    yield "log-probs", lambda: token_logps_forward(*of, False)
    yield "gradient", lambda: token_logps_backward(row, None, *of, *kept)
    yield "loss", lambda: token_loss(*of, grad, kind="clipped", **values, **clip)


@contextmanager
def _warps(warps: int) -> Iterator[None]:
    """So many for a row of any length."""
    tables = launch.READ_ONCE, launch.READ_AGAIN
    before = [dict(table) for table in tables]
    try:
        for table in tables:
            table.clear()
            table[sys.maxsize] = warps
        yield
    finally:
        for table, lines in zip(tables, before, strict=True):
            table.clear()
            table.update(lines)
