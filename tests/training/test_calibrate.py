"""--calibrate: the bounds of the clip from log-ratios that nothing clipped."""

import json
import math

import pytest

from humanline import cli
from humanline.training import calibrate, run
from humanline.training.config import OBJECTIVES
from humanline.training.errors import UserError


@pytest.fixture
def few(options):
    del options["max_steps"]
    return options | {"learning_rate": 0.01}


@pytest.mark.parametrize("how", [{}, {"padding_free": True}, {"gradient_accumulation_steps": 2}])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_quantiles_are_of_the_log_ratios_that_a_run_clips(objective, how, few, tmp_path, capsys):
    """A clip has nothing to do in the first step: in the second, bounds at a quantile leave that
    share of the tokens alone."""
    options = few | {"objective": objective} | how
    found = calibrate.calibrate(options, 2)
    bound, share = found["quantiles"][0.5] * (1 + 1e-4), math.ceil(0.5 * found["tokens"])
    clipped = {"max_steps": 2, "log_eps_P": -bound, "log_eps_R": bound}
    run.train(options | clipped, tmp_path / "out")
    second = json.loads((tmp_path / "out/metrics.jsonl").read_text().splitlines()[1])
    micro_batches = how.get("gradient_accumulation_steps", 1)
    assert second["humanline/rows"] == found["tokens"]
    tolerance = 1e-6 if micro_batches == 1 else 0.1  # the mean of two batches of unequal lengths
    assert second["humanline/unclamped"] == pytest.approx(share / found["tokens"], abs=tolerance)
    assert (
        found["log_eps_R"]
        == -found["log_eps_P"]
        == pytest.approx(found["quantiles"][0.9], rel=0.05)
    )
    out = capsys.readouterr().out
    assert f"--log-eps-P {found['log_eps_P']:g} --log-eps-R {found['log_eps_R']:g}" in out


def test_it_is_the_same_again_and_writes_nothing(few, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one, again = (calibrate.calibrate(few, 4) for _ in range(2))
    assert one == again and list(one["quantiles"].values()) == sorted(one["quantiles"].values())
    assert not list(tmp_path.iterdir())
    slower = calibrate.calibrate(few | {"learning_rate": 0.001}, 4)
    assert slower["log_eps_R"] < one["log_eps_R"]


@pytest.mark.parametrize(
    "change, steps, expected",
    [
        ({}, 1, "--calibrate must be at least 2 steps, got 1"),
        ({"max_steps": 5}, 4, "--max-steps has no effect: --calibrate N says how many"),
        ({"perception": "clip"}, 4, "--perception has no effect"),
        ({"log_eps_P": -0.1}, 4, "--log-eps-P has no effect"),
        ({"loss_type": "sft"}, 4, "--loss-type sft has no reference"),
        ({"learning_rate": 1e-30}, 4, "nothing to set bounds by"),
    ],
)
def test_what_cannot_be_calibrated_is_refused(change, steps, expected, few):
    with pytest.raises(UserError, match=expected):
        calibrate.calibrate(few | change, steps)


def test_several_processes_are_refused(few, monkeypatch):
    for name, value in {"WORLD_SIZE": 2, "RANK": 0, "LOCAL_RANK": 0}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "1")
    with pytest.raises(UserError, match="--calibrate works in one process"):
        calibrate.calibrate(few, 2)


def test_on_the_command_line(monkeypatch, capsys):
    called = []
    monkeypatch.setattr(calibrate, "calibrate", lambda *arguments: called.append(arguments))
    assert cli.main(["train", "--objective", "kto", "--calibrate"]) == 0
    assert cli.main(["train", "--calibrate", "7"]) == 0
    assert called == [({"objective": "kto"}, calibrate.STEPS), ({}, 7)]
    assert cli.main(["train", "--calibrate", "--output-dir", "x", "--resume"]) == 2
    expected = "--calibrate writes nothing: --output-dir, --resume has no effect"
    assert expected in capsys.readouterr().err
