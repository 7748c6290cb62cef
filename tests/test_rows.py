"""Layouts of rows, and every objective × perception through every entry point."""

from dataclasses import dataclass, field

import pytest
import torch
from oracle import (
    BY_NAME,
    CASES,
    FEW,
    PERCEPTIONS,
    WITH_REFERENCE,
    Case,
    Data,
    case_ids,
    case_perceptions,
    close,
    eager,
    eager_from_logits,
    gradients,
    leaf,
)
from torch.autograd import gradcheck

import humanline as hl
from humanline.rows import Layout

DATA = Data()
LAYOUTS = pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
# One row of logits at a time (two buffers, so that it holds with entropy as well), or all at once.
SMALL, LARGE = 3 * 8 * Data.V, 2**20  # one row with entropy and softcap
OPTIONS = {
    "plain": {},
    "all": {"logit_scale": 0.7, "logit_softcap": 2.5, "temperature": 1.3},
}


def differentiate(loss_stats, *inputs):
    loss, stats = loss_stats
    return loss.detach(), stats, gradients(loss, *inputs)


# Layout


MASK = torch.tensor([[0, 1, 1], [1, 0, 0], [0, 0, 0]])
LAYOUT = Layout.of(MASK, None)
PACKED = Layout.of(MASK.flatten()[:6], torch.tensor([0, 2, 2, 6]))


def test_tokens_and_lengths_count_the_mask():
    assert LAYOUT.tokens == 3 and LAYOUT.lengths.tolist() == [2, 1, 0]
    assert PACKED.tokens == 3 and PACKED.lengths.tolist() == [1, 0, 2]


def test_packed_rows_know_their_sequence():
    assert PACKED.sequence_of_row.tolist() == [0, 0, 2, 2, 2, 2]


def test_sums_are_of_each_sequence():
    assert LAYOUT.sum(torch.arange(9.0)).tolist() == [3, 12, 21]
    assert PACKED.sum(torch.arange(6.0)).tolist() == [1, 0, 14]


def test_means_divide_by_the_completion_tokens():
    assert LAYOUT.mean(torch.arange(9.0)).tolist() == [1.5, 12, 21]
    assert PACKED.mean(torch.arange(6.0)).tolist() == [1, 0, 7]


def test_expand_repeats_a_value_on_each_row():
    x = torch.tensor([1.0, 2.0, 3.0])
    assert LAYOUT.expand(x).tolist() == [1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert PACKED.expand(x).tolist() == [1, 1, 3, 3, 3, 3]


@pytest.mark.parametrize("layout", [LAYOUT, PACKED], ids=["padded", "packed"])
@pytest.mark.parametrize("method", ["sum", "mean", "expand"])
def test_sums_and_expansions_have_their_gradients(layout, method):
    x = torch.randn(3 if method == "expand" else layout.mask.numel(), dtype=torch.float64)
    assert gradcheck(getattr(layout, method), leaf(x))


def test_packed_sums_of_float32_keep_their_digits():
    """A million ones after one large number: in float32 one after the other they would vanish."""
    x = torch.ones(1_000_001)
    x[0] = 2.0**25
    layout = Layout.of(x, torch.tensor([0, len(x)]))
    assert layout.sum(x).item() == 2.0**25 + 1_000_000


# Padded and packed


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    ("case", "perception"), case_perceptions(CASES, [p for p in PERCEPTIONS if p != "beta"])
)
def test_padded_and_packed_agree(case, perception, dtype):
    results = {}
    for packed in (False, True):
        logps = leaf(DATA.shaped(DATA.logps, packed))
        over = {"cu_seqlens": DATA.cu_seqlens.to(dtype)} if packed else {}
        loss, stats, (grad,) = differentiate(
            DATA.from_logps(case, perception, logps, packed, **over), logps
        )
        results[packed] = loss, stats, DATA.unpacked(grad, packed)
    close(results[True], results[False])


@pytest.mark.parametrize("case", case_ids(WITH_REFERENCE))
def test_padded_and_packed_agree_on_rejection_where_rows_are_the_same(case):
    """A draw belongs to a row: the sequences are packed with their padding."""
    data, perception = Data(lengths=(5, 5, 5, 5), prompts=(1, 3, 5, 0)), PERCEPTIONS["beta"]
    results = []
    for packed in (False, True):
        logps = leaf(data.shaped(data.logps, packed))
        loss, stats, (grad,) = differentiate(
            data.from_logps(case, perception, logps, packed), logps
        )
        results.append((loss, stats, data.unpacked(grad, packed)))
    close(*results)


