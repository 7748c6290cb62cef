"""Padding-free batches give the numbers of padded ones, from fewer tokens."""

import json

import pytest
import torch
import transformers
from toy import assistant, make_model_folder, toy_rows, write_jsonl

from humanline.training import packing, run, score
from humanline.training.config import OBJECTIVES, TrainConfig
from humanline.training.errors import UserError
from humanline.training.examples import Tokens, make_batch
from humanline.training.model import load_model, parts

SMALL = {
    "vocab_size": 31,
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 2,
}
MODELS = {
    "llama": lambda: transformers.LlamaConfig(**SMALL),
    "mistral": lambda: transformers.MistralConfig(**SMALL, sliding_window=4),
    "qwen3": lambda: transformers.Qwen3Config(**SMALL, head_dim=8),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **SMALL,
        head_dim=8,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=31, n_layer=2, n_embd=32, n_head=4, pad_token_id=2
    ),
}

# Unequal lengths, shared prompts, one of a single token; longer than the sliding window.
SEQUENCES = [
    Tokens([3, 4, 5, 6, 7, 8], [9, 10, 11, 12, 13, 2]),
    Tokens([5], [6, 2]),
    Tokens([3, 4, 5, 6, 7, 8], [14, 2]),
    Tokens([5], [2]),
]


def test_a_pack_holds_each_prompt_once_and_no_padding():
    batch = make_batch(SEQUENCES, pad=2)
    pack = packing.Pack.of(batch, batch.completions)
    assert pack.ids.tolist() == [[3, 4, 5, 6, 7, 8, 5, 9, 10, 11, 12, 13, 6, 14]]
    assert pack.positions.tolist() == [[0, 1, 2, 3, 4, 5, 0, 6, 7, 8, 9, 10, 1, 6]]
    assert pack.labels.tolist() == [9, 10, 11, 12, 13, 2, 6, 2, 14, 2, 2]
    assert pack.predicting.tolist() == [5, 7, 8, 9, 10, 11, 6, 12, 5, 13, 6]
    assert pack.cu_seqlens.tolist() == [0, 6, 8, 10, 11]
    own = [(piece.own.start, piece.own.stop) for piece in pack.pieces]
    assert own == [(7, 12), (12, 13), (13, 14), (14, 14)]
    prompts = [(piece.prompt.start, piece.prompt.stop) for piece in pack.pieces]
    assert prompts == [(0, 6), (6, 7), (0, 6), (6, 7)]
    assert [piece.first for piece in pack.pieces] == [True, True, False, False]


def test_a_pack_asks_for_what_the_assistant_wrote():
    written = [True, False, False, True]
    batch = make_batch([Tokens([3], [4, 5, 6, 7], written), Tokens([3], [8])], pad=2)
    pack = packing.Pack.of(batch, batch.completions)
    assert pack.labels.tolist() == [4, -100, -100, 7, 8]
    assert pack.ids.tolist() == [[3, 4, 5, 6]] and pack.cu_seqlens.tolist() == [0, 4, 5]


@pytest.fixture(params=MODELS)
def folder(request, tmp_path):
    folder = make_model_folder(tmp_path / "model")
    torch.manual_seed(3)
    config = MODELS[request.param]()
    config.initializer_range = 0.2  # attention that is nearly uniform would hide a wrong mask
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def loaded(folder, **options):
    return load_model(folder, TrainConfig(model=str(folder), **options), torch.device("cpu"))


def logps_and_gradients(model):
    batch, policy = make_batch(SEQUENCES, pad=2), parts(model)
    rows = policy.rows(policy.read_prompts(batch), batch.completions)
    logps = score._logps(policy, rows)
    logps = logps[rows["labels"] != -100]
    (logps * torch.arange(1, len(logps) + 1)).sum().backward()
    return [logps.detach(), *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_is_padded(checkpointing, folder):
    padded = logps_and_gradients(loaded(folder))
    model = loaded(folder, padding_free=True, gradient_checkpointing=checkpointing)
    for a, b in zip(logps_and_gradients(model), padded, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))


