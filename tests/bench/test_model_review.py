"""The model on an earlier schedule and earlier row kernels, of which a review estimated the times
from their machine code and a count of their launches: it must say the same before it is believed of
today's. None of these times was measured.

GRPO, 8,192 rows, V=151,936, bf16, forward and backward.
"""

from dataclasses import replace

import pytest

from bench.cases import Case
from bench.paper.costs import Cost, Tail
from bench.paper.model import B200, H100, RowLoop, combined, predict

N, V = 8_192, 151_936
WITHIN = 0.15

# Counted of the earlier schedule.
BLOCKS, FLUSHES = 32, 8  # 48 GEMMs: a block's logits; two products of 1,024 rows that wait
SMALL = 3_292  # kernels of torch; beside them two row kernels a block

# What its row kernels were compiled to: instructions and exponentials an element. The loss is two
# passes of 24.7 and 20.7 instructions, 14.4 of them in the second on sm_90.
LOSS, FORWARD, BACKWARD = ("loss, clipped", 0), ("forward", 0), ("backward", 0)
SECOND, SOFTMAX, GRADIENT = ("loss, clipped", 1), ("block, softmax", 0), ("block, dz", 0)
ONE_TILE, TWO_PROGRAMS = 16_384, 32_768  # bytes in flight an SM; registers left room for two
OLD_H100 = replace(
    H100,
    loops={
        LOSS: RowLoop(10.3, 1.1, ONE_TILE),
        SECOND: RowLoop(14.4, 1.0, ONE_TILE),
        FORWARD: RowLoop(10.4, 1.1, TWO_PROGRAMS),
        BACKWARD: RowLoop(14.3, 1.0, TWO_PROGRAMS),
        SOFTMAX: RowLoop(12.9, 1.25, TWO_PROGRAMS),
        GRADIENT: RowLoop(14.9, 1.0, TWO_PROGRAMS),
    },
)
OLD_B200 = replace(
    B200,
    loops={
        LOSS: RowLoop(8.6, 1.1, ONE_TILE),
        SECOND: RowLoop(12.1, 1.0, ONE_TILE),
        FORWARD: RowLoop(9.1, 1.1, TWO_PROGRAMS),
        BACKWARD: RowLoop(11.3, 1.0, TWO_PROGRAMS),
        SOFTMAX: RowLoop(10.9, 1.25, TWO_PROGRAMS),
        GRADIENT: RowLoop(12.5, 1.0, TWO_PROGRAMS),
    },
)


def tail(hidden: int) -> Tail:
    return Tail(Case("grpo", "hidden", N, hidden, V, "bfloat16"), N, V, is_cpu=False)


def earlier(t: Tail) -> Cost:
    """Blocks of 256 rows; two products whenever 1,024 wait, of which that for the weight reads and
    writes a float32 sum, which is zeros at first and is rounded at last."""
    block, waiting = [N / BLOCKS] * BLOCKS, [N / FLUSHES] * FLUSHES
    gemms = t.products(block, 4, 2) + t.products(waiting, 2, 2) + t.products(waiting, 2, 8)
    passes = [t.row_kernel("block, softmax", 4, 0, n) for n in block]
    passes += [t.row_kernel("block, dz", 4, 2, n) for n in block]
    passes += t.copies_of_weight(4, 4 + 2)
    return Cost(gemms, passes, 0, SMALL)


@pytest.mark.parametrize(
    "hidden, estimate, bare",  # milliseconds
    [(1_024, 37, 11.6), (2_048, 44, 22.6), (4_096, (60 + 74) / 2, 44.6), (8_192, 134, 88.6)],
)
def test_the_earlier_schedule(hidden, estimate, bare):
    t = tail(hidden)
    cost = earlier(t)
    assert len(cost.gemms) == 48
    assert sum(k.flops for k in cost.gemms) == pytest.approx(3 * 2 * N * V * hidden)
    p = combined(cost, OLD_H100)
    assert 1e3 * p.seconds == pytest.approx(estimate, rel=WITHIN)
    assert (p.host == p.seconds) == (hidden == 1_024)  # there the host was too slow
    assert 1e3 * predict(t.case, H100, "bare GEMMs").seconds == pytest.approx(bare, rel=WITHIN)


def test_what_launches_cost():
    """70 of 101 launches a block: 5 ms of the device, 20 ms of the host."""
    cost = earlier(tail(4_096))
    fewer = replace(cost, small=SMALL - 70 * BLOCKS)
    a, b = (combined(c, OLD_H100) for c in (cost, fewer))
    assert 1e3 * (a.launches - b.launches) == pytest.approx(5, rel=WITHIN)
    assert 1e3 * (a.host - b.host) == pytest.approx(20, rel=WITHIN)


@pytest.mark.parametrize(
    "hidden, ratio",
    [(4_096, 1.14), (8_192, 1.08)],
)
def test_what_the_review_expected_of_keeping_all_gradients(hidden, ratio):
    """Up to 2H rows, one product each: what was done since."""
    case = tail(hidden).case
    ours, bare = (predict(case, H100, who).seconds for who in ("humanline", "bare GEMMs"))
    assert ours / bare == pytest.approx(ratio, rel=0.05)


@pytest.mark.parametrize("device", [OLD_H100, OLD_B200], ids=lambda d: d.name)
@pytest.mark.parametrize(
    "passes, of_h100, of_b200",  # fractions of the datasheet's bandwidth
    [
        ([(LOSS, 2, 0), (SECOND, 0, 2)], (0.70, 0.78), (0.37, 0.45)),
        ([(FORWARD, 2, 0)], (0.80, 0.85), (0.60, 0.70)),
        ([(BACKWARD, 2, 2)], (0.80, 0.85), (0.60, 0.70)),
        ([(SOFTMAX, 4, 0)], (0.85, 0.85), (0.75, 0.75)),
        ([(GRADIENT, 4, 2)], (0.75, 0.80), (0.65, 0.75)),
    ],
    ids=["loss", "forward", "backward", "softmax", "gradient"],
)
def test_the_earlier_row_kernels(device, passes, of_h100, of_b200):
    t = tail(4_096)
    kernels = [t.row_kernel(name, r, w, N, step) for (name, step), r, w in passes]
    seconds = sum(map(device.seconds, kernels))
    fraction = sum(k.bytes for k in kernels) / device.card.bandwidth / seconds
    low, high = of_h100 if device is OLD_H100 else of_b200
    assert fraction == pytest.approx((low + high) / 2, rel=WITHIN)
