"""A new length, temperature, β or ε compiles nothing: they are run-time arguments."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# Launches compile for sm_90 and stop there, so no GPU is needed; another process, because in this
# one the kernels may be interpreted.
SCRIPT = """
import json
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction


class NoDevice:
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0


driver.set_active(NoDevice())
launch = JITFunction.run
JITFunction.run = lambda self, *a, grid, warmup, **k: launch(self, *a, grid=grid, warmup=True, **k)

from humanline.kernels import scale, sequence_loss, token_logps, token_loss

KERNELS = (
    token_logps._forward,
    token_logps._backward,
    token_loss._token_loss,
    scale._scale,
    sequence_loss._sequence_loss,
)


def compiled():
    return [len(kernel.device_caches[0][0]) for kernel in KERNELS]


def run(batch, length, x, vocab, shifted=False):
    logits = torch.randn(batch, length + shifted, vocab, dtype=torch.bfloat16)
    logits = logits[:, :-1] if shifted else logits
    labels, temperature = torch.zeros(batch, length, dtype=torch.long), torch.tensor(x)
    row = torch.full((batch * length,), x)
    logps, _, m, s = token_logps.token_logps_forward(logits, labels, temperature, False)
    token_logps.token_logps_backward(row, None, logits, labels, temperature, logps, None, m, s)
    grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
    token_loss.token_loss(
        logits,
        labels,
        temperature,
        grad,
        kind="clipped",
        penalty="k3",
        weight=row,
        advantages=row,
        anchor=row,
        ref=row,
        log_eps_P=-x,
        log_eps_R=x,
        low=x,
        high=2 * x,
        delta=None if x == 1.0 else 4.0,
        beta=x,
    )
    scale.scale_(grad, torch.tensor(x))
    sequence_loss.sequence_loss(
        row,
        row,
        labels == 0,
        kind="sigmoid",
        num_sequences=2 * batch,
        cu_seqlens=None,
        log_eps_P=-x,
        log_eps_R=x,
        beta=x,
        p=x / 4,
    )
    return compiled()


print(json.dumps([
    run(batch, length, x, {vocab}, shifted)
    for batch, length, x, shifted in [
        (2, 16, 1.0, False), (2, 3, 1.0, False), (1, 1, 1.0, False), (3, 33, 0.7, False),
        (2, 16, 0.3, True), (4, 7, 0.5, True), (1, 48, 0.9, True),
    ]
]))
"""


@pytest.mark.parametrize("vocab", [4096, 50257])
def test_lengths_and_hyperparameters_compile_nothing(vocab):
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.replace("{vocab}", str(vocab))],
        env={**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [[1] * 5] * 7
