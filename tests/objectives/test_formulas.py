"""Objectives that TRL does not have in this form, against their formulas written out by hand."""

import pytest
import torch
from oracle import BY_NAME, Data, close, gradients, leaf

import humanline as hl

DATA = Data()


def tokens(x, b):
    """A sequence's completion tokens, one scalar each."""
    return [x[b, t] for t in range(DATA.T) if DATA.mask[b, t]]


def log_sigmoid(x):
    return -torch.log(1 + torch.exp(-x))


def mean(xs):
    return sum(xs) / len(xs)


def compare(objective, formula, *inputs, **batch):
    """Value and gradient of an objective, and of a formula of the same inputs."""
    inputs = [leaf(x) for x in inputs]
    batch |= {"entropy": inputs[1]} if len(inputs) > 1 else {}
    loss, stats = objective.from_logps(inputs[0], DATA.ref, DATA.mask, **batch)
    expected = formula(*inputs)
    close(loss.detach(), expected.detach())
    close(gradients(loss, *inputs), gradients(expected, *inputs))
    return stats


# Pairs: sequences 0 and 1 are chosen, 2 (empty) and 3 are rejected.


def totals(logps):
    return [sum(tokens(logps, b), start=torch.zeros(()).double()) for b in range(DATA.B)]


def averages(logps):
    return [x / max(len(tokens(logps, b)), 1) for b, x in enumerate(totals(logps))]


@pytest.mark.parametrize(("beta", "gamma"), [(2.0, 0.5), (10.0, 0.0)])
def test_simpo_is_its_formula(beta, gamma):
    def formula(logps):
        r = [beta * x for x in averages(logps)]
        return mean([-log_sigmoid(r[0] - r[2] - gamma), -log_sigmoid(r[1] - r[3] - gamma)])

    compare(hl.SimPO(beta=beta, gamma=gamma), formula, DATA.logps)


def test_simpos_rewards_are_scaled_mean_log_probs():
    _, stats = hl.SimPO(beta=3.0).from_logps(DATA.logps, None, DATA.mask)
    r = [3.0 * x for x in averages(DATA.logps)]
    close(stats["rewards/chosen"], (r[0] + r[1]) / 2)
    close(stats["rewards/rejected"], (r[2] + r[3]) / 2)
    close(stats["rewards/margins"], (r[0] + r[1] - r[2] - r[3]) / 2)
    close(stats["rewards/accuracies"], ((r[0] > r[2]).double() + (r[1] > r[3])) / 2)


@pytest.mark.parametrize(("delta", "lambda_coef"), [(1.0, 0.1), (5.0, 0.0), (0.0, 1.0)])
def test_slic_is_its_formula(delta, lambda_coef):
    def formula(logps):
        s = totals(logps)
        hinges = [(delta - s[0] + s[2]).clamp(min=0), (delta - s[1] + s[3]).clamp(min=0)]
        return mean([h - lambda_coef * w for h, w in zip(hinges, s[:2], strict=True)])

    compare(hl.SLiC(delta=delta, lambda_coef=lambda_coef), formula, DATA.logps)


@pytest.mark.parametrize("items", [None, 20, torch.tensor(20)])
def test_sft_is_the_mean_negative_log_likelihood(items):
    def formula(logps):
        n = DATA.mask.sum() if items is None else 20
        return -sum(totals(logps)) / n

    stats = compare(hl.SFT(), formula, DATA.logps, num_items_in_batch=items)
    close(stats["logps/mean"], sum(totals(DATA.logps)) / DATA.mask.sum())


def kl_of(name, d):
    return d if name == "k1" else torch.exp(-d) + d - 1


