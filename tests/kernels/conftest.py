import pytest
import torch

pytest.importorskip("triton")


@pytest.fixture
def device():
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def count_calls(monkeypatch):
    """Of ``module.name``: a list that grows by the call's ``kind`` at each."""

    def count(module, name):
        calls, original = [], getattr(module, name)

        def counted(*args, **kwargs):
            calls.append(kwargs["kind"])
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, counted)
        return calls

    return count
