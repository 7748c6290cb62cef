"""Policy losses with a ratio a sequence: the kernel against the objective's torch definition."""

from itertools import product

import pytest
import torch
from float_errors import floor

import humanline as hl
from humanline.kernels import sequence_policy as kernel

S, T = 6, 9
CLIPS = [hl.Identity(), hl.Clip(-0.4, 0.3), hl.Clip(0.05, 0.6)]
LOSSES = ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo"]
TERMS = [{}, {"beta": 0.2, "entropy_coef": 0.03}, {"beta": 0.2, "use_bias_correction_kl": False}]


def gspo(loss_type="grpo", perception=CLIPS[0], **options):
    options = {"epsilon": 0.02, "epsilon_high": 0.05, "max_completion_length": 7} | options
    if loss_type == "cispo":
        options["epsilon_high"] = 1.02
    return hl.GRPO(
        loss_type=loss_type,
        perception=perception,
        importance_sampling_level="sequence",
        **options,
    )


@pytest.fixture
def launches(count_calls):
    """Counts calls of the kernel."""
    return count_calls(kernel, "sequence_policy")


def draw(device, sequences=S, length=T, spread=0.3):
    """Log-probs, those of the reference, mask and the rest of a batch; the last sequence is empty,
    and what is on masked rows is absurd."""
    shape = sequences, length
    logps = torch.randn(shape, device=device) - 3
    ref = logps + spread * torch.randn(shape, device=device)
    mask = torch.rand(shape, device=device) > 0.3
    mask[-1] = False
    advantages = torch.randn(sequences, device=device)
    batch = {"advantages": advantages, "entropy": torch.rand(shape, device=device)}
    batch["entropy"][~mask] = 1e9
    return (logps.masked_fill(~mask, 55), ref.masked_fill(~mask, torch.nan), mask), batch


def run(objective, backend, rows, batch, dtype=torch.float32, upstream=0.5):
    logps, ref, mask = rows
    leaves = [x.detach().to(dtype).requires_grad_() for x in (logps, batch["entropy"])]
    batch = {
        k: x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for k, x in batch.items()
    }
    loss, stats = objective.from_logps(
        leaves[0], ref.to(dtype), mask, backend=backend, **batch | {"entropy": leaves[1]}
    )
    grads = torch.autograd.grad(loss * upstream, leaves, materialize_grads=True)
    return (loss.detach(), *grads), stats


def assert_as_accurate(objective, rows, batch):
    """Our error is at most 1.5 × the torch definition's, or half a unit in the last place; of the
    loss, a single number whose error in torch may be nil by luck, two units."""
    truth, _ = run(objective, "torch", rows, batch, torch.float64)
    eager, expected = run(objective, "torch", rows, batch)
    ours, stats = run(objective, "triton", rows, batch)
    for x, e, t in zip(ours, eager, truth, strict=True):
        assert x.dtype == torch.float32 and x.isfinite().all()
        error, allowed = ((y.double() - t).square().mean().sqrt().item() for y in (x, e))
        assert error <= max(1.5 * allowed, floor(t, x.dtype, 2 if x.dim() == 0 else 0.5))
    assert stats.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(stats[name], value, msg=name)


@pytest.mark.parametrize("terms", TERMS, ids=str)
@pytest.mark.parametrize("loss_type, perception", product(LOSSES, CLIPS), ids=str)
def test_equals_the_torch_definition(loss_type, perception, terms, device, launches):
    # Enough sequences that the error of either side is not a matter of luck.
    assert_as_accurate(gspo(loss_type, perception, **terms), *draw(device, sequences=40))
    assert len(launches) == 1


@pytest.mark.parametrize("loss_type", LOSSES)
def test_packed_rows_with_empty_sequences(loss_type, device, launches):
    """Advantages a row, as a baseline of its own gives them; a ratio taken to another policy."""
    rows, batch = draw(device, sequences=30)
    batch["advantages"] = torch.randn(30, T, device=device)
    batch["old_logps"] = rows[1] + 0.1
    batch["num_items_in_batch"] = torch.tensor(31)
    rows, batch = (
        [x.reshape(-1) for x in rows],
        {k: x.reshape(-1) if x.dim() else x for k, x in batch.items()},
    )
    cuts = torch.randint(0, 30 * T, (25,), device=device).sort().values
    ends = torch.tensor([0, 5, 5, *cuts.clamp(min=5), 30 * T], dtype=torch.int32, device=device)
    batch["cu_seqlens"] = ends
    assert_as_accurate(gspo(loss_type, CLIPS[1], **TERMS[1]), rows, batch)
    assert len(launches) == 1


@pytest.mark.parametrize("delta", [0.9, 1.01, 1.2])
@pytest.mark.parametrize("loss_type", ["grpo", "cispo"])
def test_a_bound_of_the_ratio(loss_type, delta, device):
    assert_as_accurate(gspo(loss_type, delta=delta), *draw(device))


@pytest.mark.parametrize("sequences, length", [(1, 1), (3, 3000)])
def test_one_row_and_long_sequences(sequences, length, device):
    rows, batch = draw(device, sequences + 1, length)
    assert_as_accurate(gspo(perception=CLIPS[1], **TERMS[1]), rows, batch)


@pytest.mark.parametrize("bound", ["epsilon", "perception", "delta", "none"])
def test_ties(bound, device):
    """Every log-ratio the same: a ratio on a bound, where each side has half of the gradient."""
    (logps, _, mask), batch = draw(device)
    logps = logps.round()
    options, d = {"epsilon_high": 0.0, "epsilon": 0.0}, 0.0
    if bound == "perception":
        options, d = {"perception": hl.Clip(-0.5, 0.5)}, 0.5
    elif bound == "delta":
        options = {"delta": 1.0}
    elif bound == "none":
        options = {}
    rows = logps, logps - d, mask
    (_, expected, _), _ = run(gspo(**options), "torch", rows, batch)
    (_, grad, _), _ = run(gspo(**options), "triton", rows, batch)
    torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-8)
    assert (grad != 0).any()


