"""README.md's snippets for TRL's trainers run as they stand there, with a GPU and without."""

import re
from pathlib import Path

import pytest
import trl_tiny as tiny
from trl import DPOConfig, DPOTrainer

import humanline as hl
from humanline.integrations.trl import apply_humanline

README = Path(__file__).resolve().parents[2] / "README.md"
SECTION = re.search(
    r"^## In TRL's trainers\n(.*?)^## ", README.read_text(encoding="utf-8"), re.M | re.S
)[1]
SNIPPETS = re.findall(r"^```python\n(.*?)^```", SECTION, re.M | re.S)


@pytest.fixture
def names(tmp_path, monkeypatch):
    """What the snippets take as given. They write into the folder they run in."""
    monkeypatch.chdir(tmp_path)
    return {
        "hl": hl,
        "apply_humanline": apply_humanline,
        "model": tiny.model(path=tmp_path / "model"),
        "tokenizer": tiny.tokenizer(),
        "pairs": tiny.pairs(4),
        "scored": tiny.groups(2, size=8),
    }


def test_there_are_snippets():
    assert len(SNIPPETS) == 2


@pytest.mark.parametrize("snippet", SNIPPETS, ids=["DPO", "GRPO without generation"])
def test_it_runs_and_trains(names, snippet):
    before = {name: p.detach().clone() for name, p in names["model"].named_parameters()}
    exec(snippet, names)
    after = dict(names["model"].named_parameters())
    assert any((after[name].cpu() != p).any() for name, p in before.items())


@pytest.mark.parametrize(
    "line",
    [
        "apply_humanline(trainer, perception=hl.Clip(-0.5, 0.5))",
        "with hl.patch_trl(): trainer.train()",
    ],
)
def test_a_line_of_the_table_runs(names, line, tmp_path):
    assert f"`{line}`" in SECTION
    trainer = tiny.build(DPOTrainer, DPOConfig, tmp_path, names["pairs"], names["model"])
    exec(line, names | {"trainer": trainer})
    trainer.train()
    assert trainer.state.global_step > 0
