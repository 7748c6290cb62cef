"""Runs of two processes: the numbers of one, whose batches are twice as large."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close
from toy import assistant, make_model_folder, without_timing, write_jsonl

from humanline.training import run
from humanline.training.errors import UserError

SCRIPT = Path(__file__).with_name("two_processes.py")
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]

SHORT = {"max_steps": 4, "learning_rate": 1e-3, "warmup_steps": 2, "log_eps_P": -0.5}
SHORT |= {"log_eps_R": 0.5, "save_steps": 0}
PLAIN = {"perception": "none", "log_eps_P": None, "log_eps_R": None}
ANSWERS = {"heldout": "HELDOUT", "eval_limit": 5, "per_device_eval_batch_size": 2}
ANSWERS |= {"max_new_tokens": 3}
KTO, GRPO = {"objective": "kto"}, {"objective": "grpo"}
TWICE = {"gradient_accumulation_steps": 2}

CASES = {
    "dpo": ANSWERS,
    "dpo, accumulated": TWICE | {"sync_every": 3, "reference": "copy"},
    "sft": {"loss_type": "sft"} | PLAIN,
    "kto": KTO | {"per_device_train_batch_size": 3},
    "kto, accumulated": KTO | TWICE | {"per_device_train_batch_size": 2, "padding_free": True},
    "grpo, bnpo": GRPO | TWICE | {"loss_type": "bnpo", "per_device_train_batch_size": 3},
    "grpo, dapo": GRPO | TWICE | {"loss_type": "dapo", "per_device_train_batch_size": 3},
    "lora": {"lora": True, "lora_r": 2, "reference": "adapter", "gradient_checkpointing": True},
    "fsdp": {"fsdp": True, "model": "UNTIED"} | TWICE | ANSWERS,
    "fsdp, copy": {"fsdp": True, "reference": "copy", "sync_every": 2},
    "fsdp, kto, adapter": {"fsdp": True, "reference": "adapter", "padding_free": True} | KTO,
    "fsdp, grpo, checkpointing": {"fsdp": True, "gradient_checkpointing": True} | GRPO,
    "fsdp, lora": {"fsdp": True, "lora": True, "lora_r": 2, "sync_every": 2},
    "fsdp, bfloat16 in and out": {"fsdp": True, "model": "BFLOAT16", "save_optimizer": "never"},
}

#: Runs that are stopped after step 2 and go on: what they end with is that of a run never stopped.
RESUMED = {
    "stopped": PLAIN | {"perception": "rejection", "sync_every": 3, "save_steps": 1},
    "stopped, fsdp": {"fsdp": True, "reference": "copy", "save_steps": 1},
}


def rows(n=30):
    """As many tokens as words, from one to five: unequally many on two ranks."""
    words = [str(i) for i in range(20)]

    def text(i, right):
        return " ".join(words[(i + j) % 20] for j in range(1 + (i * (3 if right else 2)) % 5))

    return [
        {
            "prompt": [{"role": "user", "content": f"{i % 13} + {i % 7} ="}],
            "completions": [assistant(text(i + k, k % 2)) for k in range(3)],
            "rewards": [float(k % 2) for k in range(3)],
        }
        for i in range(n)
    ]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    questions = [{"prompt": r["prompt"], "answer": str(i)} for i, r in enumerate(rows(7))]
    return {
        "MODEL": str(make_model_folder(folder / "tied")),
        "UNTIED": str(make_model_folder(folder / "untied", tie_word_embeddings=False)),
        "BFLOAT16": str(make_model_folder(folder / "bfloat16", dtype=torch.bfloat16)),
        "DATA": str(write_jsonl(folder / "data.jsonl", rows())),
        "HELDOUT": str(write_jsonl(folder / "heldout.jsonl", questions)),
    }


def options_of(case, files):
    options = {"model": "MODEL", "data": "DATA", **SHORT, **case}
    return {n: files.get(v, v) for n, v in options.items() if v is not None}


def arguments_of(options, output, *more):
    arguments = ["train", "--output-dir", str(output), *more]
    for name, value in options.items():
        arguments += ["--" + name.replace("_", "-")] + ([] if value is True else [str(value)])
    return arguments


class Launch:
    """Cases for one launch of two processes."""

    def __init__(self, folder):
        self.folder, self.cases, self.done = folder, [], None

    def add(self, name, options, what="", *more, said=None):
        output = self.folder / name
        arguments = arguments_of(options, output, *more)
        said = str(self.folder / "said" / (said or name))
        self.cases.append({"arguments": arguments, "what": what, "said": said})

    def start(self):
        command = [*LAUNCH, str(SCRIPT), json.dumps(self.cases)]
        self.done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=900,  # of a hang: it takes half a minute on a free machine
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        return self

    def said(self, name, rank, what="err"):
        path = self.folder / "said" / name / f"{what}{rank}"
        assert path.exists(), self.done.stderr[-3000:]
        return path.read_text()

    def code(self, name):
        codes = [self.said(name, rank, "code") for rank in (0, 1)]
        assert codes[0] == codes[1]
        return int(codes[0])


@pytest.fixture(scope="module")
def launch(files, tmp_path_factory):
    launch = Launch(tmp_path_factory.mktemp("two"))
    for name, case in CASES.items():
        launch.add(name, options_of(case, files))
    for name, case in RESUMED.items():
        launch.add(f"{name}, whole", options_of(case, files))
        launch.add(name, options_of(case, files), "stops")
        launch.add(name, {}, "", "--resume", said=f"{name}, on")
    plain = options_of({}, files)
    launch.add("no data", plain, "no data")
    launch.add("aot", options_of({"loss_type": "aot"}, files))
    launch.add("one gpu", plain | {"device": "cuda:0"})
    launch.add("misspelt", {}, "", "--data-dir", "x")
    launch.add("half", plain | {"save_steps": 1}, "stops")
    launch.add("slow", plain | {"ddp_timeout": 3}, "slow")
    launch.add("fails", plain | {"fsdp": True}, "fails")  # the last, with which the launch ends
    return launch.start()


def metrics(output):
    return [json.loads(line) for line in without_timing(output)]


def weights(output):
    (path,) = output.rglob("*.safetensors")
    return load_file(path)


@pytest.mark.parametrize("name", CASES)
def test_two_processes_are_one_with_twice_the_batch(name, launch, files, tmp_path):
    assert launch.code(name) == 0, launch.said(name, 0)
    options = options_of(CASES[name], files)
    own = run.TrainConfig(**options).per_device_train_batch_size
    options |= {"per_device_train_batch_size": 2 * own}
    options.pop("fsdp", None)
    one, output = run.train(options, tmp_path / "one"), launch.folder / name
    two = json.loads((output / "summary.json").read_text())
    for ours, theirs in zip(metrics(output), metrics(tmp_path / "one"), strict=True):
        for key in ("loss", "grad_norm", "learning_rate", "humanline/rows"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-7), key
    found, expected = weights(output), weights(tmp_path / "one")
    assert found.keys() == expected.keys()
    for key, weight in expected.items():
        # a weight on the edge between two bfloat16 numbers may fall on either side
        rtol = 1e-3 if weight.dtype == torch.float32 else 2**-7
        assert_close(found[key], weight, rtol=rtol, atol=2e-5, msg=lambda m, k=key: f"{k}: {m}")
    assert two["before"] == one["before"]
    assert two["after"].get("samples") == one["after"].get("samples")
    assert two["after"]["correct"] == one["after"]["correct"]
    gained = [r["after"]["since_start"]["margin"] for r in (two, one)]
    assert gained[0] == pytest.approx(gained[1], rel=1e-3, abs=1e-5)
    if "by implicit reward" in one["after"]:
        margin = [r["after"]["by implicit reward"]["mean_margin"] for r in (two, one)]
        assert margin[0] == pytest.approx(margin[1], rel=1e-3, abs=1e-6)
    assert launch.said(name, 1) == launch.said(name, 1, "out") == ""


@pytest.mark.parametrize("name", RESUMED)
def test_a_stopped_run_goes_on_as_if_nothing_had_happened(name, launch):
    assert launch.code(f"{name}, whole") == 0, launch.said(f"{name}, whole", 0)
    assert launch.code(name) == 130
    stopped = re.search("stopped and saved after ([123]) of 4 steps", launch.said(name, 0))
    assert stopped, launch.said(name, 0)
    assert launch.said(name, 1) == ""
    assert launch.code(f"{name}, on") == 0, launch.said(f"{name}, on", 0)
    whole, output = launch.folder / f"{name}, whole", launch.folder / name
    assert without_timing(output) == without_timing(whole)
    for key, weight in weights(whole).items():
        assert torch.equal(weights(output)[key], weight), key
    assert not list(output.glob("*checkpoint-*"))


def test_another_number_of_processes_cannot_go_on(launch):
    assert launch.code("half") == 130
    files = sorted(path.name for path in (launch.folder / "half").glob("checkpoint-*/*"))
    assert files == ["state-1.pt", "state.pt"]
    expected = "--resume continues the same run, which was started in 2 processes, not in 1: torchr"
    with pytest.raises(UserError, match=expected):
        run.train({}, launch.folder / "half", resume=True)


ERRORS = {
    "no data": "rank 1: .*gone.jsonl",
    "aot": "--loss-type aot sorts the pairs of a whole batch, which lie on 2 processes",
    "one gpu": "--device cuda:0 is one GPU, and each of 2 processes takes its own",
    "misspelt": "unrecognized arguments: --data-dir x",
}


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_is_said_once_and_nothing_is_made(name, launch):
    assert launch.code(name) == 2
    (line,) = launch.said(name, 0).splitlines()
    assert re.match(f"humanline: error: {ERRORS[name]}", line), line
    assert launch.said(name, 1) in ("", f"{line}\n"[: 99 * (name == "misspelt")])
    assert not (launch.folder / name).exists()


def test_a_rank_that_does_not_come_is_named(launch):
    assert launch.said("slow", 0, "code") == "2"
    expected = r"of 2 ranks, 1 did not come to .* of step \d within 3 s \(--ddp-timeout\) of rank 0"
    assert re.search(expected, launch.said("slow", 0)), launch.said("slow", 0)


def test_a_rank_that_fails_ends_the_run(launch):
    assert "RuntimeError: out of luck" in launch.said("fails", 1)
    assert launch.done.returncode != 0 and not (launch.folder / "fails" / "model").exists()


@pytest.mark.parametrize(
    "environment, expected",
    [
        ({"WORLD_SIZE": "2"}, "RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not set: start"),
        ({"WORLD_SIZE": "x"}, "RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not set: start"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "accelerate's configuration asks for DeepSpeed"),
        ({"ACCELERATE_USE_FSDP": "true"}, "asks for FSDP, and humanline train knows"),
    ],
    ids=str,
)
def test_a_launch_that_will_not_do(environment, expected, monkeypatch, tmp_path):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=expected):
        run.train({}, tmp_path / "out")


def test_one_process_splits_nothing(tmp_path):
    with pytest.raises(UserError, match="--fsdp has no effect: it splits the model over processes"):
        run.train({"fsdp": True}, tmp_path / "out")
