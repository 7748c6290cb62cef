"""Beside inputs and gradients the loss tail from hidden states holds its workspace, and floats a
row."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# At the last length a copy of N·H floats is twice what the bound lets pass.
H, V, WORKSPACE = 64, 512, 2**20
LENGTHS = [512, 65536]
A_BLOCK = 2**19  # hidden states of one block and what is made of them

# Each N in a process of its own: what one freed would hide what the next takes. They are forks of
# one that has only imported.
SCRIPT = """
import json, os, sys
import torch
import humanline as hl
from bench.measure import _high_water, _recorded

torch.set_num_threads(1)
name, frozen, dtype = sys.argv[1], sys.argv[2] == "frozen", getattr(torch, sys.argv[3])
H, V, WORKSPACE, *lengths = map(int, sys.argv[4:])
for n in lengths:
    child = os.fork()
    if not child:
        break
    if os.waitpid(child, 0)[1]:
        sys.exit(f"failed at {n} rows")
else:
    sys.exit()
hidden = torch.randn(8, n // 8, H).to(dtype).requires_grad_()
weight = torch.randn(V, H).to(dtype).requires_grad_(not frozen)
labels = torch.randint(0, V, (8, n // 8))
reference = {"ref_logps": torch.full(labels.shape, -8.0)}
objective, batch = {
    "grpo": (hl.GRPO(perception=hl.Clip(-9, 9), beta=0.1), {"advantages": torch.randn(8)}),
    "dpo": (hl.DPO(), {}),
    "dpo-hidden": (hl.DPO(), {}),
    "logps": (None, {}),
}[name]
if name == "dpo-hidden":
    reference = {"ref_hidden": torch.randn(8, n // 8, H), "ref_weight": torch.randn(V, H)}


def step():
    hidden.grad = weight.grad = None
    if objective is None:
        logps = hl.linear_token_logps(hidden, weight, labels, workspace_bytes=WORKSPACE)
        loss = logps.square().sum()
    else:
        loss, _ = objective.from_hidden(
            hidden, weight, labels, **reference, workspace_bytes=WORKSPACE, **batch
        )
    (loss * 0.5).backward()


step()
hidden.grad = weight.grad = None
high_water = _high_water(step)


def recorded():
    hidden.grad = weight.grad = None
    return _recorded(step)


gradients = sum(x.nbytes for x in (hidden, weight) if x.requires_grad)
# The profiler may lose events on a busy machine, never make any: the larger of two records.
print(json.dumps([high_water - gradients, max(recorded(), recorded()) - gradients]))
"""


def beside(name: str, frozen: bool, dtype: str) -> list[tuple[int, int]]:
    """Bytes beside inputs and gradients, of each length: (high-water mark, profiler's record)."""
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            SCRIPT,
            name,
            "frozen" if frozen else "trained",
            dtype,
            *map(str, (H, V, WORKSPACE, *LENGTHS)),
        ],
        cwd=ROOT,
        # Freed blocks go back to the system at once: glibc would keep some of them, by chance two.
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


@pytest.mark.parametrize(
    "name, frozen, dtype",
    [
        ("grpo", False, "float32"),
        ("grpo", False, "bfloat16"),
        ("grpo", True, "float32"),
        ("dpo", False, "float32"),
        ("dpo", True, "float32"),
        ("dpo", True, "bfloat16"),
        ("dpo-hidden", False, "float32"),
        ("logps", False, "float32"),
    ],
)
def test_memory_is_the_workspace_and_some_floats_a_row(name, frozen, dtype):
    """All logits would be 1 MiB at the first length, 128 MiB at the last."""
    for n, (high_water, recorded) in zip(LENGTHS, beside(name, frozen, dtype), strict=True):
        allowed = WORKSPACE + 24 * 4 * n + A_BLOCK
        if dtype == "bfloat16":  # the weight and its gradient in float32, see workspace_bytes
            allowed += 2 * 4 * V * H
        assert WORKSPACE < recorded <= allowed
        # Pages and pools, which earlier work may have left: a MiB either way.
        assert abs(high_water - recorded) <= 4 * 4 * n + 2**20
