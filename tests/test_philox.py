"""The counter-based generator and the distributions drawn from it."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from oracle import close

from humanline import philox

N = 20_000
ROWS = torch.empty(N, dtype=torch.float64)

TRITON = """
import sys

import torch
import triton
import triton.language as tl


@triton.jit
def draw(out, seed, n: tl.constexpr):
    offsets = tl.arange(0, n)
    words = tl.randint4x(seed, offsets)
    tl.store(out + offsets, words[0])
    tl.store(out + n + offsets, words[1])
    tl.store(out + 2 * n + offsets, words[2])
    tl.store(out + 3 * n + offsets, words[3])


for seed in sys.argv[1:]:
    out = torch.zeros(4, 16, dtype=torch.int32)
    draw[(1,)](out, int(seed), 16)
    print(*(out.long() & 0xFFFFFFFF).flatten().tolist())
"""


@pytest.mark.parametrize(
    ("word", "seed", "expected"),
    [
        (0, 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (2**32 - 1, 2**64 - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ],
    ids=["zeros", "ones"],
)
def test_known_answers_of_random123(word, seed, expected):
    words = philox.philox(seed, (word,) * 4, ROWS)
    assert tuple(int(w) for w in words) == expected


def test_known_answer_of_random123_with_distinct_words():
    counter = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    words = philox.philox(0x299F31D0_A4093822, counter, ROWS)
    assert [int(w) for w in words] == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


def test_words_are_those_of_triton(tmp_path):
    pytest.importorskip("triton")
    seeds = [0, 7, 2**31 - 1, 2**40 + 12345]
    script = Path(tmp_path, "draw.py")  # Triton reads a kernel's source from its file
    script.write_text(TRITON)
    out = subprocess.check_output(
        [sys.executable, script, *map(str, seeds)],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        text=True,
    )
    row = torch.arange(16)
    for seed, line in zip(seeds, out.splitlines(), strict=True):
        ours = torch.cat(philox.philox(seed, (row, row >> 32, 0, 0), row))
        assert ours.tolist() == [int(w) for w in line.split()]


def test_uniforms_stay_inside_the_open_interval():
    ends = philox.uniform(torch.tensor([0, 2**32 - 1]))
    assert 0 < ends[0] < ends[1] < 1


def test_seeds_follow_torch():
    torch.manual_seed(5)
    first = [philox.fresh_seed() for _ in range(3)]
    torch.manual_seed(5)
    assert [philox.fresh_seed() for _ in range(3)] == first
    assert len(set(first)) == 3


def test_a_draw_depends_on_its_row_alone():
    many = philox.log_beta(0.5, 2.0, ROWS, seed=1, stream=0)
    few = philox.log_beta(0.5, 2.0, ROWS[:100], seed=1, stream=0)
    close(many[:100], few)  # not bit for bit: torch's vectorised cos differs in its last place


@pytest.mark.parametrize("b", [1.0, 2.0])
def test_draws_have_the_dtype_of_the_rows(b):
    assert philox.log_beta(0.5, b, ROWS.float(), seed=1, stream=0).dtype == torch.float32


def log_beta_cdf(a: float, b: float, log_x: torch.Tensor) -> torch.Tensor:
    """``P(B ≤ x)``, integrated over the logit of x, where the density is smooth."""
    a_, b_ = torch.tensor([a, b], dtype=torch.float64)
    centre = torch.digamma(a_) - torch.digamma(b_)
    spread = (torch.polygamma(1, a_) + torch.polygamma(1, b_)).sqrt()
    s = centre + spread * torch.linspace(-40, 40, 400_001, dtype=torch.float64)
    log_pdf = a * torch.nn.functional.logsigmoid(s) + b * torch.nn.functional.logsigmoid(-s)
    pdf = (log_pdf - torch.lgamma(a_) - torch.lgamma(b_) + torch.lgamma(a_ + b_)).exp()
    cdf = torch.cumulative_trapezoid(pdf, s)
    assert abs(cdf[-1] - 1) < 1e-6
    logit = log_x - torch.log(-torch.expm1(log_x))
    return cdf[torch.searchsorted(s[1:], logit).clamp(max=len(cdf) - 1)]


SHAPES = [(0.01, 1), (0.5, 1), (1, 1), (30, 1), (0.5, 0.5), (0.3, 2), (1, 3), (2, 5), (1e4, 3e4)]


@pytest.mark.parametrize(("a", "b"), SHAPES)
def test_log_beta_has_the_beta_distribution(a, b):
    draws = philox.log_beta(a, b, ROWS, seed=11, stream=0).sort().values
    assert draws[-1] <= 0
    empirical = torch.arange(N + 1, dtype=torch.float64) / N
    cdf = log_beta_cdf(a, b, draws)
    distance = torch.maximum((cdf - empirical[:-1]).abs(), (cdf - empirical[1:]).abs()).max()
    assert distance * math.sqrt(N) < 1.95  # Kolmogorov and Smirnov, p = 0.001


@pytest.mark.parametrize(("a", "b"), SHAPES)
def test_log_beta_has_the_moments_of_beta(a, b):
    draws = philox.log_beta(a, b, ROWS, seed=12, stream=1).exp()
    mean, variance = a / (a + b), a * b / ((a + b) ** 2 * (a + b + 1))
    assert abs(draws.mean() - mean) < 4 * math.sqrt(variance / N)
    deviations = (draws - mean) ** 2
    assert abs(deviations.mean() - variance) < 4 * deviations.std() / math.sqrt(N)


@pytest.mark.parametrize("b", [1.0, 2.0])
def test_streams_and_seeds_are_independent(b):
    draws = [
        philox.log_beta(1.5, b, ROWS, seed, stream)
        for seed, stream in [(1, 0), (1, 1), (2, 0), (2**32 + 1, 0)]
    ]
    correlation = torch.corrcoef(torch.stack(draws).exp())
    close(correlation, torch.eye(4, dtype=torch.float64), tol=4 / math.sqrt(N))
