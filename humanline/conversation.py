"""A prompt and its completion as token ids, and which of them the assistant wrote.

Strings: the prompt begins as the tokenizer begins a sequence (bos, where it has one), the
completion ends with one eos token; whatever else the tokenizer puts around a text is left out.
Chats: the template is rendered; the assistant wrote its own turns with the token that ends each.
What stands in between (users, tool results, headers of turns) is read, but was not written; what
follows the last such turn is left out, since nothing is predicted from it.

Nothing is asked of a template but to render: ``{% generation %}`` may be there or not.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from humanline.checks import require

#: A text, or messages: ``role``, ``content``, and what else the chat template takes.
Text = str | Sequence[Mapping[str, Any]]

ASSISTANT = "assistant"


@dataclass(frozen=True)
class Rendered:
    """A prompt and its completion as the tokenizer will read them.

    Attributes:
        prompt, completion: texts; one follows the other.
        turns: where in ``completion`` the assistant's turns begin and end, in characters.
        chat: whether a template rendered them, which writes the special tokens itself.
    """

    prompt: str
    completion: str
    turns: tuple[tuple[int, int], ...]
    chat: bool


@dataclass(frozen=True)
class Tokens:
    """Token ids of a prompt and of a completion of it.

    Attributes:
        written: which of the completion's tokens the assistant wrote; None: all of them.
    """

    prompt: list[int]
    completion: list[int]
    written: list[bool] | None = None


def render(tokenizer: Any, prompt: Text, completion: Text, **options: Any) -> Rendered:
    """The texts of a prompt and its completion.

    Args:
        tokenizer: one of transformers', with an eos token.
        prompt, completion: both strings, or both lists of messages.
        options: for the chat template: ``tools``, ``chat_template`` and the like.

    Raises:
        ValueError: the assistant wrote nothing of the completion; there is no chat template, it
            refuses the messages, or renders them so that prompt or turns cannot be told apart.
    """
    if isinstance(prompt, str):
        eos = tokenizer.eos_token
        completion = completion if completion.endswith(eos) else completion + eos
        return Rendered(prompt, completion, ((0, len(completion)),), chat=False)
    chat, first = _Chat(tokenizer, [*prompt, *completion], options), len(prompt)
    by_assistant = [i for i in range(first, len(chat.messages)) if chat.is_assistant(i)]
    require(
        len(by_assistant) > 0,
        lambda: (
            f"the completion holds no message of role {ASSISTANT!r}, which alone is trained on; "
            f"its roles: {', '.join(str(message['role']) for message in completion)}"
        ),
    )
    text = chat.rendered(first, chat.is_assistant(first))
    require(
        chat.text.startswith(text),
        "with its completion, the chat template does not render the prompt as it does without: "
        "prompt and completion cannot be told apart",
    )
    begin = end = len(text)
    turns = []
    for number in by_assistant:
        start, end = chat.turn(number, begin if number == first else None, end)
        turns.append((start - begin, end - begin))
    return Rendered(text, chat.text[begin:end], tuple(turns), chat=True)


def render_prompt(tokenizer: Any, prompt: Text, **options: Any) -> Rendered:
    """The text of a prompt to generate from, and nothing after it; see :func:`render`."""
    chat = not isinstance(prompt, str)
    text = _Chat(tokenizer, [*prompt], options).rendered(None, True) if chat else prompt
    return Rendered(text, "", (), chat)


def encode(tokenizer: Any, rows: Sequence[Rendered]) -> list[Tokens]:
    """Token ids of rendered prompts and completions.

    The prompt's are those it has by itself. Where a token would stretch across its end, which no
    model would generate after this prompt, the completion is tokenized by itself.
    """
    texts = [text for row in rows for text in (row.prompt, row.prompt + row.completion)]
    ids, opening = iter(_ids(tokenizer, texts)), _opening(tokenizer)
    result = []
    for row in rows:
        prompt, whole = next(ids), next(ids)
        before, length = row.prompt, len(prompt)
        if whole[:length] != prompt:
            before, length, whole = "", 0, _ids(tokenizer, [row.completion])[0]
        written = _written(tokenizer, row, before, whole, length)
        if not row.chat and prompt[: len(opening)] != opening:
            prompt = opening + prompt
        result.append(Tokens(prompt, whole[length:], written))
    return result


def _written(
    tokenizer: Any, row: Rendered, before: str, whole: list[int], length: int
) -> list[bool] | None:
    """Which tokens of ``whole``, those of ``before`` and the completion, lie within turns; from
    ``length`` on. A token across a turn's end has something in it that was not written."""
    if row.turns in ((), ((0, len(row.completion)),)):
        return None
    cuts = [before + row.completion[:cut] for turn in row.turns for cut in turn]
    tokens = [_common(whole, ids) for ids in _ids(tokenizer, cuts)]
    written = [False] * len(whole)
    for start, end in zip(tokens[::2], tokens[1::2], strict=True):
        written[start:end] = [True] * (end - start)
    return written[length:]


