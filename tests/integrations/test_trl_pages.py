"""The pages' snippets for TRL's trainers run as they stand there, with a GPU and without."""

import re

import pages
import pytest
import torch
import trl_tiny as tiny
from trl import DPOConfig, DPOTrainer

from humanline.integrations.trl.trainers import HumanlineOptions

SNIPPETS = [block for block in pages.blocks("python") if block.needs_trl]
PAGE = (pages.ROOT / "humanline/integrations/README.md").read_text(encoding="utf-8")


@pytest.fixture
def names(tmp_path, monkeypatch):
    """What the snippets take as given. They write into the folder they run in."""
    monkeypatch.chdir(tmp_path)
    model = tiny.model(path=tmp_path / "model")
    return {
        "use_cpu": not torch.accelerator.is_available(),
        "model": model,
        "tokenizer": tiny.tokenizer(),
        "pairs": tiny.pairs(4),
        "labelled": tiny.labelled(4),
        "scored": tiny.groups(2, size=8),
        "trainer": tiny.build(DPOTrainer, DPOConfig, tmp_path, tiny.pairs(4), model),
    }


def test_there_are_snippets():
    assert {block.where.split(":")[0] for block in SNIPPETS} == {
        "README.md",
        "humanline/integrations/README.md",
    }
    assert len(SNIPPETS) == 6


@pytest.mark.parametrize("snippet", SNIPPETS, ids=[block.where for block in SNIPPETS])
def test_it_runs_and_trains(names, snippet):
    before = {name: p.detach().clone() for name, p in names["model"].named_parameters()}
    exec(snippet.code, names)
    after = dict(names["model"].named_parameters())
    assert any((after[name].cpu() != p).any() for name, p in before.items())


def test_the_defaults_are_those_of_the_code():
    options = HumanlineOptions()
    table = dict(re.findall(r"^\| `(\w+)`.*? \| ([^|]+) \|", PAGE, re.M))
    wanted = {
        "humanline": f"`{options.humanline}`",
        "log_eps_P": f"−{-options.log_eps_P:g}, {options.log_eps_R:g}",
        "sync_every": str(options.sync_every),
        "gradient_tolerance": f"{options.gradient_tolerance:g}",
    }
    assert {name: table[name] for name in wanted} == wanted
