"""Checkpoints that are either whole or not there.

A folder is written under a temporary name beside its place, flushed to the disk, then renamed; what
it replaces is removed only after. A full disk or a kill in between leaves the previous one.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from humanline.training.errors import UserError
from humanline.training.ranks import ALONE, Ranks

PREFIX, _STATE = "checkpoint-", "state.pt"


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder to write into, which becomes ``folder`` at the end of the context.

    A folder that is already there is kept.

    Raises:
        UserError: something could not be written. ``folder`` is then not there.
    """
    partial = folder
    try:
        with _clear_errors(folder):
            partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
            os.chmod(partial, 0o755)  # mkdtemp makes it private
            yield partial
            _flush(partial)
            partial.rename(folder)
            _flush_entry(folder.parent)
    except UserError:
        if not folder.is_dir():  # else somebody else was faster, with the same
            raise
    finally:
        if partial != folder:
            shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _clear_errors(folder: Path) -> Iterator[None]:
    """What goes wrong with writing the folder is a UserError that names it."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        raise UserError(f"cannot write {folder}: {_reason(error)}") from error


def _flush(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        _flush_entry(path)


def _flush_entry(path: Path) -> None:
    if os.name == "nt":  # folders cannot be opened there
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _reason(error: BaseException) -> str:
    """torch.save hides the system's error behind one of its own."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    return (cause.strerror if cause is not None else None) or str(error).splitlines()[0]


def save(output: Path, step: int, state: dict[str, Any], ranks: Ranks = ALONE) -> None:
    """Write ``checkpoint-<step>``, a file a rank, then remove those before it.

    Args:
        output: the run's folder, on a disk that all ranks see.
        step: how many steps are done.
        state: what this rank writes; the first one's is read by all.
        ranks: those that write.

    Raises:
        UserError: a rank could not.
    """
    folder, what = output / f"{PREFIX}{step}", f"saving after step {step}"
    if ranks.gather(what, folder.exists())[0]:
        return
    previous = _steps(output)

    def write(partial: Path) -> None:
        with _clear_errors(folder), (partial / _name(ranks.rank)).open("wb") as file:
            torch.save(state, file)

    try:
        with ExitStack() as opened:
            begun = ranks.by_the_first(what, lambda: opened.enter_context(atomic_folder(folder)))
            partial = ranks.gather(what, begun)[0]
            ranks.together(what, lambda: write(partial))
            ranks.by_the_first(what, opened.close)
    except UserError as error:
        kept = f"{PREFIX}{max(previous)} is whole" if previous else "there is none before it"
        raise type(error)(f"{error}; {kept}") from error
    for other in previous if ranks.first else ():
        shutil.rmtree(output / f"{PREFIX}{other}", ignore_errors=True)


def _name(rank: int) -> str:
    return f"state-{rank}.pt" if rank else _STATE


def last_step(output: Path) -> int:
    """The steps done at the last checkpoint; 0 if there is none."""
    return max(_steps(output), default=0)


def load_latest(output: Path, device: torch.device, rank: int = 0) -> dict[str, Any] | None:
    """The state of the last checkpoint, or None if there is none: what the first rank wrote, and in
    place of the parts that this one wrote too, its own."""
    steps = _steps(output)
    if not steps:
        return None
    state: dict[str, Any] = {}
    for name in dict.fromkeys([_STATE, _name(rank)]):
        path = output / f"{PREFIX}{max(steps)}" / name
        try:
            state |= torch.load(path, map_location=device, weights_only=True)
        except Exception as error:
            raise UserError(f"cannot read {path}: {error}") from error
    return state


def remove_all(output: Path) -> None:
    """A finished run needs none."""
    for step in _steps(output):
        shutil.rmtree(output / f"{PREFIX}{step}", ignore_errors=True)


def remove_partial(output: Path) -> None:
    """What a killed run left half-written."""
    for path in output.glob(f".{PREFIX}*"):
        shutil.rmtree(path, ignore_errors=True)


def _steps(output: Path) -> list[int]:
    names = (path.name.removeprefix(PREFIX) for path in output.glob(f"{PREFIX}*"))
    return sorted(int(name) for name in names if name.isdigit())
