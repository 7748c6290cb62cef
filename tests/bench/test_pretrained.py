"""The study on the pretrained model, without the model: its questions, rules and report."""

import json
from types import SimpleNamespace

import pytest
from torch import nn

from bench.study import pretrained
from bench.study.run import read_config, read_results
from humanline.training import data
from humanline.training.config import TrainConfig


@pytest.fixture
def config():
    return read_config(pretrained.CONFIG)


def numbers(prompt) -> frozenset[str]:
    return frozenset(prompt[-1]["content"].split(", "))


def test_tuning_questions_are_new_and_always_the_same():
    questions = pretrained.tuning_questions(50)
    used = {numbers(e.prompt) for e in data.read_examples(data.DEFAULT_TRAIN).examples}
    used |= {numbers(q.prompt) for q in data.read_questions(data.DEFAULT_HELDOUT)}
    drawn = [numbers(q.prompt) for q in questions]
    assert len(set(drawn)) == 50 and not used.intersection(drawn)
    assert all(int(q.answer) == max(map(int, numbers(q.prompt))) for q in questions)
    assert questions == pretrained.tuning_questions(50)


def test_a_policy_that_is_always_right_comes_to_an_end(monkeypatch):
    """A step samples so many prompts at most, and may have nothing to learn from."""
    monkeypatch.setattr(
        pretrained.arithmetic, "sample_batch", lambda *args, **options: [["right"] * 12]
    )
    monkeypatch.setattr(pretrained.arithmetic, "kept_texts", lambda tokenizer, texts: texts)
    monkeypatch.setattr(pretrained.arithmetic, "make_row", lambda row, texts: None)
    tokenizer = SimpleNamespace(tokenizer=SimpleNamespace(pad_token_id=0))
    policy, cost = nn.Linear(1, 1), {"sampled": 0}
    steps = pretrained.sampled_steps(policy, tokenizer, TrainConfig(), {}, 5, cost)
    assert [next(steps) for _ in range(3)] == [[], [], []] and cost["sampled"] == 3 * 5 * 12


def test_final_rates_come_of_the_tuning_runs(config):
    done = lines(config, lambda arm, seed, lr: lr if arm == "online" else -lr)
    runs = pretrained.final_runs(config, done)
    low, high = min(config["tuning"]["lrs"]), max(config["tuning"]["lrs"])
    assert {(arm, lr) for _, arm, _, lr in runs} == {
        ("offline", low),
        ("humanline", low),
        ("online", high),
    }
    assert len(runs) == len(config["objectives"]) * len(pretrained.ARMS) * len(config["seeds"])
    assert all(len(pretrained.questions_of(seed, config)) == 240 for seed in (0, 100))
    assert pretrained.questions_of(0, config) != pretrained.questions_of(100, config)


def lines(config, accuracy):
    done = {}
    tuning = config["tuning"]
    for objective in config["objectives"]:
        for arm in pretrained.ARMS:
            runs = [(tuning["seed"], lr) for lr in tuning["lrs"]]
            runs += [(seed, lr) for seed in config["seeds"] for lr in tuning["lrs"]]
            for seed, lr in runs:
                line = {"objective": objective, "arm": arm, "seed": seed, "lr": lr}
                line |= {"accuracy": accuracy(arm, seed, lr), "unclamped": 0.9, "sampled": 7}
                line |= {"cpu_seconds": 60, "device": "a CPU", "torch": "2.13.0"}
                done[pretrained.key(line)] = line
    return done


def test_of_equal_rates_the_smaller_one_is_taken(config):
    done = lines(config, lambda arm, seed, lr: 0.5 if lr in config["tuning"]["lrs"][1:3] else 0.4)
    assert pretrained.best_rate(done, config, "grpo", "offline") == config["tuning"]["lrs"][1]


def test_the_report_pairs_by_seed_and_names_rates_at_an_end(config):
    best = {"offline": 0.5, "humanline": 0.6, "online": 0.625}

    def accuracy(arm, seed, lr):
        rising = (lr if arm == "online" else -lr) * 1000
        return best[arm] + seed / 100 + (rising if seed == config["tuning"]["seed"] else 0)

    text = pretrained.report(lines(config, accuracy), config)
    assert "humanline − offline: +0.100 ± 0.000; humanline − online: -0.025 ± 0.000" in text
    assert "| online | 2e-05 (an end of the list) | 0.635 ± 0.025 |" in text
    assert text.count("10.0%") == 2 * len(pretrained.ARMS)


def test_an_objective_that_has_not_run_says_so(config):
    done = lines(config, lambda *_: 0.5)
    text = pretrained.report({k: r for k, r in done.items() if k[0] == "grpo"}, config)
    assert text.endswith("## DPO\n\nNot run yet.\n") and "| humanline |" in text


def test_the_committed_report_is_that_of_the_committed_runs(config):
    runs = {pretrained.key(r): r for r in read_results(pretrained.LINES, config)}
    written = (pretrained.HERE / pretrained.REPORT).read_text(encoding="utf-8")
    assert pretrained.report(runs, config) == written, "run: python -m bench.study.pretrained"


def test_the_pages_say_how_the_default_bounds_compare_with_those_of_the_rule(config):
    """One run each: the default's is, but for KTO, the study's with the same seed and rate."""
    by_rule = (pretrained.RESULTS / "defaults.jsonl").read_text(encoding="utf-8").splitlines()
    runs = {pretrained.key(r): r for r in read_results(pretrained.LINES, config)}
    root = pretrained.HERE.parents[1]
    page = (root / "humanline/README.md").read_text(encoding="utf-8")
    default = TrainConfig().log_eps_R
    shares = {"dpo": "beyond which {:.0%} of the tokens lay", "grpo": "({:.0%})"}
    for line in map(json.loads, by_rule):
        objective, seed, lr = line["objective"], line["seed"], line["learning_rate"]
        assert lr == TrainConfig(objective=objective).learning_rate
        assert f"±{default:g}" in page and f"±{line['log_eps_R']:g}" in page
        assert f"{line['accuracy'] * 100:.1f} %" in page
        if objective not in config["objectives"]:
            continue
        ours = runs[objective, "humanline", seed, lr]
        share = shares[objective].format(1 - ours["unclamped"]).replace("%", " %")
        assert f"{ours['accuracy'] * 100:.1f} %" in page and share in page
