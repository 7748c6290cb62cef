"""What the compiler makes of the kernels for GPUs that need not be here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPORT = """
import json, sys
from dataclasses import asdict
sys.path.insert(0, "bench")
import compile_report as c
print(json.dumps([asdict(c.compile_variant(n, "sm_90", {vocab}, "{dtype}")) for n in c.VARIANTS]))
"""


@pytest.fixture(scope="module", params=[(151936, "bf16"), (32000, "fp32")], ids=str)
def reports(request):
    vocab, dtype = request.param
    root = Path(__file__).parents[2]
    done = subprocess.run(  # another process: in this one the kernels may be interpreted
        [sys.executable, "-c", REPORT.format(vocab=vocab, dtype=dtype)],
        cwd=root,
        env={**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_no_kernel_spills(reports):
    assert {r["name"]: r["spills"] for r in reports if r["spills"]} == {}


ON_SEQUENCES = ("pairs", "sequences")  # which walk N floats, not rows of V


def test_aligned_rows_are_loaded_16_bytes_at_a_time(reports):
    of_rows = [r for r in reports if r["name"] not in ON_SEQUENCES]
    assert {r["name"]: r["load_bytes"] for r in of_rows if r["load_bytes"] < 16} == {}


def test_gradients_are_stored_16_bytes_at_a_time(reports):
    no_gradients = ("forward", "forward, entropy", *ON_SEQUENCES)
    writers = [r for r in reports if r["name"] not in no_gradients]
    assert writers
    assert {r["name"]: r["store_bytes"] for r in writers if r["store_bytes"] < 16} == {}


def test_a_program_of_1024_threads_fits_a_multiprocessor(reports):
    row_kernels = [r for r in reports if r["name"] not in ("scale", *ON_SEQUENCES)]
    assert {r["name"]: r["registers"] for r in row_kernels if r["registers"] > 64} == {}
