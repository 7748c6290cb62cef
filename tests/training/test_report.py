"""What a run says of itself: before it starts, while it trains, at the end; and what it keeps."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from toy import make_model_folder, without_timing

from humanline.training import curves, evaluate, header, model, report, run, state
from humanline.training.config import OBJECTIVES, TrainConfig
from humanline.training.ranks import ALONE

ROOT = Path(__file__).parents[2]


def metrics(output):
    return [json.loads(line) for line in without_timing(output)]


def facts_of(text):
    """The header's lines, by their first word."""
    return dict(re.match(r"(\w+) +(.*)", line).groups() for line in text.splitlines()[:7])


def test_the_header_says_what_will_be_done(options, tmp_path, capsys):
    options |= {"eval_limit": 5, "max_steps": 3, "save_steps": 2}
    run.train(options, tmp_path / "out")
    facts = facts_of(capsys.readouterr().out)
    assert [*facts] == ["model", "data", "objective", "perception", "device", "folder", "plan"]
    name = Path(options["model"]).name
    assert facts["model"] == f"{name}: 19,584 weights in float32, all of them train"
    # 24 prompts with two right and two wrong completions each
    assert facts["data"].endswith(": 48 pairs, read 0.25 times; 5 questions are held out")
    assert facts["objective"] == (
        "dpo (loss sigmoid, beta 0.1): 3 steps of 4 pairs, learning rate 0.001"
    )
    assert facts["perception"] == (
        "log-ratios are clipped to [-0.05, 0.05]; the reference is the policy one step ago "
        "(lookahead)"
    )
    assert facts["device"] == "cpu, 1 threads" or facts["device"].startswith("NVIDIA")
    assert f"{tmp_path / 'out'}; checkpoints of about 229" in facts["folder"]
    assert facts["plan"].startswith("measure, train 3 steps, measure again")


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"sync_every": 0}, "the policy before training (adapter)"),
        ({"sync_every": 4}, "the policy up to 4 steps ago (lookahead)"),
        ({"perception": "none", "reference": "copy"}, "none; the reference is the policy one step"),
        ({"perception": "rejection"}, "tokens are rejected at random"),
        ({"loss_type": "sft", "perception": "none"}, "none: the loss has no reference"),
    ],
    ids=str,
)
def test_the_header_names_the_reference(options, expected):
    assert expected in header._perception(TrainConfig(**options))


def test_answers_before_and_after_are_shown(options, tmp_path, capsys):
    options |= {"max_steps": 30, "learning_rate": 3e-3, "eval_limit": 4}
    summary = run.train(options, tmp_path / "out")
    out = capsys.readouterr().out
    was, now = (summary[when]["samples"] for when in ("before", "after"))
    assert len(was) == len(now) == evaluate.SAMPLES and was != now
    for one in (*was, *now):
        assert " ".join(one["text"].split()) in out and f"{one['prompt']} (right: " in out
    after = summary["after"]
    assert f"{report.share(summary['before'])} before, {report.share(after)} after (n = 4" in out


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("answers", [True, False], ids=["answers", "preferences"])
def test_preferences_against_the_policy_before_training(answers, objective, options, tmp_path):
    """The last is what the two models say of the pairs, and step by step it comes to that."""
    if not answers:
        del options["heldout"], options["max_new_tokens"]
        options |= {"heldout_fraction": 0.25, "eval_limit": 5}
    options |= {"objective": objective, "max_steps": 8, "log_eps_P": -1.0, "log_eps_R": 1.0}
    summary = run.train(options, tmp_path / "out")
    since = summary["after"]["since_start"]
    found = {
        r["step"] + 1: r["since_start/margins"]
        for r in metrics(tmp_path / "out")
        if len(r) and "since_start/margins" in r
    }
    assert [*found] == [1, 2, 4, 8]
    assert found[8] == pytest.approx(since["margin"], abs=1e-9) and found[8] != 0
    assert since["of"] == ("training" if answers else "held-out")
    assert since["pairs"] == (evaluate.WATCHED if answers else min(5, evaluate.WATCHED))
    before = json.loads((tmp_path / "out/before.json").read_text())
    chosen, rejected = before["since_start"]["logps"]
    assert len(chosen) == len(rejected) == since["pairs"]
    if not answers:  # which are measured one by one
        assert chosen == pytest.approx(before["logps"]["chosen"], abs=1e-5)
        reward = summary["after"]["by implicit reward"]
        scale = TrainConfig(**options).beta or 1.0
        assert since["margin"] * scale == pytest.approx(reward["mean_margin"], abs=1e-6)
        assert since["preferred"] == reward["correct"]


