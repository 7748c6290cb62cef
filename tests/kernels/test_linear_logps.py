"""The head's GEMM fused with its softmax, against float64; errors are held against eager's."""

import pytest
import torch
from float_errors import floor

from humanline.kernels import launch
from humanline.kernels.linear_logps import linear_logits_gradient, linear_logps_forward
from humanline.kernels.matmul import add_weight_gradient_, hidden_gradient_

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def draw(n, width, vocab, dtype, device, spread=2.0):
    hidden = torch.randn(n, width, device=device).to(dtype)
    weight = (torch.randn(vocab, width, device=device) * spread / width**0.5).to(dtype)
    return hidden, weight, torch.randint(0, vocab, (n,), device=device)


def eager(hidden, weight, labels, g, g_entropy, dtype, *, bias=None, temperature, **options):
    """Log-probs, entropies and the gradient of ``hidden @ weight.T + bias``."""
    raw = hidden.to(dtype) @ weight.to(dtype).T
    raw = (raw if bias is None else raw + bias.to(dtype)).requires_grad_()
    z = raw * options.get("logit_scale", 1.0)
    cap = options.get("logit_softcap")
    z = z if cap is None else cap * torch.tanh(z / cap)
    t = temperature.to(dtype)
    log_p = (z / (t[:, None] if t.dim() else t)).log_softmax(-1)
    picked = log_p.gather(1, labels.clamp(min=0).long()[:, None]).squeeze(1)
    entropy = -(log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0)).sum(1)
    logps, entropy = (torch.where(labels >= 0, x, 0) for x in (picked, entropy))
    (g.to(dtype) @ logps + g_entropy.to(dtype) @ entropy).backward()
    return logps.detach(), entropy.detach(), raw.grad


def ours(hidden, weight, labels, g, g_entropy, *, dtype=torch.float32, **options):
    logps, entropy, m, s = linear_logps_forward(
        hidden, weight, labels, with_entropy=True, **options
    )
    index = options.pop("index", None)
    if index is not None:  # the gradient takes rows side by side
        index = index.clamp(max=len(hidden) - 1)
        hidden, labels = hidden[index], labels[index]
        if options["temperature"].dim():
            options["temperature"] = options["temperature"][index]
    dz = linear_logits_gradient(
        hidden,
        weight,
        labels,
        logps,
        entropy,
        m,
        s,
        of_logp=g,
        of_entropy=g_entropy,
        dtype=dtype,
        **options,
    )
    return logps, entropy, dz


def rms(x, truth):
    return (x.double() - truth).square().mean().sqrt().item()


def assert_as_accurate(hidden, weight, labels, temperature=1.0, **options):
    """Our error is at most 1.5 × eager's in float32, or half a unit in the last place."""
    options["temperature"] = torch.as_tensor(temperature, device=hidden.device)
    g, g_entropy = torch.randn(2, len(labels), device=hidden.device)
    arguments = (hidden, weight, labels, g, g_entropy)
    truth = eager(*arguments, torch.float64, **options)
    float32 = eager(*arguments, torch.float32, **options)
    result = ours(*arguments, **options)
    for name, x, e, t in zip(("logps", "entropy", "dz"), result, float32, truth, strict=True):
        assert x.isfinite().all(), name
        assert rms(x, t) <= max(1.5 * rms(e, t), floor(t, torch.float32)), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n, width, vocab", [(1, 64, 7), (130, 50, 1000), (5, 64, 17000)])
