"""Counter-based random numbers: Philox 4x32-10, the words Triton's ``tl.randint4x`` draws.

A draw depends on ``(seed, row, stream)`` alone: whatever computes it, on whatever device, takes
the same words, and the same log of them to the last place or so. (Salmon et al., "Parallel random
numbers: as easy as 1, 2, 3", SC 2011.)
"""

import math

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK32 = 0xFFFFFFFF


def fresh_seed() -> int:
    """A seed from torch's default CPU generator."""
    return int(torch.randint(0, 2**31 - 1, ()))


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of the 64-bit product; int64 holds it only in halves."""
    low_half, high_half = a * (b & 0xFFFF), a * (b >> 16)
    middle = high_half + (low_half >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low_half & 0xFFFF)


def philox(seed: int, counter: tuple[Tensor | int, ...], like: Tensor) -> tuple[Tensor, ...]:
    """Four tensors of 32-bit words (as int64) for a 128-bit counter given as four words."""
    c0, c1, c2, c3 = (c & _MASK32 for c in counter)
    k0, k1 = seed & _MASK32, (seed >> 32) & _MASK32
    for _ in range(10):
        hi_a, lo_a = _multiply(_MULTIPLIERS[0], c0)
        hi_b, lo_b = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = hi_b ^ c1 ^ k0, lo_b, hi_a ^ c3 ^ k1, lo_a
        k0, k1 = (k0 + _WEYL[0]) & _MASK32, (k1 + _WEYL[1]) & _MASK32
    return c0, c1, c2, c3


def uniform(words: Tensor) -> Tensor:
    """32-bit words to float64 in the open interval (0, 1)."""
    return (words.to(torch.float64) + 0.5) * 2.0**-32


def log_beta(a: float, b: float, like: Tensor, seed: int, stream: int) -> Tensor:
    """``log B`` with one ``B ~ Beta(a, b)`` for each row of ``like`` (shape and dtype ``[N]``).

    In log space, because for a small ``a`` most draws are below the smallest float.
    """
    row = torch.arange(like.numel(), device=like.device)
    if b == 1:  # the inverse distribution function has a closed form
        return (_log_uniform(seed, row, stream) / a).to(like.dtype)
    x = _log_gamma(a, seed, row, 2 * stream + 2)
    y = _log_gamma(b, seed, row, 2 * stream + 3)
    return (x - torch.logaddexp(x, y)).to(like.dtype)


def _log_uniform(seed: int, row: Tensor, stream: int) -> Tensor:
    return uniform(philox(seed, (row, row >> 32, stream, 0), row)[0]).log()


def _log_gamma(shape: float, seed: int, row: Tensor, stream: int) -> Tensor:
    """``log G``, ``G ~ Gamma(shape)``: Marsaglia and Tsang (2000), all rows in step.

    A proposal is accepted with probability above 0.95; 16 of them fail together with one below
    1e-20, and then the last stands.
    """
    boosted = shape + 1 if shape < 1 else shape
    d = boosted - 1 / 3
    c = 1 / math.sqrt(9 * d)
    log_g = torch.zeros_like(row, dtype=torch.float64)
    pending = torch.ones_like(row, dtype=torch.bool)
    for attempt in range(1, 17):
        words = philox(seed, (row, row >> 32, stream, attempt), row)
        u1, u2, u3 = (uniform(w) for w in words[:3])
        normal = (-2 * u1.log()).sqrt() * (2 * math.pi * u2).cos()
        v = ((1 + c * normal) ** 3).clamp(min=torch.finfo(torch.float64).tiny)
        log_g = torch.where(pending, (d * v).log(), log_g)
        pending = pending & (u3.log() >= normal**2 / 2 + d - d * v + d * v.log())
    if shape < 1:
        log_g = log_g + _log_uniform(seed, row, stream) / shape
    return log_g
