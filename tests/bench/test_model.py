"""The model: GEMM counts are the ops' own, memory is what was measured, terms behave."""

from dataclasses import replace

import pytest

from bench.cases import Case
from bench.measure import Result
from bench.paper.costs import COSTS, Tail, with_columns_left_out
from bench.paper.model import H100, Device, Layout, calibrated, check, predict
from bench.peers import PEERS
from bench.run import Results, committed
from humanline.ops import WORKSPACE_BYTES

CASE = Case("grpo", "hidden", 65_536, 4096, 151_936, "bfloat16")


@pytest.mark.parametrize(
    "objective, frozen, fits, active, expected",
    [  # as counted in tests/ops/hidden/test_gemms.py
        ("grpo", False, False, 1.0, 3),
        ("grpo", False, False, 0.5, 2),
        ("grpo", True, False, 0.5, 1.5),
        ("dpo", True, False, 1.0, 2),
        ("dpo", False, True, 0.5, 2),
        ("dpo", False, False, 0.5, 2.5),
    ],
)
def test_gemms(objective, frozen, fits, active, expected):
    case = replace(CASE, objective=objective, frozen_head=frozen, active=active)
    t = Tail(case, case.tokens, case.vocab, False, 2**50 if fits else 2**29)
    flops = sum(k.flops for k in COSTS["humanline"](t).gemms)
    assert flops / (2 * case.tokens * case.hidden * case.vocab) == expected


def test_costs_are_of_peers():
    assert set(COSTS) <= {p.name for p in PEERS}


def test_memory_is_within_a_quarter_of_every_committed_point():
    points = 0
    for results in committed():
        for r in results.results:
            if r.peer in COSTS and r.seconds is not None:
                device = Device("memory", 1, 1, 1, results.on_cpu)
                measured = r.recorded_peak_bytes or r.peak_bytes
                predicted = predict(r.case, device, r.peer).bytes
                assert predicted == pytest.approx(measured, rel=0.25), (r.case.name, r.peer)
                points += 1
    assert points


def test_its_own_floor_is_predicted_exactly():
    """A device calibrated from a floor gives that floor back: rates are used as measured."""
    gemm_case, copy_case = replace(CASE, tokens=64), replace(CASE, entry="logits", tokens=64)
    results = Results({"device": "GPU"})
    results.add(Result(gemm_case, "bare GEMMs", seconds=0.5, peak_bytes=1))
    assert calibrated(results, gemm_case) is None  # no copy yet
    results.add(Result(copy_case, "bare copy", seconds=0.25e-3, peak_bytes=1))
    device = calibrated(results, gemm_case)
    assert predict(gemm_case, device, "bare GEMMs").seconds == pytest.approx(0.5)
    assert predict(copy_case, device, "bare copy").seconds == pytest.approx(0.25e-3)
    assert len(check(results)) == 3


def test_layouts():
    one = predict(CASE, H100)
    assert one.collectives == 0
    for layout in (Layout(tokens=8), Layout(vocab=8), Layout(tokens=4, vocab=2)):
        p = predict(CASE, H100, layout=layout)
        # what is left over of an eighth: fewer rows at a time, or more
        assert p.gemm == pytest.approx(one.gemm / 8, rel=0.1) and p.collectives > 0
    sharded = predict(CASE, H100, layout=Layout(vocab=8))
    assert sharded.bytes < one.bytes  # an eighth of the head's gradient


def test_what_an_h100_should_make_of_it():
    """Bounded by multiplying where a block's rows are enough to read the weight for."""
    floor = predict(CASE, H100, "bare GEMMs").seconds
    few, many = (predict(CASE, H100, workspace=2**k).seconds / floor for k in (27, 30))
    assert few > 1.4 and many < 1.15
    tenth = replace(CASE, active=0.1)
    assert predict(tenth, H100).seconds < 0.55 * floor  # 0.4 of the products
    assert predict(CASE, H100, "TRL ChunkedLogProbFunction").seconds > 4 / 3 * floor


def test_memory_does_not_grow_with_tokens_beside_hidden_gradients():
    short, long = (predict(replace(CASE, tokens=n), H100).bytes for n in (2**16, 2**20))
    assert long - short == (2**20 - 2**16) * 4096 * 2


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("who", ["humanline", "humanline, log-probs alone"])
@pytest.mark.parametrize("objective", ["grpo", "dpo"])
@pytest.mark.parametrize("is_cpu", [False, True])
def test_ours_hold_the_workspace_beside_gradients(objective, who, frozen, is_cpu):
    case = replace(CASE, objective=objective, frozen_head=frozen)
    weight = case.vocab * case.hidden * (not frozen)
    gradients = case.tokens * case.hidden * 2 + weight * (2 + 4)  # summed in float32
    peak = predict(case, replace(H100, is_cpu=is_cpu), who).bytes
    assert gradients <= peak <= gradients + WORKSPACE_BYTES


def test_float32_products_pay_their_own_rate():
    """Liger's GRPO widens what it multiplies in the backward; the others do not."""
    slower = replace(H100, gemm_float32=H100.gemm_float32 / 2)
    for who in COSTS:
        if who != "bare copy":
            pays = predict(CASE, slower, who).seconds > predict(CASE, H100, who).seconds
            assert pays == (who == "Liger chunked"), who


def test_columns_left_out_spare_their_share_of_two_products():
    """1F + 2·ρ·F of FLOPs (1F + ρ·F with a frozen head) and, what leaving them out costs, bytes."""
    for frozen in (False, True):
        case = replace(CASE, objective="grpo", frozen_head=frozen)
        t = Tail(case, case.tokens, case.vocab, is_cpu=False)
        exact, most, few = (with_columns_left_out(t, kept) for kept in (1.0, 0.99, 0.25))
        one = 2 * case.tokens * case.hidden * case.vocab
        flops = sum(kernel.flops for kernel in few.gemms)
        assert flops == pytest.approx(one * (1 + (1 + (not frozen)) * 0.25))
        moved = [sum(k.bytes for k in cost.passes) for cost in (exact, most)]
        assert moved[1] > moved[0] + 4 * t.b * t.logits  # energies, masses, fit, columns moved
        assert exact == COSTS["humanline"](t)
