"""``humanline doctor``: what this machine has, which backend runs, what is missing for what."""

import importlib.metadata
import platform
import re
import sys
from collections.abc import Iterator

import torch

from humanline import install
from humanline.ops.backend import HAS_TRITON, choose_backend
from humanline.training import launch
from humanline.training.errors import UserError
from humanline.version import __version__

_PACKAGES = ("triton", "transformers", "trl", "peft", "accelerate", "safetensors", "gguf")


def report() -> str:
    """The whole report, a line a fact."""
    lines = [
        f"humanline     {__version__}",
        f"python        {platform.python_version()} on {platform.platform()}",
        f"torch         {torch.__version__}",
        *(f"{name:<13} {_version(name) or 'not installed'}" for name in _PACKAGES),
        "",
        f"device        {_device()}",
        f"backend       {_backend()}",
        f"launch        {_launch()}",
        "",
        *_extras(),
    ]
    return "\n".join(lines)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _device() -> str:
    if not torch.cuda.is_available():
        return f"cpu, {torch.get_num_threads()} threads"
    found = []
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        memory = properties.total_memory / 2**30
        found.append(
            f"cuda:{i} {properties.name}, {memory:.0f} GiB, "
            f"compute capability {properties.major}.{properties.minor}"
        )
    return "; ".join(found)


def _backend() -> str:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    chosen = choose_backend(torch.empty(0, device=device))
    if chosen == "triton":
        why = "a GPU, and Triton is installed"
    elif device == "cpu":
        why = "no GPU that torch can use"
    else:
        why = f"a GPU, but no Triton: {sys.executable} -m pip install triton"
    return f"{chosen} ({why}{'' if HAS_TRITON or device == 'cuda' else '; no Triton either'})"


def _launch() -> str:
    """The processes that were started together with this one."""
    try:
        rank, ranks, local = launch.launched()
    except UserError as error:
        return f"broken: {error}"
    if ranks == 1:
        return "one process; several: torchrun --nproc-per-node N -m humanline train"
    launcher = "torchrun" if torch.distributed.is_torchelastic_launched() else "another launcher"
    engine = launch.other_engine()
    gpus = torch.cuda.device_count()
    return (
        f"rank {rank} of {ranks} processes, local rank {local}, by {launcher}; "
        f"{f'{gpus} GPUs, nccl' if gpus else 'gloo'}"
        + (f"; each process needs a GPU of its own, and {local} has none" * (0 < gpus <= local))
        + (f"; accelerate is configured for {engine}" if engine else "")
    )


def _extras() -> Iterator[str]:
    """For each optional part of the package, what it still needs."""
    try:
        metadata = importlib.metadata.metadata("humanline")
    except importlib.metadata.PackageNotFoundError:
        advice = install.command("train")
        yield f"extras        unknown: humanline itself is not installed: {advice}"
        return
    for extra in metadata.get_all("Provides-Extra") or []:
        missing = [need for need in _needs(extra) if not _satisfied(need)]
        if missing:
            yield (
                f"[{extra}]".ljust(14) + f"missing {', '.join(missing)}: {install.command(extra)}"
            )
        else:
            yield f"[{extra}]".ljust(14) + "complete"


def _needs(extra: str) -> list[str]:
    """Requirements of an extra on this Python, such as ``transformers>=5``."""
    needs = []
    for line in importlib.metadata.requires("humanline") or []:
        requirement, _, marker = line.partition(";")
        of_extra = re.search(rf"""extra\s*==\s*["']{re.escape(extra)}["']""", marker)
        if of_extra and _applies(marker, extra):
            needs.append(requirement.strip())
    return needs


def _applies(marker: str, extra: str) -> bool:
    """Whether pip would look at a requirement with this marker: some are of newer Pythons."""
    try:
        from packaging.markers import Marker
    except ImportError:
        return True
    return Marker(marker).evaluate({"extra": extra})


def _satisfied(requirement: str) -> bool:
    name = re.match(r"[A-Za-z0-9._-]+", requirement)[0]
    found = _version(name)
    if found is None:
        return False
    try:
        from packaging.requirements import Requirement
    except ImportError:  # then being there has to do
        return True
    return Requirement(requirement).specifier.contains(found, prereleases=True)
