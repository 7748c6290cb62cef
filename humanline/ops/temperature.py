"""The temperature: one for all rows, or one a row."""

import math

import torch
from torch import Tensor

from humanline import checks
from humanline.rows import IGNORE_INDEX


def check_temperature(temperature: float | Tensor, labels: Tensor) -> None:
    checks.require_number_or_tensor("temperature", temperature)
    if not isinstance(temperature, Tensor):
        checks.require(
            0 < temperature < math.inf,
            lambda: f"temperature must be positive and finite, got {temperature}",
        )
        return
    checks.require(
        temperature.dim() == 0 or temperature.shape == labels.shape,
        lambda: (
            f"temperature must be a float or have one value a row, {list(labels.shape)}; got "
            f"{list(temperature.shape)}"
        ),
    )
    matters = True if temperature.dim() == 0 else labels != IGNORE_INDEX
    checks.require(
        lambda: not bool((~(temperature > 0) & matters).any()),
        lambda: (
            "temperature must be positive, got "
            f"{temperature[~(temperature > 0) & matters].min().item()}"
        ),
        on=temperature,
    )


def row_temperature(temperature: float | Tensor, labels: Tensor) -> Tensor:
    """Temperatures as a flat tensor with one value a row, or a scalar tensor for all rows."""
    if not isinstance(temperature, Tensor):
        return torch.full((), temperature, dtype=torch.float64, device=labels.device)
    return temperature.detach().to(labels.device).reshape(-1 if temperature.dim() else ())


def divide_by_temperature(z: Tensor, temperature: Tensor, rows: slice | Tensor) -> None:
    """In place, ``z [n, V]`` being these rows."""
    if temperature.dim():
        z.div_(temperature[rows, None])
    elif not checks.free_to_read(temperature) or temperature != 1:
        z.div_(temperature)
