"""The install command that messages advise is one that works where the package stands."""

import importlib.util
import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from humanline import doctor, install

CHECKOUT = Path(__file__).resolve().parents[1]


def test_from_a_checkout_it_names_the_checkout(monkeypatch, tmp_path):
    folder = tmp_path / "a folder"
    folder.mkdir()
    (folder / "setup.py").touch()
    monkeypatch.setattr(install, "ROOT", folder)
    expected = [sys.executable, "-m", "pip", "install", "-e", f"{folder}[train]"]
    assert shlex.split(install.command("train")) == expected


def test_from_elsewhere_it_names_the_package(monkeypatch, tmp_path):
    monkeypatch.setattr(install, "ROOT", tmp_path)
    expected = [sys.executable, "-m", "pip", "install", "humanline[train]"]
    assert shlex.split(install.command("train")) == expected
    assert install.command("train").endswith(" -m pip install 'humanline[train]'")


@pytest.mark.skipif(importlib.util.find_spec("pip") is None, reason="needs pip")
def test_pip_takes_the_command(monkeypatch, tmp_path):
    """It finds the package and the extra: with a requirement of the extra's that no index has to be
    asked for, what would be installed is said."""
    for name in ("setup.py", "README.md", "LICENSE", "humanline", "kernels"):
        (tmp_path / name).symlink_to(CHECKOUT / name)
    monkeypatch.setattr(install, "ROOT", tmp_path)
    options = ["--dry-run", "--no-deps", "--no-index", "--no-build-isolation", "--report", "-"]
    done = subprocess.run(
        [*shlex.split(install.command("train")), *options, "--quiet", "--ignore-installed"],
        capture_output=True,
        text=True,
        cwd="/",
    )
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(done.stdout)["install"]
    assert found["metadata"]["name"] == "humanline" and found["requested_extras"] == ["train"]
    assert found["download_info"]["dir_info"] == {"editable": True}


def test_doctor_advises_it_where_nothing_is_installed(monkeypatch):
    def missing(name):
        raise doctor.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor.importlib.metadata, "metadata", missing)
    assert list(doctor._extras()) == [
        f"extras        unknown: humanline itself is not installed: {install.command('train')}"
    ]
