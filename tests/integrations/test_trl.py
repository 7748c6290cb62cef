"""Options, and what the trainers refuse before anything runs."""

import logging
from functools import partial

import datasets
import pytest
import torch
import trl_tiny as tiny
from transformers import LlamaForCausalLM
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer, TrlParser

import humanline as hl
from humanline.integrations.trl import (
    HumanlineDPOConfig,
    HumanlineDPOTrainer,
    HumanlineGRPOConfig,
    HumanlineKTOConfig,
    HumanlineKTOTrainer,
    apply_humanline,
)

CONFIGS = [HumanlineDPOConfig, HumanlineKTOConfig, HumanlineGRPOConfig]

LOSSES = {
    "dpo": (HumanlineDPOTrainer, HumanlineDPOConfig, tiny.pairs),
    "kto": (HumanlineKTOTrainer, HumanlineKTOConfig, tiny.labelled),
}


def build(folder, data=None, policy=None, config=HumanlineDPOConfig, arguments=(), **options):
    data = tiny.pairs(4) if data is None else data
    arguments = dict(arguments)
    return tiny.build(HumanlineDPOTrainer, config, folder, data, policy, options, **arguments)


# Options


@pytest.mark.parametrize("config", CONFIGS)
def test_trl_parser_knows_the_flags(tmp_path, config):
    flags = "--use_cpu --log_eps_P -0.5 --log_eps_R 0.25 --sync_every 4 --reference adapter"
    (args,) = TrlParser(config).parse_args_and_config(
        [*flags.split(), "--gradient_tolerance", "1e-3", "--output_dir", str(tmp_path)]
    )
    assert args.gradient_tolerance == 1e-3
    (args,) = TrlParser(config).parse_args_and_config(
        [*flags.split(), "--no_humanline", "--output_dir", str(tmp_path), "--beta", "0.3"]
    )
    assert (args.log_eps_P, args.log_eps_R, args.sync_every) == (-0.5, 0.25, 4)
    assert (args.reference, args.humanline, args.beta) == ("adapter", False, 0.3)
    assert args.perception == hl.Clip(-0.5, 0.25)
    with pytest.raises(SystemExit):
        TrlParser(config).parse_args_and_config(["--reference", "mirror"])


@pytest.mark.parametrize("config", CONFIGS)
def test_bounds_out_of_order(config):
    with pytest.raises(ValueError, match="Clip needs log_eps_P <= log_eps_R"):
        config(use_cpu=True, log_eps_P=0.5, log_eps_R=-0.5)


@pytest.mark.parametrize("config", CONFIGS)
def test_a_tolerance_out_of_range(config):
    for value in (1.0, -1e-3, float("nan")):
        with pytest.raises(ValueError, match=r"gradient_tolerance must be in \[0, 1\), got"):
            config(use_cpu=True, gradient_tolerance=value)
    with pytest.raises(ValueError, match="humanline=False TRL's own runs"):
        config(use_cpu=True, gradient_tolerance=1e-3, humanline=False)


@pytest.mark.parametrize("lora", [None, "attention", "lm_head"])
def test_columns_are_left_out_of_the_gradient(tmp_path, lora):
    peft = {}
    if lora is not None:
        config = pytest.importorskip("peft").LoraConfig(**tiny.LORA[lora])
        peft = {"arguments": {"peft_config": config}}
    shares, found = {}, {}
    for tolerance in (0.0, 0.3):
        trainer = build(
            tmp_path, gradient_tolerance=tolerance, max_steps=2, logging_steps=1, **peft
        )
        tiny.disturb(trainer.model)
        batch = tiny.batch_of(trainer)
        _, found[tolerance], _ = tiny.loss_and_gradients(trainer, batch)
        trainer._kept_columns = None
        trainer.train()
        shares[tolerance] = [
            row.get("humanline/kept_columns") for row in tiny.history(trainer) if "loss" in row
        ]
    assert shares[0.0] == [None, None]
    assert all(0 < share < 1 for share in shares[0.3])
    assert found[0.3].keys() == found[0.0].keys()
    for name, exact in found[0.0].items():
        assert (found[0.3][name] - exact).norm() <= 0.5 * exact.norm()
    assert any(not torch.equal(found[0.3][name], exact) for name, exact in found[0.0].items())


