"""Which tokens a clipped surrogate leaves with a gradient: the others cost nothing."""

import math

import pytest
import torch
from oracle import close, gradients, leaf

import humanline as hl

EPSILON, HIGH = 0.2, 0.3
INFINITY = torch.tensor(math.inf, dtype=torch.float64)


def last(holds, start, towards):
    """The last float64 from ``start`` on for which the condition holds (there first)."""
    x = torch.tensor(start, dtype=torch.float64)
    while not holds(x):  # start itself may be rounded to the wrong side
        x = x.nextafter(-towards)
    while holds(x.nextafter(towards)):
        x = x.nextafter(towards)
    return x.item()


# The ends of the interval in which the surrogate does not clip, as floats have them.
SURROGATE_HIGH = last(lambda d: d.exp() <= 1 + HIGH, math.log(1 + HIGH), INFINITY)
SURROGATE_LOW = last(lambda d: d.exp() >= 1 - EPSILON, math.log(1 - EPSILON), -INFINITY)


def grid(*borders):
    """Log-ratios on a grid, on the borders, and one float to either side of each."""
    points = torch.linspace(-3, 3, 301, dtype=torch.float64)
    on = torch.tensor([x for x in borders if math.isfinite(x)], dtype=torch.float64)
    return torch.cat([points, on, on.nextafter(INFINITY), on.nextafter(-INFINITY)])


def active_rows(objective, d, advantage):
    """Tokens with a gradient, and what the statistics say of their number."""
    logps = leaf(d[None])
    mask = torch.ones_like(d[None], dtype=torch.bool)
    loss, stats = objective.from_logps(
        *(logps, torch.zeros_like(logps), mask),
        advantages=torch.tensor([advantage], dtype=torch.float64),
    )
    return gradients(loss, logps)[0][0] != 0, stats["humanline/active_rows"]


# Advantages are powers of two, so that a product of one float outside does not round to the border.
OBJECTIVES = pytest.mark.parametrize("cls", [hl.GRPO, hl.PPO])
# Bounds outside the surrogate's, and inside it; on one side only.
BOUNDS = [(-1.5, 1.5), (-0.7, 0.9), (-0.1, 0.1), (-0.1, 1.5), (-1.5, 0.1), (-math.inf, math.inf)]


@OBJECTIVES
@pytest.mark.parametrize("bounds", BOUNDS)
def test_with_positive_advantage_log_eps_P_is_the_lower_end(cls, bounds):
    low, high = bounds
    d = grid(*bounds, SURROGATE_HIGH)
    objective = cls(epsilon=EPSILON, epsilon_high=HIGH, perception=hl.Clip(*bounds))
    active, count = active_rows(objective, d, advantage=0.5)
    expected = (low <= d) & (d <= min(high, SURROGATE_HIGH))
    assert torch.equal(active, expected)
    assert count == expected.sum()


@OBJECTIVES
@pytest.mark.parametrize("bounds", BOUNDS)
def test_with_negative_advantage_log_eps_R_is_the_upper_end(cls, bounds):
    low, high = bounds
    d = grid(*bounds, SURROGATE_LOW)
    objective = cls(epsilon=EPSILON, epsilon_high=HIGH, perception=hl.Clip(*bounds))
    active, count = active_rows(objective, d, advantage=-0.5)
    expected = (max(low, SURROGATE_LOW) <= d) & (d <= high)
    assert torch.equal(active, expected)
    assert count == expected.sum()


@OBJECTIVES
@pytest.mark.parametrize("advantage", [0.5, -0.5])
def test_the_plain_surrogate_is_open_on_one_side(cls, advantage):
    d = grid(SURROGATE_LOW, SURROGATE_HIGH)
    active, count = active_rows(cls(epsilon=EPSILON, epsilon_high=HIGH), d, advantage)
    expected = d <= SURROGATE_HIGH if advantage > 0 else d >= SURROGATE_LOW
    assert torch.equal(active, expected)
    assert count == expected.sum()


@OBJECTIVES
@pytest.mark.parametrize("perception", [hl.Identity(), hl.Clip()])
def test_no_advantage_no_active_row(cls, perception):
    active, count = active_rows(cls(perception=perception), grid(), advantage=0.0)
    assert not active.any() and count == 0


def test_an_upper_bound_of_the_ratio_closes_the_open_side():
    d = grid(math.log(1.8))
    active, _ = active_rows(hl.GRPO(epsilon=EPSILON, delta=1.8), d, advantage=-0.5)
    assert torch.equal(active, (d >= SURROGATE_LOW) & (d.exp() <= 1.8))


@OBJECTIVES
def test_exactly_on_policy_every_row_is_active(cls):
    active, count = active_rows(cls(perception=hl.Clip()), torch.zeros(7).double(), 1.0)
    assert active.all() and count == 7


@OBJECTIVES
def test_a_penalty_keeps_clipped_rows_active(cls):
    d = grid(SURROGATE_HIGH)
    active, _ = active_rows(cls(beta=0.1, perception=hl.Clip()), d, advantage=0.5)
    assert active[d != 0].all()


def test_masked_rows_are_not_active():
    logps, mask = torch.zeros(1, 6).double(), torch.tensor([[0, 1, 1, 0, 1, 0]])
    _, stats = hl.SFT().from_logps(logps, None, mask)
    assert stats["humanline/active_rows"] == 3


@pytest.mark.parametrize("bounds", [(-0.7, 0.9), (-0.1, 0.1)])
def test_clipping_in_dpo_silences_the_tokens_outside(bounds):
    d = grid(*bounds)
    logps = leaf(d.repeat(2, 1))
    mask = torch.ones_like(logps, dtype=torch.bool)
    objective = hl.DPO(beta=1e-3, perception=hl.Clip(*bounds))
    loss, stats = objective.from_logps(logps, torch.zeros_like(logps), mask)
    inside = (bounds[0] <= d) & (d <= bounds[1])
    grad = gradients(loss, logps)[0]
    assert torch.equal(grad != 0, inside.repeat(2, 1))
    close(grad[0], -grad[1])
    assert stats["humanline/active_rows"] == 2 * inside.sum()
