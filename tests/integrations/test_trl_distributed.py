"""Two processes give the numbers of one: losses, syncs, groups that span processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import trl_tiny as tiny
from torch.testing import assert_close
from trl_two_processes import BATCH_SIZE, train

SCRIPT = Path(__file__).with_name("trl_two_processes.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Results of both methods in two processes; starting them is what takes time."""
    folder = tmp_path_factory.mktemp("distributed")
    tiny.model().save_pretrained(folder / "model")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, SCRIPT, folder], capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("method", BATCH_SIZE)
def test_two_processes_give_the_numbers_of_one(folder, method):
    two = torch.load(folder / f"{method}.pt", weights_only=True)
    one = train(folder, method)
    assert (one["processes"], two["processes"]) == (1, 2)
    assert min(one["unclamped"][:-1]) < 1
    assert two["unclamped"][:-1] == pytest.approx(one["unclamped"][:-1])
    for name in ("weights", "reference"):
        assert_close(two[name], one[name], rtol=1e-4, atol=1e-5)