@pytest.mark.parametrize("loss", LOSSES)
def test_every_preference_trainer_says_what_it_keeps(tmp_path, loss):
    trainer, config, data = LOSSES[loss]
    options = {"gradient_tolerance": 0.3, "max_steps": 2, "logging_steps": 1}
    built = tiny.build(trainer, config, tmp_path, data(4), options=options)
    built.train()
    rows = [row for row in tiny.history(built) if "loss" in row]
    assert len(rows) == 2 and all(0 < row["humanline/kept_columns"] < 1 for row in rows)


def test_apply_humanline_takes_a_tolerance(tmp_path):
    trainer = tiny.build(DPOTrainer, DPOConfig, tmp_path, tiny.pairs(4), options={"max_steps": 1})
    with pytest.raises(ValueError, match=r"gradient_tolerance must be in \[0, 1\), got 2"):
        apply_humanline(trainer, gradient_tolerance=2)
    apply_humanline(trainer, gradient_tolerance=0.3)
    trainer.train()
    assert any("humanline/kept_columns" in row for row in trainer.state.log_history)


def test_a_config_of_trl_s_means_the_defaults(tmp_path):
    trainer = build(tmp_path, config=DPOConfig)
    assert trainer.perception == hl.Clip() and trainer.reference.sync_every == 1


def test_the_log_says_what_is_on_once(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "humanline"):
        build(tmp_path, sync_every=3, log_eps_R=0.5, max_steps=2).train()
    (message,) = [r.getMessage() for r in caplog.records if r.name.startswith("humanline")]
    assert (
        "Clip(log_eps_P=-1.5, log_eps_R=0.5)" in message
        and "copy, synced every 3 optimizer steps" in message
    )
    assert "humanline's fused head" in message


def idle(caplog):
    """The warnings of bounds that have not acted."""
    found = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    caplog.clear()
    return [message for message in found if "perception has not acted" in message]


STILL = {"learning_rate": 1e-9, "sync_every": 0}


@pytest.mark.parametrize("loss", LOSSES)
def test_bounds_that_never_act_are_warned_of_once(tmp_path, caplog, loss):
    """In the first 20 optimizer steps, however many batches they take."""
    trainer, config, data = LOSSES[loss]
    options = {"gradient_accumulation_steps": 2, "max_steps": 22, "log_eps_R": 0.5, **STILL}
    built = tiny.build(trainer, config, tmp_path, data(4), options=options)
    batches = tiny.recorded(built)
    built.train()
    (message,) = idle(caplog)
    tokens = sum(int(b["completion_mask"].sum()) for b in batches[:40])
    assert f"in the first 20 steps none of {tokens} tokens had a log-ratio" in message
    assert "below -1.5 or above 0.5 nats" in message


@pytest.mark.parametrize(
    "options",
    [
        {"humanline": False},
        {"max_steps": 19},
        {"log_eps_P": -1e-6, "log_eps_R": 1e-6, "learning_rate": 1e-4},
        {"log_eps_P": -float("inf"), "log_eps_R": float("inf")},
    ],
)
def test_bounds_that_act_or_are_none_are_not_warned_of(tmp_path, caplog, options):
    build(tmp_path, **{"max_steps": 21, **STILL, **options}).train()
    assert idle(caplog) == []


@pytest.mark.parametrize(("loss", "warned"), [("sft", 1), ("sigmoid", 0)])
def test_perception_without_a_reference_is_warned_of(tmp_path, caplog, loss, warned):
    build(tmp_path, loss_type=[loss])
    build(tmp_path, loss_type=[loss], humanline=False)
    messages = [r.getMessage() for r in caplog.records]
    assert sum('does nothing: the "sft" loss has no reference' in m for m in messages) == warned


