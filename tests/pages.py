"""The blocks of code on the repository's pages, for the tests that run them."""

import re
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # bench/ is no part of the installed package

from bench.readme import pages  # noqa: E402

FENCE = re.compile(r"(?:<!-- sample: ([\w-]+) -->\n)?^```(\w+)\n(.*?)^```", re.M | re.S)


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        where: page and line.
        language: what stands behind the fence.
        code: what is in it.
        sample: of what it is a sample, if the page says so in a comment above.
    """

    where: str
    language: str
    code: str
    sample: str | None

    @property
    def needs_trl(self) -> bool:
        return "integrations.trl" in self.code or "patch_trl" in self.code

    @property
    def needs_ranks(self) -> bool:
        return "hl.Parallel(" in self.code

    @property
    def is_program(self) -> bool:
        return self.code.startswith("# a whole program\n")


def blocks_of_any_language() -> list[Block]:
    found = []
    for page in pages():
        text = page.read_text(encoding="utf-8")
        for match in FENCE.finditer(text):
            line = text[: match.start(2)].count("\n") + 1
            where = f"{page.relative_to(ROOT)}:{line}"
            found.append(Block(where, match[2], match[3], match[1]))
    return found


def blocks(language: str) -> list[Block]:
    return [block for block in blocks_of_any_language() if block.language == language]
