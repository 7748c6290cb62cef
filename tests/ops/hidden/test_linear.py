"""Log-probs and objectives from hidden states, on both backends: accuracy, options, bad input."""

import pytest
import torch
from oracle import eager_from_logits, eager_logits, leaf

import humanline as hl
from humanline.dtypes import compute_dtype
from humanline.ops.backend import interpreting

BACKENDS = [
    "torch",
    pytest.param(
        "triton",
        marks=pytest.mark.skipif(
            not (interpreting() or torch.cuda.is_available()), reason="needs a GPU or interpreter"
        ),
    ),
]
B, T, H, V = 4, 5, 24, 301
OPTIONS = {
    "plain": {},
    "bias": {"bias": True},
    "softcap": {"logit_softcap": 3.0, "logit_scale": 0.5},
    "all": {"bias": True, "logit_softcap": 3.0, "logit_scale": 2.0, "temperature": True},
}
OBJECTIVES = {
    "grpo": (hl.GRPO(perception=hl.Clip(-0.2, 0.2)), ("advantages",)),
    "grpo-entropy": (hl.GRPO(entropy_coef=0.1, beta=0.1), ("advantages",)),
    "gspo": (hl.GRPO(importance_sampling_level="sequence"), ("advantages",)),
    "dpo": (hl.DPO(perception=hl.Clip(-0.2, 0.2)), ()),
    "prospect": (hl.DPO(perception=hl.ProspectWeight()), ()),
    "sft": (hl.SFT(), ()),
}


@pytest.fixture
def device():
    return "cuda" if torch.cuda.is_available() else "cpu"


class Batch:
    def __init__(self, device, dtype=torch.float32, hidden=H, vocab=V, length=T):
        def draw(*shape):
            return torch.randn(*shape, device=device)

        self.hidden, self.weight = (
            draw(B, length, hidden).to(dtype),
            draw(vocab, hidden) / hidden**0.5,
        )
        self.weight = (3 * hidden**-0.5 * self.weight).to(dtype)
        self.labels = torch.randint(0, vocab, (B, length), device=device)
        self.labels[0, :3] = -100
        self.bias = draw(vocab).to(dtype)
        self.temperature = torch.rand(B, length, device=device) + 0.6
        self.ref_hidden = (self.hidden.float() + 0.05 * draw(B, length, hidden)).to(dtype)
        self.batch = {"advantages": torch.tensor([1.0, -0.7, 0.4, 2.0], device=device)}

    def options(self, name):
        given = dict(OPTIONS[name])
        for key in ("bias", "temperature"):
            if given.pop(key, False):
                given[key] = getattr(self, key)
        return given


