"""Bad input raises before anything is computed, and says what was given and what expected."""

import dataclasses
import math
import warnings

import numpy as np
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


@pytest.mark.parametrize("cls", [hl.GRPO, hl.PPO])
def test_perception_without_a_reference_is_warned_of_once(cls):
    ratio_1 = {"advantages": torch.ones(DATA.B)}
    clip = cls(perception=hl.Clip(-0.5, 0.25))
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("default")
        for rows in (slice(None), slice(0, 3)):
            clip.from_logps(DATA.logps[:, rows], None, DATA.mask[:, rows], **ratio_1)
        clip.from_logps(DATA.logps, DATA.ref, DATA.mask, old_logps="policy", **ratio_1)
    (warning,) = [w for w in found if "perceives nothing" in str(w.message)]
    assert str(warning.message).startswith("Clip(log_eps_P=-0.5, log_eps_R=0.25) perceives nothing")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cls().from_logps(DATA.logps, None, DATA.mask, **ratio_1)
        clip.from_logps(DATA.logps, DATA.ref, DATA.mask, **ratio_1)
        clip.from_logps(DATA.logps, None, DATA.mask, old_logps=DATA.ref, **ratio_1)


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
    "a scale of 0": (
        "logit_scale must be positive and finite, got 0.0",
        {"logit_scale": 0.0},
    ),
    "a negative scale": (
        "logit_scale must be positive and finite, got -1.0",
        {"logit_scale": -1.0},
    ),
    "a scale that is none": (
        "logit_scale must be positive and finite, got nan",
        {"logit_scale": float("nan")},
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


# What is no tensor, no number, or one rank's part of a tensor


class Sharded(torch.Tensor):
    placements = ("Shard(dim=0)",)


HIDDEN = {
    "hidden": DATA.hidden,
    "weight": DATA.weight,
    "labels": DATA.labels,
    "ref_logps": DATA.ref,
    "bias": DATA.bias,
    "temperature": torch.ones(DATA.B, DATA.T),
}
OF_LOGITS = {
    "logits": LOGITS,
    "labels": DATA.labels,
    "ref_logps": DATA.ref,
    "temperature": torch.ones(DATA.B, DATA.T),
}
OF_LOGPS = {
    "policy_logps": DATA.logps,
    "ref_logps": DATA.ref,
    "mask": DATA.mask,
    "entropy": DATA.entropy,
}
REF_HIDDEN = {"ref_hidden": DATA.hidden, "ref_weight": DATA.weight, "ref_bias": DATA.bias}
POLICY = {"advantages": DATA.advantages, "old_logps": DATA.old}


def without(arguments, *names):
    return {name: x for name, x in arguments.items() if name not in names}


PACKED = {"cu_seqlens": torch.arange(0, 21, 5)}
GROUP = {"rewards": DATA.advantages, "prompt_ids": torch.zeros(4).long()}
PAIRED = {
    "input_ids": DATA.labels,
    "labels": DATA.labels,
    "attention_mask": torch.ones(DATA.labels.shape),
}
FLAT = {"policy_logps": PACKED_ROWS, "ref_logps": PACKED_ROWS, "mask": PACKED_MASK} | PACKED
#: Every entry point with the tensors it takes, all of which fit.
ENTRY_POINTS = {
    "from_logps": (hl.DPO().from_logps, OF_LOGPS),
    "from_logps of GRPO": (hl.GRPO().from_logps, OF_LOGPS | POLICY),
    "from_logps of KTO": (hl.KTO().from_logps, OF_LOGPS | KL | {"desirable": DATA.desirable}),
    "from_logps packed": (hl.DPO().from_logps, FLAT),
    "from_logits": (hl.DPO().from_logits, OF_LOGITS),
    "from_hidden": (hl.DPO().from_hidden, HIDDEN),
    "from_hidden of two": (hl.DPO().from_hidden, without(HIDDEN, "ref_logps") | REF_HIDDEN),
    "token_logps": (hl.token_logps, without(OF_LOGITS, "ref_logps")),
    "linear_token_logps": (hl.linear_token_logps, without(HIDDEN, "ref_logps")),
    "shift": (hl.shift, {"labels": DATA.labels}),
    "group_advantages": (hl.group_advantages, GROUP),
    "mismatched_rows": (hl.mismatched_rows, PAIRED),
}
ARGUMENTS = pytest.mark.parametrize(
    ("call", "name"),
    [(call, name) for call, (_, arguments) in ENTRY_POINTS.items() for name in arguments],
)


@pytest.mark.parametrize("call", ENTRY_POINTS)
def test_the_entry_points_take_what_fits(call):
    function, arguments = ENTRY_POINTS[call]
    function(**arguments)


@ARGUMENTS
def test_lists_are_no_tensors(call, name):
    function, arguments = ENTRY_POINTS[call]
    given = arguments | {name: arguments[name].tolist()}
    expected = "a number or a tensor" if name == "temperature" else "a tensor"
    refuses(f"^{name} must be {expected}.*got the list", lambda: function(**given), TypeError)


@ARGUMENTS
def test_one_rank_s_part_of_a_tensor_is_refused(call, name):
    function, arguments = ENTRY_POINTS[call]
    given = arguments | {name: arguments[name].as_subclass(Sharded)}
    advice = r"Partial\(.avg.\)" if name.endswith(("weight", "bias")) else r"to_local\(\)"
    refuses(rf"^{name} is a DTensor .*{name}.*{advice}", lambda: function(**given))


def test_one_rank_s_part_is_refused_for_an_objective_of_one_s_own():
    class Weighted(hl.TokenObjective):
        def token_loss(self, rows, weights):
            return weights * rows.logps

    weights = DATA.advantages.as_subclass(Sharded)
    refuses("weights is a DTensor", given_to(Weighted(), weights=weights))


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_head_is_not_its_weight(name):
    head = torch.nn.Linear(3, 7)
    given = without(HIDDEN, "ref_logps", "temperature") | {name: head}
    message = f"{name} must be a tensor, got the module Linear: pass its {name}, .*head.{name}"
    for call in (hl.SFT().from_hidden, hl.linear_token_logps):
        refuses(message, lambda call=call: call(**given), TypeError)


def test_a_missing_tensor_is_named():
    refuses("labels must be a tensor, got None", lambda: hl.token_logps(LOGITS, None), TypeError)


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", "1"), ("logit_scale", "1"), ("logit_softcap", "30"), ("workspace_bytes", "9")],
)
def test_strings_are_no_numbers(name, value):
    given = without(HIDDEN, "ref_logps") | {name: value}
    message = f"{name} must be a (whole )?number.*got the str '{value}'"
    for call in (hl.SFT().from_hidden, hl.linear_token_logps):
        refuses(message, lambda call=call: call(**given), TypeError)
    if name == "temperature":
        for call in (hl.SFT().from_logits, hl.token_logps):
            given = {"logits": LOGITS, "labels": DATA.labels, name: value}
            refuses(message, lambda call=call, given=given: call(**given), TypeError)


