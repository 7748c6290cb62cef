"""How many launches a call takes beside its GEMMs, and how often the host waits for the device."""

import os

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs kernels that take CPU tensors", allow_module_level=True)

from bench.cases import Case
from bench.machine_code.launches import OBJECTIVES, ROWS, V, count, main
from bench.paper.costs import COSTS, Tail

TOKEN_LEVEL = ["GRPO", "GRPO, KL", "GRPO, entropy", "PPO", "SFT"]
SEQUENCE_LEVEL = ["DPO", "KTO", "SimPO", "SLiC", "GSPO"]
BY_TORCH = ["DPO, ProspectWeight"]  # coefficients and statistics have no kernel


def test_every_objective_is_sorted_here():
    assert {*TOKEN_LEVEL, *SEQUENCE_LEVEL, "GSPO, entropy", *BY_TORCH} == OBJECTIVES.keys()


@pytest.mark.parametrize("name", TOKEN_LEVEL + SEQUENCE_LEVEL)
def test_from_logits(name):
    work = count(name, "logits")
    assert 0 < work.beside_gemms <= 15 and work.gemms == work.reads == 0


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", TOKEN_LEVEL + SEQUENCE_LEVEL)
def test_from_hidden_states(name, masked):
    """Up to 2H rows: eleven blocks of 768, then one product for the hidden states and one for the
    weight."""
    work = count(name, "hidden", masked=masked)
    assert work.beside_gemms <= (150 if name in TOKEN_LEVEL and name != "SFT" else 120)
    assert work.gemms == 11 + 2 and work.reads <= 3
    assert 2 * 11 < work.triton <= 2 * 11 + 2


@pytest.mark.parametrize("name", ["GRPO", "DPO", "SFT"])
def test_a_narrow_head_forms_its_logits_twice(name):
    """Five blocks of at most 1,664 rows."""
    work = count(name, "hidden", width=1_024)
    assert work.names["humanline_linear_logps"] == 1
    assert work.names["humanline_linear_gradient"] == 5 and work.gemms == 2 * 5
    assert work.beside_gemms <= 90 and work.reads <= 3


@pytest.mark.parametrize("name", TOKEN_LEVEL + SEQUENCE_LEVEL)
def test_with_a_frozen_head(name):
    work = count(name, "hidden, frozen head")
    assert work.beside_gemms <= (150 if name in TOKEN_LEVEL and name != "SFT" else 120)
    if name in TOKEN_LEVEL:  # rows wait in the workspace, which is emptied seven times
        assert (work.gemms, work.reads) == (32 + 1 + 7, 1 + 7)
    else:  # all rows are multiplied, block by block
        assert (work.gemms, work.reads) == (2 * 11, 1)


def test_a_ratio_a_sequence_with_an_entropy_bonus():
    """Which has a coefficient a row of its own, known once the sequence is: its logits are formed a
    second time."""
    work = count("GSPO, entropy", "logits")
    assert 0 < work.beside_gemms <= 17 and work.gemms == work.reads == 0
    for entry in ("hidden", "hidden, frozen head"):
        work = count("GSPO, entropy", entry)
        assert work.beside_gemms <= 130 and work.reads <= 3


@pytest.mark.parametrize("name", BY_TORCH)
def test_others_take_more_launches_but_no_more_products(name):
    assert count(name, "logits").beside_gemms > 150
    work = count(name, "hidden")
    assert work.beside_gemms > 150 and work.gemms == 11 + 2 and work.reads <= 3


@pytest.mark.parametrize("name", ["GRPO", "KTO"])
def test_beyond_2H_rows_one_read_each_time_that_H_rows_wait(name):
    """KTO's sequences are of 3,072 rows, of which one fits."""
    rows = 3 * ROWS
    work = count(name, "hidden", rows=rows)
    times = 8 if name == "KTO" else rows // (ROWS // 2)
    assert work.reads <= 3 + times
    assert work.gemms == 2 * times + (times * 4 if name == "KTO" else 6 * 6)


def test_pairs_that_do_not_fit_take_a_second_pass():
    """By kernels that write no logits; the gradient's products are by blocks of 1,664 rows."""
    work = count("DPO", "hidden", rows=3 * ROWS)
    assert work.names["humanline_linear_logps"] == 1
    assert work.names["humanline_linear_gradient"] == 15 and work.gemms == 2 * 15


def test_the_table(capsys):
    main(["--only", "SFT"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("SFT")]
    assert len(lines) == 3 and all(len(line.split()) >= 6 for line in lines)


@pytest.mark.parametrize("width", [1_024, 2_048, 4_096])
def test_the_model_launches_what_is_counted(width):
    """Logits formed twice; H rows that wait; all of them."""
    work = count("GRPO", "hidden", width=width)
    case = Case("grpo", "hidden", ROWS, width, V, "bfloat16")
    cost = COSTS["humanline"](Tail(case, case.tokens, case.vocab, is_cpu=False))
    row_kernels = sum(k.loop is not None for k in cost.passes)
    ours = work.names["humanline_linear_logps"] + work.names["humanline_linear_gradient"]
    assert row_kernels == work.names["humanline_head_softmax"] * 2
    if width == 1_024:  # a forward over all rows is a GEMM of ours, or one a block by the model
        assert (len(cost.gemms), ours) == (work.gemms + 1 + 5, 1 + 5)
    else:
        assert (len(cost.gemms), ours) == (work.gemms, 0)
    # the rounding of the sum at the end is a kernel of torch
    passes = len(cost.passes) - row_kernels
    assert cost.small + row_kernels == work.beside_gemms - ours and passes <= 1


def test_the_model_launches_what_is_counted_from_logits():
    case = Case("grpo", "logits", ROWS, 1, V, "bfloat16")
    cost = COSTS["humanline"](Tail(case, case.tokens, case.vocab, is_cpu=False))
    # two passes are one launch
    assert len(cost.passes) - 1 + cost.small == count("GRPO", "logits").beside_gemms
