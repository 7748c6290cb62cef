"""Tiny random models, a tokenizer and data for TRL's trainers; nothing is fetched."""

import copy
import functools
import os
import random

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TQDM_DISABLE"] = "1"

import datasets
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.testing import assert_close
from transformers import (
    Cohere2Config,
    Cohere2ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from humanline.reference import REFERENCES

datasets.disable_progress_bars()

WORDS = [f"w{i}" for i in range(90)]
SPECIAL = ["<pad>", "<eos>", "<unk>", "<user>", "<assistant>"]
VOCAB = len(WORDS) + len(SPECIAL)
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} <eos> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


@functools.cache
def _backend() -> str:
    vocab = {word: i for i, word in enumerate(SPECIAL + WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer.to_str()


def tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_backend()),
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        chat_template=template,
        padding_side="left",
    )


SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 1,
}


class BiasedLlama(LlamaForCausalLM):
    """A Llama whose output head has a bias, as Phi's has."""

    def __init__(self, config):
        super().__init__(config)
        self.lm_head = torch.nn.Linear(config.hidden_size, config.vocab_size, bias=True)
        torch.nn.init.normal_(self.lm_head.bias)


MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "tied": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "softcap": lambda: Gemma2ForCausalLM(
        Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=2.0)
    ),
    "scale": lambda: Cohere2ForCausalLM(Cohere2Config(**SIZES, logit_scale=0.25)),
    "bias": lambda: BiasedLlama(LlamaConfig(**SIZES)),
    "learned positions": lambda: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCAB,
            n_positions=64,
            n_embd=16,
            n_layer=2,
            n_head=2,
            bos_token_id=1,
            eos_token_id=1,
        )
    ),
}


def model(kind: str = "llama", path=None):
    """A random model, with weights far enough from 0 that its predictions differ.

    Saved to ``path`` and marked as loaded from there: TRL loads its reference from that folder.
    """
    torch.manual_seed(0)
    made = MODELS[kind]()
    with torch.no_grad():
        for p in made.parameters():
            p.mul_(10 if p.dim() == 2 else 1)
    if path is not None:
        made.save_pretrained(path)
        made.config._name_or_path = str(path)
    return made


LORA = {
    "attention": {"target_modules": ["q_proj", "v_proj"]},
    "lm_head": {"target_modules": ["q_proj", "lm_head"]},
    "saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


def _text(rng: random.Random, low: int, high: int) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(low, high)))


def pairs(n: int = 12, seed: int = 0) -> datasets.Dataset:
    rng = random.Random(seed)
    columns = {"prompt": (2, 5), "chosen": (2, 8), "rejected": (2, 8)}
    return datasets.Dataset.from_list(
        [
            {
                name: (" " if name != "prompt" else "") + _text(rng, *span)
                for name, span in columns.items()
            }
            for _ in range(n)
        ]
    )


OPTIONS = {
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 2,
    "learning_rate": 1.0,
    "lr_scheduler_type": "constant",
    "optim": "sgd",
    "max_steps": 4,
    "logging_steps": 1,
    "save_strategy": "no",
}
TIMES = ("train_runtime", "train_samples_per_second", "train_steps_per_second")


def build(trainer, config, folder, data, policy=None, options=(), **arguments):
    """A trainer of TRL's or ours of a model in ``folder``, with quick options."""
    args = config(**({"output_dir": str(folder / "out")} | OPTIONS | dict(options)))
    return trainer(
        model(path=folder / "model") if policy is None else policy,
        args=args,
        train_dataset=data,
        processing_class=tokenizer(),
        **arguments,
    )


def disturb(policy, scale: float = 0.1, seed: int = 1) -> None:
    """Move the weights that train, so that the policy is no longer its reference."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in policy.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator), alpha=scale)


def as_it_is(policy):
    """What the policy computes with the weights it has now, whatever they become."""
    kept = {name: p.detach().clone() for name, p in policy.named_parameters()}
    return lambda **inputs: torch.func.functional_call(policy, kept, kwargs=inputs)


def batch_of(trainer) -> dict:
    """The first batch of training, on its way into the loss."""
    return trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))


def eager_logps(policy, input_ids, attention_mask, labels):
    """Aligned log-probs, mask and entropy from the model's own logits."""
    logits = policy(input_ids=input_ids, attention_mask=attention_mask).logits[:, :-1].float()
    logps, labels = logits.log_softmax(-1), labels[:, 1:]
    mask = labels != -100
    picked = logps.gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)
    return torch.where(mask, picked, 0), mask


def gradients(policy) -> dict[str, torch.Tensor]:
    found = {n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None}
    policy.zero_grad()
    return found


def loss_and_gradients(trainer, batch):
    """Loss, gradients and metrics of a batch, as a training step sees them."""
    policy = trainer.model
    policy.train()
    trainer._metrics["train"].clear()
    loss = trainer.compute_loss(policy, batch)
    loss.backward()
    return loss.detach(), gradients(policy), dict(trainer._metrics["train"])


def history(trainer, without=()) -> list[dict]:
    dropped = {*TIMES, *without}
    return [{k: v for k, v in row.items() if k not in dropped} for row in trainer.state.log_history]


