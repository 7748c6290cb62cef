"""The list of slow tests names tests that are there, and `.ci/run` runs them: the README's command
leaves them out."""

from pathlib import Path

import slow

ROOT = Path(slow.__file__).parents[1]


def report(*cases):
    cases = (f'<testcase classname="{c}" name="{n}" time="{t}"/>' for c, n, t in cases)
    return f"<testsuites><testsuite>{''.join(cases)}</testsuite></testsuites>"


EVERYTHING = report(
    ("tests.ops.test_a", "test_one[1-x]", 0.5),
    ("tests.ops.test_a", "test_one[2-x[0]]", 3.0),
    ("tests.test_b", "test_two", 31.2),
    ("tests.test_b", "test_three", 2.99),
)


def test_a_test_is_slow_if_one_of_its_cases_is():
    found = slow.listed(EVERYTHING)
    assert found == ["tests/ops/test_a.py::test_one", "tests/test_b.py::test_two"]


def test_a_file_is_if_another_of_its_tests_takes_the_time_of_the_first():
    moved, chance = ("tests.test_b", "test_three", 30.9), ("tests.ops.test_a", "test_x", 5.9)
    found = slow.listed(EVERYTHING, report(moved, chance))
    assert found == ["tests/ops/test_a.py::test_one", "tests/test_b.py"]


def test_what_is_listed_is_there():
    lines = slow.LIST.read_text(encoding="utf-8").splitlines()
    assert lines == sorted(set(lines))
    for path, _, name in (line.partition("::") for line in lines):
        text = (ROOT / path).read_text(encoding="utf-8")
        assert not name or f"\ndef {name}(" in text, f"{path}: {name}"


def test_ci_runs_them_too():
    script = (ROOT / ".ci/run").read_text(encoding="utf-8").splitlines()
    assert "    .venv/bin/python -m pytest -n 2 -m slow" in script
    assert 'slow || failed+=("slow tests")' in script
