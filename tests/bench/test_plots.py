"""Plots: drawn from results, and committed ones from the results that are committed."""

from dataclasses import replace

import pytest

pytest.importorskip("matplotlib")

from bench import plots
from bench.cases import Case
from bench.measure import Result
from bench.run import ROOT, Results, committed

CASE = Case("grpo", "logits", tokens=64, vocab=100)


def sweep():
    results = Results({"device": "a GPU"})
    for i, tokens in enumerate((64, 128, 256)):
        for peer in ("bare copy", "humanline", "eager"):
            case = replace(CASE, tokens=tokens)
            results.add(Result(case, peer, seconds=0.1 * (i + 1), peak_bytes=10 ** (6 + i)))
    for std in (1.0, 2.0, 4.0):
        case = replace(CASE, tokens=512, logit_std=std)
        results.add(Result(case, "eager", seconds=1, peak_bytes=1, gradient_error=1e-3 * std))
    for active in (1.0, 0.5, 0.0):
        case = replace(CASE, tokens=1024, active=active)
        results.add(Result(case, "humanline", seconds=0.2, peak_bytes=1))
    return results


def test_each_sweep_has_its_plots(tmp_path):
    paths = plots.draw(tmp_path, plots.figures(sweep()))
    names = {p.name.split("-grpo")[0] for p in paths}
    assert names == {"time-tokens", "memory-tokens", "error-scale", "time-active"}
    for path in paths:
        assert path.stat().st_size > 5000 and path.with_suffix(".svg").exists()


def test_a_file_knows_what_it_was_drawn_from(tmp_path):
    drawn = list(plots.figures(sweep()))
    for path, (_, _, points, _) in zip(plots.draw(tmp_path, drawn), drawn, strict=True):
        digest = plots.digest_of(points).encode()
        assert digest in path.read_bytes() and digest in path.with_suffix(".svg").read_bytes()


def test_predictions_are_not_drawn_like_measurements():
    assert all(name.endswith(plots.PREDICTED) for name in plots.memory_at_scale()[2])
    measured, predicted = (plots._style("humanline" + x, 0) for x in ("", plots.PREDICTED))
    assert measured["marker"] and not predicted["marker"]
    assert measured["linestyle"] != predicted["linestyle"]
    assert measured["color"] == predicted["color"]


def test_committed_plots_are_of_the_committed_results():
    wanted = {"bench/results/model/predicted-memory-tokens": plots.memory_at_scale()[2]}
    for results in committed():
        folder = (results.path.parent / "plots").relative_to(ROOT)
        wanted |= {f"{folder}/{name}": points for name, _, points, _ in plots.figures(results)}
    for name, points in wanted.items():
        for suffix in (".png", ".svg"):
            file = ROOT / (name + suffix)
            assert file.exists(), "run: python -m bench.plots"
            assert plots.digest_of(points).encode() in file.read_bytes(), (
                "run: python -m bench.plots"
            )
