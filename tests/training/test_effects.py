"""Options that act only with others: the table is whole, and what it says of options is so."""

import re

import pytest
import torch
from toy import without_timing, write_jsonl

from humanline import cli
from humanline.training import effects, run, score
from humanline.training.config import OBJECTIVES, TrainConfig, flag
from humanline.training.errors import UserError

GRPO_LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "luspo", "sapo", "vespo")

#: Options that act whatever the others are. A new option has to be told of here or in the table.
ALWAYS = {
    *("objective", "perception", "sync_every", "reference", "model", "data", "loss_type", "beta"),
    *("learning_rate", "warmup_steps", "max_steps", "per_device_train_batch_size"),
    *("gradient_accumulation_steps", "max_grad_norm", "max_length", "max_bad_rows", "seed"),
    *("gradient_tolerance", "ddp_timeout", "fsdp"),  # the last two depend on the launch
    *("lora", "device", "dtype", "bf16", "padding_free", "gradient_checkpointing", "save_steps"),
    "save_optimizer",
}

VALUES = {
    **{"log_eps_P": -1, "log_eps_R": 1, "heldout": "q.jsonl", "heldout_fraction": 0.5},
    **{"reward_threshold": 0.5, "epsilon": 0.1, "desirable_weight": 2, "undesirable_weight": 2},
    **{"lora_r": 4, "lora_alpha": 8, "lora_target_modules": "q_proj", "eval_limit": 3},
    **{"per_device_eval_batch_size": 2, "max_new_tokens": 4},
}

#: Of each option: what it lacks, and how the error ends.
IN_VAIN = [
    *((n, [], "needs --lora, and this run has no --lora") for n in VALUES if "lora" in n),
    *(
        (n, ["--perception", p], f"needs --perception clip .*has --perception {p}, --loss-type sig")
        for n in ("log_eps_P", "log_eps_R")
        for p in ("none", "rejection")
    ),
    ("log_eps_P", ["--loss-type", "sft"], "other than sft, which has no reference, and this run"),
    *(
        ("epsilon", ["--objective", o], f"needs --objective grpo .* this run has --objective {o}")
        for o in ("dpo", "kto")
    ),
    *(
        ("epsilon", ["--objective", "grpo", "--loss-type", l], f"do not clip, .*--loss-type {l}")
        for l in ("sapo", "vespo")
    ),
    *(
        (n, ["--objective", o], f"needs --objective kto, and this run has --objective {o}")
        for n in ("desirable_weight", "undesirable_weight", "reward_threshold")
        for o in ("dpo", "grpo")
    ),
    ("heldout", ["--eval-limit", "0"], "other than 0, and this run has --eval-limit 0"),
    ("heldout_fraction", [], "needs --data, no --heldout and .* this run has no --data, no --held"),
    ("heldout_fraction", ["--data", "d.jsonl", "--heldout", "q.jsonl"], "has --data d.jsonl, --he"),
    ("heldout_fraction", ["--data", "d.jsonl", "--eval-limit", "0"], "--eval-limit 0"),
    ("eval_limit", ["--data", "d.jsonl", "--heldout-fraction", "0"], "--heldout-fraction 0.0"),
    ("per_device_eval_batch_size", ["--eval-limit", "0"], "something to measure"),
    ("max_new_tokens", ["--eval-limit", "0"], "needs held-out questions"),
    ("max_new_tokens", ["--data", "d.jsonl"], "this run has --data d.jsonl, no --heldout"),
]


