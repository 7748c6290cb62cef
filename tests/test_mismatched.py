"""Mismatched pairs: from lists, from padded and from packed rows, to the same reference point."""

from itertools import chain

import pytest
import torch

import humanline as hl
from humanline.mismatched import mismatched_indices

PROMPTS = [[1, 2, 3], [4], [5, 6]]  # an odd batch
COMPLETIONS = [[7, 8], [9, 10, 11], [12]]
EXPECTED = [[1, 2, 3, 9, 10, 11], [4, 12], [5, 6, 7, 8]]
EXPECTED_LABELS = [[-100] * 3 + [9, 10, 11], [-100, 12], [-100, -100, 7, 8]]


def padded(rows, value, left=False):
    width = max(map(len, rows))
    fill = [[value] * (width - len(row)) for row in rows]
    return torch.tensor([f + r if left else r + f for r, f in zip(rows, fill, strict=True)])


def rows(layout):
    ids = [p + c for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    labels = [[-100] * len(p) + c for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    if layout == "packed":
        ends = torch.tensor([0, 5, 9, 12], dtype=torch.int32)
        return {
            "input_ids": torch.tensor([*chain(*ids)]),
            "labels": torch.tensor([*chain(*labels)]),
            "cu_seqlens": ends,
        }
    left = layout == "left"
    return {
        "input_ids": padded(ids, 99, left),
        "labels": padded(labels, -100, left),
        "attention_mask": padded([[1] * len(row) for row in ids], 0, left),
    }


def test_each_prompt_gets_the_next_completion():
    found = hl.mismatched_pairs("abc", ["A", "B", "C"])
    assert found == [("a", "B"), ("b", "C"), ("c", "A")]
    assert [p + c for p, c in hl.mismatched_pairs(PROMPTS, COMPLETIONS)] == EXPECTED


@pytest.mark.parametrize("layout", ["right", "left"])
def test_padded_rows(layout):
    found = hl.mismatched_rows(**rows(layout), pad_token_id=99)
    assert found["input_ids"].equal(padded(EXPECTED, 99))
    assert found["labels"].equal(padded(EXPECTED_LABELS, -100))
    assert found["attention_mask"].equal(padded([[1] * len(row) for row in EXPECTED], 0))


def test_packed_rows():
    found = hl.mismatched_rows(**rows("packed"))
    assert found["input_ids"].tolist() == [*chain(*EXPECTED)]
    assert found["labels"].tolist() == [*chain(*EXPECTED_LABELS)]
    assert found["cu_seqlens"].tolist() == [0, 6, 8, 12]
    assert found["cu_seqlens"].dtype == torch.int32


def test_a_completion_begins_at_the_first_label_and_may_have_none():
    ids = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    labels = torch.tensor([[-100, 2, -100, 4], [-100] * 4])  # two turns; all prompt
    found = hl.mismatched_rows(ids, labels, torch.ones_like(ids))
    assert found["input_ids"].tolist() == [[1, 0, 0, 0, 0, 0, 0], [5, 6, 7, 8, 2, 3, 4]]
    assert found["labels"].tolist() == [[-100] * 7, [-100] * 4 + [2, -100, 4]]


@pytest.mark.parametrize(
    "prompts, completions, expected",
    [
        ("aabb", "1234", [2, 3, 0, 1]),  # one step for all: each completion once
        ("aaab", "1234", [3, 3, 3, 0]),  # no step suits all
        ("ab", "11", [None, None]),  # b's completion is a's own
        ("aab", "121", [None, None, 1]),
        ("abc", "112", [2, 2, 0]),
        (
            [[1, 2], [1, 2], [3]],
            [torch.tensor([4]), torch.tensor([5]), torch.tensor([6])],
            [2, 2, 0],
        ),
        ([[{"role": "user", "content": t}] for t in "aab"], "123", [2, 2, 0]),
        ("", "", []),
    ],
)
def test_a_prompt_never_gets_a_completion_of_its_own(prompts, completions, expected):
    assert mismatched_indices(prompts, completions) == expected


def test_pairs_and_rows_that_match_are_left_out():
    assert hl.mismatched_pairs("aab", "121") == [("b", "2")]
    ids = torch.tensor([[1, 7, 9], [1, 8, 0], [2, 7, 9]])  # prompts 1, 1, 2
    labels = ids.clone()
    labels[:, 0] = labels[1, 2] = -100
    mask = (ids != 0).long()
    found = hl.mismatched_rows(ids, labels, mask)
    assert found["input_ids"].tolist() == [[2, 8]] and found["labels"].tolist() == [[-100, 8]]
    keep = mask.bool()
    packed = hl.mismatched_rows(ids[keep], labels[keep], cu_seqlens=torch.tensor([0, 3, 5, 8]))
    assert packed["input_ids"].tolist() == [2, 8] and packed["cu_seqlens"].tolist() == [0, 2]
    expected = "no mismatched pair among 2 sequences: .*or give KTO its z0"
    with pytest.raises(ValueError, match=expected):
        hl.mismatched_rows(ids[::2], labels[::2], mask[::2])
    with pytest.raises(ValueError, match=expected):
        hl.mismatched_pairs(["a", "a"], ["1", "2"])


def test_a_completion_with_other_labels_is_still_the_same():
    ids = torch.tensor([[1, 7, 8, 9], [2, 7, 8, 9], [3, 5, 5, 5]])
    labels = torch.where(torch.arange(4) > 0, ids, -100)
    labels[1, 2] = -100
    found = hl.mismatched_rows(ids, labels, torch.ones_like(ids))
    assert found["input_ids"].tolist() == [[1, 5, 5, 5], [2, 5, 5, 5], [3, 7, 8, 9]]


def test_a_batch_of_one_and_other_bad_input():
    one = {name: x[:1] for name, x in rows("right").items()}
    expected = "at least two sequences, got 1: raise the batch size, or give KTO its z0"
    with pytest.raises(ValueError, match=expected):
        hl.mismatched_rows(**one)
    with pytest.raises(ValueError, match=expected):
        hl.mismatched_pairs(["a"], ["A"])
    with pytest.raises(ValueError, match="2 prompts, but 1 completions"):
        hl.mismatched_pairs(["a", "b"], ["A"])
    both = rows("right") | {"cu_seqlens": torch.tensor([0, 5])}
    for given in (both, {n: both[n] for n in ("input_ids", "labels")}):
        with pytest.raises(ValueError, match="give one of them"):
            hl.mismatched_rows(**given)
    with pytest.raises(ValueError, match="must have one shape"):
        hl.mismatched_rows(**rows("right") | {"labels": torch.zeros(3, 4, dtype=torch.int64)})


@pytest.mark.parametrize("perception", [hl.Identity(), hl.Clip(-0.5, 0.3)], ids=str)
@pytest.mark.parametrize("sign", [1, -1])
def test_kto_takes_its_reference_point_from_them(perception, sign):
    """The mean of perceived sums, clamped at 0, written out."""
    table = torch.randn(20)  # a model whose log-probs are a token's, and of the policy larger
    ratio = sign * torch.rand(20)
    kl = hl.mismatched_rows(**rows("right"))
    mask = kl["labels"] != -100
    desirable, lp = torch.tensor([True, False, True]), torch.randn(3, 4)
    _, stats = hl.KTO(perception=perception).from_logps(
        lp,
        lp - 0.1,
        torch.ones(3, 4),
        desirable=desirable,
        kl_logps=table[kl["input_ids"]] + ratio[kl["input_ids"]],
        kl_ref_logps=table[kl["input_ids"]],
        kl_mask=mask,
    )
    clip = perception.bounds or (-100, 100)
    sums = [ratio[torch.tensor(c)].clamp(*clip).sum() for c in COMPLETIONS]
    expected = max(0.0, float(sum(sums) / 3))
    assert float(stats["kl"]) == pytest.approx(expected, rel=1e-5)
    assert (expected > 0) == (sign > 0)
