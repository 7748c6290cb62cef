"""Advantages of completions over the others of their prompt."""

import torch
from torch import Tensor

from humanline.checks import (
    require,
    require_floating,
    require_numbers,
    require_same_device,
    require_tensors,
)
from humanline.distributed import everyone
from humanline.dtypes import at_least_float32
from humanline.parallel import Parallel, check_parallel
from humanline.rows import Layout


def group_advantages(
    rewards: Tensor,
    prompt_ids: Tensor,
    scale_rewards: str | bool = "group",
    *,
    correction: int = 1,
    epsilon: float = 1e-4,
    parallel: Parallel | None = None,
) -> Tensor:
    """GRPO's advantages (arXiv 2402.03300): ``(r − mean of the group) / (std + epsilon)``.

    A group is all completions of a prompt, in any order and on any rank that has others: rewards
    are gathered over ranks, which must all call it, with as many completions as they have.
    Computed in float64; where all rewards are equal, or there is but one, exactly 0.

    Args:
        rewards: floating ``[S]``, one a completion.
        prompt_ids: integers ``[S]``; completions with the same number are one group.
        scale_rewards: as in TRL: "group" (or True), the standard deviation within the group;
            "batch", that of all rewards (arXiv 2508.08221); "none" (or False), no division
            (arXiv 2503.20783).
        correction: as in ``torch.std``: 1 for the sample standard deviation, which TRL takes, 0 for
            the population's.
        epsilon: keeps the advantages of almost equal rewards bounded.
        parallel: its ``data`` says which ranks have other completions; without it all ranks of the
            default process group have, if there is one.

    Returns:
        Advantages ``[S]``, float32, or float64 for float64 rewards.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; an unknown ``scale_rewards``; a reward is
            not finite.
    """
    require_tensors(rewards=rewards, prompt_ids=prompt_ids)
    require_numbers(epsilon=epsilon)
    scale = {True: "group", False: "none"}.get(scale_rewards, scale_rewards)
    require(
        scale in ("group", "batch", "none"),
        lambda: f"scale_rewards must be 'group', 'batch' or 'none', got {scale_rewards!r}",
    )
    require(correction in (0, 1), lambda: f"correction must be 0 or 1, got {correction!r}")
    require(epsilon >= 0, lambda: f"epsilon must be at least 0, got {epsilon}")
    require(
        rewards.dim() == 1 and rewards.shape == prompt_ids.shape,
        lambda: (
            f"rewards and prompt_ids must both have shape [S], got {list(rewards.shape)} and "
            f"{list(prompt_ids.shape)}"
        ),
    )
    require_floating(rewards=rewards)
    require(
        not prompt_ids.is_floating_point() and prompt_ids.dtype != torch.bool,
        lambda: f"prompt_ids must be integers, got {prompt_ids.dtype}",
    )
    require_same_device(rewards=rewards, prompt_ids=prompt_ids)
    require(
        lambda: bool(rewards.isfinite().all()),
        lambda: f"rewards must be finite, got {rewards[~rewards.isfinite()][0].item()}",
        on=rewards,
    )
    axis = everyone() if parallel is None else check_parallel(parallel).axis("data")
    r, groups, own = rewards.detach().double(), prompt_ids.long(), slice(None)
    if axis is not None:
        sizes = [n for (n,) in axis.exchange(len(r), device=r.device)]
        r, groups, own = (
            axis.gather_rows(r, sizes),
            axis.gather_rows(groups, sizes),
            axis.own(sizes),
        )
    dtype = at_least_float32(rewards).dtype
    return advantages_of_groups(r, groups, scale, correction, epsilon)[own].to(dtype)


def advantages_of_groups(
    r: Tensor,
    groups: Tensor,
    scale: str = "group",
    correction: int = 1,
    epsilon: float = 1e-4,
) -> Tensor:
    """:func:`group_advantages` of float64 rewards that are all here, whatever other ranks have."""
    if not len(r):
        return r
    order = groups.argsort(stable=True)
    sizes = groups[order].unique_consecutive(return_counts=True)[1]
    ends = sizes.cumsum(0)
    # A group is a packed sequence of rewards; the batch is one such sequence.
    group = Layout.of(torch.ones_like(order), torch.cat([ends.new_zeros(1), ends]))
    batch = Layout.of(torch.ones_like(order), ends.new_tensor([0, len(order)]))
    centred = _centred(r[order], group)
    if scale == "none":
        advantages = centred
    else:
        spread, of = (centred, group) if scale == "group" else (_centred(r[order], batch), batch)
        variance = of.sum(spread.square()) / (of.lengths - correction).clamp(min=1)
        # Equal rewards have advantage 0 whatever they are divided by, 0 included.
        std = (of.expand(variance.sqrt()) + epsilon).where(centred != 0, 1)
        advantages = centred / std
    return torch.empty_like(r).scatter_(0, order, advantages)


def _centred(x: Tensor, layout: Layout) -> Tensor:
    """Deviation from the sequence's mean, counted from its first value: exactly 0 if all equal."""
    x = x - layout.expand(x[layout.cu_seqlens[:-1]])
    return x - layout.expand(layout.mean(x))
