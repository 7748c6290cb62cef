"""Perceptions: value, gradient, statistics."""

import math

import pytest
import torch
from oracle import (
    FEW,
    PERCEPTIONS,
    WITH_REFERENCE,
    Data,
    capacity,
    case_ids,
    close,
    gradients,
    leaf,
)

import humanline as hl
from humanline.perception import capacity as torch_capacity

INF = math.inf
DATA = Data()


def perceive(perception, d, mask=None):
    """Perceived log-ratios, the gradient of their sum, the unclamped tokens."""
    mask = torch.ones_like(d, dtype=torch.bool) if mask is None else mask
    d = leaf(d)
    c, unclamped = perception.perceive(d, mask)
    return c.detach(), gradients(c.sum(), d)[0], unclamped


def evaluate(case, perception):
    logps = leaf(DATA.logps)
    loss, stats = DATA.from_logps(case, perception, logps)
    return loss.detach(), gradients(loss, logps)[0], stats


# Identity and Clip


@pytest.mark.parametrize("case", case_ids(WITH_REFERENCE))
def test_unbounded_clip_is_identity(case):
    loss, grad, _ = evaluate(case, hl.Clip(-INF, INF))
    expected_loss, expected_grad, _ = evaluate(case, hl.Identity())
    assert torch.equal(loss, expected_loss)
    assert torch.equal(grad, expected_grad)


@pytest.mark.parametrize("case", case_ids(WITH_REFERENCE))
@pytest.mark.parametrize("bounds", [(0.1, 0.6), (-0.5, -0.2)])
def test_padding_stays_at_zero_when_the_bounds_do_not_bracket_it(case, bounds):
    loss, grad, _ = evaluate(case, hl.Clip(*bounds))
    longer = Data()
    for name in Data.rows:
        x = getattr(longer, name)
        filler = {torch.bool: False, torch.int64: -100}.get(x.dtype, 41.0)
        setattr(longer, name, torch.nn.functional.pad(x, (2, 3), value=filler))
    if "kl" in case.batch:
        longer.kl_logps, longer.kl_ref_logps, longer.kl_mask = (
            torch.nn.functional.pad(x, (2, 3), value=filler)
            for x, filler in ((DATA.kl_logps, 9.0), (DATA.kl_ref_logps, 5.0), (DATA.kl_mask, False))
        )
    logps = leaf(longer.logps)
    padded_loss, _ = longer.from_logps(case, hl.Clip(*bounds), logps)
    padded_grad = gradients(padded_loss, logps)[0]
    close(padded_loss.detach(), loss)
    close(padded_grad[:, 2:-3], grad)
    assert not padded_grad[:, :2].any() and not padded_grad[:, -3:].any()


