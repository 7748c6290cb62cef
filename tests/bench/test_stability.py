"""How often runs of the miniature fall: the arms, the test, the report of the committed runs."""

import pytest

from bench.study import stability
from bench.study.run import read_config, read_results

STUDY = read_config(stability.CONFIG)


@pytest.fixture(scope="module")
def config():
    return read_config()


@pytest.fixture(scope="module")
def results(config):
    lines, falls = (read_results(path, config) for path in (stability.LINES, stability.FALLS))
    return stability.Results(STUDY, config, lines, falls)


def test_arms_keep_the_tuned_rates_and_bounds_but_for_what_their_name_says(config):
    runs = stability.runs(STUDY, config, 501)
    tuned = config["tuned"]["GRPO humanline k=1"]
    _, _, lr, bound = runs["GRPO humanline k=1"]
    assert (lr, bound) == (tuned["lr"], tuned["bound"])
    assert runs["GRPO humanline k=1, half the bound"][3] == pytest.approx(bound / 2, abs=1e-5)
    arm, _, slower, narrower = runs["GRPO humanline k=1, half the rate"]
    assert slower == lr / 2 and narrower == pytest.approx(bound / 2, rel=0.2)
    # At the tuned rate the rule gives the tuned bound.
    assert stability.drift(arm, lr, config) == tuned["bound"]
    others = set(config["seeds"]) | set(config["tuning"]["seeds"])
    assert not others.intersection(STUDY["seeds"])


def test_mcnemar():
    no, yes = [False] * 8, [True] * 8
    assert stability.mcnemar(no, no) == stability.mcnemar(no[:4] + yes[:4], yes[:4] + no[:4]) == 1
    assert stability.mcnemar(no, yes) == 2 / 2**8
    assert stability.mcnemar(yes[:1] + no[1:], no[:1] + yes[1:]) == 2 * 9 / 2**8


def test_the_committed_report_is_that_of_the_committed_runs(results):
    written = (stability.HERE / stability.REPORT).read_text(encoding="utf-8")
    assert stability.report(results) == written, "run: python -m bench.study.stability"


def test_the_page_says_what_the_report_does(results):
    page = (stability.HERE / "README.md").read_text(encoding="utf-8")

    def fallen(name):
        return sum(results.fallen(name))

    def mean(name):
        return sum(results.last(name)) / len(STUDY["seeds"])

    grpo, dpo = "GRPO humanline k=1", "DPO humanline k=1"
    means = (f"{mean(f'GRPO {n}'):.3f}"[1:] for n in ("offline", "humanline k=1", "online"))
    said = "(offline {}, humanline k=1 {}, online {})".format(*means)
    counts = [
        f"{fallen(grpo)} of 20 humanline runs and {fallen('GRPO sync only k=1')} of 20 with the",
        f"With DPO {fallen('DPO offline')} of 20 fall offline, {fallen(dpo)} with humanline, "
        f"{fallen('DPO online')} online",
        f"half of it: {fallen(grpo + ', half the bound')} fall instead of {fallen(grpo)}; a "
        f"quarter: {fallen(grpo + ', a quarter of the bound')}",
        f"in DPO {fallen('DPO humanline k=16')} fall instead of {fallen(dpo)}",
    ]
    assert [text for text in (said, *counts) if text not in page] == []
    assert fallen("GRPO offline") == fallen("GRPO online") == 0
    assert fallen(grpo + ", half the rate") == fallen(dpo + ", half the rate") == 0
    wrong = [f["wrong"][-1] for f in results.falls]
    said = f"{max(wrong):.0f} to {min(wrong):.0f} after".replace("-", "−")
    assert said in page
