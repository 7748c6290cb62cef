"""Plots: drawn from results, and committed ones from the results that are committed."""

from dataclasses import replace

import pytest

pytest.importorskip("matplotlib")

from bench import columns, plots
from bench.cases import Case
from bench.measure import Result
from bench.peers import PEERS
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
    for path, plot in zip(plots.draw(tmp_path, drawn), drawn, strict=True):
        digest = plots.digest_of(plot.points).encode()
        assert digest in path.read_bytes() and digest in path.with_suffix(".svg").read_bytes()


def test_predictions_are_not_drawn_like_measurements():
    predicted = {name for name in plots.memory_at_scale().points if name.endswith(plots.PREDICTED)}
    assert predicted == {"humanline, predicted", "eager, predicted"}
    of_prediction = plots.style_of("humanline, predicted")
    assert not of_prediction["marker"] and of_prediction["linestyle"] == ":"
    measured = [plots.style_of(name) for name in plots.PEERS if name != plots.FLOOR]
    assert all(style["marker"] and style["linestyle"] != ":" for style in measured)
    assert plots.style_of("humanline")["color"] == of_prediction["color"]


def test_every_peer_has_a_look_of_its_own():
    assert set(plots.PEERS) == {peer.name for peer in PEERS} | {plots.FLOOR}
    colours = [colour for name, (colour, _, _) in plots.PEERS.items() if name != plots.FLOOR]
    assert len(set(colours)) == len(colours)


def test_the_committed_figures_name_peers_as_the_results_do():
    for results in committed():
        for plot in plots.figures(results):
            named = {name for name in plot.points if ": " not in name}
            named |= {n for name, bars in plot.points.items() if ": " in name for n, _ in bars}
            assert {name.removesuffix(plots.PREDICTED) for name in named} <= set(plots.PEERS)


@pytest.mark.parametrize(
    "values, end", [([1.0, 2.0], 2.0), ([1.0, 2.1], 1.3), ([1, 2, 50], 2.6), ([5.0], 5.0)]
)
def test_one_bar_does_not_take_most_of_the_width(values, end):
    assert plots.scale_end(values) == pytest.approx(end)


def test_predictions_do_not_squeeze_what_was_measured():
    for results in committed():
        for plot in plots.tokens(results):
            measured = [x for n, line in plot.points.items() for x, _ in line if n in plots.PEERS]
            drawn = [x for line in plot.points.values() for x, _ in line]
            assert max(drawn) <= 4 * max(measured)
            assert ("predicted" in plot.title) == ("humanline, predicted" in plot.points)


def test_committed_plots_are_of_the_committed_results():
    model = plots.memory_at_scale()
    wanted = {f"bench/results/model/{model.name}": model.points}
    for results in committed():
        folder = (results.path.parent / "plots").relative_to(ROOT)
        wanted |= {f"{folder}/{plot.name}": plot.points for plot in plots.figures(results)}
    for path in ROOT.glob(f"bench/results/*/{columns.FILE}"):
        plot = plots.columns_left_out(path)
        wanted[f"{path.parent.relative_to(ROOT)}/plots/{plot.name}"] = plot.points
    for name, points in wanted.items():
        for suffix in (".png", ".svg"):
            file = ROOT / (name + suffix)
            assert file.exists(), "run: python -m bench.plots"
            assert plots.digest_of(points).encode() in file.read_bytes(), (
                "run: python -m bench.plots"
            )
