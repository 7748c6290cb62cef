"""Runs that are stopped, killed, or out of disk: what is on the disk is always whole."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from toy import make_model_folder, toy_rows, without_timing, write_jsonl

from humanline.training import checkpoint, run
from humanline.training.config import OBJECTIVES, REFERENCES
from humanline.training.errors import UserError

ROOT = Path(__file__).parents[2]

# A child process trains until something happens to it at a step or in a write.
CHILD = """
import json, os, resource, signal, sys
import torch
torch.set_num_threads(1)
from pathlib import Path
from humanline.cli import main
from humanline.training import report

options, output, what, when = json.loads(sys.argv[1])
write, count = report.Metrics.write, 0

def stepping(self, row):
    write(self, row)
    if row["step"] + 1 == when and what in ("SIGKILL", "SIGINT"):
        os.kill(os.getpid(), getattr(signal, what))

class DyingFile:
    def __init__(self, file): self.file = file
    def __getattr__(self, name): return getattr(self.file, name)
    def write(self, data):
        self.file.write(data[: len(data) // 2])
        self.file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

save = torch.save
def saving(state, file):
    global count
    count += 1
    save(state, DyingFile(file) if what == "SIGKILL while saving" and count == when else file)

report.Metrics.write, torch.save = stepping, saving
if what == "RLIMIT_FSIZE":
    resource.setrlimit(resource.RLIMIT_FSIZE, (when, when))
arguments = []
for name, value in options.items():
    arguments += ["--" + name.replace("_", "-")] + ([] if value is True else [str(value)])
sys.exit(main(["train", "--output-dir", output, *arguments]))
"""


def start(options, output, what, when):
    arguments = json.dumps([options, str(output), what, when])
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, arguments],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )


def finish(child):
    _, err = child.communicate(timeout=120)
    return child.returncode, err


@pytest.fixture
def options(options):
    return options | {"max_steps": 9, "save_steps": 2, "perception": "rejection", "sync_every": 3}


def test_a_killed_run_goes_on_as_if_nothing_had_happened(options, tmp_path):
    """SIGKILL at random steps, for each objective and each kind of reference, paired by chance,
    the adapter's with LoRA; and in the middle of writing a checkpoint."""
    draw = random.Random(os.getpid())
    pairs = zip(OBJECTIVES, draw.sample(REFERENCES, len(REFERENCES)), strict=True)
    cases = [(*pair, "SIGKILL", draw.randint(1, 8)) for pair in pairs]
    cases.append(("kto", "copy", "SIGKILL while saving", 3))
    for i, (objective, reference, what, when) in enumerate(cases):
        chosen = {"objective": objective, "reference": reference}
        chosen |= {"lora": True} if reference == "adapter" else {}
        killed, whole = tmp_path / f"killed{i}", tmp_path / f"whole{i}"
        child = start(options | chosen, killed, what, when)
        run.train(options | chosen, whole)  # meanwhile
        code, err = finish(child)
        assert code == -signal.SIGKILL, err
        saved = [p.name for p in killed.glob("checkpoint-*")]
        if what == "SIGKILL":
            last = (when - 1) // 2 * 2  # the kill comes before the step's own checkpoint
            assert saved == ([f"checkpoint-{last}"] if last else []), when
        else:  # the third was being written
            assert saved == ["checkpoint-4"] and list(killed.glob(".checkpoint-6*"))
        run.train({}, killed, resume=True)
        assert without_timing(killed) == without_timing(whole), cases[i]
        for file in whole.rglob("*.safetensors"):
            assert file.read_bytes() == (killed / file.relative_to(whole)).read_bytes(), cases[i]
        assert (whole / ("adapter" if "lora" in chosen else "model")).is_dir()
        assert json.loads((killed / "before.json").read_text()) == json.loads(
            (whole / "before.json").read_text()
        )
        assert not list(killed.glob(".*")) and not list(killed.glob("checkpoint-*"))


def test_ctrl_c_finishes_the_step_and_saves(options, tmp_path):
    output = tmp_path / "stopped here"
    code, err = finish(start(options, output, "SIGINT", 5))
    assert code == 130, err
    assert "stopped and saved after 5 of 9 steps; go on with: humanline train --output-dir " in err
    assert f"{str(output)!r} --resume" in err and "Traceback" not in err
    assert [p.name for p in output.glob("checkpoint-*")] == ["checkpoint-5"]
    run.train({}, output, resume=True)
    run.train(options, tmp_path / "whole")
    assert without_timing(output) == without_timing(tmp_path / "whole")


def test_a_full_disk_leaves_the_previous_checkpoint(options, tmp_path, monkeypatch):
    save, calls = torch.save, []

    def full(state, file):
        calls.append(state["step"])
        if len(calls) == 2:
            file.write(b"half of it")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(state, file)

    monkeypatch.setattr(torch, "save", full)
    output = tmp_path / "full"
    expected = r"checkpoint-4: No space left on device; checkpoint-2 is whole"
    with pytest.raises(UserError, match=expected):
        run.train(options, output)
    assert [p.name for p in output.glob("*checkpoint-*")] == ["checkpoint-2"]
    assert checkpoint.load_latest(output, torch.device("cpu"))["step"] == 2
    monkeypatch.undo()
    run.train({}, output, resume=True)
    run.train(options, tmp_path / "whole")
    assert without_timing(output) == without_timing(tmp_path / "whole")


def test_a_file_size_limit_is_a_clear_error(options, tmp_path):
    """A real refusal of the system, in the middle of torch.save."""
    output = tmp_path / "limited"
    code, err = finish(start(options, output, "RLIMIT_FSIZE", 60_000))
    assert code == 2, err
    assert "humanline: error: cannot write" in err and "File too large" in err
    assert "there is none before it" in err and "Traceback" not in err
    assert not list(output.glob("*checkpoint-*"))


def test_a_second_ctrl_c_stops_at_once():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), run.stop_requests() as stop:
        assert not stop()
        os.kill(os.getpid(), signal.SIGINT)
        assert stop()
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def stopped(options, output):
    """A run stopped after its second step."""
    from humanline.training import report

    write = report.Metrics.write

    def stopping(self, row):
        write(self, row)
        if row["step"] == 1:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report.Metrics, "write", stopping)
        with pytest.raises(run.Interrupted):
            run.train(options, output)
    return output


