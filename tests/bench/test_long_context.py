"""The search for the longest context finds it; its variants compute one and the same step."""

import sys

import pytest

from bench.memory import long_context

TINY = ["--hidden", "64", "--layers", "2", "--vocab", "4096"]


@pytest.mark.parametrize("limit", [0, 255, 256, 1000, 2048, 3000, 4095, 4096, 9999])
@pytest.mark.parametrize("start", [1, 2048, 10**6])
def test_the_largest_length_that_fits_is_found(limit, start):
    tried = []

    def fits(length):
        tried.append(length)
        return length if length <= limit else None

    expected = min(limit, 4096) // 256 * 256 or None
    assert long_context.largest(fits, start, resolution=256, longest=4096) == expected
    assert len(tried) == len(set(tried)) <= 10
    assert all(0 < length <= 4096 and length % 256 == 0 for length in tried)


def test_all_variants_compute_the_same_step():
    pytest.importorskip("trl")
    args = long_context.parse([*TINY, "--length", "48"])
    losses, norms = [], []
    for step in long_context.VARIANTS.values():
        model = long_context.make_model(args)
        losses.append(step(model, args))
        norms.append(sum(p.grad.square().sum().item() for p in model.parameters()) ** 0.5)
    assert losses == pytest.approx(losses[:1] * 4, rel=1e-4)
    assert norms == pytest.approx(norms[:1] * 4, rel=1e-4) and norms[0] > 0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits the address space")
def test_the_cap_is_kept_to():
    args = long_context.parse([*TINY, "--cap-gib", "0.25"])
    assert long_context.in_child("all logits", 4096, args) is None  # its logits alone are 128 MiB
    result = long_context.in_child("humanline", 4096, args)
    assert result["length"] == 4096 and result["seconds"] > 0


def test_a_failure_of_another_kind_is_not_taken_for_a_full_memory():
    args = long_context.parse([*TINY, "--layers", "-1"])
    with pytest.raises(RuntimeError, match="humanline at 8 tokens failed"):
        long_context.in_child("humanline", 8, args)


def test_the_table_is_in_units_of_the_better_stock_path():
    results = [
        {"variant": "all logits", "length": 2048, "seconds": 9.6},
        {"variant": "TRL", "length": 0},
        {"variant": "humanline", "length": 3072, "seconds": 12.0},
    ]
    assert long_context.table(results) == [
        ["all logits", "2,048", "1.0"],
        ["TRL", "0", "0.0"],
        ["humanline", "3,072", "1.5"],
    ]
