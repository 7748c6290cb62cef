"""Bad input raises before anything is computed, and says what was given and what expected."""

import math

import pytest
import torch
from oracle import Data
from torch.utils._python_dispatch import TorchDispatchMode

import humanline as hl
from humanline import checks

DATA = Data()
CUT = DATA.logps[:, :4]
PACKED_ROWS = DATA.logps.flatten()
PACKED_MASK = DATA.mask.flatten()


class NothingRuns(TorchDispatchMode):
    """Within this, GEMMs, softmaxes and the library's own ops are failures."""

    COSTLY = ("mm", "bmm", "addmm", "exp", "exp_", "log_softmax", "_log_softmax", "logsumexp")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        namespace, name = function._schema.name.split("::")
        assert namespace != "humanline" and name not in self.COSTLY, f"{name} ran"
        return function(*args, **(kwargs or {}))


def meta(x):
    return torch.empty_like(x, device="meta")


def refuses(message, call, error=ValueError):
    with NothingRuns(), pytest.raises(error, match=message):
        call()


def test_nothing_runs_notices_what_runs():
    with NothingRuns(), pytest.raises(AssertionError, match="mm ran"):
        hl.SFT().from_hidden(DATA.hidden, DATA.weight, DATA.labels)


# Log-probs


LOGPS_CASES = {
    "mask of another shape": (
        r"policy_logps and mask must have the same shape, got \[4, 4\] and \[4, 5\]",
        {"policy_logps": CUT},
    ),
    "reference of another shape": (
        r"ref_logps must have the rows' shape \[4, 5\], got \[4, 4\]",
        {"ref_logps": CUT},
    ),
    "no reference": (
        "DPO compares the policy with a reference: it needs ref_logps",
        {"ref_logps": None},
    ),
    "integer log-probs": (
        "policy_logps must be floating point, got torch.int64",
        {"policy_logps": DATA.labels},
    ),
    "integer reference": (
        "ref_logps must be floating point, got torch.int64",
        {"ref_logps": DATA.labels},
    ),
    "mask on another device": (
        "one device, got policy_logps on cpu, mask on meta",
        {"mask": meta(DATA.mask)},
    ),
    "reference on another device": (
        "one device, got rows on cpu, ref_logps on meta",
        {"ref_logps": meta(DATA.ref)},
    ),
    "odd batch": (
        "DPO needs chosen sequences in the first half .* an even number of sequences; got 3",
        {"policy_logps": DATA.logps[:3], "ref_logps": DATA.ref[:3], "mask": DATA.mask[:3]},
    ),
    "flat rows without cu_seqlens": (
        r"rows must have shape \[B, T\], or \[N\] together with cu_seqlens; got \[20\]",
        {"policy_logps": PACKED_ROWS, "ref_logps": PACKED_ROWS, "mask": PACKED_MASK},
    ),
}


@pytest.mark.parametrize("name", LOGPS_CASES)
def test_bad_log_probs_are_refused(name):
    message, over = LOGPS_CASES[name]
    given = {"policy_logps": DATA.logps, "ref_logps": DATA.ref, "mask": DATA.mask} | over
    refuses(message, lambda: hl.DPO().from_logps(**given))


@pytest.mark.parametrize(
    ("entropy", "message"),
    [
        (None, "GRPO has an entropy bonus: from_logps needs entropy"),
        (CUT, r"entropy must have the rows' shape \[4, 5\], got \[4, 4\]"),
        (DATA.labels, "entropy must be floating point, got torch.int64"),
        (meta(DATA.entropy), "one device, .* entropy on meta"),
    ],
)
def test_bad_entropy_is_refused(entropy, message):
    objective = hl.GRPO(entropy_coef=0.1)
    given = {"advantages": DATA.advantages, "entropy": entropy}
    refuses(message, lambda: objective.from_logps(DATA.logps, DATA.ref, DATA.mask, **given))