def test_clip_clamps_the_value():
    d = torch.tensor([-9, -1.5, -1.0, 0.0, 1.0, 2.0, 9.0], dtype=torch.float64)
    c, _, _ = perceive(hl.Clip(-1.5, 1.0), d)
    assert c.tolist() == [-1.5, -1.5, -1.0, 0.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("bounds", [(-1.5, 1.5), (-0.3, 0.1), (0.1, 0.6)])
def test_clip_has_gradient_one_on_its_bounds_and_zero_just_outside(bounds):
    low, high = torch.tensor(bounds, dtype=torch.float64)
    infinity = torch.tensor(INF, dtype=torch.float64)
    d = torch.stack([low.nextafter(-infinity), low, high, high.nextafter(infinity)])
    _, grad, _ = perceive(hl.Clip(*bounds), d)
    assert grad.tolist() == [0, 1, 1, 0]


def test_unclamped_excludes_the_bounds():
    d = torch.tensor([-0.5, -0.4999, 0.0, 0.2499, 0.25, 0.3], dtype=torch.float64)
    _, _, unclamped = perceive(hl.Clip(-0.5, 0.25), d)
    assert unclamped.tolist() == [False, True, True, True, False, False]


@pytest.mark.parametrize("case", case_ids(FEW[:2]))
def test_unclamped_is_the_share_of_completion_tokens_within_the_bounds(case):
    _, _, stats = evaluate(case, hl.Clip(-0.4, 0.3))
    d = (DATA.logps - DATA.ref)[DATA.mask]
    close(stats["humanline/unclamped"], ((d > -0.4) & (d < 0.3)).double().mean())


def test_infinite_log_ratios_are_clipped():
    c, grad, _ = perceive(hl.Clip(-1.5, 1.5), torch.tensor([-INF, INF], dtype=torch.float64))
    assert c.tolist() == [-1.5, 1.5]
    assert grad.tolist() == [0, 0]


@pytest.mark.parametrize("bounds", [(math.nan, 1.0), (-1.0, math.nan)])
def test_clip_refuses_nan_bounds(bounds):
    with pytest.raises(ValueError, match=r"bounds must be numbers, got .*nan"):
        hl.Clip(*bounds)


def test_clip_refuses_bounds_out_of_order():
    with pytest.raises(ValueError, match=r"log_eps_P <= log_eps_R, got log_eps_P=1.5, log_eps_R=-"):
        hl.Clip(1.5, -1.5)


def test_the_default_clip_is_the_papers():
    assert hl.Clip() == hl.Clip(log_eps_P=-1.5, log_eps_R=1.5)


@pytest.mark.parametrize("perception", PERCEPTIONS.values(), ids=PERCEPTIONS)
def test_perceptions_are_frozen_values(perception):
    assert hash(perception) == hash(type(perception)(**vars(perception)))
    with pytest.raises(AttributeError):
        perception.gamma_P = 3.0


# BetaRejection


def log_ratios(n=400, seed=0, spread=1.0):
    rng = torch.Generator().manual_seed(seed)
    return spread * torch.randn(n, generator=rng, dtype=torch.float64)


REJECTION = hl.BetaRejection(gamma_P=0.7, gamma_R=0.4, beta_P=2.0, beta_R=1.5, seed=5)


def test_rejection_keeps_the_value():
    d = log_ratios()
    assert torch.equal(perceive(REJECTION, d)[0], d)


def test_rejected_tokens_lose_exactly_their_gradient():
    _, grad, kept = perceive(REJECTION, log_ratios())
    assert 20 < kept.sum() < 380
    assert torch.equal(grad, kept.double())


def test_rejection_follows_its_definition():
    d, n = log_ratios(), 400
    log_b = [
        hl.perception.philox.log_beta(g, b, d, 5, stream)
        for g, b, stream in [(0.7, 2.0, 0), (0.4, 1.5, 1)]
    ]
    r, inverse = d.exp().tolist(), (-d).exp().tolist()
    b_p, b_r = log_b[0].exp().tolist(), log_b[1].exp().tolist()
    m_p, m_r = max(r), max(inverse)
    rejected = [r[i] < m_p * b_p[i] or inverse[i] < m_r * b_r[i] for i in range(n)]
    assert [not x for x in rejected] == perceive(REJECTION, d)[2].tolist()


def test_the_same_seed_rejects_the_same_tokens():
    d = log_ratios()
    assert torch.equal(perceive(REJECTION, d)[2], perceive(REJECTION, d)[2])


def test_another_seed_rejects_other_tokens():
    other = hl.BetaRejection(0.7, 0.4, 2.0, 1.5, seed=6)
    assert not torch.equal(perceive(REJECTION, log_ratios())[2], perceive(other, log_ratios())[2])


def test_without_a_seed_rejection_follows_torch():
    perception = hl.BetaRejection(0.7, 0.4)
    torch.manual_seed(1)
    first, second = (perceive(perception, log_ratios())[2] for _ in range(2))
    torch.manual_seed(1)
    assert torch.equal(perceive(perception, log_ratios())[2], first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("outlier", [60.0, -60.0, INF, -INF])
def test_masked_tokens_do_not_enter_the_maxima(outlier):
    d, mask = log_ratios(), torch.arange(400) % 7 != 0
    _, grad, kept = perceive(REJECTION, d, mask)
    moved = d.masked_fill(~mask, outlier)
    _, moved_grad, moved_kept = perceive(REJECTION, moved, mask)
    assert torch.equal(grad, moved_grad) and torch.equal(kept, moved_kept)


def test_an_unmasked_outlier_does_enter_the_maxima():
    d = torch.cat([log_ratios(), torch.tensor([60.0], dtype=torch.float64)])
    assert perceive(REJECTION, d)[2][:-1].sum() < perceive(REJECTION, d[:-1])[2].sum() / 2


def concentrated(d, low, high, c=1e8):
    """Rejection with both Betas close to their means, such that ``M_P·E[B_P] = exp(low)`` and
    ``1 / (M_R·E[B_R]) = exp(high)``."""
    p, r = math.exp(low - d.max()), math.exp(d.min() - high)
    return hl.BetaRejection(
        gamma_P=p * c, beta_P=(1 - p) * c, gamma_R=r * c, beta_R=(1 - r) * c, seed=0
    )


def away_from(d, low, high, margin):
    """The tokens that lie clear of the borders; the extremes stay, which set the maxima."""
    kept = d[torch.minimum((d - low).abs(), (d - high).abs()) > margin]
    assert (kept < low).sum() > 10 and (kept > high).sum() > 10
    assert ((low < kept) & (kept < high)).sum() > 10
    return kept


@pytest.mark.parametrize(("low", "high"), [(-1.0, 1.0), (-0.5, 0.2), (0.3, 0.8)])
def test_clipping_is_the_limit_of_rejection_as_beta_concentrates(low, high):
    d = away_from(log_ratios(2000), low, high, margin=0.02)
    _, grad, _ = perceive(concentrated(d, low, high), d)
    _, clipped_grad, _ = perceive(hl.Clip(low, high), d)
    assert torch.equal(grad, clipped_grad)


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_the_gradient_of_grpo_clipping_is_a_limit_of_rejection(advantage):
    """Concentrated on ``[1-ε, 1+ε]``, rejection is PPO's clipping on the side that clips; the
    surrogate's minimum leaves the other side open, rejection closes both."""
    epsilon = 0.2
    low, high = math.log(1 - epsilon), math.log(1 + epsilon)
    d = away_from(log_ratios(1000, spread=0.2), low, high, margin=0.002)
    reference, mask = torch.zeros(1, len(d), dtype=torch.float64), torch.ones(1, len(d))
    advantages = torch.tensor([advantage], dtype=torch.float64)

    def grad(objective):
        logps = leaf(d[None])
        loss, _ = objective.from_logps(logps, reference, mask, advantages=advantages)
        return gradients(loss, logps)[0][0]

    # With ε = 1e9 the surrogate itself is open.
    rejected = grad(hl.GRPO(epsilon=1e9, perception=concentrated(d, low, high)))
    clipped = grad(hl.GRPO(epsilon=epsilon))
    closed, opened = (d > high, d < low) if advantage > 0 else (d < low, d > high)
    close(rejected[~opened], clipped[~opened])
    assert not rejected[closed | opened].any() and clipped[opened].all()


NEVER = 1e-7  # Beta(NEVER, 1) is 0 in all but one draw of a million: that side never rejects


@pytest.mark.parametrize("gamma", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("side", ["P", "R"])
def test_one_sided_rejection_accepts_with_probability_r_over_m_to_the_gamma(gamma, side):
    n, log_r = 20_000, torch.tensor([0.0, -0.1, -0.3, -0.7, -1.2, -2.0], dtype=torch.float64)
    shapes = {"gamma_P": NEVER, "gamma_R": NEVER} | {f"gamma_{side}": gamma}
    d = log_r.repeat_interleave(n) + 0.4  # r/M does not change
    _, _, kept = perceive(hl.BetaRejection(**shapes, seed=9), d if side == "P" else -d)
    accepted = kept.view(6, n).sum(1)
    assert accepted[0] == n  # the maximum itself
    p = (gamma * log_r[1:]).exp()
    chi_squared = ((accepted[1:] - n * p) ** 2 / (n * p * (1 - p))).sum()
    assert chi_squared < 20.5  # 5 degrees of freedom, p = 0.001


@pytest.mark.parametrize("value", [0.0, -1.0, INF, math.nan])
@pytest.mark.parametrize("name", ["gamma_P", "gamma_R", "beta_P", "beta_R"])
def test_rejection_refuses_shapes_that_are_not_positive(name, value):
    with pytest.raises(ValueError, match=f"needs {name} > 0 and finite, got {value}"):
        hl.BetaRejection(**{name: value})


# ProspectWeight


@pytest.mark.parametrize("gamma", [0.4, 0.61, 0.69, 1.0])
def test_capacity_is_tversky_and_kahnemans(gamma):
    a = torch.linspace(0, 1, 101, dtype=torch.float64)
    expected = [capacity(x, gamma) for x in a.tolist()]
    close(torch_capacity(a, gamma), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize(
    ("a", "gamma", "expected"),
    [
        (0.5, 0.61, 0.4206),
        (0.5, 0.69, 0.4540),
        (0.01, 0.61, 0.0553),
        (0.1, 0.61, 0.1863),
        (0.9, 0.61, 0.7117),
        (0.99, 0.69, 0.9451),
    ],
)
def test_capacity_has_published_values(a, gamma, expected):
    value = torch_capacity(torch.tensor(a, dtype=torch.float64), gamma)
    assert value.item() == pytest.approx(expected, abs=6e-5)


@pytest.mark.parametrize("gamma", [0.3, 0.61, 1.0])
def test_capacity_fixes_the_ends_and_rises(gamma):
    values = torch_capacity(torch.linspace(0, 1, 1001, dtype=torch.float64), gamma)
    assert values[0] == 0 and values[-1] == 1
    assert (values.diff() > 0).all()


@pytest.mark.parametrize("gamma", [0.4, 0.61, 0.69, 0.9])
def test_capacity_is_inverse_s_shaped(gamma):
    a = torch.linspace(0, 1, 1001, dtype=torch.float64)[1:-1]
    above = torch_capacity(a, gamma) > a
    assert above[0] and not above[-1]
    assert above.int().diff().abs().sum() == 1  # crosses the diagonal once


def test_capacity_without_curvature_is_the_identity():
    a = torch.linspace(0, 1, 101, dtype=torch.float64)
    close(torch_capacity(a, 1.0), a)


def slow_weights(d, mask, gamma_gain, gamma_loss):
    """The definition, token by token."""
    tokens = [i for i in range(len(d)) if mask[i]]
    n, weight = len(tokens), dict.fromkeys(range(len(d)), 0.0)
    descending = sorted(tokens, key=lambda i: -d[i])
    for order, gamma, wanted in (
        (descending, gamma_gain, lambda x: x >= 0),
        (descending[::-1], gamma_loss, lambda x: x < 0),
    ):
        for rank, i in enumerate(order, 1):
            if wanted(d[i]):
                weight[i] = capacity(rank / n, gamma) - capacity((rank - 1) / n, gamma)
    shared = {}
    for i in tokens:
        tied = [weight[j] for j in tokens if d[j] == d[i]]
        shared[i] = sum(tied) / len(tied)
    mean = sum(shared.values()) / n
    return [shared[i] / mean if mask[i] else 0.0 for i in range(len(d))]


MASK = torch.arange(60) % 5 != 2
PROSPECTS = {
    "distinct": log_ratios(60),
    "tied": log_ratios(60).round(),
    "gains": log_ratios(60).abs(),
    "losses": -log_ratios(60).abs(),
    "infinite": log_ratios(60).where(torch.arange(60) % 7 != 0, -INF),
    "both infinite": torch.cat([log_ratios(58), torch.tensor([INF, -INF], dtype=torch.float64)]),
    "zero": torch.zeros(60, dtype=torch.float64),
}


@pytest.mark.parametrize("d", PROSPECTS.values(), ids=PROSPECTS)
@pytest.mark.parametrize("gammas", [(0.61, 0.69), (1.0, 0.5)])
def test_weights_follow_their_definition(d, gammas):
    weights = hl.ProspectWeight(*gammas).weights(d, MASK)
    expected = slow_weights(d.tolist(), MASK.tolist(), *gammas)
    close(weights, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("d", PROSPECTS.values(), ids=PROSPECTS)
def test_weights_have_mean_one_over_completion_tokens_and_are_zero_elsewhere(d):
    weights = hl.ProspectWeight().weights(d, MASK)
    close(weights[MASK].mean(), torch.tensor(1.0).double())
    assert not weights[~MASK].any()


def test_tied_tokens_share_their_weight():
    d = PROSPECTS["tied"]
    weights = hl.ProspectWeight().weights(d, MASK)
    for value in d.unique():
        assert weights[MASK & (d == value)].unique().numel() <= 1


def test_weights_move_with_their_tokens():
    d, order = log_ratios(60), torch.randperm(60)
    weights = hl.ProspectWeight().weights(d, MASK)
    close(hl.ProspectWeight().weights(d[order], MASK[order]), weights[order])


def test_extremes_are_overweighted():
    d = log_ratios(200).sort().values
    weights = hl.ProspectWeight().weights(d, torch.ones(200, dtype=torch.bool))
    assert weights[0] > 2 and weights[-1] > 2
    assert weights[40:-40].max() < 1


def test_without_curvature_all_weights_are_one():
    weights = hl.ProspectWeight(1.0, 1.0).weights(log_ratios(60), MASK)
    close(weights, MASK.double())


def test_prospect_keeps_the_value_and_its_gradient_is_the_weight():
    d = log_ratios(60)
    c, grad, _ = perceive(hl.ProspectWeight(), d, MASK)
    assert torch.equal(c, d)
    close(grad, hl.ProspectWeight().weights(d, MASK), 0)


@pytest.mark.parametrize("name", ["infinite", "both infinite"])
def test_infinite_log_ratios_give_no_nan(name):
    d = PROSPECTS[name]
    c, grad, _ = perceive(hl.ProspectWeight(), d, MASK)
    assert torch.equal(c, d)
    assert grad.isfinite().all()


def test_an_empty_mask_gives_zero_weights():
    weights = hl.ProspectWeight().weights(log_ratios(60), torch.zeros(60, dtype=torch.bool))
    assert not weights.any()


@pytest.mark.parametrize("value", [0.28, 0.0, 1.01, math.nan])
@pytest.mark.parametrize("name", ["gamma_gain", "gamma_loss"])
def test_prospect_refuses_curvatures_outside_its_range(name, value):
    with pytest.raises(ValueError, match=f"0.28 < {name} <= 1, got {value}"):
        hl.ProspectWeight(**{name: value})


def test_prospect_weights_of_a_million_tokens_keep_their_digits():
    d = torch.randn(2**20)
    mask = torch.ones(2**20, dtype=torch.bool)
    weights = hl.ProspectWeight().weights(d, mask)
    exact = hl.ProspectWeight().weights(d.double(), mask)
    torch.testing.assert_close(weights.double(), exact, rtol=1e-6, atol=0)
