"""Softmax of a block of logits, in the logits' own memory: log-probs, entropy, gradient."""

from collections.abc import Iterator

import torch
from torch import Tensor

from humanline import checks
from humanline.ops.vocabulary import Shard

_FLOATS_A_THREAD = 2**18  # that a core's cache holds while it passes over them several times


class SoftmaxBlock:
    """Log-probs of ``labels [n]`` under ``logits [n, V]`` (float32 or float64, overwritten).

    Args:
        with_entropy: also compute each row's entropy.
        shard: the slice of a vocabulary that the logits are of; labels then count as its do.

    Attributes:
        logps: ``[n]``.
        entropy: ``[n]`` in nats, if asked for.
    """

    def __init__(
        self,
        logits: Tensor,
        labels: Tensor,
        with_entropy: bool = False,
        shard: Shard | None = None,
    ):
        self._set_labels(labels, shard)
        top, total = (logits.new_empty(len(logits), 1) for _ in range(2))
        picked = logits.gather(1, self.labels)
        for rows in _cached(logits):
            z = logits[rows]
            torch.amax(z, -1, keepdim=True, out=top[rows])
            torch.sum(z.sub_(top[rows]).exp_(), -1, keepdim=True, out=total[rows])
        self.logps = (picked - top - total.log()).squeeze(1)
        self.row_max, self.row_sum = top.squeeze(1), total.squeeze(1)
        self._total = self.row_sum  # of the exponentials
        # The division by the sum is left to the gradient: a forward alone does without that pass.
        self._exp = logits
        self.entropy = None
        if with_entropy:
            self.entropy = self._minus_p_log_p().sum(-1)
        if shard is not None:
            whole = shard.merge(labels, self.logps, self.row_max, self.row_sum, self.entropy)
            self.logps, self.row_max, self.row_sum, self.entropy = whole
            self._total = self.row_sum * (self.row_max - top.squeeze(1)).exp()

    @classmethod
    def again(
        cls,
        logits: Tensor,
        labels: Tensor,
        logps: Tensor,
        row_max: Tensor,
        row_sum: Tensor,
        entropy: Tensor | None,
        shard: Shard | None = None,
    ) -> "SoftmaxBlock":
        """The block as it was, from the same logits and what was kept of it."""
        block = cls.__new__(cls)
        block._set_labels(labels, shard)
        block.logps, block.entropy = logps, entropy
        block.row_max = row_max
        block.row_sum = block._total = row_sum
        for rows in _cached(logits):
            logits[rows].sub_(row_max[rows, None]).exp_()
        block._exp = logits
        return block

    def _set_labels(self, labels: Tensor, shard: Shard | None) -> None:
        """Of a label that is no column here, the last column stands in its place."""
        self._here = None if shard is None else (labels < shard.size)[:, None]
        self.labels = (labels if shard is None else labels.clamp(max=shard.size - 1))[:, None]

    def _minus_p_log_p(self) -> Tensor:
        p = self._exp / self._total[:, None]
        return torch.special.entr(p, out=p)

    def keep(self, kept: Tensor) -> None:
        """Forget all rows but ``kept [k]``, which are moved to the front as :func:`to_front_`."""
        self.labels, self.logps = self.labels[kept], self.logps[kept]
        self._exp = to_front_(self._exp, kept)
        self.row_max, self.row_sum = self.row_max[kept], self.row_sum[kept]
        self._total = self._total[kept]
        if self._here is not None:
            self._here = self._here[kept]
        if self.entropy is not None:
            self.entropy = self.entropy[kept]

    def gradient(self, of_logp: Tensor | None = None, of_entropy: Tensor | None = None) -> Tensor:
        """Gradient ``[n, V]`` of ``Σ of_logp·logp + of_entropy·entropy``; consumes the block.

        ``of_logp`` None stands for 1. ``∂logp/∂z = onehot − p``; ``∂H/∂z = −p log p − p H``.
        """
        # 1 − p at the label from the log-prob: as p → 1 the difference would cancel.
        at_label = -torch.expm1(self.logps)[:, None]
        total = self._total[:, None]
        if of_logp is not None:
            at_label = at_label * of_logp[:, None]
        entropy_grad = None
        if of_entropy is not None:
            entropy_grad = self._minus_p_log_p()
            entropy_grad.addcmul_(self._exp, self.entropy[:, None] / total, value=-1)
            entropy_grad *= of_entropy[:, None]
            at_label = at_label + entropy_grad.gather(1, self.labels)
        grad = self._exp.mul_(-1 / total if of_logp is None else -of_logp[:, None] / total)
        if entropy_grad is not None:
            grad += entropy_grad
        if self._here is not None:
            at_label = torch.where(self._here, at_label, grad.gather(1, self.labels))
        return grad.scatter_(1, self.labels, at_label)


def _cached(x: Tensor) -> Iterator[slice]:
    """Some rows of ``x [n, V]`` at a time, a row for each thread at least; all of them on a GPU."""
    threads, size = torch.get_num_threads(), len(x)
    if checks.free_to_read(x):
        size = max(threads, threads * _FLOATS_A_THREAD // x.shape[1])
    for start in range(0, len(x), max(1, size)):
        yield slice(start, start + size)


def front_order(active: Tensor) -> Tensor:
    """The rows where ``active [n]`` holds, in an order that leaves as many as can be in their
    place: of k rows, the i-th is i wherever row i < k is active, else one from k on. So they can be
    moved to the front all at once. Reads k, and no other number."""
    kept = active.nonzero().squeeze(1)
    if len(kept) == len(active):
        return kept
    k, front = len(kept), active[: len(kept)]
    holes = (~front).cumsum(0)  # so far; the last of the kept rows fill them
    return torch.where(front, torch.arange(k, device=active.device), kept[holes - holes[-1:] - 1])


def to_front_(rows: Tensor, order: Tensor) -> Tensor:
    """``rows[order]`` for a :func:`front_order`, in the memory of ``rows [n, V]``."""
    if rows.device.type != "cpu":
        return rows[order]
    for place, row in enumerate(order.tolist()):
        if row != place:
            rows[place].copy_(rows[row])
    return rows[: len(order)]
