"""Rows that wait for the products of the backward: products, reads, and the numbers they give."""

import pytest
import torch
from oracle import leaf

import humanline as hl
from humanline.kernels.launch import row_length
from humanline.ops import WORKSPACE_BYTES
from humanline.ops.backend import interpreting
from humanline.ops.hidden import gemms
from humanline.ops.hidden.blocks import stacked_rows

pytestmark = pytest.mark.skipif(
    not (interpreting() or torch.cuda.is_available()), reason="needs a GPU or interpreter"
)
N, H, V = 64, 24, 301
BLOCK, WAITING = 4, 16
CLIP = hl.Clip(-0.2, 0.2)


@pytest.fixture
def device():
    return "cuda" if torch.cuda.is_available() else "cpu"


class Batch:
    """Sequences of two rows, of which some are clipped; a sequence is a group of a KTO batch."""

    def __init__(self, active, device, dtype=torch.float32):
        shape = N // 2, 2
        self.hidden = torch.randn(*shape, H, device=device).to(dtype)
        self.weight = (torch.randn(V, H, device=device) * 3 / H).to(dtype)
        self.labels = torch.randint(0, V, shape, device=device)
        logps = hl.linear_token_logps(self.hidden, self.weight, self.labels)
        far = torch.rand(N, device=device).argsort().argsort().view(shape) >= active
        self.ref_logps = logps + 5.0 * far
        self.objectives = {
            "grpo": (hl.GRPO(perception=CLIP), {"advantages": torch.randn(N // 2, device=device)}),
            "entropy": (
                hl.GRPO(perception=CLIP, entropy_coef=0.1),
                {"advantages": torch.randn(N // 2, device=device)},
            ),
            "kto": (
                hl.KTO(perception=CLIP),
                {"desirable": torch.rand(N // 2, device=device) < 0.5, "z0": 0.1},
            ),
        }

    def gradients(self, name, **how):
        objective, extra = self.objectives[name]
        leaves = leaf(self.hidden), leaf(self.weight)
        loss, _ = objective.from_hidden(*leaves, self.labels, self.ref_logps, **extra, **how)
        return loss, *torch.autograd.grad(loss, leaves)


def workspace(dtype=torch.float32):
    """Holds blocks of four rows, and the gradients of sixteen."""
    size = row_length(V) * (4 * BLOCK + dtype.itemsize * WAITING)
    assert stacked_rows(row_length(V), dtype.itemsize, size) == (BLOCK, WAITING)
    return size


@pytest.mark.parametrize("active", [N, 40, 6, 0])
def test_products_go_by_the_rows_with_a_gradient(active, device, monkeypatch):
    """Not by the blocks, of which there are sixteen."""
    batch, multiplied, read = Batch(active, device), [], []
    add, to_int = gemms.add_weight_gradient_, torch.Tensor.__int__

    def spied(total, dz, *args):
        multiplied.append(len(dz))
        return add(total, dz, *args)

    def counted(number):
        read.append(to_int(number))
        return read[-1]

    monkeypatch.setattr(gemms, "add_weight_gradient_", spied)
    monkeypatch.setattr(torch.Tensor, "__int__", counted)
    batch.gradients("grpo", backend="triton", workspace_bytes=workspace())
    assert sum(multiplied) == active
    assert len(multiplied) <= active // (WAITING - BLOCK + 1) + 1
    if active == N:
        assert multiplied == read == [WAITING] * (N // WAITING)
    if active == 0:  # whenever sixteen rows might wait
        assert read == [0] * (N // WAITING)
    assert len(read) <= N // BLOCK


@pytest.mark.parametrize("name", ["grpo", "entropy", "kto"])
@pytest.mark.parametrize("active", [N, 40, 6, 0])
def test_the_numbers_are_those_of_torch(active, name, device):
    batch = Batch(active, device)
    ours = batch.gradients(name, backend="triton", workspace_bytes=workspace())
    again = batch.gradients(name, backend="triton", workspace_bytes=workspace())
    theirs = batch.gradients(name, backend="torch")
    for x, y, z in zip(ours, again, theirs, strict=True):
        assert torch.equal(x, y)
        torch.testing.assert_close(x, z, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_in_half_precision(dtype, device):
    batch = Batch(40, device, dtype)
    ours = batch.gradients("grpo", backend="triton", workspace_bytes=workspace(dtype))
    theirs = batch.gradients("grpo", backend="torch")
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y, rtol=0.02, atol=1e-3)


@pytest.mark.parametrize(
    "vocab, expected",
    [  # at 512 MiB in bfloat16: a block's rows, and those that wait
        (32_000, (1_280, 5_828)),
        (151_936, (256, 1_254)),
        (262_144, (256, 512)),
    ],
)
def test_how_the_workspace_is_shared(vocab, expected):
    assert stacked_rows(vocab, 2, WORKSPACE_BYTES) == expected


@pytest.mark.parametrize("itemsize", [2, 4])
def test_it_holds_what_it_says(itemsize):
    for rows in (2, 3, 10, 300, 5_000):
        size = rows * 16 * 4
        block, waiting = stacked_rows(16, itemsize, size)
        assert block <= waiting and (block > 0 or rows < 5)
        assert 16 * (4 * block + itemsize * waiting) <= size
