"""HumanlineGRPOTrainer against TRL's own, against humanline.objectives, and without generation."""

from functools import partial

import datasets
import pytest
import torch
import trl_tiny as tiny
from torch.testing import assert_close
from trl import GRPOConfig, GRPOTrainer

import humanline as hl
from humanline.integrations.trl import (
    HumanlineGRPOConfig,
    HumanlineGRPOTrainer,
    apply_humanline,
)
from humanline.objectives.grpo import SHARES

EXACT = {"rtol": 0, "atol": 0}
CLIP = {"log_eps_P": -0.3, "log_eps_R": 0.2}
TEMPERATURE = 0.8
OPTIONS = {
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 4,
    "num_generations": 4,
    "max_completion_length": 6,
    "temperature": TEMPERATURE,
    "beta": 0.04,
}


def reward(completions, **_):
    """Anything that differs within a group."""
    return [float(sum(map(ord, str(completion))) % 7) for completion in completions]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("grpo")


def build(folder, data=None, cls=HumanlineGRPOTrainer, config=HumanlineGRPOConfig, **options):
    names = ("eval_dataset", "reward_funcs", "peft_config", "tools")
    arguments = {name: options.pop(name) for name in names if name in options}
    policy = options.pop("policy", None)
    data = tiny.groups() if data is None else data
    return tiny.build(cls, config, folder, data, policy, OPTIONS | options, **arguments)


def theirs(folder, **options):
    return build(folder, tiny.prompts(), GRPOTrainer, GRPOConfig, reward_funcs=reward, **options)


def ours_without(folder, **options):
    return build(folder, tiny.prompts(), humanline=False, reward_funcs=reward, **options)


@pytest.fixture(scope="module")
def on(folder):
    trainer = build(folder, **CLIP)
    trainer.current_gradient_accumulation_steps = 1
    tiny.disturb(trainer.model)
    return trainer


@pytest.fixture(scope="module")
def batch(on):
    on.model.train()
    return tiny.batch_of(on)