def test_it_looks_ever_more_rarely():
    due = [done for done in range(1, 10_001) if evaluate.is_due(done)]
    assert due == [2**i for i in range(14)]


def test_curves_are_drawn_of_every_kind_of_run(tmp_path):
    config, rows = TrainConfig(), [{"step": 0, "loss": 1.0}, {"step": 1, "loss": 0.5}]
    before = {"measured": "greedy answers", **evaluate.proportion(0, 7)}
    since = {"pairs": 2, "of": "training", "preferred": 1, "margin": 0.5}
    for i, measured in enumerate(
        [(None, None), (before, before), (before, before | {"since_start": since})]
    ):
        curves.draw(tmp_path / f"{i}.png", config, rows, *measured)
        assert (tmp_path / f"{i}.png").stat().st_size > 10_000


def test_running_means():
    assert curves.running_mean((1.0, 2.0, 6.0), 2) == [1.0, 1.5, 4.0]


def test_times_and_counts_are_readable():
    assert report.time_left(50, 2.0, 40) == (
        "The 50 steps to go take about 2 min, then about 40 s to measure again."
    )
    assert report.time_left(5000, 3.0, 0) == "The 5000 steps to go take about 4.2 h."
    assert report.duration(0.01) == "1 s" and report.duration(89.4) == "89 s"
    assert report.count(134_515_008) == "135 million" and report.count(7e9) == "7 billion"
    assert report.count(19_584) == "19,584"


# What is kept


