"""On what something was measured."""

import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
from datetime import date
from pathlib import Path
from typing import Any

import torch

import humanline as hl
from bench.peers import versions


def environment(device: str) -> dict[str, Any]:
    """Device, versions, commit and date, for JSON."""
    triton = importlib.util.find_spec("triton") and importlib.metadata.version("triton")
    return {
        "device": device_name(device),
        "torch": torch.__version__,
        "triton": triton,
        "humanline": hl.__version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "peers": versions(),
        "date": date.today().isoformat(),
    }


def write_record(path: Path, sizes: dict[str, Any], results: list[dict[str, Any]]) -> None:
    """What a CPU benchmark measured, at which sizes, and on what, as JSON."""
    record = {"environment": environment("cpu"), "sizes": sizes, "results": results}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1))


def device_name(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), "CPU")
    return f"{name}, {os.cpu_count()} cores"


def _commit() -> str:
    """The commit, "-dirty" if what is measured differs from it: results themselves may."""
    commit = _git("rev-parse", "--short", "HEAD")
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", "..", ":!results")
    return (commit + ("-dirty" if changed else "")) or "unknown"


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True
        )
    except OSError:
        return ""
    return done.stdout.strip()