def test_accuracy(n, width, vocab, dtype, device):
    hidden, weight, labels = draw(n, width, vocab, dtype, device)
    labels[n // 2 + 1 :: 3] = -100
    assert_as_accurate(hidden, weight, labels, 1.3)


@pytest.mark.parametrize("width", [64, 50])
def test_every_option(width, device):
    hidden, weight, labels = draw(9, width, 700, torch.bfloat16, device)
    assert_as_accurate(
        hidden,
        weight,
        labels.int(),
        torch.linspace(0.3, 3, 9, device=device),
        bias=torch.randn(700, device=device),
        logit_scale=1.7,
        logit_softcap=4.0,
    )


def test_softcap_alone_and_without_entropy(device):
    hidden, weight, labels = draw(3, 64, 300, torch.float32, device)
    options = {"temperature": torch.tensor(1.0, device=device), "logit_softcap": 3.0}
    logps, entropy, m, s = linear_logps_forward(hidden, weight, labels, **options)
    assert entropy is None
    dz = linear_logits_gradient(hidden, weight, labels, logps, None, m, s, **options)
    one, zero = torch.ones(3, device=device), torch.zeros(3, device=device)
    truth = eager(hidden, weight, labels, one, zero, torch.float64, **options)
    torch.testing.assert_close(logps.double(), truth[0], rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(dz.double(), truth[2], rtol=1e-5, atol=2e-7)


@pytest.mark.parametrize("bias", [-1e4, 1e4])
def test_logits_all_very_negative_or_positive(bias, device):
    hidden, weight, labels = draw(4, 32, 777, torch.float32, device)
    assert_as_accurate(hidden, weight, labels, 0.7, bias=torch.full((777,), bias, device=device))


@pytest.mark.parametrize("at_label", [True, False])
def test_one_huge_logit(at_label, device):
    hidden, weight, labels = draw(4, 32, 777, torch.float32, device)
    labels[:] = 600
    bias = torch.zeros(777, device=device)
    bias[600 if at_label else 5] = 1e4
    assert_as_accurate(hidden, weight, labels, bias=bias)


def test_columns_at_minus_infinity(device):
    hidden, weight, labels = draw(4, 32, 777, torch.float32, device)
    bias = torch.zeros(777, device=device)
    bias[:400] = -torch.inf  # all of the first tiles
    assert_as_accurate(hidden, weight, labels.clamp(min=400), bias=bias)


def test_label_almost_certain(device):
    hidden, weight, labels = draw(5, 32, 500, torch.float32, device, spread=0.1)
    labels[:] = 3
    bias = torch.zeros(500, device=device)
    bias[3] = 20.0  # p = 1 − 1e-6
    assert_as_accurate(hidden, weight, labels, bias=bias)
    one, zero = torch.ones(5, device=device), torch.zeros(5, device=device)
    temperature = torch.tensor(1.0, device=device)
    logps, _, dz = ours(hidden, weight, labels, one, zero, temperature=temperature, bias=bias)
    # 1 − p of the label comes from its log-prob: the difference would have lost five digits.
    torch.testing.assert_close(dz[:, 3], -torch.expm1(logps), rtol=1e-6, atol=0)


def test_bfloat16_log_probs_are_those_of_float64(device):
    hidden, weight, labels = draw(40, 512, 3000, torch.bfloat16, device)
    temperature = torch.tensor(1.0, device=device)
    logps = linear_logps_forward(hidden, weight, labels, temperature=temperature)[0]
    z = hidden.double() @ weight.double().T
    error = (logps - z.log_softmax(-1).gather(1, labels[:, None])[:, 0]).abs()
    assert error.max() <= 2e-4 and error.mean() <= 2e-5


def test_gradient_in_half_precision_is_rounded_once(device):
    hidden, weight, labels = draw(6, 64, 300, torch.bfloat16, device)
    g, g_entropy = torch.randn(2, 6, device=device)
    options = {"temperature": torch.tensor(1.0, device=device)}
    full, half = (
        ours(hidden, weight, labels, g, g_entropy, dtype=dtype, **options)[2]
        for dtype in (torch.float32, None)
    )
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, full.bfloat16())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [64, 50])
def test_a_row_does_not_depend_on_the_rows_around_it(width, dtype, device):
    hidden, weight, labels = draw(150, width, 700, dtype, device)
    g, g_entropy = torch.randn(2, 150, device=device)
    options = {"temperature": torch.tensor(0.9, device=device)}
    batch = ours(hidden, weight, labels, g, g_entropy, **options)
    again = ours(hidden, weight, labels, g, g_entropy, **options)
    for a, b in zip(batch, again, strict=True):
        assert torch.equal(a, b)
    for row in (0, 77, 149):
        one = slice(row, row + 1)
        alone = ours(hidden[one], weight, labels[one], g[one], g_entropy[one], **options)
        for a, b in zip(batch, alone, strict=True):
            assert torch.equal(a[one], b)