def _ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []


def _opening(tokenizer: Any) -> list[int]:
    """The special tokens that the tokenizer puts before a text; not those it puts behind it."""
    plain, whole = (
        tokenizer("a", add_special_tokens=False)["input_ids"],
        tokenizer("a")["input_ids"],
    )
    starts = range(len(whole) - len(plain) + 1)
    return whole[: next((i for i in starts if whole[i : i + len(plain)] == plain), 0)]


class _Chat:
    """Messages and what the chat template makes of them, and of the first few of them."""

    def __init__(self, tokenizer: Any, messages: list[Mapping[str, Any]], options: dict[str, Any]):
        require(
            bool(options.get("chat_template") or tokenizer.chat_template),
            "chat messages, but the tokenizer has no chat template",
        )
        self.tokenizer, self.messages, self.options = tokenizer, messages, options
        self.special = re.compile("|".join(map(re.escape, _special(tokenizer))))

    @cached_property
    def text(self) -> str:
        return self.rendered(None, False)

    def is_assistant(self, number: int) -> bool:
        return self.messages[number]["role"] == ASSISTANT

    def rendered(self, count: int | None, add_generation_prompt: bool) -> str:
        """The first ``count`` messages."""
        try:
            return self.tokenizer.apply_chat_template(
                self.messages[:count],
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **self.options,
            )
        except Exception as error:  # templates raise what they like
            raise ValueError(f"the chat template refuses this: {error}") from error

    def turn(self, number: int, start: int | None, after: int) -> tuple[int, int]:
        """Where an assistant's turn begins and ends, with the token that ends it.

        Args:
            start: where it begins, if that is known.
            after: where the turn before it ended, or the prompt.
        """
        start = self._start(number, after) if start is None else start
        if start < after:
            self._refuse(number)
        if number == len(self.messages) - 1:
            return start, self._trimmed(start, len(self.text))
        return start, self._end(number, start)

    def _start(self, number: int, after: int) -> int:
        opened, closed = self._try(number, True), self._try(number, False)
        if self.text.startswith(opened):
            return len(opened)
        if self.text.startswith(closed) and opened.startswith(closed):
            return _common(self.text, opened)  # what opens a turn is not all kept in history
        found = self._content(number, after)
        return found[0] if found else self._refuse(number)

    def _end(self, number: int, start: int) -> int:
        closed, eos = self._try(number + 1, False), self.tokenizer.eos_token
        if self.text.startswith(closed):
            end = self._trimmed(start, len(closed))  # eos may come with the next turn only
            return end + len(eos) if self.text.startswith(eos, end) else end
        # As the last message it is rendered otherwise: another token ends it, or thoughts are kept.
        found = self._content(number, start)
        if found is None:
            end = self.text.find(eos, start)
            return end + len(eos) if end >= 0 else self._refuse(number)
        same = start + _common(self.text[start:], closed[start:])
        ends = [end.end() for end in self.special.finditer(self.text, found[1])]
        if not ends:
            self._refuse(number)
        return max((end for end in ends if end <= same), default=ends[0])

    def _try(self, count: int, add_generation_prompt: bool) -> str:
        """The first messages rendered; where the template refuses them, what begins nothing."""
        try:
            return self.rendered(count, add_generation_prompt)
        except ValueError:
            return "\0"

    def _content(self, number: int, after: int) -> tuple[int, int] | None:
        """Where a message's content begins and ends, behind ``after``; None if it is not there."""
        content = self.messages[number].get("content")
        content = content.strip() if isinstance(content, str) else ""
        start = self.text.find(content, after)
        return (start, start + len(content)) if start >= 0 else None

    def _trimmed(self, start: int, end: int) -> int:
        """``end``, less white space behind a special token: no model ever generates it."""
        text = self.text[start:end].rstrip()
        ends = [found.end() for found in self.special.finditer(text)]
        return start + len(text) if ends and ends[-1] == len(text) else end

    def _refuse(self, number: int):
        raise ValueError(
            f"cannot tell where message {number + 1} of {len(self.messages)} is in what the chat "
            "template makes of them"
        )


def _special(tokenizer: Any) -> list[str]:
    """Texts of the special tokens, longer ones first."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    found = {*tokenizer.all_special_tokens, *(str(token) for token in added if token.special)}
    return sorted(found, key=len, reverse=True)


def _common(a: Sequence[Any], b: Sequence[Any]) -> int:
    """How many items two sequences have in common at their beginning."""
    differing = (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    return next(differing, min(len(a), len(b)))