@pytest.mark.parametrize("case", case_ids(CASES))
def test_values_outside_the_mask_do_not_matter(case):
    """Not even NaN, which a wrong order of ``where`` lets through to the gradient."""
    results, data = [], Data()
    for filler in (None, torch.nan, torch.inf):
        if filler is not None:
            for name in ("logps", "ref", "old", "entropy", "row_advantages"):
                setattr(data, name, getattr(data, name).masked_fill(~data.mask, filler))
            for name in ("kl_logps", "kl_ref_logps"):
                setattr(data, name, getattr(data, name).masked_fill(~data.kl_mask, filler))
        logps = leaf(data.logps)
        results.append(differentiate(data.from_logps(case, hl.Identity(), logps), logps))
    for loss, stats, grad in results[1:]:
        close((loss, stats, grad), results[0])
    assert not results[0][2][0][~DATA.mask].any()


@pytest.mark.parametrize("workspace_bytes", [SMALL, LARGE], ids=["blocks", "at-once"])
@pytest.mark.parametrize("case", case_ids(FEW))
def test_hidden_states_and_logits_outside_the_mask_do_not_matter(case, workspace_bytes):
    results = []
    for filler in (0.0, torch.nan):
        masked = ~DATA.mask[..., None]
        hidden, weight = leaf(DATA.hidden.masked_fill(masked, filler)), leaf(DATA.weight)
        logits = leaf((DATA.hidden @ DATA.weight.T).masked_fill(masked, filler))
        from_hidden = DATA.from_hidden(
            case, hl.Identity(), hidden, weight, workspace_bytes=workspace_bytes
        )
        from_logits = DATA.from_logits(case, hl.Identity(), logits)
        results += [
            (differentiate(from_hidden, hidden, weight), differentiate(from_logits, logits))
        ]
    close(*results)


# Degenerate batches


@LAYOUTS
@pytest.mark.parametrize(("case", "perception"), case_perceptions(CASES))
def test_an_all_masked_batch_has_a_finite_loss_and_no_gradient(case, perception, packed):
    data = Data()
    data.mask = torch.zeros_like(data.mask)
    data.kl_mask = torch.zeros_like(data.kl_mask)
    logps = leaf(data.shaped(data.logps, packed))
    loss, _, (grad,) = differentiate(data.from_logps(case, perception, logps, packed), logps)
    assert loss.isfinite()
    assert not grad.any()


@pytest.mark.parametrize("workspace_bytes", [SMALL, LARGE])
@pytest.mark.parametrize("case", case_ids(FEW))
def test_an_all_masked_batch_from_hidden_has_no_gradient(case, workspace_bytes):
    data = Data()
    data.labels = torch.full_like(data.labels, -100)
    hidden, weight = leaf(data.hidden), leaf(data.weight)
    loss, _, grads = differentiate(
        data.from_hidden(case, hl.Identity(), hidden, weight, workspace_bytes=workspace_bytes),
        *(hidden, weight),
    )
    assert loss.isfinite()
    assert not any(grad.any() for grad in grads)


class NoRows(Data):
    T = 0

    def __init__(self):
        super().__init__(lengths=(0, 0, 0, 0), prompts=(0, 0, 0, 0))


class NoSequences(Data):
    B = 0

    def __init__(self):
        super().__init__(lengths=(), prompts=())
        self.advantages, self.desirable = self.advantages[:0], self.desirable[:0]


@LAYOUTS
@pytest.mark.parametrize(("case", "perception"), case_perceptions(CASES))
def test_no_rows_give_a_finite_loss(case, perception, packed):
    data = NoRows()
    logps = leaf(data.shaped(data.logps, packed))
    loss, _, (grad,) = differentiate(data.from_logps(case, perception, logps, packed), logps)
    assert loss.isfinite() and grad.shape == logps.shape