def test_resuming_with_other_options_names_them(options, tmp_path):
    output = stopped(options | {"reference": "copy"}, tmp_path / "out")
    other = {"learning_rate": 0.5, "objective": "kto", "max_steps": 12, "seed": 0}
    expected = r"--learning-rate \(was 0.001, now 0.5\), --objective \(was 'dpo', now 'kto'\)$"
    with pytest.raises(UserError, match=expected):
        run.train(other, output, resume=True)


@pytest.mark.parametrize("chosen", [{"reference": "adapter"}, {"sync_every": 1}], ids=str)
def test_a_stopped_run_may_be_made_longer(options, chosen, tmp_path):
    options |= chosen
    output = stopped(options, tmp_path / "out")
    run.train({"max_steps": 11}, output, resume=True)
    run.train(options | {"max_steps": 11}, tmp_path / "whole")
    assert without_timing(output) == without_timing(tmp_path / "whole")


def test_a_run_cannot_outgrow_what_it_has_looked_ahead_to(options, tmp_path):
    output = stopped(options | {"reference": "lookahead"}, tmp_path / "out")
    with pytest.raises(UserError, match=r"these options differ: --max-steps \(was 9, now 11\)"):
        run.train({"max_steps": 11}, output, resume=True)


def test_resuming_with_other_data_is_refused(options, tmp_path):
    path = write_jsonl(tmp_path / "d.jsonl", toy_rows(8))
    output = stopped(options | {"data": str(path)}, tmp_path / "out")
    write_jsonl(path, toy_rows(9))
    with pytest.raises(UserError, match="contents of data differ"):
        run.train({}, output, resume=True)


def test_an_output_folder_is_not_written_into_unasked(options, tmp_path):
    options |= {"max_steps": 1, "eval_limit": 0}
    output = tmp_path / "out"
    output.mkdir()
    (output / "thesis.tex").write_text("years of work")
    for overwrite, expected in ((False, "not empty"), (True, "something else than a run")):
        with pytest.raises(UserError, match=expected):
            run.train(options, output, overwrite=overwrite)
    assert (output / "thesis.tex").exists()

    run.train(options, tmp_path / "run")
    with pytest.raises(UserError, match=r"not empty.*--resume.*--overwrite"):
        run.train(options, tmp_path / "run")
    with pytest.raises(UserError, match="is finished"):
        run.train({}, tmp_path / "run", resume=True)
    run.train(options | {"max_steps": 2}, tmp_path / "run", overwrite=True)
    assert len(without_timing(tmp_path / "run")) == 2
    with pytest.raises(UserError, match="no run to resume"):
        run.train({}, tmp_path / "nothing", resume=True)