def eager(policy, batch):
    """Log-probs, mask and entropy of the completions, from the model's own logits."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    logits = policy(input_ids=ids, attention_mask=attention).logits[:, :-1]
    length = batch["completion_ids"].shape[1]
    logps = (logits[:, -length:] / TEMPERATURE).log_softmax(-1)
    picked = logps.gather(-1, batch["completion_ids"][..., None]).squeeze(-1)
    return picked, batch["completion_mask"].bool(), -(logps.exp() * logps).sum(-1)


def expected(policy, reference, batch, **options):
    logps, mask, entropy = eager(policy, batch)
    with torch.no_grad():
        ref_logps = eager(reference, batch)[0]
    options = {"beta": 0.04, "max_completion_length": 6, "perception": hl.Clip(**CLIP)} | options
    objective = hl.GRPO(**options)
    normaliser = {"num_items_in_batch": batch["num_items_in_batch"]}
    advantages = batch["advantages"]
    return objective.from_logps(
        logps, ref_logps, mask, advantages=advantages, entropy=entropy, **normaliser
    )


# humanline=False


@pytest.mark.parametrize("loss_type", sorted(SHARES))
def test_off_is_trl_bit_for_bit(folder, loss_type):
    options = {"loss_type": loss_type, "gradient_accumulation_steps": 2, "max_steps": 2}
    runs = []
    for make in (theirs, ours_without):  # each seeds its sampling when it is built
        trainer = make(folder, **options)
        trainer.train()
        runs.append((tiny.history(trainer, without=["step_time"]), tiny.weights(trainer)))
    assert runs[0][0] == runs[1][0]
    assert_close(runs[0][1], runs[1][1], **EXACT)


# humanline=True: one loss


CASES = [(loss_type, level) for loss_type in sorted(SHARES) for level in ("token", "sequence")]
CASES.remove(("vespo", "sequence"))  # it has sequence weights of its own


@pytest.mark.parametrize(("loss_type", "level"), CASES)
def test_loss_and_gradients_are_the_objective_s(on, batch, loss_type, level):
    on.loss_type, on.importance_sampling_level = loss_type, level
    options = {"loss_type": loss_type, "importance_sampling_level": level}
    metrics, stats = tiny.check_loss(
        on, batch, partial(expected, on.model, on.reference.model, **options)
    )
    assert stats.keys() - {"humanline/active_rows", "entropy"} <= metrics.keys()


def test_entropy_bonus_has_its_gradient(on, batch, monkeypatch):
    monkeypatch.setattr(on, "loss_type", "dapo")
    monkeypatch.setattr(on, "importance_sampling_level", "token")
    monkeypatch.setattr(on, "entropy_coef", 0.5)
    monkeypatch.setattr(on, "_entropy_bonus_enabled", True)
    loss, grads, _ = tiny.loss_and_gradients(on, batch)
    truth, _ = expected(on.model, on.reference.model, batch, loss_type="dapo", entropy_coef=0.5)
    truth.backward()
    assert_close(loss, truth.detach(), rtol=1e-5, atol=1e-6)
    assert_close(grads, tiny.gradients(on.model), rtol=1e-4, atol=2e-6)


def test_sampling_does_not_score_what_a_sync_makes_stale(on, batch):
    assert not {"old_per_token_logps", "ref_per_token_logps"} & batch.keys()


# Training


@pytest.mark.parametrize(("kind", "beta"), [("copy", 0.0), ("copy", 0.04), ("adapter", 0.04)])
def test_training_is_the_plain_loop(folder, kind, beta):
    """Accumulated with the token-weighted normaliser. With beta=0 TRL has no reference model."""
    options = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4, "sync_every": 2}
    options |= {"loss_type": "dapo", "max_grad_norm": 0.5, "max_steps": 5, "reference": kind}
    trainer = build(folder, beta=beta, **options, **CLIP)
    batches = tiny.recorded(trainer)
    trainer.train()
    loss_of = partial(expected, loss_type="dapo", beta=beta)
    policy, _, unclamped = tiny.plain_loop(batches, 2, 2, 0.5, loss_of)
    assert unclamped < 1
    assert_close(dict(policy.named_parameters()), tiny.weights(trainer), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reference", ["copy", "adapter"])
def test_resumed_run_goes_on_bit_for_bit(folder, tmp_path, reference):
    tiny.check_resuming(partial(build, folder, reference=reference, **CLIP), tmp_path, at=2)


def test_evaluation_perceives_too(folder):
    """Of a number of prompts that accelerate does not take for a part of its last batch."""
    trainer = build(folder, eval_dataset=tiny.groups(4, seed=5), **CLIP)
    models = trainer.model, trainer.reference.model
    tiny.check_evaluation(trainer, partial(expected, *models, loss_type="dapo"))


@pytest.mark.parametrize("where", tiny.LORA)
def test_lora(folder, where):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, **tiny.LORA[where])
    trainer = build(folder, peft_config=config, loss_type="dapo", **CLIP)
    trainer.current_gradient_accumulation_steps = 1
    batch, first = tiny.batch_of(trainer), tiny.as_it_is(trainer.model)
    tiny.disturb(trainer.model)

    def of(batch):
        return expected(trainer.model.eval(), first, batch, loss_type="dapo")

    tiny.check_loss(trainer, batch, of)


@pytest.mark.parametrize("beta", [0.04, 0.0])
def test_an_adapter_that_is_not_zero_begins_as_in_trl(folder, beta):
    """With the base where the KL penalty is to it; without one TRL has the policy's own alone."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, init_lora_weights=False, **tiny.LORA["lm_head"])
    trainer = build(folder, peft_config=config, beta=beta, log_eps_P=-1e-3, log_eps_R=1e-3)
    trainer.current_gradient_accumulation_steps = 1
    batch = tiny.batch_of(trainer)
    for synced in (False, True):
        unclamped = tiny.loss_and_gradients(trainer, batch)[2]["humanline/unclamped"][0]
        assert unclamped == 1 if synced or beta == 0 else unclamped < 0.5
        trainer.reference.before_step()


