"""The benchmark of the references, at a size that takes seconds."""

import pytest

from bench.memory import reference_memory

SIZES = dict(steps=3, sync_every=2, width=64, layers=1, vocab=64, batch=2, length=8)
SMALL = [f"--{name.replace('_', '-')}={size}" for name, size in SIZES.items()]


@pytest.mark.parametrize("trained", reference_memory.TRAINED)
def test_the_kinds_compute_the_same_and_report_what_they_hold(trained):
    if trained == "LoRA":
        pytest.importorskip("peft")
    args = reference_memory.parse(SMALL)
    results = [reference_memory.measure(trained, kind, args) for kind in reference_memory.KINDS]
    by_kind = {r["kind"]: r for r in results}
    assert by_kind["copy"]["losses"] == by_kind["adapter"]["losses"]
    assert by_kind["lookahead"]["losses"] == by_kind["copy"]["losses"]
    assert by_kind["none"]["losses"] != by_kind["copy"]["losses"]
    policy = reference_memory.make_policy(trained, args)
    trains = sum(p.nbytes for p in policy.parameters() if p.requires_grad)
    assert by_kind["copy"]["held_bytes"] == by_kind["adapter"]["held_bytes"] == trains
    # the first step's batch and scores are gone; at most sync_every steps' are held
    assert by_kind["lookahead"]["held_bytes"] == 2 * (2 * 9 * 8 + 2 * 8 * 4)
    lines = reference_memory.table(results * 2)
    assert [line[1] for line in lines] == list(reference_memory.KINDS)
    assert lines[0][4] == "0 (0 to 0)" and lines[1][5] == f"{trains / 1e6:.2f}"
    results[1]["losses"] = [0.0]
    with pytest.raises(AssertionError, match="losses differ"):
        reference_memory.table(results)


def test_a_child_process_reports_its_own_peak():
    result = reference_memory.in_child("all weights", "copy", reference_memory.parse(SMALL))
    assert 50e6 < result["peak_bytes"] < 2e9  # torch alone takes more than the one
    assert result["seconds_per_step"] > 0 and len(result["losses"]) == 3


def test_too_few_steps_to_time(capsys):
    with pytest.raises(SystemExit):
        reference_memory.parse(["--steps", "1"])
    assert "--steps must be at least 2, got 1" in capsys.readouterr().err
