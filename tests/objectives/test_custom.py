"""A user's own objective: one subclass with one method, from every entry point."""

import pytest
import torch
import torch.nn.functional as F
from oracle import Data, close, eager, eager_from_logits, gradients, leaf

import humanline as hl

DATA = Data()
WEIGHTS = torch.tensor([0.3, -1.2, 0.8, 2.0], dtype=torch.float64)
LOGITS = torch.randn(
    DATA.B, DATA.T, DATA.V, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
)


class Ranking(hl.Objective):
    """Every sequence ranked above the one after it, by its perceived log-ratio."""

    def loss(self, rows, margin):
        rewards = rows.sum(rows.log_ratio)
        return F.softplus(margin - rewards[:-1] + rewards[1:]).mean()


class Weighted(hl.TokenObjective):
    """Squared perceived log-ratios, weighted."""

    def token_loss(self, rows, weights):
        return rows.token_mean(weights * (rows.log_ratio**2 + rows.logps))


BATCHES = {Ranking: {"margin": 0.3}, Weighted: {"weights": WEIGHTS}}


def eager_loss(cls, logps, low=-torch.inf, high=torch.inf):
    """The same losses on ``[B, T]``, without the library."""
    c = torch.where(DATA.mask, (logps - DATA.ref).clamp(low, high), 0)
    if cls is Ranking:
        rewards = c.sum(1)
        return F.softplus(0.3 - rewards[:-1] + rewards[1:]).mean()
    return (WEIGHTS[:, None] * (c**2 + logps))[DATA.mask].sum() / DATA.mask.sum()


CLASSES = pytest.mark.parametrize("cls", [Ranking, Weighted])
PACKED = pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
PERCEPTION = pytest.mark.parametrize("bounds", [None, (-0.4, 0.3)], ids=["identity", "clip"])


def compare(cls, bounds, packed, logps, result, *inputs):
    """Loss and gradients of a result, against eager torch on padded log-probs."""
    loss, stats = result
    expected = eager_loss(cls, logps, *bounds or ())
    close(loss.detach(), expected.detach())
    close(gradients(loss, *inputs), gradients(expected, *inputs))
    assert stats["humanline/active_rows"] > 0


def arguments(cls, bounds, packed, rows_name):
    """The objective, and what all entry points get besides the policy's own tensors."""
    objective = cls(perception=hl.Clip(*bounds) if bounds else hl.Identity())
    rows = DATA.shaped(getattr(DATA, rows_name), packed)
    batch = BATCHES[cls] | ({"cu_seqlens": DATA.cu_seqlens} if packed else {})
    return objective, rows, DATA.shaped(DATA.ref, packed), batch


@CLASSES
@PERCEPTION
@PACKED
def test_own_objective_from_log_probs(cls, bounds, packed):
    objective, mask, ref, batch = arguments(cls, bounds, packed, "mask")
    logps = leaf(DATA.logps)
    result = objective.from_logps(DATA.shaped(logps, packed), ref, mask, **batch)
    compare(cls, bounds, packed, logps, result, logps)


@CLASSES
@PERCEPTION
@PACKED
def test_own_objective_from_logits(cls, bounds, packed):
    objective, labels, ref, batch = arguments(cls, bounds, packed, "labels")
    logits = leaf(LOGITS)
    logps, _ = eager_from_logits(logits, DATA.labels)
    result = objective.from_logits(DATA.shaped(logits, packed), labels, ref, **batch)
    compare(cls, bounds, packed, logps, result, logits)


@CLASSES
@PERCEPTION
@PACKED
@pytest.mark.parametrize("workspace_bytes", [8 * DATA.V, 2**20], ids=["blocks", "at-once"])
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
def test_own_objective_from_hidden(cls, bounds, packed, workspace_bytes, frozen):
    objective, labels, ref, batch = arguments(cls, bounds, packed, "labels")
    hidden = leaf(DATA.hidden)
    weight = DATA.weight if frozen else leaf(DATA.weight)
    logps, _ = eager(hidden, weight, DATA.labels)
    result = objective.from_hidden(
        *(DATA.shaped(hidden, packed), weight, labels, ref),
        workspace_bytes=workspace_bytes,
        **batch,
    )
    compare(cls, bounds, packed, logps, result, *([hidden] if frozen else [hidden, weight]))


