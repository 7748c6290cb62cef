import os
from collections import Counter
from pathlib import Path

import pytest
import torch

# Before anything imports Triton: without a GPU its interpreter runs the kernels on CPU tensors.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

torch.set_num_threads(1)  # tensors are small here: threads would only wait for each other


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """A file is one worker's, unless ``--dist`` says otherwise: what a file shares, such as
    processes that are started once for all of its tests, would be made by each worker."""
    if config.option.dist == "load":
        from xdist.scheduler import LoadFileScheduling

        return LoadFileScheduling(config, log)


# `pytest -m core`: what one who changes a kernel wants to know while at it. Some cases of each test
# that core.txt names, but of those under bench/, which compile for minutes.
TESTS = Path(__file__).parent
LISTED = (TESTS / "core.txt").read_text().split()
CORE = [TESTS.parent / part for part in LISTED if not part.startswith("tests/bench/")]
ONE_IN = 16  # cases of a test; the first is always in

# Tests and whole files: `pytest -m slow`, and what the README's command leaves out (slow.py).
SLOW = set((TESTS / "slow.txt").read_text().splitlines())


def in_core(path: Path) -> bool:
    return any(path == part or part in path.parents for part in CORE)


def pytest_ignore_collect(collection_path, config):
    """Files that have nothing marked are not even imported: TRL alone takes seconds."""
    if config.option.markexpr == "core" and collection_path.is_file():
        return not in_core(collection_path) or None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    cases = Counter()
    for item in items:
        function = item.nodeid.partition("[")[0]
        if {function, function.partition("::")[0]} & SLOW:
            item.add_marker("slow")
        if in_core(item.path):
            if cases[function] % ONE_IN == 0:
                item.add_marker("core")
            cases[function] += 1
