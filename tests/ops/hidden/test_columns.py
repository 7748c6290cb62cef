"""Columns left out of the backward: what is kept, what it costs, and how far off it is."""

import math
from dataclasses import replace

import pytest
import torch
from columns_cases import (
    CASES,
    OBJECTIVES,
    H,
    N,
    Products,
    V,
    assert_near_exact,
    certain,
    gradients,
    grpo_loss,
    head_loss,
    log_softmax_gradients,
    one_column,
    one_row,
    random,
    relative,
    sharp,
    signed,
    token_logps_loss,
)

import humanline as hl
import humanline.ops.hidden.blocks
import humanline.ops.hidden.columns
from humanline.ops.hidden.columns import DENSE_SHARE, Columns, Kept, fewest

# Which columns


@pytest.mark.parametrize("tolerance", [1e-4, 1e-2, 0.3, 0.99])
def test_the_fewest_columns_within_the_tolerance_are_kept(tolerance):
    energies = torch.rand(V, generator=torch.Generator().manual_seed(0)).double() ** 20
    labels = energies.argsort()[:5]  # of the least energy, and kept
    kept = fewest(energies, labels, tolerance)
    out = torch.ones(V, dtype=torch.bool)
    out[kept] = False
    budget = tolerance**2 * energies.sum()
    assert set(labels.tolist()) <= set(kept.tolist())
    assert energies[out].sum() <= budget
    others = out.clone()
    others[labels] = True  # one more would be too many
    next_one = energies[~others].min() if (~others).any() else math.inf
    assert energies[out].sum() + next_one > budget * (1 - 1e-9)
    assert kept.tolist() == sorted(kept.tolist())


def test_a_few_more_make_their_number_a_multiple():
    energies, labels = torch.arange(100.0), torch.tensor([0])
    least = fewest(energies, labels, 0.5)
    rounded = fewest(energies, labels, 0.5, multiple=16)
    assert len(least) % 16 and len(rounded) == 16 * math.ceil(len(least) / 16)
    assert rounded.tolist() == [0, *range(101 - len(rounded), 100)]
    assert len(fewest(energies, torch.arange(99), 1e-9, multiple=16)) == 100  # and no more


def test_where_next_to_nothing_could_pay_nobody_looks(monkeypatch):
    monkeypatch.setattr(humanline.ops.hidden.columns, "DENSE_SHARE", 0.09)
    monkeypatch.setattr(humanline.ops.hidden.columns, "dense_share", lambda *_: 0.09)
    monkeypatch.delattr(humanline.ops.hidden.columns, "fewest")
    hidden, weight, labels = sharp()
    stats = {}
    loose = gradients(grpo_loss(labels, signed(N), stats, gradient_tolerance=1e-2), hidden, weight)
    exact = gradients(grpo_loss(labels, signed(N)), hidden, weight)
    assert stats["humanline/kept_columns"] == 1
    assert all(torch.equal(a, b) for a, b in zip(loose, exact, strict=True))


def test_ties_go_by_index():
    energies, labels = torch.ones(10), torch.tensor([0])
    assert fewest(energies, labels, math.sqrt(0.35)).tolist() == [0, 4, 5, 6, 7, 8, 9]


def test_columns_without_energy_are_left_out_at_any_tolerance():
    energies = torch.tensor([0.0, 1e-30, 0.0, 1e-30])
    assert fewest(energies, torch.tensor([0]), 1e-9).tolist() == [0, 1, 3]


@pytest.mark.parametrize("value", [0.0, math.inf, math.nan])
def test_all_are_kept_where_the_energy_says_nothing(value):
    assert len(fewest(torch.full((7,), value), torch.tensor([1]), 0.5)) == 7


# What it costs