def weights(trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def recorded(trainer) -> list[dict]:
    """Will hold the inputs of each loss that the trainer computes."""
    batches, compute_loss = [], trainer.compute_loss
    trainer.compute_loss = lambda policy, inputs, **rest: (
        batches.append(copy.deepcopy(inputs)) or compute_loss(policy, inputs, **rest)
    )
    return batches


def plain_loop(batches, accumulation, sync_every, clip, loss_of):
    """The rule: accumulate, clip gradients, sync before the step, step.

    ``loss_of(policy, reference, batch)`` gives a micro-batch's share of the loss, and statistics.
    Returns the policy after the last step, and each step's loss and least unclamped fraction.
    """
    policy = model()
    reference, losses, unclamped = copy.deepcopy(policy), [], []
    for step in range(len(batches) // accumulation):
        losses.append(0)
        for batch in batches[step * accumulation :][:accumulation]:
            loss, stats = loss_of(policy, reference, batch)
            loss.backward()
            losses[-1] += loss.item()
            unclamped.append(stats["humanline/unclamped"].item())
        torch.nn.utils.clip_grad_norm_(policy.parameters(), clip)
        if sync_every and step % sync_every == 0:
            reference.load_state_dict(policy.state_dict())
        with torch.no_grad():
            for p in policy.parameters():
                p.sub_(OPTIONS["learning_rate"] * p.grad)
                p.grad = None
    return policy, losses, min(unclamped)


def check_loss(trainer, batch, expected):
    """Loss, gradients and metrics of a batch, against ``expected(batch)``: loss and statistics.

    Returns the metrics and the statistics.
    """
    loss, grads, metrics = loss_and_gradients(trainer, batch)
    truth, stats = expected(batch)
    truth.backward()
    assert 0 < stats["humanline/unclamped"] < 1
    assert_close(loss, truth.detach(), rtol=1e-5, atol=1e-6)
    assert any(g.abs().max() > 1e-5 for g in grads.values())
    assert_close(grads, gradients(trainer.model), rtol=1e-4, atol=2e-6)
    for name, value in stats.items():
        if name in metrics:
            assert metrics[name] == [pytest.approx(value.item(), rel=1e-4, abs=1e-6)]
    return metrics, stats


def check_evaluation(trainer, expected) -> None:
    """Of a disturbed policy, an evaluation finds the mean over its batches of what
    ``expected(batch)`` gives: loss and statistics."""
    disturb(trainer.model)
    batches = recorded(trainer)
    metrics = trainer.evaluate()
    with torch.no_grad():
        results = [expected(batch) for batch in batches]
    losses, stats = zip(*results, strict=True)
    assert len(losses) > 1 and all(0 < s["humanline/unclamped"] < 1 for s in stats)
    assert metrics["eval_loss"] == pytest.approx(sum(losses).item() / len(losses), rel=1e-5)
    logged = trainer.state.log_history[-1]
    for name in ("humanline/unclamped", "kl"):
        mean = sum(s[name].item() for s in stats) / len(stats)
        assert logged[f"eval_{name}"] == pytest.approx(mean, rel=1e-4)


def check_kinds_agree(make) -> None:
    """Every kind of reference trains alike, bit for bit; ``make(reference=kind)`` builds."""
    runs = []
    for kind in REFERENCES:
        trainer = make(reference=kind)
        trainer.train()
        runs.append((history(trainer), weights(trainer)))
    for rows, trained in runs[1:]:
        assert rows == runs[0][0]
        torch.testing.assert_close(trained, runs[0][1], rtol=0, atol=0)


def check_resuming(make, output_dir, at: int) -> dict[str, torch.Tensor]:
    """A run resumed after ``at`` steps logs and ends as the whole one, bit for bit.

    ``make(**options)`` builds the trainer. Returns the final weights.
    """
    options = {"output_dir": str(output_dir), "save_strategy": "steps", "save_steps": at}
    runs = []
    for checkpoint in (None, f"{output_dir}/checkpoint-{at}"):
        trainer = make(**options)
        trainer.train(resume_from_checkpoint=checkpoint)
        # TRL counts tokens from 0 again, and the last row sums up the run.
        rows = history(trainer, without=["num_tokens", "step_time"])[:-1]
        runs.append((rows, weights(trainer)))
    assert runs[0][0] == runs[1][0]
    torch.testing.assert_close(runs[0][1], runs[1][1], rtol=0, atol=0)
    return runs[0][1]


def prompts(n: int = 6, chat: bool = False) -> datasets.Dataset:
    texts = [row["prompt"] for row in pairs(n)]
    if chat:
        texts = [[{"role": "user", "content": text}] for text in texts]
    return datasets.Dataset.from_dict({"prompt": texts})


def groups(n: int = 6, size: int = 4, seed: int = 0, chat: bool = False) -> datasets.Dataset:
    """Prompts, each with completions of different lengths and rewards."""
    rng = random.Random(seed)
    completions = [[_text(rng, 1, 7) for _ in range(size)] for _ in range(n)]
    if chat:
        completions = [[[{"role": "assistant", "content": c}] for c in row] for row in completions]
    else:
        completions = [[" " + c for c in row] for row in completions]
    rewards = [[rng.random() for _ in range(size)] for _ in range(n)]
    columns = {"completions": completions, "rewards": rewards}
    return datasets.Dataset.from_dict({"prompt": prompts(n, chat)["prompt"][:], **columns})


def labelled(n: int = 12, seed: int = 0) -> datasets.Dataset:
    """Prompts with a completion each, desirable or not."""
    rng = random.Random(seed)
    rows = [(row["prompt"], row["chosen"], rng.random() < 0.5) for row in pairs(n, seed)]
    names = ("prompt", "completion", "label")
    return datasets.Dataset.from_list([dict(zip(names, row, strict=True)) for row in rows])
