"""`bench/gpu.sh` works before there is a GPU: its reduced form, taken up where time ran out."""

import json
import os
import subprocess
import sys

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


def test_no_gpu_no_full_run(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = gpu_sh("--output", tmp_path)
    assert done.returncode == 2 and "finds no GPU" in done.stderr and not any(tmp_path.iterdir())


def test_out_of_time_says_how_to_go_on(tmp_path):
    done = gpu_sh("--reduced", "--minutes", "0", "--output", tmp_path)
    assert done.returncode == 75 and f"--output {tmp_path} goes on" in done.stderr


def test_the_reduced_form_runs_start_to_end(tmp_path):
    done = gpu_sh("--reduced", "--output", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    checks = [json.loads(line) for line in (tmp_path / "checks.jsonl").read_text().splitlines()]
    assert all(check.get("passed", True) for check in checks)
    names = {check["check"].split(",")[0] for check in checks}
    assert {"correctness", "opcheck token_logps", "CUDA graphs of token_logps"} <= names
    results = Results.load(tmp_path / "results.json").results
    assert {r.peer for r in results if r.seconds} == {"bare GEMMs", "eager", "humanline"}
    assert "bfloat16" in (tmp_path / "configurations.jsonl").read_text()

    log = (tmp_path / "log").read_text()
    again = gpu_sh("--reduced", "--output", tmp_path)  # all is done: nothing runs
    assert again.returncode == 0 and (tmp_path / "log").read_text() == log


def test_a_failed_step_is_told_and_does_not_stop_the_others(tmp_path):
    before = "environment kernel-tests correctness opcheck graphs bench-smoke configurations"
    (tmp_path / "done").write_text("\n".join(before.split()) + "\n")
    done = gpu_sh("--reduced", "--output", tmp_path)  # no results.json to show
    assert done.returncode == 1 and "FAILED: report model" in done.stderr
