"""`humanline.kernels` works however humanline is installed, and hides nobody else's `kernels`.

Everything happens in a copy of the tree and in a virtual environment of its own, offline.
"""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
KERNELS = sorted(
    f"humanline.kernels.{path.stem}"
    for path in (REPO / "humanline/kernels").glob("*.py")
    if path.stem != "__init__"
)
INSTALLS = ["editable", "editable-strict", "wheel", "sdist"]


def run(*command, cwd, **env):
    # Nothing of the outer environment decides what the child finds, and pip stays offline.
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PIP_"))}
    clean.pop("VIRTUAL_ENV", None)
    clean |= {"PYTHONNOUSERSITE": "1", "PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1"} | env
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=clean, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{command} failed:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def pip(*arguments, python=sys.executable):
    run(sys.executable, "-m", "pip", "--python", python, *arguments, cwd=REPO.parent)


def tracked_files():
    """What a commit of the working tree would hold; the symbolic link counts as one file."""
    try:
        git = ["git", "-C", str(REPO)]
        top = subprocess.check_output([*git, "rev-parse", "--show-toplevel"], text=True).strip()
        if Path(top).resolve() == REPO:
            listing = subprocess.check_output(
                [*git, "ls-files", "-z", "--cached", "--others", "--exclude-standard"], text=True
            )
            return [
                name for name in set(listing.split("\0")) if name and os.path.lexists(REPO / name)
            ]
    except (OSError, subprocess.CalledProcessError):
        pass
    files = []
    for folder, folders, names in os.walk(REPO):
        links = [name for name in folders if (Path(folder) / name).is_symlink()]
        folders[:] = [
            name
            for name in folders
            if name not in (*links, "__pycache__", "build", "dist")
            and not name.endswith(".egg-info")
            and (not name.startswith(".") or name == ".ci")
        ]
        files += [os.path.relpath(os.path.join(folder, name), REPO) for name in (*names, *links)]
    return files


def copy_tree(target):
    for name in tracked_files():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(REPO / name, target / name, follow_symlinks=False)
    return target


@pytest.fixture(scope="module")
def dependencies(tmp_path_factory):
    """A folder of links to everything installed beside these tests, except humanline itself.

    A child that has this folder on its path cannot see a humanline installed here, nor does it
    run the .pth file of an editable one.
    """
    folder = tmp_path_factory.mktemp("dependencies") / "site-packages"
    folder.mkdir()
    for entry in (Path(entry).resolve() for entry in sys.path):
        stdlib = (entry / "os.py").exists() or entry.name == "lib-dynload"
        ours = entry == REPO or entry.is_relative_to(REPO / "tests")
        scripts = entry == Path(sys.executable).parent  # `pytest` itself lies there
        if not entry.is_dir() or stdlib or ours or scripts:
            continue
        for item in entry.iterdir():
            humanline = item.name.startswith(("humanline", "__editable__"))
            link = folder / item.name
            if not humanline and item.suffix != ".pth" and not os.path.lexists(link):
                link.symlink_to(item)
    return folder


def make_environment(folder, dependencies):
    """A fresh virtual environment; its own site-packages come before `dependencies`."""
    venv.create(folder, symlinks=True)
    python = folder / "bin/python"
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder)
    (Path(site.strip()) / "dependencies.pth").write_text(f"{dependencies}\n")
    return python


@pytest.fixture(scope="module")
def built(tmp_path_factory, dependencies):
    """The wheel of a checkout, the sdist of another, and the wheel built from that sdist."""
    out = tmp_path_factory.mktemp("built")
    python = make_environment(out / "env", dependencies)
    build = ("wheel", "--no-deps", "--no-build-isolation", "-w")
    pip(*build, out / "wheel", copy_tree(out / "tree"), python=python)
    tree = copy_tree(out / "tree-of-sdist")
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(out)!r})"
    run(python, "-c", code, cwd=tree)
    (sdist,) = out.glob("*.tar.gz")
    pip(*build, out / "sdist", sdist, python=python)
    return {name: next((out / name).glob("*.whl")) for name in ("wheel", "sdist")}


