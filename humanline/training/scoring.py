"""The reward rule of the default task: compare the last number of a completion with the answer."""

from __future__ import annotations

import re

_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def is_correct(completion_text: str, answer: str) -> bool:
    """Whether the last number in ``completion_text`` equals the number ``answer``.

    Numbers are plain decimals with an optional minus sign and are compared by value, so ``"7.0"``
    matches ``"7"``. Text around the number is allowed; a text without any number is wrong.
    """
    numbers = _NUMBER.findall(completion_text)
    return bool(numbers) and float(numbers[-1]) == float(answer)
