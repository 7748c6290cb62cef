"""Where a call's time goes on a GPU: its kernels by time, and what is left between them.

A call from hidden states is a few dozen GEMMs with row kernels between; whether it is slow for the
GEMMs, the row kernels or the gaps decides what is worth a change. torch's profiler tells them
apart, as no two of our kernels share a name.
"""

import argparse
import time
from collections import defaultdict
from collections.abc import Callable, Iterator

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bench.cases import LLAMA, QWEN, Case, inputs
from bench.gpu.steps import DEVICE, _failure, _known, _loss, _say

# Profiled, after one that compiles and warms up. On a CPU (the interpreter) times mean nothing.
RUNS = 3 if torch.cuda.is_available() else 1
NAME = 110  # characters of a kernel's name
FILE = "profile.jsonl"


def where_the_time_goes(args: argparse.Namespace) -> bool:
    """A line a call: milliseconds on the clock, of all kernels, and of each kernel."""
    known = _known(args, FILE)
    good = True
    for name, case, options in _calls(args.reduced):
        if ("profile", name, None, None) in known:
            continue
        record = {"check": "profile", "case": name}
        try:
            found = profiled(_step(case, **options)) | {"passed": True}
        except Exception as error:
            found = _failure(error)
        good &= _say(args, record | found, FILE)
    return good


def _calls(reduced: bool) -> Iterator[tuple[str, Case, dict]]:
    """Its name, the case, and options of the call."""
    tokens, vocab = (16, 1001) if reduced else (8192, QWEN)
    widths = (32,) if reduced else (4096, 1024)
    for width in widths:
        for objective in ("grpo", "dpo"):
            case = Case(objective, "hidden", tokens, width, vocab, "bfloat16")
            yield case.name, case, {}
        case = Case("grpo", "hidden", tokens, width, vocab, "bfloat16")
        yield f"{case.name}, capturable", case, {"capturable": True}
    for size in (vocab,) if reduced else (vocab, LLAMA, 32_000):
        case = Case("grpo", "logits", tokens, 1, size, "bfloat16")
        yield case.name, case, {}
    case = Case("dpo", "logits", tokens, 1, vocab, "bfloat16")
    yield case.name, case, {}


def _step(case: Case, **options) -> Callable[[], None]:
    batch = inputs(case, DEVICE)

    def step() -> None:
        torch.autograd.grad(_loss(batch, **options), batch.leaves)

    return step


def profiled(step: Callable[[], None]) -> dict:
    """Milliseconds a run, on the clock without the profiler and by kernel with it."""
    step()
    wall = min(_timed(step) for _ in range(RUNS))
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (DEVICE == "cuda")
    with profile(activities=activities) as profiler:
        for _ in range(RUNS):
            step()
        _wait()
    times, calls = defaultdict(float), defaultdict(int)
    for event in profiler.events():
        if event.device_type == DeviceType.CUDA:
            times[event.name[:NAME]] += event.time_range.elapsed_us() / 1e3 / RUNS
            calls[event.name[:NAME]] += 1
    kernels = [
        {"kernel": name, "milliseconds": round(times[name], 4), "launches": calls[name] / RUNS}
        for name in sorted(times, key=times.get, reverse=True)
    ]
    busy = sum(times.values())
    return {"wall": round(wall, 3), "busy": round(busy, 3), "kernels": kernels}


def _timed(step: Callable[[], None]) -> float:
    _wait()
    start = time.perf_counter()
    step()
    _wait()
    return 1e3 * (time.perf_counter() - start)


def _wait() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()