@pytest.fixture(scope="module", params=["checkout", *INSTALLS])
def installed(request, tmp_path_factory, dependencies):
    """(how, python, checkout): humanline installed in that way, or not at all for `checkout`."""
    folder = tmp_path_factory.mktemp(request.param)
    checkout = copy_tree(folder / "tree")
    python = make_environment(folder / "env", dependencies)
    offline = ("--no-deps", "--no-build-isolation")
    match request.param:
        case "editable":
            pip("install", *offline, "-e", checkout, python=python)
        case "editable-strict":
            strict = ("--config-settings", "editable_mode=strict")
            pip("install", *offline, *strict, "-e", checkout, python=python)
        case "wheel" | "sdist":
            pip("install", *offline, request.getfixturevalue("built")[request.param], python=python)
    return request.param, python, checkout


def import_files(python, cwd, modules):
    code = (
        "import importlib, os\n"
        f"for name in {list(modules)!r}:\n"
        "    print(os.path.abspath(importlib.import_module(name).__file__))"
    )
    return [Path(line) for line in run(python, "-c", code, cwd=cwd).splitlines()]


def test_there_are_kernels():
    assert KERNELS


def test_kernels_import_from_the_checkout(installed):
    _, python, checkout = installed
    files = import_files(python, checkout, ["humanline", *KERNELS])
    assert all(file.is_relative_to(checkout / "humanline") for file in files), files


def test_kernels_import_from_elsewhere(installed, tmp_path):
    how, python, checkout = installed
    if how == "checkout":
        with pytest.raises(AssertionError, match="No module named 'humanline'"):
            import_files(python, tmp_path, ["humanline"])  # or the other cases prove nothing
        return
    files = import_files(python, tmp_path, ["humanline", *KERNELS])
    home = checkout if how.startswith("editable") else python.parents[1] / "lib"
    assert all(file.is_relative_to(home) for file in files), files


def test_hugging_face_kernels_are_not_shadowed(installed, dependencies):
    for name in ("kernels", "transformers"):
        try:
            importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            pytest.skip(f"{name} is not installed")
    _, python, checkout = installed
    theirs, _ = import_files(python, checkout, ["kernels", "transformers.integrations.hub_kernels"])
    assert theirs == dependencies / "kernels/__init__.py"


def test_kernels_is_no_regular_package():
    assert not (REPO / "kernels/__init__.py").exists()


@pytest.mark.parametrize("how", ["wheel", "sdist"])
def test_wheel_holds_the_whole_package(built, how):
    files = [name for name in tracked_files() if name != "humanline/kernels"]
    files = {re.sub("^kernels/", "humanline/kernels/", name) for name in files}
    expected = {
        name
        for name in files
        if re.fullmatch(r"humanline/(.+\.py|py\.typed|training/data/.+\.jsonl)", name)
    }
    with zipfile.ZipFile(built[how]) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
        folder = re.sub(r"-py3-none-any$", ".dist-info", built[how].stem)
        metadata = wheel.read(f"{folder}/METADATA").decode()
        assert f"{folder}/licenses/LICENSE" in wheel.namelist()
    assert names == expected
    assert re.search(r"^License(-Expression)?: Apache-2\.0$", metadata, re.M), metadata


def test_console_script_starts(installed, tmp_path):
    how, python, _ = installed
    if how != "checkout":
        assert "humanline" in run(python.parent / "humanline", "--help", cwd=tmp_path)


@pytest.fixture(scope="module")
def mypy_cache(tmp_path_factory):
    """What mypy knows of torch, which all environments share."""
    return tmp_path_factory.mktemp("mypy")


def test_a_type_checker_sees_every_public_call(installed, mypy_cache, tmp_path):
    """Right ones pass, and the marks on wrong ones are needed; see tests/typed/calls.py."""
    how, python, _ = installed
    if how == "checkout":
        return
    typed = REPO / "tests/typed"
    mypy = ("-m", "mypy", "--config-file", typed / "mypy.ini", "--cache-dir", mypy_cache)
    run(sys.executable, *mypy, "--python-executable", python, typed / "calls.py", cwd=tmp_path)


def test_ci_runs_the_readme_test_command():
    readme = (REPO / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```[^\n]*\n(.*?)^```", readme, re.M | re.S)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    commands = {" ".join(line.split()) for line in lines if "-m pytest" in line}
    assert len(commands) == 1, f"README.md should have one test command: {commands}"
    script = (REPO / ".ci/run").read_text(encoding="utf-8")
    assert commands <= {line.strip() for line in script.splitlines()}
