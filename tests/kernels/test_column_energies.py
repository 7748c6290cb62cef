"""Energies of columns by kernels, and the Triton backend with columns left out."""

import pytest
import torch
from columns_cases import (
    OBJECTIVES,
    H,
    Products,
    assert_near_exact,
    gradients,
    grpo_loss,
    head_loss,
    log_softmax_gradients,
    random,
    relative,
    sharp,
    signed,
    token_logps_loss,
)

import humanline.ops.hidden.columns
from humanline.kernels import linear_logps
from humanline.kernels.columns import column_energies, weighted_sum
from humanline.kernels.masses import masses

SMALL = {"n": 32, "vocab": 400}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def small_heads_leave_columns_out(monkeypatch):
    """On a GPU, too, where it would not pay."""
    monkeypatch.setattr(humanline.ops.hidden.columns, "dense_share", lambda *_: 0.7)


# Energies


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n, vocab", [(0, 64), (1, 7), (128, 512), (131, 513), (300, 600)])
def test_energies_of_what_was_written(n, vocab, dtype, device):
    dz = torch.randn(n, vocab + 5, device=device).to(dtype)[:, :vocab]  # rows apart
    weights = torch.rand(n, device=device) ** 4
    expected = (dz.double().square() * weights.double()[:, None]).sum(0)
    actual = column_energies(dz, weights)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=0)
    assert torch.equal(column_energies(dz, weights), actual)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n, vocab", [(0, 64), (1, 7), (131, 513), (3, 9000)])
def test_sums_of_rows_and_columns(n, vocab, dtype, device):
    """Of either sign: their error is relative to the sum of their sizes."""
    dz = torch.randn(n, vocab + 5, device=device).to(dtype)[:, :vocab]
    weights, columns = torch.randn(n, device=device), torch.randn(vocab, device=device)
    exact, of_rows, of_columns = dz.double(), weights.double(), columns.double()
    found = ((masses(dz, columns), exact @ of_columns, exact.abs() @ of_columns.abs()),)
    found += ((weighted_sum(dz, weights), of_rows @ exact, of_rows.abs() @ exact.abs()),)
    for actual, expected, sizes in found:
        assert actual.dtype == torch.float32 and actual.shape == expected.shape
        assert ((actual.double() - expected).abs() <= 1e-6 * sizes).all()
    assert torch.equal(masses(dz, columns), found[0][0])
    across = dz.T.contiguous().T
    assert torch.equal(weighted_sum(across, weights), found[1][0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [304, 301])
def test_energies_come_with_the_gradient(vocab, dtype, device):
    n = 150
    hidden, weight = (torch.randn(r, 20, device=device).to(dtype) for r in (n, vocab))
    labels = torch.randint(0, vocab, (n,), device=device)
    labels[3] = -100
    options = {"temperature": torch.tensor(0.9, device=device)}
    results = linear_logps.linear_logps_forward(hidden, weight, labels, **options)
    inputs = (hidden, weight, labels, *results)
    of_logp, weights = torch.randn(n, device=device), torch.rand(n, device=device)
    plain = linear_logps.linear_logits_gradient(*inputs, of_logp=of_logp, **options)
    dz, energies = linear_logps.linear_logits_gradient(
        *inputs, of_logp=of_logp, weights=weights, **options
    )
    assert torch.equal(dz, plain)
    expected = (dz.double().square() * weights.double()[:, None]).sum(0)
    torch.testing.assert_close(energies.double(), expected, rtol=1e-5, atol=1e-30)


# The backend


@pytest.mark.parametrize("frozen_head", [False, True])
@pytest.mark.parametrize("objective, extra", OBJECTIVES, ids=lambda x: type(x).__name__)
def test_every_objective(objective, extra, frozen_head):
    assert_near_exact(objective, extra, frozen_head, frozen_head, "triton", **SMALL)


@pytest.mark.parametrize("frozen", [None, "head", "body"])
def test_products_of_an_objective(frozen):
    hidden, weight, labels = sharp(**SMALL)
    n, vocab = SMALL.values()
    hidden.requires_grad_(frozen != "body")
    weight.requires_grad_(frozen != "head")
    g = torch.ones(n)
    g[:10] = 0
    stats = {}
    loss = grpo_loss(labels, g, stats, gradient_tolerance=1e-2, backend="triton")
    with Products() as products:
        loss(hidden, weight).backward()
    kept = round(float(stats["humanline/kept_columns"]) * vocab)
    assert 0 < kept < vocab / 2
    wings = 1 if frozen else 2
    assert products.count == n * H * vocab + wings * (n - 10) * H * kept


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("tolerance", [1e-3, 1e-2])
def test_every_option_against_the_other_backend(tolerance, softcap):
    """By the kernels that form logits again; all but the choice of columns is tested elsewhere."""
    hidden, weight, labels = sharp(**SMALL)
    n, vocab = SMALL.values()
    labels[5] = -100
    bias = torch.randn(vocab, generator=torch.Generator().manual_seed(5))
    options = {
        "temperature": torch.linspace(0.7, 1.3, n),
        "logit_scale": 1.2,
        "logit_softcap": softcap,
        "gradient_tolerance": tolerance,
    }
    inputs = hidden, weight, bias
    a, b = (
        gradients(head_loss(labels, signed(n), signed(n, 4), backend=name, **options), *inputs)
        for name in ("torch", "triton")
    )
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-5)


def test_error_against_float64():
    hidden, weight, labels = sharp(**SMALL)
    g = signed(SMALL["n"])
    truth = log_softmax_gradients(hidden, weight, labels, g)
    loss = token_logps_loss(labels, g, gradient_tolerance=1e-2, backend="triton")
    dh, dw = gradients(loss, hidden, weight)
    assert 1e-5 < relative(dw, truth[1]) <= 1.5e-2
    assert 1e-5 < relative(dh, truth[0]) <= 5e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype):
    hidden, weight, labels = sharp(**SMALL, dtype=dtype)
    g = signed(SMALL["n"])
    for loss in (token_logps_loss, grpo_loss):
        truth = gradients(loss(labels, g.double()), hidden.double(), weight.double())
        exact = gradients(loss(labels, g, backend="triton"), hidden, weight)
        some = gradients(loss(labels, g, gradient_tolerance=1e-2, backend="triton"), hidden, weight)
        for x, e, t, bound in zip(some, exact, truth, (5e-2, 1.5e-2), strict=True):
            assert not torch.equal(x, e)
            assert relative(x, t) <= relative(e, t) + bound


def test_random_logits_are_multiplied_as_they_are():
    hidden, weight, labels = random(32)
    stats = {}
    g = signed(32)
    options = {"backend": "triton"}
    some = gradients(
        grpo_loss(labels, g, stats, gradient_tolerance=1e-4, **options), hidden, weight
    )
    exact = gradients(grpo_loss(labels, g, **options), hidden, weight)
    assert stats["humanline/kept_columns"] == 1
    for a, b in zip(some, exact, strict=True):
        assert torch.equal(a, b)
