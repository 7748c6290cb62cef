"""Runs the core tests with every torch that is supported, each with the Triton it pairs with.

    python tests/environments.py                  # every pair of PAIRS: hours, 8 GB a pair
    python tests/environments.py 3.11/2.15.0 ...  # these, beside what is known of the others
    python tests/environments.py --table          # README.md again, of what is known

A pair gets an environment with `pip install '.[test]'`, unconstrained but for torch and Triton, and
loses it at the end unless `--keep` names a folder. `python3.11` and the others are the PATH's.
What the tests said goes to environments.json, and from there into the table of README.md.
"""

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import tempfile
import xml.etree.ElementTree as ElementTree
from contextlib import nullcontext
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
RESULTS = HERE / "environments.json"
README = HERE / "README.md"
BLOCK = re.compile(r"(<!-- environments -->\n).*?(<!-- /environments -->)", re.S)

# The tests that depend on torch, Triton and the processor alone; pytest reads their paths here.
CORE = "@tests/core.txt"
TRITON = {"2.11.0": "3.6.0", "2.13.0": "3.7.1", "2.14.1": "3.8.0", "2.15.0": "3.9.0"}
PAIRS = [
    *(("3.11", torch) for torch in TRITON),
    ("3.10", "2.11.0"),
    ("3.12", "2.13.0"),
    ("3.13", "2.15.0"),
]
# What is not installed is "none": TRL has no version for Python 3.10.
COLUMNS = ("python", "torch", "triton", "numpy", "transformers", "trl")
VERSIONS = f"""
import json, platform
from importlib.metadata import distributions
found = {{package.name: package.version for package in distributions()}}
found = {{name: found.get(name, "none") for name in {COLUMNS[1:]!r}}}
print(json.dumps({{"python": platform.python_version()}} | found))
"""


def run_pair(python: str, torch: str, keep: str | None = None) -> dict:
    """Versions, counts and names of failures of the core in an environment of its own.

    Args:
        keep: folder where the environment stays, and is found again; None for a temporary one.

    Raises:
        SystemExit: there is no such python on the PATH.
        subprocess.CalledProcessError: the environment cannot be made.
    """
    executable = shutil.which(f"python{python}")
    if executable is None:
        raise SystemExit(f"python{python} is not on the PATH")
    with tempfile.TemporaryDirectory() if keep is None else nullcontext(keep) as folder:
        environment = Path(folder, f"{python}-{torch}")
        subprocess.run([executable, "-m", "venv", environment], check=True)
        own = environment / "bin/python"
        pinned = (f"torch=={torch}", f"triton=={TRITON[torch]}")
        install = [own, "-m", "pip", "install", "-q", "-e", f"{ROOT}[test]", *pinned]
        subprocess.run(install, check=True)
        versions = json.loads(subprocess.check_output([own, "-c", VERSIONS], cwd=folder))
        report = environment / "report.xml"
        options = ("-q", "-p", "no:cacheprovider", "-n", "2", f"--junitxml={report}")
        subprocess.run([own, "-m", "pytest", *options, CORE], cwd=ROOT)
        return versions | {"processor": processor()} | counts(report)


def counts(report: Path) -> dict:
    """What a JUnit report of pytest says: passed, skipped, and the names of what failed."""
    suite = ElementTree.parse(report).getroot().find("testsuite")
    failed = [
        f"{case.get('classname')}::{case.get('name')}"
        for case in suite.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    skipped = int(suite.get("skipped"))
    passed = int(suite.get("tests")) - skipped - len(failed)
    return {"passed": passed, "skipped": skipped, "failed": failed}


def processor() -> str:
    """Such as "AuthenticAMD family 26"; the name of the machine where Linux says no more."""
    try:
        info = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.machine()
    found = re.search(r"vendor_id\s*: (.+)\ncpu family\s*: (.+)", info)
    return f"{found[1]} family {found[2]}" if found else platform.machine()


def pair_of(result: dict) -> tuple[str, str]:
    return result["python"].rpartition(".")[0], result["torch"].partition("+")[0]


def load() -> list[dict]:
    return json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else []


def save(results: list[dict]) -> None:
    """In the order of PAIRS; what is no longer one of them is left out."""
    kept = {pair_of(result): result for result in results}
    ordered = [kept[pair] for pair in PAIRS if pair in kept]
    RESULTS.write_text(json.dumps(ordered, indent=1) + "\n", encoding="utf-8")
    README.write_text(filled(README.read_text(encoding="utf-8"), ordered), encoding="utf-8")


def filled(text: str, results: list[dict]) -> str:
    """README's text with the table of these results in its block."""
    return BLOCK.sub(lambda block: block[1] + table(results) + block[2], text)


def table(results: list[dict]) -> str:
    """A row a pair; one that has not run says so."""
    head = (*COLUMNS, "processor", "passed", "skipped", "failed")
    rows = [[r[c] for c in head[:-1]] + [len(r["failed"])] for r in results]
    missing = [pair for pair in PAIRS if pair not in map(pair_of, results)]
    rows += [[*pair, TRITON[pair[1]], *["not run"] * (len(head) - 3)] for pair in missing]
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    named = {"/".join(pair): pair for pair in PAIRS}
    parser.add_argument("pairs", nargs="*", metavar="PYTHON/TORCH", help=", ".join(named))
    parser.add_argument("--keep", metavar="FOLDER", help="where environments stay for a next run")
    parser.add_argument("--table", action="store_true", help="run nothing")
    args = parser.parse_args()
    if unknown := set(args.pairs) - set(named):
        parser.error(f"no such pair: {', '.join(sorted(unknown))}; there are {', '.join(named)}")
    os.environ["OMP_NUM_THREADS"] = "1"
    for name in [] if args.table else args.pairs or named:
        print(name, flush=True)
        save([*load(), run_pair(*named[name], args.keep)])
    save(load())


if __name__ == "__main__":
    main()
