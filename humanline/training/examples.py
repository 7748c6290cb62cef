"""From examples to batches: pairing and grouping, tokenizing, order, collation.

What each objective makes of each kind of data:

- DPO. Pairs: as they are. Rewards and labels: a prompt's best completion with its worst, the second
  best with the second worst, and so on while the rewards differ.
- KTO. Labels: as they are. Pairs: chosen True, rejected False. Rewards: True above the prompt's
  mean, or above a threshold, False otherwise.
- GRPO. Rewards: groups. Labels: a prompt's completions, with rewards 1 and 0. Pairs: groups of two,
  with rewards 1 and 0.

Rows of single completions with the same prompt make one group. Groups of which nothing can be
learned (one completion, or all rewards equal) are left out.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import chain, count
from typing import Any

import torch
from torch import Tensor

from humanline.advantages import group_advantages
from humanline.rows import IGNORE_INDEX
from humanline.training.config import TrainConfig
from humanline.training.data import Dataset, Example, Text
from humanline.training.errors import UserError


@dataclass(frozen=True)
class Tokens:
    """A prompt and a completion of it."""

    prompt: list[int]
    completion: list[int]


@dataclass(frozen=True)
class Unit:
    """What a batch is counted in: a pair, a labelled completion, or one with its advantage.

    Attributes:
        sequences: chosen and rejected, or a single one.
        value: the label (True, False) or the advantage; None for a pair.
    """

    sequences: tuple[Tokens, ...]
    value: float | bool | None = None


@dataclass(frozen=True)
class Completions:
    """Completions of a batch's prompts, padded on the right.

    Attributes:
        ids: int64 ``[S, C]``.
        mask: bool ``[S, C]``, where there is a token.
        prompt: int64 ``[S]``, the index of each one's prompt.
    """

    ids: Tensor
    mask: Tensor
    prompt: Tensor

    @property
    def labels(self) -> Tensor:
        """``ids``, with -100 where there is no token."""
        return self.ids.masked_fill(~self.mask, IGNORE_INDEX)


@dataclass(frozen=True)
class Batch:
    """Prompts, each held once however many completions it has, and completions.

    Attributes:
        prompt_ids: int64 ``[P, T]``, padded on the left.
        prompt_mask: bool ``[P, T]``, where there is a token.
        completions: the sequences of the loss.
        extra: the objective's own batch arguments.
        mismatched: for KTO: each prompt with the completion of the next sequence.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    completions: Completions
    extra: dict[str, Any] = field(default_factory=dict)
    mismatched: Completions | None = None

    def tokens(self) -> int:
        """Tokens that go through the model, padding left out."""
        masks = [self.prompt_mask, self.completions.mask]
        masks += [] if self.mismatched is None else [self.mismatched.mask]
        return int(sum(mask.sum() for mask in masks))


# Pairing and grouping: lists of (example, index of completion)

Chosen = tuple[Example, int]


def pairs(dataset: Dataset) -> list[tuple[Chosen, Chosen]]:
    """Chosen and rejected completions. No completion is used twice."""
    return list(chain.from_iterable(map(_pairs_of_group, grouped(dataset))))


