"""What an error may be in any case, however small that of the float32 it is compared with."""

import torch
from torch import Tensor


def floor(truth: Tensor, dtype: torch.dtype, units: float = 0.5) -> float:
    """So many units in the last place of the largest number.

    A GPU's kernels take the chip's own exponentials and logarithms, good to 2⁻²² where torch's are
    to 2⁻²⁴, and fuse multiply-adds: 16 units, and 4 of the number 1, as log-probs near 0 are
    differences of numbers about 1.
    """
    eps, largest = torch.finfo(dtype).eps, truth.abs().max().item()
    if truth.is_cuda:
        return max(16 * eps * largest, 4 * torch.finfo(torch.float32).eps)
    return units * eps * largest
