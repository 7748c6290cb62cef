"""The log-prob kernels against float64, their error held against that of eager float32 softmax."""

import os
import subprocess
import sys

import pytest
import torch
from float_errors import floor

import humanline as hl

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def reference(logits, labels, temperature, g, g_entropy, dtype):
    """Log-probs, entropies and the gradient of ``Σ g·logp + g_entropy·H`` by eager softmax."""
    x = logits.detach().to(dtype).requires_grad_()
    t = temperature.to(dtype)
    z = x / (t[..., None] if t.dim() else t)
    log_p = z.log_softmax(-1)
    mask = labels >= 0
    picked = log_p.gather(-1, labels.clamp(min=0).long()[..., None]).squeeze(-1)
    finite = log_p.masked_fill(log_p == -torch.inf, 0)
    entropy = -(log_p.exp() * finite).sum(-1)
    logps, entropy = torch.where(mask, picked, 0), torch.where(mask, entropy, 0)
    loss = (g.to(dtype) * logps).sum()
    if g_entropy is not None:
        loss = loss + (g_entropy.to(dtype) * entropy).sum()
    (grad,) = torch.autograd.grad(loss, x)
    return logps.detach(), entropy.detach(), grad


def ours(logits, labels, temperature, g, g_entropy):
    x = logits.detach().requires_grad_()
    g = g.to(x.device)
    g_entropy = None if g_entropy is None else g_entropy.to(x.device)
    result = hl.token_logps(
        x, labels, temperature, return_entropy=g_entropy is not None, backend="triton"
    )
    logps, entropy = result if g_entropy is not None else (result, None)
    loss = (g * logps).sum()
    if entropy is not None:
        loss = loss + (g_entropy * entropy).sum()
    (grad,) = torch.autograd.grad(loss, x)
    return logps.detach(), entropy if entropy is None else entropy.detach(), grad


def rms(x, truth):
    return (x.double() - truth.double()).square().mean().sqrt().item()


def assert_as_accurate(logits, labels, temperature=1.0, with_entropy=False, g=None):
    """Our error is at most 1.5 × eager's, or half a unit in the last place of the result."""
    temperature = torch.as_tensor(temperature, dtype=torch.float32, device=logits.device)
    g = torch.randn(labels.shape, device=logits.device) if g is None else g
    g_entropy = torch.randn(labels.shape, device=logits.device) if with_entropy else None
    arguments = (labels, temperature, g, g_entropy)
    truth = reference(logits, *arguments, torch.float64)
    eager = reference(logits, *arguments, torch.float32)
    eager = (*eager[:2], eager[2].to(logits.dtype))
    result = ours(logits, *arguments)
    assert result[2].dtype == logits.dtype
    for name, x, e, t in zip(("logps", "entropy", "gradient"), result, eager, truth, strict=True):
        if x is None:
            continue
        assert x.isfinite().all(), name
        assert rms(x, t) <= max(1.5 * rms(e, t), floor(t, x.dtype)), name


def draw(n, vocab, dtype, device, scale=3.0):
    logits = (torch.randn(n, vocab, device=device) * scale).to(dtype)
    labels = torch.randint(0, vocab, (n,), device=device)
    return logits, labels


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [1, 7, 1000, 50257])
@pytest.mark.parametrize("with_entropy", [False, True])
def test_accuracy(vocab, dtype, with_entropy, device):
    logits, labels = draw(6 if vocab > 1000 else 60, vocab, dtype, device)
    labels[2] = -100
    assert_as_accurate(logits, labels, 1.3, with_entropy)


@pytest.mark.parametrize("vocab", [129920, 151936])
def test_accuracy_on_long_rows(vocab, device):
    assert_as_accurate(*draw(3, vocab, torch.bfloat16, device), with_entropy=True)


