"""README.md says what the committed results say."""

import pytest

from bench import readme
from bench.cases import Case
from bench.measure import Result
from bench.report import note_on
from bench.run import ROOT
from humanline.training.errors import UserError

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def test_tables_are_those_of_the_results():
    names = {match[2] for match in readme.BLOCK.finditer(TEXT)}
    assert names == set(readme.BLOCKS)
    assert readme.generated(TEXT) == TEXT, "run: python -m bench.readme"


def test_a_changed_digit_is_noticed():
    (cpu,) = (m for m in readme.BLOCK.finditer(TEXT) if m[2] == "cpu")
    digit = cpu.start(3) + cpu[3].index(" s<br>") - 1
    changed = TEXT[:digit] + str((int(TEXT[digit]) + 1) % 10) + TEXT[digit + 1 :]
    assert readme.generated(changed) == TEXT != changed


def test_an_unknown_block():
    with pytest.raises(UserError, match="a block bench:none; known: cpu, gpu"):
        readme.generated("<!-- bench:none -->\n<!-- /bench -->")


def test_without_a_gpu_result_it_says_so(monkeypatch):
    monkeypatch.setattr(readme, "committed", lambda: [])
    assert "nothing has been measured" in readme.gpu()


def test_a_note_on_some_of_a_peers_cases_is_not_lost():
    results = [Result(Case(o), "Liger chunked", seconds=1.0) for o in ("grpo", "dpo", "grpo")]
    assert readme._notes(results) == {"Liger chunked": note_on(results[1])} != {"Liger chunked": ""}