def eager_gradients(objective, b, names, options, ref_logps, dtype, upstream):
    """Loss and gradients of the plain path. ``dtype`` is float64, or that of the inputs: GEMMs in
    that, softmax in float32, as trainers have it."""
    hidden, weight = leaf(b.hidden.to(dtype)), leaf(b.weight.to(dtype))
    options = {k: v.to(dtype) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    temperature = options.pop("temperature", 1.0)
    logits = eager_logits(hidden, weight, **options).to(compute_dtype(dtype))
    logps, entropy = eager_from_logits(logits, b.labels, temperature)
    dtype = logps.dtype
    loss, _ = objective.from_logps(
        logps,
        ref_logps.to(dtype),
        b.labels != -100,
        entropy=entropy,
        **{n: b.batch[n].to(dtype) for n in names},
    )
    return loss.detach(), *torch.autograd.grad(loss * upstream, (hidden, weight))


def rms(x, truth):
    return (x.double() - truth.double()).square().mean().sqrt().item()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows_fitting", [80, 33])
@pytest.mark.parametrize(
    "name, options",
    [
        *((name, "plain") for name in OBJECTIVES),
        *(("grpo-entropy", options) for options in ("bias", "all")),
        *(("dpo", options) for options in ("softcap", "all")),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_error_is_at_most_that_of_eager(name, options, rows_fitting, dtype, backend, device):
    """At most 1.5 × the error from float64 of eager GEMMs and float32 softmax, same inputs."""
    b = Batch(device, dtype, length=20)  # enough rows that neither error is a matter of luck
    objective, names = OBJECTIVES[name]
    options = b.options(options)
    with torch.no_grad():
        ref_logps = hl.linear_token_logps(b.ref_hidden, b.weight, b.labels, **options)
    arguments = objective, b, names, options, ref_logps
    truth = eager_gradients(*arguments, torch.float64, 0.5)
    plain = eager_gradients(*arguments, dtype, 0.5)
    hidden, weight = leaf(b.hidden), leaf(b.weight)
    loss, _ = objective.from_hidden(
        hidden,
        weight,
        b.labels,
        ref_logps,
        **options,
        **{n: b.batch[n] for n in names},
        workspace_bytes=rows_fitting * V * 16,
        backend=backend,
    )
    ours = loss.detach(), *torch.autograd.grad(loss * 0.5, (hidden, weight))
    for what, x, e, t in zip(("loss", "dH", "dW"), ours, plain, truth, strict=True):
        error, allowed = rms(x, t), 1.5 * rms(e, t)
        if x.dim() == 0:  # a single number's error is a matter of luck, but for its last places
            allowed = max(allowed, 3 * torch.finfo(x.dtype).eps * t.abs().item())
        assert error <= allowed, (what, error, allowed)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_logps_are_never_rounded_to_bfloat16(backend, device):
    b = Batch(device, torch.bfloat16, hidden=64, vocab=3001)
    truth = hl.linear_token_logps(b.hidden.double(), b.weight.double(), b.labels)
    error = (hl.linear_token_logps(b.hidden, b.weight, b.labels, backend=backend) - truth).abs()
    assert error.max() < 2e-4 and error.mean() < 2e-5


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's GEMMs return float32")
@pytest.mark.parametrize("frozen_head", [False, True])
@pytest.mark.parametrize("upstream, casts", [(1.0, 1), (0.5, 1), (0.3, 2)])
def test_bfloat16_gradients_of_hidden_are_cast_once(upstream, casts, frozen_head):
    """And once more by an incoming gradient that is no power of two. Normalisers are small."""
    b = Batch("cpu", torch.bfloat16, hidden=64, length=128)
    small = {"advantages": b.batch["advantages"] / 1000}

    def gradient(hidden, weight):
        loss, _ = hl.GRPO().from_hidden(hidden, weight, b.labels, **small)
        return torch.autograd.grad(loss * upstream, hidden)[0]

    truth = gradient(leaf(b.hidden.double()), b.weight.double())
    ours = gradient(leaf(b.hidden), b.weight.clone().requires_grad_(not frozen_head))
    one_cast = rms(truth.bfloat16(), truth)
    assert rms(ours, truth) <= 1.2 * casts**0.5 * one_cast


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("needs", ["hidden", "weight", "bias", "hidden weight", "weight bias"])
@pytest.mark.parametrize("name", ["grpo", "dpo"])
@pytest.mark.parametrize("rows_fitting", [B * T, 13])
def test_every_subset_of_gradients(name, needs, rows_fitting, backend, device):
    b = Batch(device)
    objective, names = OBJECTIVES[name]
    ref_logps = hl.linear_token_logps(b.ref_hidden, b.weight, b.labels, b.bias)

    def gradients(which):
        inputs = {n: getattr(b, n).clone().requires_grad_(n in which) for n in INPUTS}
        loss, _ = objective.from_hidden(
            inputs["hidden"],
            inputs["weight"],
            b.labels,
            ref_logps,
            bias=inputs["bias"],
            **{n: b.batch[n] for n in names},
            workspace_bytes=rows_fitting * V * 16,
            backend=backend,
        )
        loss.backward()
        return {n: x.grad for n, x in inputs.items()}

    every, some = gradients(INPUTS), gradients(needs.split())
    for name in INPUTS:
        if name in needs.split():
            torch.testing.assert_close(some[name], every[name], rtol=1e-5, atol=1e-8)
        else:
            assert some[name] is None


INPUTS = ("hidden", "weight", "bias")


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_reference_from_its_hidden_states(backend, device):
    b = Batch(device)
    ref_weight = b.weight + 0.1 * torch.randn_like(b.weight)
    options = b.options("all") | {"backend": backend}
    given = hl.linear_token_logps(b.ref_hidden, ref_weight, b.labels, **options)
    hidden = leaf(b.hidden)
    expected, _ = hl.DPO().from_hidden(hidden, b.weight, b.labels, given, **options)
    reference = {"ref_hidden": leaf(b.ref_hidden), "ref_weight": leaf(ref_weight)}
    reference["ref_bias"] = b.bias
    loss, _ = hl.DPO().from_hidden(hidden, b.weight, b.labels, **reference, **options)
    assert torch.equal(loss, expected)
    loss.backward()
    assert reference["ref_hidden"].grad is None and reference["ref_weight"].grad is None


def test_the_reference_may_have_another_width(device):
    b, ref = Batch(device), Batch(device, hidden=7)
    loss, _ = hl.DPO().from_hidden(
        b.hidden, b.weight, b.labels, ref_hidden=ref.hidden, ref_weight=ref.weight
    )
    given = hl.linear_token_logps(ref.hidden, ref.weight, b.labels)
    assert torch.equal(loss, hl.DPO().from_hidden(b.hidden, b.weight, b.labels, given)[0])


def test_bad_references(device, monkeypatch):
    b = Batch(device)
    rows = b.hidden, b.weight, b.labels
    with pytest.raises(ValueError, match="ref_hidden without ref_weight"):
        hl.DPO().from_hidden(*rows, ref_hidden=b.ref_hidden)
    with pytest.raises(ValueError, match="got both"):
        hl.DPO().from_hidden(*rows, torch.zeros(B, T), ref_hidden=b.ref_hidden, ref_weight=b.weight)
    with pytest.raises(ValueError, match="ref_hidden, which was not given"):
        hl.DPO().from_hidden(*rows, torch.zeros(B, T), ref_weight=b.weight)
    monkeypatch.setattr("humanline.ops.linear_token_logps", None)  # would run the GEMM
    with pytest.raises(ValueError, match="needs advantages"):
        hl.GRPO().from_hidden(*rows, ref_hidden=b.ref_hidden, ref_weight=b.weight)


def test_a_sharded_weight_says_what_to_do(device):
    class Sharded(torch.Tensor):
        placements = ("Shard(dim=0)",)

    b = Batch(device)
    weight = b.weight.as_subclass(Sharded)
    with pytest.raises(ValueError, match=r"weight is a DTensor .*full_tensor\(\)"):
        hl.linear_token_logps(b.hidden, weight, b.labels)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bitwise_the_same_on_a_rerun(backend, device):
    b = Batch(device, torch.bfloat16)
    ref_logps = hl.linear_token_logps(b.ref_hidden, b.weight, b.labels)
    runs = []
    for _ in range(2):
        hidden, weight = leaf(b.hidden), leaf(b.weight)
        loss, _ = hl.DPO().from_hidden(
            hidden, weight, b.labels, ref_logps, workspace_bytes=5 * V * 16, backend=backend
        )
        runs.append((loss.detach(), *torch.autograd.grad(loss, (hidden, weight))))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("upstream", [0.5, 0.0, -2.0])
@pytest.mark.parametrize("name", ["grpo", "dpo"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_whatever_comes_in_scales_the_gradients(name, upstream, dtype, device):
    b = Batch(device, dtype)
    objective, names = OBJECTIVES[name]
    hidden, weight = leaf(b.hidden), leaf(b.weight)
    loss, _ = objective.from_hidden(
        hidden,
        weight,
        b.labels,
        torch.full((B, T), -5.0, device=device),
        **{n: b.batch[n] for n in names},
    )
    once = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    again = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    other = torch.autograd.grad(loss * upstream + hidden.float().sum(), (hidden, weight))
    for a, c, d, more in zip(once, again, other, (1.0, 0.0), strict=True):
        assert torch.equal(a, c)
        torch.testing.assert_close(d, (a.float() * upstream + more).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_backward_leaves_alone_what_earlier_ones_gave(dtype, device):
    """The last one may scale what the forward saved where it lies."""
    b = Batch(device, dtype)
    hidden, logps_of = leaf(b.hidden), torch.randn(B, T, device=device)
    frozen = hl.linear_token_logps(hidden, b.weight, b.labels)
    for loss in (hl.SFT().from_hidden(hidden, b.weight, b.labels)[0], (frozen * logps_of).sum()):
        first = [torch.autograd.grad(x * loss, hidden, retain_graph=True)[0] for x in (1, 0.5)]
        before = [x.clone() for x in first]
        first[1].zero_()  # nor is what they gave still anybody's
        (last,) = torch.autograd.grad(loss, hidden)
        assert torch.equal(first[0], before[0]) and torch.equal(last, before[0])
        torch.testing.assert_close(before[1], 0.5 * before[0])


def test_float16_coefficients_meet_the_loss_scale_before_they_underflow(device):
    b = Batch(device, torch.float16)
    hidden, weight = leaf(b.hidden), leaf(b.weight)
    tiny = {"advantages": b.batch["advantages"] * 1e-6}
    loss, _ = hl.GRPO().from_hidden(hidden, weight, b.labels, **tiny)
    (loss * 2.0**16).backward()
    wide = leaf(b.hidden.double()), leaf(b.weight.double())
    expected, _ = hl.GRPO().from_hidden(*wide, b.labels, **tiny)
    truth = torch.autograd.grad(expected * 2.0**16, wide)
    for x, t in zip((hidden, weight), truth, strict=True):
        assert (x.grad.double() - t).abs().max() < 2e-3 * t.abs().max()