def test_label_almost_certain(device):
    logits, labels = draw(4, 1000, torch.float32, device)
    rest = torch.where(torch.arange(1000, device=device) == labels[:, None], -torch.inf, logits)
    wanted = torch.tensor([0.9, 0.99, 0.9999, 0.999999], device=device).log()
    logits = rest.log_softmax(-1) + torch.log1p(-wanted.exp())[:, None]
    logits.scatter_(1, labels[:, None], wanted[:, None])
    assert_as_accurate(logits, labels, g=torch.ones(4, device=device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_all_very_negative(dtype, device):
    logits, labels = draw(4, 777, torch.float32, device)
    assert_as_accurate((logits - 1e4).to(dtype), labels, 0.7, with_entropy=True)


@pytest.mark.parametrize("at_label", [True, False])
def test_one_huge_logit(at_label, device):
    logits, labels = draw(4, 777, torch.float32, device)
    where = labels if at_label else (labels + 5) % 777
    logits.scatter_(1, where[:, None], 1e4)
    assert_as_accurate(logits, labels, with_entropy=True)


def test_minus_infinity_beside_the_label(device):
    logits, labels = draw(4, 777, torch.bfloat16, device)
    logits[:, 500:] = -torch.inf
    logits[:, ::3] = -torch.inf
    labels = torch.full_like(labels, 100)
    assert_as_accurate(logits, labels, with_entropy=True)


def test_label_at_minus_infinity(device):
    logits, labels = draw(2, 50, torch.float32, device)
    logits.scatter_(1, labels[:, None], -torch.inf)
    logps, _, grad = ours(logits, labels, torch.tensor(1.0), torch.ones(2, device=device), None)
    assert (logps == -torch.inf).all()
    assert grad.isfinite().all()


def test_temperature_per_row(device):
    logits, labels = draw(5, 333, torch.float32, device)
    temperature = torch.tensor([0.3, 0.7, 1.0, 1.5, 4.0], device=device)
    assert_as_accurate(logits, labels, temperature, with_entropy=True)


def test_shifted_view_is_read_in_place(device):
    full = torch.randn(3, 5, 64, device=device, dtype=torch.bfloat16)
    view = full[:, :-1]
    labels = torch.randint(0, 64, (3, 4), device=device)
    from humanline.kernels.launch import RowTensor

    assert RowTensor.of(view).data.data_ptr() == full.data_ptr()
    assert_as_accurate(view, labels)


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x.transpose(0, 1),
        lambda x: x[..., ::2],
        lambda x: x[:1].expand(4, 3, 64),
        lambda x: x[::2],
    ],
    ids=["transposed", "every other logit", "expanded", "every other sequence"],
)
def test_other_strides(make, device):
    view = make(torch.randn(4, 3, 64, device=device))
    labels = torch.randint(0, view.shape[-1], view.shape[:-1], device=device)
    assert_as_accurate(view, labels)


def test_int32_labels(device):
    logits, labels = draw(4, 100, torch.float32, device)
    assert_as_accurate(logits, labels.int())


def test_zero_coefficients_give_zero_rows(device):
    logits, labels = draw(4, 100, torch.float32, device)
    logits[1] = torch.nan  # not read: a NaN would spread
    g = torch.tensor([1.0, 0.0, -2.0, 0.0], device=device)
    _, _, grad = ours(logits, labels, torch.tensor(1.0), g, None)
    assert (grad[[1, 3]] == 0).all()
    assert grad[[0, 2]].abs().amax(1).gt(0).all()


def test_all_rows_masked_and_no_rows_at_all(device):
    for n in (3, 0):
        logits = torch.full((n, 10), torch.nan, device=device)
        labels = torch.full((n,), -100, device=device)
        logps, entropy, grad = ours(
            logits, labels, torch.tensor(1.0), torch.ones(n, device=device), torch.ones(n)
        )
        assert (logps == 0).all() and (entropy == 0).all() and (grad == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_under_autocast(dtype, device):
    logits, labels = draw(4, 301, dtype, device)
    g = torch.randn(4, device=device)
    expected = ours(logits, labels, torch.tensor(0.7, device=device), g, g)
    with torch.autocast(device, torch.bfloat16):
        result = ours(logits, labels, torch.tensor(0.7, device=device), g, g)
    for a, b in zip(result, expected, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


def test_bitwise_the_same_on_a_rerun(device):
    logits, labels = draw(4, 5000, torch.bfloat16, device)
    g = torch.randn(4, device=device)
    first, second = (ours(logits, labels, torch.tensor(1.0), g, g) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_more_rows_than_a_grid_axis_allows(device):
    n = 65_540  # 65,535 is the limit of a grid's y and z
    logits, labels = draw(n, 3, torch.float32, device)
    labels[:-2] = -100
    logps = hl.token_logps(logits, labels, backend="triton")
    expected = hl.token_logps(logits, labels, backend="torch")
    torch.testing.assert_close(logps, expected)


def test_offsets_beyond_31_bits(device):
    vocab, far = 1000, 2**31 + 7 * 1000
    rows_apart = far // vocab + 1
    memory = torch.empty(rows_apart * vocab + vocab, dtype=torch.bfloat16, device=device)
    logits = memory.as_strided((2, 1, vocab), (rows_apart * vocab, vocab, 1))
    logits.copy_(torch.randn(2, 1, vocab))
    assert logits[1].data_ptr() - logits[0].data_ptr() > 2**32
    assert_as_accurate(logits, torch.tensor([[3], [999]], device=device))


def test_both_backends_agree(device):
    logits, labels = draw(6, 300, torch.float32, device)
    labels[0] = -100
    for a, b in zip(
        hl.token_logps(logits, labels, 0.8, return_entropy=True, backend="triton"),
        hl.token_logps(logits, labels, 0.8, return_entropy=True, backend="torch"),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_triton_backend_off_the_gpu_says_what_it_needs():
    code = (
        "import torch, humanline as hl\n"
        "hl.token_logps(torch.zeros(1, 2), torch.zeros(1, dtype=torch.long), backend='triton')"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert "needs Triton, a GPU tensor" in done.stderr
