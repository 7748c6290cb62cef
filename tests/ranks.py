"""Checks that several processes run together (gloo), one spawn for all of a file's: starting them
is what takes time."""

import os
import time
import traceback
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.utils._python_dispatch import TorchDispatchMode

SECONDS = 180


class Collectives(TorchDispatchMode):
    """Within this context, communication is written down.

    Attributes:
        seen: names of the operations.
        floats: bytes of floating-point values that this rank gave to each.
    """

    def __init__(self):
        super().__init__()
        self.seen, self.floats = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "c10d" in func.namespace:
            self.seen.append(func.name())
            given = args[1] if "_base" in func.name() else args[0]  # behind the output
            given = given if isinstance(given, list) else [given]
            floats = sum(x.nbytes for x in given if x.is_floating_point())
            if floats:
                self.floats.append(floats)
        return func(*args, **(kwargs or {}))


def _worker(rank, folder, ranks, checks, timeout):
    """Every check in turn. After one that failed the ranks may be out of step: stop."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), ranks)  # no port that another might take
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=timeout)
    )
    for check in checks:
        torch.manual_seed(0)
        try:
            check(rank)
            outcome = "passed"
        except Exception:
            outcome = traceback.format_exc()
        (folder / f"{check.__name__}-{rank}").write_text(outcome)
        if outcome != "passed":
            break
    else:
        dist.barrier()  # until the other ranks need nothing more of this one
    # Not through the interpreter's end: gloo's threads outlive destroy_process_group, and one that
    # wants the GIL by then, to let go of a tensor, aborts the process.
    os._exit(0)


def run(checks, folder, ranks=2, timeout=120):
    """What each process had to say of each check, by ``outcome(check, rank)``; processes that hang
    are killed.

    Args:
        checks: functions of a rank, all different names.
        timeout: seconds that a collective waits for the other ranks.
    """
    arguments = (folder, ranks, checks, timeout)
    processes = mp.spawn(_worker, arguments, nprocs=ranks, join=False)
    deadline = time.monotonic() + SECONDS
    while not processes.join(timeout=1):
        if time.monotonic() > deadline or any(
            path.read_text() not in ("passed", "") for path in folder.glob("*-[0-9]")
        ):
            processes.join(timeout=5)  # the others may have something to say of it
            for process in processes.processes:
                process.kill()
            break

    def outcome(check, rank):
        path = folder / f"{check.__name__}-{rank}"
        return path.read_text() if path.exists() else f"rank {rank} did not get there"

    return outcome


def outcome_of(checks, ranks=2):
    """A fixture: :func:`run` of these checks, once a file."""

    @pytest.fixture(scope="module")
    def outcome(tmp_path_factory):
        return run(checks, tmp_path_factory.mktemp("ranks"), ranks)

    return outcome


def require_passed(check, outcome, ranks=2):
    failed = [o for o in (outcome(check, rank) for rank in range(ranks)) if o != "passed"]
    if failed:
        pytest.fail("\n".join(failed), pytrace=False)
