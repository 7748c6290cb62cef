"""A reference that is never synced, scored before training: the numbers of one that is held."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
import trl_tiny as tiny
from torch.testing import assert_close
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

import humanline as hl
from humanline.integrations.trl import (
    HumanlineDPOConfig,
    HumanlineDPOTrainer,
    HumanlineKTOConfig,
    HumanlineKTOTrainer,
    apply_humanline,
)

DPO = HumanlineDPOTrainer, HumanlineDPOConfig, tiny.pairs
KTO = HumanlineKTOTrainer, HumanlineKTOConfig, tiny.labelled
TRL = {HumanlineDPOTrainer: (DPOTrainer, DPOConfig), HumanlineKTOTrainer: (KTOTrainer, KTOConfig)}
CLIP = {"log_eps_P": -0.3, "log_eps_R": 0.2}
HELD = {"sync_every": 0, **CLIP}
SCORED = {"precompute_ref_log_probs": True, "precompute_ref_batch_size": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("precomputed")


def build(folder, method, options, data=None, **arguments):
    trainer, config, make = method
    options = {"train_sampling_strategy": "sequential"} | options
    data = make() if data is None else data
    return tiny.build(trainer, config, folder, data, None, options, **arguments)


TIMES = [f"eval_{name}" for name in ("runtime", "samples_per_second", "steps_per_second")]


def check_alike(ours, held) -> None:
    """They train and evaluate alike, and the bounds act."""
    runs = []
    for trainer in (ours, held):
        trainer.train()
        trainer.evaluate()
        runs.append(tiny.history(trainer, TIMES))
    assert min(row.get("humanline/unclamped", 1) for row in runs[0]) < 1
    assert runs[0][-1]["eval_humanline/unclamped"] < 1
    for row, expected in zip(*runs, strict=True):
        assert row == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert_close(tiny.weights(ours), tiny.weights(held), rtol=1e-4, atol=1e-5)


OPTIONS = {
    "DPO": (DPO, {}),
    "DPO, several losses": (
        DPO,
        {"loss_type": ["sigmoid_norm", "ipo", "sft"], "loss_weights": [1.0, 0.5, 0.2]},
    ),
    "DPO, LD": (DPO, {"ld_alpha": 0.5}),
    "DPO, cut": (DPO, {"max_length": 6, "truncation_mode": "keep_end"}),
    "DPO, shuffled": (DPO, {"train_sampling_strategy": "random", "dataloader_num_workers": 1}),
    "KTO": (KTO, {}),
    "KTO, no reference point": (KTO, {"loss_type": "apo_zero_unpaired"}),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_it_gives_the_numbers_of_a_reference_that_is_held(folder, name):
    method, options = OPTIONS[name]
    held_out = method[2](6, seed=7)
    make = partial(build, folder, method, eval_dataset=held_out)
    ours = make(options=HELD | SCORED | options)
    assert ours.ref_model is None and ours.reference.memory_bytes() == 0
    check_alike(ours, make(options=HELD | options))


@pytest.mark.parametrize("method", [DPO, KTO], ids=["DPO", "KTO"])
@pytest.mark.parametrize("name", ["lora", "prompt"])
def test_it_is_the_base_s_with_an_adapter(folder, method, name):
    """Which need not begin as nothing. A dataset that comes later is scored too."""
    peft = pytest.importorskip("peft")
    config = {
        "lora": peft.LoraConfig(r=4, init_lora_weights=False, **tiny.LORA["attention"]),
        "prompt": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    }[name]
    make = partial(build, folder, method, eval_dataset=method[2](6, seed=7))
    runs = []
    for options in (HELD | SCORED, HELD):
        torch.manual_seed(0)
        runs.append(make(options=options, peft_config=config))
    check_alike(*runs)
    found, expected = (trainer.evaluate(method[2](4, seed=9)) for trainer in runs)
    assert found["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-4)


@pytest.mark.parametrize("method", [DPO, KTO], ids=["DPO", "KTO"])
def test_it_is_a_model_s_of_the_caller(folder, method):
    given = tiny.model()
    tiny.disturb(given)
    make = partial(build, folder, method, eval_dataset=method[2](6, seed=7), ref_model=given)
    check_alike(make(options=HELD | SCORED), make(options=HELD))


@pytest.mark.parametrize("method", [DPO, KTO], ids=["DPO", "KTO"])
def test_where_others_built_the_trainer_its_data_are_scored_again(folder, method):
    held_out = {"one": method[2](6, seed=7), "two": method[2](4, seed=8)}
    theirs = *TRL[method[0]], method[2]
    trainer = build(folder, theirs, SCORED, eval_dataset=held_out)
    apply_humanline(trainer, perception=hl.Clip(**CLIP), sync_every=0)
    check = build(folder, method, HELD, eval_dataset=held_out)
    runs = []
    for run in (trainer, check):
        run.train()
        runs.append((tiny.weights(run), run.evaluate()))
    assert_close(runs[0][0], runs[1][0], rtol=1e-4, atol=1e-5)
    for part in ("one", "two"):
        found, expected = (metrics[f"eval_{part}_loss"] for _, metrics in runs)
        assert found == pytest.approx(expected, rel=1e-4)


def test_a_resumed_run_goes_on_bit_for_bit(folder, tmp_path):
    def make(**options):
        return build(folder, DPO, HELD | SCORED | {"max_steps": 4} | options)

    tiny.check_resuming(make, tmp_path, at=2)


def test_a_stream_is_refused(folder):
    stream = tiny.pairs(8).to_iterable_dataset()
    with pytest.raises(ValueError, match="not supported with IterableDataset"):
        build(folder, DPO, HELD | SCORED, stream)


def test_it_is_refused_under_deepspeed(folder, monkeypatch):
    trainer = build(folder, (DPOTrainer, DPOConfig, tiny.pairs), SCORED)
    plugin = SimpleNamespace(zero_stage=2)
    monkeypatch.setattr(type(trainer.accelerator.state), "deepspeed_plugin", plugin)
    with pytest.raises(ValueError, match="precompute_ref_log_probs=True under DeepSpeed"):
        apply_humanline(trainer, sync_every=0)


@pytest.mark.parametrize("method", [DPO, KTO], ids=["DPO", "KTO"])
def test_off_it_is_trl_s_bit_for_bit(folder, method):
    runs = []
    for trainer, config in (TRL[method[0]], method[:2]):
        options = SCORED | ({} if config in (DPOConfig, KTOConfig) else {"humanline": False})
        run = build(folder, (trainer, config, method[2]), options)
        run.train()
        runs.append((run.train_dataset[:], tiny.history(run), tiny.weights(run)))
    assert runs[0][:2] == runs[1][:2]
    assert_close(runs[0][2], runs[1][2], rtol=0, atol=0)
