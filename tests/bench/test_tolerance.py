"""The study of what training notices of a tolerance: its runs, on a tiny model; its report."""

import json
import re
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from bench import readme
from bench.run import ROOT
from bench.study import analyse, tolerance, tolerance_report
from bench.study.run import read_config, read_results, recipe
from humanline.training import data, examples, model, score
from humanline.training.config import DEFAULTS, TrainConfig
from humanline.training.run import train

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
from toy import assistant, make_model_folder, toy_rows, write_jsonl

SHOWN = "**shown**"


@pytest.fixture
def config():
    return read_config(tolerance.CONFIG)


# The runs


def test_the_runs_of_a_seed_differ_in_the_tolerance_alone_and_come_before_the_next(config):
    stages = tolerance.runs(config)
    every = [run for stage in stages for run in stage]
    assert len(every) == len(set(every)) == 80
    assert [seed for *_, seed in every] == sorted(16 * config["seeds"])
    assert {run[2] for stage in stages[::2] for run in stage} == {0}
    assert all(run[2] > 0 for stage in stages[1::2] for run in stage)
    given = [TrainConfig(**tolerance.options(run, config)).as_dict() for run in every[:16]]
    for of_setting in zip(given[:4], given[4:8], given[8:12], given[12:], strict=True):
        values = {name: {str(options[name]) for options in of_setting} for name in of_setting[0]}
        assert [name for name, found in values.items() if len(found) > 1] == ["gradient_tolerance"]


def test_the_rules_say_what_is_run(config):
    """Half the default number of steps, and the defaults of humanline; seeds of their own."""
    options = [TrainConfig(**tolerance.options(run, config)) for run in tolerance.runs(config)[0]]
    assert all(2 * o.max_steps == DEFAULTS[o.objective]["max_steps"] for o in options)
    assert {(o.perception, o.log_eps_R, o.sync_every) for o in options} == {("clip", 0.05, 1)}
    assert len(data.read_questions(data.DEFAULT_HELDOUT)) == 240
    tried = {int(seed) for seed in re.findall(r"seed (\d+)", config["rules"]["tried before"])}
    assert tried and not tried.intersection(config["seeds"])


@pytest.fixture
def tiny(tmp_path, monkeypatch, config):
    """The study with a tiny model and data, and few steps; its configuration."""
    folder = make_model_folder(tmp_path / "model")
    monkeypatch.setattr(model, "default_model", lambda: folder)
    rows = toy_rows()
    questions = [{"prompt": r["prompt"], "answer": r["answer"]} for r in rows]
    monkeypatch.setattr(data, "DEFAULT_TRAIN", write_jsonl(tmp_path / "train.jsonl", rows))
    monkeypatch.setattr(data, "DEFAULT_HELDOUT", write_jsonl(tmp_path / "held.jsonl", questions))
    monkeypatch.setattr(tolerance, "WORLDS", tmp_path / "runs")
    config["training"]["options"] |= {"max_steps": 6, "warmup_steps": 1}
    for options in config["training"]["weights"].values():
        options["learning_rate"] = 0.01
    config["tolerances"] = [0, 0.5]
    config["seeds"] = [0, 1, 2]
    path = tmp_path / "tolerance.json"
    path.write_text(json.dumps(config))
    monkeypatch.setattr(tolerance, "CONFIG", path)
    monkeypatch.setattr(tolerance, "LINES", tmp_path / "tolerance.jsonl")
    tolerance.base.cache_clear()
    tolerance.worth_before.cache_clear()
    yield config
    tolerance.base.cache_clear()
    tolerance.worth_before.cache_clear()


@pytest.mark.parametrize("objective", ["dpo", "grpo"])
def test_a_run_is_told_whole_and_is_the_same_again(tiny, objective):
    exact, some, again = (
        tolerance.execute((objective, tolerance.FULL, d, 1)) for d in (0, 0.5, 0.5)
    )
    assert len(exact["loss"]) == len(exact["grad_norm"]) == 6
    assert exact["loss"][0] == some["loss"][0] and exact["loss"] != some["loss"]
    assert exact["after"] != exact["before"] == some["before"]
    assert 0 < some["kept_columns"] < 1 and "kept_columns" not in exact
    own, others = exact["head"]["own"], exact["head"]["others"]
    assert own["rows"] + others["rows"] == 31 and own["cosine"] == others["cosine"] == 1
    assert others["rows"] == others["moved"] > 0  # the softmax moves them all
    assert 0.1 < some["head"]["own"]["cosine"] < 1
    assert {k: v for k, v in some.items() if k != "seconds_training"} == {
        k: v for k, v in again.items() if k != "seconds_training"
    }


def test_a_head_that_was_compared_elsewhere_is_trained_once_more(tiny):
    run = ("dpo", tolerance.FULL, 0.5, 0)
    tolerance.execute(("dpo", tolerance.FULL, 0, 0))
    first = tolerance.execute(run)["head"]
    [path] = tolerance.WORLDS.iterdir()
    path.unlink()
    assert tolerance.execute(run)["head"] == first and path.exists()


