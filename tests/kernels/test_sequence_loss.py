"""The one-launch loss of sequences against the objectives' own torch definitions."""

import math

import pytest
import torch
from float_errors import floor
from oracle import BY_NAME, case_ids

import humanline as hl
from humanline.kernels import sequence_loss as kernel

CASES = [
    *(case for name, case in BY_NAME.items() if name.startswith("dpo-")),
    *(case for name, case in BY_NAME.items() if name.startswith("kto")),
    BY_NAME["simpo"],
    BY_NAME["slic"],
]
WITHOUT = ("dpo-aot", "dpo-aot_unpaired", "dpo-sft", "dpo-mpo")  # need other pairs, or two losses
CLIPS = [hl.Identity(), hl.Clip(-0.4, 0.3), hl.Clip(0.1, 0.6)]
WITH_KERNEL = [case for case in CASES if case.name not in WITHOUT]


@pytest.fixture
def launches(count_calls):
    """Counts calls of the kernel."""
    return count_calls(kernel, "sequence_loss")


def draw(device, sequences=4, length=9, spread=0.4):
    logps = torch.randn(sequences, length, device=device) - 3
    ref = logps + spread * torch.randn(sequences, length, device=device)
    mask = torch.rand(sequences, length, device=device) > 0.3
    mask[-1] = False
    # Values outside the mask must not matter: they are absurd.
    return logps.masked_fill(~mask, 55), ref.masked_fill(~mask, torch.nan), mask


def extras(case, sequences, device):
    if case.cls is not hl.KTO:
        return {}
    desirable = torch.arange(sequences, device=device) % 3 != 1
    z0 = torch.tensor(0.13, dtype=torch.float64, device=device)
    return {"desirable": desirable} | ({"z0": z0} if case.name != "kto-apo" else {})


def run(objective, backend, logps, ref, mask, upstream=0.5, dtype=torch.float32, **batch):
    x = logps.to(dtype).requires_grad_()
    ref = ref.to(dtype) if objective.needs_reference else None
    loss, stats = objective.from_logps(x, ref, mask, backend=backend, **batch)
    (grad,) = torch.autograd.grad(loss * upstream, x)
    return loss.detach(), grad, stats


def assert_as_accurate(objective, rows, **batch):
    """Our error is at most 1.5 × the torch definition's, or half a unit in the last place; of the
    loss, a single number whose error in torch may be nil by luck, two units."""
    truth = run(objective, "torch", *rows, dtype=torch.float64, **batch)
    eager = run(objective, "torch", *rows, **batch)
    ours = run(objective, "triton", *rows, **batch)
    for x, e, t in zip(ours[:2], eager[:2], truth[:2], strict=True):
        assert x.dtype == torch.float32 and x.isfinite().all()
        error, allowed = ((y.double() - t).square().mean().sqrt().item() for y in (x, e))
        assert error <= max(1.5 * allowed, floor(t, x.dtype, 2 if x.dim() == 0 else 0.5))
    assert ours[2].keys() == eager[2].keys()
    for name, value in eager[2].items():
        torch.testing.assert_close(ours[2][name], value, equal_nan=True, msg=name)


@pytest.mark.parametrize(
    "case, perception",
    [
        pytest.param(case, perception, id=f"{case.name}-{perception}")
        for case in WITH_KERNEL
        for perception in (CLIPS if case.cls.needs_reference else CLIPS[:1])
    ],
)
def test_equals_the_torch_definition(case, perception, device, launches):
    # Enough pairs that the error of either side is not a matter of luck.
    rows = draw(device, sequences=60)
    assert_as_accurate(case.build(perception), rows, **extras(case, 60, device))
    assert len(launches) == 1


@pytest.mark.parametrize("case", case_ids([BY_NAME[name] for name in ("dpo-ipo", "kto", "simpo")]))
def test_packed_with_an_empty_sequence(case, device, launches):
    rows = [x.reshape(-1) for x in draw(device)]
    cu_seqlens = torch.tensor([0, 5, 5, 21, 36], dtype=torch.int32, device=device)
    extra = extras(case, 4, device)
    perception = CLIPS[1] if case.cls.needs_reference else CLIPS[0]
    assert_as_accurate(case.build(perception), rows, cu_seqlens=cu_seqlens, **extra)
    assert len(launches) == 1


