"""What the compiler makes of the kernels for GPUs that need not be here."""

import fcntl
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton

from bench.machine_code import row_kernels

ROOT = Path(__file__).parents[2]
# SASS instructions a logit that a row kernel may take, on sm_90 and on sm_100.
INSTRUCTIONS = {
    "token_loss": (14, 12),
    "log_sum_exp": (6.5, 6.5),
    "gradient": (8, 8),
    "head_softmax": (6.5, 6.5),
    "head_gradient": (8, 8),
}

REPORT = """
import json
from dataclasses import asdict
import bench.machine_code.compile_report as c
print(json.dumps([
    asdict(c.compile_variant(name, target, {vocab}, "{dtype}", {vocab} % 16 == 0))
    for target in {targets} for name in {kernels}
]))
"""


def compiled(**what):
    done = subprocess.run(  # another process: in this one the kernels may be interpreted
        [sys.executable, "-c", REPORT.format(**what)],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def compiled_once(tmp_path_factory, **what):
    """By the first of pytest's workers that asks; the others wait for it and read what it wrote."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # one of a run, which its workers share
    name = hashlib.sha256(repr(what).encode()).hexdigest()[:16]
    with (folder / f"compiled-{name}.json").open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        text = file.read()
        if not text:
            text = json.dumps(compiled(**what))
            file.write(text)
    return json.loads(text)


@pytest.fixture(scope="module", params=[(151936, "bf16"), (32000, "fp32")], ids=str)
def reports(request, tmp_path_factory):
    vocab, dtype = request.param
    of_rows = {"targets": ["sm_90"], "kernels": "c.VARIANTS"}
    return compiled_once(tmp_path_factory, vocab=vocab, dtype=dtype, **of_rows)


def test_no_kernel_spills(reports):
    assert {r["name"]: r["spills"] for r in reports if r["spills"]} == {}


@pytest.mark.parametrize(
    "vocab, dtype, targets, kernels",
    [
        (151937, "bf16", ["sm_80", "sm_90"], ("forward", "forward, entropy", "loss, entropy")),
        (50257, "fp32", ["sm_90"], ("forward", "backward")),
    ],
)
def test_odd_vocabularies_do_not_spill(vocab, dtype, targets, kernels):
    """Rows are loaded an element at a time there, which takes more registers."""
    reports = compiled(vocab=vocab, dtype=dtype, targets=targets, kernels=kernels)
    assert {(r["name"], r["target"]): r["spills"] for r in reports if r["spills"]} == {}
    assert {r["load_bytes"] for r in reports} == {2 if dtype == "bf16" else 4}


def test_between_gemms_odd_vocabularies_are_loaded_like_others():
    """Their rows are ours, padded to a multiple of 16."""
    blocks = [
        r
        for dtype in ("bf16", "fp32")
        for r in compiled(
            vocab=50257,
            dtype=dtype,
            targets=["sm_80", "sm_90"],
            kernels=("block, softmax", "block, softmax, all", "block, dz", "block, dz, all"),
        )
    ]
    assert {r["load_bytes"] for r in blocks} == {16}
    # Four elements: what a thread has loaded in float32.
    assert {r["store_bytes"] for r in blocks if "dz" in r["name"]} == {8, 16}
    assert {r["name"]: r["spills"] for r in blocks if r["spills"]} == {}


def test_no_kernel_spills_on_sm_80_but_a_label():
    """Two registers, once a row: so that two programs still fit a multiprocessor."""
    heavy = ("forward, entropy", "loss, entropy")
    reports = compiled(vocab=151936, dtype="bf16", targets=["sm_80"], kernels=heavy)
    spills = {r["name"]: r["spills"] for r in reports if r["spills"]}
    assert spills.pop("forward, entropy", 0) <= 2 and spills == {}
    assert {r["load_bytes"] for r in reports} == {16}


# What walks N floats, not rows of V.
ON_SEQUENCES = ("pairs", "sequences", "ratios", "statistics", "coefficients")
# What takes elements from anywhere in a row.
FROM_ANYWHERE = ("columns taken",)
# What is not a row a program.
TILES = ("scale", "energies", "masses", "rows put", "outer")


def test_aligned_rows_are_loaded_16_bytes_at_a_time(reports):
    of_rows = [r for r in reports if r["name"] not in (*ON_SEQUENCES, *FROM_ANYWHERE)]
    assert {r["name"]: r["load_bytes"] for r in of_rows if r["load_bytes"] < 16} == {}


def test_gradients_are_stored_as_many_elements_at_a_time_as_were_loaded(reports):
    """16 bytes; 8 of half-precision gradients of logits that are float32, between the GEMMs."""
    no_gradients = ("forward", "block, softmax", "energies", "masses", *FROM_ANYWHERE)
    writers = [
        r
        for r in reports
        if not r["name"].startswith(no_gradients) and r["name"] not in ON_SEQUENCES
    ]
    assert writers
    narrow = {r["name"]: r["store_bytes"] for r in writers if r["store_bytes"] < 16}
    assert set(narrow.values()) <= {8} and all(name.startswith("block, dz") for name in narrow)


def test_a_program_of_1024_threads_fits_a_multiprocessor(reports):
    no_rows = (*TILES, *FROM_ANYWHERE, *ON_SEQUENCES)
    row_kernels = [r for r in reports if r["name"] not in no_rows]
    assert {r["name"]: r["registers"] for r in row_kernels if r["registers"] > 64} == {}


@pytest.fixture(scope="module")
def gemms(tmp_path_factory):
    targets = ["sm_80", "sm_90", "sm_100", "gfx942"]
    what = {"vocab": 151936, "dtype": "bf16", "targets": targets, "kernels": "c.GEMMS"}
    return compiled_once(tmp_path_factory, **what)


@pytest.mark.parametrize("target", ["sm_90", "sm_100"])
def test_gemms_do_not_spill(target, gemms):
    on_target = [r for r in gemms if r["target"] == target]
    assert on_target
    assert {r["name"]: r["spills"] for r in on_target if r["spills"]} == {}


COMMITTED = row_kernels.reports()


def test_committed_reports_spill_nowhere_on_sm_90_and_sm_100():
    assert {version.rpartition(".")[0] for version in COMMITTED} == {"3.6", "3.7", "3.9"}
    for report in COMMITTED.values():
        spilled = [(r["name"], r["target"]) for r in report["results"] if r["spills"]]
        assert [(name, t) for name, t in spilled if t in ("sm_90", "sm_100")] == []
        assert len(report["results"]) % 4 == 0  # each kernel on each target


@pytest.mark.skipif(triton.__version__ not in COMMITTED, reason="no report is of this Triton")
def test_the_committed_report_is_of_the_code_as_it_is(reports, request):
    """README's table is made of it."""
    report = COMMITTED[triton.__version__]
    about = report["environment"]
    if (about["vocab"], about["dtype"]) != request.node.callspec.params["reports"]:
        return  # the other parameter
    now = {r["name"]: r for r in reports}
    then = {r["name"]: r for r in report["results"] if r["target"] == "sm_90"}
    assert {name: then.get(name) for name in now} == now, (
        "run: python -m bench.machine_code.compile_report "
        f"--json bench/results/compile-report/triton-{triton.__version__}.json"
    )


@pytest.mark.parametrize(
    "target, instruction",
    [("sm_80", "HMMA"), ("sm_90", "HGMMA"), ("sm_100", "tcgen05"), ("gfx942", "mfma")],
)
def test_gemms_run_on_tensor_cores(target, instruction, gemms):
    on_target = [r for r in gemms if r["target"] == target]
    assert on_target
    assert [r["name"] for r in on_target if instruction not in r["instructions"]] == []


@pytest.mark.parametrize("target", ["sm_90", "sm_100"])
def test_gemms_load_tiles_by_tma(target, gemms):
    # the sum over rows ends at a masked step, which a descriptor cannot make
    on_target = [r for r in gemms if r["target"] == target and r["name"] != "dW"]
    assert [r["name"] for r in on_target if "UTMALDG" not in r["instructions"]] == []


def test_float32_gemms_compile_without_spills():
    reports = compiled(vocab=32000, dtype="fp32", targets=["sm_90"], kernels="c.GEMMS")
    assert {r["name"]: r["spills"] for r in reports if r["spills"]} == {}
    assert not any("HGMMA" in r["instructions"] for r in reports)  # never rounded to TF32


@pytest.fixture(scope="module")
def ways(tmp_path_factory):
    """{(kernel, target): its report}"""
    names = {kernel: row_kernels.ROW_KERNELS[kernel][0] for kernel in INSTRUCTIONS}
    what = {"vocab": 151936, "dtype": "bf16", "targets": ["sm_90", "sm_100"]}
    found = compiled_once(tmp_path_factory, **what, kernels=tuple(names.values()))
    return {(k, r["target"]): r for k, name in names.items() for r in found if r["name"] == name}


def test_one_row_kernel_is_reported_alone(ways):
    command = ["-m", "bench.machine_code.compile_report", "--kernel", "log_sum_exp", "--json"]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    of = {"kernel": "log_sum_exp", "triton": triton.__version__}
    assert record == of | ways["log_sum_exp", "sm_90"]


@pytest.mark.parametrize("target", ["sm_90", "sm_100"])
@pytest.mark.parametrize("kernel", INSTRUCTIONS)
def test_a_row_s_way_through_the_chip(kernel, target, ways):
    """Instructions a logit; four 16-byte loads in flight; no shuffle in a loop, and a barrier only
    where the gradient is written over logits that are still to be read."""
    record = ways[kernel, target]
    assert 0 < record["instructions_per_element"] <= INSTRUCTIONS[kernel][target == "sm_100"]
    assert record["spills"] == 0
    assert len(record["loops"]) == (2 if kernel == "token_loss" else 1)
    for loop in record["loops"]:
        assert (loop["loads_before_use"], loop["load_bytes"]) == (4, 16)
        assert loop["instructions"] == sum(loop["pipes"].values())
        assert loop["elements"] == 4 * 16 // (4 if kernel.startswith("head") else 2)
        assert loop["shuffles"] == 0
        assert loop["barriers"] == (kernel == "head_gradient")
    assert record["bytes_in_flight"] >= 65_536
    assert 0 < record["fraction_of_bandwidth"] <= 1
