"""Reading preference data: every file format and column layout becomes one kind of example.

| columns | kind | an example holds |
|---|---|---|
| prompt, chosen, rejected | pairs | both, with rewards 1 and 0 |
| chosen, rejected (chats with a common beginning) | pairs | the same |
| prompt, completion, label | labels | one completion, with reward 1 (True) or 0 (False) |
| prompt, completion, reward | rewards | one completion |
| prompt, completions, rewards | rewards | a group of completions |

Prompts and completions are strings, or lists of chat messages. A completion may have several turns:
the assistant's alone are trained on. A column ``tools`` beside them goes to the chat template.
"""

import codecs
import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from humanline import install
from humanline.training.errors import UserError

DATA = Path(__file__).parent / "data"
DEFAULT_TRAIN, DEFAULT_HELDOUT = DATA / "train.jsonl", DATA / "heldout.jsonl"

Text = str | list[dict[str, Any]]

#: Squares of larger rewards would overflow.
MAX_REWARD = 1e100

#: Columns of each layout, and the kind of example they make.
LAYOUTS = {
    ("prompt", "chosen", "rejected"): "pairs",
    ("prompt", "completion", "label"): "labels",
    ("prompt", "completions", "rewards"): "rewards",
    ("prompt", "completion", "reward"): "rewards",
    ("chosen", "rejected"): "pairs",
}


@dataclass(frozen=True)
class Example:
    """A prompt and its completions, each with a reward.

    Attributes:
        where: file and line, for messages.
        tools: what the chat template is told of the tools there are; None: nothing.
    """

    prompt: Text
    completions: tuple[Text, ...]
    rewards: tuple[float, ...]
    where: str
    tools: list[Any] | None = None


@dataclass(frozen=True)
class Question:
    """A prompt and the answer it should get."""

    prompt: Text
    answer: str
    where: str


@dataclass(frozen=True)
class Dataset:
    """Examples of one kind: "pairs", "labels" or "rewards".

    Attributes:
        skipped: rows that were left out: where they are, and what is wrong with them.
    """

    kind: str
    examples: list[Example]
    skipped: dict[str, str] = field(default_factory=dict)


class _Empty(UserError):
    """A row with nothing in it to train on, which training can do without."""


def read_examples(path: Path) -> Dataset:
    """The training data of a file.

    Rows that are empty (an empty or null prompt, completion or group) are skipped: see ``skipped``.
    What is not as it must be in another way (no JSON, a column missing, a reward that is no number)
    is an error, however rare: there, something is wrong with how the file was made.

    Raises:
        UserError: the file or a row of it is not as it must be, with file and line; or all rows
            are empty.
    """
    layout, examples, skipped = None, [], {}
    for where, row in read_rows(path):
        layout = layout or _layout_of(row, path)
        try:
            examples.append(_example(layout, row, where))
        except _Empty as error:
            skipped[where] = str(error).removeprefix(f"{where}: ")
            continue
        first, last = examples[0].prompt, examples[-1].prompt
        if isinstance(first, str) != isinstance(last, str):
            raise UserError(f"{where}: strings and lists of messages are mixed in one file")
    if not examples:
        where, reason = next(iter(skipped.items()))
        raise UserError(f"every row is empty; {where}: {reason}")
    return Dataset(LAYOUTS[layout], examples, skipped)


def read_questions(path: Path) -> list[Question]:
    """The held-out questions of a file: columns prompt and answer.

    Raises:
        UserError: see :func:`read_examples`.
    """
    questions = []
    for where, row in read_rows(path):
        _require_columns(row, ("prompt", "answer"), where)
        answer = row["answer"]
        if not _is_numeric(answer):
            raise UserError(f"{where}: answer must be a number, got {_brief(answer)}")
        questions.append(Question(_text(row["prompt"], "prompt", where), str(answer), where))
    return questions


def _is_numeric(answer: Any) -> bool:
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        return False
    try:
        return math.isfinite(float(str(answer)))
    except ValueError:
        return False


def fingerprint(path: Path) -> str:
    """Hash of a file's contents."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


# Rows


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each row, with the place it stands at."""
    readers = {".jsonl": _jsonl_rows, ".parquet": _parquet_rows}
    if path.suffix not in readers:
        raise UserError(
            f"{path}: unknown extension {path.suffix!r}; known: {', '.join(sorted(readers))}"
        )
    if not path.is_file():
        raise UserError(f"{path} does not exist or is not a file")
    empty = True
    for where, row in readers[path.suffix](path):
        empty = False
        yield where, row
    if empty:
        raise UserError(f"{path} is empty")


def _jsonl_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{path}, line {number}"
            line = (line.removeprefix(codecs.BOM_UTF8) if number == 1 else line).strip()
            if line:
                yield where, _parsed(line, where)


def _parsed(line: bytes, where: str) -> dict[str, Any]:
    if line.startswith(b"["):
        raise UserError(f"{where}: starts a list; one JSON object per line is expected")
    try:
        row = json.loads(line.decode("utf-8"))
        if b"\\u" in line:
            json.dumps(row, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 ({error.reason})") from error
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: not text (half of a surrogate pair)") from error
    except RecursionError as error:
        raise UserError(f"{where}: nested too deeply") from error
    except ValueError as error:
        raise UserError(f"{where}: not JSON ({error})") from error
    if not isinstance(row, dict):
        raise UserError(f"{where}: must be a JSON object, got {_brief(row)}")
    return row


def _parquet_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise UserError(f"reading parquet needs pyarrow: {install.command('train')}") from error
    try:
        file = parquet.ParquetFile(path)
        number = 0
        for batch in file.iter_batches(1024):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}, row {number}", row
    except (ArrowException, OSError) as error:
        raise UserError(f"{path}: not a parquet file ({str(error).splitlines()[0]})") from error


