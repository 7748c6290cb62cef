"""The Hub layout, loaded by Hugging Face's own ``kernels``."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from oracle import leaf

import humanline as hl
from humanline.integrations import hub

kernels = pytest.importorskip("kernels", reason="Hugging Face's kernels loads what is built")

LABELS = torch.tensor([[3, -100, 8], [0, 5, 2]])
LOGITS = torch.randn(2, 3, 9, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    out = tmp_path_factory.mktemp("hub")
    hub.build(out)
    return out


@pytest.fixture(scope="module")
def loaded(built):
    return kernels.get_local_kernel(built)


def both(f, *libraries):
    """``f(library, leaf)`` summed and differentiated, for each library."""
    results = []
    for library in libraries:
        x = leaf(LOGITS)
        value = f(library, x)
        value.sum().backward()
        results.append((value.detach(), x.grad))
    return results


def token_logps(library, x):
    return library.token_logps(x, LABELS)


def linear_token_logps(library, x):
    return library.linear_token_logps(x, LOGITS[0], LABELS % 3)


def loss(library, x):
    objective = library.DPO(perception=library.Clip(-0.5, 0.5))
    return objective.from_logits(x, LABELS, -torch.ones(2, 3))[0]


@pytest.mark.parametrize("f", [token_logps, linear_token_logps, loss])
def test_it_computes_what_humanline_does(f, loaded):
    theirs, ours = both(f, loaded, hl)
    for a, b in zip(theirs, ours, strict=True):
        assert torch.equal(a, b)


def test_it_is_another_library_with_ops_of_its_own(loaded):
    assert loaded.__name__ != "humanline" and loaded.Clip is not hl.Clip
    ours, theirs = torch.ops.humanline, getattr(torch.ops, loaded.__name__)
    assert theirs.token_logps.default is not ours.token_logps.default
    value = loaded.token_logps(leaf(LOGITS), LABELS)
    assert loaded.__name__ in value.grad_fn.name()  # or it would have called ours


def test_all_it_promises_is_there(loaded):
    assert set(loaded.__all__) == {*hl.__all__, "kernels"}
    for name in loaded.__all__:
        assert getattr(loaded, name) is not None


def test_the_raw_kernels(loaded):
    pytest.importorskip("triton")
    from humanline.kernels import token_logps as ours

    raw = loaded.kernels.token_logps
    assert raw is not ours and "triton" in vars(raw)
    device = "cuda" if torch.cuda.is_available() else "cpu"  # there the interpreter runs it
    arguments = [x.to(device) for x in (LOGITS, LABELS, torch.ones(()))]
    results = (m.token_logps_forward(*arguments, True) for m in (raw, ours))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    with pytest.raises(AttributeError, match="has no nothing"):
        loaded.kernels.nothing  # noqa: B018


def test_it_loads_without_humanline(built):
    code = f"""
        import sys
        sys.modules["humanline"] = None
        from pathlib import Path
        import kernels, torch
        k = kernels.get_local_kernel(Path({str(built)!r}))
        for path in Path(k.__file__).parent.rglob("*.py"):
            parts = path.relative_to(Path(k.__file__).parent).with_suffix("").parts
            __import__(".".join([k.__name__, *parts]).removesuffix(".__init__"))
        print(k.token_logps(torch.zeros(2, 4), torch.tensor([1, 3])).exp().tolist())
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[0.25, 0.25]"


def test_every_variant_is_the_same_library_under_its_own_name(built):
    folders = sorted((built / "build").iterdir())
    assert [f.name for f in folders] == ["torch-cpu", "torch-cuda", "torch-rocm"]
    names = set()
    for folder in folders:
        metadata = json.loads((folder / "metadata.json").read_text())
        assert metadata["backend"] == {"type": folder.name.removeprefix("torch-")}
        names.add(metadata["id"])
        text = (folder / "ops/logits/token_logps.py").read_text()
        assert "humanline::" not in text.replace(f"{metadata['id']}::", "")
    assert len(names) == 3


def test_a_build_is_reproducible(built, tmp_path):
    (folder, *_) = hub.build(tmp_path / "again")
    for file in folder.rglob("*.*"):
        assert (
            file.read_bytes() == (built / "build/torch-cpu" / file.relative_to(folder)).read_bytes()
        )


# What is refused


def test_imports_are_made_relative_or_refused():
    text = "from humanline import checks\nif 1:\n    from humanline.kernels.rows import f\n"
    expected = "from .. import checks\nif 1:\n    from ..kernels.rows import f\n"
    assert hub.relative(Path("ops/x.py"), text) == expected
    for bad in ("import humanline as hl", "import numpy.linalg", "from transformers import x"):
        with pytest.raises(ValueError, match=r"x\.py:2 imports .*: a kernel must not"):
            hub.relative(Path("x.py"), f"import torch\n{bad}\n")


def test_nothing_is_overwritten(tmp_path, capsys):
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(SystemExit, match="2"):
        hub.main([str(tmp_path)])
    assert "is not an empty folder" in capsys.readouterr().err
    assert [f.name for f in tmp_path.iterdir()] == ["notes"]
