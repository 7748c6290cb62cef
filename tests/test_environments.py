"""The table of environments is that of the results, and these are what setup.py promises."""

import re
from pathlib import Path

import environments as e

SETUP = (e.ROOT / "setup.py").read_text(encoding="utf-8")


def lowest(pattern):
    return re.search(pattern, SETUP)[1]


def first_two(versions):
    return min(tuple(int(part) for part in version.split(".")[:2]) for version in versions)


def test_the_table_is_that_of_the_results():
    text = e.README.read_text(encoding="utf-8")
    assert e.filled(text, e.load()) == text, "run: python tests/environments.py --table"
    assert e.filled(text.replace("| 3.11", "| 3.9", 1), e.load()) == text


def test_every_pair_that_has_run_passed_and_the_others_say_that_they_have_not():
    ran = [e.pair_of(result) for result in e.load()]
    assert ran == [pair for pair in e.PAIRS if pair in ran]
    for line in e.table(e.load()).splitlines()[2:]:
        python, torch = line.split(" | ")[:2]
        has_run = (python.removeprefix("| ").rpartition(".")[0], torch.partition("+")[0]) in ran
        assert has_run != ("not run" in line), line
    for result in e.load():
        assert result["triton"] == e.TRITON[e.pair_of(result)[1]]
        assert result["failed"] == []
        assert result["passed"] > 1000


def test_the_oldest_that_setup_admits_have_run():
    pythons, torches = zip(*e.PAIRS, strict=True)
    for versions, promised in (
        (torches, lowest(r'"torch>=([\d.]+)"')),
        (e.TRITON.values(), lowest(r"'triton>=([\d.]+);")),
        (pythons, lowest(r'python_requires=">=([\d.]+)"')),
    ):
        assert first_two(versions) == first_two([promised])


def test_the_core_is_there():
    paths = (e.ROOT / e.CORE.removeprefix("@")).read_text(encoding="utf-8").split()
    assert len(paths) > 3 and all((e.ROOT / path).exists() for path in paths)


def test_a_report_is_counted(tmp_path):
    report = tmp_path / "report.xml"
    report.write_text(
        '<testsuites><testsuite tests="4" skipped="1" errors="1" failures="1">'
        '<testcase classname="tests.a" name="passes"/>'
        '<testcase classname="tests.a" name="skips"><skipped/></testcase>'
        '<testcase classname="tests.a" name="fails"><failure/></testcase>'
        '<testcase classname="tests.a" name="breaks"><error/></testcase>'
        "</testsuite></testsuites>"
    )
    failed = ["tests.a::fails", "tests.a::breaks"]
    assert e.counts(Path(report)) == {"passed": 1, "skipped": 1, "failed": failed}
