"""GRPO without generation: completions and rewards come with the dataset.

A row holds a prompt, a group of completions and their rewards. TRL repeats each row
``num_generations`` times; the n-th repetition "generates" the row's n-th completion, of one turn or
of several, of which the assistant's alone are trained on. All of TRL's machinery downstream
(groups, advantages, normalisers, metrics) stays.
"""

import math
from collections.abc import Mapping
from typing import Any

from datasets import Dataset

from humanline.checks import require
from humanline.conversation import Tokens, encode, render
from humanline.integrations.trl.checks import datasets_of, first_row

COLUMNS = ("prompt", "completions", "rewards")


def is_offline(arguments: Mapping[str, Any]) -> bool:
    """Whether the dataset among a trainer's arguments brings completions or rewards."""
    return bool(first_row(arguments.get("train_dataset")).keys() & set(COLUMNS[1:]))


def check_offline(arguments: Mapping[str, Any]) -> None:
    """Raise ValueError if something among the arguments needs generation, or a group is wrong."""
    args = arguments.get("args")
    needs_generation = {
        name: arguments.get(name)
        for name in ("reward_funcs", "tools", "rollout_func", "environment_factory")
    } | {name: getattr(args, name, None) for name in ("generate_every", "use_vllm")}
    found = [name for name, value in needs_generation.items() if value]
    require(
        not found,
        lambda: (
            f"the dataset brings completions and rewards, so nothing is generated: "
            f"{', '.join(found)} cannot be had with it; drop the columns, or "
            f"{'them' if len(found) > 1 else 'it'}"
        ),
    )
    require(
        not getattr(args, "remove_unused_columns", False),
        "remove_unused_columns=True would remove completions and rewards: set it to False",
    )
    size = getattr(args, "num_generations", 8)
    sizes = {"eval_dataset": getattr(args, "num_generations_eval", None) or size}
    for name, dataset in datasets_of(arguments):
        if isinstance(dataset, Dataset):  # a stream is checked as it comes
            groups = dataset.select_columns(list(COLUMNS[1:]))
            for number, row in enumerate(groups):
                _check_group(row, sizes.get(name.split("[")[0], size), f"{name}, row {number}")


def _check_group(row: Mapping[str, Any], size: int, where: str) -> None:
    completions, rewards = row["completions"], row["rewards"]
    require(
        len(completions) == len(rewards) == size,
        lambda: (
            f"{where}: {len(completions)} completions and {len(rewards)} rewards, where "
            f"num_generations={size} of each are expected"
        ),
    )
    require(
        all(isinstance(x, int | float) and math.isfinite(x) for x in rewards),
        lambda: f"{where}: rewards must be finite numbers, got {rewards}",
    )


def dataset_reward(reward: list[float], **_: Any) -> list[float]:
    """TRL's reward function where rewards come with the dataset."""
    return reward


class OfflineMixin:
    """GRPOTrainer; with ``offline``, its completions are the dataset's."""

    offline = False

    def _generate_and_score_completions(self, inputs):
        if not self.offline:
            return super()._generate_and_score_completions(inputs)
        size = self.num_generations if self.model.training else self.num_generations_eval
        first = self.accelerator.process_index * len(inputs)  # groups may span processes
        self._rows = [_nth(row, (first + i) % size, size) for i, row in enumerate(inputs)]
        inputs = [{k: v for k, v in row.items() if k not in COLUMNS[1:]} for row in self._rows]
        return super()._generate_and_score_completions(inputs)

    def _rollout(self, prompts: list[Any], _: Any) -> dict[str, Any]:
        """TRL's ``rollout_func``, which says too what in a completion the policy did not write."""
        rows = [self._tokens_of(row) for row in self._rows]
        result = {
            "prompt_ids": [row.prompt for row in rows],
            "completion_ids": [row.completion for row in rows],
            "logprobs": None,
        }
        if any(row.written is not None for row in rows):
            everything = [[True] * len(row.completion) for row in rows]
            masks = zip(rows, everything, strict=True)
            result["env_mask"] = [
                [int(w) for w in (row.written or written)] for row, written in masks
            ]
        return result

    def _tokens_of(self, row: Mapping[str, Any]) -> Tokens:
        """A row's tokens as a sampler would have ended them: at eos or too long."""
        options = {"chat_template": self.chat_template} | self.chat_template_kwargs
        if row.get("tools"):
            options["tools"] = row["tools"]
        rendered = render(self._tokenizer, row["prompt"], row["completion"], **options)
        (tokens,) = encode(self._tokenizer, [rendered])
        ids, end = tokens.completion, self.max_completion_length
        if tokens.written is None:  # one turn
            ends = (i + 1 for i, token in enumerate(ids) if token in self.eos_token_ids)
            end = min(next(ends, end), end)
        return Tokens(tokens.prompt, ids[:end], tokens.written and tokens.written[:end])


def _nth(row: Mapping[str, Any], n: int, size: int) -> dict[str, Any]:
    _check_group(row, size, "a row of the dataset")
    return {**row, "completion": row["completions"][n], "reward": row["rewards"][n]}
