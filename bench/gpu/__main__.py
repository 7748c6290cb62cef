"""``python -m bench.gpu STEP``: see steps.py and smoke.py."""

import argparse
import sys
from pathlib import Path

from bench.gpu import steps
from bench.gpu.left_out import left_out
from bench.gpu.profile import where_the_time_goes
from bench.gpu.smoke import smoke

STEPS = {
    f.__name__: f
    for f in (
        steps.machine,
        smoke,
        where_the_time_goes,
        left_out,
        steps.correctness,
        steps.correctness_rest,
        steps.ops,
        steps.graphs,
        steps.kernels,
        steps.dram,
        steps.small,
        steps.configurations,
    )
}


def main() -> int:
    parser = argparse.ArgumentParser(description=steps.__doc__.splitlines()[0])
    parser.add_argument("step", choices=STEPS)
    parser.add_argument("--reduced", action="store_true", help="small shapes")
    parser.add_argument("--output", type=Path, help="folder of results")
    args = parser.parse_args()
    return 0 if STEPS[args.step](args) else 1


if __name__ == "__main__":
    sys.exit(main())
