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

from humanline.kernels import (
    columns, head_rows, linear_logps, masses, matmul, move_rows, outer, put_rows, scale,
    sequence_loss, sequence_policy, take_columns, token_logps, token_loss, token_policy, token_stats
)
from humanline.kernels.token_epilogue import TokenLoss

ROWS = (
    token_logps.humanline_token_logps,
    token_logps.humanline_token_logps_gradient,
    token_loss.humanline_token_loss,
    scale.humanline_scale,
    sequence_loss.humanline_sequence_loss,
    sequence_policy.humanline_sequence_policy,
    token_policy.humanline_token_policy,
    head_rows.humanline_head_softmax,
    head_rows.humanline_head_gradient,
    move_rows.humanline_move_rows,
    token_stats.humanline_token_stats,
    token_stats.humanline_token_stats_total,
    columns.humanline_column_sums,
    masses.humanline_masses,
    take_columns.humanline_take_columns,
    put_rows.humanline_put_rows,
    outer.humanline_outer,
)
GEMMS = (
    linear_logps.humanline_linear_logps,
    linear_logps.humanline_linear_merge,
    linear_logps.humanline_linear_gradient,
    matmul.humanline_matmul_hidden,
    matmul.humanline_matmul_weight,
)


def compiled(kernels):
    return [len(kernel.device_caches[0][0]) for kernel in kernels]


def run_rows(batch, length, x, vocab, shifted=False, dtype=torch.float32):
    logits = torch.randn(batch, length + shifted, vocab, dtype=torch.bfloat16)
    logits = logits[:, :-1] if shifted else logits
    labels, temperature = torch.zeros(batch, length, dtype=torch.long), torch.tensor(x)
    row = torch.full((batch * length,), x, dtype=dtype)
    logps, _, m, s = token_logps.token_logps_forward(logits, labels, temperature, False)
    token_logps.token_logps_backward(row, None, logits, labels, temperature, logps, None, m, s)
    grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
    loss = {
        "kind": "clipped",
        "penalty": "k3",
        "advantages": row,
        "anchor": row,
        "ref": row,
        "log_eps_P": -x,
        "log_eps_R": x,
        "low": x,
        "high": 2 * x,
        "delta": None if x == 1.0 else 4.0,
    }
    token_loss.token_loss(logits, labels, temperature, grad, weight=row, beta=x, **loss)
    mask, tokens = labels.view(-1) == 0, torch.tensor(len(row))
    token_stats.token_stats(logps, None, logps, logps, mask, tokens, 2 * batch, None, **loss)
    some = row[: 2 * batch] if length > 1 else row[:1].expand(2 * batch)
    sequence_policy.sequence_policy(
        logps, None, mask, tokens, 2 * batch, None, weight=some, beta=x, **loss
    )
    token_policy.token_policy(logps, mask, weight=row, beta=x, **loss)
    scale.scale_(grad, torch.tensor(x))
    sequence_loss.sequence_loss(
        logps,
        row,
        mask,
        tokens,
        kind="sigmoid",
        num_sequences=2 * batch,
        cu_seqlens=None,
        log_eps_P=-x,
        log_eps_R=x,
        beta=x,
        p=x / 4,
    )
    z = torch.randn(batch * length, vocab)
    options = {"bias": z[0], "logit_scale": x, "logit_softcap": 10 * x}
    token = TokenLoss.of(weight=row, beta=x, **loss)
    block = head_rows.HeadRows(z, labels.view(-1), temperature, token_loss=token, **options)
    block.gradient(z.bfloat16(), torch.arange(len(z)), row)
    some = slice(batch, None)  # rows that begin anywhere
    head_rows.HeadRows(
        z[batch:].clone(), labels.view(-1)[some], temperature, token_loss=token.rows(some),
        **options,
    )
    move_rows.move_rows_(z, torch.arange(len(z)))
    columns.column_energies(z, z[:, 0])
    masses.masses(z, z[0])
    some = torch.arange(batch)
    take_columns.take_columns_(z, some)
    put_rows.put_rows_(z, some, z)
    outer.outer_(torch.empty(8, vocab), z[:batch, :8], z[:batch])
    return compiled(ROWS)


def run_gemms(n, x, dtype=torch.float32):
    hidden, weight = torch.randn(n, 64).bfloat16(), torch.randn(320, 64).bfloat16()
    labels, count = torch.zeros(n).long(), torch.tensor(n).int()
    row = torch.full((n,), x, dtype=dtype)
    options = {
        "temperature": torch.tensor(x),
        "logit_scale": x,
        "logit_softcap": 10 * x,
        "count": count,
    }
    index = torch.arange(n)
    result = linear_logps.linear_logps_forward(hidden, weight, labels, index=index, **options)
    dz = linear_logps.linear_logits_gradient(
        hidden, weight, labels, *result, of_logp=row, **options
    )
    matmul.hidden_gradient_(hidden, dz, weight, count, scale=row, index=index)
    matmul.add_weight_gradient_(torch.zeros(320, 64), dz, hidden, count, factor=torch.tensor(x))
    return compiled(GEMMS)


if "{what}" == "rows":
    counts = [
        run_rows(batch, length, x, {vocab}, shifted)
        for batch, length, x, shifted in [
            (2, 16, 1.0, False), (2, 3, 1.0, False), (1, 1, 1.0, False), (3, 33, 0.7, False),
            (2, 16, 0.3, True), (4, 7, 0.5, True), (1, 48, 0.9, True),
        ]
    ]
elif "{what}" == "float64":
    counts = [run_rows(2, 3, 1.0, {vocab}, dtype=torch.float64), run_gemms(7, 1.0, torch.float64)]
else:
    counts = [run_gemms(n, x) for n, x in [(1, 1.0), (7, 0.3), (16, 1.0), (128, 2.0), (500, 1.5)]]
print(json.dumps(counts))
"""


def compilations(what, vocab=0):
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.replace("{vocab}", str(vocab)).replace("{what}", what)],
        env={**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("vocab", [4096, 50257])
def test_lengths_and_hyperparameters_compile_nothing(vocab):
    assert compilations("rows", vocab) == [[1] * 17] * 7


def test_numbers_of_rows_and_head_options_compile_nothing():
    assert compilations("gemms") == [[1] * 5] * 5


def test_row_values_in_float64_compile():
    """Such as log-probs of a reference computed elsewhere; the interpreter hides what the compiler
    makes of two dtypes in one sum."""
    assert compilations("float64", 4096) == [[1] * 17, [1] * 5]
