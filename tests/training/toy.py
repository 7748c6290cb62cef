"""A tiny model with a tokenizer and a chat template, and a toy task for it."""

import json

import torch

CHAT_TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }} {{ m['content'] }} </s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant {% endif %}"
)
WORDS = [str(i) for i in range(20)] + ["+", "=", "a", "b", "c", "user", "assistant", "system"]


def make_model_folder(folder, chat_template=CHAT_TEMPLATE, dtype=torch.float32, **config):
    """Save a random Llama of 2 layers and a word-level tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocab = {w: i for i, w in enumerate(["<unk>", "<s>", "</s>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder)
    torch.manual_seed(7)
    config = {
        "vocab_size": len(vocab),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    } | config
    LlamaForCausalLM(LlamaConfig(**config)).to(dtype).save_pretrained(folder)
    return folder


def assistant(text):
    return [{"role": "assistant", "content": text}]


def toy_rows(n=24):
    """Sums of two digits: two right completions and two wrong ones each."""
    rows = []
    for i in range(n):
        a, b = i % 7, (i * 3) % 8
        right, wrong = str(a + b), str((a + b + 5) % 20)
        rows.append(
            {
                "prompt": [{"role": "user", "content": f"{a} + {b} ="}],
                "completions": [assistant(t) for t in (right, wrong, right, wrong)],
                "rewards": [1.0, 0.0, 1.0, 0.0],
                "answer": right,
            }
        )
    return rows


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def without_timing(output):
    """The rows of a run's metrics that must be the same on every run, as text."""
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [json.dumps({k: v for k, v in row.items() if k != "timing"}) for row in rows]
