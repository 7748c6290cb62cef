"""TRL's log-prob kernels against ours, and the patch that swaps them."""

import re
import sys

import pytest
import torch
import trl_tiny as tiny
from torch.testing import assert_close
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, KTOConfig, KTOTrainer
from trl.kernels import ChunkedLogProbFunction as TheirChunked
from trl.trainer import utils

import humanline as hl
from humanline import install
from humanline.integrations.trl import head as trl_head
from humanline.integrations.trl import version as trl_version

THEIRS = {
    name: getattr(utils, name)
    for name in (
        "selective_log_softmax",
        "selective_log_softmax_and_entropy",
        "entropy_from_logits",
    )
}
HEAD = utils._ChunkedLogProbFunction
OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
COMPLETIONS = ("chosen_ids", "rejected_ids")
N, H, V = 12, 8, 50


def truth(logits, index, temperature):
    logps = (logits.double() / temperature).log_softmax(-1)
    return logps.gather(-1, index[..., None]).squeeze(-1), -(logps.exp() * logps).sum(-1)


def worst(x, truth):
    return (x.double() - truth).abs().max().item()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_functions_of_logits(dtype, temperature, masked):
    logits = (3 * torch.randn(3, 4, V)).to(dtype)
    index = torch.randint(V, (3, 4))
    mask = torch.rand(3, 4) < 0.6 if masked else torch.ones(3, 4, dtype=torch.bool)
    weight = torch.randn(3, 4, dtype=torch.float64)
    exact = logits.double().requires_grad_()
    picked, entropy = truth(exact, index, temperature)
    ((picked + 0.5 * entropy) * weight * mask).sum().backward()
    errors = {}
    for who, functions in (("theirs", THEIRS), ("ours", vars(trl_head))):
        leaf = logits.clone().requires_grad_()
        arguments = {"temperature": temperature, "row_mask": mask if masked else None}
        alone = functions["selective_log_softmax"](leaf, index, **arguments)
        logps, ent = functions["selective_log_softmax_and_entropy"](leaf, index, **arguments)
        only = functions["entropy_from_logits"](leaf / temperature) * mask
        assert_close(alone, logps)
        assert_close(only, ent, rtol=0.02, atol=0.02 if dtype == torch.bfloat16 else 1e-5)
        ((logps.double() + 0.5 * ent.double()) * weight).sum().backward()
        errors[who] = [
            worst(logps, picked.detach() * mask),
            worst(ent, entropy.detach() * mask),
            worst(leaf.grad, exact.grad),
        ]
    for ours, theirs in zip(errors["ours"], errors["theirs"], strict=True):
        assert ours <= 1.5 * theirs + 1e-6


def test_several_tokens_a_row_are_left_to_trl():
    logits, index = torch.randn(2, 3, V), torch.randint(V, (2, 3, 5))
    expected = THEIRS["selective_log_softmax"](logits, index)
    assert_close(trl_head.selective_log_softmax(logits, index), expected, rtol=0, atol=0)


def test_entropy_without_gradient():
    logits, index = torch.randn(2, 3, V, requires_grad=True), torch.randint(V, (2, 3))
    _, entropy = trl_head.selective_log_softmax_and_entropy(logits, index, False)
    assert not entropy.requires_grad


HEADS = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "softcap": {"softcap": 2.0},
    "scale": {"scale": 0.3},
}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("entropy_gradient", [False, True])
def test_function_of_hidden_states(head, bias, entropy_gradient):
    """All outputs and gradients are TRL's."""
    options = {"temperature": 1.0, "chunk_size": 16, "softcap": None, "scale": 1.0} | HEADS[head]
    inputs = [torch.randn(N, H), torch.randn(V, H), torch.randn(V) if bias else None]
    targets = torch.randint(V, (N,))
    found = []
    for function in (TheirChunked, trl_head.ChunkedLogProbFunction(None, entropy_gradient)):
        leaves = [None if x is None else x.clone().requires_grad_() for x in inputs]
        outputs = function.apply(*leaves, targets, *options.values(), OUTPUTS)
        loss = (outputs[0] * torch.linspace(-1, 1, N)).sum()
        if entropy_gradient:
            loss = loss + outputs[1].square().sum()
        loss.backward()
        found.append(([x.detach() for x in outputs], [x.grad for x in leaves if x is not None]))
    assert found[1][0][4].dtype == torch.bool
    assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