def one_by_one(policy, batch):
    """As ``eager``, each sequence by itself and without padding."""
    pairs = zip(batch["prompt_ids"], batch["prompt_mask"].bool(), strict=True)
    prompts = [ids[m] for ids, m in pairs]
    mask = batch["completion_mask"].bool()
    picked, entropy = torch.zeros(mask.shape), torch.zeros(mask.shape)
    for i, prompt in enumerate(prompts):
        completion = batch["completion_ids"][i][mask[i]]
        ids = torch.cat([prompt, completion])
        logits = policy(input_ids=ids[None]).logits[0, len(prompt) - 1 : -1]
        logps = (logits / TEMPERATURE).log_softmax(-1)
        n = len(completion)
        picked[i, :n] = logps.gather(-1, completion[:, None])[:, 0]
        entropy[i, :n] = -(logps.exp() * logps).sum(-1)
    return picked, mask, entropy


def test_padding_does_not_move_learned_positions(tmp_path, monkeypatch):
    """Prompts are padded on the left, and positions begin with their first token."""
    monkeypatch.setitem(globals(), "eager", one_by_one)
    policy = tiny.model("learned positions", path=tmp_path / "model")
    trainer = build(
        tmp_path, policy=policy, loss_type="dapo", per_device_train_batch_size=16, **CLIP
    )
    trainer.current_gradient_accumulation_steps = 1
    batch = tiny.batch_of(trainer)
    assert not batch["prompt_mask"].all()
    tiny.disturb(trainer.model)
    models = trainer.model, trainer.reference.model
    tiny.check_loss(trainer, batch, partial(expected, *models, loss_type="dapo"))


def test_apply_humanline_to_an_instance(folder, batch):
    options = {"loss_type": "dapo"}
    ours, applied = build(folder, **options, **CLIP), theirs(folder, **options)
    apply_humanline(applied, perception=hl.Clip(**CLIP))
    results = []
    for trainer in (ours, applied):
        trainer.current_gradient_accumulation_steps = 1
        tiny.disturb(trainer.model)
        results.append(tiny.loss_and_gradients(trainer, batch))
    assert_close(results[0][0], results[1][0], **EXACT)
    assert results[0][2]["humanline/unclamped"] == results[1][2]["humanline/unclamped"] != [1.0]


# Corrections for the sampler


def samples_as_vllm(trainer, monkeypatch, mode):
    """Completions and their log-probs come from a sampler that is not quite the policy."""
    generate = trainer._generate_single_turn
    generator = torch.Generator().manual_seed(0)

    def sampled(prompt_ids, *args, **kwargs):
        torch.manual_seed(0)
        ids, _ = generate(prompt_ids, *args, **kwargs)
        return ids, [(-3 * torch.rand(len(x), generator=generator)).tolist() for x in ids]

    monkeypatch.setattr(trainer, "_generate_single_turn", sampled)
    of_generation = trainer._generate_and_score_completions

    def with_vllm(inputs):  # TRL would ask it to generate
        trainer.use_vllm = True
        return of_generation(inputs)

    def generated(*args, **kwargs):
        trainer.use_vllm = False
        result = sampled(*args, **kwargs)
        trainer.use_vllm = True
        return result

    monkeypatch.setattr(trainer, "_generate_single_turn", generated)
    monkeypatch.setattr(trainer, "_generate_and_score_completions", with_vllm)
    monkeypatch.setattr(trainer, "vllm_importance_sampling_correction", True)
    monkeypatch.setattr(trainer, "vllm_importance_sampling_mode", mode)
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()


