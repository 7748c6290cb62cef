"""Functions with kinks, and the gradient they have on them: one rule, whatever torch's own is.

torch's ``clamp`` has gradient 1 on its bounds up to 2.13 and 0 from 2.14 on. Ours are compositions
of ``torch.where``, whose gradient is beyond doubt, and the device functions in ``kernels/`` have
the same.
"""

import torch
from torch import Tensor


def clamp(x: Tensor, low: float | None = None, high: float | None = None) -> Tensor:
    """``x`` within ``[low, high]``, a closed interval: gradient 1 in it and on its bounds."""
    bounded = x.detach().clamp(low, high)
    return torch.where(bounded == x, x, bounded)


def minimum(a: Tensor, b: Tensor) -> Tensor:
    """The lesser of two, NaN if either is; where they are equal, each has half of the gradient."""
    lesser = torch.where((a < b) | a.isnan(), a, b)
    return torch.where(a == b, (a + b) / 2, lesser)


def positive_part(x: Tensor) -> Tensor:
    """``max(x, 0)``, with gradient 0 at 0."""
    return torch.where(x <= 0, 0, x)


def moving(x: Tensor) -> Tensor:
    """Zero with the gradient of ``x``, which is cut where ``x`` is not finite."""
    return torch.where(x.isfinite(), x - x.detach(), 0)