@pytest.mark.parametrize("frozen", [None, "head", "body"])
@pytest.mark.parametrize("dropped", [0, 40], ids=["all rows", "dropped rows"])
def test_products_of_an_objective(dropped, frozen):
    hidden, weight, labels = sharp()
    g = torch.ones(N)
    g[:dropped] = 0
    stats = {}
    hidden.requires_grad_(frozen != "body")
    weight.requires_grad_(frozen != "head")
    with Products() as products:
        grpo_loss(labels, g, stats, gradient_tolerance=1e-2)(hidden, weight).backward()
    share = float(stats["humanline/kept_columns"])
    assert 0 < share < 0.5
    wings = 1 if frozen else 2
    kept = round(share * V)
    assert share == pytest.approx(kept / V, rel=1e-6)
    assert products.count == N * H * V + wings * (N - dropped) * H * kept


@pytest.mark.parametrize("rows", [16, 40])
def test_products_and_share_over_several_blocks(rows, monkeypatch):
    monkeypatch.setattr(humanline.ops.hidden.blocks, "CPU_BLOCK_ROWS", rows)
    hidden, weight, labels = sharp()
    stats = {}
    with Products() as products:
        gradients(
            grpo_loss(labels, signed(N).abs(), stats, gradient_tolerance=1e-2), hidden, weight
        )
    share = float(stats["humanline/kept_columns"])
    outer = V * H * -(-N // rows)  # what they leave out is put back in one product of this rank
    assert products.count == pytest.approx(N * H * V * (1 + 2 * share) + outer, rel=1e-6)


@pytest.mark.parametrize("frozen", [False, True])
def test_products_of_token_logps(frozen):
    hidden, weight, labels = sharp()
    hidden.requires_grad_()
    weight.requires_grad_(not frozen)
    columns = Columns(1e-2, hidden)
    chosen = []
    original = columns.choose

    def choose(*args, **kwargs):
        kept = original(*args, **kwargs)
        chosen.append(len(kept.columns))
        return kept

    columns.choose = choose
    head = hl.ops.Head().for_rows(labels)
    with Products() as products:
        logps = humanline.ops.hidden.token_logps.head_logps(
            *(hidden, weight, labels, head),
            return_entropy=False,
            workspace_bytes=2**20,
            backend="torch",
            capturable=False,
            columns=columns,
        )
        (logps @ signed(N)).backward()
    (kept,) = chosen
    assert kept < V / 2
    forwards, wings = (1, 1) if frozen else (2, 2)
    assert products.count == N * H * (forwards * V + wings * kept)


def test_tiles_of_gathered_columns_add_up(monkeypatch):
    hidden, weight, labels = sharp()
    loss = grpo_loss(labels, signed(N), gradient_tolerance=1e-3)
    whole = gradients(loss, hidden, weight)
    monkeypatch.setattr(humanline.ops.hidden.columns, "_TILE_ELEMENTS", 7 * N)
    monkeypatch.setattr(humanline.ops.hidden.columns, "_CHUNK_FLOATS", 5 * V)
    for a, b in zip(gradients(loss, hidden, weight), whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


# Where nothing is left out


def test_random_logits_are_multiplied_as_they_are():
    hidden, weight, labels = random()
    stats = {}
    some = gradients(
        grpo_loss(labels, signed(N), stats, gradient_tolerance=1e-4),
        hidden,
        weight,
    )
    exact = gradients(grpo_loss(labels, signed(N)), hidden, weight)
    assert stats["humanline/kept_columns"] == 1
    for a, b in zip(some, exact, strict=True):
        assert torch.equal(a, b)


def test_exact_chooses_nothing_and_says_nothing(monkeypatch):
    monkeypatch.delattr(humanline.ops.hidden.columns, "fewest")
    hidden, weight, labels = sharp()
    stats = {}
    gradients(grpo_loss(labels, signed(N), stats, gradient_tolerance=0), hidden, weight)
    gradients(token_logps_loss(labels, signed(N)), hidden, weight)
    assert "humanline/kept_columns" not in stats


def test_an_evaluation_has_no_columns():
    hidden, weight, labels = sharp()
    stats = {}
    grpo_loss(labels, signed(N), stats, gradient_tolerance=1e-3)(hidden, weight)
    assert "humanline/kept_columns" not in stats


def test_no_row_no_column():
    hidden, weight, labels = sharp()
    stats = {}
    gradients(grpo_loss(labels, torch.zeros(N), stats, gradient_tolerance=1e-3), hidden, weight)
    assert stats["humanline/kept_columns"] == 0


def test_the_same_bits_on_a_rerun():
    hidden, weight, labels = sharp()
    loss = grpo_loss(labels, signed(N), gradient_tolerance=1e-3)
    for a, b in zip(gradients(loss, hidden, weight), gradients(loss, hidden, weight), strict=True):
        assert torch.equal(a, b)


# How far off it is


@pytest.mark.parametrize("tolerance", [1e-3, 1e-2])
@pytest.mark.parametrize("case", CASES)
def test_error_against_float64(case, tolerance):
    hidden, weight, labels = case()
    n = len(labels)
    g = signed(n)
    truth = log_softmax_gradients(hidden, weight, labels, g)
    loss = token_logps_loss(labels, g, gradient_tolerance=tolerance)
    dh, dw = gradients(loss, hidden, weight)
    rounding = 1e-5
    assert relative(dw, truth[1]) <= 1.5 * tolerance + rounding
    assert relative(dh, truth[0]) <= 5 * tolerance + rounding


@pytest.mark.parametrize("case", [sharp, certain, one_column, one_row])
def test_columns_are_left_out_of_sharp_rows(case):
    """So that the errors above are those of something."""
    hidden, weight, labels = case()
    stats = {}
    loss = grpo_loss(labels, signed(len(labels)), stats, gradient_tolerance=1e-2)
    gradients(loss, hidden, weight)
    assert stats["humanline/kept_columns"] < DENSE_SHARE


@pytest.mark.parametrize("g", [torch.ones(N), torch.linspace(-1, 1, N)], ids=["one", "both signs"])
def test_what_rows_share_is_put_back(g, monkeypatch):
    hidden, weight, labels = sharp()
    truth = log_softmax_gradients(hidden, weight, labels, g)
    loss = token_logps_loss(labels, g, gradient_tolerance=1e-2)
    some = gradients(loss, hidden, weight)
    of = Kept.of

    def without(*args):
        kept = of(*args)
        return replace(kept, fit=torch.zeros_like(kept.fit))

    monkeypatch.setattr(Kept, "of", without)
    dropped = gradients(loss, hidden, weight)
    for x, d, t in zip(some, dropped, truth, strict=True):
        assert relative(x, t) < relative(d, t) / 1.3
    assert (dropped[1] == 0).all(1).any()
    assert not (some[1] == 0).all(1).any()


def test_one_row_s_left_out_columns_are_of_rank_1():
    hidden, weight, labels = one_row()
    truth = log_softmax_gradients(hidden, weight, labels, torch.ones(1))
    dh, dw = gradients(
        token_logps_loss(labels, torch.ones(1), gradient_tolerance=0.1), hidden, weight
    )
    assert relative(dh, truth[0]) < 1e-5
    assert relative(dw, truth[1]) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_dtypes(dtype):
    hidden, weight, labels = sharp(dtype=dtype)
    g = signed(N).to(torch.float64 if dtype == torch.float64 else torch.float32)
    for loss in (token_logps_loss, grpo_loss):
        truth = gradients(loss(labels, g.double()), hidden.double(), weight.double())
        exact = gradients(loss(labels, g), hidden, weight)
        some = gradients(loss(labels, g, gradient_tolerance=1e-2), hidden, weight)
        for x, e, t, bound in zip(some, exact, truth, (5e-2, 1.5e-2), strict=True):
            assert x.dtype == dtype
            assert not torch.equal(x, e)
            assert relative(x, t) <= relative(e, t) + bound


# With all a head and an objective can have


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_every_option(softcap):
    hidden, weight, labels = sharp()
    labels[5] = -100
    bias = torch.randn(V, generator=torch.Generator().manual_seed(5))
    temperature = torch.linspace(0.7, 1.3, N)
    g, g_entropy = signed(N), signed(N, seed=4)
    g[10:20], g_entropy[10:20] = 0, 0
    options = {"temperature": temperature, "logit_scale": 1.2, "logit_softcap": softcap}

    def eager(h, w, b):
        z = (h @ w.T + b) * 1.2
        if softcap:
            z = softcap * torch.tanh(z / softcap)
        lp = (z / temperature[:, None]).log_softmax(-1)
        logps = lp.gather(1, labels.clamp(min=0)[:, None]).squeeze(1)
        entropy = -(lp.exp() * lp).sum(-1)
        here = labels >= 0
        return (torch.where(here, logps * g + entropy * g_entropy, 0)).sum()

    truth = gradients(eager, *(x.double() for x in (hidden, weight, bias)))
    for tolerance in (1e-3, 1e-2):
        loss = head_loss(labels, g, g_entropy, gradient_tolerance=tolerance, **options)
        dh, dw, db = gradients(loss, hidden, weight, bias)
        assert relative(dh, truth[0]) <= 5 * tolerance + 1e-5
        assert relative(dw, truth[1]) <= 1.5 * tolerance + 1e-5
        assert relative(db, truth[2]) <= 1e-5  # exact


@pytest.mark.parametrize("frozen_head", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("objective, extra", OBJECTIVES, ids=lambda x: type(x).__name__)
def test_every_objective(objective, extra, packed, frozen_head):
    assert_near_exact(objective, extra, packed, frozen_head)


def test_a_frozen_head_bounds_the_rows_errors_whatever_their_coefficients():
    """The gradient of log-probs is formed before coefficients are known."""
    hidden, weight, labels = sharp()
    hidden.requires_grad_()
    n, tolerance = N, 1e-2
    logps = hl.linear_token_logps(hidden, weight, labels, gradient_tolerance=tolerance)
    unit = torch.autograd.grad(logps.sum(), hidden)[0]
    p = (hidden.double() @ weight.double().T).softmax(-1)
    dz = torch.nn.functional.one_hot(labels, V) - p
    errors = (unit - dz @ weight.double()).norm(dim=1)
    bound = tolerance * math.sqrt(n) * torch.linalg.matrix_norm(weight.double(), 2)
    assert (errors <= bound * dz.norm(dim=1) + 1e-5).all()


def test_rows_from_where_gradients_overflow_are_left_to_the_exact_path():
    hidden, weight, labels = sharp()
    hidden[3] = math.inf
    dh, _ = gradients(
        token_logps_loss(labels, torch.ones(N), gradient_tolerance=1e-2), hidden, weight
    )
    exact, _ = gradients(token_logps_loss(labels, torch.ones(N)), hidden, weight)
    assert torch.equal(dh.isnan(), exact.isnan())


# What is refused


@pytest.mark.parametrize("value", [1, 1.5, -1e-3, math.nan, math.inf])
def test_a_tolerance_is_a_share(value):
    hidden, weight, labels = sharp()
    with pytest.raises(ValueError, match=r"gradient_tolerance must be in \[0, 1\), got"):
        hl.linear_token_logps(hidden, weight, labels, gradient_tolerance=value)
    with pytest.raises(ValueError, match=r"gradient_tolerance must be in \[0, 1\), got"):
        hl.SFT().from_hidden(hidden, weight, labels, gradient_tolerance=value,
                             cu_seqlens=torch.tensor([0, N]))  # fmt: skip


@pytest.mark.parametrize("value", ["1e-3", None, True, [1e-3]])
def test_a_tolerance_is_a_number(value):
    hidden, weight, labels = sharp()
    with pytest.raises(TypeError, match="gradient_tolerance must be a number, got"):
        hl.linear_token_logps(hidden, weight, labels, gradient_tolerance=value)


def test_capturable_reads_nothing_back():
    hidden, weight, labels = sharp()
    with pytest.raises(ValueError, match="capturable reads nothing back from the device"):
        hl.linear_token_logps(hidden, weight, labels, gradient_tolerance=1e-3, capturable=True)