@pytest.mark.parametrize("kind", ["copy", "adapter"])
@pytest.mark.parametrize(
    ("mode", "loss_type"),
    [("sequence_mask", "dapo"), ("token_truncate", "dapo"), ("token_truncate", "vespo")],
)
def test_the_correction_from_vllm_is_trl_s(folder, monkeypatch, mode, loss_type, kind):
    """From the sampler to the policy at sampling, whatever the reference: without bounds, the
    policy at sampling for a reference, loss and gradients are TRL's."""
    bounds = {"log_eps_P": float("-inf"), "log_eps_R": float("inf")}
    results = []
    options = {"loss_type": loss_type, "beta": 0.0, "reward_funcs": reward}
    for trainer in (
        build(folder, tiny.prompts(), sync_every=0, reference=kind, **options, **bounds),
        build(folder, tiny.prompts(), GRPOTrainer, GRPOConfig, **options),
    ):
        samples_as_vllm(trainer, monkeypatch, mode)
        batch = tiny.batch_of(trainer)
        tiny.disturb(trainer.model)
        loss, grads, _ = tiny.loss_and_gradients(trainer, batch)
        results.append((batch["importance_sampling_ratio"], loss, grads))
    assert_close(results[0], results[1], rtol=1e-4, atol=2e-6)
    assert results[0][0].unique().numel() > 2


def test_the_correction_from_vllm_goes_with_a_synced_reference(folder, monkeypatch):
    """It multiplies a token's loss, of the perceived ratio."""
    options = {"loss_type": "dapo", "beta": 0.0, "reward_funcs": reward}
    trainer = build(folder, tiny.prompts(), **options, **CLIP)
    samples_as_vllm(trainer, monkeypatch, "token_truncate")
    tiny.disturb(trainer.model, seed=2)  # the policy at sampling is not the reference
    batch = tiny.batch_of(trainer)
    tiny.disturb(trainer.model)
    loss, grads, _ = tiny.loss_and_gradients(trainer, batch)
    logps, mask, _ = eager(trainer.model, batch)
    with torch.no_grad():
        ref_logps = eager(tiny.model(), batch)[0]  # it began as
    c = (logps - ref_logps).clamp(CLIP["log_eps_P"], CLIP["log_eps_R"])
    r, a = c.exp(), batch["advantages"][:, None]
    per_token = -torch.minimum(r * a, r.clamp(0.8, 1.2) * a) * batch["importance_sampling_ratio"]
    truth = (per_token * mask).sum() / batch["num_items_in_batch"]
    truth.backward()
    assert_close(loss, truth.detach(), rtol=1e-4, atol=1e-6)
    assert_close(grads, tiny.gradients(trainer.model), rtol=1e-4, atol=2e-6)


def test_an_off_policy_mask_is_of_the_drift_from_the_sampler(folder):
    """Where the reference is never synced it is TRL's: sampled once, trained on four times."""
    bounds = {"log_eps_P": float("-inf"), "log_eps_R": float("inf")}
    options = {"num_iterations": 4, "beta": 0.0, "loss_type": "dapo"}
    losses = []
    for threshold in (0.02, 1e9):
        options["off_policy_mask_threshold"] = threshold
        for trainer in (
            build(folder, tiny.prompts(), sync_every=0, reward_funcs=reward, **options, **bounds),
            theirs(folder, **options),
        ):
            trainer.current_gradient_accumulation_steps = 1
            trainer.model.train()
            torch.manual_seed(0)
            batch = tiny.batch_of(trainer)
            tiny.disturb(trainer.model)
            losses.append(tiny.loss_and_gradients(trainer, batch)[:2])
    assert_close(losses[0], losses[1], rtol=1e-4, atol=2e-6)
    assert_close(losses[2], losses[3], rtol=1e-4, atol=2e-6)
    assert abs(losses[0][0] - losses[2][0]) > 0.01


