"""The benchmark's inputs are what their case says, and every library sees the same problem."""

from dataclasses import replace

import pytest
import torch

import humanline as hl
from bench.cases import SUITES, Case, inputs
from bench.objectives import OBJECTIVES

SMALL = Case("grpo", "logits", tokens=64, hidden=16, vocab=50)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"objective": "ppp"}, "objective must be one of grpo, dpo, kto, sft; got 'ppp'"),
        ({"tokens": 24}, "tokens must be a positive multiple of 16, got 24"),
        ({"active": 1.5}, "active must be a fraction"),
        ({"vocab": 0}, "vocab must be > 0"),
        ({"frozen_head": True}, "frozen_head has no meaning from logits"),
        ({"objective": "sft", "active": 0.5}, "sft has no log-ratio to clip"),
    ],
)
def test_a_case_that_cannot_be(wrong, message):
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        replace(SMALL, **wrong)


@pytest.mark.parametrize("entry", ["logits", "hidden"])
@pytest.mark.parametrize("objective", ["grpo", "dpo", "kto"])
@pytest.mark.parametrize("active", [1.0, 0.75, 0.5, 0.0])
def test_so_many_rows_are_active(objective, entry, active):
    batch = inputs(replace(SMALL, objective=objective, entry=entry, active=active), "cpu")
    ours = batch.objective.ours
    if entry == "logits":
        _, stats = ours.from_logits(batch.logits, batch.labels, batch.ref_logps, **batch.extra)
    else:
        _, stats = ours.from_hidden(
            batch.hidden, batch.weight, batch.labels, batch.ref_logps, **batch.extra
        )
    assert stats["humanline/active_rows"] == active * 64


def test_grpo_without_perception_is_the_same_problem():
    """So that libraries which cannot clip as humanline does may be compared."""
    batch = inputs(replace(SMALL, active=0.5), "cpu")
    values = []
    for objective in (OBJECTIVES["grpo"].ours, hl.GRPO(epsilon=0.2)):
        loss, _ = objective.from_logits(batch.logits, batch.labels, batch.ref_logps, **batch.extra)
        values.append((loss, torch.autograd.grad(loss, batch.logits)[0]))
    for a, b in zip(*values, strict=True):
        torch.testing.assert_close(a, b)


def test_the_same_inputs_in_every_process():
    first, second = (inputs(SMALL, "cpu") for _ in range(2))
    assert torch.equal(first.logits, second.logits) and torch.equal(first.labels, second.labels)


def test_suites_have_no_case_twice():
    for cases in SUITES.values():
        assert cases and len(set(cases)) == len(cases)
        assert len({c.name for c in cases}) == len(cases)