@pytest.mark.parametrize("case", case_ids([BY_NAME["dpo-sigmoid"], BY_NAME["kto"]]))
@pytest.mark.parametrize("sequences, length", [(2, 1), (6, 3000)])
def test_one_row_and_long_sequences(case, sequences, length, device):
    rows = draw(device, sequences, length, spread=0.02)
    assert_as_accurate(case.build(hl.Clip(-0.03, 0.02)), rows, **extras(case, sequences, device))


@pytest.mark.parametrize("case", case_ids(WITH_KERNEL))
@pytest.mark.parametrize("shift", [-300.0, 300.0])
def test_far_in_the_tails(case, shift, device):
    """Saturated sigmoids: finite values, and the coefficients of the torch definition."""
    logps, ref, mask = draw(device)
    logps[:2] += shift
    extra = extras(case, 4, device)
    results = [
        run(case.build(hl.Identity()), b, logps, ref, mask, **extra) for b in ("torch", "triton")
    ]
    for ours, theirs in zip(results[1][:2], results[0][:2], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_everything_masked(device):
    logps, ref, mask = draw(device)
    loss, grad, stats = run(hl.DPO(), "triton", logps, ref, torch.zeros_like(mask))
    assert loss.item() == pytest.approx(math.log(2))
    assert (grad == 0).all() and stats["humanline/active_rows"] == 0


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize(
    "case, sequences", [(BY_NAME["dpo-sigmoid"], 4), (BY_NAME["kto"], 4), (BY_NAME["kto"], 0)]
)
def test_no_rows_at_all(case, sequences, packed, device, launches):
    sequences = max(sequences, packed)  # cu_seqlens has at least two entries
    rows = [torch.empty(0 if packed else (sequences, 0), device=device)] * 3
    batch = extras(case, sequences, device)
    if packed:
        batch["cu_seqlens"] = torch.zeros(sequences + 1, dtype=torch.int32, device=device)
    expected, result = (run(case.build(CLIPS[1]), b, *rows, **batch) for b in ("torch", "triton"))
    torch.testing.assert_close(result, expected, equal_nan=True)
    assert len(launches) == 1


@pytest.mark.parametrize("case", case_ids([BY_NAME["dpo-sigmoid"], BY_NAME["kto"]]))
def test_under_autocast(case, device, launches):
    rows, extra = draw(device), extras(case, 4, device)
    expected = run(case.build(CLIPS[1]), "triton", *rows, **extra)
    with torch.autocast(device, torch.bfloat16):
        result = run(case.build(CLIPS[1]), "triton", *rows, **extra)
    assert len(launches) == 2
    for a, b in zip(result[:2], expected[:2], strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b)


def test_bitwise_the_same_on_a_rerun(device):
    rows = draw(device, 6, 2100)
    for a, b in zip(*(run(hl.DPO(), "triton", *rows)[:2] for _ in range(2)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("case", case_ids([BY_NAME[name] for name in WITHOUT]))
def test_losses_without_a_device_function_take_the_seam(case, device, launches):
    rows = draw(device)
    results = [run(case.build(CLIPS[1]), backend, *rows) for backend in ("torch", "triton")]
    assert not launches
    assert torch.equal(results[0][1], results[1][1])


def test_a_subclass_and_a_perception_of_the_whole_batch_take_the_seam(device, launches):
    class Half(hl.DPO):
        def loss(self, rows):
            return 0.5 * super().loss(rows)

    rows = draw(device)
    whole, half = (run(o, "triton", *rows) for o in (hl.DPO(), Half()))
    torch.testing.assert_close(half[1], 0.5 * whole[1])
    run(hl.DPO(perception=hl.ProspectWeight()), "triton", *rows)
    assert len(launches) == 1


def test_from_logits_takes_three_launches(device, launches):
    logits = torch.randn(4, 5, 70, device=device).requires_grad_()
    labels = torch.randint(0, 70, (4, 5), device=device)
    ref = hl.token_logps(logits.detach(), labels) + 0.1
    results = []
    for backend in ("torch", "triton"):
        loss, _ = hl.DPO(perception=CLIPS[1]).from_logits(logits, labels, ref, backend=backend)
        results.append((loss.detach(), *torch.autograd.grad(loss, logits)))
    assert len(launches) == 1
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-8)