@pytest.mark.parametrize(
    ("objective", "batch", "name"),
    [
        (hl.SFT(), {}, "num_items_in_batch"),
        (hl.GRPO(), {"advantages": DATA.advantages}, "num_items_in_batch"),
        (hl.KTO(), {"desirable": DATA.desirable}, "z0"),
    ],
)
@pytest.mark.parametrize("value", ["9", [9]], ids=["string", "list"])
def test_numbers_of_a_batch_are_numbers(objective, batch, name, value):
    message = f"{name} must be a number or a tensor, got the {type(value).__name__}"
    refuses(message, given_to(objective, **batch, **{name: value}), TypeError)


NUMBERS = [
    (cls, field.name)
    for cls in (*GOOD, hl.Clip, hl.BetaRejection, hl.ProspectWeight)
    for field in dataclasses.fields(cls)
    if field.name != "perception"
]


@pytest.mark.parametrize(("cls", "name"), NUMBERS)
@pytest.mark.parametrize("value", ["0.1", [0.1, "x"], b"0.1"], ids=["string", "list", "bytes"])
def test_options_of_objectives_and_perceptions_have_their_types(cls, name, value):
    """Names are strings: an unknown one is a ValueError that lists those there are."""
    error = (TypeError, ValueError) if isinstance(value, str) else TypeError
    with pytest.raises(error, match=rf"{name}.*got|unknown {cls.__name__} {name}"):
        cls(**{name: value})


def test_the_messages_of_options_name_what_is_wanted():
    for make, message in [
        (lambda: hl.DPO(beta="0.1"), "DPO's beta must be a number, got the str '0.1'"),
        (lambda: hl.Clip("a", 1), "Clip's log_eps_P must be a number, got the str 'a'"),
        (lambda: hl.Clip(-1, None), "Clip's log_eps_R must be a number, got None"),
        (lambda: hl.GRPO(delta="2"), "GRPO's delta must be a number or None, got the str '2'"),
        (lambda: hl.GRPO(epsilon=True), "GRPO's epsilon must be a number, got the bool True"),
        (lambda: hl.GRPO(max_completion_length=1.5), "must be a whole number or None, got the flo"),
        (lambda: hl.GRPO(use_bias_correction_kl="no"), "must be True or False, got the str 'no'"),
        (lambda: hl.DPO(loss_weights=("1",)), "loss_weights must be several of them or None"),
        (lambda: hl.KTO(beta=torch.ones(())), r"beta must be a number, got a tensor of shape \[\]"),
    ]:
        with pytest.raises(TypeError, match=message):
            make()
    numbers = np.float64(0.1), np.float32(0.1), np.int64(1), 1
    assert all(hl.DPO(beta=number).beta == number for number in numbers)