@pytest.mark.parametrize("kl_estimator", ["k1", "k3"])
@pytest.mark.parametrize("beta", [0.0, 0.4])
@pytest.mark.parametrize("entropy_coef", [0.0, 0.1])
@pytest.mark.parametrize("old", [True, False], ids=["old", "reference"])
def test_ppo_is_its_formula(kl_estimator, beta, entropy_coef, old):
    low, high = 0.1, 0.25

    def formula(logps, entropy):
        terms = []
        for b in range(DATA.B):
            anchor = tokens(DATA.old if old else DATA.ref, b)
            rows = zip(
                *(tokens(x, b) for x in (logps, entropy, DATA.ref, DATA.row_advantages)),
                anchor,
                strict=True,
            )
            for lp, h, ref, a, before in rows:
                r = torch.exp(lp - before)
                surrogate = -min(a * r, a * r.clamp(1 - low, 1 + high))
                terms.append(surrogate + beta * kl_of(kl_estimator, lp - ref) - entropy_coef * h)
        return mean(terms)

    objective = hl.PPO(
        epsilon=low,
        epsilon_high=high,
        beta=beta,
        kl_estimator=kl_estimator,
        entropy_coef=entropy_coef,
    )
    batch = {"advantages": DATA.row_advantages} | ({"old_logps": DATA.old} if old else {})
    stats = compare(objective, formula, DATA.logps, DATA.entropy, **batch)
    if beta:
        d = (DATA.logps - DATA.ref)[DATA.mask]
        close(stats["kl"], kl_of(kl_estimator, d).mean())
    if entropy_coef:
        close(stats["entropy"], DATA.entropy[DATA.mask].mean())


def test_ppo_repeats_an_advantage_a_sequence_on_its_tokens():
    case = BY_NAME["ppo"]
    spread = DATA.advantages[:, None].expand(DATA.B, DATA.T)
    results = [
        DATA.from_logps(case, hl.Clip(), advantages=advantages)
        for advantages in (DATA.advantages, spread)
    ]
    close(*results)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_dpo_with_label_smoothing_is_cdpo(label_smoothing):
    beta, e = 0.3, label_smoothing

    def formula(logps):
        r = [beta * x for x in totals(logps - DATA.ref)]
        x = [r[0] - r[2], r[1] - r[3]]
        return mean([-(1 - e) * log_sigmoid(x) - e * log_sigmoid(-x) for x in x])

    compare(hl.DPO(beta=beta, label_smoothing=e), formula, DATA.logps)


def test_dpo_clips_tokens_before_they_are_summed():
    def formula(logps):
        c = totals((logps - DATA.ref).clamp(-0.4, 0.3))
        return mean([-log_sigmoid(0.1 * (c[0] - c[2])), -log_sigmoid(0.1 * (c[1] - c[3]))])

    compare(hl.DPO(beta=0.1, perception=hl.Clip(-0.4, 0.3)), formula, DATA.logps)


def test_ktos_reference_point_is_the_perceived_mean_clamped_at_zero():
    case, d = BY_NAME["kto-kl"], torch.where(DATA.kl_mask, DATA.kl_logps - DATA.kl_ref_logps, 0)
    expected = torch.where(DATA.kl_mask, d.clamp(-0.1, 0.4), 0).sum(1).mean()
    assert 0 < expected < d.sum(1).mean()
    close(DATA.from_logps(case, hl.Clip(-0.1, 0.4))[1]["kl"], expected)
    below = DATA.from_logps(case, hl.Clip(-0.4, -0.1))[1]["kl"]
    assert below == 0


def test_ktos_reference_point_from_packed_pairs_is_that_of_padded_ones():
    case, keep = BY_NAME["kto-kl"], torch.arange(4) < torch.tensor([4, 0, 3])[:, None]
    mask = DATA.kl_mask & keep
    _, expected = DATA.from_logps(case, hl.Clip(), kl_mask=mask)
    _, stats = DATA.from_logps(
        *(case, hl.Clip()),
        kl_logps=DATA.kl_logps[keep],
        kl_ref_logps=DATA.kl_ref_logps[keep],
        kl_mask=mask[keep],
        kl_cu_seqlens=torch.tensor([0, 4, 4, 7]),
    )
    close(stats["kl"], expected["kl"])
    assert expected["kl"] > 0


def test_grpo_takes_its_ratio_to_the_reference_unless_told_otherwise():
    case = BY_NAME["grpo-grpo"]
    with_old = DATA.from_logps(case, hl.Clip(), old_logps=DATA.ref)
    close(DATA.from_logps(case, hl.Clip(), old_logps=None), with_old)