def test_evaluations_do_not_count_as_steps(tmp_path, caplog):
    options = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 19, **STILL}
    build(tmp_path, arguments={"eval_dataset": tiny.pairs(2)}, **options).train()
    assert idle(caplog) == []


def test_a_trainer_that_became_humanline_warns_too(tmp_path, caplog):
    data, options = tiny.pairs(4), {"max_steps": 20, "learning_rate": 1e-9}
    trainer = tiny.build(DPOTrainer, DPOConfig, tmp_path, data, options=options)
    apply_humanline(trainer)
    trainer.train()
    assert len(idle(caplog)) == 1


# Contradictions


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precompute_ref_log_probs": True}, "do not keep. Set precompute_ref_log_probs=False"),
        ({"sync_ref_model": True}, "humanline syncs before it, see sync_every. Set sync_ref_model"),
        ({"sync_every": -1}, "sync_every must be 0"),
        ({"reference": "lookahead", "sync_every": 0}, "sync_every must be positive, got 0"),
        ({"reference": "lookahead", "eval_strategy": "epoch"}, "no weights to score an evaluation"),
        ({"reference": "mirror"}, "unknown reference 'mirror'; known: copy, adapter, lookahead"),
    ],
)
def test_contradictory_options(tmp_path, options, message):
    evaluation = {"eval_dataset": tiny.pairs(2)} if "eval_strategy" in options else {}
    with pytest.raises(ValueError, match=message):
        build(tmp_path, arguments=evaluation, **options)


def test_contradictions_are_none_without_humanline(tmp_path):
    build(tmp_path, humanline=False, precompute_ref_log_probs=True)


