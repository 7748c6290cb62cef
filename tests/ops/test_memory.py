"""Beside inputs and gradients the loss tail from hidden states holds its workspace, and floats a
row."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
H, V, WORKSPACE = 16, 4096, 8 * 2**20
LENGTHS = [512, 65536]

# Each N in a process of its own: what one freed would hide what the next takes.
SCRIPT = """
import json, sys
import torch
import humanline as hl
from bench.measure import _high_water, _recorded

torch.set_num_threads(1)
name, frozen = sys.argv[1], sys.argv[2] == "frozen"
n, H, V, WORKSPACE = map(int, sys.argv[3:])
hidden = torch.randn(8, n // 8, H, requires_grad=True)
weight = torch.randn(V, H, requires_grad=not frozen)
labels = torch.randint(0, V, (8, n // 8))
ref_logps = torch.full(labels.shape, -8.0)
objective, batch = {
    "grpo": (hl.GRPO(perception=hl.Clip(-9, 9), beta=0.1), {"advantages": torch.randn(8)}),
    "dpo": (hl.DPO(), {}),
    "logps": (None, {}),
}[name]


def step():
    hidden.grad = weight.grad = None
    if objective is None:
        logps = hl.linear_token_logps(hidden, weight, labels, workspace_bytes=WORKSPACE)
        loss = logps.square().sum()
    else:
        loss, _ = objective.from_hidden(
            hidden, weight, labels, ref_logps, workspace_bytes=WORKSPACE, **batch
        )
    loss.backward()


step()
hidden.grad = weight.grad = None
high_water = _high_water(step)
gradients = sum(4 * x.numel() for x in (hidden, weight) if x.requires_grad)
print(json.dumps([high_water - gradients, _recorded(step) - gradients]))
"""


def beside(name: str, frozen: bool, n: int) -> tuple[int, int]:
    """Bytes beside inputs and gradients: (high-water mark, profiler's record)."""
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            SCRIPT,
            name,
            "frozen" if frozen else "trained",
            *map(str, (n, H, V, WORKSPACE)),
        ],
        cwd=ROOT,
        # Freed blocks go back to the system at once: glibc would keep some of them, by chance two.
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return tuple(json.loads(done.stdout))


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("name", ["grpo", "dpo", "logps"])
def test_memory_is_the_workspace_and_some_floats_a_row(name, frozen):
    """All logits would be 8 MiB at the first length, 1 GiB at the last."""
    for n in LENGTHS:
        high_water, recorded = beside(name, frozen, n)
        assert WORKSPACE < recorded <= WORKSPACE + 24 * 4 * n + 2**18
        # Pages and pools, which earlier work may have left: a MiB either way.
        assert abs(high_water - recorded) <= 4 * 4 * n + 2**20
