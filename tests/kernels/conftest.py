import os

import pytest
import torch

pytest.importorskip("triton")


@pytest.fixture
def device():
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def on_the_device(request):
    """A test that does not ask for the device has its tensors on the CPU: only the interpreter
    takes these."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if torch.cuda.is_available() and not interpreted and "device" not in request.fixturenames:
        pytest.skip("needs Triton's interpreter: its tensors are on the CPU")


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
