"""Time and peak memory of peers on one case, in the process that runs this.

| | time | peak memory beside the inputs, gradients included |
|---|---|---|
| GPU | CUDA events; all peers in turn, round by round | the caching allocator's |
| CPU | `time.perf_counter`, alone | the process's high-water mark (Linux), the profiler's record |

A GPU gets slower as it gets hot, and its clocks move: peers that are timed one after the other are
not timed on the same card. So each round times every peer, each after a warm-up, beginning with
another one each time; and humanline a second time, whose distance from the first is the noise.
"""

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from bench.accuracy import Truth, errors, truth
from bench.card import Card, card
from bench.cases import Batch, Case, inputs
from bench.peers import OURS, Peer, peers_of

WARM_SECONDS = 0.15  # of work before a GPU is timed: its clocks rise within 100 ms
TIMED_SECONDS = 0.1  # of work, about, that a peer is timed for in a round
MOST_RUNS = 50  # of a peer in a round
CACHE_BYTES = 2**28  # more than the L2 of any GPU


@dataclass(frozen=True)
class Result:
    """What became of one peer on one case.

    Attributes:
        why_not: the reason why there is nothing else here, or None.
        seconds: median of ``all_seconds``, forward and backward.
        peak_bytes: by the allocator, or by the process's high-water mark on a CPU.
        recorded_peak_bytes: by the profiler's record of allocations; on a CPU only.
        loss_error, gradient_error: see :class:`bench.accuracy.Errors`; None for a floor.
        ours_seconds: humanline's in the same rounds, which a ratio of two peers measured at
            different times goes by; for humanline itself a second time, which shows the noise.
        cards: the GPU's clocks and power in each round, while it worked for this peer; None where
            the driver does not tell.
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
    ours_seconds: tuple[float, ...] = ()
    cards: tuple[Card | None, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> "Result":
        values = {"case": Case(**record["case"])}
        for name in ("all_seconds", "ours_seconds"):
            values[name] = tuple(record.get(name, ()))
        values["cards"] = tuple(c and Card(**c) for c in record.get("cards", ()))
        return cls(**record | values)

    def failed(self, error: Exception) -> "Result":
        """The same with an exception as the reason why there is no more."""
        reason = (str(error).strip().splitlines() or [""])[0][:200]
        return replace(self, why_not=f"{type(error).__name__}: {reason}")


def measure(peer: Peer, case: Case, device: str, repeats: int) -> Result:
    """The error against float64, then memory, then time; raises whatever the peer raises."""
    result = Result(case, peer.name)
    if not peer.is_floor:
        result = _checked(result, peer, truth(case, device))
        if result.why_not is not None:
            return result
        torch._dynamo.reset()  # or what is compiled next is for any number of tokens
    batch = inputs(case, device)
    result = _weighed(result, peer, batch, device)
    seconds = _seconds(lambda: step(peer, batch), repeats)
    return replace(result, seconds=statistics.median(seconds), all_seconds=tuple(seconds))


def measure_in_turn(
    peers: Sequence[Peer],
    case: Case,
    device: str,
    rounds: int,
    *,
    beside_ours: bool = True,
    begin: Callable[[Peer], None] = lambda peer: None,
) -> Iterator[Result]:
    """The errors of all against one truth, then their memory, then rounds in which all are timed.

    Args:
        beside_ours: time humanline once more in each round, see :class:`Result`.
        begin: called before a peer runs, which it may not survive.

    Yields:
        A result a peer, in no order: what failed as soon as it did, the rest at the end.
    """
    left = {peer: Result(case, peer.name) for peer in peers}

    def each(work: Callable[[Result, Peer], Result]) -> Iterator[Result]:
        for peer in list(left):
            begin(peer)
            try:
                left[peer] = work(left[peer], peer)
            except Exception as error:
                left[peer] = left[peer].failed(error)
            if left[peer].why_not is not None:
                _tidy()
                yield left.pop(peer)

    yield from each(_checker(case, device))
    _tidy()  # the truth is large
    torch._dynamo.reset()  # or what is compiled next is for any number of tokens
    batch = lazily(lambda: inputs(case, device))
    yield from each(lambda r, peer: _weighed(r, peer, batch(), device))
    if not left:
        return
    turns = [_Turn(peer) for peer in left]
    ours = next(p for p in peers_of(case) if p.name == OURS)
    again = _Turn(ours)
    if beside_ours and (ours in left or ours not in peers):
        turns.append(again)
    for number in range(rounds):
        first = number % len(turns)
        for turn in turns[first:] + turns[:first]:
            begin(turn.peer)
            try:
                turn.run(batch(), device)
                continue
            except Exception as error:
                failed = turn.peer in left and left[turn.peer].failed(error)
            _tidy()
            turns.remove(turn)
            if failed:
                yield failed
                left.pop(turn.peer)
        if not left:
            return
    for turn in turns:
        if turn is not again:
            yield replace(
                left[turn.peer],
                seconds=statistics.median(turn.seconds),
                all_seconds=tuple(turn.seconds),
                ours_seconds=tuple(again.seconds),
                cards=tuple(turn.cards),
            )


def _checker(case: Case, device: str) -> Callable[[Result, Peer], Result]:
    true = lazily(lambda: truth(case, device))
    return lambda result, peer: result if peer.is_floor else _checked(result, peer, true())


def lazily(make: Callable[[], Any]) -> Callable[[], Any]:
    """``make()`` when first asked for, and kept; a failure is not, and is met by all who ask."""
    made = []

    def get():
        if not made:
            made.append(make())
        return made[0]

    return get


def _tidy() -> None:
    """Give back what a failure, or the truth, held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _checked(result: Result, peer: Peer, true: Truth) -> Result:
    found = errors(peer, true)
    return replace(
        result,
        why_not=f"wrong: {found}" if found.wrong else None,
        loss_error=found.loss,
        gradient_error=found.gradient,
    )


