"""From examples to batches: pairing and grouping, tokenizing, order, collation.

What each objective makes of each kind of data:

- DPO. Pairs: as they are. Rewards and labels: a prompt's best completion with its worst, the second
  best with the second worst, and so on while the rewards differ.
- KTO. Labels: as they are. Pairs: chosen True, rejected False. Rewards: True above the prompt's
  mean, or above a threshold, False otherwise.
- GRPO. Rewards: groups. Labels: a prompt's completions, with rewards 1 and 0. Pairs: groups of two,
  with rewards 1 and 0.

Rows of single completions with the same prompt make one group. Groups of which nothing can be
learned (one completion, or all rewards equal) are left out, and so are rows that do not fit into
``--max-length``: each is counted and warned of.
"""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from humanline import conversation
from humanline.advantages import advantages_of_groups
from humanline.conversation import Tokens
from humanline.mismatched import mismatched_indices
from humanline.rows import IGNORE_INDEX
from humanline.training.config import TrainConfig
from humanline.training.data import Dataset, Example, Text
from humanline.training.errors import UserError
from humanline.training.ranks import ALONE, Ranks


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
        written: bool ``[S, C]``, where there is one that the assistant wrote.
        prompt: int64 ``[S]``, the index of each one's prompt.
    """

    ids: Tensor
    mask: Tensor
    written: Tensor
    prompt: Tensor

    @property
    def labels(self) -> Tensor:
        """``ids``, with -100 where the assistant wrote no token."""
        return self.ids.masked_fill(~self.written, IGNORE_INDEX)


@dataclass(frozen=True)
class Batch:
    """Prompts, each held once however many completions it has, and completions.

    Attributes:
        prompt_ids: int64 ``[P, T]``, padded on the left.
        prompt_mask: bool ``[P, T]``, where there is a token.
        completions: the sequences of the loss.
        extra: the objective's own batch arguments.
        mismatched: for KTO: prompts with a completion of another, of this batch or, where it has
            none that will do, of the data. Where they have none either, ``extra`` holds the least
            reference point there is, 0.
        whole: of the batch that all ranks' parts make up; None of one that is not trained on.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    completions: Completions
    extra: dict[str, Any] = field(default_factory=dict)
    mismatched: Completions | None = None
    whole: "Whole | None" = None

    def tokens(self) -> int:
        """Tokens that go through the model, padding left out."""
        masks = [self.prompt_mask, self.completions.mask]
        masks += [] if self.mismatched is None else [self.mismatched.mask]
        return int(sum(mask.sum() for mask in masks))


@dataclass(frozen=True)
class Whole:
    """Numbers of a batch whose parts are on several ranks.

    Attributes:
        written: tokens that the assistant wrote.
        written_first: those of the first sequence of each unit: DPO's chosen ones.
        mismatched: KTO's mismatched pairs.
    """

    written: int
    written_first: int
    mismatched: int


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
        normalised = advantages_of_groups(rewards, torch.zeros(len(group), dtype=torch.int64))
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
    return replace(dataset, examples=kept), replace(dataset, examples=held)


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
    sequences = [(next(tokens), next(tokens)) for _ in found]
    fitting = [
        _fitting(pair, chosen, dataset, config.max_length)
        for pair, chosen in zip(sequences, found, strict=True)
    ]
    return [pair for pair in fitting if pair is not None]


def contrasts(groups: list[list["Unit"]]) -> list[tuple[Tokens, Tokens]]:
    """Better and worse completions among what is trained on: pairs, or of labels and advantages
    those above 0 with those that are not, in their order."""
    units = list(chain.from_iterable(groups))
    if units and len(units[0].sequences) == 2:
        return [u.sequences for u in units]
    better, worse = ([u.sequences[0] for u in units if (u.value > 0) is w] for w in (True, False))
    return list(zip(better, worse, strict=False))


def _prompt_key(example: Example) -> str:
    return json.dumps(example.prompt, sort_keys=True)


# Tokenizing


