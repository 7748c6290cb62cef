"""What it takes to start, beside what torch takes."""

import subprocess
import sys

import pytest

SECONDS = 1.0  # of CPU time
STARTS = {
    "import humanline": "import humanline",
    "humanline --help": "from humanline.cli import main\ntry: main(['--help'])\n"
    "except SystemExit: pass",
}


@pytest.mark.parametrize("start", STARTS)
def test_it_starts_within_a_second_of_cpu_time_beside_torch(start):
    code = (
        "import sys, time, torch\n"
        "before = time.process_time()\n"
        f"{STARTS[start]}\n"
        "print(time.process_time() - before, file=sys.stderr)"
    )
    taken = []
    for _ in range(3):  # of which the best counts: a machine may be busy with something else
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        taken.append(float(done.stderr.split()[-1]))
        if taken[-1] < SECONDS:
            return
    raise AssertionError(f"{start} took {taken} seconds beside torch")