def test_a_lookahead_of_more_than_one_epoch_is_refused_before_the_first_step(tmp_path):
    trainer = build(tmp_path, reference="lookahead", max_steps=3)  # of 2 an epoch
    with pytest.raises(ValueError, match=r"trains for one epoch at most: .* this run has 2"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_stream_is_one_epoch_to_a_lookahead(tmp_path):
    """It trains and resumes as the other references do, until the stream is through."""
    stream = datasets.IterableDataset.from_generator(lambda: iter(tiny.pairs(12)))
    bounds = {"log_eps_P": -0.3, "log_eps_R": 0.2}
    make = partial(build, tmp_path, stream, sync_every=2, **bounds)
    tiny.check_kinds_agree(partial(make, max_steps=6))  # all there is in it
    tiny.check_resuming(partial(make, reference="lookahead", max_steps=5), tmp_path, at=3)
    with pytest.raises(ValueError, match=r"stream ended after 6 optimizer steps of max_steps=8"):
        make(reference="lookahead", max_steps=8).train()


def test_a_lookahead_cannot_evaluate(tmp_path):
    trainer = build(tmp_path, reference="lookahead", arguments={"eval_dataset": tiny.pairs(2)})
    with pytest.raises(ValueError, match="holds no weights to score an evaluation with"):
        trainer.evaluate()


def test_apply_humanline_checks_too(tmp_path):
    args = SFTConfig(output_dir=str(tmp_path), **tiny.OPTIONS)
    data = datasets.Dataset.from_dict({"text": ["w1 w2"]})
    sft = SFTTrainer(tiny.model(), args, train_dataset=data, processing_class=tiny.tokenizer())
    with pytest.raises(TypeError, match=r"knows DPOTrainer, KTOTrainer, GRPOTrainer .*SFTTrainer"):
        apply_humanline(sft)
    with pytest.raises(ValueError, match="precompute_ref_log_probs=True contradicts"):
        apply_humanline(build(tmp_path, humanline=False, precompute_ref_log_probs=True))


# Data


def test_missing_columns_are_named_and_a_row_is_shown(tmp_path):
    data = tiny.pairs(4).rename_column("rejected", "reject")
    message = r"train_dataset lacks rejected: it needs prompt, chosen, rejected or chosen, rejected"
    with pytest.raises(ValueError, match=message + r"\. Its first row is \{'prompt': 'w"):
        build(tmp_path, data)
    evaluation = {"mine": tiny.pairs(2).remove_columns("chosen")}
    with pytest.raises(ValueError, match=r"eval_dataset\['mine'\] lacks chosen"):
        build(tmp_path, arguments={"eval_dataset": evaluation})
    with pytest.raises(ValueError, match=r"train_dataset lacks label: .*prompt, completion, label"):
        data = tiny.labelled(4).remove_columns("label")
        tiny.build(HumanlineKTOTrainer, HumanlineKTOConfig, tmp_path, data)


def test_an_empty_dataset(tmp_path):
    with pytest.raises(ValueError, match="train_dataset is empty"):
        build(tmp_path, tiny.pairs(4).select([]))


def test_chats_need_a_template(tmp_path, monkeypatch):
    plain = tiny.tokenizer(None)
    monkeypatch.setattr(tiny, "tokenizer", lambda: plain)
    rows = [{"role": "user", "content": "w1"}], [{"role": "assistant", "content": "w2"}]
    data = datasets.Dataset.from_list([{"prompt": rows[0], "chosen": rows[1], "rejected": rows[1]}])
    with pytest.raises(ValueError, match=r"holds chat messages, .* has no chat template: set .*w1"):
        build(tmp_path, data)


# Models


class Headless(LlamaForCausalLM):
    def get_output_embeddings(self):
        return None


class Bodiless(LlamaForCausalLM):
    base_model_prefix = "trunk"


@pytest.mark.parametrize(
    ("cls", "found"),
    [
        (Headless, r"\(found None\)"),
        (Bodiless, r"base_model_prefix='trunk', found the model itself"),
    ],
)
def test_no_separable_output_head(tmp_path, cls, found):
    tiny.model(path=tmp_path / "model")
    policy = cls.from_pretrained(tmp_path / "model")
    message = rf"{cls.__name__} has no separable output head: looked for .*{found}"
    with pytest.raises(ValueError, match=message):
        build(tmp_path, policy=policy, arguments={"ref_model": tiny.model()})


@pytest.mark.parametrize(
    ("trainer", "config", "data"),
    [
        (HumanlineDPOTrainer, HumanlineDPOConfig, tiny.pairs),
        (HumanlineKTOTrainer, HumanlineKTOConfig, tiny.labelled),
    ],
)
def test_only_a_copy_begins_with_a_model_of_the_caller_s(tmp_path, trainer, config, data):
    """Where none is given, TRL has loaded one that contradicts nothing."""
    make = partial(tiny.build, trainer, config, tmp_path, data(4))
    given = {"ref_model": tiny.model()}
    for kind, sync_every in (("adapter", 1), ("adapter", 0), ("lookahead", 1)):
        options = {"reference": kind, "sync_every": sync_every}
        message = rf"{kind}.* as it is, whatever sync_every: only reference=.copy. can begin with"
        with pytest.raises(ValueError, match=message):
            make(options=options, **given)
        make(options=options)
    assert make(options={"sync_every": 0}, **given).reference.model is given["ref_model"]


@pytest.mark.parametrize("applied", [False, True])
@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_syncs_do_not_write_into_a_model_of_the_caller_s(tmp_path, loss, applied):
    """The reference begins with it, and goes on as a copy."""
    trainer, config, data = LOSSES[loss]
    given = tiny.model()
    tiny.disturb(given)
    before = {name: p.clone() for name, p in given.named_parameters()}
    options = {"humanline": not applied}
    made = tiny.build(trainer, config, tmp_path, data(8), None, options, ref_model=given)
    if applied:
        apply_humanline(made)
    began = dict(made.reference.model.named_parameters())
    torch.testing.assert_close(began, before, rtol=0, atol=0)
    made.train()
    assert any((began[name] != p).any() for name, p in before.items())
    torch.testing.assert_close(dict(given.named_parameters()), before, rtol=0, atol=0)


def test_a_reference_model_that_has_no_part(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    arguments = {"peft_config": config, "ref_model": tiny.model()}
    with pytest.raises(ValueError, match=r"adapter. begins with the policy as it is"):
        build(tmp_path, arguments=arguments)
    with pytest.raises(ValueError, match="model is that of a reference with other weights"):
        build(tmp_path, arguments=arguments, reference="copy")


@pytest.mark.parametrize(
    ("lora", "options", "message"),
    [
        ({"use_dora": True}, {}, "with a variant such as DoRA: only plain LoRA can be folded"),
        ({"lora_dropout": 0.1}, {"disable_dropout": False}, "has dropout 0.1, which cannot be"),
    ],
)
def test_adapters_on_the_head_that_cannot_be_folded(tmp_path, lora, options, message):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["lm_head"], **lora)
    with pytest.raises(ValueError, match=message):
        build(tmp_path, arguments={"peft_config": config}, **options)


@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_dropout_that_is_asked_for_is_refused(tmp_path, loss):
    peft = pytest.importorskip("peft")
    trainer, config, data = LOSSES[loss]
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.1)
    options = {"disable_dropout": False}
    make = partial(tiny.build, trainer, config, tmp_path, data(4), None, peft_config=lora)
    with pytest.raises(ValueError, match=r"contradicts humanline: .*q_proj.lora_drop"):
        make(options)
    make(options | {"humanline": False})


