"""What the pages show works: programs and snippets run, commands parse, samples of data are read,
links lead somewhere."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pages
import pytest
import torch
from torch import nn

import humanline as hl
from humanline import cli
from humanline.training.config import TrainConfig
from humanline.training.data import LAYOUTS, read_examples, read_questions

PYTHON = pages.blocks("python")
PROGRAMS = [block for block in PYTHON if block.is_program]
# those for TRL's trainers: tests/integrations/test_trl_pages.py; for several processes:
# tests/parallel/
SNIPPETS = [
    block for block in PYTHON if not (block.is_program or block.needs_trl or block.needs_ranks)
]
SAMPLES = pages.blocks("json")
LINES = [
    line.split("#")[0].strip() for block in pages.blocks("sh") for line in block.code.splitlines()
]


def ids(blocks):
    return [block.where for block in blocks]


def test_there_are_pages_programs_and_snippets():
    found = {str(page.relative_to(pages.ROOT)) for page in pages.pages()}
    beside = {"humanline", "humanline/integrations", "humanline/training", "kernels", "bench"}
    assert {f"{folder}/README.md" for folder in beside} < found
    assert PROGRAMS and len(SNIPPETS) >= 8 and len(SAMPLES) >= 5
    unknown = {block.language for block in pages.blocks_of_any_language()}
    assert unknown <= {"python", "sh", "json", "yaml"}, "a language that no test knows"


def test_the_front_page_is_short():
    assert len((pages.ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


@pytest.fixture(params=PROGRAMS, ids=ids(PROGRAMS))
def output(request, tmp_path):
    """The lines a program prints."""
    done = subprocess.run(
        [sys.executable, "-c", request.param.code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_the_programs_run_and_learn(output):
    margins = [float(re.search(r"margin (-?[\d.]+)", line)[1]) for line in output]
    assert margins[-1] > margins[0] + 5
    unclamped = {re.search(r"unclamped (\d+)%", line)[1] for line in output[1:]}
    assert len(unclamped) > 1  # or the clip had nothing to do


class Tiny(nn.Module):
    def __init__(self, vocab, width):
        super().__init__()
        self.embed, self.lm_head = nn.Embedding(vocab, width), nn.Linear(width, vocab, bias=False)

    def forward(self, ids):
        return self.embed(ids)


@pytest.fixture
def given():
    """What the snippets take as given: four sequences of six tokens, of which two are prompt."""
    B, T, V, H = 4, 6, 32, 16
    model = Tiny(V, H)
    input_labels = torch.randint(V, (B, T))
    input_labels[:, :2] = -100
    labels = hl.shift(input_labels)
    mask = labels != -100

    def score(model, batch):
        return hl.linear_token_logps(model(batch), model.lm_head.weight, hl.shift(batch))

    def loss_of(batch, ref):
        objective = hl.DPO(perception=hl.Clip())
        return objective.from_hidden(model(batch), model.lm_head.weight, hl.shift(batch), ref)[0]

    return {
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "loader": torch.utils.data.DataLoader(torch.randint(V, (8, T)), batch_size=2),
        "score": score,
        "loss_of": loss_of,
        "lm_head": model.lm_head,
        "hidden": torch.randn(B, T, H, requires_grad=True),
        "logits": torch.randn(B, T, V, requires_grad=True),
        "input_labels": input_labels,
        "labels": labels,
        "mask": mask,
        "policy_logps": torch.randn(B, T, requires_grad=True),
        "ref_logps": torch.randn(B, T),
        "advantages": torch.randn(B),
        "desirable": torch.tensor([True, False, True, False]),
    }


@pytest.mark.parametrize("block", SNIPPETS, ids=ids(SNIPPETS))
def test_a_snippet_runs(block, given):
    weights = [p.detach().clone() for p in given["model"].parameters()]
    exec(block.code, given)
    if "loss" in given:
        assert torch.isfinite(given["loss"]) and given["loss"].requires_grad
    if "optimizer.step()" in block.code:
        after = given["model"].parameters()
        assert any((p != q).any() for p, q in zip(weights, after, strict=True))


def test_the_bounds_found_leave_a_tenth_of_the_tokens_beyond(given):
    (block,) = [block for block in SNIPPETS if "quantile" in block.code]
    given["mask"][:] = True
    exec(block.code, given)
    _, stats = hl.GRPO(perception=given["perception"]).from_logps(
        *(given[name] for name in ("policy_logps", "ref_logps", "mask")), advantages=torch.ones(4)
    )
    assert abs(stats["humanline/unclamped"] - 0.9) < 1 / given["mask"].sum()


@pytest.mark.parametrize("line", [line for line in LINES if "humanline train" in line])
def test_a_command_to_train_parses(line):
    arguments = shlex.split(line[line.index("humanline train") :])[1:]
    args = vars(cli._parser().parse_args(arguments))
    options = TrainConfig.__dataclass_fields__
    TrainConfig(**{name: value for name, value in args.items() if name in options})


@pytest.mark.parametrize("line", [line for line in LINES if line.startswith("python -m bench")])
def test_a_module_to_run_is_there(line):
    path = pages.ROOT / line.split()[2].replace(".", "/")
    assert path.with_suffix(".py").exists() or (path / "__main__.py").exists()


@pytest.mark.parametrize("sample", SAMPLES, ids=ids(SAMPLES))
def test_a_sample_of_data_is_read(sample, tmp_path):
    path = tmp_path / "sample.jsonl"
    path.write_text(sample.code)
    if sample.sample == "heldout":
        (question,) = read_questions(path)
        assert question.prompt and question.answer
    else:
        data = read_examples(path)
        assert data.kind == sample.sample and len(data.examples) == 1 and not data.skipped


def test_there_is_a_sample_of_each_kind():
    assert {sample.sample for sample in SAMPLES} == {*LAYOUTS.values(), "heldout"}


def cells(page, first):
    """The cells of the row that begins so in a page's table."""
    text = (pages.ROOT / page).read_text(encoding="utf-8")
    (row,) = [line for line in text.splitlines() if line.startswith(f"| {first}")]
    return [cell.strip() for cell in row.strip("|").split("|")]


def written(bounds):
    return ", ".join(f"{x:g}".replace("-", "−") for x in bounds)


def test_the_defaults_are_those_of_the_code():
    page = "humanline/README.md"
    assert cells(page, "`hl.Clip()`")[1] == written(hl.Clip().bounds)
    train = TrainConfig()
    bounds, sync_every = cells(page, "`humanline train`")[1:3]
    assert bounds == written((train.log_eps_P, train.log_eps_R))
    assert sync_every == str(train.sync_every)


def anchors(page):
    """What GitHub calls a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", pages.pages(), ids=lambda page: str(page.relative_to(pages.ROOT)))
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'<img src="([^"]+)"', text)
    for link in links:
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = Path(page.parent / name).resolve() if name else page
        assert target.exists() and target.is_relative_to(pages.ROOT), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", pages.pages(), ids=lambda page: str(page.relative_to(pages.ROOT)))
def test_files_that_are_named_are_there(page):
    named = r"`((?:tests|bench|humanline|kernels)/[\w/.-]+\.(?:py|json|sh))`"
    for name in re.findall(named, page.read_text(encoding="utf-8")):
        assert (pages.ROOT / name).exists(), name
