"""Whatever lies on a masked row has no effect: not on the loss, nor on any valid row's gradient."""

import math
from dataclasses import dataclass

import pytest
import torch

import humanline as hl
from humanline.ops.backend import interpreting

B, T, V, H = 4, 6, 33, 16
BACKENDS = ["torch", *(["triton"] if interpreting() or torch.cuda.is_available() else [])]
TOKEN = {"advantages": torch.linspace(-1, 1, B * T).view(B, T)}


@dataclass(frozen=True)
class Weighted(hl.TokenObjective):
    """One of a user's own, with a batch tensor that the library has never heard of."""

    def token_loss(self, rows, *, importance):
        return rows.token_mean(importance * rows.log_ratio)


@dataclass(frozen=True)
class WeightedSequences(hl.Objective):
    """The same, on sequences; its batch tensor arrives as it was given."""

    def loss(self, rows, *, importance):
        return rows.layout.sum(importance.reshape(-1) * rows.log_ratio).exp().mean()


OLD = {"old_logps": -math.log(V) + 0.1 * torch.linspace(-1, 1, B * T).view(B, T)}
CASES = {
    "GRPO": (hl.GRPO(), TOKEN),
    "GRPO, old": (hl.GRPO(beta=0.1), TOKEN | OLD),
    "GSPO": (hl.GRPO(importance_sampling_level="sequence"), TOKEN),
    "GRPO, Clip": (hl.GRPO(perception=hl.Clip(-0.5, 0.5)), TOKEN),
    "PPO": (hl.PPO(beta=0.1), TOKEN | OLD),
    "DPO": (hl.DPO(), {}),
    "DPO, IPO": (hl.DPO(loss_type="ipo"), {}),
    "KTO": (hl.KTO(), {"desirable": torch.arange(B) % 2 == 0, "z0": torch.tensor(0.1)}),
    "SFT": (hl.SFT(), {}),
    "own": (Weighted(), {"importance": TOKEN["advantages"]}),
    "own, of sequences": (WeightedSequences(), {"importance": TOKEN["advantages"]}),
}


def near():
    """Log-probs close to the uniform ones, so that ratios stay near 1 and gradients flow."""
    return -math.log(V) + 0.1 * torch.rand(B, T)


def mask():
    m = torch.ones(B, T, dtype=torch.bool)
    m[0, :3] = m[2, -1] = m[3] = False  # one sequence has no completion at all
    return m


def spoilt(x, value):
    return x.masked_fill(~mask(), value) if torch.is_tensor(x) and x.shape == (B, T) else x


def assert_untouched(step, leaf, batch):
    """The same with every value of every batch tensor on a masked row replaced."""
    results = []
    for value in (0.0, math.nan, math.inf, -math.inf, 1e30):
        leaf.grad = None
        loss, stats = step({k: spoilt(x, value) for k, x in batch.items()})
        loss.backward()
        results.append((loss.detach(), leaf.grad.clone(), stats))
    (loss, grad, stats), *others = results
    assert torch.isfinite(loss) and torch.isfinite(grad).all() and grad.any()
    for other_loss, other_grad, other_stats in others:
        assert torch.equal(other_loss, loss) and torch.equal(other_grad, grad)
        for name, x in stats.items():
            assert torch.equal(other_stats[name], x), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_from_logps(case, backend, packed):
    objective, batch = CASES[case]
    logps = near().requires_grad_()
    batch = batch | {"ref": near()}
    if not objective.needs_reference:
        batch["ref"] = None

    def step(batch):
        batch = dict(batch)
        options, m, p = {}, mask(), logps
        if packed:
            batch = {k: flat(x) for k, x in batch.items()}
            m, p = m.reshape(-1), p.reshape(-1)
            options["cu_seqlens"] = torch.arange(B + 1, dtype=torch.int32) * T
        ref = batch.pop("ref")
        return objective.from_logps(p, ref, m, backend=backend, **options, **batch)

    assert_untouched(step, logps, batch)


def flat(x):
    return x.reshape(-1) if torch.is_tensor(x) and x.shape == (B, T) else x


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("entry", ["logits", "hidden"])
def test_from_logits_and_hidden_states(case, entry, backend):
    objective, batch = CASES[case]
    labels = torch.randint(V, (B, T)).masked_fill(~mask(), -100)
    batch = batch | {"ref_logps": near(), "temperature": torch.rand(B, T) + 0.5}
    if not objective.needs_reference:
        batch["ref_logps"] = None
    weight = torch.randn(V, H)
    leaf = (0.02 * torch.randn(B, T, V if entry == "logits" else H)).requires_grad_()

    def step(batch):
        batch = dict(batch)
        batch["temperature"] = batch["temperature"].nan_to_num(1.0, posinf=1.0, neginf=1.0)
        rest = (labels,) if entry == "logits" else (weight, labels)
        return getattr(objective, f"from_{entry}")(leaf, *rest, backend=backend, **batch)

    assert_untouched(step, leaf, batch)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_wholly_masked_sequences_own_value_has_no_effect(backend):
    logps, ref = (-torch.rand(B, T)).requires_grad_(), -torch.rand(B, T)
    for level in ("token", "sequence"):
        objective = hl.GRPO(importance_sampling_level=level)
        grads = []
        for value in (0.0, math.nan, math.inf):
            logps.grad = None
            advantages = torch.tensor([1.0, -1.0, 0.5, value])
            loss, _ = objective.from_logps(
                logps, ref, mask(), advantages=advantages, backend=backend
            )
            loss.backward()
            grads.append(logps.grad)
        assert torch.isfinite(grads[0]).all()
        assert torch.equal(grads[1], grads[0]) and torch.equal(grads[2], grads[0])
