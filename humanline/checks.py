"""Checks on what callers pass: a clear error before anything runs.

Checks of types, shapes, dtypes and devices always run. Checks of values cost a device
synchronisation on a GPU, so there they run only inside :func:`debug`; on the CPU they always do.

What is of a wrong type altogether (a list for a tensor, a string for a number) is a TypeError,
everything else a ValueError.
"""

import reprlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import fields
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

_debug = ContextVar("humanline_debug", default=False)


@contextmanager
def debug(enabled: bool = True) -> Iterator[None]:
    """Within this context, checks that read values from a GPU run too (each one synchronises).

    Args:
        enabled: False for the checks that are free, within a context where all run.
    """
    token = _debug.set(enabled)
    try:
        yield
    finally:
        _debug.reset(token)


def free_to_read(x: Tensor) -> bool:
    """Whether looking at a tensor's values waits for nothing: it is on a CPU."""
    return x.device.type == "cpu"


def require(
    condition: bool | Callable[[], bool],
    message: str | Callable[[], str],
    on: Tensor | None = None,
    error: type[Exception] = ValueError,
) -> None:
    """Raise ``error(message)`` unless ``condition`` holds.

    A condition that reads values of a tensor is given as a function, with that tensor as ``on``.
    """
    if on is not None and (is_compiling() or not (free_to_read(on) or _debug.get())):
        return
    if not (condition() if callable(condition) else condition):
        raise error(message() if callable(message) else message)


def debugging() -> bool:
    """Whether checks that cost time run: inside :func:`debug`, outside of ``torch.compile``."""
    return not is_compiling() and _debug.get()  # in this order: Dynamo cannot read the latter


# Tensors


def require_tensors(**tensors: Any) -> None:
    """All given values are tensors, and whole ones: not a DTensor, of which a rank has a part."""
    for name, x in tensors.items():
        require(
            isinstance(x, Tensor), lambda name=name, x=x: _not_a_tensor(name, x), error=TypeError
        )
        sharding = getattr(x, "placements", None)
        require(
            sharding is None,
            lambda name=name, sharding=sharding: (
                f"{name} is a DTensor with placements {sharding}, and a whole tensor is needed: "
                + unsharding(name)
            ),
        )


def require_tensors_or_none(**tensors: Any) -> None:
    """As :func:`require_tensors`, of what may be left out."""
    require_tensors(**{name: x for name, x in tensors.items() if x is not None})


# A bare full_tensor() takes the gradient for the same on all ranks: of a weight each would keep its
# slice of what its own rows gave, and the other ranks' rows would be lost.
_UNSHARD = (
    "where the ranks of its mesh have the same rows (tensor parallel), name them, "
    "parallel=humanline.Parallel(vocab=…); where each has rows of its own (FSDP2), "
    "parallel=humanline.Parallel(data=…), or "
    "call unshard() of the FSDP2 module that holds it first, or pass "
    '{0}.full_tensor(grad_placements=[Partial("avg")]), one Partial for each dimension of the mesh '
    "(from torch.distributed.tensor), which averages over ranks what each one's rows give. "
    "{0}.full_tensor() alone would give each rank the gradient of its own rows only"
)
_UNSHARD_ROWS = (
    "name who shares its rows, parallel=humanline.Parallel(data=…) or (sequence=…), or pass "
    "{0}.to_local() where each rank holds whole rows of its own, or {0}.full_tensor() where "
    "all ranks compute the loss of the same rows"
)


def unsharding(name: str) -> str:
    """What to pass in place of a DTensor."""
    return (_UNSHARD if name.endswith(("weight", "bias")) else _UNSHARD_ROWS).format(name)


def _not_a_tensor(name: str, x: Any) -> str:
    if isinstance(x, nn.Module):
        has = [part for part in ("weight", "bias") if isinstance(getattr(x, part, None), Tensor)]
        part = next((part for part in has if name.endswith(part)), None)
        hint = f": pass its {part}, such as {name}=head.{part}" if part else ""
        return f"{name} must be a tensor, got the module {type(x).__name__}{hint}"
    return f"{name} must be a tensor, got {given(x)}"


