"""The kernels between a head's GEMMs against float64, their error held against eager float32's."""

import pytest
import torch
from float_errors import floor

from humanline.kernels.head_rows import HeadRows
from humanline.kernels.launch import row_length
from humanline.ops.softmax import front_order

OPTIONS = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"logit_scale": 0.25},
    "softcap": {"logit_softcap": 4.0},
    "all": {"bias": True, "logit_scale": 3.0, "logit_softcap": 5.0},
}


def draw(n, vocab, device, bias=False, **options):
    z = 3 * torch.randn(n, vocab, device=device)
    labels = torch.randint(0, vocab, (n,), device=device)
    options["bias"] = torch.randn(vocab, device=device) if bias else None
    return z, labels, options


def reference(z, labels, temperature, g, g_entropy, dtype, bias=None, logit_scale=1.0, **cap):
    """Log-probs, entropies and the gradient by z of ``Σ g·logp + g_entropy·H``, by eager softmax"""
    z = z.detach().to(dtype).requires_grad_()
    x = (z if bias is None else z + bias.to(dtype)) * logit_scale
    softcap = cap.get("logit_softcap")
    x = x if softcap is None else softcap * torch.tanh(x / softcap)
    t = temperature.to(dtype)
    log_p = (x / (t[:, None] if t.dim() else t)).log_softmax(-1)
    logps = log_p.gather(-1, labels[:, None].long()).squeeze(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    loss = (g.to(dtype) * logps).sum()
    if g_entropy is not None:
        loss = loss + (g_entropy.to(dtype) * entropy).sum()
    return logps.detach(), entropy.detach(), torch.autograd.grad(loss, z)[0]


def rms(x, truth):
    return (x.double() - truth).square().mean().sqrt().item()


def assert_as_accurate(z, labels, options, temperature=1.0, entropy=False, dtype=torch.float32):
    """Our error is at most 1.5 × eager's, or half a unit in the last place of the result."""
    temperature = torch.as_tensor(temperature, device=z.device)
    g = torch.randn(len(z), device=z.device)
    g_entropy = torch.randn(len(z), device=z.device) if entropy else None
    arguments = labels, temperature, g, g_entropy
    truth = reference(z, *arguments, torch.float64, **options)
    eager = reference(z, *arguments, torch.float32, **options)
    rows = HeadRows(z, labels, temperature, **options, with_entropy=entropy)
    dz = rows.gradient(torch.empty_like(z, dtype=dtype), None, g, g_entropy)
    for name, x, e, t in zip(
        ("logps", "entropy", "gradient"), (rows.logps, rows.entropy, dz), eager, truth, strict=True
    ):
        if x is None:
            continue
        assert x.isfinite().all(), name
        assert rms(x, t) <= max(1.5 * rms(e.to(x.dtype), t), floor(t, x.dtype)), name


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("vocab", [1, 7, 50257])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_accuracy(options, vocab, entropy, device):
    assert_as_accurate(*draw(40 if vocab < 100 else 4, vocab, device, **options), 0.7, entropy)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_temperature_per_row(options, device):
    temperature = torch.rand(6, device=device) + 0.5
    assert_as_accurate(*draw(6, 301, device, **options), temperature, entropy=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_gradient_is_rounded_once(dtype, device):
    assert_as_accurate(*draw(6, 301, device), dtype=dtype)


def test_small_logits_under_a_large_softcap(device):
    """Where tanh from exponentials would cancel."""
    z, labels, _ = draw(6, 301, device)
    assert_as_accurate(z / 100, labels, {"logit_softcap": 50.0})


def test_deep_in_the_softcap(device):
    z, labels, _ = draw(6, 301, device)
    assert_as_accurate(100 * z, labels, {"logit_softcap": 5.0}, entropy=True)


@pytest.mark.parametrize("shift", [-1e4, 1e4])
def test_far_from_zero(shift, device):
    z, labels, _ = draw(6, 301, device)
    assert_as_accurate(z + shift, labels, {}, entropy=True)


def test_label_almost_certain(device):
    z, labels, _ = draw(8, 301, device)
    z.scatter_add_(1, labels[:, None], torch.full((8, 1), 25.0, device=device))
    assert_as_accurate(z, labels, {})


def test_rows_that_are_kept(device):
    z, labels, options = draw(9, 301, device, **OPTIONS["all"])
    kept = torch.tensor([1, 2, 7], device=device)
    temperature, g = torch.rand(9, device=device) + 0.5, torch.randn(3, device=device)
    rows = HeadRows(z, labels.int(), temperature, **options)
    some = rows.gradient(torch.empty_like(z), kept, g)
    all_g = torch.zeros(9, device=device).index_copy_(0, kept, g)
    assert torch.equal(some, rows.gradient(torch.empty_like(z), None, all_g)[kept])
    unit = rows.gradient(torch.empty_like(z), kept)
    torch.testing.assert_close(unit * g[:, None], some)


@pytest.mark.parametrize("vocab", [7, 301, 4096 + 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_gradient_overwrites_its_logits(dtype, vocab, device):
    """In rows padded to a multiple of 16; what was in the padding is of no account."""
    z, labels, options = draw(9, vocab, device, **OPTIONS["all"])
    active = torch.tensor([0, 1, 1, 0, 0, 1, 0, 1, 1], dtype=torch.bool, device=device)
    kept, g = front_order(active), torch.randn(5, device=device)
    temperature = torch.rand(9, device=device) + 0.5
    apart = HeadRows(z, labels, temperature, **options)
    expected = apart.gradient(torch.empty_like(z, dtype=dtype), kept, g)
    memory = torch.full((9, row_length(vocab)), float("nan"), device=device)
    memory[:, :vocab] = z
    rows = HeadRows(memory[:, :vocab], labels, temperature, **options)
    over = rows.gradient(memory.view(dtype)[:, :vocab], kept, g)
    assert over.data_ptr() == memory.data_ptr()
    torch.testing.assert_close(rows.logps, apart.logps)
    torch.testing.assert_close(over, expected)


def test_rows_to_the_front():
    """All may move at once: a row goes to its own place or comes from beyond those written."""
    for bits in range(2**7):
        active = torch.tensor([bits >> i & 1 for i in range(7)], dtype=torch.bool)
        order, k = front_order(active).tolist(), int(active.sum())
        assert sorted(order) == active.nonzero().squeeze(1).tolist()
        assert all(row == place or row >= k for place, row in enumerate(order))


def test_no_rows(device):
    rows = HeadRows(torch.empty(0, 5, device=device), torch.empty(0), torch.tensor(1.0))
    assert rows.gradient(torch.empty(3, 5, device=device)).shape == (0, 5)
