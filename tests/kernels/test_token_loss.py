"""The one-launch kernel against the objectives' own torch definitions, over the whole table."""

from itertools import product

import pytest
import torch

import humanline as hl
from humanline.kernels import token_loss as kernel

B, T, V = 4, 6, 301

CLIPS = [hl.Identity(), hl.Clip(-0.3, 0.2), hl.Clip(0.05, 0.4)]
GRPO_LOSSES = ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo"]
OBJECTIVES = [
    *(
        hl.GRPO(loss_type=loss, perception=clip, epsilon_high=0.3, max_completion_length=9)
        for loss, clip in product(GRPO_LOSSES, CLIPS)
    ),
    *(
        hl.GRPO(beta=0.2, use_bias_correction_kl=corrected, perception=clip)
        for corrected, clip in product([True, False], CLIPS)
    ),
    hl.GRPO(delta=1.25, epsilon=0.1),
    hl.GRPO(loss_type="cispo", delta=1.05, epsilon_high=1.1),  # which looks at no delta
    hl.GRPO(loss_type="dapo", entropy_coef=0.03, beta=0.1),
    hl.GRPO(loss_type="cispo", epsilon_high=1.1, beta=0.1, entropy_coef=0.03),
    *(hl.PPO(beta=0.1, kl_estimator=kl, entropy_coef=0.02) for kl in ("k1", "k3")),
    hl.PPO(perception=hl.Clip(-0.3, 0.2)),
    hl.SFT(),
]


def identify(objective):
    shown = {k: v for k, v in vars(objective).items() if v != getattr(type(objective), k, None)}
    return f"{type(objective).__name__}-{shown}"


@pytest.fixture
def batch(device):
    logits = torch.randn(B, T + 1, V, device=device)[:, :-1]
    labels = torch.randint(0, V, (B, T), device=device)
    labels[0, 3:] = -100
    labels[3] = -100
    ref_logps = hl.token_logps(logits, labels, backend="torch") + 0.3 * torch.randn(B, T).to(device)
    return logits, labels, ref_logps


def run(objective, backend, logits, labels, ref_logps, upstream=1.0, **extra):
    x = logits.detach().requires_grad_()
    extra = {k: v.to(x.device) if torch.is_tensor(v) else v for k, v in extra.items()}
    loss, stats = objective.from_logits(x, labels, ref_logps, backend=backend, **extra)
    (grad,) = torch.autograd.grad(loss * upstream, x)
    return loss.detach(), grad, stats


def extras(objective, device=None):
    if isinstance(objective, hl.SFT):
        return {}
    return {"advantages": torch.tensor([1.0, -0.7, 0.4, 2.0], device=device)}


@pytest.fixture
def launches(count_calls):
    """Counts calls of the one-launch kernel."""
    return count_calls(kernel, "token_loss")


@pytest.mark.parametrize("objective", OBJECTIVES, ids=identify)
def test_equals_the_torch_definition(objective, batch, launches):
    expected = run(objective, "torch", *batch, upstream=0.5, temperature=0.9, **extras(objective))
    result = run(objective, "triton", *batch, upstream=0.5, temperature=0.9, **extras(objective))
    assert len(launches) == 1
    torch.testing.assert_close(result[0], expected[0])
    torch.testing.assert_close(result[1], expected[1], atol=1e-7, rtol=1e-4)
    assert result[2].keys() == expected[2].keys()
    for name in expected[2]:
        torch.testing.assert_close(result[2][name], expected[2][name], msg=name)


@pytest.mark.parametrize("old_logps", ["given", "policy"])
def test_what_the_ratio_is_taken_to(old_logps, batch):
    objective, ref_logps = hl.GRPO(beta=0.1), batch[2]
    old = ref_logps + 0.1 * torch.randn_like(ref_logps) if old_logps == "given" else "policy"
    results = [
        run(objective, backend, *batch, old_logps=old, **extras(objective))
        for backend in ("torch", "triton")
    ]
    torch.testing.assert_close(results[1][1], results[0][1], atol=1e-7, rtol=1e-4)