@pytest.mark.parametrize("cls", [hl.SimPO, hl.SLiC, hl.DPO])
def test_pairs_need_an_even_batch(cls):
    refuses(
        f"{cls.__name__} needs .* an even number of sequences; got 3",
        lambda: cls().from_logps(DATA.logps[:3], DATA.ref[:3], DATA.mask[:3]),
    )


# Packing


@pytest.mark.parametrize(
    ("cu_seqlens", "message"),
    [
        (torch.tensor([1, 5, 20]), r"cu_seqlens must rise from 0 to 20 rows, got \[1, 5, 20\]"),
        (torch.tensor([0, 5, 19]), r"cu_seqlens must rise from 0 to 20 rows, got \[0, 5, 19\]"),
        (torch.tensor([0, 5, 21]), r"cu_seqlens must rise from 0 to 20 rows, got \[0, 5, 21\]"),
        (torch.tensor([0, 9, 5, 20]), r"rise from 0 to 20 rows, got \[0, 9, 5, 20\]"),
        (torch.tensor([0]), r"integer tensor \[S\+1\] with S >= 1, got torch.int64 \[1\]"),
        (torch.tensor([[0, 20]]), r"integer tensor .* got torch.int64 \[1, 2\]"),
        (torch.tensor([0.0, 20.0]), r"integer tensor .* got torch.float32 \[2\]"),
        (meta(torch.tensor([0, 5, 20])), "cu_seqlens is on meta, the rows are on cpu"),
    ],
)
def test_bad_cu_seqlens_are_refused(cu_seqlens, message):
    given = (PACKED_ROWS, PACKED_ROWS, PACKED_MASK)
    refuses(message, lambda: hl.DPO().from_logps(*given, cu_seqlens=cu_seqlens))


def test_cu_seqlens_need_flat_rows():
    refuses(
        r"packed rows must have shape \[N\] when cu_seqlens is given, got \[4, 5\]",
        lambda: hl.DPO().from_logps(
            DATA.logps, DATA.ref, DATA.mask, cu_seqlens=torch.tensor([0, 20])
        ),
    )


# Batch arguments


def given_to(objective, **batch):
    return lambda: objective.from_hidden(DATA.hidden, DATA.weight, DATA.labels, DATA.ref, **batch)


KL = {"kl_logps": DATA.kl_logps, "kl_ref_logps": DATA.kl_ref_logps, "kl_mask": DATA.kl_mask}
BATCH_CASES = {
    "no advantages": (r"GRPO needs advantages, \[S\] or one a row", hl.GRPO(), {}),
    "no advantages for PPO": (r"PPO needs advantages, \[S\] or one a row", hl.PPO(), {}),
    "advantages of another shape": (
        r"advantages must have shape \[4\] \(one a sequence\) or \[4, 5\] \(one a row\), got \[3\]",
        hl.GRPO(),
        {"advantages": DATA.advantages[:3]},
    ),
    "integer advantages": (
        "advantages must be floating point, got torch.int64",
        hl.GRPO(),
        {"advantages": torch.ones(4).long()},
    ),
    "advantages on another device": (
        "one device, got rows on cpu, advantages on meta",
        hl.GRPO(),
        {"advantages": meta(DATA.advantages)},
    ),
    "old log-probs of another shape": (
        r"old_logps must have the rows' shape \[4, 5\], got \[4\]",
        hl.GRPO(),
        {"advantages": DATA.advantages, "old_logps": DATA.advantages},
    ),
    "integer old log-probs": (
        "old_logps must be floating point, got torch.int64",
        hl.GRPO(),
        {"advantages": DATA.advantages, "old_logps": DATA.labels},
    ),
    "old log-probs on another device": (
        "one device, .* old_logps on meta",
        hl.PPO(),
        {"advantages": DATA.advantages, "old_logps": meta(DATA.old)},
    ),
    "old log-probs of an unknown name": (
        "old_logps must be a tensor or \"policy\", got 'reference'",
        hl.GRPO(),
        {"advantages": DATA.advantages, "old_logps": "reference"},
    ),
    "no desirable": (r"KTO needs desirable, a bool tensor \[S\]", hl.KTO(), {"z0": 0.0}),
    "desirable of another shape": (
        r"desirable must have shape \[4\], got \[3\]",
        hl.KTO(),
        {"desirable": DATA.desirable[:3], "z0": 0.0},
    ),
    "desirable on another device": (
        "one device, got rows on cpu, desirable on meta",
        hl.KTO(),
        {"desirable": meta(DATA.desirable), "z0": 0.0},
    ),
    "no reference point": (
        "KTO needs its reference point: z0, .*; missing kl_logps, kl_ref_logps, kl_mask",
        hl.KTO(),
        {"desirable": DATA.desirable},
    ),
    "half a reference point": (
        "; missing kl_mask",
        hl.KTO(),
        {"desirable": DATA.desirable} | {k: v for k, v in KL.items() if k != "kl_mask"},
    ),
    "mismatched pairs of two shapes": (
        r"kl_logps, kl_ref_logps and kl_mask must have one shape, got \[3, 4\], \[3, 4\] and \[2,",
        hl.KTO(),
        {"desirable": DATA.desirable} | KL | {"kl_mask": DATA.kl_mask[:2]},
    ),
    "mismatched pairs on two devices": (
        "one device, .* kl_logps on meta",
        hl.KTO(),
        {"desirable": DATA.desirable} | KL | {"kl_logps": meta(DATA.kl_logps)},
    ),
    "integer mismatched pairs": (
        "kl_logps must be floating point, got torch.int64",
        hl.KTO(),
        {"desirable": DATA.desirable} | KL | {"kl_logps": DATA.kl_mask.long()},
    ),
}


