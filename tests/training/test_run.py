"""Whole runs on a tiny model: they learn, they write what they promise, they follow the rule."""

import contextlib
import copy
import json
import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from toy import assistant, make_model_folder, toy_rows, without_timing, write_jsonl

from humanline.training import data, examples, run, score
from humanline.training.config import OBJECTIVES, PERCEPTIONS, REFERENCES, TrainConfig
from humanline.training.errors import UserError
from humanline.training.model import load_model, load_tokenizer, parts

SMALL = {"vocab_size": 31, "num_hidden_layers": 2, "hidden_size": 32, "pad_token_id": 2}


def metrics(output):
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def mean(values):
    values = list(values)
    return sum(values) / len(values)


@pytest.mark.parametrize("perception", PERCEPTIONS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_with_every_perception_learns(objective, perception, options, tmp_path):
    options |= {"objective": objective, "perception": perception, "max_steps": 40, "seed": 3}
    options |= {"log_eps_P": -1.0, "log_eps_R": 1.0, "eval_limit": 8, "learning_rate": 3e-3}
    summary = run.train(options, tmp_path / "out")

    rows = metrics(tmp_path / "out")
    assert [row["step"] for row in rows] == list(range(40))

    def preferred(part):
        both = [row for row in part if {"logps/chosen", "logps/rejected"} <= row.keys()]
        return mean(row["logps/chosen"] - row["logps/rejected"] for row in both)

    assert preferred(rows[-10:]) > preferred(rows[:10]) + 1
    for row in rows:
        assert 0 <= row["humanline/unclamped"] <= 1
        assert 0 <= row["humanline/active_rows"] <= row["humanline/rows"]
        assert math.isfinite(row["loss"]) and row["timing"]["tokens_per_second"] > 0
    if perception == "none":
        assert all(row["humanline/unclamped"] == 1 for row in rows)
    assert summary["after"]["n"] == 8
    low, high = summary["after"]["interval95"]
    assert 0 <= low <= summary["after"]["accuracy"] <= high <= 1


def test_a_fixed_reference_lets_the_loss_fall(options, tmp_path):
    options |= {"perception": "none", "sync_every": 0, "max_steps": 40, "learning_rate": 3e-3}
    run.train(options, tmp_path / "out")
    rows = metrics(tmp_path / "out")
    assert rows[0]["loss"] == pytest.approx(math.log(2))
    assert rows[-1]["loss"] < 0.6
    assert rows[-1]["rewards/margins"] > 0.2 and rows[-1]["rewards/accuracies"] > 0.7


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_columns_are_left_out_of_the_gradient(objective, lora, options, tmp_path):
    options |= {"objective": objective, "eval_limit": 0, "lora": lora, "max_steps": 3}
    rows = {}
    for tolerance in (0.0, 0.3):
        run.train(options | {"gradient_tolerance": tolerance}, tmp_path / str(tolerance))
        rows[tolerance] = metrics(tmp_path / str(tolerance))
    assert all("humanline/kept_columns" not in row for row in rows[0.0])
    assert all(0 < row["humanline/kept_columns"] <= 1 for row in rows[0.3])
    assert any(row["humanline/kept_columns"] < 1 for row in rows[0.3])
    first, exact = rows[0.3][0], rows[0.0][0]
    assert first["loss"] == exact["loss"]
    assert first["grad_norm"] != exact["grad_norm"]
    assert first["grad_norm"] == pytest.approx(exact["grad_norm"], rel=0.3)


# The rule, written out


def plain_logps(model, batch, completions=None):
    """Log-probs [S, C], each sequence through the model by itself."""
    completions = completions or batch.completions
    result = torch.zeros(completions.ids.shape)
    for s, (ids, mask, which) in enumerate(
        zip(completions.ids, completions.mask, completions.prompt, strict=True)
    ):
        prompt = batch.prompt_ids[which][batch.prompt_mask[which]]
        own = ids[mask]
        whole = torch.cat([prompt, own])[None]
        logps = model(input_ids=whole).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        result = result.index_put(
            (torch.tensor(s), torch.arange(len(own))), logps.gather(1, own[:, None])[:, 0]
        )
    return result


def plain_loss(config, policy, reference, batch):
    d = plain_logps(policy, batch) - plain_logps(reference, batch).detach()
    c = d.clamp(config.log_eps_P, config.log_eps_R) if config.perception == "clip" else d
    if config.objective == "dpo":
        chosen, rejected = c.sum(1).chunk(2)
        return -F.logsigmoid(config.beta * (chosen - rejected)).mean()
    if config.objective == "kto":
        other = batch.mismatched
        kl = plain_logps(policy, batch, other) - plain_logps(reference, batch, other)
        kl = kl.detach()
        if config.perception == "clip":
            kl = kl.clamp(config.log_eps_P, config.log_eps_R)
        z0 = kl.sum(1).mean().clamp(min=0)
        gain = torch.where(batch.extra["desirable"], 1, -1) * (c.sum(1) - z0)
        return (1 - torch.sigmoid(config.beta * gain)).mean()
    advantages, ratio = batch.extra["advantages"][:, None], c.exp()
    clipped = ratio.clamp(1 - config.epsilon, 1 + config.epsilon)
    loss = -torch.minimum(advantages * ratio, advantages * clipped) * batch.completions.mask
    return (loss.sum(1) / batch.completions.mask.sum(1)).mean()


def plain_losses(config, after_the_step=False):
    """The losses of a training loop as short as it can be; or of one that syncs at the wrong
    moment."""
    tokenizer = load_tokenizer(Path(config.model))
    groups, _ = examples.make_units(data.read_examples(Path(config.data)), tokenizer, config)
    policy = load_model(Path(config.model), config, torch.device("cpu"))
    reference, losses = copy.deepcopy(policy), []
    optimizer = torch.optim.AdamW(policy.parameters(), weight_decay=0.0)
    for step, batches in enumerate(examples.optimizer_steps(groups, config, 2)):
        optimizer.zero_grad()
        total = sum(plain_loss(config, policy, reference, b) for b in batches) / len(batches)
        total.backward()
        losses.append(total.item())
        torch.nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm)
        sync = config.sync_every and step % config.sync_every == 0
        if sync and not after_the_step:
            reference = copy.deepcopy(policy)
        for group in optimizer.param_groups:
            group["lr"] = run.learning_rate(config, step)
        optimizer.step()
        if sync and after_the_step:
            reference = copy.deepcopy(policy)
    return losses


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("sync_every", [1, 3])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_loop_is_the_rule(objective, sync_every, accumulation, options, tmp_path):
    options |= {
        "objective": objective,
        "sync_every": sync_every,
        "gradient_accumulation_steps": accumulation,
        "log_eps_P": -0.3,
        "log_eps_R": 0.3,
        "eval_limit": 0,
    }
    run.train(options, tmp_path / "out")
    got = [row["loss"] for row in metrics(tmp_path / "out")]
    config = TrainConfig(**options)
    assert got == pytest.approx(plain_losses(config), rel=1e-4, abs=1e-6)
    # A reference taken after the step would show: the ratio would be 1 at every sync.
    wrong = plain_losses(config, after_the_step=True)
    assert max(abs(a - b) for a, b in zip(got, wrong, strict=True)) > 1e-4