def test_a_sliding_window_matters(tmp_path):
    """Or the test above could not tell whether it is kept to."""
    folder = make_model_folder(tmp_path / "model")
    torch.manual_seed(3)
    config = transformers.MistralConfig(**SMALL, sliding_window=4, initializer_range=0.2)
    transformers.MistralForCausalLM(config).save_pretrained(folder)
    model = loaded(folder, padding_free=True)
    narrow = logps_and_gradients(model)[0]
    model.config.sliding_window = None
    wide = logps_and_gradients(model)[0]
    assert (narrow[:6] - wide[:6]).abs().max() > 0.01
    assert torch.allclose(narrow[6:8], wide[6:8], atol=1e-5)  # shorter than the window


def test_generation_is_what_it_was(folder):
    ids = torch.tensor([[2, 2, 5, 6], [7, 8, 9, 10]])
    mask = (ids != 2).long()
    texts = []
    for padding_free in (False, True):
        model = loaded(folder, padding_free=padding_free).eval()
        options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": 30}
        texts.append(model.generate(ids, attention_mask=mask, **options))
    assert torch.equal(*texts)


# Whole runs


def rows_of(output):
    lines = (output / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return [{k: v for k, v in row.items() if k != "timing"} for row in rows]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_run_is_the_same(objective, checkpointing, options, tmp_path):
    options |= {"objective": objective, "log_eps_P": -0.3, "log_eps_R": 0.3}
    packed = {"padding_free": True, "gradient_checkpointing": checkpointing}
    padded = run.train(options, tmp_path / "padded")
    free = run.train(options | packed, tmp_path / "free")
    for a, b in zip(rows_of(tmp_path / "free"), rows_of(tmp_path / "padded"), strict=True):
        assert a == pytest.approx(b, rel=2e-3, abs=2e-5, nan_ok=True)
    assert free["before"] == padded["before"]
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "free/model")
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_several_turns_are_the_same_and_the_users_are_not_counted(objective, options, tmp_path):
    """A user's turn between two of the assistant's: another of as many tokens changes what is read,
    not what is trained on."""
    rows = toy_rows(8)
    for row in rows:
        between = {"role": "user", "content": "7 + 7 ="}
        row["completions"] = [[*c, between, *assistant("14")] for c in row["completions"]]
    options |= {"data": str(write_jsonl(tmp_path / "d.jsonl", rows)), "objective": objective}
    options |= {"max_steps": 2, "eval_limit": 0, "perception": "none"}
    if objective == "grpo":
        options |= {"loss_type": "dapo", "gradient_accumulation_steps": 2}
    runs = []
    for name, more in (("padded", {}), ("free", {"padding_free": True})):
        run.train(options | more, tmp_path / name)
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        runs.append([json.loads(line) for line in lines])
    sequences = 16 if objective == "grpo" else 8
    for a, b in zip(*runs, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3, abs=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=2e-3)
        assert a["humanline/rows"] == b["humanline/rows"] == 4 * sequences


def test_with_lora_and_measured_by_preference(options, tmp_path):
    del options["heldout"]
    options |= {"lora": True, "heldout_fraction": 0.25, "eval_limit": 10}
    padded = run.train(options, tmp_path / "padded")
    free = run.train(options | {"padding_free": True}, tmp_path / "free")
    margins = [s["after"]["by implicit reward"]["mean_margin"] for s in (free, padded)]
    assert margins[0] == pytest.approx(margins[1], rel=1e-3) and margins[0] != 0


@pytest.mark.parametrize(
    "change, message",
    [
        ({"layer_types": ["linear_attention"]}, "layers of type linear_attention"),
        ({"attn_logit_softcapping": 50.0}, "an attention that SDPA does not compute"),
    ],
)
def test_attention_that_cannot_be_taken_apart_is_refused(change, message, model_folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder)
    for name, value in change.items():
        object.__setattr__(model.config, name, value)
    with pytest.raises(UserError, match=f"--padding-free: LlamaForCausalLM has {message}; leave"):
        packing.enable(model)


def test_a_body_that_keeps_options_to_itself_is_refused(model_folder, monkeypatch):
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder)
    monkeypatch.setattr(model.model, "forward", lambda input_ids, position_ids: None)
    with pytest.raises(UserError, match="does not hand position_ids and other options on"):
        packing.enable(model)
