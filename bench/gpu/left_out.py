"""What a ``gradient_tolerance`` spares on a GPU, where some tokens are far likelier than others.

Random logits have no columns to leave out. Here the logits of a token are lower by ``POWER`` times
the logarithm of its rank, as frequencies of words are (Zipf's law), and labels are drawn from them.
bench/columns.py measures the same on rows of a real model, which a bare GPU machine has not got.
"""

import argparse
from collections.abc import Iterator

import torch
from torch import Tensor

import humanline as hl
from bench.cases import NOISE, QWEN, Batch, Case, inputs
from bench.gpu.profile import profiled
from bench.gpu.steps import BACKEND, DEVICE, _failure, _known, _result, _say

POWER = 1.1
SPREADS = (1.0, 2.5)  # of a row's logits about their tokens' own
TOLERANCES = (0.0, 3e-4, 1e-3, 3e-3)
FILE = "left-out.jsonl"


def left_out(args: argparse.Namespace) -> bool:
    """A line for each width, spread and tolerance: the share kept, milliseconds on the clock, of
    all kernels and of each, and how far the gradients are from the exact ones."""
    known, good = _known(args, FILE), True
    for case, tolerances in _cases(args.reduced):
        names = {f"{case.name}, gradient_tolerance={x:g}": x for x in tolerances}
        if all(("left out", name, None, None) in known for name in names):
            continue
        batch = popular(inputs(case, DEVICE))
        exact, _ = _gradients(batch, 0.0)
        for name, tolerance in names.items():
            record = {"check": "left out", "case": name, "tolerance": tolerance}
            try:
                found = _compared(batch, tolerance, exact) | {"passed": True}
            except Exception as error:
                found = _failure(error)
            good &= _say(args, record | found, FILE)
    return good


def _cases(reduced: bool) -> Iterator[tuple[Case, tuple[float, ...]]]:
    if reduced:
        yield Case("grpo", "hidden", 16, 32, 1001, "bfloat16"), (0.1,)
        return
    for width in (4096, 1024):
        for spread in SPREADS:
            case = Case("grpo", "hidden", 8192, width, QWEN, "bfloat16", logit_std=spread)
            yield case, TOLERANCES


def popular(batch: Batch) -> Batch:
    """The batch with some tokens likelier than others, in place, and labels and reference of it."""
    with torch.no_grad():
        rank = torch.randperm(batch.case.vocab, device=DEVICE) + 1.0
        batch.hidden[..., 0] = 8
        batch.weight[:, 0] = -POWER / 8 * rank.log()
        for rows, labels in zip(batch.hidden, batch.labels, strict=True):
            logits = (rows @ batch.weight.T).float()
            labels.copy_(torch.multinomial(logits.softmax(-1), 1)[:, 0])
        logps = hl.linear_token_logps(batch.hidden, batch.weight, batch.labels, backend=BACKEND)
        batch.ref_logps.copy_(logps - NOISE * torch.randn_like(logps))
    return batch


def _compared(batch: Batch, tolerance: float, exact: tuple[Tensor, ...]) -> dict:
    gradients, kept = _gradients(batch, tolerance)
    found = {"kept": round(kept, 5)}
    for name, g, e in zip(("hidden_error", "weight_error"), gradients, exact, strict=True):
        found[name] = float((g.float() - e.float()).norm() / e.float().norm())
    del gradients
    return found | profiled(lambda: _gradients(batch, tolerance))


def _gradients(batch: Batch, tolerance: float) -> tuple[tuple[Tensor, ...], float]:
    """Of hidden states and weight; and the share of the columns that they were made of."""
    loss, stats = _result(batch, gradient_tolerance=tolerance)
    gradients = torch.autograd.grad(loss, batch.leaves)
    return gradients, float(stats.get("humanline/kept_columns", 1.0))