@pytest.mark.parametrize("name", BATCH_CASES)
def test_bad_batch_arguments_are_refused(name):
    message, objective, batch = BATCH_CASES[name]
    refuses(message, given_to(objective, **batch))


@pytest.mark.parametrize(
    "objective",
    [hl.GRPO(beta=0.1), hl.PPO(beta=0.1), hl.KTO(), hl.DPO()],
    ids=lambda o: type(o).__name__,
)
def test_a_missing_reference_is_refused(objective):
    batch = {
        hl.KTO: {"desirable": DATA.desirable, "z0": 0.0},
        hl.DPO: {},
    }.get(type(objective), {"advantages": DATA.advantages})
    refuses(
        f"{type(objective).__name__} compares the policy with a reference: it needs ref_logps",
        lambda: objective.from_hidden(DATA.hidden, DATA.weight, DATA.labels, **batch),
    )


GOOD = {
    hl.DPO: {},
    hl.SimPO: {},
    hl.SLiC: {},
    hl.SFT: {},
    hl.KTO: {"desirable": DATA.desirable, "z0": 0.0},
    hl.GRPO: {"advantages": DATA.advantages},
    hl.PPO: {"advantages": DATA.advantages},
}


@pytest.mark.parametrize("cls", GOOD, ids=lambda cls: cls.__name__)
def test_unknown_batch_arguments_are_refused_by_name(cls):
    refuses("advantage_s", given_to(cls(), **GOOD[cls], advantage_s=3), error=TypeError)