# One row


def _layout_of(row: dict[str, Any], path: Path) -> tuple[str, ...]:
    for columns in LAYOUTS:
        if all(column in row for column in columns):
            return columns
    wanted = " | ".join(", ".join(columns) for columns in LAYOUTS)
    found = ", ".join(row) or "none"
    raise UserError(f"{path}: columns found: {found}; wanted one of: {wanted}")


def _require_columns(row: dict[str, Any], columns: tuple[str, ...], where: str) -> None:
    missing = [column for column in columns if column not in row]
    if missing:
        raise UserError(
            f"{where}: columns found: {', '.join(row) or 'none'}; wanted: {', '.join(columns)}; "
            f"missing: {', '.join(missing)}"
        )


def _example(layout: tuple[str, ...], row: dict[str, Any], where: str) -> Example:
    _require_columns(row, layout, where)
    if "chosen" in layout:
        if "prompt" not in layout:
            row = _split_common_beginning(row, where)
        completions, rewards = [row["chosen"], row["rejected"]], [1.0, 0.0]
        names = ["chosen", "rejected"]
    elif "completions" in layout:
        completions, rewards = _group(row, where)
        names = [f"completions[{i}]" for i in range(len(completions))]
    else:
        completions, names = [row["completion"]], ["completion"]
        rewards = [_label(row, where) if "label" in layout else _reward(row["reward"], where)]
    prompt = _text(row["prompt"], "prompt", where)
    texts = [_text(c, n, where) for c, n in zip(completions, names, strict=True)]
    for text, name in zip(texts, names, strict=True):
        if isinstance(text, str) != isinstance(prompt, str):
            raise UserError(
                f"{where}: prompt and {name} must both be strings or both lists of messages"
            )
    return Example(prompt, tuple(texts), tuple(rewards), where, _tools(row, where))


def _tools(row: dict[str, Any], where: str) -> list[Any] | None:
    """The column ``tools``: a list of JSON schemas, or the text of one."""
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise UserError(f"{where}: tools is not JSON ({error})") from error
    if not (tools is None or isinstance(tools, list)):
        raise UserError(f"{where}: tools must be a list of JSON schemas, got {_brief(tools)}")
    return tools or None


def _group(row: dict[str, Any], where: str) -> tuple[list, list[float]]:
    completions, rewards = row["completions"], row["rewards"]
    for name, value in (("completions", completions), ("rewards", rewards)):
        if not isinstance(value, list) or not value:
            error = _Empty if value is None or value == [] else UserError
            raise error(f"{where}: {name} must be a non-empty list, got {_brief(value)}")
    if len(completions) != len(rewards):
        raise UserError(f"{where}: {len(completions)} completions, but {len(rewards)} rewards")
    return completions, [_reward(r, where) for r in rewards]


def _label(row: dict[str, Any], where: str) -> float:
    if not isinstance(row["label"], int) or row["label"] not in (0, 1):
        raise UserError(f"{where}: label must be true or false, got {_brief(row['label'])}")
    return float(row["label"])


def _reward(value: Any, where: str) -> float:
    try:
        reward = float(value) if isinstance(value, int | float) else math.nan
    except OverflowError:
        reward = math.inf
    if not abs(reward) < MAX_REWARD:
        raise UserError(
            f"{where}: a reward must be a finite number (below 1e100), got {_brief(value)}"
        )
    return reward


def _text(value: Any, name: str, where: str) -> Text:
    """The value, if it is a non-empty string or a list of chat messages with contents."""
    if value is None:
        raise _Empty(f"{where}: {name} is null")
    if isinstance(value, str):
        if not value:
            raise _Empty(f"{where}: {name} is empty")
        return value
    if not isinstance(value, list):
        raise UserError(
            f"{where}: {name} must be a string or a list of messages, got {_brief(value)}"
        )
    if not value:
        raise _Empty(f"{where}: {name} is empty")
    for message in value:
        if not _is_message(message):
            raise UserError(
                f'{where}: {name} must hold messages such as {{"role": "user", "content": "…"}}, '
                f"got {_brief(message)}"
            )
    if not any(message.get("content") or message.get("tool_calls") for message in value):
        raise _Empty(f"{where}: {name} is empty")
    return value


def _is_message(message: Any) -> bool:
    """A role with a content; an assistant's that calls tools may do without."""
    if not (isinstance(message, dict) and isinstance(message.get("role"), str)):
        return False
    content = message.get("content")
    calls = message["role"] == "assistant" and message.get("tool_calls")
    return isinstance(content, str) or (content is None and bool(calls))


def _split_common_beginning(row: dict[str, Any], where: str) -> dict[str, Any]:
    """Two whole chats as a prompt, their common beginning, and what follows it in each, a message
    at least: equal chats make a pair too, though not one to learn from."""
    chosen, rejected = row["chosen"], row["rejected"]
    for name in ("chosen", "rejected"):
        if row[name] is None or row[name] == []:
            raise _Empty(f"{where}: {name} is empty")
    if not (isinstance(chosen, list) and isinstance(rejected, list)):
        raise UserError(f"{where}: without a prompt, chosen and rejected must be lists of messages")
    common = 0
    while common < min(len(chosen), len(rejected)) - 1 and chosen[common] == rejected[common]:
        common += 1
    return {"prompt": chosen[:common], "chosen": chosen[common:], "rejected": rejected[common:]}


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