def _weighed(result: Result, peer: Peer, batch: Batch, device: str) -> Result:
    """Peak memory, after a first run: imports, compilation and pools of threads are neither memory
    nor time."""
    step(peer, batch)
    _free_gradients(batch)
    peak = peak_bytes(lambda: step(peer, batch), device)
    _free_gradients(batch)
    recorded = None if device.startswith("cuda") else _recorded(lambda: step(peer, batch))
    return replace(result, peak_bytes=peak, recorded_peak_bytes=recorded)


def _free_gradients(batch: Batch) -> None:
    for leaf in batch.leaves:
        leaf.grad = None


def step(peer: Peer, batch: Batch) -> None:
    """Forward and backward; gradients end where a trainer has them."""
    _free_gradients(batch)
    loss = peer.run(batch)
    if loss is not None:
        loss.backward()


def _seconds(work: Callable[[], None], repeats: int) -> list[float]:
    """On a CPU."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return seconds


@dataclass
class _Turn:
    """A peer's place in the rounds, and what it measured there."""

    peer: Peer
    seconds: list[float] = field(default_factory=list)
    cards: list[Card | None] = field(default_factory=list)

    def run(self, batch: Batch, device: str) -> None:
        """A round's share: warm up, then time."""

        def work():
            step(self.peer, batch)

        _tidy()  # nobody inherits another's memory
        runs = _warm_up(work, device)
        if device.startswith("cuda"):
            timed, now = _event_seconds(work, runs, device)
        else:
            timed, now = _seconds(work, runs), None
        _free_gradients(batch)
        self.seconds += timed
        self.cards.append(now)


def _warm_up(work: Callable[[], None], device: str) -> int:
    """Work for ``WARM_SECONDS``; how many runs to time after it."""
    start, last, runs = time.perf_counter(), 0.0, 0
    while runs == 0 or time.perf_counter() - start < WARM_SECONDS:
        before = time.perf_counter()
        work()
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)
        last = time.perf_counter() - before  # the first of all may have compiled
        runs += 1
    return max(1, min(MOST_RUNS, round(TIMED_SECONDS / last)))


def _event_seconds(
    work: Callable[[], None], runs: int, device: str
) -> tuple[list[float], Card | None]:
    """Seconds of each run on a GPU with a cold L2, and the card's state in the midst of them."""
    cache = torch.empty(CACHE_BYTES, dtype=torch.int8, device=device)
    marks = []
    for _ in range(runs):
        cache.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        marks.append((start, end))
    now = card(device)  # the host is ahead of the device, which is still at it
    torch.cuda.synchronize(device)
    return [start.elapsed_time(end) / 1e3 for start, end in marks], now


def peak_bytes(work: Callable[[], None], device: str) -> int:
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
