"""HumanlineKTOTrainer against TRL's own, and against humanline.objectives in a plain loop."""

from functools import partial

import pytest
import torch
import trl_tiny as tiny
from torch.testing import assert_close
from trl import KTOConfig, KTOTrainer

import humanline as hl
from humanline.integrations.trl import HumanlineKTOConfig, HumanlineKTOTrainer, apply_humanline
from humanline.reference import REFERENCES

LOSS_TYPES = ["kto", "apo_zero_unpaired"]
EXACT = {"rtol": 0, "atol": 0}
CLIP = {"log_eps_P": -0.3, "log_eps_R": 0.2}
WEIGHTS = {"desirable_weight": 1.5, "undesirable_weight": 0.7}
OPTIONS = {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 4, **WEIGHTS}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("kto")


def build(folder, cls=HumanlineKTOTrainer, config=HumanlineKTOConfig, **options):
    names = ("eval_dataset", "peft_config")
    arguments = {name: options.pop(name) for name in names if name in options}
    # TRL wants batches that stay as they are where it pairs them for the reference point.
    options = OPTIONS | {"train_sampling_strategy": "sequential"} | options
    return tiny.build(cls, config, folder, tiny.labelled(), None, options, **arguments)


def eager(policy, batch, prefix=""):
    ids, attention = batch[f"{prefix}input_ids"], batch[f"{prefix}attention_mask"]
    labels = ids.masked_fill(batch[f"{prefix}completion_mask"] == 0, -100)
    return tiny.eager_logps(policy, ids, attention, labels)


def expected(policy, reference, batch, loss_type="kto"):
    objective = hl.KTO(loss_type=loss_type, perception=hl.Clip(**CLIP), **WEIGHTS)
    logps, mask = eager(policy, batch)
    point = {}
    with torch.no_grad():
        ref_logps, _ = eager(reference, batch)
        if loss_type == "kto":
            point["kl_logps"], point["kl_mask"] = eager(policy, batch, "KL_")
            point["kl_ref_logps"], _ = eager(reference, batch, "KL_")
    desirable = torch.as_tensor(batch["label"], dtype=torch.bool)
    return objective.from_logps(logps, ref_logps, mask, desirable=desirable, **point)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_off_trains_as_trl_bit_for_bit(folder, loss_type):
    runs = []
    for cls, config, options in (
        (KTOTrainer, KTOConfig, {}),
        (HumanlineKTOTrainer, HumanlineKTOConfig, {"humanline": False}),
    ):
        trainer = build(folder, cls, config, loss_type=loss_type, **options)
        trainer.train()
        runs.append((tiny.history(trainer), tiny.weights(trainer)))
    assert runs[0][0] == runs[1][0]
    assert_close(runs[0][1], runs[1][1], **EXACT)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_loss_and_gradients_are_the_objective_s(folder, loss_type):
    trainer = build(folder, loss_type=loss_type, **CLIP)
    tiny.disturb(trainer.model)
    stats = check_against_eager(trainer, trainer.reference.model, loss_type)
    assert loss_type != "kto" or stats["kl"] > 0


def check_against_eager(trainer, reference, loss_type="kto"):
    """Of a batch, against the models' own logits; the statistics."""

    def of(batch):
        return expected(trainer.model.eval(), reference, batch, loss_type)

    return tiny.check_loss(trainer, tiny.batch_of(trainer), of)[1]


def test_training_is_the_plain_loop(folder):
    options = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    trainer = build(folder, max_grad_norm=0.5, max_steps=5, **options, **CLIP)
    batches = tiny.recorded(trainer)
    trainer.train()

    def loss_of(policy, reference, batch):
        loss, stats = expected(policy, reference, batch)
        return loss / 2, stats

    policy, _, unclamped = tiny.plain_loop(batches, 2, 1, 0.5, loss_of)
    assert unclamped < 1
    assert_close(dict(policy.named_parameters()), tiny.weights(trainer), rtol=1e-4, atol=1e-5)


def test_the_kinds_of_reference_agree(folder):
    tiny.check_kinds_agree(partial(build, folder, sync_every=2, max_steps=3, **CLIP))


@pytest.mark.parametrize("kind", REFERENCES)
def test_resumed_run_goes_on_bit_for_bit(folder, tmp_path, kind):
    options = {"reference": kind, "max_steps": 3, **CLIP}
    tiny.check_resuming(partial(build, folder, **options), tmp_path, at=1)


def test_evaluation_perceives_too(folder):
    trainer = build(folder, eval_dataset=tiny.labelled(8, seed=7), **CLIP)
    tiny.check_evaluation(trainer, partial(expected, trainer.model, trainer.reference.model))


@pytest.mark.parametrize("where", tiny.LORA)
def test_lora(folder, where):
    peft = pytest.importorskip("peft")
    trainer = build(folder, peft_config=peft.LoraConfig(r=4, **tiny.LORA[where]), **CLIP)
    first = tiny.as_it_is(trainer.model)
    tiny.disturb(trainer.model)
    check_against_eager(trainer, first)


def test_lora_with_evaluation_and_apply(folder):
    """A trainer of TRL's with LoRA, made a humanline one: the reference is its adapter."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    held_out = tiny.labelled(4, seed=7)
    options = {"peft_config": config, "eval_dataset": held_out, "max_steps": 3}
    trainer = build(folder, KTOTrainer, KTOConfig, **options)
    apply_humanline(trainer, perception=hl.Clip(-0.001, 0.001))
    trainer.train()
    trainer.evaluate()
    rows = trainer.state.log_history
    assert rows[0]["humanline/unclamped"] == 1 > rows[1]["humanline/unclamped"]
    assert rows[-1]["eval_humanline/unclamped"] < 1
    assert all("lora" in name for name in trainer.reference.snapshot if "rotary" not in name)
