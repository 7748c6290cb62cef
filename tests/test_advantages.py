"""Group advantages, against TRL's formulas written out."""

import pytest
import torch

import humanline as hl

REWARDS = torch.tensor([1.0, 0.0, 0.5, 2.0, -1.0, 2.0, 0.25, 0.75])


def trl(rewards, generations, scale):
    """TRL 1.16, GRPOTrainer: completions of a prompt stand together."""
    grouped = rewards.view(-1, generations)
    centred = (grouped - grouped.mean(1, keepdim=True)).view(-1)
    if scale == "none":
        return centred
    std = grouped.std(1).repeat_interleave(generations) if scale == "group" else rewards.std()
    return centred / (std + 1e-4)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("generations", [2, 4, 8])
def test_they_are_trls(scale, generations):
    prompt_ids = torch.arange(8) // generations
    found = hl.group_advantages(REWARDS, prompt_ids, scale)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, trl(REWARDS, generations, scale), rtol=1e-6, atol=1e-6)


def test_booleans_mean_what_they_mean_in_trl():
    ids = torch.arange(8) // 4
    for given, meant in ((True, "group"), (False, "none")):
        assert hl.group_advantages(REWARDS, ids, given).equal(
            hl.group_advantages(REWARDS, ids, meant)
        )


def test_the_order_of_completions_and_the_numbers_of_prompts_do_not_matter():
    ids = torch.tensor([7, -3, 7, 7, -3, 10**15, -3, 10**15])
    order = torch.randperm(8)
    found = hl.group_advantages(REWARDS, ids)
    shuffled = hl.group_advantages(REWARDS[order], ids[order])
    torch.testing.assert_close(shuffled, found[order], rtol=1e-6, atol=1e-6)
    for prompt in ids.unique():
        of = ids == prompt
        expected = trl(REWARDS[of], int(of.sum()), "group")
        torch.testing.assert_close(found[of], expected, rtol=1e-6, atol=1e-6)


def test_the_populations_standard_deviation():
    ids = torch.zeros(8, dtype=torch.int64)
    found = hl.group_advantages(REWARDS, ids, correction=0, epsilon=0)
    expected = (REWARDS - REWARDS.mean()) / REWARDS.std(correction=0)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.square().mean(), torch.tensor(1.0))


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("epsilon", [0, 1e-4])
@pytest.mark.parametrize("correction", [0, 1])
def test_equal_rewards_and_groups_of_one_are_exactly_0(scale, epsilon, correction):
    rewards = torch.tensor([0.1, 0.1, 0.1, 5.0, 0.7, 0.7])  # 0.1 thrice: their mean is not 0.1
    ids = torch.tensor([0, 0, 0, 1, 2, 2])
    options = {"epsilon": epsilon, "correction": correction}
    for dtype in (torch.float32, torch.float64):
        found = hl.group_advantages(rewards.to(dtype), ids, scale, **options)
        assert found.eq(0).all() and found.dtype == dtype
    one = hl.group_advantages(rewards[:1], ids[:1], scale, **options)
    assert one.tolist() == [0.0]
    assert hl.group_advantages(rewards[:0], ids[:0], scale, **options).shape == (0,)


def test_half_precision_rewards_give_float32():
    found = hl.group_advantages(REWARDS.bfloat16(), torch.arange(8) // 4)
    assert found.dtype == torch.float32 and found.equal(
        hl.group_advantages(REWARDS, torch.arange(8) // 4)  # these rewards are exact in bfloat16
    )


IDS = torch.zeros(8, dtype=torch.int64)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"scale_rewards": "std"}, "'group', 'batch' or 'none', got 'std'"),
        ({"correction": 2}, "correction must be 0 or 1, got 2"),
        ({"epsilon": -1.0}, "epsilon must be at least 0, got -1.0"),
        ({"prompt_ids": IDS[:7]}, r"shape \[S\], got \[8\] and \[7\]"),
        ({"rewards": REWARDS.view(2, 4), "prompt_ids": IDS.view(2, 4)}, r"got \[2, 4\] and"),
        ({"rewards": IDS}, "rewards must be floating point, got torch.int64"),
        ({"prompt_ids": REWARDS}, "prompt_ids must be integers, got torch.float32"),
        ({"rewards": REWARDS / 0}, "rewards must be finite, got inf"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        hl.group_advantages(**{"rewards": REWARDS, "prompt_ids": IDS} | arguments)