def test_function_of_half_precision_hidden_states():
    """At least as close to float64 as TRL's, which rounds logits to bfloat16."""
    hidden, weight = torch.randn(N, H).bfloat16(), torch.randn(V, H).bfloat16()
    targets = torch.randint(V, (N,))
    exact, _ = truth(hidden.double() @ weight.double().T, targets, 1.0)
    ours, theirs = (
        worst(f.apply(hidden, weight, None, targets, 1.0, V, None, 1.0, ())[0], exact)
        for f in (trl_head.ChunkedLogProbFunction(), TheirChunked)
    )
    assert ours < 1e-5 < theirs


def test_only_what_is_asked_for():
    arguments = (torch.randn(N, H), torch.randn(V, H), None, torch.randint(V, (N,)), 1.0, V)
    _, *rest = trl_head.ChunkedLogProbFunction().apply(*arguments, outputs=("is_top1",))
    assert [x is not None for x in rest] == [False, False, False, True]
    _, *rest = trl_head.ChunkedLogProbFunction(only=()).apply(*arguments)
    assert rest == [None] * 4


# The patch


def names_of_trl():
    """Every place in TRL where one of the functions is to be found."""
    return {
        (module, name): value
        for module in list(sys.modules)
        if module.split(".")[0] == "trl"
        for name, value in vars(sys.modules[module]).items()
        if name in (*THEIRS, "_ChunkedLogProbFunction", "_use_triton")
    }


def test_patch_is_reversible_and_reaches_copies_of_the_names():
    import trl.experimental.cpo  # noqa: F401  imports selective_log_softmax by name

    before = names_of_trl()
    patch = hl.patch_trl()
    module = sys.modules["trl.experimental.cpo.cpo_trainer"]
    assert module.selective_log_softmax is trl_head.selective_log_softmax
    sys.modules.pop("trl.experimental.orpo.orpo_trainer", None)
    import trl.experimental.orpo.orpo_trainer as late

    assert late.selective_log_softmax is trl_head.selective_log_softmax
    with hl.patch_trl():  # does nothing
        pass
    assert utils.selective_log_softmax is trl_head.selective_log_softmax
    assert isinstance(utils._ChunkedLogProbFunction, trl_head.ChunkedLogProbFunction)
    patch.close()
    assert late.selective_log_softmax is THEIRS["selective_log_softmax"]
    after = names_of_trl()
    assert {place: after[place] for place in before} == before
    assert utils._ChunkedLogProbFunction is HEAD


def test_patch_outlives_what_patch_trl_returns():
    import gc

    try:
        hl.patch_trl()
        gc.collect()
        assert isinstance(utils._ChunkedLogProbFunction, trl_head.ChunkedLogProbFunction)
    finally:
        trl_head._replace(utils._ChunkedLogProbFunction, HEAD)
        for name, theirs in THEIRS.items():
            trl_head._replace(getattr(trl_head, name), theirs)


def reward(completions, **_):
    """Anything that differs within a group."""
    return [float(sum(map(ord, completion)) % 7) for completion in completions]


def dpo(folder, **options):
    options = {"use_weighting": True} | options
    return tiny.build(DPOTrainer, DPOConfig, folder, tiny.pairs(), options=options)


def kto(folder, **options):
    options |= {"train_sampling_strategy": "sequential"}
    return tiny.build(KTOTrainer, KTOConfig, folder, tiny.labelled(), options=options)


