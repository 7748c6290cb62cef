"""A DataLoader's micro-batches as optimizer steps, epoch after epoch."""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import torch

from humanline.checks import require


def optimizer_steps(
    loader: Iterable[Any], gradient_accumulation_steps: int = 1, epochs: int = 1, seed: int = 0
) -> Iterator[list[Any]]:
    """For each optimizer step the list of its micro-batches.

    The last step of an epoch takes what is left of it. At an epoch's begin whatever of the loader
    (itself, its sampler, batch sampler, dataset) has ``set_epoch`` is told; a loader that shuffles
    by itself shuffles anew. Random numbers of torch on the CPU are drawn from a stream of its own:
    training's are left alone, so that it does not matter how early a batch is drawn. The steps
    depend on ``seed`` and the loader alone, so ``islice(optimizer_steps(…), n, None)`` goes on
    after the ``n`` steps of an interrupted run.

    Args:
        loader: a DataLoader, or any iterable of micro-batches.
        gradient_accumulation_steps: micro-batches in a step.
        epochs: passes through the loader.
        seed: of the loader's random numbers.

    Raises:
        ValueError: a number out of range; an iterator, which can be passed through once, and more
            than one epoch.
    """
    require(
        gradient_accumulation_steps >= 1,
        lambda: f"gradient_accumulation_steps must be positive, got {gradient_accumulation_steps}",
    )
    require(epochs >= 0, lambda: f"epochs must be at least 0, got {epochs}")
    require(
        epochs <= 1 or not isinstance(loader, Iterator),
        lambda: (
            f"{epochs} epochs need a loader that can be iterated over again, such as a list or a "
            f"DataLoader; got an iterator ({type(loader).__name__})"
        ),
    )
    return _apart(_steps(loader, gradient_accumulation_steps, epochs), seed)


def _steps(loader: Iterable[Any], accumulation: int, epochs: int) -> Iterator[list[Any]]:
    parts = [getattr(loader, name, None) for name in ("sampler", "batch_sampler", "dataset")]
    for epoch in range(epochs):
        for part in (loader, *parts):
            if hasattr(part, "set_epoch"):
                part.set_epoch(epoch)
        batches = iter(loader)
        while step := list(islice(batches, accumulation)):
            yield step


def _apart(items: Iterator[Any], seed: int) -> Iterator[Any]:
    """``items``, drawn with random numbers of their own."""
    state = torch.Generator().manual_seed(seed).get_state()
    while True:
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(state)
            try:
                item = next(items)
            except StopIteration:
                return
            state = torch.get_rng_state()
        yield item
