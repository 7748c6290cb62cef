"""README.md's programs run. Those that are whole say so in their first line."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).resolve().parents[1] / "README.md"
PROGRAMS = [
    block
    for block in re.findall(
        r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.M | re.S
    )
    if block.startswith("# a whole program\n")
]


def test_there_is_a_program():
    assert PROGRAMS


@pytest.fixture(params=PROGRAMS, ids=range(len(PROGRAMS)))
def output(request, tmp_path):
    """The lines a program prints."""
    done = subprocess.run(
        [sys.executable, "-c", request.param], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_the_programs_run_and_learn(output):
    margins = [float(re.search(r"margin (-?[\d.]+)", line)[1]) for line in output]
    assert margins[-1] > margins[0] + 5
    unclamped = {re.search(r"unclamped (\d+)%", line)[1] for line in output[1:]}
    assert len(unclamped) > 1  # or the clip had nothing to do
