"""What `gpu.sh` runs: findings taken up again, kernels all reached, ncu's table read."""

import json
import re
from argparse import Namespace

import pytest
import torch

pytest.importorskip("triton")

from triton.runtime.interpreter import GridExecutor

from bench import run as runner
from bench.cases import QWEN, Case
from bench.gpu import smoke
from bench.gpu import steps as gpu
from bench.measure import Result
from bench.peers import peers_of
from bench.run import ROOT, Results, run
from humanline.ops.backend import interpreting

CASE = Case("grpo", "logits", tokens=16, vocab=100)
needs_interpreter = pytest.mark.skipif(not interpreting(), reason="needs Triton's interpreter")


@pytest.fixture
def args(tmp_path):
    return Namespace(reduced=True, output=tmp_path)


def checks(args):
    return [json.loads(line) for line in (args.output / "checks.jsonl").read_text().splitlines()]


def test_correctness_goes_on_and_writes_nothing_twice(args, monkeypatch):
    cases = [Case("grpo", "logits", 16, vocab=v) for v in (100, 101, 102)]
    monkeypatch.setattr(gpu, "_is_telling", lambda case: True)
    compared, broken = [], {101, 102}

    def compare(case):
        compared.append(case.vocab)
        if case.vocab == 102:
            raise KeyboardInterrupt  # as when time runs out
        if case.vocab in broken:
            raise RuntimeError("no such luck")
        return {"passed": True}

    monkeypatch.setattr(gpu, "_cases", lambda reduced: cases)
    monkeypatch.setattr(gpu, "_compared", compare)
    monkeypatch.setattr(gpu, "_far_offsets", lambda args: True)
    with pytest.raises(KeyboardInterrupt):
        gpu.correctness(args)
    assert [c["passed"] for c in checks(args)] == [True, False]
    assert checks(args)[1]["error"] == "RuntimeError: no such luck"

    cases[2] = Case("grpo", "logits", 16, vocab=103)
    assert not gpu.correctness(args)
    broken.clear()
    assert gpu.correctness(args) and gpu.correctness(args)
    assert compared == [100, 101, 102, 103, 101, 101]  # what failed comes last
    assert [(c["case"], c["passed"]) for c in checks(args)] == [
        (cases[i].name, True) for i in (0, 2, 1)
    ]


def test_an_exception_of_correctness_on_a_lost_device_ends_it(args, monkeypatch):
    def compare(case):
        raise RuntimeError("illegal access")

    monkeypatch.setattr(gpu, "_compared", compare)
    monkeypatch.setattr(gpu, "device_is_lost", lambda device: True)
    assert not gpu.correctness(args)
    assert len(checks(args)) == 1


