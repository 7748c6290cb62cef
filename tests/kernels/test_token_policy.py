"""Token-level losses on log-probs that are known: the kernel against the torch definition."""

import pytest
import torch
from float_errors import floor

import humanline as hl
from humanline.kernels import token_policy as kernel

S, T = 40, 9
OBJECTIVES = [
    *(hl.GRPO(loss_type=name) for name in ("grpo", "bnpo", "dapo", "sapo")),
    hl.GRPO(loss_type="cispo", epsilon_high=1.2, beta=0.1),
    hl.GRPO(perception=hl.Clip(-0.4, 0.3), beta=0.2),
    hl.GRPO(beta=0.2, use_bias_correction_kl=False, delta=1.3),
    hl.PPO(perception=hl.Clip(-0.4, 0.3)),
    hl.SFT(),
]


@pytest.fixture
def launches(count_calls):
    return count_calls(kernel, "token_policy")


def draw(device):
    """Log-probs, those of the reference, mask, advantages; what is on masked rows is absurd."""
    logps = torch.randn(S, T, device=device) - 3
    ref = logps + 0.3 * torch.randn(S, T, device=device)
    mask = torch.rand(S, T, device=device) > 0.3
    mask[-1] = False
    advantages = torch.randn(S, T, device=device).masked_fill(~mask, torch.nan)
    return logps.masked_fill(~mask, 55), ref.masked_fill(~mask, torch.nan), mask, advantages


def run(objective, backend, rows, dtype=torch.float32):
    logps, ref, mask, advantages = rows
    leaf = logps.to(dtype).requires_grad_()
    batch = {} if isinstance(objective, hl.SFT) else {"advantages": advantages.to(dtype)}
    ref = ref.to(dtype) if batch else None
    loss, stats = objective.from_logps(leaf, ref, mask, backend=backend, **batch)
    return (loss.detach(), *torch.autograd.grad(0.5 * loss, leaf)), stats


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_equals_the_torch_definition(objective, device, launches):
    """Our error is at most 1.5 × that of torch in float32, or half a unit in the last place; of the
    loss, a mean of numbers about 1 in size and of either sign, a unit of these."""
    rows = draw(device)
    truth, _ = run(objective, "torch", rows, torch.float64)
    eager, expected = run(objective, "torch", rows)
    assert not launches
    ours, stats = run(objective, "triton", rows)
    assert len(launches) == 1
    for x, e, t in zip(ours, eager, truth, strict=True):
        assert x.dtype == torch.float32 and x.isfinite().all()
        least = torch.finfo(x.dtype).eps if x.dim() == 0 else floor(t, x.dtype)
        error, allowed = ((y.double() - t).square().mean().sqrt().item() for y in (x, e))
        assert error <= max(1.5 * allowed, least)
    assert (ours[1][~rows[2]] == 0).all()
    assert stats.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(stats[name], value, msg=name)


def test_a_log_prob_that_is_nan_shows(device, launches):
    logps, ref, mask, advantages = draw(device)
    logps[0, mask[0].nonzero()[0]] = torch.nan
    (loss, grad), _ = run(hl.GRPO(), "triton", (logps, ref, mask, advantages))
    assert loss.isnan() and grad.isnan().sum() == 1 and len(launches) == 1


@pytest.mark.parametrize("rows", [0, 1, 257])
def test_any_number_of_rows(rows, device, launches):
    logps = torch.randn(rows, device=device)
    mask = torch.ones(rows, dtype=torch.bool, device=device)
    weight = torch.full((rows,), 0.5, device=device)
    loss, g = kernel.token_policy(logps, mask, kind="nll", weight=weight)
    assert torch.equal(loss, -0.5 * logps) and torch.equal(g, -weight)


def test_an_entropy_term_is_left_to_torch(device, launches):
    logps, ref, mask, advantages = draw(device)
    objective = hl.GRPO(entropy_coef=0.1)
    entropy = torch.rand_like(logps)
    found = [
        objective.from_logps(
            logps, ref, mask, advantages=advantages, entropy=entropy, backend=backend
        )[0]
        for backend in ("torch", "triton")
    ]
    assert torch.equal(*found) and not launches
