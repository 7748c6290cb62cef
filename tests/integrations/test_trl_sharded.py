"""Models sharded over two processes, by FSDP2 and by DeepSpeed ZeRO-3, train as whole ones do.

Losses, gradient norms and weights are those of one process with all the rows of a step.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import trl_tiny as tiny
from torch.testing import assert_close
from trl_sharded import CASES, METHODS, MODELS, OF_ENGINE, RESUMED, SPLIT, WORLDS, read, result

SCRIPT = Path(__file__).with_name("trl_sharded.py")
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    for name in MODELS:
        tiny.model(name).save_pretrained(folder / name)
    return folder


def launched(folder, world):
    """The exit code, None after a hang, and what the processes said."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    options = {"capture_output": True, "text": True, "env": environment}
    try:
        # Of a hang: by estimate it takes two minutes on a free machine.
        done = subprocess.run([*LAUNCH, SCRIPT, folder, world], timeout=900, **options)
    except subprocess.TimeoutExpired as hung:
        return None, f"{hung}: {(hung.stderr or b'').decode()}"
    return done.returncode, done.stderr


@pytest.fixture(scope="module")
def ran(folder):
    """Runs the cases of a world in two processes; starting them is what takes time."""
    outputs = {}

    def run(world):
        if world == "deepspeed" and importlib.util.find_spec("deepspeed") is None:
            pytest.skip("DeepSpeed is not installed")
        if world not in outputs:
            outputs[world] = launched(folder, world)
        code, said = outputs[world]
        assert code == 0, said[-3000:]

    return run


@pytest.fixture(scope="module")
def in_one(folder):
    """Results of cases in one process, each once."""
    results = {}

    def run(name):
        if name not in results:
            results[name] = result(CASES[name].train(folder, "one", 1))
        return results[name]

    return run


RUNS = [
    pytest.param(world, engine, name, id=f"{engine}-{name}")
    for world, engines in WORLDS.items()
    for engine in engines
    for name in OF_ENGINE[engine]
    if CASES[name].options.get("humanline", True)
    and (engine not in ("ddp", "zero2") or CASES[name].method != "KTO")
]


@pytest.mark.parametrize(("world", "engine", "name"), RUNS)
def test_it_trains_as_one_process_does(folder, ran, in_one, world, engine, name):
    ran(world)
    two = read(folder, engine, name)
    if CASES[name].method == "KTO":  # whose mismatched pairs are of a process's own rows
        one = read(folder, "ddp" if world == "plain" else "zero2", name)
    else:
        one = in_one(name)
        assert one["processes"] == 1
    assert two["processes"] == 2
    assert min(unclamped for *_, unclamped in two["log"]) < 1
    assert max(norm for _, norm, _ in two["log"]) > 0.01
    assert_close(torch.tensor(two["log"]), torch.tensor(one["log"]), rtol=1e-4, atol=1e-5)
    assert_close(two["weights"], one["weights"], rtol=1e-4, atol=1e-5)


def test_trl_alone_trains_a_saved_head_with_wrong_gradients_under_fsdp2(folder, ran, in_one):
    """Which is why the case above is not a matter of course. If this fails, README says so no
    longer."""
    ran("plain")
    name = "trl's lora saved"
    two, one = read(folder, "fsdp2", name)["log"], in_one(name)["log"]
    assert two[0][0] == pytest.approx(one[0][0], rel=1e-4)  # the loss
    assert two[0][1] != pytest.approx(one[0][1], rel=0.1)  # the gradient's norm


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("axis", SPLIT)
def test_what_splits_rows_or_the_vocabulary_is_refused_before_training(folder, ran, axis, name):
    """By TRL already, if the method is GRPO. Where TRL alone does not fail, there is something to
    support."""
    ran(SPLIT[axis][0])
    errors = read(folder, axis, name)
    theirs = name == "grpo" and axis != "tp"
    assert errors["ours"].startswith("ValueError: ")
    assert ("GRPOTrainer does not support" if theirs else f"{axis}_size=2: ") in errors["ours"]
    assert "Error: " in errors["TRL's"]


@pytest.mark.parametrize(
    ("world", "engine", "name"),
    [
        pytest.param(world, engine, name, id=f"{engine}-{name}")
        for world, engines in WORLDS.items()
        for engine in engines
        for name in RESUMED.get(engine, ())
    ],
)
def test_a_resumed_run_goes_on_bit_for_bit(folder, ran, world, engine, name):
    ran(world)
    parts = [read(folder, engine, f"{name} resumed {rank}") for rank in range(2)]
    for part in parts:
        assert part["resumed"]["last"] == part["whole"]["last"]
        for what in ("weights", "reference"):
            assert_close(part["resumed"][what], part["whole"][what], rtol=0, atol=0)
    if engine != "ddp":
        weights = (part["whole"]["weights"][0] for part in parts)
        assert not torch.equal(*weights)  # each rank's own
    names = {p.name for p in (folder / f"{engine} {name} resumed/checkpoint-2").glob("humanline*")}
    assert names == {f"humanline_reference_{rank}_of_2.pt" for rank in range(2)}


def test_a_run_is_not_resumed_on_another_number_of_processes(folder, ran):
    ran("plain")
    checkpoint = str(folder / "fsdp2 dpo adapter resumed/checkpoint-2")
    run = CASES["dpo adapter"].build(folder, "one", 1)
    with pytest.raises(
        ValueError, match=r"holds humanline_reference_0_of_2\.pt, .*resume with the"
    ):
        run.train(resume_from_checkpoint=checkpoint)