class Tokenizer:
    """Prompts and completions as token ids, strings and chats alike: see ``conversation.py``.

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
        with self._at(where):
            rendered = conversation.render_prompt(self.tokenizer, prompt)
        (tokens,) = self._encode([rendered])
        self.longest_prompt = max(self.longest_prompt, len(tokens.prompt))
        return tokens.prompt

    def sequences(self, chosen: list[Chosen]) -> list[Tokens]:
        """Token ids of prompts with one of their completions each."""
        rendered = []
        for example, index in chosen:
            with self._at(example.where):
                completion, tools = example.completions[index], example.tools
                options = {"tools": tools} if tools else {}
                rendered.append(
                    conversation.render(self.tokenizer, example.prompt, completion, **options)
                )
        result = self._encode(rendered)
        self.longest = max(self.longest, *(len(t.prompt + t.completion) for t in result), 0)
        return result

    @contextmanager
    def _at(self, where: str) -> Iterator[None]:
        try:
            yield
        except ValueError as error:
            raise UserError(f"{where}: {error} (the tokenizer is {self.folder}'s)") from error

    def _encode(self, rendered: list[conversation.Rendered]) -> list[Tokens]:
        result = conversation.encode(self.tokenizer, rendered)
        ids = chain.from_iterable(t.prompt + t.completion for t in result)
        self.largest_id = max(self.largest_id, max(ids, default=0))
        return result


# Units


def make_units(
    dataset: Dataset, tokenizer: Tokenizer, config: TrainConfig
) -> tuple[list[list[Unit]], list[str]]:
    """Units in groups that stay together in a batch, and what to warn of.

    Rows that do not fit are left out and added to the dataset's ``skipped``.

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
    groups, truncated = [], 0
    for group in raw:
        units = []
        for chosen, value in group:
            sequences = tuple(next(tokens) for _ in chosen)
            fitting = _fitting(sequences, chosen, dataset, config.max_length)
            if fitting is not None:
                truncated += fitting != sequences
                units.append(Unit(fitting, value))
        if units:
            groups.append(units)
    if not groups:
        raise UserError(
            f"none of the {len(dataset.examples)} examples is left: {_first(dataset.skipped)}"
        )
    return groups, _warnings(dataset, groups, truncated, config)


def _fitting(
    sequences: tuple[Tokens, ...], chosen: tuple[Chosen, ...], dataset: Dataset, max_length: int
) -> tuple[Tokens, ...] | None:
    """Sequences cut to ``max_length``; None if one of them does not fit, whose row is skipped."""
    fitting = tuple(_truncate(s, max_length) for s in sequences)
    for sequence, (example, _) in zip(fitting, chosen, strict=True):
        reason = _misfit(sequence, max_length)
        if reason:
            dataset.skipped[example.where] = reason
            return None
    return fitting


def _misfit(sequence: Tokens, max_length: int) -> str | None:
    """What is wrong with a sequence that was cut to ``max_length``."""
    length = len(sequence.prompt)
    if length == 0:
        return "the prompt has no tokens"
    if length >= max_length:
        return f"the prompt takes {length} tokens of --max-length {max_length}"
    if not any([True] * len(sequence.completion) if sequence.written is None else sequence.written):
        return f"the assistant wrote nothing within --max-length {max_length}"
    return None


def _warnings(
    dataset: Dataset, groups: list[list[Unit]], truncated: int, config: TrainConfig
) -> list[str]:
    """One warning each of what is likely not meant, with how often it is."""
    kto = config.objective == "kto"
    found = []
    if truncated:
        limit = config.max_length
        found.append(f"{truncated} examples completion truncated (--max-length {limit})")
    if config.objective == "dpo" or dataset.kind == "pairs":
        both = [[e.completions[i] for e, i in pair] for pair in pairs(dataset)]
        same = sum(chosen == rejected for chosen, rejected in both)
        if same:
            found.append(f"in {same} of {len(both)} pairs, chosen and rejected are the same")
    if not kto or (dataset.kind == "rewards" and config.reward_threshold is None):
        rewards = [{_reward_of(c) for c in group} for group in grouped(dataset)]
        equal = sum(len(values) == 1 for values in rewards)
        if equal:
            found.append(
                f"{equal} of {len(rewards)} groups are left out: the rewards of a prompt's "
                "completions are all equal, or it has one completion alone"
            )
    if kto and config.loss_type == "kto":
        alone, of = _without_mismatched(groups)
        if alone:
            found.append(
                f"{alone} of {of} completions have no mismatched pair for KTO's reference point: "
                "all completions there are, are their prompt's own. In a batch without any it is 0"
            )
    return found


def _without_mismatched(groups: list[list[Unit]]) -> tuple[int, int]:
    """Of how many sequences the prompt has every completion of the data; and of how many in all."""
    sequences = [s for group in groups for unit in group for s in unit.sequences]
    own: dict[tuple[int, ...], set[tuple[int, ...]]] = {}
    for s in sequences:
        own.setdefault(tuple(s.prompt), set()).add(tuple(s.completion))
    distinct = len(set().union(*own.values()))
    return sum(len(own[tuple(s.prompt)]) == distinct for s in sequences), len(sequences)


def check_skipped(skipped: dict[str, str], rows: int, config: TrainConfig) -> str | None:
    """What to warn of the rows that were left out, of so many.

    Raises:
        UserError: they are more than ``max_bad_rows`` of all.
    """
    if not skipped:
        return None
    found = f"{len(skipped)} of {rows} rows are empty or too long"
    if len(skipped) > config.max_bad_rows * rows:
        raise UserError(
            f"{found}, more than --max-bad-rows {config.max_bad_rows:g} allows: {_first(skipped)}"
        )
    return f"{found}, and left out: {_first(skipped)}"


def _first(skipped: dict[str, str], number: int = 3) -> str:
    """The first few rows that were skipped, and why."""
    named = [f"{where}: {reason}" for where, reason in list(skipped.items())[:number]]
    return "; ".join(named + ["…"] * (len(skipped) > number))


