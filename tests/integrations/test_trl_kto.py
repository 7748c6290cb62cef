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


# The reference point's pairs


def grouped(shared=(0, 0, 1, 1, 2, 2, 3), completions=None):
    """A row for each: which of the prompts it has. Four rows are a batch."""
    rows = tiny.labelled(len(shared))
    texts = [rows[i]["prompt"] for i in shared]
    said = [f" w{i} w{i}" for i in completions or range(len(shared))]
    return rows.map(lambda row, i: row | {"prompt": texts[i], "completion": said[i]}, True)


def pairs_that_match(dataset) -> list[int]:
    """Rows whose other completion is one of their own prompt's."""
    rows = list(dataset)
    own = {(tuple(row["prompt_ids"]), tuple(row["completion_ids"])) for row in rows}
    seen = [(tuple(row["prompt_ids"]), tuple(row["KL_completion_ids"])) for row in rows]
    return [i for i, pair in enumerate(seen) if pair in own]


def with_data(folder, data, cls=HumanlineKTOTrainer, config=HumanlineKTOConfig, **rest):
    options = OPTIONS | {"train_sampling_strategy": "sequential"} | rest.pop("options", {})
    return tiny.build(cls, config, folder, data, None, options, **rest)


@pytest.mark.parametrize(
    "shared",
    [(0, 0, 1, 1, 2, 2, 3), (0, 0, 0, 0, 1, 1, 1, 2), (0, 1, 2, 3, 4), (0, 1, 1, 2, 3, 3, 3, 3)],
    ids=["groups", "batches of one prompt", "a last batch of one row", "the last batch of one"],
)
def test_no_mismatched_pair_matches(folder, shared):
    data = grouped(shared)
    assert pairs_that_match(with_data(folder, data, KTOTrainer, KTOConfig).train_dataset)
    trainer = with_data(folder, data, eval_dataset={"held": data, "out": data})
    for dataset in (trainer.train_dataset, *trainer.eval_dataset.values()):
        assert pairs_that_match(dataset) == []
    # What the reference point is estimated from comes from the batch where it can.
    for i, row in enumerate(trainer.train_dataset):
        mates = trainer.train_dataset.select(range(i - i % 4, min(i - i % 4 + 4, len(shared))))
        others = [m["completion_ids"] for m in mates if m["prompt_ids"] != row["prompt_ids"]]
        assert not others or row["KL_completion_ids"] in others


def test_pairs_that_do_not_match_stay_as_trl_has_them(folder):
    ours = with_data(folder, grouped(range(8))).train_dataset
    theirs = with_data(folder, grouped(range(8)), KTOTrainer, KTOConfig).train_dataset
    assert ours["KL_completion_ids"][:] == theirs["KL_completion_ids"][:]


def test_a_completion_that_two_prompts_share_mismatches_neither(folder):
    data = grouped((0, 1, 0, 1, 2), completions=(0, 0, 1, 1, 2))
    assert pairs_that_match(with_data(folder, data).train_dataset) == []


def test_pairs_are_mismatched_however_the_data_come(folder):
    """Of a stream, where others built the trainer, and where an evaluation is given its own."""
    stream = grouped().to_iterable_dataset()
    assert pairs_that_match(with_data(folder, stream).train_dataset) == []
    built = with_data(folder, grouped(), KTOTrainer, KTOConfig, eval_dataset=grouped())
    assert pairs_that_match(built.train_dataset)
    apply_humanline(built)
    assert pairs_that_match(built.train_dataset) == pairs_that_match(built.eval_dataset) == []
    batches = tiny.recorded(built)
    built.evaluate(grouped((0, 0, 0, 0, 1, 1)))
    told = {tuple(row[row != 0].tolist()) for batch in batches for row in batch["input_ids"]}
    pairs = {tuple(row[row != 0].tolist()) for batch in batches for row in batch["KL_input_ids"]}
    assert len(pairs) > 1 and not told & pairs


def test_one_prompt_has_no_mismatched_pair(folder):
    with pytest.raises(ValueError, match="'train' has no mismatched pair for its row 0: every"):
        with_data(folder, grouped((0, 0, 0, 0, 0)))
    with_data(folder, grouped((0, 0, 0, 0)), options={"loss_type": "apo_zero_unpaired"})


def test_off_the_pairs_are_trl_s(folder):
    runs = []
    for cls, config, options in (
        (KTOTrainer, KTOConfig, {}),
        (HumanlineKTOTrainer, HumanlineKTOConfig, {"humanline": False}),
    ):
        trainer = with_data(folder, grouped(), cls, config, options=options | {"max_steps": 2})
        trainer.train()
        runs.append((trainer.train_dataset[:], tiny.history(trainer), tiny.weights(trainer)))
    assert runs[0][:2] == runs[1][:2]
    assert_close(runs[0][2], runs[1][2], **EXACT)
