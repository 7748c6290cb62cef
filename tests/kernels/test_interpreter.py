"""Triton's interpreter as kernels/interpreter.py leaves it, here and in a user's process."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from humanline.kernels.interpreter import product_in_order
from humanline.ops.backend import interpreting

if not interpreting():
    pytest.skip("Triton compiles here", allow_module_level=True)

USER = """
import torch, humanline as hl
torch.manual_seed(0)
hidden, weight, labels = torch.randn(5, 48), torch.randn(300, 48), torch.arange(5)
found = {}
for dtype in torch.bfloat16, torch.float32:
    head = hidden.to(dtype), weight.to(dtype), labels
    found[dtype] = {b: hl.linear_token_logps(*head, backend=b) for b in ("triton", "torch")}
bits = [found[dtype]["triton"].tolist() for dtype in found]
"""


def test_a_product_is_summed_from_the_first_to_the_last_whatever_is_beside_it():
    a = np.random.default_rng(0).standard_normal((3, 40, 33), np.float32)
    b = np.random.default_rng(1).standard_normal((3, 33, 70), np.float32)
    out = product_in_order(a, b)
    for at in ((0, 0, 0), (1, 39, 69), (2, 17, 31)):
        batch, row, column = at
        total = np.float32(0)
        for k in range(33):
            total += a[batch, row, k] * b[batch, k, column]
        assert out[at] == total
    assert (product_in_order(a[:, 5:6], b) == out[:, 5:6]).all()
    assert (product_in_order(a, b.swapaxes(1, 2).copy().swapaxes(1, 2)) == out).all()


def test_a_user_gets_the_same_bits_by_any_blas():
    """And the right ones: the interpreter's own product of bfloat16 is of other numbers."""
    here = {}
    exec(USER, here)
    for of_dtype in here["found"].values():
        torch.testing.assert_close(of_dtype["triton"], of_dtype["torch"], rtol=1e-5, atol=1e-5)
    done = subprocess.run(
        [sys.executable, "-c", USER + "print(bits)"],
        env={**os.environ, "TRITON_INTERPRET": "1", "OPENBLAS_CORETYPE": "Prescott"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == str(here["bits"])


@triton.jit
def _round(x_ptr, nearest_ptr, down_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    x = tl.load(x_ptr + at)
    tl.store(nearest_ptr + at, x.to(tl.bfloat16))
    tl.store(down_ptr + at, x.to(tl.bfloat16, fp_downcast_rounding="rtz"))


def test_bfloat16_is_rounded_to_nearest_unless_truncation_is_asked_for():
    x = torch.randn(64)
    x[:4] = torch.tensor([float("inf"), -float("inf"), 0.0, 3.3895e38])
    nearest, down = torch.empty(64).bfloat16(), torch.empty(64).bfloat16()
    _round[(1,)](x, nearest, down, 64)
    assert nearest.equal(x.bfloat16())
    truncated = (x.view(torch.int32) & -65536).view(torch.float32)
    assert down.float().equal(truncated)
    assert not down.equal(nearest)


@triton.jit
def _multiply(a_ptr, b_ptr, out_ptr, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(out_ptr + at, tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at)))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float16, torch.float8_e5m2])
def test_products_of_other_types_stay_right(dtype):
    a, b = (torch.randint(-4, 5, (16, 16)).float().to(dtype) for _ in range(2))
    out = torch.empty(16, 16, dtype=torch.int32 if dtype == torch.int8 else torch.float32)
    _multiply[(1,)](a, b, out, 16)
    assert out.float().equal(a.float() @ b.float())