def _pairs_of_group(group: list[Chosen]) -> Iterator[tuple[Chosen, Chosen]]:
    ranked = sorted(group, key=_reward_of, reverse=True)
    for better, worse in zip(ranked[: len(ranked) // 2], reversed(ranked), strict=False):
        if _reward_of(better) > _reward_of(worse):
            yield better, worse


def labelled(dataset: Dataset, threshold: float | None) -> list[tuple[Chosen, bool]]:
    """Completions, each desirable or not."""
    if dataset.kind == "rewards" and threshold is None:
        informative = [g for g in grouped(dataset) if len({_reward_of(c) for c in g}) > 1]
        return [(c, _reward_of(c) > _mean_reward(g)) for g in informative for c in g]
    threshold = 0.5 if dataset.kind != "rewards" else threshold
    return [(c, _reward_of(c) > threshold) for g in grouped(dataset) for c in g]


def advantages(dataset: Dataset) -> list[list[tuple[Chosen, float]]]:
    """Groups of completions with their advantage over the others of their group."""
    result = []
    for group in grouped(dataset):
        rewards = torch.tensor([_reward_of(c) for c in group], dtype=torch.float64)
        normalised = group_advantages(rewards, torch.zeros(len(group), dtype=torch.int64))
        if normalised.any():
            result.append(list(zip(group, normalised.tolist(), strict=True)))
    return result


def grouped(dataset: Dataset) -> list[list[Chosen]]:
    """The completions of each prompt that may be compared with one another."""
    groups: dict[Any, list[Chosen]] = {}
    for i, example in enumerate(dataset.examples):
        # Pairs and groups were rated together; only single completions have to be brought together.
        together = len(example.completions) > 1
        key = i if together else _prompt_key(example)
        groups.setdefault(key, []).extend((example, j) for j in range(len(example.completions)))
    return list(groups.values())


def _reward_of(chosen: Chosen) -> float:
    example, index = chosen
    return example.rewards[index]


def _mean_reward(group: list[Chosen]) -> float:
    return sum(map(_reward_of, group)) / len(group)


# Holding out


def split(dataset: Dataset, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    """Training and held-out data, by prompt: no prompt is in both."""
    prompts = list(dict.fromkeys(map(_prompt_key, dataset.examples)))
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed)).tolist()
    out = {prompts[i] for i in order[: int(len(prompts) * fraction)]}
    kept = [e for e in dataset.examples if _prompt_key(e) not in out]
    held = [e for e in dataset.examples if _prompt_key(e) in out]
    return Dataset(dataset.kind, kept), Dataset(dataset.kind, held)


def heldout_pairs(
    dataset: Dataset, tokenizer: "Tokenizer", config: TrainConfig
) -> list[tuple[Tokens, Tokens]]:
    """Pairs to measure preferences on. Where no prompt has two completions to compare, desirable
    completions are set against undesirable ones of other prompts."""
    found = pairs(dataset)
    if not found and dataset.examples:
        labels = labelled(dataset, config.reward_threshold)
        found = list(zip(*([c for c, l in labels if l is w] for w in (True, False)), strict=False))
    tokens = iter(tokenizer.sequences([c for pair in found for c in pair]))
    fitting = []
    for pair in [(next(tokens), next(tokens)) for _ in found]:
        if all(len(s.prompt) < config.max_length for s in pair):
            fitting.append(tuple(_truncate(s, config.max_length) for s in pair))
    return fitting


def _prompt_key(example: Example) -> str:
    return json.dumps(example.prompt, sort_keys=True)


# Tokenizing


class Tokenizer:
    """Prompts and completions as token ids, strings and chats alike, as TRL does it.

    Strings: the eos token is appended to the completion. Chats: the chat template is applied; what
    it puts after the completion's eos token is left out, since no model ever generates it.

    Args:
        tokenizer: one of transformers'.
        folder: where it came from, for messages.

    Attributes:
        largest_id, longest, longest_prompt: of all that was tokenized so far; the last is that of
            prompts to generate from.
    """

    def __init__(self, tokenizer: Any, folder: Any):
        if tokenizer.eos_token_id is None:
            raise UserError(f"the tokenizer in {folder} has no eos token")
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        self.tokenizer, self.folder = tokenizer, folder
        self.largest_id, self.longest, self.longest_prompt = tokenizer.pad_token_id, 0, 0

    def prompt(self, prompt: Text, where: str) -> list[int]:
        """Token ids of a prompt to generate from."""
        ids = self._ids([self._prompt_text(prompt, where)], not isinstance(prompt, str))[0]
        self.longest_prompt = max(self.longest_prompt, len(ids))
        return ids

    def sequences(self, chosen: list[Chosen]) -> list[Tokens]:
        """Token ids of prompts with one of their completions each."""
        if not chosen:
            return []
        chat = not isinstance(chosen[0][0].prompt, str)
        prompts, completions = [], []
        for example, index in chosen:
            prompts.append(self._prompt_text(example.prompt, example.where))
            completions.append(self._completion_text(example, index, prompts[-1]))
        prompt_ids = self._ids(prompts, chat)
        whole_ids = self._ids([p + c for p, c in zip(prompts, completions, strict=True)], chat)
        result = []
        for prompt, whole, text in zip(prompt_ids, whole_ids, completions, strict=True):
            if whole[: len(prompt)] == prompt:
                completion = whole[len(prompt) :]
            else:  # a token across the border, which no model would generate after this prompt
                completion = self._ids([text], True)[0]
            result.append(Tokens(prompt, completion))
            self.longest = max(self.longest, len(prompt) + len(completion))
        return result

    def _prompt_text(self, prompt: Text, where: str) -> str:
        return prompt if isinstance(prompt, str) else self._chat(prompt, where, True)

    def _completion_text(self, example: Example, index: int, prompt_text: str) -> str:
        prompt, completion, where = example.prompt, example.completions[index], example.where
        eos = self.tokenizer.eos_token
        if isinstance(prompt, str):
            return completion if completion.endswith(eos) else completion + eos
        whole = self._chat(prompt + completion, where, False)
        if not whole.startswith(prompt_text):
            raise UserError(
                f"{where}: with its completion, the chat template of {self.folder} does not "
                "render the prompt as it does without: prompt and completion cannot be told apart"
            )
        text, end, rest = whole[len(prompt_text) :].rpartition(eos)
        return text + end if end and not rest.strip() else text + end + rest

    def _chat(self, messages: list[dict[str, str]], where: str, add_generation_prompt: bool) -> str:
        if not self.tokenizer.chat_template:
            raise UserError(
                f"{where}: chat messages, but the tokenizer in {self.folder} has no chat template"
            )
        try:
            return self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except Exception as error:  # templates raise what they like
            raise UserError(f"{where}: the chat template refuses this: {error}") from error

    def _ids(self, texts: list[str], chat: bool) -> list[list[int]]:
        # A chat template writes the special tokens itself.
        rows = self.tokenizer(texts, add_special_tokens=not chat)["input_ids"]
        self.largest_id = max(self.largest_id, *(max(row, default=0) for row in rows))
        return rows


# Units


def make_units(
    dataset: Dataset, tokenizer: Tokenizer, config: TrainConfig
) -> tuple[list[list[Unit]], dict[str, int]]:
    """Units in groups that stay together in a batch, and counts of what was left out.

    Raises:
        UserError: the data holds nothing that the objective can learn from.
    """
    if config.objective == "dpo":
        raw = [[(pair, None)] for pair in pairs(dataset)]
    elif config.objective == "kto":
        raw = [[((c,), label)] for c, label in labelled(dataset, config.reward_threshold)]
    else:
        raw = [[((c,), a) for c, a in group] for group in advantages(dataset)]
    if not raw:
        raise UserError(_nothing_to_learn(dataset, config))
    flat = [c for group in raw for chosen, _ in group for c in chosen]
    tokens = iter(tokenizer.sequences(flat))
    groups, dropped, truncated = [], 0, 0
    for group in raw:
        units = []
        for chosen, value in group:
            sequences = tuple(next(tokens) for _ in chosen)
            if any(len(s.prompt) >= config.max_length for s in sequences):
                dropped += 1
                continue
            fitting = tuple(_truncate(s, config.max_length) for s in sequences)
            truncated += fitting != sequences
            units.append(Unit(fitting, value))
        if units:
            groups.append(units)
    if not groups:
        raise UserError(
            f"none of the {dropped} examples is left: every prompt takes --max-length "
            f"{config.max_length} tokens or more"
        )
    return groups, {"too long, dropped": dropped, "completion truncated": truncated}


def _truncate(sequence: Tokens, max_length: int) -> Tokens:
    return Tokens(sequence.prompt, sequence.completion[: max_length - len(sequence.prompt)])


def _nothing_to_learn(dataset: Dataset, config: TrainConfig) -> str:
    wanted = {
        "dpo": "prompts with a better and a worse completion",
        "kto": "completions above and below their prompt's mean reward (or --reward-threshold)",
        "grpo": "prompts with several completions whose rewards differ",
    }[config.objective]
    return (
        f"{len(dataset.examples)} examples ({dataset.kind}) hold nothing {config.objective} can "
        f"learn from: it needs {wanted}"
    )


# Batches


def optimizer_steps(
    groups: list[list[Unit]], config: TrainConfig, pad: int, first: int = 0
) -> Iterator[list[Batch]]:
    """The micro-batches of each step from ``first`` on: a function of seed and step alone."""
    total = sum(map(len, groups))
    size, accumulation = config.per_device_train_batch_size, config.gradient_accumulation_steps

    @lru_cache(maxsize=2)
    def epoch(number: int) -> list[Unit]:
        # Only 32 bits of a seed count: seeds and epochs must not share them by halves.
        generator = torch.Generator().manual_seed((config.seed * 1_000_003 + number) % 2**32)
        order = torch.randperm(len(groups), generator=generator).tolist()
        return [unit for i in order for unit in groups[i]]

    def unit(position: int) -> Unit:
        return epoch(position // total)[position % total]

    for step in range(first, config.max_steps):
        start = step * accumulation * size
        positions = count(start)
        units = [[unit(next(positions)) for _ in range(size)] for _ in range(accumulation)]
        yield [collate(u, config.objective, pad) for u in units]


def collate(units: list[Unit], objective: str, pad: int) -> Batch:
    """Units as one batch: for DPO all chosen sequences first; for KTO with mismatched pairs."""
    sequences = [s for column in zip(*(u.sequences for u in units), strict=True) for s in column]
    batch, values = make_batch(sequences, pad), [u.value for u in units]
    if objective == "grpo":
        return replace(batch, extra={"advantages": torch.tensor(values, dtype=torch.float32)})
    if objective == "kto":
        own = batch.completions
        return replace(
            batch,
            extra={"desirable": torch.tensor(values)},
            mismatched=Completions(own.ids.roll(-1, 0), own.mask.roll(-1, 0), own.prompt),
        )
    return batch


def make_batch(sequences: list[Tokens], pad: int) -> Batch:
    """Sequences as a batch, in their order."""
    prompts = {tuple(s.prompt): None for s in sequences}
    index = {prompt: i for i, prompt in enumerate(prompts)}
    prompt_ids, prompt_mask = _padded([list(p) for p in prompts], pad, left=True)
    ids, mask = _padded([s.completion for s in sequences], pad)
    prompt = torch.tensor([index[tuple(s.prompt)] for s in sequences])
    return Batch(prompt_ids, prompt_mask, Completions(ids, mask, prompt))


def _padded(rows: list[list[int]], pad: int, left: bool = False) -> tuple[Tensor, Tensor]:
    """Token ids ``[R, L]`` and a bool mask of where they are."""
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), pad)
    mask = torch.zeros((len(rows), longest), dtype=torch.bool)
    for i, row in enumerate(rows):
        place = slice(longest - len(row), None) if left else slice(len(row))
        ids[i, place] = torch.tensor(row)
        mask[i, place] = True
    return ids, mask