@pytest.mark.parametrize("loss_type", ["dapo", "cispo"])
def test_accumulating_is_one_large_batch(loss_type, options, tmp_path):
    options |= {"objective": "grpo", "loss_type": loss_type, "perception": "none", "eval_limit": 0}
    for name, size, accumulation in (("one", 8, 1), ("two", 4, 2)):
        shape = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
        run.train(options | shape, tmp_path / name)
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    for a, b in zip(one, two, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4, abs=1e-6)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)


# What is written


def test_the_output_holds_what_is_promised(options, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "out"
    summary = run.train(options, out)
    assert json.loads((out / "summary.json").read_text()) == summary
    assert summary["versions"]["torch"] and summary["options"]["objective"] == "dpo"
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert not list(out.glob("checkpoint-*")) and not list(out.glob(".*"))
    assert AutoTokenizer.from_pretrained(out / "model").chat_template
    old = AutoModelForCausalLM.from_pretrained(options["model"])
    new = AutoModelForCausalLM.from_pretrained(out / "model")
    for a, b in zip(old.parameters(), new.parameters(), strict=True):
        assert not torch.equal(a, b)


def test_a_run_is_the_same_twice_and_another_seed_is_another_run(options, tmp_path):
    options |= {"perception": "rejection", "eval_limit": 0}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run.train(options | {"seed": seed}, tmp_path / name)
    a, b, c = (without_timing(tmp_path / name) for name in "abc")
    assert a == b and a != c


def test_measuring_does_not_change_the_run(options, tmp_path):
    options |= {"perception": "rejection"}
    run.train(options | {"eval_limit": 0}, tmp_path / "a")
    run.train(options | {"eval_limit": 3}, tmp_path / "b")
    rows = metrics(tmp_path / "b")
    assert any("since_start/margins" in row for row in rows)
    rest = [{n: x for n, x in row.items() if not n.startswith("since_start/")} for row in rows]
    for row in (*rest, *(plain := metrics(tmp_path / "a"))):
        del row["timing"]
    assert rest == plain


def test_data_without_answers_is_measured_by_preference(options, tmp_path):
    del options["heldout"]
    options |= {"max_steps": 30, "heldout_fraction": 0.25, "eval_limit": 10}
    summary = run.train(options, tmp_path / "out")
    reward = summary["after"]["by implicit reward"]
    assert 0 < summary["after"]["n"] <= 10
    assert reward["accuracy"] > 0.5 and reward["mean_margin"] > 0
    assert "logps" not in summary["after"]


# LoRA


def test_lora_trains_only_the_adapter(options, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    out = tmp_path / "out"
    # Larger weights than usual: with a frozen head of the usual size, logits stay small.
    folder = make_model_folder(tmp_path / "model", initializer_range=0.3)
    options |= {"model": str(folder), "lora": True, "learning_rate": 1e-2, "max_steps": 40}
    options |= {"lora_r": 4, "log_eps_P": -1.0, "log_eps_R": 1.0}
    summary = run.train(options, out)
    rows = metrics(out)
    preferred = [row["logps/chosen"] - row["logps/rejected"] for row in rows]
    assert mean(preferred[-8:]) > mean(preferred[:8]) + 0.5
    saved = json.loads((out / "adapter/adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == options["model"]
    assert summary["base_model"] == options["model"]
    base = AutoModelForCausalLM.from_pretrained(options["model"])
    model = PeftModel.from_pretrained(base, out / "adapter")
    assert any(p.abs().sum() > 0 for n, p in model.named_parameters() if "lora_B" in n)
    assert not (out / "model").exists()


def test_lora_leaves_the_base_alone(options):
    config = TrainConfig(**options, lora=True)
    model = load_model(Path(config.model), config, torch.device("cpu"))
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in n for n in trained)
    assert not any("lm_head" in n for n in trained)


def test_lora_on_the_head_is_refused(options, tmp_path):
    folder = make_model_folder(tmp_path / "model", tie_word_embeddings=False)
    options |= {"model": str(folder), "lora": True, "lora_target_modules": "q_proj,lm_head"}
    with pytest.raises(UserError, match=r"get_output_embeddings.*--lora-target-modules"):
        run.train(options, tmp_path / "out")


# Models


def test_gradient_checkpointing_and_bf16_run(options, tmp_path):
    options |= {"eval_limit": 0, "max_steps": 3}
    run.train(options, tmp_path / "plain")
    run.train(options | {"gradient_checkpointing": True}, tmp_path / "checkpointing")
    run.train(options | {"bf16": True}, tmp_path / "bf16")
    run.train(options | {"dtype": "bfloat16"}, tmp_path / "all-bf16")
    plain = [row["loss"] for row in metrics(tmp_path / "plain")]
    for name, tolerance in (("checkpointing", 1e-6), ("bf16", 0.02), ("all-bf16", 0.05)):
        assert [row["loss"] for row in metrics(tmp_path / name)] == pytest.approx(
            plain, abs=tolerance
        )


@pytest.mark.parametrize("kind", ["gemma2", "cohere", "granite", "gpt2"])
def test_what_other_models_do_to_their_logits_is_done(kind, options, tmp_path):
    attention = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64}
    configs = {
        "gemma2": lambda: transformers.Gemma2Config(
            **SMALL, **attention, head_dim=8, final_logit_softcapping=0.5
        ),
        "cohere": lambda: transformers.CohereConfig(**SMALL, **attention, logit_scale=0.25),
        "granite": lambda: transformers.GraniteConfig(**SMALL, **attention, logits_scaling=3.0),
        "gpt2": lambda: transformers.GPT2Config(
            vocab_size=31, n_layer=2, n_embd=32, n_head=4, pad_token_id=2
        ),
    }
    folder = make_model_folder(tmp_path / "model")
    model = transformers.AutoModelForCausalLM.from_config(configs[kind]())
    model.save_pretrained(folder)
    config = TrainConfig(**options | {"model": str(folder)})
    model = load_model(folder, config, torch.device("cpu"))  # compares the logits itself
    pairs = examples.pairs(data.read_examples(Path(options["data"])))
    tokens = load_tokenizer(folder).sequences([c for pair in pairs[:4] for c in pair])
    batch = examples.make_batch(tokens, 2)
    with torch.no_grad():
        logps = score.reference_scores(model, batch)["ref_logps"]
        torch.testing.assert_close(logps, plain_logps(model, batch), rtol=1e-4, atol=1e-5)


NOISY = {
    "falcon": lambda: transformers.FalconConfig(
        **SMALL, num_attention_heads=4, hidden_dropout=0.3, attention_dropout=0.3
    ),
    "bloom": lambda: transformers.BloomConfig(
        vocab_size=31, n_layer=2, hidden_size=32, n_head=4, hidden_dropout=0.3
    ),
    "opt": lambda: transformers.OPTConfig(
        **SMALL, num_attention_heads=4, ffn_dim=64, word_embed_proj_dim=32, dropout=0.3,
        layerdrop=0.4,
    ),
}  # fmt: skip


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", NOISY)
def test_no_dropout_is_taken_for_drift(kind, checkpointing, options, tmp_path):
    """At step 0 the policy is its reference: every ratio is 1, and no token is clamped."""
    torch.manual_seed(0)
    folder = make_model_folder(tmp_path / "model")
    transformers.AutoModelForCausalLM.from_config(NOISY[kind]()).save_pretrained(folder)
    options |= {"model": str(folder), "max_steps": 2, "eval_limit": 0, "log_eps_P": -1e-4}
    options |= {"log_eps_R": 1e-4, "gradient_checkpointing": checkpointing}
    run.train(options, tmp_path / "out")
    first = metrics(tmp_path / "out")[0]
    assert first["humanline/unclamped"] == 1
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)


def test_a_model_that_is_random_whatever_its_mode_is_refused(model_folder, options, monkeypatch):
    from transformers.models.llama.modeling_llama import LlamaMLP

    from humanline.training import model as module

    forward = LlamaMLP.forward
    model = load_model(model_folder, TrainConfig(**options), torch.device("cpu"))
    monkeypatch.setattr(
        LlamaMLP, "forward", lambda self, x: forward(self, x + 0.1 * torch.randn_like(x))
    )
    with pytest.raises(
        UserError, match=r"model\.layers\.0\.mlp, model\.layers\.1\.mlp draw random"
    ):
        module.switch_off_dropout(model, TrainConfig(**options))


def test_a_model_that_does_something_else_to_its_logits_is_refused(model_folder, options):
    from transformers import AutoModelForCausalLM

    from humanline.training import model as module

    model = AutoModelForCausalLM.from_pretrained(model_folder)
    head = model.lm_head
    head.register_forward_hook(lambda *args: args[-1] * 2)
    with pytest.raises(UserError, match="does more to its logits"):
        module.check_parts(model)


def test_a_model_without_a_separable_head_is_refused():
    with pytest.raises(UserError, match=r"get_decoder\(\).*get_output_embeddings\(\)"):
        parts(torch.nn.Linear(2, 2))


def test_completions_too_long_are_cut_and_prompts_too_long_dropped(options, tmp_path, capsys):
    rows = toy_rows(6)
    rows[0]["prompt"][0]["content"] = "1 " * 50
    rows[1]["completions"][0] = assistant("1 " * 50)
    options |= {"data": str(write_jsonl(tmp_path / "d.jsonl", rows)), "eval_limit": 0}
    options |= {"max_length": 20, "max_steps": 1, "max_bad_rows": 0.2}
    run.train(options, tmp_path / "out")
    err = capsys.readouterr().err
    assert "1 of 6 rows are empty or too long, and left out: " in err
    assert re.search(r"d\.jsonl, line 1: the prompt takes \d+ tokens of --max-length 20\n", err)
    assert "1 examples completion truncated" in err


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_bad_row_among_many_is_skipped_and_named(objective, options, tmp_path, capsys):
    rows = toy_rows(400)
    for i in (10, 20, 30, 40):
        rows[i]["completions"][0] = [assistant(""), []][i % 20 == 0]
    rows[50]["prompt"] = None
    options |= {"data": str(write_jsonl(tmp_path / "d.jsonl", rows)), "objective": objective}
    options |= {"max_steps": 1, "eval_limit": 0, "max_bad_rows": 5 / 400}
    run.train(options, tmp_path / "out")
    err = capsys.readouterr().err
    named = [f"{tmp_path}/d.jsonl, line {i}: completions[0] is empty" for i in (11, 21, 31)]
    assert f"5 of 400 rows are empty or too long, and left out: {'; '.join(named)}; …\n" in err
    del options["max_bad_rows"]
    expected = (
        r"5 of 400 rows are empty or too long, more than --max-bad-rows 0\.01 allows: .*line 11"
    )
    with pytest.raises(UserError, match=expected):
        run.train(options, tmp_path / "beyond")
    assert not (tmp_path / "beyond").exists()


def test_bad_rows_that_are_held_out_count(options, tmp_path, capsys):
    rows = toy_rows(24)
    for row in rows[:6]:
        row["prompt"][0]["content"] = "1 " * 50 + row["prompt"][0]["content"]
    del options["heldout"]
    options |= {"data": str(write_jsonl(tmp_path / "d.jsonl", rows)), "heldout_fraction": 0.5}
    run.train(options | {"max_length": 20, "max_bad_rows": 0.25, "max_steps": 1}, tmp_path / "out")
    assert "6 of 24 rows are empty or too long" in capsys.readouterr().err


def test_pairs_of_equals_are_warned_of(options, tmp_path, capsys):
    rows = [
        {"prompt": f"{i} +", "chosen": "2", "rejected": "2" if i < 3 else "3"} for i in range(10)
    ]
    options |= {"data": str(write_jsonl(tmp_path / "d.jsonl", rows)), "eval_limit": 0}
    for objective in OBJECTIVES:
        run.train(options | {"objective": objective, "max_steps": 1}, tmp_path / objective)
        err = capsys.readouterr().err
        assert err.count("in 3 of 10 pairs, chosen and rejected are the same") == 1


def test_groups_of_equal_rewards_are_warned_of(options, tmp_path, capsys):
    rows = toy_rows(10)
    for row in rows[:4]:
        row["rewards"] = [0.5] * 4
    options |= {"data": str(write_jsonl(tmp_path / "d.jsonl", rows)), "eval_limit": 0}
    expected = "4 of 10 groups are left out: the rewards of a prompt's completions are all equal"
    for objective in OBJECTIVES:
        run.train(options | {"objective": objective, "max_steps": 1}, tmp_path / objective)
        assert capsys.readouterr().err.count(expected) == 1
    run.train(
        options | {"objective": "kto", "reward_threshold": 0.4, "max_steps": 1}, tmp_path / "t"
    )
    assert expected not in capsys.readouterr().err


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_bounds_that_never_act_are_warned_of_once(objective, options, tmp_path, capsys):
    options |= {"objective": objective, "max_steps": 22, "eval_limit": 0, "learning_rate": 1e-6}
    run.train(options, tmp_path / "idle")
    err = capsys.readouterr().err
    tokens = sum(int(row["humanline/rows"]) for row in metrics(tmp_path / "idle")[:20])
    expected = f"in the first 20 steps none of {tokens} tokens had a log-ratio to the reference "
    assert err.count("warning") == 1 and err.count(expected) == 1
    assert "below -0.05 or above 0.05 nats" in err
    run.train(options | {"max_steps": 19}, tmp_path / "short")
    run.train(options | {"perception": "none"}, tmp_path / "none")
    run.train(options | {"learning_rate": 1e-3}, tmp_path / "acts")
    assert metrics(tmp_path / "acts")[0]["humanline/unclamped"] == 1  # and later less
    assert "warning" not in capsys.readouterr().err


def test_the_first_steps_of_a_resumed_run_are_those_before(options, tmp_path, capsys, monkeypatch):
    options |= {"max_steps": 24, "save_steps": 2, "eval_limit": 0, "learning_rate": 1e-6}
    finite = run._require_finite
    for stop, warnings in ((12, 0), (22, 1), (None, 0)):  # after how many steps it dies

        def dying(step, row, stop=stop):
            finite(step, row)
            if step == stop:
                raise KeyboardInterrupt

        monkeypatch.setattr(run, "_require_finite", dying)
        with contextlib.suppress(KeyboardInterrupt):
            resume = stop != 12
            run.train({} if resume else options, tmp_path / "out", resume=resume)
        assert capsys.readouterr().err.count("in the first 20 steps none of") == warnings
    assert (tmp_path / "out/summary.json").exists()


@pytest.mark.parametrize("perception", PERCEPTIONS)
def test_perception_without_a_reference_is_warned_of(perception, options, tmp_path, capsys):
    options |= {"loss_type": "sft", "perception": perception, "max_steps": 1, "eval_limit": 0}
    run.train(options, tmp_path / "out")
    expected = f"--perception {perception} does nothing: --loss-type sft has no reference"
    assert capsys.readouterr().err.count(expected) == (perception != "none")


def test_good_data_are_not_warned_of(options, tmp_path, capsys):
    for objective in OBJECTIVES:
        run.train(options | {"objective": objective, "max_steps": 1}, tmp_path / objective)
        assert "warning" not in capsys.readouterr().err


def test_a_prompt_goes_through_the_model_once(model_folder, options):
    """However many completions it has; with gradient checkpointing, once for each."""
    seen = []
    for checkpointing, expected in ((False, [(1, 4), (3, 1)]), (True, [(3, 5)])):
        config = TrainConfig(**options, gradient_checkpointing=checkpointing)
        model = load_model(model_folder, config, torch.device("cpu"))
        sequences = [examples.Tokens([3, 4, 5, 6], [c, 2]) for c in (7, 8, 9)]
        batch, policy = examples.make_batch(sequences, 2), parts(model)
        seen.clear()
        with torch.no_grad():
            model.model.register_forward_pre_hook(
                lambda module, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)),
                with_kwargs=True,
            )
            hidden = policy.hidden(policy.read_prompts(batch), batch.completions)
        assert seen == expected and hidden.shape[:2] == (3, 2)