@pytest.mark.parametrize("options_of_dtype", [{}, {"dtype": "bfloat16"}, {"bf16": True}], ids=str)
def test_bfloat16_in_bfloat16_out(options_of_dtype, options, tmp_path):
    """The weights are rounded once, at the end, and it is the rounded model that is measured."""
    folder = make_model_folder(tmp_path / "model", dtype=torch.bfloat16)
    del options["heldout"], options["max_new_tokens"]
    options |= {"model": str(folder), "heldout_fraction": 0.25, **options_of_dtype}
    summary = run.train(options, tmp_path / "out")
    saved = load_file(tmp_path / "out/model/model.safetensors")
    assert {w.dtype for w in saved.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out/model/config.json").read_text())["dtype"] == "bfloat16"
    before = {k: w.float() for k, w in load_file(folder / "model.safetensors").items()}
    assert any((saved[k].float() != w).any() for k, w in before.items())

    again = options | {"model": str(tmp_path / "out/model"), "max_steps": 1}
    same = run.train(again, tmp_path / "again")["before"]  # the same pairs, of the model as saved
    after = summary["after"]
    assert same["accuracy"] == after["accuracy"] and same["n"] == after["n"]


def test_float32_in_float32_out(options, tmp_path):
    run.train(options | {"max_steps": 1}, tmp_path / "out")
    saved = load_file(tmp_path / "out/model/model.safetensors")
    assert {w.dtype for w in saved.values()} == {torch.float32}


@pytest.mark.parametrize(
    "content, expected",
    [
        ('{"dtype": "bfloat16"}', torch.bfloat16),
        ('{"torch_dtype": "float16"}', torch.float16),
        ('{"text_config": {"dtype": "bfloat16"}}', torch.bfloat16),
        ('{"dtype": "auto"}', None),
        ("{}", None),
    ],
)
def test_the_dtype_of_a_folder(content, expected, tmp_path):
    (tmp_path / "config.json").write_text(content)
    assert model.folder_dtype(tmp_path) is expected


@pytest.fixture
def stopped(options, tmp_path, monkeypatch):
    """A run that was stopped after its last step; with what a checkpoint should take."""

    def stop(**more):
        output = tmp_path / "-".join(map(str, more.values()))
        with monkeypatch.context() as patch:
            patch.setattr(run, "_finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                run.train(options | more, output)
        (path,) = output.glob("checkpoint-*/state.pt")
        config = TrainConfig(**options | more)
        policy = model.load_model(Path(options["model"]), config, torch.device("cpu"))
        return output, path.stat().st_size, state.expected_bytes(policy, config)

    return stop


@pytest.mark.parametrize("reference", ["lookahead", "copy"])
def test_checkpoints_without_moments_are_a_third(reference, stopped, options, tmp_path):
    _, always, said = stopped(save_optimizer="always", reference=reference)
    _, never, said_never = stopped(save_optimizer="never", reference=reference)
    weights = load_file(Path(options["model"]) / "model.safetensors")
    assert sum(w.nbytes for w in weights.values()) * 2 == pytest.approx(always - never, rel=0.1)
    for found, expected in ((always, said), (never, said_never)):
        overhead = found - expected  # names and numbers: a few hundred bytes a tensor
        assert 0 <= overhead < 1500 * len(weights) * 4


def test_a_run_without_moments_goes_on_and_says_so(options, tmp_path, capsys, monkeypatch):
    options |= {"max_steps": 6, "save_steps": 2, "save_optimizer": "never", "eval_limit": 0}
    del options["max_new_tokens"], options["heldout"]
    write = report.Metrics.write

    def interrupted(self, row):
        write(self, row)
        if row["step"] == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(report.Metrics, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run.train(options, tmp_path / "out")
    run.train({"save_optimizer": "always"}, tmp_path / "out", resume=True)
    assert "Adam's moments begin anew" in capsys.readouterr().err
    run.train(options, tmp_path / "whole")
    ours, whole = metrics(tmp_path / "out"), metrics(tmp_path / "whole")
    assert ours[:5] == whole[:5] and ours[5] != whole[5]
    assert all(math.isfinite(row["loss"]) for row in ours)


def test_the_page_says_what_the_default_model_takes():
    """Its shapes are those of the model that is fetched; no weights are made."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        policy = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=49152,
                hidden_size=576,
                intermediate_size=1536,
                num_hidden_layers=30,
                num_attention_heads=9,
                num_key_value_heads=3,
                tie_word_embeddings=True,
            )
        )
    assert sum(p.numel() for p in policy.parameters()) == 134_515_008
    page = (ROOT / "humanline/training/README.md").read_text(encoding="utf-8")

    def takes(**options):
        config = TrainConfig(**options)
        adapted = model._with_lora(policy, config) if config.lora else policy
        return report.size(state.expected_bytes(adapted, config))

    for row, expected in {
        "the model at the end": takes(save_optimizer="never"),
        "a checkpoint": takes(),
        "with `--save-optimizer never`": takes(save_optimizer="never"),
        "with `--lora`": takes(lora=True),  # last: it changes the model
    }.items():
        assert f"| {row} | {expected} |" in page, (row, expected)
    assert f": {evaluate.WATCHED} pairs, scored after 1, 2, 4, 8, … steps" in page
    assert f"(default: {TrainConfig().save_steps} steps)" in page


# What is not said


def test_other_libraries_say_nothing(options, tmp_path):
    """Nor do bars fill a file that nobody watches: each is drawn at its start and at its end."""
    arguments = ["train", "--output-dir", str(tmp_path / "out"), "--gradient-checkpointing"]
    for name, value in (options | {"max_steps": 30}).items():
        arguments += ["--" + name.replace("_", "-"), str(value)]
    environment = {n: v for n, v in os.environ.items() if n != "PYTHONWARNINGS"}
    done = subprocess.run(
        [sys.executable, "-m", "humanline", *arguments],
        capture_output=True,
        text=True,
        env=environment | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    said = [line.strip() for line in re.split(r"[\r\n]+", done.stderr) if line.strip()]
    for line in said:
        assert re.match(r"humanline: [A-Zw].*\.|(answering held-out questions|training): ", line), (
            line
        )
    assert sum(line.startswith("training: ") for line in said) <= 4
    sentences = [line for line in done.stdout.splitlines()[7:] if not re.match("asked| ", line)]
    assert len(sentences) >= 4 and all(line.endswith(".") for line in sentences), done.stdout


def test_alone_is_no_launch():
    assert ALONE.first and ALONE.gather("anything", 3) == [3]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere rusage is all there is")
def test_peak_memory_is_of_this_process_and_not_of_the_one_that_started_it():
    code = (
        "import torch; from humanline.training.report import peak_memory_bytes\n"
        "print(peak_memory_bytes(torch.device('cpu')))"
    )
    child = "print(subprocess.run([sys.executable, '-c', code], stdout=-1, text=True).stdout)"
    parent = f"import subprocess, sys; code = {code!r}; held = b'1' * {2 * 10**9}; {child}"
    done = subprocess.run([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True)
    assert 10**8 < int(done.stdout) < 10**9
