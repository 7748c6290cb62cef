"""What all arms of a seed share in bench/study/freshness.py: prompts, and completions of them."""

import copy
import functools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench.study import blocks, judge
from bench.study.freshness_arms import config_of, slope_of
from bench.study.run import WORLDS, recipe
from humanline.training import arithmetic, data


@dataclass(frozen=True)
class World:
    """What all arms of a seed share.

    Attributes:
        prompts: tokens ``[steps · P, T]`` to train on, in their order, without their beginning.
        answers: tokens ``[steps · P, C]`` of the right answers, ended.
        pool: completions of all of them, drawn from the model before training.
        measured: right answers to the questions to measure with.
        wrong: where answers are judged, how many digits ``[P, G]`` are wrong in those that the
            model gives to these questions before training.
        draws: state of the generator after the pool was drawn.
    """

    prompts: Tensor
    answers: Tensor
    pool: blocks.Texts
    measured: blocks.Texts
    wrong: Tensor | None
    draws: Tensor


@functools.cache
def model(folder: str) -> tuple[Any, Any]:
    """Model and tokenizer, once a process."""
    return (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(),
        AutoTokenizer.from_pretrained(folder),
    )


def parts(folder: str, config: dict[str, Any]) -> tuple[blocks.Frozen, blocks.Policy]:
    """The frozen part and a policy of its own."""
    whole, tokenizer = model(folder)
    ids = encode(tokenizer, [["10", "11", "12"], ["97", "98", "99"]])
    differs = (ids[0] != ids[1]).nonzero()[0].item()
    frozen, policy = blocks.split(whole, config["task"]["blocks"], ids[0, :differs])
    return frozen, copy.deepcopy(policy)  # the model serves the next run too


def encode(tokenizer, questions: list[list[str]]) -> Tensor:
    """Tokens ``[P, B + T]``: all numbers have two digits, and all prompts the same length."""
    prompts = [arithmetic.make_prompt(numbers) for numbers in questions]
    ids, mask = arithmetic.encode_left_padded(tokenizer, prompts)
    assert mask.all(), "prompts differ in length"
    return ids


def questions(seed: int, number: int, taken: set[frozenset[str]]) -> list[list[str]]:
    """So many sets of three numbers, none of them in ``taken``, to which they are added."""
    draw, found = random.Random(seed), []
    while len(found) < number:
        numbers = [str(n) for n in draw.sample(range(10, 100), 3)]
        if frozenset(numbers) not in taken:
            taken.add(frozenset(numbers))
            found.append(numbers)
    return found


def held_out() -> list[list[str]]:
    """The held-out questions of humanline train."""
    texts = [q.prompt[-1]["content"] for q in data.read_questions(data.DEFAULT_HELDOUT)]
    return [text.split(", ") for text in texts]


def asked(seed: int, config: dict[str, Any]) -> tuple[list[list[str]], list[list[str]]]:
    """Questions to train on and to measure with. Rates are tuned on questions of their own."""
    recipe, tuning = config["training"], config["tuning"]
    measured = held_out()
    taken = {frozenset(q) for q in measured} | {frozenset(arithmetic.EXAMPLE[0].split(", "))}
    others = questions(0, len(measured), taken)
    if seed in tuning["seeds"]:
        measured = others
    return questions(seed + 1, recipe["steps"] * recipe["prompts"], taken), measured


def answers(tokenizer, asked: list[list[str]]) -> Tensor:
    """Tokens ``[P, C]`` of the largest numbers, ended."""
    ids = [tokenizer(max(q, key=int), add_special_tokens=False).input_ids for q in asked]
    return torch.tensor([[*row, tokenizer.eos_token_id] for row in ids])


