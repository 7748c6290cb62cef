"""Rows that wait for the products of the backward: products, reads, memory, and the numbers."""

import pytest
import torch
from oracle import leaf

import humanline as hl
from humanline.kernels.launch import row_length
from humanline.kernels.move_rows import move_rows_
from humanline.ops import WORKSPACE_BYTES
from humanline.ops.backend import interpreting
from humanline.ops.hidden import gemms
from humanline.ops.hidden.blocks import StackSizes, stack_sizes
from humanline.ops.softmax import front_order

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
    """Sequences of two rows, some of which are clipped: a group of a KTO batch is a sequence, of a
    DPO batch a pair; with a perception that ranks, or a loss that sorts, it is the batch."""

    def __init__(self, active, device, dtype=torch.float32, width=H, masked=0):
        shape = N // 2, 2
        # Drawn on a CPU: whether a row is clipped is to be the same everywhere.
        self.hidden = torch.randn(*shape, width).to(device, dtype)
        self.weight = (torch.randn(V, width) * 3 / width).to(device, dtype)
        self.bias = torch.randn(V).to(device, dtype)
        self.labels = torch.randint(0, V, shape).to(device)
        logps = hl.linear_token_logps(
            self.hidden, self.weight, self.labels, self.bias, backend="torch"
        )
        self.labels.view(-1)[torch.randperm(N)[:masked]] = -100
        far = torch.rand(N).argsort().argsort().view(shape) >= active
        self.ref_logps = logps + 5.0 * far.to(device)
        advantages = {"advantages": torch.randn(N // 2).to(device)}
        desirable = (torch.rand(N // 2) < 0.5).to(device)
        self.objectives = {
            "grpo": (hl.GRPO(perception=CLIP), advantages),
            "entropy": (hl.GRPO(perception=CLIP, entropy_coef=0.1, beta=0.1), advantages),
            "gspo": (hl.GRPO(perception=CLIP, importance_sampling_level="sequence"), advantages),
            "kto": (hl.KTO(perception=CLIP), {"desirable": desirable, "z0": 0.1}),
            "dpo": (hl.DPO(perception=CLIP), {}),
            "aot": (hl.DPO(perception=CLIP, loss_type="aot"), {}),
            "sft": (hl.SFT(), {}),
        }

    def gradients(self, name, upstream=1.0, frozen=False, **how):
        objective, extra = self.objectives[name]
        leaves = [leaf(x) for x in (self.hidden, self.weight, self.bias)][: 1 if frozen else 3]
        rest = [self.weight, self.bias] if frozen else []
        hidden, weight, bias = leaves + rest
        loss, _ = objective.from_hidden(
            hidden, weight, self.labels, self.ref_logps, bias=bias, **extra, **how
        )
        return loss, *torch.autograd.grad(loss * upstream, leaves)


def sizes(rows, dtype, width, workspace_bytes, trains=True):
    return stack_sizes(rows, row_length(V), width, dtype.itemsize, trains, workspace_bytes)


def workspace(dtype=torch.float32):
    """Holds blocks of four rows, and the gradients of sixteen."""
    size = row_length(V) * (4 * BLOCK + dtype.itemsize * WAITING)
    assert sizes(N, torch.float32, H, size) == StackSizes(BLOCK, WAITING) or dtype.itemsize == 2
    return size


@pytest.fixture
def multiplied(monkeypatch):
    """Rows of each product for the weight."""
    rows = []
    for name in ("weight_gradient", "rounded_weight_gradient"):
        from humanline.ops.hidden import stacked

        original = getattr(gemms, name)

        def spied(dz, scale, h, *rest, original=original):
            if h.shape[1] > 1 and (not rows or rows[-1] is not dz):  # one calls the other
                rows.append(dz)
            return original(dz, scale, h, *rest)

        monkeypatch.setattr(gemms, name, spied)
        monkeypatch.setattr(stacked, name, spied)
    return rows


@pytest.mark.parametrize("active", [N, 40, 6, 0])
def test_products_go_by_the_rows_with_a_gradient(active, device, multiplied):
    """Not by the blocks, of which there are sixteen."""
    Batch(active, device).gradients("grpo", backend="triton", workspace_bytes=workspace())
    counts = list(map(len, multiplied))
    assert sum(counts) == active
    assert len(counts) <= active // (WAITING // 2 + 1) + 1
    if active == N:
        assert counts == [WAITING] * (N // WAITING)


@pytest.mark.parametrize(
    "name, active",
    [*((name, 40) for name in ("grpo", "gspo", "kto", "dpo", "aot")), ("grpo", N), ("dpo", 0)],
)
def test_up_to_2H_rows_there_is_one_product(name, active, device, multiplied):
    """Whatever hangs together; of rows with a gradient alone, though nobody knew which they are
    when the logits were there."""
    batch = Batch(active, device, torch.bfloat16, width=N // 2)
    batch.gradients(name, backend="triton", workspace_bytes=workspace(torch.bfloat16))
    assert [len(x) for x in multiplied] == [active]


@pytest.mark.parametrize("name", ["grpo", "kto", "dpo"])
def test_beyond_the_stack_is_emptied_when_H_rows_wait(name, device, multiplied):
    batch = Batch(N, device, torch.bfloat16)
    batch.gradients(name, backend="triton", workspace_bytes=workspace(torch.bfloat16))
    assert [len(x) for x in multiplied] == [H, H, N - 2 * H]


NAMES = ["grpo", "entropy", "gspo", "kto", "dpo", "aot", "sft"]


@pytest.mark.parametrize(
    "name, active, masked, frozen",
    [
        *((name, 40, 11, False) for name in NAMES),
        *((name, N, 0, False) for name in ("grpo", "dpo", "sft")),
        *((name, 0, 0, False) for name in ("grpo", "kto")),
        *((name, 40, masked, True) for name, masked in [("grpo", 0), ("entropy", 11), ("dpo", 11)]),
    ],
)
def test_the_numbers_are_those_of_torch(name, active, masked, frozen, device):
    """Where blocks and stack share the workspace, which is emptied several times."""
    batch = Batch(active, device, masked=masked)
    how = {"backend": "triton", "workspace_bytes": workspace(), "frozen": frozen}
    ours, again = (batch.gradients(name, 0.3, **how) for _ in range(2))
    theirs = batch.gradients(name, 0.3, frozen, backend="torch")
    for x, y, z in zip(ours, again, theirs, strict=True):
        assert torch.equal(x, y)
        torch.testing.assert_close(x, z, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "name, width, dtype",
    [
        *((name, N // 2, torch.bfloat16) for name in NAMES),
        *((name, H, torch.bfloat16) for name in ("entropy", "kto", "dpo")),
        *((name, width, torch.float16) for name in ("grpo", "dpo") for width in (N // 2, H)),
    ],
    ids=str,
)
def test_in_half_precision(name, width, dtype, device):
    batch = Batch(40, device, dtype, width, masked=5)
    how = {"backend": "triton", "workspace_bytes": workspace(dtype)}
    ours, again = (batch.gradients(name, 0.3, **how) for _ in range(2))
    theirs = batch.gradients(name, 0.3, backend="torch")
    for x, y, z in zip(ours, again, theirs, strict=True):
        assert torch.equal(x, y)
        scale = z.abs().max().item()
        torch.testing.assert_close(x, z, rtol=0.02, atol=0.01 * scale)


def test_a_second_backward_finds_the_same(device):
    batch = Batch(40, device, torch.bfloat16, N // 2)
    objective, extra = batch.objectives["dpo"]
    leaves = leaf(batch.hidden), leaf(batch.weight)
    loss, _ = objective.from_hidden(
        *leaves,
        batch.labels,
        batch.ref_logps,
        **extra,
        backend="triton",
        workspace_bytes=workspace(torch.bfloat16),
    )
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    second = torch.autograd.grad(2 * loss, leaves)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(2 * a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_small_coefficients_meet_the_incoming_gradient_in_float32(dtype, device):
    """Of 2⁻³⁰ in all: alone they would be 0 in float16, and a loss scale came too late."""
    batch = Batch(N, device, dtype, N // 2)
    objective = hl.SFT()
    results = []
    for items, upstream in ((1.0, 1.0), (2.0**30, 2.0**30)):
        leaves = leaf(batch.hidden), leaf(batch.weight)
        loss, _ = objective.from_hidden(
            *leaves,
            batch.labels,
            num_items_in_batch=items,
            backend="triton",
            workspace_bytes=workspace(dtype),
        )
        results.append(torch.autograd.grad(loss * upstream, leaves))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


LARGE = 151_936


@pytest.mark.parametrize(
    "rows, width, itemsize, trains, expected",
    [  # at 512 MiB: a block's rows, and those that wait
        (8_192, 4_096, 2, True, StackSizes(768, 8_192)),  # 2H
        (8_193, 4_096, 2, True, StackSizes(768, 4_096)),
        (8_192, 1_024, 2, True, StackSizes(256, 1_254)),  # the workspace holds more than H
        (2_048, 1_024, 2, True, StackSizes(768, 2_048)),
        (8_192, 4_096, 4, True, StackSizes(256, 627)),
        (8_192, 4_096, 2, False, StackSizes(256, 1_254)),
        (883, 4_096, 2, True, StackSizes(883, 883, over_logits=True)),
    ],
)
def test_how_many_rows_are_held(rows, width, itemsize, trains, expected):
    assert stack_sizes(rows, LARGE, width, itemsize, trains, WORKSPACE_BYTES) == expected


@pytest.mark.parametrize("width", [64, 1_024, 4_096, 8_192])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_the_stack_takes_no_more_than_the_sum_it_replaces(width, itemsize):
    """Beside the workspace; where there is a sum as well, no more than the gradient once it is
    rounded."""
    for rows in (100, 1_000, 2 * width, 2 * width + 1, 10**6):
        held = stack_sizes(rows, LARGE, width, itemsize, True, WORKSPACE_BYTES)
        logits, waiting = (LARGE * n for n in (held.block * 4, held.stack * itemsize))
        if held.over_logits or logits + waiting <= WORKSPACE_BYTES:
            continue
        assert itemsize == 2 and logits <= WORKSPACE_BYTES
        assert waiting <= LARGE * width * (4 if rows <= held.stack else 2)


@pytest.mark.parametrize("itemsize", [2, 4])
def test_what_is_shared_is_no_more_than_there_is(itemsize):
    for rows in (1, 2, 3, 10, 300, 5_000):
        size = rows * 16 * 4
        held = stack_sizes(10**9, 16, 1, itemsize, False, size)
        assert held.block > 0
        waiting = 0 if held.over_logits else held.stack * itemsize
        assert 16 * (4 * held.block + waiting) <= size


@pytest.mark.parametrize("width", [7, 4096 + 5])
def test_rows_move_to_the_front(width, device):
    x = torch.randn(9, width, device=device)
    active = torch.tensor([0, 1, 1, 0, 0, 1, 0, 1, 1], dtype=torch.bool, device=device)
    order = front_order(active)
    expected = x[order]
    moved = move_rows_(x, order)
    assert torch.equal(moved, expected) and moved.data_ptr() == x.data_ptr()