def test_with_lora_the_head_is_not_told_of(tiny):
    found = tolerance.execute(("grpo", "LoRA", 0.5, 0))
    assert "head" not in found and found["kept_columns"] < 1
    assert found["after"] != found["before"]  # the adapter was measured, not its base


def test_the_worth_of_a_model(tiny, tmp_path):
    """Against log-probs as training takes them, and answers written token by token."""
    options = {"loss_type": "sft", "perception": "none", "learning_rate": 0.01, "eval_limit": 0}
    policy = tolerance.load(train(options, tmp_path / "trained")["trained"])
    tokenizer = model.load_tokenizer(model.default_model())
    rows = [
        data.Example(q.prompt, (assistant(q.answer),), (1.0,), q.where)
        for q in data.read_questions(data.DEFAULT_HELDOUT)
    ]
    sequences = tokenizer.sequences([(row, 0) for row in rows])
    batch = examples.make_batch(sequences, tokenizer.tokenizer.pad_token_id)
    found, right = tolerance.worth(policy), []
    sampled = score.sequence_logps(policy, batch).exp().mean().item()
    assert found["pass@1"] == pytest.approx(sampled, abs=1e-5)
    for tokens in sequences:
        text = torch.tensor([tokens.prompt])
        for _ in tokens.completion:
            text = torch.cat([text, policy(text).logits[:, -1:].argmax(-1)], 1)
        right.append(text[0, len(tokens.prompt) :].tolist() == tokens.completion)
    assert 0 < sum(right) < len(right)
    assert found["greedy"] == pytest.approx(statistics.mean(right), abs=1e-5)


def test_own_tokens_are_those_read_and_those_to_be_written(tiny):
    run = ("dpo", tolerance.FULL, 0, 0)
    vocabulary = model.load_tokenizer(model.default_model()).tokenizer.get_vocab()
    found = tolerance.tokens(TrainConfig(**tolerance.options(run, tiny)), len(vocabulary))
    assert found[[vocabulary[word] for word in ("+", "=", "user")]].all()
    assert found[[vocabulary[str(number)] for number in range(8, 19)]].any()  # no prompt has these
    assert not found[[vocabulary[word] for word in ("a", "system", "<unk>")]].any()