@pytest.mark.parametrize("with_count", [False, True])
@pytest.mark.parametrize("temperature_per_row", [False, True])
def test_gathered_rows_are_those_of_a_copy(with_count, temperature_per_row, device):
    hidden, weight, labels = draw(200, 64, 600, torch.bfloat16, device)
    index = torch.randperm(200, device=device)[:150]
    count = 131 if with_count else 150
    temperature = torch.rand(200 if temperature_per_row else (), device=device) + 0.5
    g, g_entropy = torch.randn(2, 150, device=device)
    if with_count:  # what lies beyond is never read
        index[count:] = 10**6
    taken = index[:count]
    expected = ours(
        hidden[taken],
        weight,
        labels[taken],
        g[:count],
        g_entropy[:count],
        temperature=temperature[taken] if temperature_per_row else temperature,
    )
    result = ours(
        hidden,
        weight,
        labels,
        g,
        g_entropy,
        temperature=temperature,
        index=index,
        count=torch.tensor(count, dtype=torch.int32, device=device) if with_count else None,
    )
    for a, b in zip(result, expected, strict=True):
        assert torch.equal(a[:count], b)
    assert (result[0][count:] == 0).all() and (result[1][count:] == 0).all()
    assert (result[2][count:] == 0).all()  # 131 and 150 fall into the same row tile


def test_tiles_beyond_the_count_are_left_alone(device):
    hidden, weight, labels = draw(300, 32, 100, torch.float32, device)
    count = torch.tensor(5, dtype=torch.int32, device=device)
    options = {"temperature": torch.tensor(1.0, device=device), "count": count}
    logps, _, m, s = linear_logps_forward(hidden, weight, labels, **options)
    assert (logps[5:] == 0).all() and (m[5:] == 0).all() and (s[5:] == 1).all()
    out = torch.full((300, 100), 7.0, device=device)
    linear_logits_gradient(hidden, weight, labels, logps, None, m, s, out=out, **options)
    assert (out[:5] != 7).all() and (out[5:64] == 0).all() and (out[128:] == 7).all()


def test_masked_rows_are_not_looked_at(device):
    for n in (3, 0):
        hidden, weight, labels = draw(n, 32, 100, torch.float32, device)
        hidden[:], labels[:] = torch.nan, -100
        g = torch.ones(n, device=device)
        result = ours(hidden, weight, labels, g, g, temperature=torch.tensor(1.0, device=device))
        for x in result:
            assert len(x) == n and (x == 0).all()


@pytest.mark.parametrize("width", [64, 50])
def test_strided_rows(width, device):
    wide = torch.randn(7, 3 * width, device=device)
    _, weight, labels = draw(7, width, 90, torch.float32, device)
    for view in (wide[:, width : 2 * width], wide[:, ::3], wide[:1, :width].expand(7, width)):
        assert_as_accurate(view, weight, labels)
    assert_as_accurate(wide[:, :width], weight.T.contiguous().T, labels)


def test_small_tiles_cover_every_tile_chunk_and_group(device, monkeypatch):
    tiles = launch.GemmConfig(16, 16, 16, warps=4, stages=2, descriptors=True)
    for name in ("linear_logps", "matmul"):
        monkeypatch.setattr(f"humanline.kernels.{name}.gemm_config", lambda *a, **k: tiles)
    monkeypatch.setattr("humanline.kernels.linear_logps.row_group", lambda *a: 2)
    assert_as_accurate(*draw(40, 40, 1100, torch.float32, device))  # 3 row tiles, 35 chunks of 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width, vocab", [(64, 320), (50, 301)])
@pytest.mark.parametrize("rows", [0, 1, 70, 150])
def test_backward_gemms_end_at_the_count(rows, width, vocab, dtype, device):
    hidden, weight, _ = draw(150, width, vocab, dtype, device)
    dz = torch.rand(150, vocab, device=device).to(dtype)
    dz[rows:], hidden[rows:] = torch.nan, torch.nan
    count = torch.tensor(rows, dtype=torch.int32, device=device)
    index, scale = torch.randperm(200, device=device)[:150], torch.randn(150, device=device)
    index[rows:] = 10**6
    out = torch.full((200, width), 7.0, device=device)
    hidden_gradient_(out, dz, weight, count, scale=scale, index=index)
    expected = torch.full((200, width), 7.0, device=device, dtype=torch.float64)
    expected[index[:rows]] = dz[:rows].double() @ weight.double() * scale[:rows, None]
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-4)
    plain = hidden_gradient_(torch.zeros(150, width, device=device), dz, weight, count)
    assert (plain[rows:] == 0).all()
    expected = dz[:rows].double() @ weight.double()
    torch.testing.assert_close(plain[:rows].double(), expected, rtol=1e-5, atol=1e-4)
    total = torch.randn(vocab, width, device=device)
    expected = total.double() + 0.5 * dz[:rows].double().T @ hidden[:rows].double()
    add_weight_gradient_(total, dz, hidden, count, factor=torch.tensor(0.5, device=device))
    torch.testing.assert_close(total.double(), expected, rtol=1e-5, atol=1e-4)