def test_own_objective_without_its_method_says_which():
    class Empty(hl.Objective):
        pass

    class EmptyToken(hl.TokenObjective):
        pass

    with pytest.raises(NotImplementedError, match=r"Empty does not define loss\(\)"):
        Empty().from_logps(DATA.logps, DATA.ref, DATA.mask)
    with pytest.raises(NotImplementedError, match=r"EmptyToken does not define token_loss\(\)"):
        EmptyToken().from_logps(DATA.logps, DATA.ref, DATA.mask)


def test_own_perception_without_its_method_says_which():
    class Empty(hl.Perception):
        pass

    with pytest.raises(NotImplementedError, match=r"Empty does not define perceive\(\)"):
        hl.DPO(perception=Empty()).from_logps(DATA.logps, DATA.ref, DATA.mask)


def test_own_perception_works_with_every_entry_point():
    class Half(hl.Perception):
        def perceive(self, log_ratio, mask):
            return log_ratio / 2, torch.ones_like(mask)

    weight, hidden = leaf(DATA.weight), leaf(DATA.hidden)
    logps, _ = eager(hidden, weight, DATA.labels)
    halved, _ = hl.DPO(beta=0.1, perception=Half()).from_hidden(
        hidden, weight, DATA.labels, DATA.ref
    )
    plain, _ = hl.DPO(beta=0.05).from_logps(logps, DATA.ref, DATA.mask)
    close(halved.detach(), plain.detach())
    close(gradients(halved, hidden, weight), gradients(plain, hidden, weight))


def test_a_perception_sees_zero_outside_the_mask():
    """Else whatever stands there reaches the gradient of a perception that multiplies by it."""

    class Square(hl.Perception):
        def perceive(self, log_ratio, mask):
            assert not log_ratio[~mask].any()
            return log_ratio**2, torch.ones_like(mask)

    logps, old = leaf(DATA.logps), DATA.old.masked_fill(~DATA.mask, torch.nan)
    loss, _ = hl.GRPO(perception=Square()).from_logps(
        logps, None, DATA.mask, advantages=DATA.advantages, old_logps=old
    )
    assert gradients(loss, logps)[0].isfinite().all()


def test_a_row_tensor_of_the_batch_reaches_token_loss_as_rows():
    objective = Weighted(perception=hl.Clip(-0.4, 0.3))
    spread = WEIGHTS[:, None].expand(DATA.B, DATA.T)
    results = [
        objective.from_logps(DATA.logps, DATA.ref, DATA.mask, weights=weights)
        for weights in (WEIGHTS, spread)
    ]
    close(*results)


def test_a_loss_that_ignores_the_policy_has_no_gradient():
    class Constant(hl.Objective):
        def loss(self, rows):
            return rows.ref_logps.sum()

    hidden, weight = leaf(DATA.hidden), leaf(DATA.weight)
    loss, stats = Constant().from_hidden(hidden, weight, DATA.labels, DATA.ref)
    close(loss.detach(), DATA.ref[DATA.mask].sum())
    assert stats["humanline/active_rows"] == 0
    assert not any(grad.any() for grad in gradients(loss, hidden, weight))


# What is no loss


def token_objective(loss):
    class Own(hl.TokenObjective):
        def token_loss(self, rows):
            return loss(rows)

    return Own()


def objective(loss, of="batch"):
    class Own(hl.Objective):
        coupling = of

        def loss(self, rows):
            return loss(rows)

    return Own()


def from_logps(own):
    return own.from_logps(leaf(DATA.logps), DATA.ref, DATA.mask)


def from_logits(own):
    return own.from_logits(leaf(LOGITS), DATA.labels, DATA.ref)


def from_hidden(own):
    return own.from_hidden(leaf(DATA.hidden), leaf(DATA.weight), DATA.labels, DATA.ref)


