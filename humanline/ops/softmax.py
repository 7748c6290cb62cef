"""Softmax of a block of logits, in the logits' own memory: log-probs, entropy, gradient."""

import torch
from torch import Tensor


class SoftmaxBlock:
    """Log-probs of ``labels [n]`` under ``logits [n, V]`` (float32 or float64, overwritten).

    Attributes:
        logps: ``[n]``.
        entropy: ``[n]`` in nats, if asked for.
    """

    def __init__(self, logits: Tensor, labels: Tensor, with_entropy: bool = False):
        self.labels = labels[:, None]
        top = logits.amax(-1, keepdim=True)
        picked = logits.gather(1, self.labels) - top
        exp = logits.sub_(top).exp_()
        total = exp.sum(-1, keepdim=True)
        self.logps = (picked - total.log()).squeeze(1)
        self.row_max, self.row_sum = top.squeeze(1), total.squeeze(1)
        # The division by the sum is left to the gradient: a forward alone does without that pass.
        self._exp = exp
        self.entropy = None
        if with_entropy:
            self.entropy = self._minus_p_log_p().sum(-1)

    @classmethod
    def again(
        cls,
        logits: Tensor,
        labels: Tensor,
        logps: Tensor,
        row_max: Tensor,
        row_sum: Tensor,
        entropy: Tensor | None,
    ) -> "SoftmaxBlock":
        """The block as it was, from the same logits and what was kept of it."""
        block = cls.__new__(cls)
        block.labels, block.logps, block.entropy = labels[:, None], logps, entropy
        block.row_max, block.row_sum = row_max, row_sum
        block._exp = logits.sub_(row_max[:, None]).exp_()
        return block

    def _minus_p_log_p(self) -> Tensor:
        p = self._exp / self.row_sum[:, None]
        return torch.special.entr(p, out=p)

    def keep(self, kept: Tensor) -> None:
        """Forget all rows but ``kept [k]``, which are moved to the front as :func:`to_front_`."""
        self.labels, self.logps = self.labels[kept], self.logps[kept]
        self._exp = to_front_(self._exp, kept)
        self.row_max, self.row_sum = self.row_max[kept], self.row_sum[kept]
        if self.entropy is not None:
            self.entropy = self.entropy[kept]

    def gradient(self, of_logp: Tensor | None = None, of_entropy: Tensor | None = None) -> Tensor:
        """Gradient ``[n, V]`` of ``Σ of_logp·logp + of_entropy·entropy``; consumes the block.

        ``of_logp`` None stands for 1. ``∂logp/∂z = onehot − p``; ``∂H/∂z = −p log p − p H``.
        """
        # 1 − p at the label from the log-prob: as p → 1 the difference would cancel.
        at_label = -torch.expm1(self.logps)[:, None]
        total = self.row_sum[:, None]
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
        return grad.scatter_(1, self.labels, at_label)


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
