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
        self._p = exp.div_(total)
        self._minus_p_log_p = torch.special.entr(self._p) if with_entropy else None
        self.entropy = self._minus_p_log_p.sum(-1) if with_entropy else None

    def keep(self, index: Tensor) -> None:
        """Forget all rows but those in ``index``."""
        self.labels, self.logps, self._p = self.labels[index], self.logps[index], self._p[index]
        if self.entropy is not None:
            self.entropy = self.entropy[index]
            self._minus_p_log_p = self._minus_p_log_p[index]

    def gradient(self, of_logp: Tensor | None = None, of_entropy: Tensor | None = None) -> Tensor:
        """Gradient ``[n, V]`` of ``Σ of_logp·logp + of_entropy·entropy``; consumes the block.

        ``of_logp`` None stands for 1. ``∂logp/∂z = onehot − p``; ``∂H/∂z = −p log p − p H``.
        """
        # 1 − p at the label from the log-prob: as p → 1 the difference would cancel.
        at_label = -torch.expm1(self.logps)[:, None]
        grad = self._p
        if of_entropy is not None:
            entropy_grad = self._minus_p_log_p.addcmul_(grad, self.entropy[:, None], value=-1)
            entropy_grad *= of_entropy[:, None]
            at_label = at_label * of_logp[:, None] + entropy_grad.gather(1, self.labels)
            grad.mul_(-of_logp[:, None]).add_(entropy_grad)
        else:
            grad.neg_()
        grad.scatter_(1, self.labels, at_label)
        if of_entropy is None and of_logp is not None:
            grad *= of_logp[:, None]
        return grad
