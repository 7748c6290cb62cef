"""The bench of left-out columns, and the errors on the rows of a real model where there is one."""

import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from bench import columns, plots
from bench.peers import peers_of

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
from toy import WORDS, make_model_folder

ROOT = Path(__file__).parents[2]


def test_every_line_is_measured(tmp_path, monkeypatch, capsys):
    folder = make_model_folder(tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text(" ".join(WORDS * 8))
    quick = [peer.name for peer in columns.peers_of(columns.Case()) if peer.name != "torch.compile"]
    monkeypatch.setattr(
        columns, "peers_of", lambda case: [p for p in peers_of(case) if p.name in quick]
    )
    monkeypatch.setattr(columns, "PROMPTS", ("1 + 2 =", "a b", "c", "3"))
    record = tmp_path / "record.json"
    columns.main(
        [
            *("--model", str(folder), "--text", str(text), "--tokens", "128", "--rounds", "2"),
            *("--dtypes", "float32", "--json", str(record)),
        ]
    )
    out = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    points = plots.columns_left_out(record).points
    assert {len(line) for line in points.values()} == {len(columns.TOLERANCES) - 1}
    assert {name.partition(": ")[0] for name in points} == {f"{k}, float32" for k in columns.KINDS}
    assert {name.rpartition(": ")[2] for name in points} <= set(plots.PEERS)
    (path,) = plots.draw(tmp_path, [plots.columns_left_out(record)])
    assert path.stat().st_size > 5000
    for kind in columns.KINDS:
        lines = [line.split(" | ") for line in out if line.startswith(f"| {kind} ")]
        ours = [line for line in lines if line[2] == "humanline"]
        assert [float(line[3]) for line in ours] == list(columns.TOLERANCES)
        assert float(ours[0][4]) == 1 and float(ours[0][5]) < 1e-4 > float(ours[0][6])
        assert {"bare GEMMs", "eager"} <= {line[2] for line in lines}


@pytest.mark.parametrize(
    "record", sorted(ROOT.glob("bench/results/*/columns.json")), ids=lambda path: path.parent.name
)
def test_what_the_page_of_calls_says_of_the_errors(record):
    """Of 1e-3, where float32 is, beside eager's in bfloat16."""
    assert "less than a fifth of eager bfloat16's" in (ROOT / "humanline/README.md").read_text()
    lines = [columns.Line(**x) for x in json.loads(record.read_text())["results"]]
    for kind in columns.KINDS:
        of_kind = [x for x in lines if x.rows == kind]
        [ours] = [x for x in of_kind if (x.dtype, x.tolerance) == ("float32", 1e-3)]
        [eager] = [x for x in of_kind if (x.dtype, x.peer) == ("bfloat16", "eager")]
        assert ours.hidden_error < eager.hidden_error / 5
        assert ours.weight_error < eager.weight_error / 5


def real_model() -> Path:
    from humanline.training import model

    return model.cache() / f"{model._NAME}-{model._VERSION}"


@pytest.mark.skipif(
    not real_model().is_dir(), reason="needs the model that humanline train fetches, in its cache"
)
def test_errors_on_the_rows_of_a_real_model(monkeypatch):
    tolerances = (3e-4, 1e-3, 3e-3)
    monkeypatch.setattr(columns, "TOLERANCES", tolerances)
    monkeypatch.setattr(columns, "peers_of", lambda case: [])
    monkeypatch.setattr(columns, "peak_bytes", lambda *_: 0)
    batch = columns.real_batch("text", real_model(), ROOT / "LICENSE", 256)
    torch.set_num_threads(1)
    for tolerance, line in zip(tolerances, columns.measure(batch, "text", 1), strict=True):
        assert line.tolerance == tolerance and 0.05 < line.kept < 0.6
        assert tolerance / 2 < line.weight_error <= 1.5 * tolerance
        assert line.hidden_error <= 5.5 * tolerance