def test_grpos_penalty_is_not_perceived():
    """k3 of the whole log-ratio, however narrow the bounds."""
    logps = leaf(DATA.logps)
    objective = hl.GRPO(
        loss_type="bnpo", beta=0.5, use_bias_correction_kl=False, perception=hl.Clip(0.0, 0.0)
    )
    loss, _ = objective.from_logps(
        *(logps, DATA.ref, DATA.mask), advantages=torch.zeros(DATA.B).double()
    )
    d = (logps - DATA.ref)[DATA.mask]
    expected = 0.5 * kl_of("k3", d).mean()
    close(loss.detach(), expected.detach())
    close(gradients(loss, logps), gradients(expected, logps))


def test_dapo_counts_the_batchs_own_tokens_if_not_told_how_many():
    case = BY_NAME["grpo-dapo"]
    own, _ = DATA.from_logps(case, hl.Clip())
    told, _ = DATA.from_logps(case, hl.Clip(), num_items_in_batch=int(DATA.mask.sum()))
    close(own, told)


def test_empty_sequences_do_not_enter_the_extremes_of_clipping():
    """Every token of the others is clipped from below."""
    _, stats = hl.GRPO().from_logps(
        *(DATA.logps, DATA.logps + 1, DATA.mask), advantages=-torch.ones(DATA.B).double()
    )
    assert not DATA.mask[2].any()
    assert stats["clip_ratio/low_min"] == 1 and stats["clip_ratio/high_max"] == 0


@pytest.mark.parametrize("loss_type", ["cispo", "vespo"])
@pytest.mark.parametrize(
    "perception",
    [hl.Clip(-0.3, 0.2), hl.BetaRejection(0.3, 0.3, seed=2), hl.ProspectWeight()],
    ids=lambda p: type(p).__name__,
)
def test_losses_on_the_log_prob_itself_follow_the_perceptions_gradient(loss_type, perception):
    """Their coefficient is ``−weight(c)·A·dc/dd``: detached weights do not carry the rule."""
    torch.manual_seed(0)
    d = torch.randn(3, 5, dtype=torch.float64) * 0.5
    mask = torch.ones(3, 5, dtype=torch.bool)
    ref_logps = torch.full_like(d, -2.0)
    advantages = torch.tensor([1.0, -1.0, 0.5], dtype=torch.float64)

    def coefficients(log_ratio, perception):
        logps = (ref_logps + log_ratio).requires_grad_()
        loss, stats = hl.GRPO(
            loss_type=loss_type, epsilon_high=1.4, perception=perception
        ).from_logps(logps, ref_logps, mask, advantages=advantages)
        (grad,) = torch.autograd.grad(loss, logps)
        assert stats["humanline/active_rows"] == (grad != 0).sum()
        return grad

    flat = d.reshape(-1).clone().requires_grad_()
    c, _ = perception.perceive(flat, mask.reshape(-1))
    (slope,) = torch.autograd.grad(c.sum(), flat)
    expected = coefficients(c.detach().view_as(d), hl.Identity()) * slope.view_as(d)
    torch.testing.assert_close(coefficients(d, perception), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("d", [-120.0, 120.0, 800.0])
@pytest.mark.parametrize("advantage", [1.0, 0.0, -1.0])
@pytest.mark.parametrize(
    "objective",
    [
        hl.GRPO(),
        hl.GRPO(delta=2.0),
        hl.GRPO(loss_type="sapo"),
        hl.GRPO(loss_type="cispo", epsilon_high=5.0),
        hl.GRPO(beta=0.1),
        hl.PPO(beta=0.1),
    ],
    ids=str,
)
def test_an_absurd_log_ratio_does_not_spoil_the_batch(objective, advantage, d):
    logps = torch.tensor([[-2.0, -2.0]], requires_grad=True)
    ref_logps = torch.tensor([[-2.0 - d, -2.1]])
    loss, _ = objective.from_logps(
        logps, ref_logps, torch.ones(1, 2), advantages=torch.tensor([advantage])
    )
    (grad,) = torch.autograd.grad(loss, logps)
    assert loss.isfinite() and grad.isfinite().all()
    if d > 0 and advantage > 0 and objective == hl.GRPO():
        assert grad[0, 0] == 0  # clipped by the surrogate