def test_trl_may_sync_a_reference_that_humanline_does_not(folder):
    """At its own times, and not into a model of the caller's."""
    options = {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 1.0}
    trainer = build(folder, sync_every=0, **options, **CLIP)
    trainer.train()
    assert_close(dict(trainer.reference.model.named_parameters()), tiny.weights(trainer), **EXACT)


# Dropout

NOISY = {
    "lora": {"target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.5},
    "whole": {},
}


def noisy(folder, name, make=build, **options):
    """A trainer of a model with dropout, in an adapter or its attention."""
    peft = pytest.importorskip("peft")
    made = tiny.model(path=folder / "model")
    if name == "lora":
        options["peft_config"] = peft.LoraConfig(r=4, init_lora_weights=False, **NOISY[name])
    else:
        for layer in made.model.layers:  # no module of its own: a number in the attention's
            layer.self_attn.attention_dropout = 0.5
    return make(folder, policy=made, beta=0.0, log_eps_P=-1e-4, log_eps_R=1e-4, **options)


def with_grpo_s_own_config(folder, log_eps_P, log_eps_R, **options):
    return build(folder, config=GRPOConfig, **options)


@pytest.mark.parametrize("make", [build, with_grpo_s_own_config])
@pytest.mark.parametrize("name", NOISY)
def test_dropout_is_not_taken_for_drift(folder, name, make):
    """At learning rate 0 the policy is its reference: no ratio leaves 1, whatever the bounds."""
    trainer = noisy(folder, name, make, learning_rate=0.0, max_steps=3)
    trainer.perception = hl.Clip(-1e-4, 1e-4)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert [row["humanline/unclamped"] for row in rows] == [1, 1, 1]
    assert [row["clip_ratio/region_mean"] for row in rows] == [0, 0, 0]


@pytest.mark.parametrize(("name", "module"), [("lora", "lora_dropout"), ("whole", "self_attn")])
def test_dropout_that_is_asked_for_is_refused(folder, name, module):
    with pytest.raises(ValueError, match=rf"dropout=False contradicts humanline: .*{module}.* and"):
        noisy(folder, name, disable_dropout=False)
    assert build(folder, disable_dropout=False).args.disable_dropout is False  # and there is none


def test_grpo_s_default_is_trl_s_without_humanline():
    assert not HumanlineGRPOConfig(use_cpu=True, humanline=False).disable_dropout
    assert HumanlineGRPOConfig(use_cpu=True).disable_dropout


# Without generation


@pytest.mark.parametrize("chat", [False, True])
def test_offline_batches_are_the_dataset_s(folder, chat):
    data = tiny.groups(chat=chat)
    trainer = build(folder, data, shuffle_dataset=False)
    trainer.model.train()
    batch = tiny.batch_of(trainer)
    tokens = trainer.processing_class
    rewards = torch.tensor([row["rewards"] for row in data.select(range(2))])
    advantages = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
    found = {}
    for i, mask in enumerate(batch["completion_mask"].bool()):
        ids = batch["completion_ids"][i][mask].tolist()
        prompt = batch["prompt_ids"][i][batch["prompt_mask"][i].bool()]
        found[tokens.decode(prompt), tokens.decode(ids)] = batch["advantages"][i].item()
    for row, values in zip(data.select(range(2)), advantages, strict=True):
        for completion, value in zip(row["completions"], values, strict=True):
            if chat:
                prompt = "<user> " + row["prompt"][0]["content"] + " <eos> <assistant>"
                words = completion[0]["content"].split()
            else:
                prompt, words = row["prompt"], completion.split()
            text = " ".join([*words, "<eos>"][: OPTIONS["max_completion_length"]])
            assert found[prompt, text] == pytest.approx(value.item(), abs=1e-5)
    assert batch["num_items_in_batch"] == batch["completion_mask"].sum()


def test_the_turns_of_others_are_read_and_not_trained_on(folder):
    """Of [assistant, user, assistant], and of a tool's result between two turns."""

    def say(role, words):
        return {"role": role, "content": words}

    groups = [
        [say("assistant", "w1 w2"), say("user", "w3"), say("assistant", "w4")],
        [say("assistant", "w5"), say("tool", "w6 w7"), say("assistant", "w8 w9")],
        [say("assistant", "w10")],
        [say("assistant", "w11 w12"), say("user", "w13")],
    ]
    columns = {"prompt": [[say("user", "w0")]], "completions": [groups]}
    data = datasets.Dataset.from_dict(columns | {"rewards": [[0.0, 1.0, 2.0, 4.0]]})
    options = {"per_device_train_batch_size": 4, "max_completion_length": 12, "loss_type": "dapo"}
    trainer = build(folder, data, max_steps=1, **options, **CLIP)
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    batch = tiny.batch_of(trainer)
    found = {}
    for ids, mask, written in zip(
        batch["completion_ids"], batch["completion_mask"], batch["tool_mask"], strict=True
    ):
        words = trainer.processing_class.convert_ids_to_tokens(ids[mask.bool()])
        kept = trainer.processing_class.convert_ids_to_tokens(ids[(mask * written).bool()])
        found[" ".join(words)] = " ".join(kept)
    assert found == {
        "w1 w2 <eos> <user> w3 <eos> <assistant> w4 <eos>": "w1 w2 <eos> w4 <eos>",
        "w5 <eos> <unk> w6 w7 <eos> <assistant> w8 w9 <eos>": "w5 <eos> w8 w9 <eos>",
        "w10 <eos>": "w10 <eos>",
        "w11 w12 <eos>": "w11 w12 <eos>",
    }
    assert batch["num_items_in_batch"] == 5 + 5 + 2 + 3
    tiny.disturb(trainer.model)

    def of(batch):
        """The objective's, of what was written alone."""
        logps, mask, entropy = eager(trainer.model, batch)
        with torch.no_grad():
            ref_logps = eager(trainer.reference.model, batch)[0]
        objective = hl.GRPO(beta=0.04, loss_type="dapo", perception=hl.Clip(**CLIP))
        names = ("advantages", "num_items_in_batch")
        return objective.from_logps(
            logps,
            ref_logps,
            mask & batch["tool_mask"].bool(),
            entropy=entropy,
            **{name: batch[name] for name in names},
        )

    tiny.check_loss(trainer, batch, of)


def test_a_tokenizer_that_appends_eos_does_not_end_the_prompt(folder, monkeypatch):
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny.tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", 1)]
    )
    monkeypatch.setattr(tiny, "tokenizer", lambda: tokenizer)
    trainer = build(folder)
    batch = tiny.batch_of(trainer)
    assert not (batch["prompt_ids"] == 1).any()
    assert ((batch["completion_ids"] == 1).sum(1) <= 1).all()


