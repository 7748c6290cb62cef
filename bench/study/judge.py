"""A judge who errs, as people do: the fewer digits of an answer are wrong, the likelier is it
preferred (Bradley and Terry, 1952),

    P(a is preferred to b) = σ(slope · (wrong digits of b − wrong digits of a)).

Whoever trains sees which of two answers was preferred, and never how many digits are wrong.
"""

import torch
from torch import Tensor

from bench.study import blocks


def wrong_digits(texts: blocks.Texts, answers: Tensor) -> Tensor:
    """``[P, G]``: in how many places of the right answers ``[P, C]``, the end that is due among
    them, the completions have another token or none."""
    places = answers.shape[1]
    same = (texts.ids[:, :, :places] == answers[:, None]) & texts.mask[:, :, :places]
    return (~same).sum(2)


def pairs(wrong: Tensor, slope: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Of each prompt two completions, drawn at random: which one of ``[P, G]`` was preferred, and
    which one was not, ``[P]`` each."""
    two = torch.rand(wrong.shape, generator=generator).topk(2, dim=1).indices
    first, second = wrong.gather(1, two).unbind(1)
    likes_first = torch.rand(len(wrong), generator=generator) < _preferred(first, second, slope)
    chosen = torch.where(likes_first, two[:, 0], two[:, 1])
    return chosen, two.sum(1) - chosen


def win_rate(wrong: Tensor, others: Tensor, slope: float) -> float:
    """The probability that an answer is preferred to one of the others to the same question: the
    mean over all pairs of ``[P, G]`` and ``[P, G']``. The judge's errors are averaged out."""
    return _preferred(wrong[:, :, None], others[:, None, :], slope).mean().item()


def _preferred(wrong: Tensor, others: Tensor, slope: float) -> Tensor:
    return (slope * (others - wrong)).sigmoid()
