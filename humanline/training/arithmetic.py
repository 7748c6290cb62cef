"""Build the default dataset of ``humanline train``: pick the largest of three numbers.

``python -m humanline.training.arithmetic --model FOLDER --out FOLDER`` writes two files.

* ``heldout.jsonl``: one ``{"prompt": [...], "answer": "..."}`` per line, to measure accuracy on.
* ``train.jsonl``: one ``{"prompt", "completions", "rewards", "answer"}`` per line (TRL's
  conversational columns, in group form). The completions are what the model itself answered, and
  a reward is 1.0 where ``humanline.training.scoring.is_correct`` holds and 0.0 elsewhere.

The numbers come from reasoning_gym's ``number_sorting`` (three distinct integers of two digits);
the answer is the first of its descending order. No set of three numbers is in both files, in
whatever order. Each prompt shows one solved example, because a small instruct model otherwise
answers in sentences.

The shipped files were sampled from SmolLM2-135M-Instruct at temperature 1 with no top-k or top-p,
``--samples 12 --max-new-tokens 8 --seed 0``. Of the samples of one prompt:

* one that did not end with the end-of-turn token within the limit is dropped;
* one whose text does not tokenize back to the sampled tokens is dropped, so that a trainer scores
  exactly what was sampled;
* duplicates are dropped, so that a group holds distinct completions.

Only prompts left with both a right and a wrong completion enter ``train.jsonl``: the others give
every objective a zero advantage or no pair.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from tqdm import tqdm

from humanline import install
from humanline.training.scoring import is_correct

SYSTEM = "Reply with the largest number."
EXAMPLE = ("31, 56, 24", "56")


def make_prompt(numbers: list[str]) -> list[dict[str, str]]:
    """The conversation that asks for the largest of ``numbers``."""
    return [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": EXAMPLE[0]},
        {"role": "assistant", "content": EXAMPLE[1]},
        {"role": "user", "content": ", ".join(numbers)},
    ]


def make_problems(count: int, seed: int) -> list[dict]:
    """``count`` distinct problems (``prompt`` and ``answer``) from reasoning_gym."""
    try:
        import reasoning_gym
    except ImportError as error:
        message = f"building the dataset needs reasoning_gym: {install.command('data')}"
        raise SystemExit(message) from error
    source = reasoning_gym.create_dataset(
        "number_sorting",
        seed=seed,
        size=4 * count,  # spare ones: repeats are skipped
        min_numbers=3,
        max_numbers=3,
        min_decimals=0,
        max_decimals=0,
        min_value=10,
        max_value=99,
    )
    problems, seen = [], {frozenset(EXAMPLE[0].split(", "))}
    for item in source:
        numbers = [str(int(float(number))) for number in item["metadata"]["original_numbers"]]
        key = frozenset(numbers)
        if len(key) < 3 or key in seen:
            continue
        seen.add(key)
        problems.append({"prompt": make_prompt(numbers), "answer": max(numbers, key=int)})
        if len(problems) == count:
            return problems
    raise SystemExit(f"reasoning_gym gave only {len(problems)} distinct problems of {count}")


def encode_left_padded(tokenizer, prompts: list) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask of the rendered prompts, padded on the left."""
    texts = [
        tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        for prompt in prompts
    ]
    rows = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    width = max(map(len, rows))
    pad = tokenizer.eos_token_id  # any id: the mask hides it
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


