"""The policy loss "humanline", in verl where it is installed and in a transcription of it."""

import importlib
import re
import sys
from types import SimpleNamespace

import pytest
import torch
import verl_double
from oracle import close, leaf

import humanline as hl
from humanline import install

B, T = 4, 5
MASK = torch.arange(T) < torch.tensor([5, 3, 4, 1])[:, None]
RNG = torch.Generator().manual_seed(0)
OLD = -torch.rand(B, T, generator=RNG, dtype=torch.float64) * 3
LOGPS = OLD + 0.4 * torch.randn(B, T, generator=RNG, dtype=torch.float64)
ADVANTAGES = torch.randn(B, T, generator=RNG, dtype=torch.float64)
CLIP = hl.Clip(-0.3, 0.25)

#: Our own loss type of each of verl's aggregations.
LOSS_TYPES = {
    "token-mean": {"loss_type": "bnpo"},
    "seq-mean-token-mean": {"loss_type": "grpo"},
    "seq-mean-token-sum": {"loss_type": "luspo"},
    "seq-mean-token-sum-norm": {"loss_type": "dr_grpo", "max_completion_length": T},
}


@pytest.fixture(params=["installed", "transcription"])
def integration(request, monkeypatch):
    """humanline.integrations.verl, freshly imported, and verl's look-up of a policy loss."""
    if request.param == "transcription":
        verl_double.install(monkeypatch)
        find = verl_double.get_policy_loss_fn
    else:
        reason = "verl (or something it imports) is not installed"
        core = pytest.importorskip(
            "verl.trainer.ppo.core_algos", reason=reason, exc_type=ImportError
        )
        find = core.get_policy_loss_fn
    monkeypatch.delitem(sys.modules, "humanline.integrations.verl", raising=False)
    module = importlib.import_module("humanline.integrations.verl")
    yield SimpleNamespace(register=module.register, find=find)
    sys.modules.pop("humanline.integrations.verl", None)


class Config(SimpleNamespace):
    def get(self, name, default=None):
        return getattr(self, name, default)


def config(clip_ratio_c=1e9, **global_batch_info):
    ratios = {"clip_ratio": 0.2, "clip_ratio_low": 0.2, "clip_ratio_high": 0.28}
    return Config(**ratios, clip_ratio_c=clip_ratio_c, global_batch_info=global_batch_info)


def run(loss, logps, mode="token-mean", settings=None, **weights):
    """As verl calls it."""
    return loss(
        old_log_prob=OLD,
        log_prob=logps,
        advantages=ADVANTAGES,
        response_mask=MASK,
        loss_agg_mode=mode,
        config=settings or config(),
        **{"rollout_is_weights": None, **weights},
    )


@pytest.mark.parametrize("mode", LOSS_TYPES)
def test_it_is_our_own_loss(mode, integration):
    integration.register(CLIP)
    logps, ours = leaf(LOGPS), leaf(LOGPS)
    loss, metrics = run(integration.find("humanline"), logps, mode)
    objective = hl.GRPO(epsilon=0.2, epsilon_high=0.28, perception=CLIP, **LOSS_TYPES[mode])
    expected, stats = objective.from_logps(ours, OLD, MASK, advantages=ADVANTAGES)
    close(loss, expected)
    loss.backward()
    expected.backward()
    close(logps.grad, ours.grad)
    d = (LOGPS - OLD)[MASK]
    assert (logps.grad[MASK][(d < -0.3) | (d > 0.25)] == 0).all()
    assert 0 < metrics["actor/humanline_unclamped"] < 1
    assert metrics["actor/humanline_unclamped"] == pytest.approx(
        float(stats["humanline/unclamped"])
    )
    assert metrics["actor/ppo_kl"] == pytest.approx(-d.mean().item())


def test_without_bounds_it_is_the_vanilla_loss(integration):
    integration.register(hl.Identity(), name="unperceived")
    weights = {"rollout_is_weights": torch.rand(B, T, generator=RNG, dtype=torch.float64)}
    global_batch = {"dp_size": 2, "batch_num_tokens": 40, "global_batch_size": 8}
    settings = config(clip_ratio_c=1.05, **global_batch, loss_scale_factor=9)
    for mode in LOSS_TYPES:
        results = []
        for name in ("unperceived", "vanilla"):
            logps = leaf(LOGPS)
            loss, metrics = run(integration.find(name), logps, mode, settings, **weights)
            loss.backward()
            results.append((loss, logps.grad, metrics))
        (loss, grad, metrics), (vanilla_loss, vanilla_grad, vanilla_metrics) = results
        close(loss, vanilla_loss)
        close(grad, vanilla_grad)
        assert metrics.pop("actor/humanline_unclamped") == 1
        assert metrics == pytest.approx(vanilla_metrics)
        assert metrics["actor/pg_clipfrac_lower"] > 0  # or the dual clip was not tried


def test_importing_it_registers_the_default_bounds(integration):
    default, _ = run(integration.find("humanline"), LOGPS - 5)
    integration.register(hl.Clip())
    close(default, run(integration.find("humanline"), LOGPS - 5)[0])
    integration.register(CLIP)
    assert default != run(integration.find("humanline"), LOGPS - 5)[0]


def test_padding_does_not_matter(integration):
    logps = leaf(torch.where(MASK, LOGPS, torch.nan))
    loss, metrics = run(integration.find("humanline"), logps)
    loss.backward()
    assert loss.isfinite() and logps.grad.isfinite().all()
    assert metrics["actor/ppo_kl"] == pytest.approx((OLD - LOGPS)[MASK].mean().item())


def test_the_reported_kl_is_bounded_as_in_the_vanilla_loss(integration):
    far = torch.where(MASK.cumsum(1) == 1, LOGPS - 90, LOGPS)
    _, metrics = run(integration.find("humanline"), leaf(far))
    expected = (OLD - far).clamp(-20, 20)[MASK].mean().item()
    assert metrics["actor/ppo_kl"] == pytest.approx(expected)


def test_bad_perceptions_are_refused(integration):
    with pytest.raises(TypeError, match=r"humanline Perception such as Clip\(\), got 0.2"):
        integration.register(0.2)


def test_without_verl_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "verl.trainer.ppo.core_algos", None)
    monkeypatch.delitem(sys.modules, "humanline.integrations.verl", raising=False)
    with pytest.raises(ImportError, match=re.escape(install.command("verl"))):
        importlib.import_module("humanline.integrations.verl")