@pytest.mark.parametrize("case", case_ids(FEW))
def test_no_rows_from_logits_and_hidden_give_a_finite_loss(case):
    data = NoRows()
    hidden, weight, logits = leaf(data.hidden), leaf(data.weight), torch.zeros(4, 0, data.V)
    loss, _, grads = differentiate(
        data.from_hidden(case, hl.Identity(), hidden, weight), hidden, weight
    )
    assert loss.isfinite() and not any(grad.any() for grad in grads)
    logits = leaf(logits.double())
    from_logits, _, (grad,) = differentiate(data.from_logits(case, hl.Identity(), logits), logits)
    close(from_logits, loss)
    assert grad.shape == logits.shape


@pytest.mark.parametrize(
    "case", case_ids(case for case in CASES if case.cls in (hl.KTO, hl.GRPO, hl.PPO, hl.SFT))
)
def test_no_sequences_give_a_finite_loss(case):
    data = NoSequences()
    loss, _ = data.from_logps(case, hl.Identity(), leaf(data.logps))
    assert loss.isfinite()


class OneRow(Data):
    B, T = 2, 1

    def __init__(self):
        super().__init__(lengths=(1, 0), prompts=(0, 0))
        self.ref = self.old = self.logps - 0.05  # not clipped
        self.advantages, self.desirable = self.advantages[:2], self.desirable[:2]


@LAYOUTS
@pytest.mark.parametrize("case", case_ids(CASES))
def test_one_row_agrees_between_entry_points(case, packed):
    check_entry_points(OneRow(), case, hl.Clip(-1.5, 1.5), packed, SMALL, {})


# Entry points


def check_entry_points(data, case, perception, packed, workspace_bytes, options, frozen=False):
    """from_logps on eager log-probs, from_logits and from_hidden: loss, statistics, gradients."""
    if not case.cls.needs_reference:
        perception = hl.Identity()
    hidden, bias = leaf(data.shaped(data.hidden, packed)), leaf(data.bias)
    weight, labels = leaf(data.weight), data.shaped(data.labels, packed)
    if frozen:
        weight, bias = weight.detach(), bias.detach()
    inputs = [x for x in (hidden, weight, bias) if x.requires_grad]

    logps, entropy = eager(hidden, weight, labels, bias, **options)
    over = {"entropy": entropy} if case.build(perception).needs_entropy else {}
    expected = differentiate(
        data.from_logps(case, perception, logps, packed, **over), logps, *inputs
    )
    # The batch is not a trivial one; of a single row, a loss may well say nothing.
    assert expected[2][0][data.shaped(data.mask, packed)].any() or isinstance(data, OneRow)
    expected = expected[0], expected[1], expected[2][1:]
    actual = data.from_hidden(
        *(case, perception, hidden, weight, packed),
        bias=bias,
        workspace_bytes=workspace_bytes,
        **options,
    )
    close(differentiate(actual, *inputs), expected, 1e-11)

    temperature = options.get("temperature", 1.0)
    z = data.shaped(3 * torch.randn(data.B, data.T, data.V, dtype=torch.float64), packed)
    z = leaf(z)
    logps, entropy = eager_from_logits(z, labels, temperature)
    over = {"entropy": entropy} if over else {}
    expected = differentiate(data.from_logps(case, perception, logps, packed, **over), z)
    actual = data.from_logits(case, perception, z, packed, temperature=temperature)
    close(differentiate(actual, z), expected, 1e-11)


@LAYOUTS
@pytest.mark.parametrize("workspace_bytes", [SMALL, LARGE], ids=["blocks", "at-once"])
@pytest.mark.parametrize(("case", "perception"), case_perceptions(CASES))
def test_entry_points_agree(case, perception, packed, workspace_bytes):
    check_entry_points(DATA, case, perception, packed, workspace_bytes, {})


@pytest.mark.parametrize("temperature", ["one", "row"])
@pytest.mark.parametrize("workspace_bytes", [SMALL, LARGE], ids=["blocks", "at-once"])
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize(("case", "perception"), case_perceptions(FEW, ["clip", "prospect"]))
def test_entry_points_agree_with_every_option(
    case, perception, frozen, workspace_bytes, temperature
):
    options = OPTIONS["all"]
    if temperature == "row":
        options = options | {"temperature": DATA.temperature}
    check_entry_points(DATA, case, perception, False, workspace_bytes, options, frozen)


# Gradients against differences


