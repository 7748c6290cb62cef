"""One read and one write; rows without a gradient are not read for it: counted, not claimed."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("counts loads and stores of Triton's interpreter", allow_module_level=True)

from bench.machine_code import traffic

SMALL = 0.05  # labels, log-probs, coefficients: a few bytes a row of 8,192 logits


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("objective", ["GRPO", "GRPO+H", "SFT"])
def test_token_level_is_one_read_and_one_write(objective, dtype):
    bytes_moved = traffic.measure(objective, dtype)
    size = dtype.itemsize
    assert bytes_moved["HBM reads"] == pytest.approx(size, abs=SMALL)
    assert bytes_moved["writes"] == pytest.approx(size, abs=SMALL)
    assert bytes_moved["HBM total"] <= 2.1 * size


def test_token_level_reads_inactive_rows_once():
    bytes_moved = traffic.measure("GRPO", active=0.5)
    assert bytes_moved["all reads"] == pytest.approx(2 * 1.5, abs=SMALL)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_an_incoming_gradient_scales_the_written_one(dtype):
    """One read and one write more; none where it is 1, or known before the gradient is formed."""
    size = dtype.itemsize
    assert traffic.measure("SFT", dtype, upstream=0.3)["HBM total"] == pytest.approx(
        4 * size, abs=SMALL
    )
    assert traffic.measure("DPO", dtype, upstream=0.3)["HBM total"] == pytest.approx(
        3 * size, abs=SMALL
    )


@pytest.mark.parametrize("upstream", [1.0, 0.3])
def test_float16_token_level_is_two_reads_and_one_write(upstream):
    bytes_moved = traffic.measure("GRPO", torch.float16, upstream=upstream)
    assert bytes_moved["HBM reads"] == pytest.approx(4, abs=SMALL)
    assert bytes_moved["writes"] == pytest.approx(2, abs=SMALL)


@pytest.mark.parametrize("objective", ["DPO", "KTO"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sequence_level_is_two_reads_and_one_write(objective, dtype):
    bytes_moved = traffic.measure(objective, dtype)
    assert bytes_moved["HBM reads"] == pytest.approx(4, abs=SMALL)
    assert bytes_moved["HBM total"] <= 6.1


@pytest.mark.parametrize("objective, active", [("DPO", 0.0), ("DPO", 0.25), ("KTO", 0.5)])
def test_sequence_level_does_not_read_inactive_rows_again(objective, active):
    bytes_moved = traffic.measure(objective, active=active)
    assert bytes_moved["all reads"] == pytest.approx(2 + 2 * active, abs=SMALL)
    assert bytes_moved["writes"] == pytest.approx(2, abs=SMALL)


@pytest.mark.parametrize("objective", ["GRPO", "DPO"])
def test_masked_rows_are_not_read_at_all(objective):
    whole, half = (traffic.measure(objective, masked=masked) for masked in (0.0, 0.5))
    assert half["all reads"] == pytest.approx(whole["all reads"] / 2, abs=SMALL)


def test_energies_of_columns_cost_a_read_or_come_with_the_gradient():
    """A line of sums for every 128 rows: 4 bytes for 128 logits."""
    from humanline.kernels.columns import column_energies
    from humanline.kernels.linear_logps import linear_logits_gradient, linear_logps_forward

    n, vocab = 256, 1024
    dz, weights = torch.randn(n, vocab).bfloat16(), torch.rand(n)
    with traffic.counted() as alone:
        column_energies(dz, weights)
    assert alone.per_logit(dz)["all reads"] == pytest.approx(2, abs=SMALL)
    assert alone.per_logit(dz)["writes"] == 4 / 128
    hidden, weight = torch.randn(n, 16).bfloat16(), torch.randn(vocab, 16).bfloat16()
    labels, temperature = torch.randint(0, vocab, (n,)), torch.tensor(1.0)
    rows = linear_logps_forward(hidden, weight, labels, temperature=temperature)
    written = []
    for given in (None, weights):
        with traffic.counted() as along:
            linear_logits_gradient(
                hidden, weight, labels, *rows, temperature=temperature, weights=given
            )
        written.append(along.per_logit(dz)["writes"])
    assert written == [2, 2 + 4 / 128]