def test_offline_run_never_generates(folder, monkeypatch):
    trainer = build(folder, eval_dataset=tiny.groups(2, seed=5), **CLIP)
    monkeypatch.setattr(trainer.model, "generate", None)
    trainer.train()
    trainer.evaluate()
    assert "eval_humanline/unclamped" in trainer.state.log_history[-1]
    logged = [row["rewards/dataset_reward/mean"] for row in trainer.state.log_history[:4]]
    assert len(set(logged)) > 1


def test_offline_from_a_stream(folder):
    """In the order of the dataset: the stream is neither indexed nor counted."""
    data = tiny.groups()
    runs = []
    for source in (data, datasets.IterableDataset.from_generator(lambda: iter(data))):
        trainer = build(folder, source, shuffle_dataset=False, max_steps=3, **CLIP)
        trainer.train()
        runs.append(tiny.weights(trainer))
    assert_close(runs[1], runs[0], **EXACT)


def test_offline_without_humanline(folder):
    trainer = build(folder, humanline=False, max_steps=2)
    trainer.train()
    assert "humanline/unclamped" not in trainer.state.log_history[0]


@pytest.mark.parametrize(("every", "iterations"), [(1, 1), (3, 1), (2, 2)])
def test_generate_every(folder, every, iterations, monkeypatch):
    options = {"generate_every": every, "gradient_accumulation_steps": 2, "max_steps": 6}
    options["num_iterations"] = iterations
    trainer = build(folder, tiny.prompts(12), reward_funcs=reward, **options, **CLIP)
    at, generate = [], trainer.model.generate
    monkeypatch.setattr(
        trainer.model,
        "generate",
        lambda *args, **kwargs: at.append(trainer.state.global_step) or generate(*args, **kwargs),
    )
    trainer.train()
    assert at == list(range(0, 6, every))