def test_metrics_drop_half_a_line_and_what_the_checkpoint_does_not_have(tmp_path):
    from humanline.training.report import Metrics

    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"step": 1}\n{"step": 2}\n{"st')
    Metrics(path, 2).write({"step": 2, "new": True})
    steps = [json.loads(line) for line in path.read_text().splitlines()]
    assert steps == [{"step": 0}, {"step": 1}, {"step": 2, "new": True}]
    with pytest.raises(UserError, match="holds 3 steps, but the checkpoint is at 5"):
        Metrics(path, 5)


def test_a_broken_checkpoint_is_a_clear_error(tmp_path):
    folder = tmp_path / "checkpoint-3"
    folder.mkdir()
    (folder / "state.pt").write_bytes(b"nonsense")
    with pytest.raises(UserError, match=r"cannot read .*checkpoint-3"):
        checkpoint.load_latest(tmp_path, torch.device("cpu"))


def test_overwriting_removes_what_a_run_writes_and_no_more(options, tmp_path):
    options |= {"max_steps": 1, "eval_limit": 0, "save_steps": 0}
    output = tmp_path / "real"
    run.train(options | {"lora": True}, output)
    (output / "notes.txt").write_text("mine")
    (output / "checkpoint-7").mkdir()
    link = tmp_path / "link"
    link.symlink_to(output)
    run.train(options, link, overwrite=True)
    assert link.is_symlink() and (output / "notes.txt").read_text() == "mine"
    assert (output / "model").is_dir()
    assert not (output / "adapter").exists() and not (output / "checkpoint-7").exists()


@pytest.mark.parametrize("content", ['{"model_type": "llama"}', '{"options": {', "[]"])
def test_a_folder_whose_config_is_not_a_runs_is_left_alone(content, options, tmp_path):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match="something else than a run"):
        run.train(options, tmp_path, overwrite=True)
    with pytest.raises(UserError, match="no run to resume"):
        run.train({}, tmp_path, resume=True)
    assert (tmp_path / "config.json").read_text() == content


def test_overwriting_what_the_run_needs_is_refused(options, tmp_path):
    output = tmp_path / "out"
    run.train(options | {"max_steps": 1, "eval_limit": 0}, output)
    data = write_jsonl(output / "d.jsonl", toy_rows(8))
    for name, path in (("model", output / "model"), ("data", data), ("heldout", data)):
        with pytest.raises(UserError, match=f"--{name} .* is in .*out: --overwrite would"):
            run.train(options | {name: str(path)}, output, overwrite=True)
    assert (output / "model").is_dir()


def test_a_model_that_fails_leaves_the_old_run_whole(options, tmp_path):
    output, broken = tmp_path / "out", make_model_folder(tmp_path / "broken")
    run.train(options | {"max_steps": 1, "eval_limit": 0}, output)
    before = sorted(p.name for p in output.rglob("*"))
    (broken / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(UserError, match="has no model that can be loaded"):
        run.train(options | {"model": str(broken)}, output, overwrite=True)
    assert sorted(p.name for p in output.rglob("*")) == before


def test_a_run_cannot_be_made_shorter_than_it_is(options, tmp_path):
    output = stopped(options | {"reference": "copy"}, tmp_path / "out")
    stored = (output / "config.json").read_text()
    with pytest.raises(UserError, match="--max-steps 1, but 2 steps are already done"):
        run.train({"max_steps": 1}, output, resume=True)
    assert (output / "config.json").read_text() == stored


def test_files_of_a_run_that_were_broken(options, tmp_path):
    output = stopped(options, tmp_path / "out")
    stored = json.loads((output / "config.json").read_text())
    (output / "before.json").write_text('{"measured": ')
    with pytest.raises(UserError, match=r"before\.json is not what a run writes"):
        run.train({}, output, resume=True)
    stored["options"]["magic"] = 1
    (output / "config.json").write_text(json.dumps(stored))
    with pytest.raises(UserError, match=r"not of this version's runs: .*magic"):
        run.train({}, output, resume=True)


@pytest.mark.parametrize("reference", REFERENCES)
def test_a_run_stopped_after_its_last_step_is_finished(reference, options, tmp_path, monkeypatch):
    options |= {"max_steps": 4, "reference": reference, "sync_every": 1}
    run.train(options, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(run, "_finish", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run.train(options, tmp_path / "out")
    assert run.train({}, tmp_path / "out", resume=True)["steps"] == 4
    assert without_timing(tmp_path / "out") == without_timing(tmp_path / "whole")