# Options of objectives


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (hl.DPO, {"loss_type": "sigmod"}, "unknown DPO loss_type 'sigmod'; known: sigmoid, hinge"),
        (hl.DPO, {"loss_type": ("sigmoid", "x")}, "unknown DPO loss_type 'x'"),
        (hl.DPO, {"loss_weights": (1.0, 2.0)}, r"1 loss types need as many .* got \(1.0, 2.0\)"),
        (hl.DPO, {"label_smoothing": 0.5}, r"label_smoothing must lie in \[0, 0.5\), got 0.5"),
        (hl.DPO, {"label_smoothing": -0.1}, r"label_smoothing must lie in \[0, 0.5\), got -0.1"),
        (hl.DPO, {"loss_type": "exo_pair"}, "'exo_pair' needs label_smoothing > 0"),
        (hl.KTO, {"loss_type": "bco"}, "unknown KTO loss_type 'bco'; known: kto, apo_zero_unp"),
        (hl.GRPO, {"loss_type": "ppo"}, "unknown GRPO loss_type 'ppo'; known: grpo, sapo"),
        (hl.GRPO, {"loss_type": "dr_grpo"}, '"dr_grpo" needs max_completion_length'),
        (hl.GRPO, {"importance_sampling_level": "batch"}, '"token" or "sequence", got \'batch\''),
        (hl.GRPO, {"epsilon": -0.1}, "epsilon must not be negative, got -0.1"),
        (hl.GRPO, {"epsilon": math.nan}, "epsilon must not be negative, got nan"),
        (hl.PPO, {"epsilon_high": -0.1}, "epsilon_high must not be negative, got -0.1"),
        (hl.PPO, {"kl_estimator": "k2"}, 'kl_estimator must be "k1" or "k3", got \'k2\''),
    ],
)
def test_bad_options_are_refused(cls, options, message):
    with pytest.raises(ValueError, match=message):
        cls(**options)


@pytest.mark.parametrize("perception", [hl.Clip(), hl.BetaRejection(), hl.ProspectWeight()])
@pytest.mark.parametrize("cls", [hl.SimPO, hl.SLiC, hl.SFT])
def test_reference_free_objectives_refuse_a_perception(cls, perception):
    name = type(perception).__name__
    with pytest.raises(ValueError, match=rf"{cls.__name__} is reference-free: .* got {name}\("):
        cls(perception=perception)


@pytest.mark.parametrize("perception", ["clip", None, hl.Clip])
def test_a_perception_must_be_one(perception):
    with pytest.raises(TypeError, match=r"must be a humanline Perception such as Clip\(\), got"):
        hl.DPO(perception=perception)


# Logits and hidden states

LOGITS = torch.randn(DATA.B, DATA.T, DATA.V)


def label(value):
    labels = DATA.labels.clone()
    labels[1, 1] = value
    return labels


LABEL_CASES = [
    (label(-1), r"labels must lie in \[0, 7\) or equal -100, got -1"),
    (label(7), r"labels must lie in \[0, 7\) or equal -100, got 7"),
    (label(-99), r"labels must lie in \[0, 7\) or equal -100, got -99"),
    (DATA.labels.double(), "labels must be a signed integer tensor, got torch.float64"),
    (DATA.labels.abs().to(torch.uint8), "labels must be a signed integer .*, got torch.uint8"),
    (DATA.labels[:, :4], r"got \[4, 5, .\] and \[4, 4\]"),
    (meta(DATA.labels), "one device, .* labels on meta"),
]


@pytest.mark.parametrize(("labels", "message"), LABEL_CASES)
def test_bad_labels_are_refused(labels, message):
    refuses(message, lambda: hl.SFT().from_logits(LOGITS, labels))
    refuses(message, lambda: hl.token_logps(LOGITS, labels))
    refuses(message, lambda: hl.SFT().from_hidden(DATA.hidden, DATA.weight, labels))
    refuses(message, lambda: hl.linear_token_logps(DATA.hidden, DATA.weight, labels))


TEMPERATURES = [
    (0.0, "temperature must be positive and finite, got 0.0"),
    (-1.0, "temperature must be positive and finite, got -1.0"),
    (math.inf, "temperature must be positive and finite, got inf"),
    (math.nan, "temperature must be positive and finite, got nan"),
    (torch.zeros(4, 5), "temperature must be positive, got 0.0"),
    (torch.full((4, 5), math.nan), "temperature must be positive, got nan"),
    (torch.ones(4), r"float or have one value a row, \[4, 5\]; got \[4\]"),
    (torch.ones(4, 1), r"float or have one value a row, \[4, 5\]; got \[4, 1\]"),
]


