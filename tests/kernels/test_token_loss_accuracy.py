"""The one-launch kernel's gradient against float64, its error held against eager float32's, on the
inputs that break such kernels."""

import pytest
import torch
from float_errors import floor
from oracle import eager_from_logits

import humanline as hl
from humanline.kernels import token_loss as kernel

OBJECTIVE = hl.GRPO(perception=hl.Clip(-1.5, 1.5), beta=0.05)


def eager(logits, labels, ref_logps, advantages, dtype):
    """Loss and gradient as a trainer would write them."""
    x = logits.detach().to(dtype).requires_grad_()
    mask = labels >= 0
    picked = x.log_softmax(-1).gather(-1, labels.clamp(min=0).long()[..., None]).squeeze(-1)
    logps = torch.where(mask, picked, 0)
    loss, _ = OBJECTIVE.from_logps(
        logps, ref_logps.to(dtype), mask, advantages=advantages.to(dtype)
    )
    return loss.detach(), torch.autograd.grad(loss, x)[0]


def ours(logits, labels, ref_logps, advantages):
    x = logits.detach().requires_grad_()
    ref_logps, advantages = ref_logps.to(x.device), advantages.to(x.device)
    loss, _ = OBJECTIVE.from_logits(x, labels, ref_logps, backend="triton", advantages=advantages)
    return loss.detach(), torch.autograd.grad(loss, x)[0]


def rms(x, truth):
    return (x.double() - truth).square().mean().sqrt().item()


def assert_as_accurate(logits, labels):
    """Our error is at most 1.5 × eager's, or half a unit in the last place of the result."""
    advantages = torch.tensor([1.0, -0.5], device=logits.device)
    with torch.no_grad():
        ref_logps = hl.token_logps(logits.double(), labels, backend="torch") + 0.1
    truth_loss, truth = eager(logits, labels, ref_logps, advantages, torch.float64)
    eager_loss, eager_grad = eager(logits, labels, ref_logps, advantages, torch.float32)
    loss, grad = ours(logits, labels, ref_logps, advantages)
    assert loss.isfinite() and grad.isfinite().all()
    least = floor(truth, grad.dtype)
    assert rms(grad, truth) <= max(1.5 * rms(eager_grad.to(grad.dtype), truth), least)
    scale = max(1.0, logits.float().abs().max().item() * 1e-3)  # float32 holds no more of a logit
    assert (loss - truth_loss).abs() <= max(1.5 * (eager_loss - truth_loss).abs(), 1e-6 * scale)