def test_rows_that_moved():
    exact = torch.tensor([[3.0, 0.0], [0.0, 0.0], [0.0, 4.0]])
    change = torch.tensor([[3.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    found = tolerance.moved(change, exact)
    assert found == {"rows": 3, "moved": 1, "norm": 3.0, "cosine": 0.6}


def test_an_interrupted_study_goes_on(tiny, monkeypatch):
    """With what is missing, in the order of seeds; half a line is none."""
    ran = []

    def execute(run):
        ran.append(run)
        return line(run, tiny)

    monkeypatch.setattr(tolerance, "execute", execute)
    monkeypatch.setattr(tolerance, "workers", ThreadPoolExecutor)
    every = [run for stage in tolerance.runs(tiny) for run in stage]
    there = [json.dumps(line(run, tiny)) for run in every[:5]]
    tolerance.LINES.write_text("\n".join([*there, '{"objective": "dp']))
    tolerance.run_all(tiny, 1)
    assert ran == every[5:]
    lines = read_results(tolerance.LINES, tiny)
    assert sorted(map(tolerance.key, lines)) == sorted(every)
    tolerance.run_all(tiny, 1)
    assert len(ran) == len(every) - 5


# The report


def line(run, config, worth=0.5, greedy=0.6):
    _, weights, tolerance_, seed = run
    found = dict(zip(tolerance.NAMES, run, strict=True)) | {"recipe": recipe(config)}
    found |= {"device": "a CPU", "torch": "2.13.0", "seconds_training": 60.0}
    found |= {"before": {"pass@1": 0.23, "greedy": 0.3}, "after": {"pass@1": worth}}
    found["after"]["greedy"] = greedy
    found |= {"loss": [0.7 + seed / 100, 0.6 + tolerance_], "grad_norm": [2.0, 1.0]}
    if tolerance_:
        found["kept_columns"] = 0.1
    if weights == tolerance.FULL:
        own = {"rows": 40, "moved": 40, "norm": 2 + tolerance_, "cosine": 1 - 100 * tolerance_}
        found["head"] = {"own": own, "others": own | {"rows": 60}}
    return found


def found_with(config, worth, only=lambda run: True):
    """The runs, of which ``worth(run)`` is what a run is worth."""
    every = [run for stage in tolerance.runs(config) for run in stage if only(run)]
    return tolerance_report.Runs([line(run, config, worth(run)) for run in every], config)


def less_from(least, by, setting=None):
    """Worth that is less by ``by`` from a tolerance on, in one setting or all."""

    def worth(run):
        objective, weights, tolerance_, seed = run
        hit = tolerance_ >= least and setting in (None, (objective, weights))
        return 0.5 + seed / 10 + seed * tolerance_ / 10 - by * hit

    return worth


def test_the_largest_tolerance_that_costs_nothing_is_recommended(config):
    margin, (_, small, middle, large) = config["analysis"]["margin"], config["tolerances"]
    assert found_with(config, less_from(1, 0)).recommended() == large
    assert found_with(config, less_from(large, 2 * margin)).recommended() == middle
    assert found_with(config, less_from(small, 2 * margin)).recommended() is None
    assert found_with(config, less_from(small, -margin)).recommended() == large
    # One setting that is worse is enough, though the mean is within the margin.
    one = found_with(config, less_from(middle, 2 * margin, ("grpo", "LoRA")))
    assert one.said(one.settings, middle) == SHOWN and one.recommended() == small
    # A larger one that does well does not excuse a smaller one that does not.
    odd = found_with(config, lambda run: 0.5 - 2 * margin * (run[2] == middle))
    assert odd.said(odd.settings, large) == SHOWN and odd.recommended() == small


def test_differences_are_paired_by_seed(config):
    """Seeds are far apart, and yet each setting's interval is narrow."""
    found = found_with(config, less_from(config["tolerances"][-1], 0.01))
    text = tolerance_report.report(found)
    assert "| DPO, all weights | 0.003 | 5 | 10.0% | -0.009 ± 0.001 | **shown** |" in text
    assert (
        "| DPO, all weights | 0.003 | 5 | 0.691 ± 0.197 | 0.600 ± 0.000 | 1.500 ± 0.000 |" in text
    )
    assert "a tolerance of up to 0.003 is recommended" in text and "Unfinished" not in text


def test_the_report_says_what_is_missing(config):
    nothing = tolerance_report.report(tolerance_report.Runs([], config))
    assert "**Unfinished: 0 of 80 runs are done." in nothing and "|" not in nothing
    last = config["seeds"][-1]
    some = found_with(config, less_from(1, 0), lambda run: run[3] < last)
    text = tolerance_report.report(some)
    assert "**Unfinished: 64 of 80 runs are done." in text and "seeds are missing" in text
    assert SHOWN not in text and some.recommended() is None
    # Of one seed, its own values; of a seed without δ = 0, no difference.
    single = found_with(config, less_from(1, 0), lambda run: run[3] == 0 and run[2] != 0)
    assert single.differences(single.settings, 0.001, tolerance_report.greedy) == []
    assert "| all 4 | 0.001 | 0 | 10.0% |  | not run yet |  |" in tolerance_report.report(single)


def test_the_heads_rows_are_told_beside_those_of_no_tolerance(config):
    text = tolerance_report.report(found_with(config, less_from(1, 0)))
    row = "| DPO | 0.003 | 5 | others | 60 | 66.67% | 2.6e-01 | 1.002 ± 0.000 | 0.700 ± 0.000 |"
    assert row in text and text.count("| others |") == 2 * len(config["tolerances"])
    told = "66.67% at δ = 0.0003 (cosine 0.97 to 0.97), 66.67% at δ = 0.001 (cosine 0.90 to 0.90)"
    assert f"66.67% at δ = 0, {told}" in text


def test_the_figure_is_drawn_of_whatever_there_is(config, tmp_path, monkeypatch):
    monkeypatch.setattr(analyse, "HERE", tmp_path)
    for seeds in (1, 5):
        found = found_with(config, less_from(1, 0), lambda run, seeds=seeds: run[3] < seeds)
        tolerance_report.draw(found)
        drawn = (tmp_path / tolerance_report.FIGURE).read_bytes()
        assert tolerance_report.digest(found).encode() in drawn


def test_the_committed_report_is_that_of_the_committed_runs(config):
    found = tolerance_report.Runs(read_results(tolerance.LINES, config), config)
    written = (tolerance_report.HERE / tolerance_report.REPORT).read_text(encoding="utf-8")
    command = "run: python -m bench.study.tolerance_report"
    assert tolerance_report.report(found) == written, command
    figure = tolerance_report.HERE / tolerance_report.FIGURE
    assert not found.counted[0] or tolerance_report.digest(found).encode() in figure.read_bytes()


def test_the_page_of_benchmarks_has_what_holds(config):
    found = tolerance_report.Runs(read_results(tolerance.LINES, config), config)
    assert readme.tolerance().startswith(tolerance_report.conclusion(found))


def test_the_page_of_calls_recommends_the_same(config):
    found = tolerance_report.Runs(read_results(tolerance.LINES, config), config)
    page = (ROOT / "humanline/README.md").read_text(encoding="utf-8")
    assert f"could show at up to {found.recommended():g}, in the mean" in page