def test_temperature_and_advantages_per_row(batch):
    temperature = torch.rand(B, T) + 0.5
    results = [
        run(hl.PPO(), backend, *batch, temperature=temperature, advantages=torch.ones(B, T) * 0.3)
        for backend in ("torch", "triton")
    ]
    torch.testing.assert_close(results[1][1], results[0][1], atol=1e-7, rtol=1e-4)


def test_packed_rows_with_an_empty_sequence(batch):
    logits, labels, ref_logps = (x.reshape(-1, *x.shape[2:]) for x in batch)
    cu_seqlens = torch.tensor([0, 5, 5, 12, 24], dtype=torch.int32)
    results = [
        run(
            hl.GRPO(perception=hl.Clip(-0.3, 0.2)),
            backend,
            logits,
            labels,
            ref_logps,
            cu_seqlens=cu_seqlens,
            advantages=torch.tensor([1.0, 2.0, -1.0, 0.5]),
        )
        for backend in ("torch", "triton")
    ]
    torch.testing.assert_close(results[1][1], results[0][1], atol=1e-7, rtol=1e-4)


def test_rows_perceived_away_are_written_as_zeros(batch):
    logits, labels, ref_logps = batch
    objective = hl.GRPO(perception=hl.Clip(-0.1, 0.1))
    ref_logps = ref_logps.clone()
    ref_logps[1] += 5.0  # far below the lower bound
    _, grad, stats = run(objective, "triton", logits, labels, ref_logps, **extras(objective))
    assert (grad[1] == 0).all() and (grad[3] == 0).all()
    assert stats["humanline/active_rows"] == (grad.abs().amax(-1) > 0).sum()


class Half(hl.GRPO):
    """Has no device function."""

    def token_loss(self, rows, **kwargs):
        return 0.5 * super().token_loss(rows, **kwargs)


def test_objectives_without_a_device_function_take_two_launches(batch, launches):
    whole = run(hl.GRPO(), "triton", *batch, **extras(hl.GRPO()))
    assert len(launches) == 1
    half = run(Half(), "triton", *batch, **extras(hl.GRPO()))
    assert len(launches) == 1
    torch.testing.assert_close(half[1], 0.5 * whole[1], atol=1e-7, rtol=1e-4)