@pytest.mark.parametrize("terms", [{}, {"beta": 0.2}, TERMS[2]], ids=str)
@pytest.mark.parametrize("loss_type", ["grpo", "cispo", "sapo"])
@pytest.mark.parametrize("perception", CLIPS[:2], ids=str)
@pytest.mark.parametrize("shift", [-torch.inf, -300.0, 90.0, 300.0])
def test_absurd_log_probs(shift, loss_type, perception, terms, device):
    """A log-prob of minus infinity, and ratios beyond what an exponential holds."""
    rows, batch = draw(device)
    if shift > 0:
        terms = terms | {"beta": 1e-36} if terms else terms
        rows[1][:] -= shift
    rows[0][0, :2] += min(shift, 0)
    rows[2][0] = True
    rows[1][0] = -3
    objective = gspo(loss_type, perception, **terms)
    expected, expected_stats = run(objective, "torch", rows, batch)
    result, stats = run(objective, "triton", rows, batch)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-7)
    assert result[1].isfinite().all()
    for of in (stats, expected_stats):  # Identity keeps minus infinity, which no bound is below
        of.pop("humanline/unclamped")
    torch.testing.assert_close(stats, expected_stats, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("loss_type", ["grpo", "cispo", "sapo"])
@pytest.mark.parametrize("perception", CLIPS[:2], ids=str)
def test_nan_shows_and_stays_in_its_sequence(loss_type, perception, device):
    rows, batch = draw(device)
    rows[2][1] = True
    rows[1][1] = -3
    rows[0][1, 4] = torch.nan
    (loss, grad, _), _ = run(gspo(loss_type, perception), "triton", rows, batch)
    assert loss.isnan() and grad[1].isnan().any()
    assert grad[torch.arange(S) != 1].isfinite().all()


@pytest.mark.parametrize("old_logps", ["policy", None])
def test_on_policy(old_logps, device):
    (logps, ref, mask), batch = draw(device)
    results = []
    for backend in ("torch", "triton"):
        x = logps.detach().requires_grad_()
        loss, stats = gspo(**TERMS[1]).from_logps(
            *(x, ref, mask), old_logps=old_logps, backend=backend, **batch
        )
        results.append((loss.detach(), *torch.autograd.grad(loss, x), stats))
    torch.testing.assert_close(results[1], results[0])


def test_everything_masked(device):
    (logps, ref, mask), batch = draw(device)
    rows = logps, ref, torch.zeros_like(mask)
    results = [run(gspo(**TERMS[1]), backend, rows, batch) for backend in ("torch", "triton")]
    torch.testing.assert_close(results[1], results[0])
    (loss, *grads), stats = results[1]
    assert loss == 0 and stats["humanline/active_rows"] == 0
    assert all((grad == 0).all() for grad in grads)


@pytest.mark.parametrize("sequences, packed", [(3, False), (0, False), (2, True)])
def test_no_rows_at_all(sequences, packed, device, launches):
    empty = torch.empty(0 if packed else (sequences, 0), device=device)
    batch = {"advantages": torch.ones(sequences, device=device), "entropy": empty}
    if packed:
        batch["cu_seqlens"] = torch.zeros(sequences + 1, dtype=torch.int32, device=device)
    rows = empty, empty, empty.bool()
    results = [run(gspo(**TERMS[1]), backend, rows, batch) for backend in ("torch", "triton")]
    torch.testing.assert_close(results[1], results[0])
    assert len(launches) == 1


@pytest.mark.parametrize("terms", TERMS, ids=str)
@pytest.mark.parametrize("entry", ["logits", "hidden"])
def test_from_logits_and_hidden(entry, terms, device, launches):
    x = (torch.randn(4, 5, 30, device=device) / 3).requires_grad_()
    labels = torch.randint(0, 30, (4, 5), device=device)
    labels[0, 3:] = labels[2] = -100
    weight = torch.randn(30, 30, device=device).requires_grad_()
    leaves = [x, weight] if entry == "hidden" else [x]
    ref = -2 - torch.rand(4, 5, device=device)
    advantages = torch.tensor([1.0, -0.7, 2.0, 0.4], device=device)
    results = []
    for backend in ("torch", "triton"):
        loss, stats = getattr(gspo(perception=hl.Clip(-1.0, 1.0), **terms), f"from_{entry}")(
            *leaves, labels, ref, advantages=advantages, backend=backend
        )
        results.append((loss.detach(), torch.autograd.grad(loss * 0.5, leaves), stats))
    assert launches
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-6)


def test_bitwise_the_same_on_a_rerun(device):
    rows, batch = draw(device, 4, 2100)
    first, second = (run(gspo(**TERMS[1]), "triton", rows, batch)[0] for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_what_has_no_device_function_takes_the_seam(device, launches):
    class Half(hl.GRPO):
        def token_loss(self, rows, **batch):
            return 0.5 * super().token_loss(rows, **batch)

    rows, batch = draw(device)
    whole, half = (
        run(cls(importance_sampling_level="sequence"), "triton", rows, batch)[0]
        for cls in (hl.GRPO, Half)
    )
    torch.testing.assert_close(half[1], 0.5 * whole[1])
    for other in (gspo("vespo"), gspo(perception=hl.ProspectWeight())):
        run(other, "triton", rows, batch)
    assert len(launches) == 1
