"""What a model is worth on data it has not seen: answers, or preferences."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from humanline.training import report, score
from humanline.training.config import TrainConfig
from humanline.training.data import Question
from humanline.training.examples import Tokenizer, Tokens, make_batch
from humanline.training.model import device_of, moved
from humanline.training.ranks import ALONE, Ranks, Root

#: Of a model, what it is worth: a JSON object. ``before`` is what the untrained model got.
Measure = Callable[[Root, dict[str, Any] | None], dict[str, Any]]
T = TypeVar("T")

SAMPLES = 2  # answers that are shown, before and after
WATCHED = 8  # pairs that are scored again and again while the model trains


def answers(
    questions: list[Question],
    tokenizer: Tokenizer,
    config: TrainConfig,
    ranks: Ranks = ALONE,
) -> Measure:
    """Measures the accuracy of greedy answers."""
    prompts = [tokenizer.prompt(q.prompt, q.where) for q in questions]

    def measure(root: Root, before: dict[str, Any] | None = None) -> dict[str, Any]:
        from humanline.training.scoring import is_correct

        texts = generate(root, tokenizer, prompts, config, ranks)
        correct = [is_correct(t, q.answer) for t, q in zip(texts, questions, strict=True)]
        samples = [
            {"prompt": _asked(q), "answer": q.answer, "text": text}
            for q, text in list(zip(questions, texts, strict=True))[:SAMPLES]
        ]
        counted = proportion(sum(correct), len(correct))
        return {"measured": "greedy answers", **counted, "samples": samples}

    return measure


def _asked(question: Question) -> str:
    """What was asked last, as text."""
    prompt = question.prompt
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"])


@torch.no_grad()
def generate(
    root: Root,
    tokenizer: Tokenizer,
    prompts: list[list[int]],
    config: TrainConfig,
    ranks: Ranks = ALONE,
) -> list[str]:
    """Greedy completions, without special tokens."""
    pad, size = tokenizer.tokenizer.pad_token_id, config.per_device_eval_batch_size
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # little padding
    batches = [order[start : start + size] for start in range(0, len(order), size)]

    def answer(index: list[int]) -> list[str]:
        longest = max(len(prompts[i]) for i in index)
        padding = [longest - len(prompts[i]) for i in index]
        ids = [[pad] * p + prompts[i] for p, i in zip(padding, index, strict=True)]
        mask = [[0] * p + [1] * (longest - p) for p in padding]
        output = root(_greedy, ids, mask, tokenizer.tokenizer, config)
        return tokenizer.tokenizer.batch_decode(output[:, longest:], skip_special_tokens=True)

    texts = _over(batches, answer, "answering held-out questions", root, config, ranks)
    found = dict(zip(order, chain.from_iterable(texts), strict=True))
    return [found[i] for i in range(len(prompts))]


def _greedy(
    model: nn.Module, ids: list[list[int]], mask: list[list[int]], hf: Any, config: TrainConfig
) -> Tensor:
    """Prompts, padded on the left, with what the model writes next: int64 ``[S, T]``."""
    device = device_of(model)
    with torch.autocast(device.type, torch.bfloat16, enabled=config.bf16):
        return model.generate(
            input_ids=torch.tensor(ids, device=device),
            attention_mask=torch.tensor(mask, device=device),
            max_new_tokens=config.max_new_tokens,
            do_sample=False,
            use_cache=True,
            pad_token_id=hf.pad_token_id,
            eos_token_id=_ends(model, hf),
        )


def _over(
    batches: list[Any],
    work: Callable[[Any], T],
    what: str | None,
    root: Root,
    config: TrainConfig,
    ranks: Ranks,
) -> list[T]:
    """``work(batch)`` of each batch, the model in eval mode. Each rank does some of them; all of
    them where the model is split, whose forward waits for all ranks. ``what`` names the progress
    bar; None: there is none."""
    own = slice(None) if config.fsdp else slice(ranks.rank, None, ranks.count)
    done: dict[int, T] = {}
    total, training = sum(map(len, batches)), root.training
    root.eval()
    with report.counting(total, what, leave=False) if what else nullcontext() as bar:
        for i in range(len(batches))[own]:
            done[i] = work(batches[i])
            if bar is not None:
                bar.update(min(len(batches[i]) * (own.step or 1), total - bar.n))
    root.train(training)
    for part in ranks.gather(what or "scoring pairs", done):
        done |= part
    return [done[i] for i in range(len(batches))]


def _ends(model: nn.Module, hf) -> list[int]:
    """Tokens that end an answer: the tokenizer's, and those the model itself names."""
    own = model.generation_config.eos_token_id
    own = [] if own is None else own if isinstance(own, list) else [own]
    return list(dict.fromkeys([hf.eos_token_id, *own]))


def preferences(
    pairs: list[tuple[Tokens, Tokens]],
    pad: int,
    config: TrainConfig,
    ranks: Ranks = ALONE,
) -> Measure:
    """Measures how often the better completion is the likelier one; and, once trained, how often
    its implicit reward ``β·log(π/π_before)`` is the higher one, and by how much."""

    def measure(root: Root, before: dict[str, Any] | None = None) -> dict[str, Any]:
        what = "scoring held-out pairs"
        chosen, rejected = _pair_logps(root, pairs, pad, config, ranks, what)
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


def _pair_logps(
    root: Root,
    pairs: list[tuple[Tokens, Tokens]],
    pad: int,
    config: TrainConfig,
    ranks: Ranks,
    what: str | None = None,
) -> tuple[list[float], list[float]]:
    """Log-probs of the better and of the worse completions."""
    sequences, size = [s for pair in pairs for s in pair], config.per_device_eval_batch_size
    batches = [sequences[start : start + size] for start in range(0, len(sequences), size)]

    def logps(batch: list[Tokens]) -> list[float]:
        on_device = moved(make_batch(batch, pad), device_of(root))
        return root(score.sequence_logps, on_device, config.bf16).tolist()

    found = _over(batches, logps, what, root, config, ranks)
    flat = list(chain.from_iterable(found))
    return flat[::2], flat[1::2]


class SinceStart:
    """How much more a few pairs are preferred than by the model that training began with: by
    ``log(π/π_0)`` of the better completion less that of the worse one.

    Args:
        pairs: the first few are taken.
        of: what they are pairs of, in a word.
        pad, config, ranks: of the run.
    """

    def __init__(
        self,
        pairs: list[tuple[Tokens, Tokens]],
        of: str,
        pad: int,
        config: TrainConfig,
        ranks: Ranks = ALONE,
    ):
        self.pairs, self.of = pairs[:WATCHED], of
        self.how = pad, config, ranks

    def start(self, root: Root) -> dict[str, Any]:
        """Before the first step: what later scores are held against."""
        return {"of": self.of, "logps": _pair_logps(root, self.pairs, *self.how)}

    def now(self, root: Root, start: dict[str, Any]) -> dict[str, float]:
        """The mean over pairs, in nats, and the share of pairs where it is positive."""
        new, old = _pair_logps(root, self.pairs, *self.how), start["logps"]
        margins = [(c - c0) - (r - r0) for c, r, c0, r0 in zip(*new, *old, strict=True)]
        return {
            "since_start/margins": sum(margins) / len(margins),
            "since_start/accuracies": sum(m > 0 for m in margins) / len(margins),
        }


def is_due(done: int) -> bool:
    """Whether to look after so many steps: after 1, 2, 4, 8, …, ever more rarely, so that it costs
    next to nothing in a long run, and comes after the same steps in one that is made longer."""
    return done & (done - 1) == 0


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
