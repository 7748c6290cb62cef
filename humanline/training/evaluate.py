"""What a model is worth on data it has not seen: answers, or preferences."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from humanline.training import score
from humanline.training.config import TrainConfig
from humanline.training.data import Question
from humanline.training.examples import Tokenizer, Tokens, make_batch
from humanline.training.model import device_of, moved

#: Of a model, what it is worth: a JSON object. ``before`` is what the untrained model got.
Measure = Callable[[nn.Module, dict[str, Any] | None], dict[str, Any]]


def answers(questions: list[Question], tokenizer: Tokenizer, config: TrainConfig) -> Measure:
    """Measures the accuracy of greedy answers."""
    prompts = [tokenizer.prompt(q.prompt, q.where) for q in questions]

    def measure(model: nn.Module, before: dict[str, Any] | None = None) -> dict[str, Any]:
        from humanline.training.scoring import is_correct

        texts = generate(model, tokenizer, prompts, config)
        correct = [is_correct(t, q.answer) for t, q in zip(texts, questions, strict=True)]
        return {"measured": "greedy answers", **proportion(sum(correct), len(correct))}

    return measure


@torch.no_grad()
def generate(
    model: nn.Module, tokenizer: Tokenizer, prompts: list[list[int]], config: TrainConfig
) -> list[str]:
    """Greedy completions, without special tokens."""
    hf, device, size = tokenizer.tokenizer, device_of(model), config.per_device_eval_batch_size
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # little padding
    texts = [""] * len(prompts)
    training = model.training
    model.eval()
    with tqdm(total=len(prompts), desc="answering", unit="prompt", leave=False) as bar:
        for start in range(0, len(order), size):
            index = order[start : start + size]
            longest = max(len(prompts[i]) for i in index)
            padding = [longest - len(prompts[i]) for i in index]
            ids = [[hf.pad_token_id] * p + prompts[i] for p, i in zip(padding, index, strict=True)]
            mask = [[0] * p + [1] * (longest - p) for p in padding]
            with torch.autocast(device.type, torch.bfloat16, enabled=config.bf16):
                output = model.generate(
                    input_ids=torch.tensor(ids, device=device),
                    attention_mask=torch.tensor(mask, device=device),
                    max_new_tokens=config.max_new_tokens,
                    do_sample=False,
                    use_cache=True,
                    pad_token_id=hf.pad_token_id,
                    eos_token_id=_ends(model, hf),
                )
            new = hf.batch_decode(output[:, longest:], skip_special_tokens=True)
            for i, text in zip(index, new, strict=True):
                texts[i] = text
            bar.update(len(index))
    model.train(training)
    return texts


def _ends(model: nn.Module, hf) -> list[int]:
    """Tokens that end an answer: the tokenizer's, and those the model itself names."""
    own = model.generation_config.eos_token_id
    own = [] if own is None else own if isinstance(own, list) else [own]
    return list(dict.fromkeys([hf.eos_token_id, *own]))


def preferences(pairs: list[tuple[Tokens, Tokens]], pad: int, config: TrainConfig) -> Measure:
    """Measures how often the better completion is the likelier one; and, once trained, how often
    its implicit reward ``β·log(π/π_before)`` is the higher one, and by how much."""

    def measure(model: nn.Module, before: dict[str, Any] | None = None) -> dict[str, Any]:
        chosen, rejected = _pair_logps(model, pairs, pad, config)
        likelier = sum(c > r for c, r in zip(chosen, rejected, strict=True))
        result = {
            "measured": "preferences by log-prob",
            **proportion(likelier, len(pairs)),
            "logps": {"chosen": chosen, "rejected": rejected},
        }
        if before is not None:
            old = zip(before["logps"]["chosen"], before["logps"]["rejected"], strict=True)
            scale = config.beta or 1.0
            margins = [
                scale * ((c - c0) - (r - r0))
                for c, r, (c0, r0) in zip(chosen, rejected, old, strict=True)
            ]
            result["by implicit reward"] = {
                **proportion(sum(m > 0 for m in margins), len(margins)),
                "mean_margin": sum(margins) / len(margins),
            }
        return result

    return measure


def _pair_logps(model, pairs, pad, config) -> tuple[list[float], list[float]]:
    sequences = [s for pair in pairs for s in pair]
    sums: list[float] = []
    training = model.training
    model.eval()
    size = config.per_device_eval_batch_size
    for start in tqdm(range(0, len(sequences), size), desc="scoring pairs", leave=False):
        batch = moved(make_batch(sequences[start : start + size], pad), device_of(model))
        sums += score.sequence_logps(model, batch, config.bf16).tolist()
    model.train(training)
    return sums[::2], sums[1::2]


def proportion(successes: int, n: int) -> dict[str, Any]:
    """A share, with Wilson's 95 % interval."""
    low, high = wilson(successes, n)
    return {
        "n": n,
        "correct": successes,
        "accuracy": successes / n,
        "interval95": [round(low, 4), round(high, 4)],
    }


def wilson(successes: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval of a binomial proportion."""
    share, spread = successes / n, z * z / n
    centre = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / n + spread / (4 * n))
    return max(0.0, centre - half), min(1.0, centre + half)