@dataclass(frozen=True)
class Affine(hl.Perception):
    """``c = d0 + weight·(d − d0)``: a weighting perception whose value moves as its gradient says,
    so that differences can see it. Equal to that perception at ``d0``."""

    needs_batch = True
    d0: torch.Tensor = field(compare=False)
    weight: torch.Tensor = field(compare=False)

    def perceive(self, log_ratio, mask):
        return self.d0 + self.weight * (log_ratio - self.d0), torch.ones_like(mask)

    @classmethod
    def at(cls, perception, objective, logps, ref, mask, **batch):
        """The perception's local picture, at the log-ratio that the objective takes."""
        mask, flat = mask.flatten(), lambda x: x.detach().flatten()
        anchor = batch.get("old_logps", ref)
        d0 = torch.where(mask, flat(logps) - flat(anchor), 0)
        d = leaf(d0)
        c, _ = perception.perceive(d, mask)
        return cls(d0, gradients(c.sum(), d)[0])


def local(data, case, perception, packed, logps=None):
    """A perception that differences can follow."""
    if not perception.needs_batch:
        return perception
    names = ("logps", "ref", "mask")
    row_values = {name: data.shaped(getattr(data, name), packed) for name in names}
    if logps is not None:
        row_values["logps"] = logps
    batch = data.batch(case, packed)
    return Affine.at(perception, case.build(perception), **row_values, **batch)


# An affine picture has one size, that of the batch: not that of mismatched pairs besides.
DIFFERENTIABLE = [case for case in CASES if case.exact and "kl" not in case.batch]
WEIGHTING = [name for name, p in PERCEPTIONS.items() if p.needs_batch]


@LAYOUTS
@pytest.mark.parametrize(("case", "perception"), case_perceptions(DIFFERENTIABLE))
def test_gradients_of_log_probs_agree_with_differences(case, perception, packed):
    perception = local(DATA, case, perception, packed)
    logps = leaf(DATA.shaped(DATA.logps, packed))
    inputs = (logps,)
    if case.build(perception).needs_entropy:
        inputs += (leaf(DATA.shaped(DATA.entropy, packed)),)

    def f(logps, entropy=None):
        over = {} if entropy is None else {"entropy": entropy}
        return DATA.from_logps(case, perception, logps, packed, **over)[0]

    assert gradcheck(f, inputs, atol=1e-8, rtol=1e-6)


@LAYOUTS
@pytest.mark.parametrize(
    ("case", "perception"),
    case_perceptions([c for c in WITH_REFERENCE if "kl" not in c.batch], WEIGHTING),
)
def test_a_weighting_perception_is_its_local_affine_picture(case, perception, packed):
    results = []
    for p in (perception, local(DATA, case, perception, packed)):
        logps = leaf(DATA.shaped(DATA.logps, packed))
        loss, _, grads = differentiate(DATA.from_logps(case, p, logps, packed), logps)
        results.append((loss, grads))
    close(*results)


def entry_gradcheck(f, *inputs):
    assert gradcheck(f, tuple(map(leaf, inputs)), fast_mode=True, atol=1e-7, rtol=1e-6)


@LAYOUTS
@pytest.mark.parametrize(
    ("case", "perception"), case_perceptions([case for case in FEW if case.exact])
)
def test_gradients_of_logits_agree_with_differences(case, perception, packed):
    labels = DATA.shaped(DATA.labels, packed)
    logits = DATA.shaped(torch.randn(DATA.B, DATA.T, DATA.V, dtype=torch.float64), packed)
    temperature = DATA.shaped(DATA.temperature, packed)
    logps = eager_from_logits(logits, labels, temperature)[0]
    perception = local(DATA, case, perception, packed, logps)
    entry_gradcheck(
        lambda z: DATA.from_logits(case, perception, z, packed, temperature=temperature)[0], logits
    )


@LAYOUTS
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("workspace_bytes", [SMALL, LARGE], ids=["blocks", "at-once"])
@pytest.mark.parametrize(
    ("case", "perception"), case_perceptions([case for case in FEW if case.exact])
)
def test_gradients_of_hidden_agree_with_differences(
    case, perception, workspace_bytes, frozen, packed
):
    hidden, labels = (DATA.shaped(x, packed) for x in (DATA.hidden, DATA.labels))
    options = OPTIONS["all"] | {"temperature": DATA.shaped(DATA.temperature, packed)}
    logps = eager(hidden, DATA.weight, labels, DATA.bias, **options)[0]
    perception = local(DATA, case, perception, packed, logps)

    def f(hidden, weight=DATA.weight, bias=DATA.bias):
        return DATA.from_hidden(
            *(case, perception, hidden, weight, packed),
            bias=bias,
            workspace_bytes=workspace_bytes,
            **options,
        )[0]

    entry_gradcheck(f, *([hidden] if frozen else [hidden, DATA.weight, DATA.bias]))


