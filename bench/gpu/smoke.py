"""The first minute on a GPU: does anything work at all? What fails here is found before time is
spent on what cannot succeed.

Every kernel once, against float64; the products from half precision to float32 that a head stands
on; a CUDA graph. Each is a finding of its own, with the seconds it took, compilation included.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from itertools import product

import torch

from bench.cases import Case, inputs
from bench.gpu.steps import DEVICE, _failure, _graph, _losses, _say
from bench.run import device_is_lost

BOUND = 1e-2  # of a relative error: a few roundings to bfloat16
SHAPES = ((40, 328), (37, 301))  # H and V: rows aligned to 16 bytes, and odd


def smoke(args: argparse.Namespace) -> bool:
    """All of them, until the device is lost."""
    good = True
    for name, check in _checks(args):
        start, record = time.perf_counter(), {"check": f"smoke, {name}"}
        try:
            found = check()
        except Exception as error:
            found = _failure(error)
        good &= _say(args, record | found | {"seconds": round(time.perf_counter() - start, 2)})
        if device_is_lost(DEVICE):
            return False
    return good


def _checks(args: argparse.Namespace) -> Iterator[tuple[str, Callable[[], dict]]]:
    tokens = 16 if args.reduced else 144
    for objective, entry, shape in product(("grpo", "dpo"), ("logits", "hidden"), SHAPES):
        case = Case(objective, entry, tokens, *shape, "bfloat16", active=0.5)
        if args.reduced and (objective == "grpo") != (shape == SHAPES[0]):
            continue
        yield f"kernels, {case.name}", lambda case=case: kernels(case)
    for dtype in (torch.bfloat16, torch.float16):
        yield f"products, {str(dtype)[6:]}", lambda dtype=dtype: products(dtype)
    graph = Case("grpo", "logits", 16, vocab=1000, dtype="bfloat16")
    if DEVICE == "cuda":
        yield "graph", lambda: {"passed": _graph(args, "token_logps", graph)}
    else:
        yield "graph", lambda: {"skipped": "needs a GPU"}


def kernels(case: Case) -> dict:
    """Every way through the kernels that the case has, loss and gradients, against float64."""
    batch = inputs(case, DEVICE)
    batch.labels[0, 1:] = -100
    truth = batch.to_float64()
    errors = []
    torch.manual_seed(0)
    ours = [(loss.detach(), *torch.autograd.grad(loss, batch.leaves)) for loss in _losses(batch)]
    torch.manual_seed(0)  # the same temperatures and bias
    for found, loss in zip(ours, _losses(truth, "torch"), strict=True):
        expected = loss.detach(), *torch.autograd.grad(loss, truth.leaves)
        errors.append(_relative(found[0], expected[0], least=1.0))  # a loss may be about 0
        errors += map(_relative, found[1:], expected[1:])
    return {"errors": errors, "passed": all(error <= BOUND for error in errors)}


def products(dtype: torch.dtype) -> dict:
    """``mm`` and ``addmm`` with ``out_dtype``, also from a transposed factor and in place."""
    if DEVICE == "cpu":
        return {"skipped": "needs a GPU"}
    a, b = torch.randn(72, 320, device=DEVICE).to(dtype), torch.randn(320, 136, device=DEVICE)
    b, total = b.to(dtype), torch.randn(72, 136, device=DEVICE)
    exact = a.double() @ b.double()
    wide, out = {"out_dtype": torch.float32}, torch.empty_like(total)
    found = {
        "mm": (torch.mm(a, b, **wide), exact),
        "mm into": (torch.mm(a, b.T.contiguous().T, **wide, out=out), exact),
        "addmm": (torch.addmm(total, a.T.contiguous().T, b, **wide), total.double() + exact),
    }
    in_place = total.clone()
    torch.addmm(in_place, a, b, **wide, out=in_place)
    found["addmm in place"] = in_place, total.double() + exact
    errors = {name: _relative(*pair) for name, pair in found.items()}
    return {"errors": errors, "passed": all(error <= 1e-4 for error in errors.values())}


def _relative(x: torch.Tensor, truth: torch.Tensor, least: float = 1e-9) -> float:
    return ((x.double() - truth.double()).norm() / truth.double().norm().clamp(min=least)).item()
