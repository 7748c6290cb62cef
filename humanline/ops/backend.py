"""Which backend runs an op: Triton kernels on GPUs, torch everywhere else."""

import importlib.util
import os

from torch import Tensor

from humanline.checks import require

HAS_TRITON = importlib.util.find_spec("triton") is not None


def interpreting() -> bool:
    """Whether Triton's interpreter is on, which runs kernels on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def choose_backend(x: Tensor, backend: str | None = None) -> str:
    """The backend that runs ``x``: the one asked for, or the best for its device.

    Raises:
        ValueError: an unknown backend, or Triton asked for where it cannot run.
    """
    require(
        backend in (None, "triton", "torch"),
        lambda: f'backend must be "triton", "torch" or None, got {backend!r}',
    )
    can = HAS_TRITON and (x.device.type == "cuda" or (x.device.type == "cpu" and interpreting()))
    if backend == "triton":
        require(
            can and x.element_size() <= 4,
            lambda: (
                f'backend="triton" needs Triton, a GPU tensor (or TRITON_INTERPRET=1) and at most '
                f"32 bits an element; got {x.dtype} on {x.device}, Triton "
                f"{'installed' if HAS_TRITON else 'not installed'}"
            ),
        )
    if backend is None:
        # The interpreter is for tests: nobody wants it unasked.
        return "triton" if can and x.device.type == "cuda" and x.element_size() <= 4 else "torch"
    return backend
