"""The pages say what the committed results say."""

import pytest

from bench import readme
from bench.cases import Case
from bench.measure import Result
from bench.report import note_on
from bench.run import ROOT
from humanline.training.errors import UserError

TEXTS = {str(p.relative_to(ROOT)): p.read_text(encoding="utf-8") for p in readme.pages()}
BENCH = TEXTS["bench/README.md"]


def test_every_block_is_on_one_page():
    names = [match[2] for text in TEXTS.values() for match in readme.BLOCK.finditer(text)]
    assert sorted(names) == sorted(readme.BLOCKS)


@pytest.mark.parametrize("page", TEXTS)
def test_tables_are_those_of_the_results(page):
    assert readme.generated(TEXTS[page]) == TEXTS[page], "run: python -m bench.readme"


def test_a_changed_digit_is_noticed():
    (cpu,) = (m for m in readme.BLOCK.finditer(BENCH) if m[2] == "cpu")
    digit = cpu.start(3) + cpu[3].index(" s<br>") - 1
    changed = BENCH[:digit] + str((int(BENCH[digit]) + 1) % 10) + BENCH[digit + 1 :]
    assert readme.generated(changed) == BENCH != changed


def test_an_unknown_block():
    with pytest.raises(UserError, match="a block bench:none; known: headline, cpu, gpu"):
        readme.generated("<!-- bench:none -->\n<!-- /bench -->")


def test_without_a_gpu_result_it_says_so(monkeypatch):
    monkeypatch.setattr(readme, "committed", lambda: [])
    assert "nothing has been measured" in readme.gpu()
    assert "GRPO; DPO; KTO; SFT" in readme.headline() and "<img" not in readme.headline()


def test_what_was_timed_is_not_among_what_was_not(monkeypatch):
    left = readme.headline().partition("Not timed")[2]
    for results in readme.committed():
        for r in results.results:
            if not results.on_cpu and r.seconds:
                assert f" {r.case.objective.upper()};" not in left
                assert f" {r.peer};" not in left


def test_a_note_on_some_of_a_peers_cases_is_not_lost():
    results = [Result(Case(o), "Liger chunked", seconds=1.0) for o in ("grpo", "dpo", "grpo")]
    assert readme._notes(results) == {"Liger chunked": note_on(results[1])} != {"Liger chunked": ""}
