"""The command line: ``humanline train``, ``humanline bench``, ``humanline doctor``."""

import argparse
import importlib.util
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from humanline import install
from humanline.training.config import DEFAULTS, TrainConfig, flag
from humanline.training.errors import SharedError, UserError
from humanline.training.launch import is_first
from humanline.version import __version__

INTERRUPTED = 130  # what shells report for a process ended by Ctrl-C


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"humanline: error: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    if rest and args.command != "bench":  # which has a parser of its own
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    args = vars(args)
    run = args.pop("run")
    try:
        return run(args, argv)
    except UserError as error:
        if is_first():
            print(f"humanline: error: {error}", file=sys.stderr)
        elif not isinstance(error, SharedError):
            print(f"humanline: error of rank {os.environ['RANK']}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("humanline: interrupted", file=sys.stderr)
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="humanline", description=__doc__, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"humanline {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_train(commands)
    bench = commands.add_parser("bench", help="measure against other libraries", add_help=False)
    bench.set_defaults(run=_bench)
    doctor = commands.add_parser("doctor", help="what this machine has and what is missing")
    doctor.set_defaults(run=_doctor)
    return parser


def _add_train(commands) -> None:
    train = commands.add_parser(
        "train",
        help="fine-tune a model on preferences or rewards, offline",
        description="Fine-tune a model on preferences or rewards, offline. With no options: "
        "SmolLM2-135M-Instruct on arithmetic, with humanline DPO. On several GPUs: torchrun "
        "--nproc-per-node N -m humanline train …, or accelerate launch -m humanline train …; the "
        "batch sizes are those of one process.",
        allow_abbrev=False,
    )
    train.set_defaults(run=_train)
    train.add_argument("--output-dir", help="where to write; left out: runs/OBJECTIVE-PERCEPTION")
    train.add_argument("--resume", action="store_true", help="go on with the run in --output-dir")
    train.add_argument("--overwrite", action="store_true", help="replace the run in --output-dir")
    train.add_argument(
        "--calibrate",
        nargs="?",
        type=int,
        const=48,
        metavar="N",
        help="train N steps (48 if left out) without clipping, write nothing, and print the bounds "
        "of the clip that a tenth of the log-ratios exceed",
    )
    for field in fields(TrainConfig):
        _add_option(train, field)


def _add_option(parser: argparse.ArgumentParser, field) -> None:
    kind, text, choices = (field.metadata[k] for k in ("type", "help", "choices"))
    # Only options that were given reach the configuration: a resumed run keeps its own values.
    common = {"dest": field.name, "default": argparse.SUPPRESS}
    if kind is bool:
        parser.add_argument(flag(field.name), action="store_true", help=text, **common)
        return
    by_objective = {o: d[field.name] for o, d in DEFAULTS.items() if field.name in d}
    if by_objective:
        text += f" (default: {', '.join(f'{o} {v}' for o, v in by_objective.items())})"
    elif field.default is not None:
        text += f" (default: {field.default})"
    metavar = None if choices else {int: "N", float: "X", str: "NAME"}[kind]
    parser.add_argument(
        flag(field.name), type=kind, choices=choices, metavar=metavar, help=text, **common
    )


def _train(options: dict[str, Any], argv: list[str]) -> int:
    del options["command"]
    _require_packages("transformers", "safetensors", "tqdm", "matplotlib")
    from humanline.training.run import Interrupted, train

    output_dir = options.pop("output_dir")
    resume, overwrite = options.pop("resume"), options.pop("overwrite")
    steps = options.pop("calibrate")
    if steps is not None:
        given = {"--output-dir": output_dir, "--resume": resume, "--overwrite": overwrite}
        idle = [name for name, value in given.items() if value not in (None, False)]
        if idle:
            raise UserError(f"--calibrate writes nothing: {', '.join(idle)} has no effect")
        from humanline.training.calibrate import calibrate

        with _quiet():
            calibrate(options, steps)
        return 0
    if output_dir == "":
        raise UserError("--output-dir must name a folder, got ''")
    if resume and overwrite:
        raise UserError("--resume and --overwrite exclude each other")
    output_dir = output_dir and Path(output_dir)
    try:
        with _quiet():
            train(options, output_dir, resume=resume, overwrite=overwrite, strict=True)
    except Interrupted as interrupted:
        if is_first():
            print(f"humanline: {interrupted}", file=sys.stderr)
        return INTERRUPTED
    return 0


@contextmanager
def _quiet() -> Iterator[None]:
    """No warnings of other libraries, whose code the user cannot change: unless asked for."""
    with warnings.catch_warnings():
        if not sys.warnoptions:  # of -W or PYTHONWARNINGS
            warnings.simplefilter("ignore")
        yield


def _bench(options: dict[str, Any], argv: list[str]) -> int:
    checkout = Path(__file__).resolve().parents[1]
    if not (checkout / "bench/__main__.py").exists():
        raise UserError(
            "humanline bench runs from a checkout: the benchmark and its committed results are not "
            "part of the installed package; clone the repository and pip install -e it"
        )
    sys.path.insert(0, str(checkout))
    from bench.__main__ import main

    return main(argv[argv.index("bench") + 1 :])


def _doctor(options: dict[str, Any], argv: list[str]) -> int:
    from humanline.doctor import report

    if is_first():
        print(report())
    return 0


def _require_packages(*names: str) -> None:
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"humanline train needs {', '.join(missing)}: {install.command('train')}")


if __name__ == "__main__":
    sys.exit(main())
