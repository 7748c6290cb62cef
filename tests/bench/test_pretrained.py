"""The study on the pretrained model, without the model: its questions, rules and report."""

import json

import pytest

from bench.study import pretrained
from humanline.training import data


@pytest.fixture
def config():
    return json.loads(pretrained.CONFIG.read_text(encoding="utf-8"))


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
