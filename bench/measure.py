"""Time and peak memory of one peer on one case, in the process that runs this.

| | time | peak memory beside the inputs, gradients included |
|---|---|---|
| GPU | CUDA events, `triton.testing.do_bench` | the caching allocator's |
| CPU | `time.perf_counter` | the process's high-water mark (Linux), and the profiler's record |
"""

import ctypes
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bench.accuracy import errors
from bench.cases import Batch, Case, inputs
from bench.peers import Peer


@dataclass(frozen=True)
class Result:
    """What became of one peer on one case.

    Attributes:
        why_not: the reason why there is nothing else here, or None.
        seconds: median of ``all_seconds``, forward and backward.
        peak_bytes: by the allocator, or by the process's high-water mark on a CPU.
        recorded_peak_bytes: by the profiler's record of allocations; on a CPU only.
        loss_error, gradient_error: see :class:`bench.accuracy.Errors`; None for a floor.
    """

    case: Case
    peer: str
    why_not: str | None = None
    seconds: float | None = None
    all_seconds: tuple[float, ...] = ()
    peak_bytes: int | None = None
    recorded_peak_bytes: int | None = None
    loss_error: float | None = None
    gradient_error: float | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> "Result":
        seconds = tuple(record["all_seconds"])
        return cls(**record | {"case": Case(**record["case"]), "all_seconds": seconds})


def measure(peer: Peer, case: Case, device: str, repeats: int) -> Result:
    """The error against float64, then memory, then time; raises whatever the peer raises."""
    result = Result(case, peer.name)
    if not peer.is_floor:
        found = errors(peer, case, device)
        result = replace(result, loss_error=found.loss, gradient_error=found.gradient)
        if found.wrong:
            return replace(result, why_not=f"wrong: {found}")
    batch = inputs(case, device)
    step(peer, batch)  # imports, compilation and pools of threads are neither memory nor time
    _free_gradients(batch)
    peak = _peak_bytes(lambda: step(peer, batch), device)
    _free_gradients(batch)
    recorded = None if device.startswith("cuda") else _recorded(lambda: step(peer, batch))
    seconds = _seconds(lambda: step(peer, batch), device, repeats)
    return replace(
        result,
        seconds=statistics.median(seconds),
        all_seconds=tuple(seconds),
        peak_bytes=peak,
        recorded_peak_bytes=recorded,
    )


def _free_gradients(batch: Batch) -> None:
    for leaf in batch.leaves:
        leaf.grad = None


def step(peer: Peer, batch: Batch) -> None:
    """Forward and backward; gradients end where a trainer has them."""
    _free_gradients(batch)
    loss = peer.run(batch)
    if loss is not None:
        loss.backward()


def _seconds(work: Callable[[], None], device: str, repeats: int) -> list[float]:
    if device.startswith("cuda"):
        from triton.testing import do_bench

        times = do_bench(work, warmup=100, rep=100 * repeats, return_mode="all")
        return [ms / 1000 for ms in times]
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return seconds


def _peak_bytes(work: Callable[[], None], device: str) -> int:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    return _high_water(work)


def _high_water(work: Callable[[], None]) -> int:
    """Growth of the process's resident memory at its highest; Linux only."""
    ctypes.CDLL(None).malloc_trim(0)  # or freed pages would serve this and not show
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    work()
    return status("VmHWM") - before


def status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def _recorded(work: Callable[[], None]) -> int:
    """Highest sum of torch's own allocations meanwhile, from the profiler's memory record."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profiler:
        work()
    events = profiler.profiler.kineto_results.events()
    total = peak = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    return peak
