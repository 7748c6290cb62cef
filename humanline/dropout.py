"""Dropout and other noise of training: measured, then switched off.

A log-ratio to a reference must hold the policy's drift alone. What is random in training mode makes
the policy differ from itself, which perception takes for drift. No list of names finds it all:
some models keep their dropout in plain numbers, or drop whole layers. What is found here is every
module that draws a random number while the model scores a batch, whatever it is called.
"""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Score = Callable[[], Tensor]


def switch_off_noise(model: nn.Module, score: Score) -> list[str]:
    """Let a model in training mode score as it does in evaluation mode.

    Dropout modules get the probability 0. A module that draws random numbers on its own, and every
    other of its type, runs its forward (not those of its submodules) as in evaluation, whatever
    ``train()`` says later. Random number generators, gradients and modes are left as they were.

    Args:
        model: the policy, wrapped or not.
        score: runs ``model`` on a batch and returns its log-probs, of any shape. Called a few
            times, without gradients.

    Returns:
        The names of the modules that drew random numbers and no longer do.

    Raises:
        ValueError: two scores of the same batch still differ; the modules that draw are named.
    """
    found: dict[str, None] = {}
    # More than once, as noise can cut a forward short: a dropped layer leaves no keys to read.
    while new := [name for name in noisy_modules(model, score) if name not in found]:
        found.update(dict.fromkeys(new))
        _switch_off(model, {type(model.get_submodule(name)) for name in new})
    _require_one_score(model, score)
    return list(found)


def _switch_off(model: nn.Module, kinds: set[type]) -> None:
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        elif type(module) in kinds:
            _run_as_in_evaluation(module)


@torch.no_grad()
def noisy_modules(model: nn.Module, score: Score) -> list[str]:
    """Names of the modules that draw random numbers in training mode, outside their submodules.

    Where the noise makes ``score`` fail, those that drew until then.
    """
    drawn: dict[str, None] = {}
    running = [""]  # from the model down to the module whose forward runs

    with _mode(model, True), _random_numbers_kept():
        last = _generators()

        def attribute() -> None:
            nonlocal last
            now = _generators()
            if now != last:
                drawn[running[-1]] = None
            last = now

        def enter(name: str) -> Callable:
            def hook(*_: Any) -> None:
                attribute()
                running.append(name)

            return hook

        def leave(*_: Any) -> None:
            attribute()
            running.pop()

        handles = []
        for name, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(enter(name)))
            handles.append(module.register_forward_hook(leave, always_call=True))
        try:
            score()
            attribute()
        except Exception:
            if not drawn:
                raise
        finally:
            for handle in handles:
                handle.remove()
    return list(drawn)


@torch.no_grad()
def _require_one_score(model: nn.Module, score: Score) -> None:
    with _random_numbers_kept():
        scores = []
        for training in (True, False):
            with _mode(model, training):
                scores.append(score().double())
    difference = float((scores[0] - scores[1]).abs().max()) if scores[0].numel() else 0.0
    if not difference <= _tolerance(model):
        names = noisy_modules(model, score)
        why = (
            f"{', '.join(name or type(model).__name__ for name in names)} draw random numbers"
            if names
            else "no random number is drawn, so something in it computes differently in training"
        )
        raise ValueError(
            f"{type(model).__name__} scores the same batch differently in training and in "
            f"evaluation mode, by up to {difference:.3g} nats a log-prob: {why}. A log-ratio to a "
            "reference would hold this noise; switch it off in the model or its configuration"
        )


def _tolerance(model: nn.Module) -> float:
    """Rounding aside, such as that of additions whose order a GPU does not fix."""
    dtypes = [p.dtype for p in model.parameters() if p.is_floating_point()]
    eps = max((torch.finfo(dtype).eps for dtype in dtypes), default=0.0)
    return max(eps, torch.finfo(torch.float32).eps) ** 0.5


def _run_as_in_evaluation(module: nn.Module) -> None:
    """Its forward sees ``training == False``. Between forwards the flag is what ``train()`` made
    it: whether layers are recomputed in the backward depends on it."""
    module.register_forward_pre_hook(_enter)
    module.register_forward_hook(_leave, always_call=True)


# No closures, so that a model that has them can still be copied and pickled.


def _enter(module: nn.Module, *_: Any) -> None:
    module._training_outside = module.training
    module.training = False


def _leave(module: nn.Module, *_: Any) -> None:
    module.training = module._training_outside


@contextmanager
def _mode(model: nn.Module, training: bool) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def _random_numbers_kept() -> Iterator[None]:
    state = random.getstate()
    try:
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(state)


def _generators() -> tuple[Any, ...]:
    """The state of each generator that a module may draw from."""
    states = [torch.get_rng_state()]
    if torch.cuda.is_available():
        states += torch.cuda.get_rng_state_all()
    return random.getstate(), *(state.numpy().tobytes() for state in states)
