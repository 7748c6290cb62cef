"""TRL's log-prob kernels, swapped for humanline's.

TRL scores tokens in two ways. From hidden states, with a "fused LM head" that it adds to a model's
forward, which calls ``ChunkedLogProbFunction``; from logits, with three functions that its trainers
import by name. :func:`patch_trl` swaps all of them in trainers that know nothing of humanline;
:func:`fused_head` swaps the first alone, for humanline's own trainers.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import cache, partial
from types import ModuleType, SimpleNamespace
from typing import Any

from humanline.integrations.trl.version import require_known_trl  # first: says if TRL is missing

# isort: split
import torch
from torch import Tensor, nn
from torch.distributed.tensor import Partial
from trl.trainer import utils

from humanline.checks import require
from humanline.ops import WORKSPACE_BYTES, check_tolerance, logps_and_columns, token_logps
from humanline.rows import IGNORE_INDEX
from humanline.sharding import is_dtensor, is_partitioned

# TRL's own, taken before anything is swapped.
_selective_log_softmax = utils.selective_log_softmax


# From logits


def selective_log_softmax(
    logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None
) -> Tensor:
    """TRL's function of that name. Several tokens a row (top-K) are left to TRL."""
    if index.dim() == logits.dim():
        return _selective_log_softmax(logits, index, temperature, row_mask)
    return token_logps(logits, _masked(index, row_mask), temperature)


def selective_log_softmax_and_entropy(
    logits: Tensor,
    index: Tensor,
    entropy_requires_grad: bool = True,
    temperature: float = 1.0,
    row_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """TRL's function of that name."""
    labels = _masked(index, row_mask)
    logps, entropy = token_logps(logits, labels, temperature, return_entropy=True)
    return logps, entropy if entropy_requires_grad else entropy.detach()


def entropy_from_logits(logits: Tensor, chunk_size: int = 128) -> Tensor:
    """TRL's function of that name; rows come in blocks of humanline's own size."""
    any_label = torch.zeros(logits.shape[:-1], dtype=torch.long, device=logits.device)
    return token_logps(logits, any_label, return_entropy=True)[1]


def _masked(index: Tensor, row_mask: Tensor | None) -> Tensor:
    return index if row_mask is None else index.masked_fill(row_mask == 0, IGNORE_INDEX)


# From hidden states


class ChunkedLogProbFunction:
    """Stands in for TRL's autograd function of that name.

    Attributes:
        kept_columns: of the last call that has a gradient, with a tolerance: the share of columns
            that its backward keeps, which that backward may be what fills in. A scalar tensor.
    """

    kept_columns: Tensor | None = None

    def __init__(
        self,
        only: tuple[str, ...] | None = None,
        entropy_gradient: bool = True,
        gradient_tolerance: float = 0.0,
    ):
        self.only, self.entropy_gradient = only, entropy_gradient
        self.gradient_tolerance = gradient_tolerance

    def apply(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1"),
    ) -> tuple[Tensor | None, ...]:
        """Log-probs ``[N]`` of ``targets [N]`` and the statistics in ``outputs``; else None.

        Args: TRL's; ``hidden [N, H]``, ``weight [V, H]``, ``bias [V]``.
        """
        asked = set(outputs) if self.only is None else set(outputs) & set(self.only)
        wanted = [name for name in STATISTICS if name in asked]
        with_entropy = "entropy" in wanted and self.entropy_gradient
        if with_entropy:
            wanted.remove("entropy")
        seen = {name: _empty(name, targets) for name in wanted}

        def observe(index: Tensor, logits: Tensor) -> None:
            for name, values in seen.items():
                values[index] = STATISTICS[name](logits, targets[index]).to(values.dtype)

        result, columns = logps_and_columns(
            hidden,
            weight.to(hidden.dtype),
            targets,
            None if bias is None else bias.to(hidden.dtype),
            temperature,
            logit_scale=logit_scale,
            logit_softcap=final_logit_softcapping,
            return_entropy=with_entropy,
            observe=observe if seen else None,
            # Statistics take up to two buffers of a block's size.
            workspace_bytes=WORKSPACE_BYTES // (3 if seen else 1),
            backend=None,
            capturable=False,
            gradient_tolerance=self.gradient_tolerance,
        )
        logps = result
        if with_entropy:
            logps, seen["entropy"] = result
        if self.gradient_tolerance and logps.requires_grad:
            self.kept_columns = columns.share
        return logps, *(seen.get(name) for name in STATISTICS)


def _entropy(logits: Tensor, targets: Tensor) -> Tensor:
    p = logits.softmax(-1)
    return torch.special.entr(p, out=p).sum(-1)


@cache  # the same object each time: torch.compile guards on what a global holds
def _function(
    only: tuple[str, ...] | None, entropy_gradient: bool, gradient_tolerance: float
) -> ChunkedLogProbFunction:
    return ChunkedLogProbFunction(only, entropy_gradient, gradient_tolerance)


def _log_sum_sq_probs(logits: Tensor, targets: Tensor) -> Tensor:
    return (2 * logits).logsumexp(-1) - 2 * logits.logsumexp(-1)


#: Statistics of a block of logits ``[n, V]``, in the order in which TRL's function returns them.
STATISTICS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "entropy": _entropy,
    "log_sum_sq_probs": _log_sum_sq_probs,
    "mean_logits": lambda logits, targets: logits.mean(-1),
    "is_top1": lambda logits, targets: logits.argmax(-1) == targets,
}


