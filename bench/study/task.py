"""The noisy adder: a tiny language model that adds two numbers below 100, right half the time.

The prompt is ``ab+cd=``, the completion the three digits of the sum, the reward whether they are.
The base model is trained on labels of which half have one digit corrupted, so that it knows how to
add and answers with the labels' own uncertainty. The offline completions come from another model,
trained apart on noisier labels. There is one right answer, hence a model's Pass@1 is the mean
probability of it: a number without sampling noise.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import humanline as hl

DIGITS, PLUS, EQUALS, VOCABULARY = 10, 10, 11, 12
PROMPT, ANSWER = 6, 3  # tokens
HELD_OUT = 1000  # of the 10,000 prompts


class Adder(nn.Module):
    """A causal transformer on ``ab+cd=xy``; its logits ``[B, t, V]`` predict the answer's digits.

    Args:
        width: of the hidden states.
        layers: number of blocks, with 4 heads each.
    """

    def __init__(self, width: int, layers: int):
        super().__init__()
        self.token = nn.Embedding(VOCABULARY, width)
        self.position = nn.Embedding(PROMPT + ANSWER - 1, width)
        block = nn.TransformerEncoderLayer(
            width, 4, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(
            block, layers, norm=nn.LayerNorm(width), enable_nested_tensor=False
        )
        self.head = nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        length = ids.shape[1]
        x = self.token(ids) + self.position.weight[:length]
        causal = torch.ones(length, length, dtype=torch.bool).triu(1)
        x = self.blocks(x, mask=causal, is_causal=True)
        return self.head(x[:, PROMPT - 1 :])

    def logps(self, prompts: Tensor, answers: Tensor) -> Tensor:
        """Log-probs ``[B, 3]`` of the answers' digits."""
        return hl.token_logps(self(torch.cat([prompts, answers[:, :-1]], 1)), answers)


def prompt_ids(numbers: Tensor) -> Tensor:
    """``[B, 6]`` tokens of the prompts numbered ``100·a + b``."""
    a, b = numbers // 100, numbers % 100
    plus, equals = (torch.full_like(a, token) for token in (PLUS, EQUALS))
    return torch.stack([a // 10, a % 10, plus, b // 10, b % 10, equals], 1)


def right_answers(numbers: Tensor) -> Tensor:
    """``[B, 3]`` digits of ``a + b``."""
    total = numbers // 100 + numbers % 100
    return torch.stack([total // 100, total // 10 % 10, total % 10], 1)


def split(seed: int) -> tuple[Tensor, Tensor]:
    """Numbers of the prompts to train on, and of those held out."""
    order = torch.randperm(10_000, generator=torch.Generator().manual_seed(seed))
    return order[HELD_OUT:], order[:HELD_OUT]


def noisy_answers(numbers: Tensor, noise: float, generator: torch.Generator) -> Tensor:
    """The sums, of which a share ``noise`` has one digit replaced by another."""
    answers, batch = right_answers(numbers), len(numbers)
    where = torch.randint(ANSWER, (batch, 1), generator=generator)
    shift = torch.randint(1, DIGITS, (batch, 1), generator=generator)
    shift *= torch.rand(batch, 1, generator=generator) < noise
    return answers.scatter(1, where, (answers.gather(1, where) + shift) % DIGITS)


def pretrain(model: Adder, numbers: Tensor, seed: int, *, noise, steps, batch, lr) -> None:
    """Supervised training on noisy labels, drawn afresh at every step."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        chosen = numbers[torch.randint(len(numbers), (batch,), generator=generator)]
        answers = noisy_answers(chosen, noise, generator)
        loss = -model.logps(prompt_ids(chosen), answers).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def sample(model: Adder, prompts: Tensor, generator: torch.Generator) -> Tensor:
    """One completion ``[B, 3]`` of each prompt, at temperature 1."""
    ids = prompts
    for _ in range(ANSWER):
        probabilities = model(ids)[:, -1].softmax(-1)
        ids = torch.cat([ids, torch.multinomial(probabilities, 1, generator=generator)], 1)
    return ids[:, PROMPT:]


@torch.no_grad()
def accuracy(model: Adder, numbers: Tensor) -> tuple[float, float]:
    """Pass@1 at temperature 1 (exact) and accuracy of greedy answers."""
    prompts, answers = prompt_ids(numbers), right_answers(numbers)
    logits = model(torch.cat([prompts, answers[:, :-1]], 1))
    right = hl.token_logps(logits, answers).sum(1).exp()
    # Greedy decoding is right iff every digit is, given that those before it were.
    greedy = (logits.argmax(-1) == answers).all(1)
    return right.mean().item(), greedy.double().mean().item()


@dataclass(frozen=True)
class World:
    """What all arms of a seed share.

    Attributes:
        base: weights of the model that every arm starts from.
        prompts: numbers ``[P]`` of the prompts to train on, offline and online, in their order.
        pool: offline completions ``[P, G, 3]`` from the other model.
        held_out: numbers of the prompts to evaluate on; no model was trained on them.
    """

    base: dict[str, Tensor]
    prompts: Tensor
    pool: Tensor
    held_out: Tensor


def build_world(task: dict[str, Any], seed: int) -> World:
    """Train both models and draw the offline completions; a function of its arguments."""
    numbers, held_out = split(seed)
    models = {}
    for i, name in enumerate(("base", "behaviour")):
        torch.manual_seed(2 * seed + i)
        models[name] = Adder(task["width"], task["layers"])
        pretrain(models[name], numbers, 2 * seed + i, **task[name])
    prompts = numbers[: task["prompts"]]
    ids = prompt_ids(prompts).repeat_interleave(task["samples"], 0)
    pool = sample(models["behaviour"].eval(), ids, torch.Generator().manual_seed(seed))
    base = models["base"].state_dict()
    return World(base, prompts, pool.view(-1, task["samples"], ANSWER), held_out)


def load_world(task: dict[str, Any], seed: int, folder: Path) -> World:
    """The same, built at the first call and read from ``folder`` at later ones."""
    path = folder / f"world-{fingerprint(task)}-{seed}.pt"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        torch.save(vars(build_world(task, seed)), partial)
        partial.rename(path)
    return World(**torch.load(path))


def fingerprint(config: Any) -> str:
    """A short name of a configuration."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:10]
