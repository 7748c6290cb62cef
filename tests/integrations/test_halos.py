"""HALOs' two functions and its configuration, against its own formulas written out."""

import pytest
import torch
import torch.nn.functional as F
from oracle import close, leaf

import humanline as hl
from humanline.integrations import halos

B, T = 4, 5
MASK = torch.arange(T) < torch.tensor([5, 3, 4, 2])[:, None]
RNG = torch.Generator().manual_seed(0)
POLICY = (-torch.rand(B, T, generator=RNG, dtype=torch.float64) - 0.1) * MASK
REF = (POLICY + 0.5 * torch.randn(B, T, generator=RNG, dtype=torch.float64)) * MASK
CHOSEN, REJECTED = slice(None, B // 2), slice(B // 2, None)
BOUNDS = {"humanline": True, "log_epsilon_P": -0.4, "log_epsilon_R": 0.3}


class Trainer:
    """What the functions see of HALOs' BasicTrainer."""

    get_ratios = halos.get_ratios
    get_sequence_rewards = halos.get_sequence_rewards

    def __init__(self, humanline=True, log_epsilon_P=-0.4, log_epsilon_R=0.3):
        bounds = {"log_epsilon_P": log_epsilon_P, "log_epsilon_R": log_epsilon_R}
        self.config = Config(humanline=humanline, **bounds)


class Config(dict):
    """OmegaConf's: options are items and attributes."""

    __getattr__ = dict.__getitem__


def clamped(policy=POLICY, ref=REF):
    return (policy - ref).clamp(-0.4, 0.3)


@pytest.mark.parametrize("length_normalized", [False, True])
@pytest.mark.parametrize("humanline", [True, False])
def test_sequence_rewards_are_those_of_halos(humanline, length_normalized):
    policy, theirs = leaf(POLICY), leaf(POLICY)
    rewards, unclamped = Trainer(humanline).get_sequence_rewards(policy, REF, length_normalized)
    tokens = clamped(theirs) if humanline else theirs - REF
    expected = tokens.sum(-1) / (MASK.sum(-1) if length_normalized else 1)
    close(rewards, expected)
    weight = torch.tensor([1.0, 2.0, -3.0, 4.0], dtype=torch.float64)
    (rewards * weight).sum().backward()
    (expected * weight).sum().backward()
    close(policy.grad * MASK, theirs.grad * MASK)
    d = (POLICY - REF)[MASK]
    share = ((d > -0.4) & (d < 0.3)).double().mean() if humanline else 1.0
    assert float(unclamped) == pytest.approx(float(share)) and unclamped.shape == ()
    assert (share < 1) == humanline


@pytest.mark.parametrize("humanline", [True, False])
def test_ratios_are_those_of_halos(humanline):
    ratios, _ = Trainer(humanline).get_ratios(POLICY, REF)
    close(ratios, (clamped() if humanline else POLICY - REF).exp())
    assert (ratios[~MASK] == 1).all()


# Where they differ on purpose


def test_a_policy_that_equals_its_reference_has_tokens():
    policy = leaf(POLICY)
    rewards, unclamped = Trainer().get_sequence_rewards(policy, POLICY, length_normalized=True)
    assert (rewards == 0).all() and unclamped == 1
    rewards.sum().backward()
    close(policy.grad, MASK / MASK.sum(-1, keepdim=True).double())


def test_a_sequence_without_tokens_has_reward_0():
    nothing = torch.zeros(1, T)
    rewards, unclamped = Trainer().get_sequence_rewards(nothing, nothing, length_normalized=True)
    assert rewards.tolist() == [0] and unclamped == 0


def test_padding_has_no_reward_whatever_the_bounds():
    trainer = Trainer(log_epsilon_P=0.1, log_epsilon_R=0.6)
    rewards, _ = trainer.get_sequence_rewards(POLICY, REF)
    close(rewards, ((POLICY - REF).clamp(0.1, 0.6) * MASK).sum(-1))
    assert (trainer.get_ratios(POLICY, REF)[0][~MASK] == 1).all()


def test_tokens_clamped_to_0_count():
    trainer = Trainer(log_epsilon_P=0.0, log_epsilon_R=0.6)
    rewards, _ = trainer.get_sequence_rewards(POLICY, REF, length_normalized=True)
    close(rewards, (POLICY - REF).clamp(0, 0.6).sum(-1) / MASK.sum(-1))


# The configuration


def logsigmoid_margin(beta):
    rewards = beta * clamped().sum(-1)
    return F.logsigmoid(rewards[CHOSEN] - rewards[REJECTED])


def masked_mean(x):
    return (x * MASK).sum() / MASK.sum()


ADVANTAGES = torch.tensor([0.7, -1.2, 0.4, 0.9], dtype=torch.float64)
DESIRABLE = torch.tensor([True, False, True, True])
LOSSES = {  # HALOs' own defaults where nothing else is needed to see every option
    "DPOTrainer": ({"beta": 0.3}, {}, lambda: -logsigmoid_margin(0.3).mean()),
    "CDPOTrainer": (
        {"beta": 0.3, "epsilon": 0.2},
        {},
        lambda: (-0.8 * logsigmoid_margin(0.3) - 0.2 * logsigmoid_margin(-0.3)).mean(),
    ),
    "IPOTrainer": (
        {"tau": 0.2},
        {},
        lambda: ((_per_token(CHOSEN) - _per_token(REJECTED) - 1 / 0.4) ** 2).mean(),
    ),
    "KTOTrainer": (
        {"beta": 0.3, "desirable_weight": 1.5, "undesirable_weight": 0.5},
        {"desirable": DESIRABLE, "z0": 0.1},
        lambda: torch.where(
            DESIRABLE,
            1.5 * (1 - torch.sigmoid(0.3 * (clamped().sum(-1) - 0.1))),
            0.5 * (1 - torch.sigmoid(0.3 * (0.1 - clamped().sum(-1)))),
        ).mean(),
    ),
    "GRPOTrainer": (
        {"beta": 0.05, "epsilon": 0.1},
        {"advantages": ADVANTAGES},
        lambda: masked_mean(_surrogate(0.1) + 0.05 * ((REF - POLICY).exp() - (REF - POLICY) - 1)),
    ),
    "PPOTrainer": (
        {"cliprange": 0.1, "KL_coef": 0.05},
        {"advantages": ADVANTAGES},
        lambda: masked_mean(_surrogate(0.1)) + 0.05 * masked_mean(POLICY - REF),
    ),
}


def _per_token(which):
    return clamped()[which].sum(-1) / MASK[which].sum(-1)


def _surrogate(epsilon):
    advantages, ratio = ADVANTAGES[:, None], clamped().exp()
    return -torch.min(advantages * ratio, advantages * ratio.clamp(1 - epsilon, 1 + epsilon))


@pytest.mark.parametrize("trainer", LOSSES)
def test_a_configuration_gives_halos_loss(trainer):
    loss, batch, expected = LOSSES[trainer]
    objective, sync_every = halos.from_config(BOUNDS | {"loss": loss | {"trainer": trainer}})
    close(objective.from_logps(POLICY, REF, MASK, **batch)[0], expected())
    assert sync_every == 1


def test_reference_free_configurations():
    plain = BOUNDS | {"humanline": False}
    simpo = {"trainer": "SimPOTrainer", "beta": 2.0, "gamma_beta_ratio": 0.3}
    objective, sync_every = halos.from_config(plain | {"loss": simpo})
    mean = POLICY.sum(-1) / MASK.sum(-1)
    expected = -F.logsigmoid(2.0 * (mean[CHOSEN] - mean[REJECTED] - 0.3)).mean()
    close(objective.from_logps(POLICY, None, MASK)[0], expected)
    assert sync_every == 0
    slic = {"trainer": "SLiCTrainer", "beta": 1.0, "lambda_coef": 0.1}
    assert halos.from_config(plain | {"loss": slic})[0] == hl.SLiC(delta=1.0, lambda_coef=0.1)
    assert halos.from_config(plain | {"loss": {"trainer": "SFTTrainer"}})[0] == hl.SFT()
    for name, loss in (("SimPO", simpo), ("SLiC", slic), ("SFT", {"trainer": "SFTTrainer"})):
        with pytest.raises(ValueError, match=f"{name} is reference-free"):
            halos.from_config(BOUNDS | {"loss": loss})


@pytest.mark.parametrize("humanline, sync, every", [(False, False, 0), (False, True, 1)])
def test_who_asks_for_a_synced_reference(humanline, sync, every):
    loss = {"trainer": "DPOTrainer", "beta": 0.1, "sync_reference": sync}
    objective, sync_every = halos.from_config(BOUNDS | {"humanline": humanline, "loss": loss})
    assert objective == hl.DPO(beta=0.1) and sync_every == every


def test_trainers_without_a_counterpart():
    with pytest.raises(ValueError, match="no objective for HALOs' 'BradleyTerryTrainer'; known: S"):
        halos.from_config(BOUNDS | {"loss": {"trainer": "BradleyTerryTrainer"}})
