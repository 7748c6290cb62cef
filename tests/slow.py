"""Which tests are slow, by measurement: slow.txt, from reports of runs of them.

.venv/bin/python -m pytest -n 2 --junitxml=all.xml
python tests/slow.py all.xml
.venv/bin/python -m pytest -n 2 -m "not slow" --junitxml=others.xml
python tests/slow.py all.xml others.xml

``pytest -m "not slow"`` leaves out what slow.txt names, and ``pytest -m slow`` runs that alone. The
first report says which tests are slow. But where tests of a file share what is slow to build, the
first one has the time of it, and the next one if that is left out: so a file that is slow in the
second report still is named whole.
"""

import sys
from pathlib import Path
from xml.etree import ElementTree

LIST = Path(__file__).with_suffix(".txt")
SECONDS = 3.0  # that a case takes; twice that in the second report, for what is near it is chance


def slow(report: str, seconds: float) -> set[str]:
    """Tests, as pytest names them but without their cases, of which one case took so long."""
    cases = ElementTree.fromstring(report).iter("testcase")
    found = (case for case in cases if float(case.get("time")) >= seconds)
    return {name_of(case.get("classname"), case.get("name")) for case in found}


def name_of(module: str, case: str) -> str:
    return f"{module.replace('.', '/')}.py::{case.partition('[')[0]}"


def listed(everything: str, others: str | None = None) -> list[str]:
    """Tests and whole files, sorted."""
    tests = slow(everything, SECONDS)
    files = {test.partition("::")[0] for test in slow(others, 2 * SECONDS)} if others else set()
    return sorted(files | {test for test in tests if test.partition("::")[0] not in files})


def main(*reports: str) -> None:
    found = listed(*(Path(report).read_text(encoding="utf-8") for report in reports))
    LIST.write_text("".join(f"{test}\n" for test in found), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