def build_world(folder: str, config: dict[str, Any], seed: int) -> World:
    """A function of its arguments."""
    _, tokenizer = model(folder)
    frozen, policy = parts(folder, config)
    train, measured = asked(seed, config)
    beginning = frozen.beginning.shape[1]
    prompts = encode(tokenizer, train)[:, beginning:]
    draws = torch.Generator().manual_seed(seed)
    read = read_prompts(frozen, prompts, config)
    end = tokenizer.eos_token_id
    pool = draw(frozen, policy, read, slice(0, len(prompts)), config, end, draws)
    again = read_prompts(frozen, encode(tokenizer, measured)[:, beginning:], config)
    right, wrong = answers(tokenizer, measured)[:, None], None
    if slope_of(config) is not None:
        wrong = judge.wrong_digits(answer(frozen, policy, again, config, end), right[:, 0])
    every = torch.ones_like(right, dtype=torch.bool)
    few = zip(again, *(x.split(config["task"]["at_once"]) for x in (right, every)), strict=True)
    texts = blocks.Texts.cat([blocks.known(frozen, *each) for each in few])
    return World(prompts, answers(tokenizer, train), pool, texts, wrong, draws.get_state())


def read_prompts(
    frozen: blocks.Frozen, prompts: Tensor, config: dict[str, Any]
) -> list[blocks.Prompts]:
    """As many at a time as are drawn from."""
    return [frozen.read_prompts(few) for few in prompts.split(config["task"]["at_once"])]


def some(read: list[blocks.Prompts], span: slice, size: int) -> Iterator[blocks.Prompts]:
    """Those in a span, at most ``size`` at a time, as many as were read together."""
    for start in range(0, size * len(read), size):
        few = slice(max(span.start - start, 0), max(span.stop - start, 0))
        if few.start < size and few.stop:
            yield read[start // size][few]


def draw(frozen, policy, read, span: slice, config, end, generator) -> blocks.Texts:
    """Completions of some of the prompts, a few of these at a time."""
    options = config["task"]
    how = options["samples"], options["tokens"], end, generator
    prompts = some(read, span, options["at_once"])
    return blocks.Texts.cat([blocks.sample(frozen, policy, few, *how) for few in prompts])


def answer(frozen, policy, read, config, end) -> blocks.Texts:
    """Completions of all prompts, by the same draws whenever it is called."""
    span = slice(0, sum(map(len, read)))
    return draw(frozen, policy, read, span, config, end, torch.Generator().manual_seed(0))


@functools.cache
def world(rules: str, folder: str, seed: int) -> World:
    """Built at the first call and read from ``runs/`` at later ones."""
    config = config_of(rules)
    path = WORLDS / f"{rules}-{recipe(config)}-{seed}.pt"
    if not path.exists():
        WORLDS.mkdir(parents=True, exist_ok=True)
        built = vars(build_world(folder, config, seed))
        plain = {k: vars(v) if isinstance(v, blocks.Texts) else v for k, v in built.items()}
        partial = path.with_suffix(".partial")
        torch.save(plain, partial)
        partial.rename(path)
    stored = torch.load(path)
    texts = {name: blocks.Texts(**stored.pop(name)) for name in ("pool", "measured")}
    return World(**stored, **texts)


@dataclass(frozen=True)
class Run:
    """What a run is made of, beside its policy.

    Attributes:
        read: the world's prompts.
        asked: where answers are judged, the questions to measure with.
        end: the token that ends a completion.
    """

    config: dict[str, Any]
    world: World
    frozen: blocks.Frozen
    read: list[blocks.Prompts]
    asked: list[blocks.Prompts]
    end: int


@functools.lru_cache(1)
def run_of(rules: str, folder: str, seed: int) -> Run:
    """The same of all runs of a seed. That prompts are read once takes more memory than the model
    does; by estimate, reading them for each draw would double the time of sampling."""
    config, shared = config_of(rules), world(rules, folder, seed)
    tokenizer, (frozen, _) = model(folder)[1], parts(folder, config)
    asked_again = []
    if slope_of(config) is not None:
        ids = encode(tokenizer, asked(seed, config)[1])[:, frozen.beginning.shape[1] :]
        asked_again = read_prompts(frozen, ids, config)
    read = read_prompts(frozen, shared.prompts, config)
    return Run(config, shared, frozen, read, asked_again, tokenizer.eos_token_id)
