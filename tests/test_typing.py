"""A type checker and an editor see what the public calls take and return.

tests/typed holds scripts with right calls and with wrong ones, the latter marked: mypy has nothing
to say of them if it sees every signature. tests/test_packaging.py asks it wherever humanline may be
installed.
"""

import ast
import inspect
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import humanline as hl

SCRIPTS = Path(__file__).parent / "typed"


def test_mypy_has_nothing_to_say_of_the_trainers_calls(tmp_path):
    pytest.importorskip("trl")
    mypy = [sys.executable, "-m", "mypy", "--config-file", SCRIPTS / "mypy.ini"]
    script = SCRIPTS / "trl_calls.py"
    done = subprocess.run(
        [*mypy, "--cache-dir", tmp_path, script], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "script, module", [("calls", hl), ("trl_calls", "humanline.integrations.trl")]
)
def test_every_public_name_is_called(script, module):
    if isinstance(module, str):
        pytest.importorskip("trl")
        module = __import__(module, fromlist=["*"])
    tree = ast.parse((SCRIPTS / f"{script}.py").read_text(encoding="utf-8"))
    named = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    named |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert set(module.__all__) | {"patch_trl"} <= named


def test_the_calls_are_right(capsys):
    runpy.run_path(str(SCRIPTS / "calls.py"))
    assert hl.__version__ in capsys.readouterr().out


@pytest.mark.parametrize("function", [hl.linear_token_logps, hl.DPO.from_hidden])
def test_signatures_survive_decoration(function):
    parameters = inspect.signature(function).parameters
    assert {"hidden", "weight", "labels", "gradient_tolerance"} <= parameters.keys()