def given(x: Any) -> str:
    """A value as messages show it: short, and with its type."""
    if isinstance(x, Tensor):
        return f"a tensor of shape {list(x.shape)}"
    return "None" if x is None else f"the {type(x).__name__} {reprlib.repr(x)}"


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


def require_mask(name: str, mask: Tensor) -> None:
    """Each value is true or false: bool, or 0 or 1 in any dtype."""

    def bad():
        return mask[(mask != 0) & (mask != 1)]

    require(
        lambda: mask.dtype is torch.bool or bad().numel() == 0,
        lambda: (
            f"{name} must be bool or 0/1, got {mask.dtype} with the value {bad()[0].item()}"
            + (" (of labels, the mask is labels != -100)" if (mask == -100).any() else "")
        ),
        on=mask,
    )


def require_finite(name: str, x: Tensor, mask: Tensor) -> None:
    """Where ``mask``, of the same shape, holds, ``x`` is not infinite.

    NaN passes, and makes the loss NaN: a policy that has diverged is seen where it is looked for.
    """

    def bad():
        return x[mask & x.isinf()]

    require(
        lambda: bad().numel() == 0,
        lambda: f"{name} must be finite on completion tokens, got {bad()[0].item()}",
        on=x,
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


# Numbers


def require_numbers(**numbers: Any) -> None:
    """All given values are real numbers."""
    for name, x in numbers.items():
        _require_kind(name, x, float)


def require_numbers_or_none(**numbers: Any) -> None:
    """As :func:`require_numbers`, of what may be left out."""
    require_numbers(**{name: x for name, x in numbers.items() if x is not None})


def require_integers(**numbers: Any) -> None:
    """All given values are whole numbers."""
    for name, x in numbers.items():
        _require_kind(name, x, int)


def require_number_or_tensor(name: str, x: Any) -> None:
    """A real number, or a tensor as :func:`require_tensors` has it."""
    if isinstance(x, Tensor):
        require_tensors(**{name: x})
    else:
        require(
            _is_a(x, float),
            lambda: f"{name} must be a number or a tensor, got {given(x)}",
            error=TypeError,
        )


def require_fields(value: Any) -> None:
    """The fields of a dataclass that are declared as numbers, names, flags, or tuples of these, are
    that. Fields of other types are for the class itself to check."""
    for field in fields(value):
        _require_kind(
            f"{type(value).__name__}'s {field.name}", getattr(value, field.name), field.type
        )


def _require_kind(name: str, x: Any, kind: Any) -> None:
    require(
        _is_a(x, kind),
        lambda: f"{name} must be {' or '.join(_words(kind))}, got {given(x)}",
        error=TypeError,
    )


_WORDS = {float: "a number", int: "a whole number", bool: "True or False", str: "a name",
          NoneType: "None"}  # fmt: skip
_ABSTRACT = {float: Real, int: Integral}  # numpy's numbers too


def _is_a(x: Any, kind: Any) -> bool:
    origin = get_origin(kind)
    if origin in (Union, UnionType):
        return any(_is_a(x, k) for k in get_args(kind))
    if origin is tuple and get_args(kind)[-1] is ...:
        return isinstance(x, tuple | list) and all(_is_a(item, get_args(kind)[0]) for item in x)
    if kind not in _WORDS:
        return True
    return isinstance(x, _ABSTRACT.get(kind, kind)) and (kind is bool or not isinstance(x, bool))


def _words(kind: Any) -> list[str]:
    origin = get_origin(kind)
    if origin in (Union, UnionType):
        return [word for k in get_args(kind) for word in _words(k)]
    if origin is tuple:
        return ["several of them"]
    return [_WORDS[kind]]
