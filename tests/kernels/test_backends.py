"""Whole objectives on the Triton backend against the torch backend and float64: what the kernels of
a single op do not show."""

import pytest
import torch
from oracle import BY_NAME, PERCEPTIONS, Data, case_ids, eager_logits, leaf

import humanline as hl

B, T, V, H = 4, 12, 50, 16

SEQUENCE_LEVEL = [
    BY_NAME[name]
    for name in [
        *("dpo-sigmoid", "dpo-ipo", "dpo-sigmoid_norm", "dpo-aot", "dpo-mpo", "kto", "kto-kl"),
        *("kto-apo", "grpo-grpo-importance_sampling_level=sequence", "grpo-vespo"),
        *("grpo-luspo-importance_sampling_level=sequence-beta=0.1", "simpo", "slic"),
    ]
]


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("case", case_ids(SEQUENCE_LEVEL))
def test_sequence_level_objectives_from_logits(case, packed):
    """One sequence is empty; the reference's log-probs are float64."""
    data, perception = Data(), PERCEPTIONS["clip"]
    logits = data.shaped(eager_logits(data.hidden, data.weight), packed)
    temperature = data.shaped(data.temperature, packed)
    results = []
    for dtype, backend in ((torch.float64, "torch"), (torch.float32, "triton")):
        x = leaf(logits.to(dtype))
        loss, stats = data.from_logits(
            case, perception, x, packed, temperature=temperature, backend=backend
        )
        (0.3 * loss).backward()
        results.append((loss.detach().double(), x.grad.double(), stats))
    (truth, truth_grad, truth_stats), (loss, grad, stats) = results
    torch.testing.assert_close(loss, truth, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad, truth_grad, rtol=1e-5, atol=1e-7)
    assert (grad != 0).any() and stats.keys() == truth_stats.keys()
    for name, value in truth_stats.items():
        torch.testing.assert_close(
            stats[name].double(), value.double(), rtol=1e-5, atol=1e-6, equal_nan=True, msg=name
        )


@pytest.mark.parametrize("entry", ["logits", "hidden"])
@pytest.mark.parametrize("seed", [7, None])
@pytest.mark.parametrize(
    "objective, extra",
    [
        (hl.DPO, {}),
        (hl.KTO, {"desirable": torch.arange(B) % 2 == 0, "z0": 0.1}),
        (hl.GRPO, {"advantages": torch.tensor([1.0, -0.7, 0.4, 2.0])}),
    ],
    ids=["DPO", "KTO", "GRPO"],
)
def test_rejection_takes_the_same_tokens_on_both_backends(objective, extra, seed, entry, device):
    hidden, weight = torch.randn(B, T, H, device=device), torch.randn(V, H, device=device) / 4
    labels = torch.randint(0, V, (B, T), device=device)
    labels[0, :3] = -100
    ref_logps = hl.linear_token_logps(hidden, weight, labels, backend="torch")
    ref_logps += 0.3 * torch.randn(B, T, device=device)
    perception = hl.BetaRejection(gamma_P=0.3, gamma_R=0.3, seed=seed)
    extra = {k: torch.as_tensor(v).to(device) for k, v in extra.items()}
    results = []
    for backend in ("torch", "triton"):
        torch.manual_seed(3)  # where the perception has no seed, it takes torch's
        rows = (hidden if entry == "hidden" else hidden @ weight.T).detach().requires_grad_()
        given = (rows, weight) if entry == "hidden" else (rows,)
        loss, stats = getattr(objective(perception=perception), f"from_{entry}")(
            *given, labels, ref_logps, backend=backend, **extra
        )
        (grad,) = torch.autograd.grad(loss, rows)
        results.append((loss.detach(), grad, stats["humanline/unclamped"]))
    kept = [(grad != 0).any(-1) for _, grad, _ in results]
    assert torch.equal(*kept) and 0.2 < kept[0].float().mean() < 0.8
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-7)