ENTRY = pytest.mark.parametrize("call", [from_logps, from_logits, from_hidden])


@ENTRY
@pytest.mark.parametrize(
    ("own", "message", "error"),
    [
        (
            token_objective(lambda rows: rows.logps.sum()),
            r"Own.token_loss\(\) must return a tensor \[\d+\], .* got a tensor of shape \[\]",
            ValueError,
        ),
        (
            token_objective(lambda rows: rows.logps[:, None]),
            r"must return a tensor \[(\d+)\], .* got a tensor of shape \[\1, 1\]",
            ValueError,
        ),
        (token_objective(lambda rows: 0.5), "token_loss.* got the float 0.5", TypeError),
        (
            token_objective(lambda rows: rows.logps.detach()),
            "must be differentiable with respect to the rows .* detached",
            ValueError,
        ),
        (
            token_objective(lambda rows: rows.expand(rows.sum(rows.logps))),
            "sums over sequences need all 20 rows of the batch",
            ValueError,
        ),
        (objective(lambda rows: 0.5), r"Own.loss\(\) must return a scalar .* float 0.5", TypeError),
        (
            objective(lambda rows: rows.logps),
            r"Own.loss\(\) must return a floating-point scalar, got torch.float64 \[20\]",
            ValueError,
        ),
        (objective(lambda rows: rows.logps.sum()[None]), r"scalar, got .* \[1\]", ValueError),
        (objective(lambda rows: rows.mask.sum()), r"scalar, got torch.int64 \[\]", ValueError),
    ],
)
def test_what_is_no_loss_is_refused(call, own, message, error):
    if call is from_logps and "sums over" in message:
        return  # it is handed all rows there
    with pytest.raises(error, match=message):
        call(own)


@ENTRY
@pytest.mark.parametrize(
    ("own", "message"),
    [
        (token_objective(lambda rows: rows.logps - rows.logps.mean()), "Own is a TokenObjective"),
        (token_objective(lambda rows: rows.logps + rows.logps.sum()), "that row alone"),
        (token_objective(lambda rows: rows.logps * rows.logps.detach().mean()), "coefficient of"),
        (objective(lambda rows: rows.sum(rows.log_ratio).softmax(0)[0], "sequence"), "sequence"),
        (objective(lambda rows: rows.sum(rows.log_ratio).softmax(0)[0], "pair"), "pair alone"),
        (objective(lambda rows: rows.logps.detach().sum()), "is detached from it"),
    ],
)
def test_debug_looks_at_what_is_taken_at_an_objective_s_word(call, own, message):
    with hl.debug(), pytest.raises(ValueError, match=message):
        call(own)


def right_pairs(rows):
    chosen, rejected = rows.sum(rows.log_ratio).split(rows.num_sequences // 2)
    return torch.sigmoid(chosen - rejected).mean()


@ENTRY
@pytest.mark.parametrize(
    "own",
    [
        token_objective(lambda rows: rows.token_mean(rows.log_ratio**2)),
        token_objective(lambda rows: rows.sequence_mean(rows.logps.exp())),
        objective(lambda rows: rows.mean(rows.log_ratio).exp().sum(), "sequence"),
        objective(right_pairs, "pair"),
        objective(lambda rows: rows.sum(rows.log_ratio).softmax(0)[0]),
        objective(lambda rows: rows.ref_logps.sum()),
        hl.SFT(),
        hl.DPO(perception=hl.BetaRejection()),
        hl.DPO(loss_type="aot"),
    ],
)
@pytest.mark.parametrize("masked", [False, True], ids=["some", "all-masked"])
def test_debug_changes_nothing_of_a_right_one(call, own, masked, monkeypatch):
    if masked:
        monkeypatch.setattr(DATA, "mask", torch.zeros_like(DATA.mask))
        monkeypatch.setattr(DATA, "labels", torch.full_like(DATA.labels, -100))
    with hl.debug():
        torch.manual_seed(0)
        looked_at = call(own)
    torch.manual_seed(0)
    torch.testing.assert_close(looked_at, call(own), rtol=0, atol=0, equal_nan=True)