@pytest.mark.parametrize(("temperature", "message"), TEMPERATURES)
def test_bad_temperatures_are_refused(temperature, message):
    over = {"temperature": temperature}
    refuses(message, lambda: hl.SFT().from_logits(LOGITS, DATA.labels, **over))
    refuses(message, lambda: hl.token_logps(LOGITS, DATA.labels, **over))
    refuses(message, lambda: hl.SFT().from_hidden(DATA.hidden, DATA.weight, DATA.labels, **over))
    refuses(message, lambda: hl.linear_token_logps(DATA.hidden, DATA.weight, DATA.labels, **over))


def test_integer_logits_are_refused():
    refuses(
        "logits must be floating point, got torch.int64",
        lambda: hl.SFT().from_logits(LOGITS.long(), DATA.labels),
    )


def test_an_unknown_backend_is_refused():
    for call in (hl.SFT().from_logits, hl.token_logps):
        refuses(
            "backend must be .*, got 'cuda'",
            lambda call=call: call(LOGITS, DATA.labels, backend="cuda"),
        )


HIDDEN_CASES = {
    "another H": (
        r"weight must have shape \[V, 3\] for this hidden, got \[7, 4\]",
        {"weight": torch.randn(7, 4, dtype=torch.float64)},
    ),
    "a weight of three dimensions": (
        r"weight must have shape \[V, 3\] for this hidden, got \[1, 7, 3\]",
        {"weight": DATA.weight[None]},
    ),
    "another V of the bias": (r"bias must have shape \[7\], got \[6\]", {"bias": DATA.bias[:6]}),
    "two dtypes": (
        "hidden and weight must have one dtype, got torch.float64 and torch.float32",
        {"weight": DATA.weight.float()},
    ),
    "integers": ("hidden must be floating point, got torch.int64", {"hidden": DATA.hidden.long()}),
    "an integer bias": ("bias must be floating point", {"bias": DATA.bias.long()}),
    "two devices": ("one device, .* weight on meta", {"weight": meta(DATA.weight)}),
    "a bias elsewhere": ("one device, .* bias on meta", {"bias": meta(DATA.bias)}),
    "a softcap of 0": (
        "logit_softcap must be positive or None, got 0.0",
        {"logit_softcap": 0.0},
    ),
    "a small workspace": (
        r"workspace_bytes must be at least 56 to hold the logits of one row \(V=7\), got 55",
        {"workspace_bytes": 55},
    ),
}


@pytest.mark.parametrize("name", HIDDEN_CASES)
def test_bad_hidden_states_are_refused(name):
    message, over = HIDDEN_CASES[name]
    given = {"hidden": DATA.hidden, "weight": DATA.weight, "labels": DATA.labels} | over
    refuses(message, lambda: hl.SFT().from_hidden(**given))
    refuses(message, lambda: hl.linear_token_logps(**given))


def test_entropy_needs_twice_the_workspace():
    given = (DATA.hidden, DATA.weight, DATA.labels)
    refuses(
        "at least 112 .* got 111",
        lambda: hl.linear_token_logps(*given, return_entropy=True, workspace_bytes=111),
    )
    hl.linear_token_logps(*given, return_entropy=True, workspace_bytes=112)


def test_shift_needs_two_dimensions():
    refuses(r"labels must have shape \[B, T\], got \[5\]", lambda: hl.shift(DATA.labels[0]))


# debug()


@pytest.mark.parametrize("enabled", [True, False])
def test_on_a_cpu_values_are_checked_whatever_debug_says(enabled):
    with hl.debug(enabled):
        refuses("got 7", lambda: hl.SFT().from_logits(LOGITS, label(7)))


def test_elsewhere_values_are_checked_within_debug_alone():
    elsewhere = torch.empty(3, device="meta")

    def check():
        checks.require(lambda: False, "looked", on=elsewhere)

    check()
    with hl.debug():
        refuses("looked", check)
        with hl.debug(False):
            check()
        refuses("looked", check)
    check()


def test_debug_ends_with_an_exception():
    with pytest.raises(KeyError), hl.debug():
        raise KeyError
    checks.require(lambda: False, "looked", on=torch.empty(3, device="meta"))
