"""Running: results saved as they come, taken up again; a crash is one peer's result."""

import json
import os
import subprocess
import sys

import pytest

from bench import run as runner
from bench.__main__ import main
from bench.cases import Case
from bench.measure import Result, measure
from bench.peers import Peer, peers_of
from bench.report import terminal
from bench.run import Results, run
from humanline.training.errors import UserError

CASE = Case("grpo", "logits", tokens=16, vocab=100)
QUIET = {"say": lambda line: None, "repeats": 1}


def test_a_run_is_saved_and_taken_up_again(tmp_path):
    path = tmp_path / "results.json"
    assert run([CASE], Results.open(path, "cpu"), "cpu", only=["eager"], **QUIET)
    (eager,) = Results.load(path).results
    assert eager.seconds > 0 and eager.gradient_error < 1e-6 and eager.loss_error < 1e-6

    assert run([CASE], Results.open(path, "cpu"), "cpu", only=["eager", "humanline"], **QUIET)
    again = Results.load(path).results
    assert again[0] == eager and [r.peer for r in again] == ["eager", "humanline"]
    text = terminal(Results.load(path))
    assert CASE.name in text and "humanline" in text and "1.00" in text


def test_out_of_time_starts_nothing(tmp_path):
    results = Results.open(tmp_path / "results.json", "cpu")
    assert not run([CASE], results, "cpu", only=["eager"], seconds=0, **QUIET)
    assert results.results == []


def test_a_crash_is_the_result_of_the_peer_it_happened_in():
    peers = peers_of(CASE)[:1]
    # A device that torch does not know kills the child before its first result.
    (result,) = runner._in_child(CASE, peers, "nonsense", 1)
    assert result.peer == peers[0].name and "RuntimeError" in result.why_not


def test_a_child_that_dies_is_left_behind(monkeypatch):
    monkeypatch.setattr(runner.sys, "executable", "/bin/false")
    (result,) = runner._in_child(CASE, peers_of(CASE), "cpu", 1)
    assert result.why_not.startswith("died with exit code 1")


def test_results_of_another_machine_are_not_mixed(tmp_path):
    path = tmp_path / "results.json"
    results = Results.open(path, "cpu")
    results.environment["device"] = "another"
    results.add(Result(CASE, "eager", "skipped"))
    with pytest.raises(UserError, match=r"measured with .*another.*name another file"):
        Results.open(path, "cpu")


def test_results_name_every_commit_they_were_measured_at(tmp_path, monkeypatch):
    here = runner.environment("cpu")
    for commit in ("one", "two", "two", "one"):
        monkeypatch.setattr(runner, "environment", lambda _, c=commit: here | {"commit": c})
        results = Results.open(tmp_path / "results.json", "cpu")
        results.save()
    assert results.environment["commit"] == "one, two"


@pytest.mark.parametrize("text", ["", "[]", '{"environment": {}, "results": [{"case": {}}]}'])
def test_no_file_of_results(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UserError, match=r"x\.json is no file of benchmark results"):
        main(["--show", str(tmp_path / "x.json")])


@pytest.mark.parametrize("change", [lambda x: 3 * x, lambda x: x + 1], ids=["gradient", "loss"])
def test_a_wrong_peer_is_not_timed(change):
    eager = next(p for p in peers_of(CASE) if p.name == "eager")
    wrong = Peer("wrong", lambda batch: change(eager.run(batch)), "logits")
    result = measure(wrong, CASE, "cpu", 1)
    assert result.why_not.startswith("wrong: Errors(loss=") and result.seconds is None


def test_a_peers_note_stands_beside_its_numbers():
    liger = Result(Case("dpo"), "Liger chunked", seconds=1.0, peak_bytes=3)
    assert "computes the reference of DPO and KTO too, 1F more" in terminal(Results({}, [liger]))


def test_the_cases_run_under_pytest_benchmark():
    pytest.importorskip("pytest_benchmark")
    command = [sys.executable, "-m", "pytest", "-q", "bench/test_speed.py", "-k", "not compile"]
    done = subprocess.run(
        [*command, "--benchmark-disable"],
        env=os.environ | {"HUMANLINE_SUITE": "smoke"},
        cwd=runner.ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "passed" in done.stdout, done.stdout[-2000:]


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux's /proc")
def test_memory_is_that_of_the_tensors():
    case = Case("grpo", "logits", tokens=1024, vocab=32_000)  # 131 MB of logits
    copy = next(p for p in peers_of(case) if p.name == "bare copy")
    result = measure(copy, case, "cpu", 1)
    assert result.peak_bytes == pytest.approx(case.logits_bytes, rel=0.1)
    assert result.recorded_peak_bytes == pytest.approx(case.logits_bytes, rel=0.01)


def test_results_survive_json():
    result = Result(CASE, "eager", seconds=1.0, all_seconds=(1.0, 2.0), peak_bytes=3)
    assert Result.from_json(json.loads(json.dumps(runner.asdict(result)))) == result
