"""The quick suite under pytest-benchmark: ``python -m pytest bench --benchmark-only``.

Its statistics, comparisons and histograms work on these as on any: ``--benchmark-compare`` and
``--benchmark-histogram``. Another suite: ``HUMANLINE_SUITE=gpu``.
"""

import os

import pytest
import torch

from bench.accuracy import errors, truth
from bench.cases import SUITES, inputs
from bench.measure import step
from bench.peers import peers_of

pytest.importorskip("pytest_benchmark")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = SUITES[os.environ.get("HUMANLINE_SUITE", "quick")]


@pytest.mark.parametrize(
    "case, peer",
    [pytest.param(c, p, id=f"{c.name}/{p.name}") for c in CASES for p in peers_of(c)],
)
def test_speed(benchmark, case, peer):
    why_not = peer.why_not(case, DEVICE)
    if why_not:
        pytest.skip(why_not)
    benchmark.group = case.name
    if not peer.is_floor:
        found = errors(peer, truth(case, DEVICE))
        assert not found.wrong, found
        benchmark.extra_info["gradient_error"] = found.gradient
    batch = inputs(case, DEVICE)

    def run():
        step(peer, batch)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(run, warmup_rounds=1, rounds=5)
