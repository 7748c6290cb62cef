"""What every trainer that hands out log-probs needs: their log-ratio, perceived."""

import torch
from torch import Tensor

from humanline.perception import Perception


def perceived_log_ratio(
    perception: Perception, logps: Tensor, ref_logps: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Perceived log-ratios, and how many of how many completion tokens kept their gradient.

    Args:
        perception: how a log-ratio is perceived.
        logps: log-probs of the policy, floating point, any shape.
        ref_logps: those of the reference, same shape; taken as a constant.
        mask: completion tokens, same shape, any dtype.

    Returns:
        ``c`` of that shape, 0 where masked, differentiable with respect to ``logps``; and two int64
        scalars, whose ratio is :func:`share`.
    """
    flat = mask.reshape(-1).to(torch.bool)
    d = torch.where(flat, (logps - ref_logps.detach()).reshape(-1), 0)
    c, unclamped = perception.perceive(d, flat)
    return torch.where(flat, c, 0).view(logps.shape), (unclamped & flat).sum(), flat.sum()


def share(kept: Tensor, tokens: Tensor) -> Tensor:
    """The unclamped share, 0 where there is no completion token."""
    return kept / tokens.clamp(min=1)
