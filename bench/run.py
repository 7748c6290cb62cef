"""Run cases: each in processes of its own, results saved as they come, taken up again later.

On a CPU every peer has its own process, since memory is the process's. On a GPU a case has one, in
which the peers take turns, and whoever crashes it is left behind.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench.cases import Case
from bench.environment import environment
from bench.measure import Result, measure, measure_in_turn
from bench.peers import OURS, Peer, peers_of
from humanline.training.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
MARK = "humanline-bench-result "  # other lines of a child's output are the libraries'
BEGIN = "humanline-bench-begin "  # the peer that runs from here on
LOST = 74  # exit code of a child that has told all it can, for its device is lost
SAME = ("device", "torch", "humanline", "threads")  # else results do not belong in one file


@dataclass
class Results:
    """Results and where they were measured; a JSON file if it has a path."""

    environment: dict[str, Any]
    results: list[Result] = field(default_factory=list)
    path: Path | None = None

    @classmethod
    def load(cls, path: Path) -> "Results":
        """Read a file that :meth:`save` wrote.

        Raises:
            UserError: the file is not there or not one of these.
        """
        try:
            stored = json.loads(path.read_text())
            results = [Result.from_json(record) for record in stored["results"]]
            return cls(stored["environment"], results, path)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is no file of benchmark results: {error}") from error

    @classmethod
    def open(cls, path: Path | None, device: str) -> "Results":
        """Results to go on with, or new ones.

        Raises:
            UserError: the file's results come from another machine or other versions.
        """
        here = environment(device)
        if path is None or not path.exists():
            return cls(here, [], path)
        found = cls.load(path)
        differs = [k for k in SAME if found.environment.get(k) != here[k]]
        if differs:
            was, now = ({k: e.get(k) for k in differs} for e in (found.environment, here))
            raise UserError(f"{path} was measured with {was}, here is {now}: name another file")
        commits = found.environment["commit"].split(", ")  # all that something was measured at
        found.environment["commit"] = ", ".join(dict.fromkeys([*commits, here["commit"]]))
        return found

    def add(self, result: Result) -> None:
        self.results.append(result)
        self.save()

    def save(self) -> None:
        """Write the whole file anew, so that a kill leaves a good one."""
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            part = self.path.with_suffix(".part")
            records = [asdict(r) for r in self.results]
            part.write_text(
                json.dumps({"environment": self.environment, "results": records}, indent=1)
            )
            os.replace(part, self.path)

    def of(self, case: Case) -> list[Result]:
        return [r for r in self.results if r.case == case]

    @property
    def on_cpu(self) -> bool:
        return "cores" in self.environment["device"]

    @property
    def cases(self) -> list[Case]:
        return list(dict.fromkeys(r.case for r in self.results))


def committed() -> list[Results]:
    """All results in ``bench/results/``."""
    return [Results.load(p) for p in sorted((ROOT / "bench/results").glob("*/results.json"))]


def run(
    cases: Sequence[Case],
    results: Results,
    device: str,
    *,
    repeats: int = 5,
    only: Sequence[str] = (),
    seconds: float = float("inf"),
    say: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True),
) -> bool:
    """Measure every peer on every case that ``results`` does not hold yet.

    Args:
        only: names of the peers to run; all if empty.
        seconds: start no case after so long.

    Returns:
        Whether all is done.
    """
    deadline = time.monotonic() + seconds
    for number, case in enumerate(cases, 1):
        done = {r.peer for r in results.of(case)}
        todo = [p for p in peers_of(case) if p.name not in done and (not only or p.name in only)]
        if not todo:
            continue
        say(f"[{number}/{len(cases)}] {case.name}")
        runnable = []
        for peer in todo:
            why_not = peer.why_not(case, device) or does_not_fit(case, device)
            if why_not is None:
                runnable.append(peer)
            else:
                results.add(Result(case, peer.name, why_not))
                say(f"    {peer.name}: skipped, {why_not}")
        at_a_time = 1 if device == "cpu" else len(runnable)
        while runnable:
            if time.monotonic() > deadline:
                return False
            ours_failed = any(r.peer == OURS and r.why_not for r in results.of(case))
            now = runnable[:at_a_time]
            for result in _in_child(case, now, device, repeats, beside_ours=not ours_failed):
                results.add(result)
                say(f"    {_line(result)}")
                runnable = [p for p in runnable if p.name != result.peer]
    return True


def does_not_fit(case: Case, device: str) -> str | None:
    """The reason why nobody can run the case on this GPU: its inputs and gradients take more than
    all of its memory. None where they fit, and on a CPU."""
    if not device.startswith("cuda"):
        return None
    there = torch.cuda.get_device_properties(device).total_memory
    if case.least_bytes <= there:
        return None
    least, there = (f"{x / 1e9:.0f} GB" for x in (case.least_bytes, there))
    return f"does not fit: inputs and gradients take {least}, the GPU has {there}"


def _line(result: Result) -> str:
    if result.why_not is not None:
        return f"{result.peer}: {result.why_not}"
    return f"{result.peer}: {result.seconds:.4g} s, {result.peak_bytes / 1e6:.0f} MB"


def _in_child(
    case: Case, peers: Sequence[Peer], device: str, repeats: int, beside_ours: bool = True
) -> Iterator[Result]:
    """Results of some peers as they come; a crash becomes the result of the peer it happened in.

    They end early where the child did not survive an error: the others need another child.
    """
    task = {"case": asdict(case), "device": device, "repeats": repeats}
    left = task["peers"] = [p.name for p in peers]
    task["beside_ours"] = beside_ours
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with subprocess.Popen(
        [sys.executable, "-m", "bench.run", json.dumps(task)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env={**os.environ, "PYTHONPATH": path},
    ) as child:
        told, begun, last = set(), "", ""
        try:
            for line in child.stdout:
                if line.startswith(MARK):
                    result = Result.from_json(json.loads(line.removeprefix(MARK)))
                    told.add(result.peer)
                    yield result
                elif line.startswith(BEGIN):
                    begun = line.removeprefix(BEGIN).strip()
                elif line.strip():
                    last = line.strip()
        except BaseException:
            child.kill()
            raise
    left = [name for name in left if name not in told]
    if left and (child.returncode != LOST or not told):
        why_not = f"died with exit code {child.returncode}: {last[:200]}"
        yield Result(case, begun if begun in left else left[0], why_not)


def _child(task: dict[str, Any]) -> None:
    case, device = Case(**task["case"]), task["device"]
    peers = [p for p in peers_of(case) if p.name in task["peers"]]
    if device.startswith("cuda"):
        results = measure_in_turn(
            peers,
            case,
            device,
            task["repeats"],
            beside_ours=task["beside_ours"],
            begin=lambda peer: print(f"\n{BEGIN}{peer.name}", flush=True),
        )
    else:
        results = (_alone(peer, case, device, task["repeats"]) for peer in peers)
    for result in results:
        print(f"\n{MARK}{json.dumps(asdict(result))}", flush=True)
        if result.why_not is not None and device_is_lost(device):
            os._exit(LOST)  # at once: clearing up would fail as well


def _alone(peer: Peer, case: Case, device: str, repeats: int) -> Result:
    try:
        return measure(peer, case, device, repeats)
    except Exception as error:  # a library's failure is its result
        return Result(case, peer.name).failed(error)


def device_is_lost(device: str) -> bool:
    """Whether an error, such as an illegal access, stays with all that this process asks of it."""
    if not device.startswith("cuda"):
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


if __name__ == "__main__":
    _child(json.loads(sys.argv[1]))