def error_of(arguments, capsys):
    assert cli.main(["train", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line.removeprefix("humanline: error: ")


def test_every_option_is_in_the_table_or_acts_always():
    assert {*effects.NEEDS} | ALWAYS == {*TrainConfig.__dataclass_fields__}
    assert not {*effects.NEEDS} & ALWAYS
    assert {name for name, *_ in IN_VAIN} == {*effects.NEEDS} == {*VALUES}


@pytest.mark.parametrize("name, others, expected", IN_VAIN)
def test_an_option_without_effect_is_an_error(
    name, others, expected, tmp_path, capsys, monkeypatch
):
    """Before anything is read: there is neither such data nor a model."""
    monkeypatch.chdir(tmp_path)
    line = error_of([flag(name), str(VALUES[name]), *others, "--model", "gone"], capsys)
    assert line.startswith(f"{flag(name)} has no effect: it needs ")
    assert re.search(expected, line), line
    assert not list(tmp_path.iterdir())


def test_all_options_without_effect_are_named(capsys):
    line = error_of(["--lora-r", "8", "--epsilon", "0.1", "--model", "gone"], capsys)
    first, second = line.split("; ")
    assert first.startswith("--lora-r has no effect") and second.startswith("--epsilon has no eff")


def given_together(objective, **more):
    options = {name: value for name, value in VALUES.items() if name != "heldout_fraction"}
    for name in ("reward_threshold", "desirable_weight", "undesirable_weight"):
        if objective != "kto":
            del options[name]
    if objective != "grpo":
        del options["epsilon"]
    return options | {"objective": objective, "lora": True} | more


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_with_what_they_need_they_are_none(objective):
    options = given_together(objective)
    effects.require(TrainConfig(**options), options)
    options = {"data": "d.jsonl", "heldout_fraction": 0.2, "eval_limit": 4}
    effects.require(TrainConfig(**options), options)


def test_defaults_do_not_count():
    for objective in OBJECTIVES:
        for more in ({"perception": "none"}, {"eval_limit": 0}, {"data": "d.jsonl"}):
            options = {"objective": objective, **more}
            effects.require(TrainConfig(**options), options)
    # Nor do the values of a run that is resumed.
    effects.require(TrainConfig(lora_r=4, epsilon=0.3), {"max_steps": 60})


def test_a_resumed_run_s_options_are_what_counts(options, tmp_path, capsys, monkeypatch):
    options |= {"lora": True, "lora_r": 4, "max_steps": 4, "save_steps": 2, "eval_limit": 0}

    def stopped(*args):
        raise run.Interrupted("stopped")

    monkeypatch.setattr(run, "_finish", stopped)
    with pytest.raises(run.Interrupted):
        run.train(options, tmp_path / "out")
    arguments = ["--output-dir", str(tmp_path / "out"), "--resume", "--lora-r", "4"]
    assert cli.main(["train", *arguments]) == cli.INTERRUPTED  # it went on, to where it is stopped
    capsys.readouterr()
    line = error_of([*arguments, "--max-new-tokens", "3"], capsys)
    assert line.startswith("--max-new-tokens has no effect: it needs held-out questions")


def test_a_threshold_needs_rewards(options, tmp_path):
    rows = [{"prompt": "1 +", "completion": str(i), "label": i % 2 == 0} for i in range(8)]
    options |= {"data": str(write_jsonl(tmp_path / "d.jsonl", rows)), "objective": "kto"}
    with pytest.raises(
        UserError, match=r"--reward-threshold 0.5 has no effect: .*d.jsonl holds la"
    ):
        run.train(options | {"reward_threshold": 0.5}, tmp_path / "out")


# What the table says of losses is so


def loss_of(config):
    draw = torch.Generator().manual_seed(0)
    logps, ref = (-torch.rand((4, 5), generator=draw) for _ in range(2))
    logps = (3 * logps).requires_grad_()
    batch = {}
    if config.objective == "grpo":
        batch = {"advantages": torch.tensor([1.0, -1, 2, -2])}
    if config.objective == "kto":
        batch = {"desirable": torch.tensor([True, False, True, False]), "z0": 0.0}
    objective = score.make_objective(config)
    loss, _ = objective.from_logps(logps, ref, torch.ones(4, 5, dtype=torch.bool), **batch)
    loss.backward()
    return torch.cat([loss.detach()[None], logps.grad.reshape(-1)])


LOSSES = [
    *(("dpo", l) for l in ("sigmoid", "ipo", "hinge", "aot", "sft", "apo_down", "sigmoid_norm")),
    *(("kto", l) for l in ("kto", "apo_zero_unpaired")),
    *(("grpo", l) for l in GRPO_LOSSES),
]


@pytest.mark.parametrize("objective, loss_type", LOSSES)
@pytest.mark.parametrize("perception", ["clip", "none"])
@pytest.mark.parametrize(
    "name, values",
    [
        ("epsilon", (0.1, 0.6)),
        ("desirable_weight", (1.0, 2.0)),
        ("undesirable_weight", (1.0, 2.0)),
        ("log_eps_P", (-1.5, -0.01)),
        ("log_eps_R", (0.01, 1.5)),
    ],
)
def test_an_option_acts_just_where_the_table_says(objective, loss_type, perception, name, values):
    wide = {"log_eps_P": -2.0, "log_eps_R": 2.0, "objective": objective, "loss_type": loss_type}
    config = TrainConfig(**wide | {"perception": perception})
    low, high = (
        loss_of(TrainConfig(**wide | {"perception": perception, name: value})) for value in values
    )
    assert torch.equal(low, high) != effects.NEEDS[name].met(config)


def test_without_lora_its_options_change_nothing(options, tmp_path):
    options |= {"eval_limit": 0, "max_steps": 2}
    run.train(options, tmp_path / "a")
    run.train(options | {n: VALUES[n] for n in VALUES if "lora" in n}, tmp_path / "b")
    assert without_timing(tmp_path / "a") == without_timing(tmp_path / "b")


def test_a_sync_acts_without_perception(options, tmp_path):
    """So ``--sync-every`` and ``--reference`` are not in the table."""
    for sync_every in (0, 1):
        name = tmp_path / str(sync_every)
        run.train(options | {"perception": "none", "sync_every": sync_every, "eval_limit": 0}, name)
    assert without_timing(tmp_path / "0") != without_timing(tmp_path / "1")