def test_a_second_backward_is_refused(batch):
    logits, labels, ref_logps = batch
    x = logits.detach().requires_grad_()
    loss, _ = hl.GRPO().from_logits(
        x, labels, ref_logps, backend="triton", **extras(hl.GRPO(), x.device)
    )
    torch.autograd.grad(loss, x, retain_graph=True)
    with pytest.raises(RuntimeError, match="call from_logits again"):
        torch.autograd.grad(loss, x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_gradient_is_rounded_once(batch, dtype):
    logits, labels, ref_logps = batch
    logits = logits.to(dtype)
    objective = hl.GRPO()
    exact = run(objective, "torch", logits.double(), labels, ref_logps, **extras(objective))[1]
    grad = run(objective, "triton", logits, labels, ref_logps, **extras(objective))[1]
    assert grad.dtype == dtype
    torch.testing.assert_close(
        grad.double(), exact, rtol=torch.finfo(dtype).eps / 2 + 1e-4, atol=6e-8
    )


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inplace_gives_the_same_gradient_in_the_logits_buffer(batch, backend, dtype):
    logits, labels, ref_logps = batch
    objective = hl.GRPO(perception=hl.Clip(-0.3, 0.2))
    leaf = logits.to(dtype).contiguous().requires_grad_()
    grads = []
    for inplace in (False, True):
        x = leaf * 1.0
        x.register_hook(lambda grad, x=x: grads.append((grad.clone(), grad.data_ptr())))
        loss, _ = objective.from_logits(
            x, labels, ref_logps, backend=backend, inplace=inplace, **extras(objective, x.device)
        )
        (loss * 0.3).backward()
        assert (grads[-1][1] == x.data_ptr()) == inplace
    assert torch.equal(grads[0][0], grads[1][0])


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("objective", [hl.SFT(), hl.GRPO(beta=0.1), Half()], ids=identify)
@pytest.mark.parametrize("cut", [slice(-1), slice(1, None), slice(2, 5)], ids=str)
def test_inplace_overwrites_what_is_cut_along_t(device, backend, dtype, objective, cut):
    """The rows around the cut stay as they are, and get no gradient."""
    leaf = torch.randn(B, T + 1, V, device=device, dtype=dtype, requires_grad=True)
    length = len(range(T + 1)[cut])
    labels = torch.randint(V, (B, length), device=device)
    labels[1] = -100
    labels[0, :2] = -100
    ref_logps = -torch.rand(B, length, device=device) * 5
    grads = []
    for inplace in (False, True):
        whole = leaf * 1.0
        logits = whole[:, cut]
        kept = whole.detach().clone()
        logits.register_hook(lambda g, x=logits: grads.append(g.data_ptr() == x.data_ptr()))
        loss, _ = objective.from_logits(
            logits,
            labels,
            ref_logps,
            backend=backend,
            inplace=inplace,
            **extras(objective, logits.device),
        )
        (loss * 0.3).backward()
        grads.append(leaf.grad)
        leaf.grad = None
        kept[:, cut], whole = 0, whole.detach()
        whole[:, cut] = 0
        assert torch.equal(whole, kept)
    is_ours, expected, is_ours_inplace, grad = grads
    assert (is_ours, is_ours_inplace) == (False, True)
    # In place an objective without a device function is computed in blocks by torch: half a unit in
    # the last place apart, which a rounding to bfloat16 may make a whole one.
    rtol = max(1e-5, torch.finfo(dtype).eps)
    torch.testing.assert_close(grad, expected, rtol=rtol, atol=1e-8)


def test_inplace_holds_without_a_device_function(batch, launches):
    objective = Half()
    leaf, grads = batch[0].contiguous().requires_grad_(), []
    for inplace in (False, True):
        x = leaf * 1.0
        x.register_hook(lambda grad, x=x: grads.append((grad.clone(), grad.data_ptr())))
        loss, _ = objective.from_logits(
            x, *batch[1:], backend="triton", inplace=inplace, **extras(objective, x.device)
        )
        (loss * 0.3).backward()
        assert (grads[-1][1] == x.data_ptr()) == inplace
    assert not launches
    torch.testing.assert_close(grads[1][0], grads[0][0], atol=1e-7, rtol=1e-4)


def test_float16_gradients_are_not_formed_inplace(batch):
    """They wait for the loss scale: the logits are as they were."""
    leaf = batch[0].half().requires_grad_()
    logits = leaf * 1.0
    loss, _ = hl.SFT().from_logits(logits, batch[1], backend="triton", inplace=True)
    loss.backward()
    assert torch.equal(logits, leaf) and (leaf.grad != 0).any()


def test_inplace_is_noticed_by_whoever_needs_the_logits(batch):
    logits, labels, _ = batch
    leaf = logits.contiguous().requires_grad_()
    x = leaf.exp()  # exp keeps its result for the backward
    loss, _ = hl.SFT().from_logits(x, labels, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    "objective, make, message",
    [
        (hl.DPO(), lambda x: x * 1, "needs a token-level objective"),
        (hl.SFT(), lambda x: x, "rather than a leaf"),
        (hl.SFT(), lambda x: x.view(x.shape), "rather than a leaf"),
        (hl.SFT(), lambda x: (x * 1)[:, :, ::2], "must be contiguous"),
        (hl.SFT(), lambda x: (x * 1)[:, ::2], r"must be contiguous.* shape \[4, 3, 301\]"),
        (hl.SFT(), lambda x: (x * 1).transpose(0, 1), "must be contiguous"),
        (hl.SFT(), lambda x: (x * 1)[:1].expand(4, T, V), r"strides \[0, 301, 1\]"),
    ],
)
def test_inplace_where_it_cannot_be(batch, objective, make, message):
    logits, labels, ref_logps = batch
    x = make(logits.contiguous().requires_grad_())
    labels, ref_logps = (
        r.flatten()[: x.shape[:2].numel()].view(x.shape[:2]) for r in (labels, ref_logps)
    )
    with pytest.raises(ValueError, match=message):
        objective.from_logits(x, labels.clamp(max=9), ref_logps, inplace=True)


@pytest.mark.parametrize(
    "advantages",
    [
        torch.tensor([1.5]),
        torch.tensor(1.5).expand(1, 40),
        torch.arange(80.0).view(1, 40, 2)[..., 0],
    ],
    ids=["one sequence", "expanded", "strided"],
)
def test_row_values_may_be_views(advantages, device):
    logits = torch.randn(1, 40, 50, device=device)
    labels = torch.randint(0, 50, (1, 40, 3), device=device)[..., 1]
    ref_logps = (
        hl.token_logps(logits, labels, backend="torch").unsqueeze(-1).expand(1, 40, 2)[..., 0]
    )
    temperature = torch.tensor([[0.5]], device=device).expand(1, 40)
    results = [
        run(
            hl.PPO(),
            backend,
            logits,
            labels,
            ref_logps,
            advantages=advantages.to(device),
            temperature=temperature,
        )
        for backend in ("torch", "triton")
    ]
    torch.testing.assert_close(results[1][0], results[0][0])
    torch.testing.assert_close(results[1][1], results[0][1], atol=1e-7, rtol=1e-4)


def test_log_probs_of_strided_labels_and_expanded_temperature(device):
    logits = torch.randn(40, 50, device=device)
    labels = torch.randint(0, 50, (40, 2), device=device)[:, 0]
    temperature = torch.tensor(0.5, device=device).expand(40)
    by_torch, by_kernel = (
        hl.token_logps(logits, labels, temperature, backend=backend)
        for backend in ("torch", "triton")
    )
    torch.testing.assert_close(by_kernel, by_torch)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_float16_gradients_meet_the_loss_scale_in_float32(backend, device):
    """1/tokens alone would flush most of the gradient to zero before the scale lifts it."""
    logits = torch.randn(1, 8, 500, device=device).half().requires_grad_()
    labels = torch.randint(0, 500, (1, 8), device=device)
    grads = []
    for x in (logits, logits.detach().double().requires_grad_()):
        chosen = backend if x is logits else "torch"
        loss, _ = hl.SFT().from_logits(x, labels, num_items_in_batch=2**20, backend=chosen)
        grads.append(torch.autograd.grad(loss * 2**20, x)[0])
    torch.testing.assert_close(grads[0].double(), grads[1], rtol=2e-3, atol=1e-7)


@pytest.mark.parametrize("kind", ["log-ratio", "penalty"])
def test_an_absurd_log_ratio_is_the_same_in_the_kernel(kind, device):
    logits = torch.randn(1, 3, 50, device=device)
    labels = torch.randint(0, 50, (1, 3), device=device)
    ref_logps = torch.tensor([[-200.0, -3.0, 200.0]], device=device)
    objective = hl.GRPO() if kind == "log-ratio" else hl.GRPO(beta=1e-36)
    advantages = torch.tensor([1.0], device=device)
    results = [
        run(objective, backend, logits, labels, ref_logps, advantages=advantages)
        for backend in ("torch", "triton")
    ]
    assert results[1][1].isfinite().all()
    torch.testing.assert_close(results[1][1], results[0][1], atol=1e-7, rtol=1e-3)
