"""GRPO without generation: completions and rewards come with the dataset.

A row holds a prompt, a group of completions and their rewards. TRL repeats each row
``num_generations`` times; the n-th repetition "generates" the row's n-th completion. All of TRL's
machinery downstream (groups, advantages, normalisers, metrics) stays.
"""

import math
from collections.abc import Mapping
from typing import Any

from datasets import Dataset
from trl.data_utils import _tokenize, common_prefix_length

from humanline.checks import require
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

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        if not self.offline:
            return super()._generate_single_turn(prompt_ids, *args, **kwargs)
        rows = zip(prompt_ids, self._rows, strict=True)
        return [self._completion_ids(ids, row) for ids, row in rows], None

    def _completion_ids(self, prompt_ids: list[int], row: Mapping[str, Any]) -> list[int]:
        """Tokens of a row's completion as a sampler would have ended them: at eos or too long."""
        prompt, completion = row["prompt"], row["completion"]
        if isinstance(completion, str):
            ids = self._ids_of_text(prompt, completion, prompt_ids)
        else:
            options = {"chat_template": self.chat_template} | self.chat_template_kwargs
            whole = _tokenize(self.processing_class, prompt + completion, **options)["input_ids"]
            require(
                common_prefix_length(prompt_ids, whole) == len(prompt_ids),
                lambda: (
                    "the chat template renders a prompt differently when a completion follows, so "
                    "the completion has no beginning; the prompt is "
                    f"{self._tokenizer.decode(prompt_ids)!r}, with completion "
                    f"{self._tokenizer.decode(whole)!r}"
                ),
            )
            ids = whole[len(prompt_ids) :]
        end = next((i for i, token in enumerate(ids) if token in self.eos_token_ids), len(ids))
        return ids[: min(end + 1, self.max_completion_length)]

    def _ids_of_text(self, prompt: str, completion: str, prompt_ids: list[int]) -> list[int]:
        eos = self._tokenizer.eos_token
        completion = completion if completion.endswith(eos) else completion + eos
        whole = _tokenize(self.processing_class, prompt + completion)["input_ids"]
        if common_prefix_length(prompt_ids, whole) == len(prompt_ids):
            return whole[len(prompt_ids) :]
        # Tokens merge across the boundary: those of the completion by itself.
        return self._tokenizer(completion, add_special_tokens=False)["input_ids"]


def _nth(row: Mapping[str, Any], n: int, size: int) -> dict[str, Any]:
    _check_group(row, size, "a row of the dataset")
    return {**row, "completion": row["completions"][n], "reward": row["rewards"][n]}
