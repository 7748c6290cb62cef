"""Two processes give the numbers of one: losses, syncs, groups that span processes."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import trl_tiny as tiny
from test_trl_kto import eager
from torch.testing import assert_close
from trl_two_processes import BATCH_SIZE, CLIP, train

import humanline as hl

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


def test_kto_s_reference_point_is_the_mean_over_ranks(folder):
    """Of which the first holds desirable examples alone."""
    ranks = [torch.load(folder / f"KTO-{rank}.pt", weights_only=True) for rank in range(2)]
    assert all(labels.all() for labels in ranks[0]["labels"])
    assert not all(labels.any() for labels in ranks[1]["labels"])
    policy, reference = tiny.model(), tiny.model()
    policy.load_state_dict(ranks[0]["disturbed"])

    def scores(batch, prefix=""):
        with torch.no_grad():
            ref_logps, _ = eager(reference, batch, prefix)
        logps, mask = eager(policy, batch, prefix)
        return logps, ref_logps, mask

    clip = hl.Clip(**CLIP)
    points = []
    for rank in ranks:
        logps, ref_logps, _ = scores(rank["batch"], "KL_")  # both are 0 outside the completions
        points.append((logps - ref_logps).clamp(*CLIP.values()).sum(1).mean().item())
    point = sum(points) / 2
    assert point > 0 and points[0] != pytest.approx(points[1], rel=0.1)
    for rank in ranks:
        assert rank["point"] == ranks[0]["point"] == pytest.approx(point, rel=1e-4)
        desirable = rank["batch"]["label"].bool()
        arguments = {"desirable": desirable, "z0": point}
        loss, _ = hl.KTO(perception=clip).from_logps(*scores(rank["batch"]), **arguments)
        loss.backward()
        assert_close(rank["loss"], loss.detach(), rtol=1e-5, atol=1e-6)
        assert_close(rank["gradients"], tiny.gradients(policy), rtol=1e-4, atol=2e-6)


def test_kto_trains_where_a_rank_has_desirable_examples_alone(folder):
    ranks = [torch.load(folder / f"KTO-{rank}.pt", weights_only=True) for rank in range(2)]
    assert len(ranks[0]["logged"]) == 2 and all(map(math.isfinite, ranks[0]["logged"]))
    assert_close(ranks[1]["weights"], ranks[0]["weights"], rtol=0, atol=0)
    moved = ranks[0]["weights"]["lm_head.weight"] - ranks[0]["disturbed"]["lm_head.weight"]
    assert moved.isfinite().all() and moved.any()
