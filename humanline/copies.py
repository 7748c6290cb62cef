"""Whether a copy of a model computes with weights of its own.

``copy.deepcopy`` copies what a module holds, and takes functions as they are: a ``forward`` that
was replaced by a function that calls the old one goes on calling that, with the old weights.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ADVICE = (
    "Make the reference before forward is replaced, replace it by a method (types.MethodType) that "
    "goes through its own self, or take ReferenceAdapter or ReferenceLookahead, which need no copy"
)


def borrowed_forward(copy: nn.Module, original: nn.Module) -> str | None:
    """The module of ``copy`` whose ``forward`` was replaced by a function that holds a module of
    ``original``, by name ("" for the copy itself); None if there is none.

    A method is not looked at: it has the copy as ``self``, and may use what else it holds where it
    does not score (TRL's fused head does). :func:`watched` sees what is used.
    """
    originals = {id(module) for module in original.modules()}
    for name, module in copy.named_modules():
        forward = vars(module).get("forward")
        if isinstance(forward, FunctionType):
            reached = _reach(forward, set())
            if any(isinstance(x, nn.Module) and id(x) in originals for x in reached):
                return name
    return None


def _reach(function: Callable, seen: set[int]) -> Iterator[Any]:
    """What a function holds: in its closure, in its defaults, in the globals it names; and what the
    functions and methods among that hold."""
    if id(function) in seen:
        return
    seen.add(id(function))
    held: list[Any] = []
    if isinstance(function, MethodType):
        yield function.__self__
        held = [function.__func__]
    elif isinstance(function, partial):
        held = [function.func, *function.args, *function.keywords.values()]
    elif isinstance(function, FunctionType):
        named = function.__code__.co_names
        held = [
            *_contents(function),
            *(function.__defaults__ or ()),
            *(function.__globals__[name] for name in named if name in function.__globals__),
        ]
    for x in held:
        if isinstance(x, FunctionType | MethodType | partial):
            yield from _reach(x, seen)
        else:
            yield x


def _contents(function: FunctionType) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # a name that is not assigned yet
            continue


@contextmanager
def watched(tensors: dict[str, Tensor], raises: Callable[[str], Exception]) -> Iterator[None]:
    """Within this context, whatever computes with one of the tensors raises.

    Args:
        tensors: not DTensors.
        raises: makes the error of the name of the tensor that was used.
    """
    places = {_place(t): name for name, t in tensors.items()}
    places.pop(0, None)
    with _Watch(places, raises):
        yield


class _Watch(TorchDispatchMode):
    def __init__(self, names: dict[int, str], raises: Callable[[str], Exception]):
        super().__init__()
        self._names, self._raises = names, raises

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        for x in tree_leaves((args, kwargs)):
            if isinstance(x, Tensor) and (name := self._names.get(_place(x))) is not None:
                raise self._raises(name)
        return function(*args, **(kwargs or {}))


def _place(t: Tensor) -> int:
    """Which memory a tensor, or a view of one, lies in; 0 where it has none of its own."""
    return t.untyped_storage().data_ptr() if t.layout == torch.strided else 0