# Bad input


def test_generate_every_contradicts(folder):
    with pytest.raises(ValueError, match="leave out steps_per_generation"):
        build(folder, generate_every=2, steps_per_generation=4)
    with pytest.raises(ValueError, match="positive multiple of num_iterations=2, got 3"):
        build(folder, generate_every=3, num_iterations=2)


def broken(**change):
    columns = tiny.groups(2).to_dict() | change
    return datasets.Dataset.from_dict({k: v for k, v in columns.items() if v is not None})


def test_offline_data_that_does_not_fit(folder):
    with pytest.raises(ValueError, match=r"train_dataset lacks rewards: .* first row is .*prompt"):
        build(folder, broken(rewards=None))
    with pytest.raises(ValueError, match=r"row 1: 4 completions and 3 rewards, .*generations=4"):
        build(folder, broken(rewards=[[1.0] * 4, [1.0] * 3]))
    with pytest.raises(ValueError, match=r"row 0: rewards must be finite numbers, got .*nan"):
        build(folder, broken(rewards=[[1.0, 2.0, float("nan"), 0.0], [1.0] * 4]))
    with pytest.raises(ValueError, match=r"eval_dataset lacks completions, rewards"):
        build(folder, eval_dataset=tiny.prompts())
    with pytest.raises(ValueError, match="nothing is generated: reward_funcs, generate_every"):
        build(folder, reward_funcs=reward, generate_every=2)


def test_a_missing_prompt_is_named_and_a_row_is_shown(folder):
    data = tiny.prompts().rename_column("prompt", "question")
    message = r"train_dataset lacks prompt: it needs prompt\. Its first row is \{'question': 'w"
    with pytest.raises(ValueError, match=message):
        build(folder, data, reward_funcs=reward)


def test_chats_need_a_template(folder, monkeypatch):
    plain = tiny.tokenizer(None)
    monkeypatch.setattr(tiny, "tokenizer", lambda: plain)
    with pytest.raises(ValueError, match=r"train_dataset holds chat messages, and .* has no chat"):
        build(folder, tiny.groups(chat=True))


def test_a_template_that_changes_the_prompt(folder, monkeypatch):
    changing = tiny.tokenizer("{% if add_generation_prompt %}<user> {% endif %}" + tiny.TEMPLATE)
    monkeypatch.setattr(tiny, "tokenizer", lambda: changing)
    trainer = build(folder, tiny.groups(chat=True))
    with pytest.raises(ValueError, match="not render the prompt as it does without"):
        trainer.train()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"off_policy_mask_threshold": 0.1}, "drift from the sampler"),
        ({"sync_ref_model": True}, "syncs after the optimizer step"),
        ({"reference": "lookahead"}, "makes its own"),
    ],
)
def test_contradictions_are_refused(folder, options, message):
    with pytest.raises(ValueError, match=message):
        build(folder, **options)


def test_bounds_that_never_act_are_warned_of(folder, caplog):
    build(folder, max_steps=20, learning_rate=1e-9).train()
    found = [r.getMessage() for r in caplog.records if "perception has not acted" in r.getMessage()]
    assert len(found) == 1 and "none of " in found[0]