def grpo(folder, **options):
    groups = {"per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 6}
    options |= groups | {"beta": 0.04, "temperature": 0.8, "num_iterations": 2}
    return tiny.build(
        GRPOTrainer, GRPOConfig, folder, tiny.prompts(), options=options, reward_funcs=reward
    )


# Calls of the head in a step. DPO: policy and reference. KTO: of mismatched pairs as well. GRPO:
# the policy, and every other step both, of what was sampled.
@pytest.mark.parametrize(("make", "calls"), [(dpo, 2), (kto, 4), (grpo, 2)])
def test_unmodified_trainer_gives_the_same_numbers(tmp_path, monkeypatch, make, calls):
    theirs = make(tmp_path, learning_rate=0.1)
    theirs.train()
    ours = make(tmp_path, learning_rate=0.1)  # only now: it seeds the sampling
    rows, apply = [], trl_head.ChunkedLogProbFunction.apply
    monkeypatch.setattr(
        trl_head.ChunkedLogProbFunction,
        "apply",
        lambda self, hidden, *rest: rows.append(len(hidden)) or apply(self, hidden, *rest),
    )
    with hl.patch_trl():
        ours.train()
    assert len(rows) == 4 * calls
    if make is dpo:
        completions = [len(row[name]) for row in ours.train_dataset for name in COMPLETIONS]
        assert max(rows) <= 4 * max(completions)  # no prompt, no padding
    histories = (tiny.history(trainer, without=["step_time"]) for trainer in (theirs, ours))
    for expected, row in zip(*histories, strict=True):
        assert row == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert_close(tiny.weights(ours), tiny.weights(theirs), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("make", [dpo, kto, grpo])
def test_patched_trainer_leaves_columns_out(tmp_path, make):
    trainer = make(tmp_path, learning_rate=0.1, max_steps=1)
    with hl.patch_trl(gradient_tolerance=0.3):
        trainer.train()
        share = utils._ChunkedLogProbFunction.kept_columns
    assert 0 < share < 1
    exact = make(tmp_path, learning_rate=0.1, max_steps=1)
    with hl.patch_trl():
        exact.train()
    (row, _), (expected, _) = (tiny.history(t, without=["step_time"]) for t in (trainer, exact))
    assert row["loss"] == pytest.approx(expected["loss"], rel=1e-6, abs=1e-7)
    assert row["grad_norm"] != expected["grad_norm"]
    assert row["grad_norm"] == pytest.approx(expected["grad_norm"], rel=0.3)


def test_a_patch_has_one_tolerance():
    with pytest.raises(ValueError, match=r"gradient_tolerance must be in \[0, 1\), got 1"):
        hl.patch_trl(gradient_tolerance=1)
    assert utils._ChunkedLogProbFunction is HEAD
    with hl.patch_trl(gradient_tolerance=1e-3):
        with hl.patch_trl(gradient_tolerance=1e-3):
            pass
        with pytest.raises(ValueError, match=r"patched already, with gradient_tolerance=0\.001"):
            hl.patch_trl()
    assert utils._ChunkedLogProbFunction is HEAD


def test_unknown_version_is_refused(monkeypatch):
    monkeypatch.setattr(trl_version, "version", lambda name: "2.0.1")
    with pytest.raises(ImportError, match=r"knows .* TRL 1\.15, 1\.16; installed is 2\.0\.1"):
        hl.patch_trl()
    assert utils._ChunkedLogProbFunction is HEAD


def test_missing_trl_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    for name in [n for n in sys.modules if n.startswith("humanline.integrations.trl")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError, match=re.escape(install.command("trl"))):
        _ = hl.patch_trl


def test_a_single_row_under_the_patch():
    logits, index = torch.randn(V), torch.tensor(3)
    expected = truth(logits, index, 1.0)
    for one, ours in enumerate(
        [trl_head.selective_log_softmax(logits, index), trl_head.entropy_from_logits(logits)]
    ):
        assert ours.shape == ()
        assert_close(ours, expected[one].float())
    assert THEIRS["entropy_from_logits"](logits).shape == ()