def _truncate(sequence: Tokens, max_length: int) -> Tokens:
    room = max(max_length - len(sequence.prompt), 0)
    written = None if sequence.written is None else sequence.written[:room]
    return Tokens(sequence.prompt, sequence.completion[:room], written)


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
    groups: list[list[Unit]],
    config: TrainConfig,
    pad: int,
    first: int = 0,
    ranks: Ranks = ALONE,
) -> Iterator[list[Batch]]:
    """The micro-batches of each step from ``first`` on: a function of seed and step alone.

    Each rank gets its part of them: together they are those of one process whose batches are as
    many times larger as there are ranks.
    """
    total = sum(map(len, groups))
    part, accumulation = config.per_device_train_batch_size, config.gradient_accumulation_steps
    size, own = part * ranks.count, slice(part * ranks.rank, part * (ranks.rank + 1))

    @lru_cache(maxsize=2)
    def epoch(number: int) -> list[Unit]:
        # Only 32 bits of a seed count: seeds and epochs must not share them by halves.
        generator = torch.Generator().manual_seed((config.seed * 1_000_003 + number) % 2**32)
        order = torch.randperm(len(groups), generator=generator).tolist()
        return [unit for i in order for unit in groups[i]]

    def unit(position: int) -> Unit:
        return epoch(position // total)[position % total]

    for step in range(first, config.max_steps):
        batches, first_of_step = [], step * accumulation * size
        for start in range(first_of_step, first_of_step + accumulation * size, size):
            units = [unit(position) for position in range(start, start + size)]
            others = map(unit, range(start + size, start + total))
            batches.append(collate(units, config.objective, pad, others, own))
        yield batches


def collate(
    units: list[Unit],
    objective: str,
    pad: int,
    others: Iterable[Unit] = (),
    own: slice = slice(None),
) -> Batch:
    """Units as one batch, of which a rank has its ``own``: for DPO all chosen sequences first; for
    KTO with mismatched pairs, for which ``others`` are looked at, in their order, where the batch
    does not do."""
    columns = list(zip(*(u.sequences for u in units), strict=True))
    batch = make_batch([s for column in columns for s in column[own]], pad)
    values = [u.value for u in units[own]]
    written = [sum(map(_written, column)) for column in columns]
    whole = Whole(sum(written), written[0], mismatched=0)
    extra: dict[str, Any] = {}
    if objective == "grpo":
        extra = {"advantages": torch.tensor(values, dtype=torch.float32)}
    elif objective == "kto":
        extra = {"desirable": torch.tensor(values)}
        found = _mismatched(list(columns[0]), (s for u in others for s in u.sequences))
        whole = replace(whole, mismatched=len(found))
        start = own.start or 0
        mine = {i - start: s for i, s in found.items() if i in range(len(units))[own]}
        if mine:
            prompt = batch.completions.prompt[torch.tensor(list(mine))]
            batch = replace(batch, mismatched=_completions(list(mine.values()), prompt, pad))
        elif not found:
            extra["z0"] = 0.0
    return replace(batch, extra=extra, whole=whole)


def _written(sequence: Tokens) -> int:
    written = sequence.written
    return len(sequence.completion) if written is None else sum(written)


def _mismatched(sequences: list[Tokens], others: Iterator[Tokens]) -> dict[int, Tokens]:
    """By the index of a sequence, one whose completion is none of its prompt's own."""
    prompts, completions = zip(*((tuple(s.prompt), s.completion) for s in sequences), strict=True)
    indices = dict(enumerate(mismatched_indices(prompts, completions)))
    found = {i: sequences[j] for i, j in indices.items() if j is not None}
    own = {
        i: [s.completion for s in sequences if tuple(s.prompt) == p] for i, p in enumerate(prompts)
    }
    missing = [i for i in indices if i not in found]
    while missing and (other := next(others, None)):
        for i in missing:
            if other.prompt != sequences[i].prompt and other.completion not in own[i]:
                found[i] = other
        missing = [i for i in missing if i not in found]
    return dict(sorted(found.items()))


def make_batch(sequences: list[Tokens], pad: int) -> Batch:
    """Sequences as a batch, in their order."""
    prompts = {tuple(s.prompt): None for s in sequences}
    index = {prompt: i for i, prompt in enumerate(prompts)}
    prompt_ids, prompt_mask = _padded([list(p) for p in prompts], pad, left=True)
    prompt = torch.tensor([index[tuple(s.prompt)] for s in sequences])
    return Batch(prompt_ids, prompt_mask, _completions(sequences, prompt, pad))


def _completions(sequences: list[Tokens], prompt: Tensor, pad: int) -> Completions:
    ids, mask = _padded([s.completion for s in sequences], pad)
    written = mask.clone()
    for i, s in enumerate(sequences):
        if s.written is not None:
            written[i, : len(s.written)] = torch.tensor(s.written)
    return Completions(ids, mask, written, prompt)


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
