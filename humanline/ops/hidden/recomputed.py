"""The head by kernels that never write its logits.

The forward keeps four floats a row. The backward forms the logits of the active rows again, and of
them writes their gradient alone, in the weight's dtype.

``capturable`` reads nothing back to the host, as a CUDA graph demands: all rows are taken, the
wanted ones first, and how many these are stays on the device, where tiles beyond them leave early.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from humanline.ops.hidden.blocks import padded_length
from humanline.ops.hidden.head import Head
from humanline.ops.vocabulary import Shard


def forward(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    head: Head,
    wanted: Tensor,
    with_entropy: bool,
    capturable: bool,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Log-probs, entropies, maximum and sum of exponentials of the rows where ``wanted [N]``.

    Float32 ``[N]``; what belongs to the other rows is 0.
    """
    from humanline.kernels.linear_logps import linear_logps_forward

    index, count = _chosen(wanted, capturable)
    in_order = len(index) == len(labels) and not capturable
    results = linear_logps_forward(
        hidden,
        weight,
        labels,
        **_options(head),
        with_entropy=with_entropy,
        index=None if in_order else index,
        count=count,
    )
    if head.shard is not None:
        temperature = head.temperature
        nats = 1 / (temperature[index] if temperature.dim() else temperature)
        results = _merged(head.shard, labels[index], results, nats)
    if in_order:
        return results

    def spread(x):
        return None if x is None else x.new_zeros(len(labels)).index_copy_(0, index, x)

    return tuple(map(spread, results))


def _merged(shard: Shard, labels: Tensor, results: tuple, nats: Tensor) -> tuple:
    logps, entropy, row_max, row_sum = results
    logps, row_max, row_sum, entropy = shard.merge(labels, logps, row_max, row_sum, entropy, nats)
    return logps, entropy, row_max, row_sum


class RecomputedBlock:
    """Some rows, and the gradient of their logits; see :mod:`humanline.ops.hidden.blocks`.

    Attributes:
        hidden: of these rows, side by side: the kernels load them by TMA.
        count: int32 on the device: so many rows of ``index`` matter, the first ones; None for all.
    """

    def __init__(self, memory, hidden, weight, labels, head: Head, index, count, results):
        self.index, self.count = index, count
        self.hidden, self._labels = hidden[index], labels[index]
        self._memory, self._weight, self._options = memory, weight, _options(head)
        if head.temperature.dim():
            self._options["temperature"] = head.temperature[index]
        self._results = [None if x is None else x[index] for x in results]

    @staticmethod
    def bytes_per_row(weight: Tensor, head: Head, with_entropy: bool) -> int:
        return padded_length(weight) * weight.element_size()

    def gradient(
        self,
        of_logp: Tensor | None = None,
        of_entropy: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """With ``weights [n]`` of the rows, also the energies of the columns ``[V]``."""
        from humanline.kernels.linear_logps import linear_logits_gradient

        return linear_logits_gradient(
            self.hidden,
            self._weight,
            self._labels,
            *self._results,
            **self._options,
            of_logp=of_logp,
            of_entropy=of_entropy,
            count=self.count,
            out=self._memory,
            weights=weights,
        )


def recomputed_blocks(
    hidden: Tensor,
    weight: Tensor,
    head: Head,
    labels: Tensor,
    active: Tensor,
    results: tuple[Tensor, Tensor | None, Tensor, Tensor],
    rows: int,
    capturable: bool,
) -> Iterator[RecomputedBlock]:
    """The rows where ``active [N]`` holds, so many at a time; ``results`` of :func:`forward`.

    One workspace serves all blocks: a block ends where the next begins.
    """
    index, count = _chosen(active, capturable)
    memory = weight.new_empty(min(rows, len(index)), padded_length(weight))[:, : len(weight)]
    for start in range(0, len(index), rows):
        some = index[start : start + rows]
        of_these = None if count is None else (count - start).clamp(0, len(some))
        yield RecomputedBlock(memory, hidden, weight, labels, head, some, of_these, results)


def _chosen(wanted: Tensor, capturable: bool) -> tuple[Tensor, Tensor | None]:
    """(indices, number): the wanted rows; or, capturable, all with those first and how many."""
    return wanted_first(wanted) if capturable else (wanted.nonzero().squeeze(1), None)


def wanted_first(wanted: Tensor) -> tuple[Tensor, Tensor]:
    """All rows, those where ``wanted [n]`` holds first; and how many these are, on the device."""
    order = torch.argsort((~wanted).to(torch.uint8), stable=True)
    return order, wanted.sum(dtype=torch.int32)


def _options(head: Head) -> dict[str, Any]:
    """The head as the kernels' arguments."""
    return {
        "bias": head.bias,
        "temperature": head.temperature,
        "logit_scale": head.logit_scale,
        "logit_softcap": head.logit_softcap,
    }