def _empty(name: str, targets: Tensor) -> Tensor:
    dtype = torch.bool if name == "is_top1" else torch.float32
    return torch.zeros(targets.shape, dtype=dtype, device=targets.device)


# Swapping

_BY_NAME = (selective_log_softmax, selective_log_softmax_and_entropy, entropy_from_logits)


def patch_trl(*, gradient_tolerance: float = 0.0) -> ExitStack:
    """Let TRL's trainers compute log-probs and entropies with humanline's kernels.

    Works as a function, until ``.close()`` of what it returns, and as a context manager::

        with patch_trl():
            trainer.train()

    Where TRL is patched already it does nothing, neither now nor at its end.

    Args:
        gradient_tolerance: of the fused head's backward, see
            :func:`~humanline.linear_token_logps`. What TRL scores from logits is exact.

    Raises:
        ImportError: this version of TRL is not one whose functions are known.
        ValueError: a tolerance that is not in [0, 1); TRL is patched already with another.
    """
    require_known_trl()
    check_tolerance(gradient_tolerance, capturable=False)
    head = utils._ChunkedLogProbFunction
    patched = isinstance(head, ChunkedLogProbFunction)
    require(
        not patched or head.gradient_tolerance == gradient_tolerance,
        lambda: (
            f"TRL is patched already, with gradient_tolerance={head.gradient_tolerance}: close() "
            f"that patch before one with {gradient_tolerance}"
        ),
    )
    patch = ExitStack()
    for ours in _BY_NAME:
        theirs = getattr(utils, ours.__name__)
        if theirs is not ours:
            _replace(theirs, ours)
            patch.callback(_replace, ours, theirs)
    if not patched:
        function = ChunkedLogProbFunction(gradient_tolerance=gradient_tolerance)
        patch.callback(_swap_head(function))
    return patch


@contextmanager
def fused_head(
    model: nn.Module,
    only: tuple[str, ...] | None = None,
    entropy_gradient: bool = True,
    gradient_tolerance: float = 0.0,
) -> Iterator[ChunkedLogProbFunction]:
    """Within this context TRL's fused LM head is humanline's, and sees the whole of a head that is
    sharded or has an adapter.

    Args:
        model: the model that is called, perhaps a PEFT one.
        only: the statistics to compute if asked for; None for all that are asked for.
        entropy_gradient: whether the loss differentiates the entropy. If it does not, a frozen
            head costs two GEMMs.
        gradient_tolerance: of the backward, see :func:`~humanline.linear_token_logps`.
    """
    function = _function(only, entropy_gradient, gradient_tolerance)
    undo = _swap_head(function, maybe_gather_lm_head_ctx=_gathered)
    try:
        with _whole(causal_model(model)):
            yield function
    finally:
        undo()


def _replace(old: Any, new: Any) -> None:
    """In every module of TRL: ``from .utils import name`` has made copies of the name."""
    for module_name, module in list(sys.modules.items()):
        if module_name.split(".")[0] == "trl" and isinstance(module, ModuleType):
            for name, value in list(vars(module).items()):
                if value is old:
                    setattr(module, name, new)


def _swap_head(function: ChunkedLogProbFunction, **others: Callable) -> Callable[[], None]:
    """Put ``function`` in place of TRL's and return what takes it back.

    ``_use_triton``, since TRL 1.16, decides whether masked rows are dropped before the call: ours
    wants that on every device. ``others`` are put in the places of their names too.
    """
    ours = {"_ChunkedLogProbFunction": function, "_use_triton": _drop_masked_rows, **others}
    theirs = {name: getattr(utils, name) for name in ours if hasattr(utils, name)}

    def put(values: dict[str, Any]) -> None:
        for name in theirs:
            setattr(utils, name, values[name])

    put(ours)
    return partial(put, theirs)


