"""Learning itself: on offline completions, humanline GRPO must learn what its offline twin cannot.

The smallest slice of bench/study. ``world.pt`` is a base model (its Pass@1 about .55) and an
offline pool as ``bench/study/task.py`` builds them, in half the bytes.
"""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench.study import analyse, arms, run, task
from humanline.reference import ReferenceCopy

OFFLINE, HUMANLINE = arms.Arm("GRPO", "offline", 0), arms.Arm("GRPO", "humanline", 1)
SEED, RATE, BOUND, MARGIN = 0, 1e-4, 0.02, 0.05


class ReferenceAfterStep(ReferenceCopy):
    """The mistake: a copy of the policy taken after the optimizer step instead of before it."""

    def before_step(self):
        self.step += 1

    def _scores(self, batches):
        if self.step:
            self._sync()
        return super()._scores(batches)


@pytest.fixture(scope="module")
def config():
    return run.read_config()


@pytest.fixture(scope="module")
def world():
    stored = torch.load(Path(__file__).parent / "world.pt")
    base = {name: weight.float() for name, weight in stored.pop("base").items()}
    return task.World(base, **{name: numbers.long() for name, numbers in stored.items()})


def pass_at_1(arm, world, config, reference_class=ReferenceCopy):
    bound = BOUND if arm.perception == "clip" else None
    return arms.train(arm, world, config, SEED, RATE, bound, reference_class)["pass@1"][-1]


def test_humanline_learns_what_its_offline_twin_cannot(world, config):
    offline = pass_at_1(OFFLINE, world, config)
    assert pass_at_1(HUMANLINE, world, config) > offline + MARGIN
    # Synced after the step, k=1, the ratio is 1 for ever: nothing is clipped, nothing gained.
    assert pass_at_1(HUMANLINE, world, config, ReferenceAfterStep) < offline + MARGIN


def one_step(config):
    return config | {"training": config["training"] | {"steps": 1, "evaluate_every": 1}}


def test_every_arm_runs_and_the_same_again(world, config):
    config = one_step(config)
    for arm in arms.grid(config):
        one, again = (arms.train(arm, world, config, SEED, RATE, BOUND) for _ in range(2))
        assert one["pass@1"] == again["pass@1"]
        assert one["pass@1"][1] != one["pass@1"][0]
        assert (one["sampled"] > 0) == arm.online


def test_a_run_that_diverges_counts_as_right_on_no_prompt(world, config):
    broken = replace(world, base={k: v * float("nan") for k, v in world.base.items()})
    assert arms.train(OFFLINE, broken, one_step(config), SEED, RATE)["pass@1"][-1] == 0


def test_pairs_are_right_and_wrong_answers_to_one_prompt(world):
    generator = torch.Generator().manual_seed(0)
    dpo = arms.Arm("DPO", "offline", 0)
    numbers = world.prompts[:64]
    batch = arms.make_batch(dpo, numbers, world.pool[:64], generator)
    (chosen, rejected), (one, other) = batch["answers"].chunk(2), batch["prompts"].chunk(2)
    assert torch.equal(one, other)
    digits = one[:, [0, 1, 3, 4]]
    sums = digits @ torch.tensor([10, 1, 10, 1])
    value = torch.tensor([100, 10, 1])
    assert torch.equal(chosen @ value, sums)
    assert (rejected @ value != sums).all()


def test_pass_at_1_is_the_share_of_right_samples(world, config):
    policy = task.Adder(config["task"]["width"], config["task"]["layers"])
    policy.load_state_dict(world.base)
    numbers = world.held_out.repeat(20)
    samples = task.sample(policy, task.prompt_ids(numbers), torch.Generator().manual_seed(0))
    share = (samples == task.right_answers(numbers)).all(1).double().mean().item()
    exact, _ = task.accuracy(policy, world.held_out)
    assert abs(share - exact) < 0.014  # 4 standard errors of 20,000 samples


def test_statistics():
    assert analyse.sign_flip_test([1.0, 2.0, 3.0, 4.0, 5.0]) == 2 / 32
    assert analyse.sign_flip_test([1.0, -1.0]) == 1
    assert analyse.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    mean, half = analyse.interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (mean, half) == pytest.approx((3.0, 1.9634), abs=1e-3)  # t.interval of scipy


def test_results_of_another_configuration_are_refused(tmp_path, config):
    path = tmp_path / "final.jsonl"
    path.write_text(json.dumps({"recipe": run.recipe(config)}) + '\n{"half a li')
    assert len(run.read_results(path, config)) == 1
    other = config | {"objectives": {}}
    with pytest.raises(SystemExit, match="another configuration"):
        run.read_results(path, other)


def test_committed_results_are_those_of_the_committed_configuration(config):
    lines = run.read_results(run.RESULTS / "final.jsonl", config)
    results = analyse.Results(config, lines)
    assert analyse.report(results, config) == (run.HERE / "REPORT.md").read_text(encoding="utf-8")
    for name in ("accuracy.png", "curves.png", "log-ratios.png", "rates.png"):
        assert results.digest.encode() in (run.HERE / name).read_bytes(), name


def test_an_interrupted_study_goes_on_where_it_stopped(tmp_path, config, monkeypatch):
    """Runs that the file holds are not run again; a killed run's half line is."""
    executed = []

    def execute(one):
        executed.append(one)
        arm, seed, lr, bound = one
        return {"arm": str(arm), "seed": seed, "lr": lr, "bound": bound} | {
            "recipe": run.recipe(config),
            "pass@1": [0.5],
        }

    monkeypatch.setattr(run, "execute", execute)
    monkeypatch.setattr(run, "build", lambda seed: None)
    monkeypatch.setattr(run, "workers", ThreadPoolExecutor)
    path, runs = tmp_path / "final.jsonl", [(OFFLINE, seed, 1e-4, None) for seed in range(4)]
    first = run.execute_all(runs[:2], path, 1)
    with path.open("a") as file:
        file.write('{"arm": "GRPO offline", "seed": 2, "lr"')
    assert run.execute_all(runs, path, 1)[:2] == first
    assert sorted(executed, key=runs.index) == runs
    assert len(run.read_results(path, config)) == 4