def test_sharing_a_prompt_gives_the_same_gradients(model_folder, options):
    grads = []
    for checkpointing in (False, True):
        config = TrainConfig(**options, gradient_checkpointing=checkpointing)
        model = load_model(model_folder, config, torch.device("cpu"))
        sequences = [examples.Tokens(p, [c, 2]) for p in ([3, 4, 5, 6], [9]) for c in (7, 8)]
        batch, policy = examples.make_batch(sequences, 2), parts(model)
        policy.hidden(policy.read_prompts(batch), batch.completions).square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    for shared, apart in zip(*grads, strict=True):
        torch.testing.assert_close(shared, apart, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("lora", [False, True])
def test_the_kinds_of_reference_give_the_same_run(lora, options, tmp_path):
    options |= {"lora": lora, "sync_every": 2, "max_steps": 5, "eval_limit": 0}
    held = {}
    for kind in REFERENCES:
        summary = run.train(options | {"reference": kind}, tmp_path / kind)
        held[kind] = summary["reference_bytes"]
    runs = [without_timing(tmp_path / kind) for kind in REFERENCES]
    assert runs[0] == runs[1] == runs[2]
    assert held["lookahead"] < held["adapter"] == held["copy"]  # a frozen base is held once


def test_a_fixed_reference_cannot_be_looked_ahead_to(options, tmp_path):
    with pytest.raises(UserError, match="--sync-every must be positive with --reference lookahead"):
        run.train(options | {"reference": "lookahead", "sync_every": 0}, tmp_path / "out")


# What is refused or warned of before the first step


def test_float16_weights_need_lora_and_bfloat16_weights_are_warned_of(options, tmp_path, capsys):
    with pytest.raises(UserError, match=r"--dtype float16: .*underflow; use --bf16, or --lora"):
        TrainConfig(dtype="float16")
    TrainConfig(dtype="float16", lora=True)
    run.train(options | {"dtype": "bfloat16", "max_steps": 1, "eval_limit": 0}, tmp_path / "out")
    assert "round away; use --bf16" in capsys.readouterr().err


def test_lora_targets_may_have_spaces_and_must_be_there(options):
    config = TrainConfig(**options, lora=True, lora_target_modules="q_proj, self_attn.v_proj")
    model = load_model(Path(config.model), config, torch.device("cpu"))
    adapted = {n.split(".lora_")[0].rpartition(".")[2] for n, _ in model.named_parameters()}
    assert {"q_proj", "v_proj"} <= adapted and "k_proj" not in adapted
    config = TrainConfig(**options, lora=True, lora_target_modules="q_proj,magic")
    with pytest.raises(UserError, match="no module called 'magic'"):
        load_model(Path(config.model), config, torch.device("cpu"))


def test_labels_all_the_same_are_warned_of(options, tmp_path, capsys):
    options |= {"objective": "kto", "reward_threshold": 2.0, "max_steps": 1, "eval_limit": 0}
    run.train(options, tmp_path / "out")
    assert "warning: all labels are the same" in capsys.readouterr().err


def test_without_a_pair_to_hold_out_all_data_are_trained_on(model_folder, tmp_path):
    rows = [
        {"prompt": f"{i} +", "completion": "1", "reward": float(i > 0), "label": True}
        for i in range(10)
    ]
    config = TrainConfig(objective="kto", heldout_fraction=0.3)
    dataset = data.read_examples(write_jsonl(tmp_path / "d.jsonl", rows))
    work = run.prepare_data(dataset, None, load_tokenizer(model_folder), config)
    assert work.measure is None and sum(map(len, work.groups)) == 10


def test_a_tokenizer_with_more_tokens_than_the_model(options, tmp_path):
    options |= {"model": str(make_model_folder(tmp_path / "model", vocab_size=27))}
    with pytest.raises(UserError, match="token id 29, but the model has embeddings for 27 tokens"):
        run.train(options, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_sequences_longer_than_the_positions_a_model_learned(options, tmp_path):
    folder = make_model_folder(tmp_path / "model")
    small = {"vocab_size": 31, "n_layer": 1, "n_embd": 32, "n_head": 4, "pad_token_id": 2}
    config = transformers.GPT2Config(**small, n_positions=10)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    options |= {"model": str(folder), "max_steps": 1}
    with pytest.raises(UserError, match="the model has 10 positions; pass --max-length 10"):
        run.train(options, tmp_path / "out")
    with pytest.raises(UserError, match="10 positions; a held-out prompt of 9 tokens leaves"):
        run.train(options | {"max_length": 10}, tmp_path / "out")
    run.train(options | {"max_length": 10, "max_new_tokens": 1}, tmp_path / "out")


def test_a_default_run_is_saved_often():
    assert TrainConfig().save_steps <= TrainConfig().max_steps / 2
