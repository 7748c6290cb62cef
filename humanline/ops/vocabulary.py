"""A vocabulary split over ranks: each has the logits of a slice of it, for the same rows.

A kernel that has seen a slice reports a row's maximum, its sum of exponentials, the label's
log-prob and the entropy: all of a distribution over the slice alone. With ``w_r`` the share of the
whole sum that is rank r's, the chain rule makes of them those of the whole vocabulary,

    log p = log p_r + log w_r  on the rank r that has the label,    H = Σ_r w_r (H_r − log w_r).

So kernels know nothing of ranks: statistics are merged after the first launch, 12 bytes a row and
rank (16 with entropies), and the second one writes the slice's gradient from the merged ones. A
label of another slice is given to them as the slice's length, a column that they do not have.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from humanline import autograd, checks
from humanline.parallel import Axis, Parallel


@dataclass(frozen=True)
class Shard:
    """The slice of a vocabulary that this rank has.

    Attributes:
        sizes: of the slices, in the order of the ranks.
    """

    axis: Axis
    sizes: tuple[int, ...]

    @classmethod
    def of(
        cls, parallel: Parallel, columns: int, rows: int, device: torch.device
    ) -> "Shard | None":
        """The slice where so many columns are this rank's, for so many rows; None where nothing is
        split. A collective, read back.

        Raises:
            ValueError: a rank has none, or not as many rows as another.
        """
        axis = parallel.axis("vocab")
        if axis is None or axis.size == 1:
            return None
        met = axis.exchange(columns, rows, device=device)
        sizes, numbers = (tuple(of_rank[i] for of_rank in met) for i in range(2))
        checks.require(
            min(sizes) > 0,
            lambda: f"every rank of the {axis} needs a slice of the vocabulary, got sizes {sizes}",
        )
        checks.require(
            len(set(numbers)) == 1,
            lambda: f"ranks of the {axis} have the same rows, got {numbers} of them",
        )
        return cls(axis, sizes)

    @property
    def size(self) -> int:
        return self.sizes[self.axis.rank]

    @property
    def total(self) -> int:
        return sum(self.sizes)

    def labels(self, labels: Tensor) -> Tensor:
        """Counted from the start of the slice; ``size`` where another rank has them. Masked ones
        stay, and one that no rank has is beyond ``size``."""
        local = labels.long() - sum(self.sizes[: self.axis.rank])
        valid = (labels >= 0) & (labels < self.total)
        elsewhere = valid & ((local < 0) | (local >= self.size))
        local = torch.where(elsewhere, self.size, local)
        return torch.where(valid, local, torch.where(labels < 0, labels.long(), self.size + 1))

    def hidden(self, hidden: Tensor) -> Tensor:
        """Hidden states that all ranks have: each finds a part of their gradient."""
        return _Replicated.apply(hidden, self.axis)

    def as_wide(self, weight: Tensor) -> Tensor:
        """``[V/P, H]`` of the widest slice, without memory: blocks are as many on every rank."""
        return weight[:1].expand(max(self.sizes), -1)

    def merge(
        self,
        labels: Tensor,
        logps: Tensor,
        row_max: Tensor,
        row_sum: Tensor,
        entropy: Tensor | None,
        nats: float | Tensor = 1.0,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """The last four, those of the slice, of the whole vocabulary. One collective.

        Args:
            labels: ``[n]``, of :meth:`labels`.
            logps, row_max, row_sum, entropy: ``[n]``; those of masked rows do not matter.
            nats: in a unit of ``row_max``, a number or one a row.
        """
        logps = logps.masked_fill(labels == self.size, -math.inf)
        mine = [x for x in (logps, row_max, row_sum, entropy) if x is not None]
        logps, tops, sums, *entropies = self.axis.gather(torch.stack(mine)).unbind(1)
        if isinstance(nats, Tensor):
            nats = nats.to(tops.dtype)
        top = tops.amax(0)
        log_sums = sums.log() + (tops - top) * nats
        total = log_sums.exp().sum(0)
        log_shares = log_sums - total.log()
        whole = [(logps + log_shares).amax(0), top, total]
        for of_ranks in entropies:
            whole.append((log_shares.exp() * (of_ranks - log_shares)).sum(0))
        masked = labels < 0
        for x, nothing in zip(whole, (0, 0, 1, 0), strict=False):
            x.masked_fill_(masked, nothing)
        return *whole, *[None] * (4 - len(whole))


class _Replicated(torch.autograd.Function):
    @staticmethod
    @autograd.forward
    def forward(ctx, x, axis):
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    @autograd.backward
    def backward(ctx, grad):
        return ctx.axis.sum_(grad.contiguous()), None