def _drop_masked_rows(device: torch.device) -> bool:
    return True


def _gathered(*parameters: Tensor | None) -> AbstractContextManager:
    """For TRL, which gathers what ZeRO-3 partitions for the forward alone: :func:`_whole` has."""
    return nullcontext()


# An output head that is adapted or sharded


def causal_model(model: nn.Module) -> nn.Module:
    """The model itself, or the one inside a PEFT model: where TRL puts its fused head."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@contextmanager
def _whole(model: nn.Module) -> Iterator[None]:
    """TRL's fused head reads ``lm_head.weight``. Within this context it finds the whole weight
    there, of all ranks, with an adapter's ``scaling · B A``; gradients go to where they belong."""
    head = model.get_output_embeddings()
    if "get_output_embeddings" in vars(model):  # around this context is another of the same model
        yield
        return
    partitioned = [p for p in head.parameters() if is_partitioned(p)]
    if not (is_adapted(head) or partitioned or any(map(is_dtensor, head.parameters()))):
        yield
        return
    if partitioned:
        _gather_with(model, partitioned)
    # Looked up by TRL at each call: the adapter may be another by then, or switched off, and a
    # weight may be gathered by then.
    model.get_output_embeddings = lambda: _of_all_ranks(head)
    try:
        yield
    finally:
        del model.get_output_embeddings


def _gather_with(model: nn.Module, parameters: list[nn.Parameter]) -> None:
    """Have ZeRO-3 gather these for the model's own forward and backward: nobody calls the module
    that they are in."""
    import deepspeed

    for p in parameters:
        deepspeed.zero.register_external_parameter(model, p)


def _of_all_ranks(head: nn.Module) -> SimpleNamespace:
    """A head's weight and bias, the shards of FSDP2 gathered.

    Of a weight in a group of its own nobody calls the module: FSDP2 has not gathered it, and does
    not see its gradient. That is the mean over ranks, as of all others.
    """
    shards = {f"head.{n}": p for n, p in head.named_parameters() if is_dtensor(p)}
    gathered = {
        name: p.full_tensor(grad_placements=[Partial("avg")] * p.device_mesh.ndim)
        for name, p in shards.items()
    }
    weight, bias = torch.func.functional_call(_Weights(head), gathered, ())
    return SimpleNamespace(weight=weight, bias=bias)


class _Weights(nn.Module):
    """Of a head, as a module for which ``functional_call`` can put others in their place."""

    def __init__(self, head: nn.Module):
        super().__init__()
        self.head = head

    def forward(self) -> tuple[Tensor, Tensor | None]:
        if is_adapted(self.head):
            return _effective_weight(self.head), self.head.base_layer.bias
        return self.head.weight, getattr(self.head, "bias", None)


def is_adapted(head: nn.Module | None) -> bool:
    """Whether a PEFT layer wraps the output head."""
    return hasattr(head, "base_layer") and hasattr(head, "active_adapters")


def require_plain_lora(head: nn.Module) -> None:
    """Raise unless :func:`fused_head` can do the adapter on this head.

    Raises:
        ValueError: an adapter that is not ``W + scaling · B A`` of fixed inputs.
    """
    dropout = [
        layer.p for layer in getattr(head, "lora_dropout", {}).values() if hasattr(layer, "p")
    ]
    variants = getattr(head, "lora_variant", {})
    require(
        hasattr(head, "lora_A") and hasattr(head, "get_delta_weight") and not variants,
        lambda: (
            f"the adapter on the output head is {type(head).__name__}"
            f"{' with a variant such as DoRA' if variants else ''}: only plain LoRA can be folded "
            "into the fused head; leave the head out of target_modules, or use modules_to_save"
        ),
    )
    require(
        not any(dropout),
        lambda: (
            f"the LoRA adapter on the output head has dropout {max(dropout)}, which cannot be "
            "folded into the weight: set lora_dropout=0, or disable_dropout=True"
        ),
    )


def _effective_weight(head: nn.Module) -> Tensor:
    weight = head.base_layer.weight
    if head.disable_adapters or head.merged:
        return weight
    for adapter in head.active_adapters:
        if adapter in head.lora_A:
            weight = weight + head.get_delta_weight(adapter)
    return weight