@pytest.mark.parametrize(
    ("kind", "lora"),
    [
        ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [7]}}),
        ("tied", {"target_modules": ["q_proj"], "trainable_token_indices": [7]}),
        ("tied", {"target_modules": ["lm_head"], "trainable_token_indices": [7]}),
    ],
)
@pytest.mark.parametrize("reference", ["copy", "adapter", "lookahead"])
def test_single_rows_of_the_head_cannot_be_trained(tmp_path, kind, lora, reference):
    peft = pytest.importorskip("peft")
    arguments = {"peft_config": peft.LoraConfig(r=2, **lora)}
    policy = tiny.model(kind, path=tmp_path / "model")
    with pytest.raises(ValueError, match=r"trains single rows of the output head .*modules_to_sa"):
        build(tmp_path, policy=policy, arguments=arguments, reference=reference)


@pytest.mark.parametrize(
    ("kind", "lora"),
    [
        ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [7]}),
        (
            "tied",
            {
                "target_modules": ["q_proj"],
                "modules_to_save": ["embed_tokens", "lm_head"],
                "ensure_weight_tying": True,
            },
        ),
    ],
)
def test_what_that_refusal_advises_trains(tmp_path, kind, lora):
    peft = pytest.importorskip("peft")
    arguments = {"peft_config": peft.LoraConfig(r=2, **lora)}
    policy = tiny.model(kind, path=tmp_path / "model")
    trainer = build(tmp_path, policy=policy, arguments=arguments, max_steps=2)
    trainer.train()
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_a_tied_adapter_cannot_be_copied(tmp_path, target):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=[target], ensure_weight_tying=True)
    make = partial(build, tmp_path, arguments={"peft_config": config}, max_steps=2)
    policy = partial(tiny.model, "tied", path=tmp_path / "model")
    with pytest.raises(ValueError, match=r"ensure_weight_tying .*take .*reference=.adapter"):
        make(policy=policy(), reference="copy")
    make(policy=policy(), reference="adapter").train()


def test_without_humanline_trl_refuses_an_adapter_on_the_head_as_ever(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["lm_head"])
    build(tmp_path, arguments={"peft_config": config})
    with pytest.raises(ValueError, match="Applying a PEFT adapter to `lm_head` is not supported"):
        build(tmp_path, arguments={"peft_config": config}, humanline=False)


def test_gradient_checkpointing_and_bfloat16_autocast(tmp_path):
    """TRL's defaults, which the other tests switch off to be exact."""
    options = {"gradient_checkpointing": True, "bf16": True, "max_steps": 2}
    trainer = build(tmp_path, log_eps_P=-0.05, log_eps_R=0.05, **options)
    trainer.train()
    rows = trainer.state.log_history
    assert rows[0]["humanline/unclamped"] == 1 > rows[1]["humanline/unclamped"]
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
