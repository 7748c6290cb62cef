"""The command that installs an optional part of the package, as this one was installed."""

import shlex
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def command(extra: str) -> str:
    """What to type, in a shell, to get an extra such as "train".

    The interpreter is named because the first pip of the path may be another's; a checkout,
    because no registry needs to have this package.
    """
    checkout = (ROOT / "setup.py").is_file()
    what = ["-e", f"{ROOT}[{extra}]"] if checkout else [f"humanline[{extra}]"]
    return shlex.join([sys.executable, "-m", "pip", "install", *what])