def draw(rows, vocab, dtype, device):
    logits = (torch.randn(2, rows, vocab, device=device) * 3).to(dtype)
    return logits, torch.randint(0, vocab, (2, rows), device=device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("vocab, rows", [(1, 8), (7, 8), (50257, 2)])
def test_vocabularies(vocab, rows, dtype, device):
    logits, labels = draw(rows, vocab, dtype, device)
    labels[0, 0] = -100
    assert_as_accurate(logits, labels)


@pytest.mark.parametrize("vocab", [129920, 151936])
def test_long_rows(vocab, device):
    assert_as_accurate(*draw(1, vocab, torch.bfloat16, device))


def test_label_almost_certain(device):
    logits, labels = draw(4, 1000, torch.float32, device)
    logits.scatter_add_(2, labels[..., None], torch.full((2, 4, 1), 30.0, device=device))
    assert_as_accurate(logits, labels)


def test_logits_all_very_negative(device):
    logits, labels = draw(3, 777, torch.float32, device)
    assert_as_accurate(logits - 1e4, labels)


def test_one_huge_logit(device):
    logits, labels = draw(3, 777, torch.float32, device)
    logits.scatter_(2, labels[..., None], 1e4)
    assert_as_accurate(logits, labels)


def test_minus_infinity_beside_the_label(device):
    logits, _ = draw(3, 777, torch.bfloat16, device)
    logits[..., ::3] = -torch.inf
    assert_as_accurate(logits, torch.full((2, 3), 100, device=device))


def test_int32_labels_and_shifted_view(device):
    logits, labels = draw(4, 301, torch.float32, device)
    assert_as_accurate(logits[:, :-1], labels[:, :-1].int())


CLIP = hl.Clip(-0.3, 0.4)
OBJECTIVES = [
    hl.GRPO(perception=CLIP, delta=1.3, epsilon_high=0.3),
    hl.GRPO(perception=CLIP, loss_type="cispo", epsilon_high=1.2, entropy_coef=0.03),
    hl.GRPO(perception=CLIP, loss_type="sapo", beta=0.1),
    hl.PPO(perception=CLIP, beta=0.1, kl_estimator="k1", entropy_coef=0.02),
    hl.PPO(perception=CLIP, beta=0.1, kl_estimator="k3"),
    hl.SFT(),
]
NAMES = ["clipped", "cispo, entropy", "sapo, k3", "ppo, k1, entropy", "ppo, k3", "sft"]
OF_PACKED = {"cu_seqlens": torch.tensor([0, 0, 9, 9, 20, 32], dtype=torch.int32)}


def packed_problem(objective, device, dtype, rows=32, vocab=501):
    """Two sequences of five are empty; every row has its own temperature."""
    logits, labels = (x.reshape(-1, *x.shape[2:]) for x in draw(rows // 2, vocab, dtype, device))
    labels[3:6] = -100
    temperature = torch.rand(rows, device=device) + 0.5
    ref_logps = eager_from_logits(logits.double(), labels, temperature.double())[0]
    ref_logps += 0.3 * torch.randn(rows, device=device)
    batch = {k: v.to(device) for k, v in OF_PACKED.items()}
    if not isinstance(objective, hl.SFT):
        batch["advantages"] = torch.tensor([9.0, 1.0, 9.0, -0.7, 0.4], device=device)
    return logits, labels, temperature, ref_logps, batch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("objective", OBJECTIVES, ids=NAMES)
def test_objectives_on_packed_rows(objective, dtype, device):
    """The incoming gradient is no power of two: half-precision gradients, formed before it is
    known, are rounded once more when they are scaled by it. So eager's are here."""
    logits, labels, temperature, ref_logps, batch = packed_problem(objective, device, dtype)
    results = []
    for exact in (torch.float64, torch.float32, None):
        x = logits.to(exact or dtype).detach().requires_grad_()
        if exact is None:
            loss, _ = objective.from_logits(
                x, labels, ref_logps, temperature=temperature, backend="triton", **batch
            )
        else:
            logps, entropy = eager_from_logits(x, labels, temperature.to(exact))
            entropy = {"entropy": entropy} if objective.needs_entropy else {}
            loss, _ = objective.from_logps(
                logps, ref_logps.to(exact), labels >= 0, backend="torch", **entropy, **batch
            )
        upstream = 1.0 if exact == torch.float32 else 0.3
        results.append((loss.detach(), *torch.autograd.grad(loss * upstream, x)))
    (truth_loss, truth), (eager_loss, eager_grad), (loss, grad) = results
    assert rms(grad, truth) <= 1.5 * rms(eager_grad.to(dtype) * 0.3, truth)
    assert (loss - truth_loss).abs() <= max(1.5 * (eager_loss - truth_loss).abs(), 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_gradient_of_the_entropy_alone(dtype, device):
    """Without advantages nothing else is left; masked rows are zeros."""
    objective = hl.PPO(entropy_coef=0.5)
    logits, labels, temperature, ref_logps, batch = packed_problem(objective, device, dtype)
    batch["advantages"] = torch.zeros(5, device=device)
    grads = []
    for exact in (torch.float64, torch.float32):
        x = logits.to(exact).detach().requires_grad_()
        entropy = eager_from_logits(x, labels, temperature.to(exact))[1][labels >= 0]
        grads.append(torch.autograd.grad(-0.5 * entropy.mean(), x)[0])
    x = logits.detach().requires_grad_()
    loss, _ = objective.from_logits(
        x, labels, ref_logps, temperature=temperature, backend="triton", **batch
    )
    (grad,) = torch.autograd.grad(loss, x)
    assert rms(grad, grads[0]) <= 1.5 * rms(grads[1].to(dtype), grads[0])
    assert (grad[labels < 0] == 0).all() and (grad[labels >= 0] != 0).any(-1).all()


def test_everything_masked_and_nothing_there(device):
    for rows in (3, 0):
        logits, labels = draw(rows, 50, torch.float32, device)
        loss, grad = ours(
            logits, torch.full_like(labels, -100), torch.zeros(2, rows), torch.ones(2)
        )
        assert loss == 0 and (grad == 0).all()


def test_bitwise_the_same_on_a_rerun(device):
    logits, labels = draw(3, 5000, torch.bfloat16, device)
    arguments = logits, labels, torch.full((2, 3), -9.0), torch.tensor([1.0, -1.0])
    for a, b in zip(ours(*arguments), ours(*arguments), strict=True):
        assert torch.equal(a, b)


def test_under_autocast(device):
    logits, labels = draw(3, 301, torch.float32, device)
    arguments = logits, labels, torch.full((2, 3), -6.0), torch.tensor([1.0, -1.0])
    expected = ours(*arguments)
    with torch.autocast(device, torch.bfloat16):
        result = ours(*arguments)
    for a, b in zip(result, expected, strict=True):
        assert torch.equal(a, b)


def test_offsets_beyond_31_bits(device):
    """Of the logits and of the gradient, which overwrites them here."""
    vocab, rows_apart = 1000, 2**31 // 1000 + 8
    memory = torch.empty((rows_apart + 1) * vocab, dtype=torch.bfloat16, device=device)
    far = memory.as_strided((2, 1, vocab), (rows_apart * vocab, vocab, 1))
    near, labels = draw(1, vocab, torch.bfloat16, device)
    far.copy_(near)
    row = torch.ones(2, device=device)
    outputs = []
    for logits in (far, near.clone()):
        temperature = torch.tensor(1.0, device=device)
        options = {"kind": "nll", "weight": row}
        outputs.append((*kernel.token_loss(logits, labels, temperature, logits, **options), logits))
    for a, b in zip(*outputs, strict=True):
        assert a is b is None or torch.equal(a, b)
    assert (outputs[0][-1] != near).any()


def test_more_rows_than_a_grid_axis_allows(device):
    if device == "cpu":
        pytest.skip("Triton's interpreter knows no such limit, and takes minutes for so many rows")
    n = 65_540  # 65,535 is the limit of a grid's y and z
    logits, labels = draw(n // 2, 3, torch.float32, device)
    labels.view(-1)[:-2] = -100
    more = torch.full(labels.shape, -1.0, device=device), torch.ones(2, device=device)
    loss, grad = ours(logits, labels, *more)
    expected, _ = OBJECTIVE.from_logits(
        logits, labels, more[0], advantages=more[1], backend="torch"
    )
    torch.testing.assert_close(loss, expected)
    assert (grad.view(n, 3)[:-2] == 0).all() and (grad.view(n, 3)[-2:] != 0).all()
