"""A rank that does not come to a collective: the others' error names it, and nobody waits on."""

import time

import pytest
import torch
import torch.distributed as dist
from ranks import run

import humanline as hl

RANKS, TIMEOUT = 3, 2.0


def loss(objective=None):
    logps, mask = torch.zeros(2, 4, requires_grad=True), torch.ones(2, 4)
    parallel = hl.Parallel(sequence=dist.group.WORLD)
    return (objective or hl.SFT()).from_logps(logps, None, mask, parallel=parallel)[0]


def slow(rank):
    loss()
    if rank == 1:
        time.sleep(2 * TIMEOUT + 3)
    loss()


def failing(rank):
    loss()
    if rank == 2:
        loss(hl.GRPO())  # which lacks its advantages
    loss()


@pytest.mark.parametrize(("check", "absent"), [(slow, 1), (failing, 2)])
def test_the_others_name_it(tmp_path, check, absent):
    start = time.monotonic()
    outcome = run([check], tmp_path, RANKS, timeout=TIMEOUT)
    assert time.monotonic() - start < 60
    for rank in {*range(RANKS)} - {absent}:
        assert f"sequence axis of ranks [0, 1, 2]: rank {absent} did not come." in outcome(
            check, rank
        )
    if check is failing:
        assert "GRPO needs advantages" in outcome(check, absent)