# Autograd's ways of being called


def entry_points(case: Case, workspace_bytes=SMALL):
    """Each entry point as a function of its differentiable inputs, and those inputs."""
    perception = PERCEPTIONS["clip" if case.cls.needs_reference else "identity"]
    logits = torch.randn(DATA.B, DATA.T, DATA.V, dtype=torch.float64)
    return {
        "logps": (lambda x: DATA.from_logps(case, perception, x), [DATA.logps]),
        "logits": (lambda x: DATA.from_logits(case, perception, x), [logits]),
        "hidden": (
            lambda h, w: DATA.from_hidden(case, perception, h, w, workspace_bytes=workspace_bytes),
            [DATA.hidden, DATA.weight],
        ),
        "hidden-frozen": (
            lambda h: DATA.from_hidden(case, perception, h, DATA.weight),
            [DATA.hidden],
        ),
    }


ENTRIES = pytest.mark.parametrize("entry", ["logps", "logits", "hidden", "hidden-frozen"])


@ENTRIES
@pytest.mark.parametrize("case", case_ids(FEW))
def test_gradients_scale_with_the_incoming_one(case, entry):
    f, inputs = entry_points(case)[entry]
    inputs = [leaf(x) for x in inputs]
    expected = [-2.5 * grad for grad in gradients(f(*inputs)[0], *inputs)]
    close(list(gradients(-2.5 * f(*inputs)[0], *inputs)), expected)


@ENTRIES
@pytest.mark.parametrize("case", case_ids(FEW))
def test_a_second_backward_gives_the_same(case, entry):
    f, inputs = entry_points(case)[entry]
    inputs = [leaf(x) for x in inputs]
    loss, _ = f(*inputs)
    first = gradients(loss, *inputs, retain_graph=True)
    second = gradients(loss, *inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@ENTRIES
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("case", case_ids(FEW))
def test_the_loss_is_the_same_without_gradients(case, mode, entry):
    f, inputs = entry_points(case)[entry]
    expected, expected_stats = f(*map(leaf, inputs))
    with mode():
        loss, stats = f(*inputs)
    assert not loss.requires_grad
    close(loss, expected.detach())
    close(stats, {name: expected_stats[name] for name in stats})
    assert expected_stats.keys() - stats.keys() <= {"humanline/active_rows"}


@ENTRIES
@pytest.mark.parametrize("case", case_ids(CASES))
def test_statistics_are_detached(case, entry):
    f, inputs = entry_points(case)[entry]
    loss, stats = f(*map(leaf, inputs))
    assert loss.requires_grad and loss.dim() == 0
    assert stats and all(x.dim() == 0 and not x.requires_grad for x in stats.values())


def test_a_reference_takes_no_gradient():
    ref, logps = leaf(DATA.ref), leaf(DATA.logps)
    loss, _ = hl.DPO().from_logps(logps, ref, DATA.mask)
    loss.backward()
    assert ref.grad is None and logps.grad is not None


def test_a_reference_point_takes_no_gradient():
    case, z0, logps = BY_NAME["kto"], leaf(torch.tensor(0.3).double()), leaf(DATA.logps)
    loss, stats = DATA.from_logps(case, hl.Identity(), logps, z0=z0)
    loss.backward()
    assert z0.grad is None and not stats["kl"].requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", case_ids(FEW))
def test_halves_are_computed_in_float32(case, dtype):
    data = Data(dtype=dtype)
    loss, stats = data.from_logps(case, hl.Identity(), leaf(data.logps))
    assert loss.dtype == torch.float32
    assert all(x.dtype in (torch.float32, torch.int64) for x in stats.values())
    exact = Data(dtype=dtype)
    for name, x in vars(exact).items():
        if isinstance(x, torch.Tensor) and x.is_floating_point():
            setattr(exact, name, x.double())
    close(loss.double(), exact.from_logps(case, hl.Identity(), exact.logps)[0], 1e-5)
