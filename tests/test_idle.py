"""Bounds that never act are told of once."""

import math

import pytest
import torch

import humanline as hl
from humanline.idle import STEPS, IdleBounds


def messages(perception, clamped_at=None, steps=2 * STEPS, tokens=7):
    watch = IdleBounds(perception)
    found = []
    for step in range(steps):
        watch.saw(tokens - (step == clamped_at), tokens)
        found += [(step, message)] if (message := watch.stepped()) else []
    return found


def test_once_after_the_first_steps():
    ((step, message),) = messages(hl.Clip(-0.5, 0.25))
    assert step == STEPS - 1 and f"none of {7 * STEPS} tokens" in message
    assert "below -0.5 or above 0.25 nats" in message


@pytest.mark.parametrize("step", [0, STEPS - 1])
def test_one_token_is_enough(step):
    assert messages(hl.Clip(), clamped_at=step) == []
    assert len(messages(hl.Clip(), clamped_at=STEPS)) == 1


@pytest.mark.parametrize(
    "perception",
    [hl.Identity(), hl.Clip(-math.inf, math.inf), hl.BetaRejection(), hl.ProspectWeight()],
)
def test_what_has_no_bounds_is_not_watched(perception):
    assert messages(perception) == []


def test_a_bound_on_one_side_is_watched():
    assert len(messages(hl.Clip(-math.inf, 0.5))) == 1


def test_shares_that_are_rounded_are_whole():
    """A kernel's share is a sum of sequences' shares, which may miss 1 by a rounding."""
    watch = IdleBounds(hl.Clip())
    for _ in range(STEPS):
        watch.saw((1 - 2**-24) * 4096, 4096)
        message = watch.stepped()
    assert message is not None


def test_counts_may_stay_on_their_device():
    watch = IdleBounds(hl.Clip())
    for _ in range(STEPS):
        watch.saw(torch.tensor(3), torch.tensor(4))
        assert watch.stepped() is None
    assert torch.is_tensor(watch.clamped) and int(watch.clamped) == STEPS
