import importlib.util
import os

import numpy as np
import pytest
import torch

# Before anything imports Triton: without a GPU its interpreter runs the kernels on CPU tensors.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1" and bool(
    importlib.util.find_spec("triton")
)

torch.set_num_threads(1)  # tensors are small here: threads would only wait for each other


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def round_to_nearest(monkeypatch):
    """Triton's interpreter truncates where hardware rounds float32 to the nearest bfloat16."""
    if not INTERPRETING:
        return
    from triton.runtime import interpreter

    truncate = interpreter._convert_float

    def convert(data, source, target, rounding_mode):
        if (source.name, target.name) != ("fp32", "bf16"):
            return truncate(data, source, target, rounding_mode)
        flat = torch.from_numpy(np.ascontiguousarray(data, np.float32)).bfloat16()
        return flat.view(torch.int16).numpy().view(np.uint16).reshape(data.shape)

    monkeypatch.setattr(interpreter, "_convert_float", convert)


@pytest.fixture(autouse=True)
def multiply_bfloat16(monkeypatch):
    """Triton's interpreter multiplies the bit patterns of bfloat16 matrices as integers."""
    if not INTERPRETING:
        return
    from triton.runtime import interpreter

    dot = interpreter.InterpreterBuilder.create_dot

    def widened(x):
        if x.dtype.scalar.name != "bf16":
            return x
        values = (x.data.astype(np.uint32) << 16).view(np.float32)
        return interpreter.TensorHandle(values, interpreter.tl.float32)

    def create_dot(self, a, b, *rest):
        return dot(self, widened(a), widened(b), *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
