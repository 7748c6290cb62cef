"""Checks on what callers pass: a clear error before anything runs.

Checks of shapes, dtypes and devices always run. Checks of values cost a device synchronisation on
a GPU, so there they run only inside :func:`debug`; on the CPU they always do.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor
from torch.compiler import is_compiling

_debug = ContextVar("humanline_debug", default=False)


@contextmanager
def debug(enabled: bool = True) -> Iterator[None]:
    """Within this context, checks that read values from a GPU run too (each one synchronises)."""
    token = _debug.set(enabled)
    try:
        yield
    finally:
        _debug.reset(token)


def require(
    condition: bool | Callable[[], bool],
    message: str | Callable[[], str],
    on: Tensor | None = None,
    error: type[Exception] = ValueError,
) -> None:
    """Raise ``error(message)`` unless ``condition`` holds.

    A condition that reads values of a tensor is given as a function, with that tensor as ``on``.
    """
    if on is not None and (is_compiling() or not (on.device.type == "cpu" or _debug.get())):
        return
    if not (condition() if callable(condition) else condition):
        raise error(message() if callable(message) else message)


def require_same_device(**tensors: Tensor | None) -> None:
    """All given tensors live on one device."""
    devices = {name: t.device for name, t in tensors.items() if t is not None}
    require(
        len(set(devices.values())) <= 1,
        "all tensors must be on one device, got "
        + ", ".join(f"{name} on {device}" for name, device in devices.items()),
    )


def require_floating(**tensors: Tensor | None) -> None:
    """All given tensors have a floating-point dtype."""
    for name, t in tensors.items():
        require(
            t is None or t.is_floating_point(),
            lambda name=name, t=t: f"{name} must be floating point, got {t.dtype}",
        )


def require_labels(labels: Tensor, vocab: int, ignore_index: int) -> None:
    """Labels are integers, each in ``[0, vocab)`` or equal to ``ignore_index``."""
    require(
        not labels.is_floating_point() and labels.dtype.is_signed,
        lambda: f"labels must be a signed integer tensor, got {labels.dtype}",
    )

    def bad():
        return labels[(labels != ignore_index) & ((labels < 0) | (labels >= vocab))]

    require(
        lambda: bad().numel() == 0,
        lambda: f"labels must lie in [0, {vocab}) or equal {ignore_index}, got {bad()[0].item()}",
        on=labels,
    )