# Values


def mask_with(value, dtype=torch.int64):
    mask = DATA.mask.to(dtype)
    mask[1, 1] = value
    return mask


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (
            DATA.labels,
            r"mask must be bool or 0/1, got torch.int64 with the value .* labels != -100",
        ),
        (mask_with(2), "mask must be bool or 0/1, got torch.int64 with the value 2$"),
        (mask_with(-1, torch.int8), "got torch.int8 with the value -1"),
        (mask_with(0.5, torch.float32), "got torch.float32 with the value 0.5"),
        (mask_with(math.nan, torch.float32), "got torch.float32 with the value nan"),
    ],
)
def test_a_mask_is_true_or_false(mask, message):
    refuses(message, lambda: hl.DPO().from_logps(DATA.logps, DATA.ref, mask))
    kl = {"kl_logps": DATA.logps, "kl_ref_logps": DATA.ref, "kl_mask": mask}
    message = f"kl_{message}" if message.startswith("mask") else message
    refuses(message, given_to(hl.KTO(), desirable=DATA.desirable, **kl))
    message = message.replace("kl_", "attention_")
    refuses(message, lambda: hl.mismatched_rows(DATA.labels, DATA.labels, mask))


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float32])
def test_a_mask_has_any_dtype(dtype):
    given = [hl.DPO().from_logps(DATA.logps, DATA.ref, DATA.mask.to(d)) for d in (dtype, bool)]
    assert given[0][0] == given[1][0]


def test_desirable_is_true_or_false():
    signs = torch.tensor([1, -1, 1, -1])
    message = "desirable must be bool or 0/1, got torch.int64 with the value -1"
    refuses(message, given_to(hl.KTO(), desirable=signs, z0=0.0))


def test_a_reference_that_has_diverged_shows_in_the_loss():
    loss, _ = hl.DPO().from_logps(DATA.logps, DATA.ref * math.nan, DATA.mask)
    assert loss.isnan()


@pytest.mark.parametrize("value", [-math.inf, math.inf])
def test_the_reference_s_log_probs_are_finite_where_they_count(value):
    row, masked = DATA.mask.nonzero()[0], (~DATA.mask).nonzero()[0]

    def with_value(x, where):
        x = x.clone()
        x[tuple(where)] = value
        return x

    def message(name):
        return f"{name} must be finite on completion tokens, got {value}"

    ref, old = with_value(DATA.ref, row), with_value(DATA.old, row)
    refuses(message("ref_logps"), lambda: hl.DPO().from_logps(DATA.logps, ref, DATA.mask))
    refuses(message("ref_logps"), lambda: hl.DPO().from_logits(LOGITS, DATA.labels, ref))
    hidden = DATA.hidden, DATA.weight, DATA.labels
    refuses(message("ref_logps"), lambda: hl.DPO().from_hidden(*hidden, ref))
    given = {"advantages": DATA.advantages, "old_logps": old}
    refuses(message("old_logps"), given_to(hl.GRPO(), **given))
    kl = {"kl_logps": DATA.logps, "kl_ref_logps": ref, "kl_mask": DATA.mask}
    refuses(message("kl_ref_logps"), given_to(hl.KTO(), desirable=DATA.desirable, **kl))
    loss, _ = hl.DPO().from_logps(DATA.logps, with_value(DATA.ref, masked), DATA.mask)
    assert loss == hl.DPO().from_logps(DATA.logps, DATA.ref, DATA.mask)[0]


# debug()


class OnGpu(torch.Tensor):
    """Says that it is on a GPU."""

    @property
    def device(self):
        return torch.device("cuda")


@pytest.mark.parametrize("value", [7, -1])
def test_labels_on_a_gpu_are_looked_at_within_debug(value):
    labels = label(value).as_subclass(OnGpu)
    checks.require_labels(labels, DATA.V, -100)
    with hl.debug():
        refuses(f"got {value}", lambda: checks.require_labels(labels, DATA.V, -100))


def test_masks_and_references_on_a_gpu_are_looked_at_within_debug():
    for check in (
        lambda: checks.require_mask("mask", mask_with(2).as_subclass(OnGpu)),
        lambda: checks.require_finite(
            "mask", torch.full((4, 5), math.inf).as_subclass(OnGpu), DATA.mask
        ),
    ):
        check()
        with hl.debug():
            refuses("mask must be", check)


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