@pytest.fixture
def launched(monkeypatch):
    """(module, name) of the kernels launched, in order."""
    found, call = [], GridExecutor.__call__

    def note(self, *args, **kwargs):
        found.append((self.fn.__module__, self.fn.__name__))
        return call(self, *args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", note)
    return found


@needs_interpreter
def test_ncu_is_asked_for_the_launches_that_the_reader_expects(args, launched):
    assert gpu.kernels(args)
    pattern = re.search(r"--kernel-name 'regex:(.*?)'", (ROOT / "bench/gpu.sh").read_text())[1]
    counted = [name for _, name in launched if re.search(pattern, name)]
    expected = [gpu.LAUNCHES[c.objective] for c in gpu._counted(reduced=True)]
    assert counted == [name for names in expected for name in names]


@needs_interpreter
@pytest.mark.parametrize("step", [gpu.small, smoke.smoke])
def test_the_sanitizer_and_the_first_minute_see_every_kernel(args, launched, step):
    assert step(args)
    kernels = {
        (f"humanline.kernels.{path.stem}", name)
        for path in (ROOT / "humanline/kernels").glob("*.py")
        for name in re.findall(r"(\w+)\[\(.*\)\]\(|(\w+)\[grid\]\(", path.read_text())
        for name in filter(None, name)
    }
    assert len(kernels) > 10 and set(launched) == kernels


@needs_interpreter
def test_the_first_minute_finds_a_wrong_kernel_and_goes_on(args, monkeypatch):
    original = smoke._losses

    def losses(batch, *backend):
        for loss in original(batch, *backend):
            yield loss if backend else 1.1 * loss

    checked = [("wrong", lambda: smoke.kernels(Case("dpo", "logits", 16, 8, 30, "bfloat16")))]
    checked += [("broken", lambda: 1 / 0), ("good", lambda: {"passed": True})]
    monkeypatch.setattr(smoke, "_losses", losses)
    monkeypatch.setattr(smoke, "_checks", lambda args: checked)
    assert not smoke.smoke(args)
    assert [c["passed"] for c in checks(args)] == [False, False, True]
    assert checks(args)[1]["error"].startswith("ZeroDivisionError")


def test_about_thirty_cases_of_bfloat16_come_first_and_none_twice():
    first = [c for c in gpu._cases(False) if gpu._is_telling(c)]
    assert 20 <= len(first) <= 40 and {c.dtype for c in first} == {"bfloat16"}
    kinds = {(c.objective, c.entry, c.vocab % 8 == 0) for c in first}
    assert len(kinds) == 4 * 2 * 2
    assert any(c.frozen_head for c in first) and any(c.active < 1 for c in first)
    assert any(map(gpu._is_telling, gpu._cases(True)))


def test_both_steps_of_correctness_take_every_case_once(args, monkeypatch):
    compared = []
    monkeypatch.setattr(gpu, "_compared", lambda case: compared.append(case) or {"passed": True})
    monkeypatch.setattr(gpu, "_far_offsets", lambda args: True)
    assert gpu.correctness(args)
    first = len(compared)
    assert gpu.correctness_rest(args)
    assert sorted(c.name for c in compared) == sorted(c.name for c in gpu._cases(True))
    assert all(map(gpu._is_telling, compared[:first]))


def test_ours_and_eager_share_the_truth(monkeypatch):
    made, original = [], gpu.truth
    monkeypatch.setattr(gpu, "truth", lambda *a: made.append(a) or original(*a))
    assert gpu._compared(CASE)["passed"] and len(made) == 1


def test_opcheck_takes_every_registered_op():
    sources = [p.read_text() for p in (ROOT / "humanline/ops").rglob("*.py")]
    registered = {x for s in sources for x in re.findall(r'custom_op\("humanline::(\w+)"', s)}
    assert {op for _, op, *_ in gpu._op_calls()} == registered


NCU = """\
==PROF== Connected to process 42 (/usr/bin/python3)
==PROF== Profiling "humanline_token_loss" - 0: 0%....50%....100% - 1 pass
"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size",\
"Grid Size","Device","CC","Section Name","Metric Name","Metric Unit","Metric Value"
"""
LINE = (
    '"{id}","42","python3","127.0.0.1","{kernel}","1","7","(1024, 1, 1)","(16, 1, 1)","0","9.0",'
    '"Command line profiler metrics","{metric}","{unit}","{value:,}"\n'
)


def ncu_csv(kernels, read, written):
    text = NCU
    for i, kernel in enumerate(kernels):
        for metric, unit, value in (
            ("dram__bytes_read.sum", "byte", read),
            ("dram__bytes_write.sum", "byte", written),
            ("gpu__time_duration.sum", "ns", 12_345),
        ):
            text += LINE.format(id=i, kernel=kernel, metric=metric, unit=unit, value=value)
    return text + "==PROF== Disconnected from process 42\n"


def test_bytes_a_logit_from_the_table_of_ncu(args):
    cases = gpu._counted(reduced=True)
    logits = cases[0].tokens * cases[0].vocab
    kernels = [k for c in cases for k in gpu.LAUNCHES[c.objective]]
    (args.output / "ncu.csv").write_text(ncu_csv(kernels, read=2 * logits, written=logits))
    assert gpu.dram(args)
    found = json.loads((args.output / "ncu.json").read_text())
    assert found["logits"] == logits and len(found["launches"]) == len(kernels)
    assert found["launches"][0] == {
        "case": cases[0].name,
        "kernel": "humanline_token_loss",
        "read": 2.0,
        "written": 1.0,
        "total": 3.0,
        "nanoseconds": 12_345.0,
    }
    assert found["launches"][-1]["case"] == cases[-1].name


def test_other_launches_than_expected_are_kept_without_a_case_and_fail(args):
    (args.output / "ncu.csv").write_text(ncu_csv(["humanline_token_logps"], 100, 20))
    assert not gpu.dram(args)
    (launch,) = json.loads((args.output / "ncu.json").read_text())["launches"]
    assert launch["kernel"] == "humanline_token_logps" and "case" not in launch


def test_ncu_that_counted_nothing_fails(args):
    (args.output / "ncu.csv").write_text("==ERROR== ERR_NVGPUCTRPERM\n")
    assert not gpu.dram(args)


# A device that an illegal access has cost a process, as bench/run.py meets it


def test_a_child_leaves_when_its_device_is_lost(monkeypatch, capsys):
    def fail(*args):
        raise RuntimeError("illegal memory access")

    def turns(peers, *args, **options):
        for peer in peers:
            yield Result(CASE, peer.name).failed(RuntimeError("illegal memory access"))

    def leave(code):
        raise SystemExit(code)

    monkeypatch.setattr(runner, "measure_in_turn", turns)
    monkeypatch.setattr(torch.cuda, "synchronize", fail)
    monkeypatch.setattr(runner.os, "_exit", leave)
    names = [p.name for p in peers_of(CASE)]
    task = {"case": runner.asdict(CASE), "device": "cuda", "repeats": 1, "peers": names}
    task["beside_ours"] = True
    with pytest.raises(SystemExit, match=str(runner.LOST)):
        runner._child(task)
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith(runner.MARK)]
    assert names[0] in line and "illegal memory access" in line

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)  # an error that did not stick
    runner._child(task)
    assert capsys.readouterr().out.count(runner.MARK) == len(names)


