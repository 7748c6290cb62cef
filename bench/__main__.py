"""``humanline bench``: every peer side by side, on this machine."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import torch

from bench.cases import DTYPES, SUITES, Case
from bench.objectives import OBJECTIVES
from bench.peers import PEERS
from bench.report import terminal
from bench.run import Results, run
from humanline.training.errors import UserError

CHOICES = {"objective": list(OBJECTIVES), "entry": ["logits", "hidden"], "dtype": list(DTYPES)}
EXAMPLES = """
examples:
  humanline bench                                 the quick suite
  humanline bench --suite cpu --output bench/results/xeon-2-cores/results.json
  humanline bench --objective dpo --entry hidden --tokens 4096 --active 0.5
  humanline bench --show bench/results/xeon-2-cores/results.json
"""


def main(argv: Sequence[str]) -> int:
    """Run, report; the exit code: 0, or 75 if time ran out before all was done."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.show:
        _require_alone(args, parser)
        print(terminal(Results.load(args.show)))
        return 0
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {device}: torch finds no GPU here")
    if (args.suite or "").startswith("gpu") and device == "cpu":
        raise UserError(_of_a_gpu(args.suite))
    results = Results.open(args.output, device)
    done = run(
        _cases(args),
        results,
        device,
        repeats=args.repeats,
        only=args.peers or (),
        seconds=args.seconds,
    )
    print(terminal(results))
    if not done:
        print("humanline bench: time is up; the same command goes on from here", file=sys.stderr)
    return 0 if done else 75


def _require_alone(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """``--show`` runs nothing: what says how to run has no effect beside it."""
    for name, value in vars(args).items():
        if name != "show" and value != parser.get_default(name):
            raise UserError(f"--{name.replace('_', '-')} has no effect: --show runs nothing")


def _of_a_gpu(suite: str) -> str:
    """Why a suite cannot be had on a CPU, and what can."""
    largest = max(SUITES[suite], key=lambda case: case.tokens * case.vocab)
    others = ", ".join(name for name in SUITES if not name.startswith("gpu"))
    return (
        f"--suite {suite} is of a GPU's size (logits of {largest.tokens} x {largest.vocab}) and "
        "would run on the CPU: torch finds no GPU here, or --device cpu was asked for. Of a CPU's "
        f"size: {others}"
    )


def _cases(args: argparse.Namespace) -> list[Case]:
    given = {f.name: value for f in fields(Case) if (value := getattr(args, f.name)) is not None}
    if given and args.suite:
        raise UserError(f"--suite and --{next(iter(given)).replace('_', '-')} exclude each other")
    try:
        return [Case(**given)] if given else SUITES[args.suite or "quick"]
    except ValueError as error:
        raise UserError(str(error)) from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="humanline bench",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--suite", choices=SUITES, help="a list of cases (default: quick)")
    parser.add_argument("--output", type=Path, help="JSON file to write, and to go on with")
    parser.add_argument("--show", type=Path, help="print the results in a file, run nothing")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, … (default: a GPU if there is one)")
    names = sorted({p.name for p in PEERS})
    parser.add_argument("--peers", nargs="+", choices=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--repeats", type=int, default=5, help="timed runs (default: 5)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start nothing after")
    case = parser.add_argument_group("a case of your own")
    for f in fields(Case):
        option = "--" + f.name.replace("_", "-")
        if f.type is bool or f.type == "bool":
            case.add_argument(option, action="store_true", default=None)
        else:
            kind = type(f.default)
            case.add_argument(option, type=kind, choices=CHOICES.get(f.name))
    return parser


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        sys.exit(f"humanline bench: error: {error}")
