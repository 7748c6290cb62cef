"""Run by test_ranks.py under torchrun: one case after the other, all in one launch.

Arguments: the JSON of a list of cases, each with ``arguments`` of the command line, a folder
``said`` for the exit code and stderr of each rank, and ``what`` happens to rank 1: "stops", it is
asked to stop in step 2; "slow", it sleeps there; "fails", it raises there; "no data", its data are
gone.
"""

import contextlib
import io
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path

import torch

from humanline import cli
from humanline.training import score

torch.set_num_threads(1)
RANK = os.environ["RANK"]
loss = score.loss


def happening(what):
    """:func:`score.loss`, at whose third call something happens."""
    calls = 0

    def patched(*arguments):
        nonlocal calls
        calls += 1
        if calls == 3:
            if what == "stops":
                os.kill(os.getpid(), signal.SIGINT)
            if what == "slow":
                time.sleep(8)
            if what == "fails":
                raise RuntimeError("out of luck")
        return loss(*arguments)

    return patched


def run(case):
    arguments, what, said = case["arguments"], case["what"], Path(case["said"])
    if RANK == "1":
        score.loss = happening(what)
        if what == "no data":
            arguments[arguments.index("--data") + 1] = "gone.jsonl"
    err, out = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stderr(err), contextlib.redirect_stdout(out):
            code = cli.main(arguments)
    except SystemExit as error:
        code = error.code
    except Exception:
        traceback.print_exc(file=err)
        code = 1
    finally:
        said.mkdir(parents=True, exist_ok=True)
        (said / f"err{RANK}").write_text(err.getvalue())
        (said / f"out{RANK}").write_text(out.getvalue())
    (said / f"code{RANK}").write_text(str(code))
    return code


if __name__ == "__main__":
    codes = [run(case) for case in json.loads(sys.argv[1])]
    sys.exit(codes[-1])