def test_the_other_peers_get_a_child_of_their_own(tmp_path, monkeypatch):
    script = tmp_path / "child"
    told = Result(CASE, "NAME", "RuntimeError: illegal memory access").to_json()
    script.write_text(
        f"""#!/usr/bin/env python3
import json, os, sys
names = json.loads(sys.argv[-1])["peers"]
print({runner.MARK!r} + {json.dumps(told)!r}.replace("NAME", names[0]), flush=True)
os._exit({runner.LOST})
"""
    )
    script.chmod(0o755)
    monkeypatch.setattr(runner.sys, "executable", str(script))
    monkeypatch.setattr(runner, "does_not_fit", lambda case, device: None)
    results, names = Results({}), ["bare copy", "eager", "humanline"]
    assert run([CASE], results, "cuda", only=names, say=lambda line: None)
    assert [r.peer for r in results.results] == names
    assert all("illegal memory access" in r.why_not for r in results.results)


def test_who_dies_without_a_word_is_the_one_that_had_begun(tmp_path, monkeypatch):
    script = tmp_path / "child"
    script.write_text(f"#!/bin/sh\necho '{runner.BEGIN}eager'\nkill -SEGV $$\n")
    script.chmod(0o755)
    monkeypatch.setattr(runner.sys, "executable", str(script))
    (result,) = runner._in_child(CASE, peers_of(CASE), "cuda", 1)
    assert result.peer == "eager" and result.why_not.startswith("died with exit code -11")


def test_a_case_that_no_gpu_holds_is_said_before_anything_runs(monkeypatch):
    gpu = Namespace(total_memory=80 * 10**9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    monkeypatch.setattr(runner.Peer, "why_not", lambda *args: None)
    monkeypatch.setattr(runner, "_in_child", None)  # not reached
    fits, does_not = (Case("grpo", "logits", 2**k, vocab=QWEN, dtype="bfloat16") for k in (17, 18))
    assert runner.does_not_fit(fits, "cuda") is None
    assert runner.does_not_fit(does_not, "cpu") is None
    results = Results({})
    assert run([does_not], results, "cuda", say=lambda line: None)
    assert [r.peer for r in results.results] == [p.name for p in peers_of(does_not)]
    why_not = "does not fit: inputs and gradients take 159 GB, the GPU has 80 GB"
    assert {r.why_not for r in results.results} == {why_not}
    hidden = Case("grpo", "hidden", 2**20, 4096, QWEN, "bfloat16")
    assert runner.does_not_fit(hidden, "cuda") is None
