"""What moves where columns are left out: columns to the front, rows into the weight's gradient."""

import pytest
import torch

from humanline.kernels.outer import outer_
from humanline.kernels.put_rows import put_rows_
from humanline.kernels.take_columns import take_columns_

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "n, vocab, share", [(0, 64, 0.5), (3, 7, 0), (2, 9000, 0.6), (5, 9001, 0.05), (2, 5000, 1)]
)
def test_columns_move_to_the_front_in_order(n, vocab, share, dtype, device):
    memory = torch.randn(n, vocab + 5, device=device).to(dtype)
    x, beside = memory[:, :vocab], memory[:, vocab:].clone()
    columns = (torch.rand(vocab, device=device) < share).nonzero().squeeze(1)
    expected = x[:, columns]
    actual = take_columns_(x, columns)
    assert torch.equal(actual, expected)
    assert not actual.numel() or actual.data_ptr() == memory.data_ptr()
    assert torch.equal(memory[:, vocab:], beside)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("k, vocab, width", [(0, 5, 8), (4, 9, 3), (30, 50, 2500)])
def test_rows_are_put_where_they_belong(k, vocab, width, add, dtype, device):
    to = torch.randn(vocab, width, device=device).to(dtype)
    x = torch.randn(k, 2 * width, device=device).to(dtype)[:, :width]
    rows = torch.randperm(vocab, device=device)[:k]
    expected = to.clone()
    expected[rows] = expected[rows] + x if add else x
    assert torch.equal(put_rows_(to, rows, x, add), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("rank, vocab, width", [(1, 7, 3), (3, 40, 1500), (1, 0, 4)])
def test_outer_products_are_rounded_once(rank, vocab, width, add, dtype, device):
    out = torch.randn(vocab, width, device=device).to(dtype)
    columns, rows = torch.randn(rank, vocab, device=device), torch.randn(rank, width, device=device)
    exact = columns.double().T @ rows.double() + (out.double() if add else 0)
    sizes = columns.double().abs().T @ rows.double().abs() + out.double().abs()
    actual = outer_(out, columns, rows, add)
    rounding = torch.finfo(dtype).eps / 2 * exact.abs() + 1e-6 * sizes
    assert ((actual.double() - exact).abs() <= rounding).all()
