"""`bench/gpu.sh` works before there is a GPU: its reduced form, taken up where time ran out.

Most of it needs no benchmark: a stand-in for Python notes what is run, and ends as it is told to.
"""

import json
import os
import shutil
import subprocess
import sys
import tarfile

import pytest
import torch

from bench.run import ROOT, Results


def gpu_sh(*arguments, **environment):
    return subprocess.run(
        [ROOT / "bench/gpu.sh", *arguments],
        env={**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
    )


def unpacked(output):
    """The folder of results in the archive, the one file there is."""
    assert [p.name for p in output.iterdir()] == ["gpu-results.tar.gz"]
    into = output.parent / f"{output.name}-unpacked"
    shutil.rmtree(into, ignore_errors=True)
    with tarfile.open(output / "gpu-results.tar.gz") as archive:
        archive.extractall(into, filter="data")
    (folder,) = into.iterdir()
    return folder


def test_no_gpu_no_full_run(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = gpu_sh("--output", tmp_path)
    assert done.returncode == 2 and "finds no GPU" in done.stderr and not any(tmp_path.iterdir())


def test_out_of_time_says_how_to_go_on(tmp_path):
    done = gpu_sh("--reduced", "--minutes", "0", "--output", tmp_path)
    assert done.returncode == 75 and f"--output {tmp_path} goes on" in done.stderr


def test_the_reduced_form_runs_start_to_end(tmp_path):
    output = tmp_path / "output"
    done = gpu_sh("--reduced", OUT=str(output))
    assert done.returncode == 0, done.stdout + done.stderr
    folder = unpacked(output)
    assert folder.name.startswith("reduced-on-cpu-")
    checks = [json.loads(line) for line in (folder / "checks.jsonl").read_text().splitlines()]
    assert checks[0]["check"].startswith("smoke, kernels")
    assert all(check.get("passed", True) for check in checks)
    names = {check["check"].split(",")[0] for check in checks}
    assert {"correctness", "far offsets", "row kernels", "every kernel on small shapes"} <= names
    assert {"opcheck token_logps", "CUDA graphs of token_logps"} <= names
    results = Results.load(folder / "results.json").results
    assert {r.peer for r in results if r.seconds} == {"bare GEMMs", "eager", "humanline"}
    assert "bfloat16" in (folder / "configurations.jsonl").read_text()
    profiled = (folder / "profile.jsonl").read_text()
    assert "grpo-hidden" in profiled and '"passed": false' not in profiled
    left_out = json.loads((folder / "left-out.jsonl").read_text())
    assert left_out["passed"] and 0 < left_out["kept"] < 1


def test_results_of_another_machine_are_not_gone_on_with(tmp_path):
    (tmp_path / "there").mkdir()
    another = '{"environment": {"device": "another"}, "results": []}'
    (tmp_path / "there/results.json").write_text(another)
    output = tmp_path / "output"
    output.mkdir()
    with tarfile.open(output / "gpu-results.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "there", "there")
    done = gpu_sh("--reduced", "--output", output)
    assert done.returncode == 2 and "measured with {'device': 'another'" in done.stderr
    folder = unpacked(output)
    assert [p.name for p in folder.iterdir()] == ["results.json"]  # nothing ran, nothing written
    assert (folder / "results.json").read_text() == another


def test_what_is_no_archive_is_refused(tmp_path):
    (tmp_path / "archive").write_text("not at all")
    done = gpu_sh("--reduced", "--from", tmp_path / "archive", "--output", tmp_path / "output")
    assert done.returncode == 2 and "is no archive of results" in done.stderr


def test_another_bare_machine_goes_on_from_the_archive_alone(run, tmp_path):
    assert run({"gpu correctness --": 75})[0].returncode == 75
    archive = (tmp_path / "output/gpu-results.tar.gz").rename(tmp_path / "carried.tar.gz")
    done, calls = run({}, "--reduced", "--from", archive)
    assert done.returncode == 0 and "gpu correctness --" in calls[0]
    steps = (unpacked(tmp_path / "output") / "done").read_text().splitlines()
    assert steps[:5] == ["smoke", "environment", "profile", "left-out", "bench-smoke"]


@pytest.fixture
def run(tmp_path):
    """Runs gpu.sh; returns it and its steps' commands. ``ends`` maps part of a command to how the
    command ends."""
    python, calls = tmp_path / "python", tmp_path / "calls"

    def run(ends, *options):
        cases = "".join(f"*'{part}'*) exit {code};;\n" for part, code in ends.items())
        note = 'echo "$*" >>"${0%/*}/calls"\n'
        python.write_text(f'#!/bin/sh\n{note}case "$*" in\n-c*) echo GPU;;\n{cases}esac\n')
        python.chmod(0o755)
        calls.write_text("")
        done = gpu_sh(*options or ["--reduced"], "--output", tmp_path / "output", PYTHON=python)
        asked = ("-c", "print", "-m bench.gpu machine")  # before any step
        lines = calls.read_text().splitlines()
        return done, [line for line in lines if not line.startswith(asked)]

    return run


def test_a_failed_step_is_told_and_tried_again_after_all_the_others(run):
    done, calls = run({"gpu graphs": 1, "gpu correctness --": 137})
    assert done.returncode == 1 and "FAILED: correctness graphs;" in done.stderr
    assert "bench.paper.model" in calls[-1]

    done, calls = run({"gpu graphs": 1})
    assert done.returncode == 1 and "FAILED: graphs;" in done.stderr
    assert ["gpu correctness --" in calls[0], "gpu graphs" in calls[1]] == [True, True]

    done, calls = run({})
    assert done.returncode == 0 and len(calls) == 1
    done, calls = run({})  # all is done: nothing runs
    assert done.returncode == 0 and calls == []


def test_a_failed_step_does_not_hold_up_what_time_left_over(run):
    assert run({"gpu correctness --": 1, "gpu ops": 75})[0].returncode == 75
    done, calls = run({})
    assert done.returncode == 1 and "FAILED: correctness;" in done.stderr
    assert "gpu ops" in calls[0] and not any("gpu correctness --" in c for c in calls)


def test_a_step_that_is_too_long_goes_on_after_the_others(run):
    done, calls = run({"gpu correctness --": 124})
    assert done.returncode == 75 and "gpu correctness --" in calls[-1]
    done, calls = run(
        {"gpu correctness --": 124, "gpu graphs": 124}
    )  # 124: killed by the time limit
    assert done.returncode == 75 and "gpu graphs" in calls[-1]

    done, calls = run({"gpu correctness --": 124})
    assert (
        done.returncode == 75
        and "bench.paper.model" in calls[-2]
        and "gpu correctness --" in calls[-1]
    )
    done, calls = run({})
    assert done.returncode == 0
    assert ["gpu graphs" in calls[0], "gpu correctness --" in calls[1]] == [True, True]


def test_a_step_that_saved_its_work_goes_on_at_once(run):
    done, calls = run({"--suite smoke": 75})
    assert done.returncode == 75 and "--suite smoke" in calls[-1]
    done, calls = run({})
    assert done.returncode == 0 and "--suite smoke" in calls[0]


def test_the_full_form_takes_the_most_telling_first(run):
    done, calls = run({}, "--minutes", "9")  # the stand-in finds a GPU
    assert done.returncode == 0, done.stderr
    assert "gpu smoke" in calls[0]
    order = [
        "gpu smoke",
        "gpu where_the_time_goes",
        "gpu left_out",
        "--suite gpu-headline",
        "gpu correctness --",
        "gpu graphs",
        "tests/kernels tests/ops",
        "--suite gpu-tokens",
        "gpu correctness_rest",
        "bench.paper.model",
    ]
    places = [next(i for i, call in enumerate(calls) if part in call) for part in order]
    assert places == sorted(places)