@torch.no_grad()
def sample_batch(
    model, tokenizer, prompts: list, samples: int, max_new_tokens: int, generator: torch.Generator
) -> list[list[list[int]]]:
    """For each prompt, ``samples`` completions as token ids, drawn at temperature 1.

    A prompt is read once and its key/value cache is copied for its samples. A finished completion
    ends with the end-of-turn token; an unfinished one is cut at ``max_new_tokens``.
    """
    eos = tokenizer.eos_token_id
    ids, mask = encode_left_padded(tokenizer, prompts)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    output = model(ids, attention_mask=mask, position_ids=positions, logits_to_keep=1)
    cache = output.past_key_values
    cache.batch_repeat_interleave(samples)
    logits = output.logits[:, -1].repeat_interleave(samples, 0)
    mask = mask.repeat_interleave(samples, 0)
    position = positions[:, -1:].repeat_interleave(samples, 0)
    done = torch.zeros(len(logits), dtype=torch.bool)
    drawn = []
    for step in range(max_new_tokens):
        token = torch.multinomial(logits.softmax(-1), 1, generator=generator)
        drawn.append(token.masked_fill(done[:, None], -1))
        done |= token[:, 0] == eos
        if done.all() or step == max_new_tokens - 1:
            break
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        position = position + 1
        logits = model(
            token, attention_mask=mask, position_ids=position, past_key_values=cache
        ).logits[:, -1]
    rows = [[token for token in row if token >= 0] for row in torch.cat(drawn, 1).tolist()]
    return [rows[i : i + samples] for i in range(0, len(rows), samples)]


def kept_texts(tokenizer, completions: list[list[int]]) -> list[str]:
    """The distinct texts of the finished completions that tokenize back to what was sampled."""
    texts = []
    for ids in completions:
        if ids[-1] != tokenizer.eos_token_id:
            continue
        text = tokenizer.decode(ids[:-1])
        if tokenizer(text, add_special_tokens=False).input_ids == ids[:-1] and text not in texts:
            texts.append(text)
    return texts


def make_row(problem: dict, texts: list[str]) -> dict | None:
    """The training row of a problem, or None where its rewards are all equal."""
    rewards = [float(is_correct(text, problem["answer"])) for text in texts]
    if len(set(rewards)) < 2:
        return None
    return {
        "prompt": problem["prompt"],
        "completions": [[{"role": "assistant", "content": text}] for text in texts],
        "rewards": rewards,
        "answer": problem["answer"],
    }


def make_rows(model, tokenizer, problems: list[dict], args: argparse.Namespace) -> list[dict]:
    """Sample completions for ``problems`` and return the rows with mixed rewards."""
    generator = torch.Generator().manual_seed(args.seed)
    rows = []
    for start in tqdm(range(0, len(problems), args.batch), desc="sampling", unit="batch"):
        batch = problems[start : start + args.batch]
        prompts = [problem["prompt"] for problem in batch]
        sampled = sample_batch(
            model, tokenizer, prompts, args.samples, args.max_new_tokens, generator
        )
        for problem, completions in zip(batch, sampled, strict=True):
            row = make_row(problem, kept_texts(tokenizer, completions))
            if row is not None:
                rows.append(row)
    return rows


def write_jsonl(path: Path, rows: list[dict]) -> None:
    """Write one JSON object per line."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="Hugging Face model folder to sample from")
    parser.add_argument("--out", required=True, type=Path, help="folder for the two files")
    parser.add_argument("--train-prompts", type=int, default=480, help="prompts to sample from")
    parser.add_argument("--heldout-prompts", type=int, default=240, help="prompts held out")
    parser.add_argument("--samples", type=int, default=12, help="completions drawn per prompt")
    parser.add_argument("--max-new-tokens", type=int, default=8, help="limit of one completion")
    parser.add_argument("--batch", type=int, default=8, help="prompts sampled at a time")
    parser.add_argument("--seed", type=int, default=0, help="seed of problems and sampling")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Build and write both files."""
    args = parse_args(argv)
    problems = make_problems(args.heldout_prompts + args.train_prompts, args.seed)
    from transformers import AutoModelForCausalLM, AutoTokenizer  # slow: after the cheap checks

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    args.out.mkdir(parents=True, exist_ok=True)
    write_jsonl(args.out / "heldout.jsonl", problems[: args.heldout_prompts])
    rows = make_rows(model, tokenizer, problems[args.heldout_prompts :], args)
    write_jsonl(args.out / "train.jsonl", rows)
    print(f"{len(rows)} training prompts, {args.heldout_prompts} held out, in {args.out}")


if __name__ == "__main__":
    main()
