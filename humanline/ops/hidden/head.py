"""The output head: its options, and the checks of what comes to it."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from humanline import checks
from humanline.ops.dtensors import HEAD, HIDDEN, own_part, spans
from humanline.ops.hidden.gathered import gathered
from humanline.ops.temperature import check_temperature, row_temperature
from humanline.ops.vocabulary import Shard
from humanline.parallel import Parallel, check_parallel
from humanline.rows import IGNORE_INDEX

WORKSPACE_BYTES = 512 * 2**20


@dataclass(frozen=True)
class Head:
    """What happens to ``hidden @ weight.T`` before the softmax, in this order: ``+ bias``,
    ``· logit_scale``, ``logit_softcap · tanh(· / logit_softcap)``, ``/ temperature``.

    ``shard`` is the slice of the vocabulary that the weight is of; labels count as its do."""

    bias: Tensor | None = None
    temperature: float | Tensor = 1.0
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    shard: Shard | None = None

    def for_rows(self, labels: Tensor) -> "Head":
        """The same with the temperature as a tensor, flat or scalar."""
        return replace(self, temperature=row_temperature(self.temperature, labels))

    def labels(self, labels: Tensor) -> Tensor:
        """As the kernels take them, see :meth:`Shard.labels`."""
        return labels if self.shard is None else self.shard.labels(labels)

    def as_wide(self, weight: Tensor) -> Tensor:
        """As many columns as blocks of rows have to be cut for, see :meth:`Shard.as_wide`."""
        return weight if self.shard is None else self.shard.as_wide(weight)


def sliced_head(
    hidden: Tensor, weight: Tensor, head: Head, parallel: Parallel | None, prefix: str = ""
) -> tuple[Tensor, Tensor, Head]:
    """Hidden states, this rank's weight, and the head with the slice of the vocabulary that it is
    of, if that is split."""
    parallel = check_parallel(parallel)
    states = own_part(hidden, prefix + "hidden", parallel, HIDDEN)
    weight, bias = (
        _whole_slice(x, prefix + name, states, parallel)
        for x, name in ((weight, "weight"), (head.bias, "bias"))
    )
    checks.require_tensors(**{prefix + "weight": weight})
    columns = weight.shape[0] if weight.dim() else 0
    rows = states.shape[:-1].numel() if isinstance(states, Tensor) else 0
    shard = Shard.of(parallel, columns, rows, weight.device)
    if shard is not None and isinstance(hidden, Tensor) and not spans(hidden, shard.axis):
        states = shard.hidden(states)
    return states, weight, replace(head, bias=bias, shard=shard)


def _whole_slice(x: Tensor | None, name: str, hidden: Tensor, parallel: Parallel) -> Tensor | None:
    """Of a DTensor all that this rank multiplies with, where the axes say what that is."""
    if isinstance(hidden, Tensor):
        x = gathered(x, name, hidden.dtype, parallel)
    return own_part(x, name, parallel, HEAD)


def check_sliced(head: Head, capturable: bool, gradient_tolerance: float) -> None:
    """Raise ValueError where a split vocabulary does not go with an option."""
    for name, given in {"capturable": capturable, "gradient_tolerance": gradient_tolerance}.items():
        checks.require(
            not given or head.shard is None,
            lambda name=name, given=given: (
                f"{name} needs the whole vocabulary on a rank, got {given} and one that is split "
                f"over the {head.shard.axis}"
            ),
        )


def check_hidden(
    hidden: Tensor, weight: Tensor, labels: Tensor, head: Head, prefix: str = ""
) -> None:
    """Raise ValueError or TypeError unless these fit together.

    Args:
        prefix: of the names of hidden, weight and bias in messages about their types.
    """
    checks.require_tensors(**{prefix + "hidden": hidden, prefix + "weight": weight}, labels=labels)
    checks.require_tensors_or_none(**{prefix + "bias": head.bias})
    checks.require_numbers(logit_scale=head.logit_scale)
    checks.require_numbers_or_none(logit_softcap=head.logit_softcap)
    checks.require_floating(hidden=hidden, weight=weight, bias=head.bias)
    checks.require(
        hidden.dim() >= 1 and hidden.shape[:-1] == labels.shape,
        lambda: (
            f"hidden [..., H] and labels [...] must agree, got {list(hidden.shape)} and "
            f"{list(labels.shape)}"
        ),
    )
    checks.require(
        weight.dim() == 2 and weight.shape[1] == hidden.shape[-1],
        lambda: (
            f"weight must have shape [V, {hidden.shape[-1]}] for this hidden, got "
            f"{list(weight.shape)}"
        ),
    )
    checks.require(
        head.bias is None or head.bias.shape == weight.shape[:1],
        lambda: (
            f"bias must have shape {list(weight.shape[:1])}, got "
            f"{list(head.bias.shape) if head.bias is not None else None}"
        ),
    )
    checks.require(
        hidden.dtype == weight.dtype or torch.is_autocast_enabled(hidden.device.type),
        lambda: f"hidden and weight must have one dtype, got {hidden.dtype} and {weight.dtype}",
    )
    checks.require(
        0 < head.logit_scale < math.inf,
        lambda: f"logit_scale must be positive and finite, got {head.logit_scale}",
    )
    checks.require(
        head.logit_softcap is None or head.logit_softcap > 0,
        lambda: f"logit_softcap must be positive or None, got {head.logit_softcap}",
    )
    checks.require_same_device(hidden=hidden, weight=weight, labels=labels, bias=head.bias)
    vocab = weight.shape[0] if head.shard is None else head.shard.total
    checks.require_labels(labels, vocab, IGNORE_INDEX)
    check_temperature(head.temperature, labels)
