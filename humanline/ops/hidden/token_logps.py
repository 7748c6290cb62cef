"""``linear_token_logps``: log-probs from hidden states and a head's weight, differentiable.

The forward is one GEMM, a block of rows at a time. The backward recomputes the logits of those rows
whose incoming gradient is not 0, and only of those: 1F + 3F·active, F being one N×H×V GEMM.

With a frozen head it is 2F, for any loss: the gradient of a row's hidden state is its incoming
gradient times that of a unit one, which the forward forms while it has the logits.

With a ``gradient_tolerance`` 2ρF replaces the last 2F, and with a frozen head ρF the last F, ρ
being the share of columns that are kept (columns.py). Their number is read back, one a block.

``capturable`` is 1F + 3F·active always (2F·active with a frozen head or body), the number of active
rows staying on the device.
"""

from typing import Literal, overload

import torch
from torch import Tensor

from humanline import autograd, checks
from humanline.dtypes import compute_dtype
from humanline.ops.backend import choose_backend
from humanline.ops.hidden import recomputed
from humanline.ops.hidden.blocks import (
    BLOCKS,
    Observer,
    block_rows,
    comfortable_rows,
    head_blocks,
)
from humanline.ops.hidden.columns import Columns, check_tolerance, row_weights
from humanline.ops.hidden.gemms import HeadGradients, hidden_gradient, write_hidden_gradient_
from humanline.ops.hidden.gradients import split_scale
from humanline.ops.hidden.head import (
    WORKSPACE_BYTES,
    Head,
    check_hidden,
    check_sliced,
    sliced_head,
)
from humanline.ops.hidden.schedule import split_rows, split_runs
from humanline.ops.scaling import scaled_gradient
from humanline.parallel import Parallel
from humanline.rows import IGNORE_INDEX
from humanline.seam import Coefficients


@overload
def linear_token_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    *,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    return_entropy: Literal[False] = False,
    observe: Observer | None = None,
    workspace_bytes: int = WORKSPACE_BYTES,
    backend: str | None = None,
    capturable: bool = False,
    gradient_tolerance: float = 0.0,
    parallel: Parallel | None = None,
) -> Tensor: ...
@overload
def linear_token_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    *,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    return_entropy: Literal[True],
    observe: Observer | None = None,
    workspace_bytes: int = WORKSPACE_BYTES,
    backend: str | None = None,
    capturable: bool = False,
    gradient_tolerance: float = 0.0,
    parallel: Parallel | None = None,
) -> tuple[Tensor, Tensor]: ...
@overload
def linear_token_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    *,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    return_entropy: bool,
    observe: Observer | None = None,
    workspace_bytes: int = WORKSPACE_BYTES,
    backend: str | None = None,
    capturable: bool = False,
    gradient_tolerance: float = 0.0,
    parallel: Parallel | None = None,
) -> Tensor | tuple[Tensor, Tensor]: ...
@autograd.uncompiled
def linear_token_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    *,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    return_entropy: bool = False,
    observe: Observer | None = None,
    workspace_bytes: int = WORKSPACE_BYTES,
    backend: str | None = None,
    capturable: bool = False,
    gradient_tolerance: float = 0.0,
    parallel: Parallel | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probs of ``labels`` under the head ``softmax((hidden @ weight.T + bias) / temperature)``.

    Never holds all logits: at most ``workspace_bytes`` of them. Under ``torch.compile`` a graph
    break: it runs as it stands, with the same numbers.

    On the Triton backend a row's log-prob is the same to the last bit whatever rows are around it,
    but with a frozen head: there, and on the torch backend, a GEMM library forms the logits. cuBLAS
    and oneDNN choose their algorithm, and how the sum over H is split, by the number of rows in a
    block. A rerun on the same rows gives the same bits everywhere.

    Args:
        hidden: ``[..., H]``. Row ``t`` predicts ``labels[t]``.
        weight: ``[V, H]``.
        labels: integer ``[...]``; rows labelled -100 give 0, take no gradient and cost nothing.
        bias: ``[V]``.
        temperature: a float, or a tensor with one value a row, ``[...]``.
        logit_scale: multiplies the logits.
        logit_softcap: ``cap · tanh(logits / cap)`` after the scale.
        return_entropy: also return the entropy of each row, in nats.
        observe: looks at the logits while they are there, a block of rows at a time, without
            gradient: for statistics a trainer logs, which would cost a GEMM of their own.
        workspace_bytes: bound of the memory for logits. Beside it, inputs and gradients there are
            some floats a row and the hidden states of one block. Half precision adds the weight's
            gradient in float32 (objectives on the Triton backend: or, up to 2H rows, the gradient
            of the logits of as many rows in its place), and on a CPU up to 16 MiB of the weight
            widened. Gradients formed in the forward are scaled where they lie;
            ``retain_graph=True`` makes a copy of them.
        backend: "triton" or "torch"; None chooses by device.
        capturable: read nothing back from the device, so that forward and backward can be captured
            in a CUDA graph; Triton backend only.
        gradient_tolerance: δ in [0, 1); 0 is exact. Else the products of the backward leave out
            columns of the logits' gradient that together hold no more than δ of its norm, in each
            block of rows, never a label's; of these, the part that the rows share is put back.
            Where only hidden trains, gradients are formed before the incoming ones
            are known: there every row counts alike, and δ bounds the root mean square of the
            rows' relative errors. Beside the workspace it takes, by estimate, 40 MiB on a CPU and
            512 MiB on a GPU in half precision, where blocks too small to gain by it are exact.
        parallel: its ``vocab`` says whose slices of the vocabulary weight and bias are. Exact
            alone, not ``capturable``; an ``observe`` sees the logits of the slice.

    Returns:
        ``[...]`` log-probs in nats, float32 (float64 from float64); with ``return_entropy`` a tuple
        of log-probs and entropies. Differentiable with respect to hidden, weight and bias.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; a label outside ``[0, V)`` that is not
            -100; a workspace that does not hold one row; ``capturable`` on the torch backend or
            with a ``gradient_tolerance``; one that is not in [0, 1); either with a ``vocab`` axis.
    """
    return logps_and_columns(
        *(hidden, weight, labels, bias, temperature),
        logit_scale=logit_scale,
        logit_softcap=logit_softcap,
        return_entropy=return_entropy,
        observe=observe,
        workspace_bytes=workspace_bytes,
        backend=backend,
        capturable=capturable,
        gradient_tolerance=gradient_tolerance,
        parallel=parallel,
    )[0]


@autograd.uncompiled
def logps_and_columns(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    temperature: float | Tensor,
    *,
    logit_scale: float,
    logit_softcap: float | None,
    return_entropy: bool,
    observe: Observer | None,
    workspace_bytes: int,
    backend: str | None,
    capturable: bool,
    gradient_tolerance: float,
    parallel: Parallel | None = None,
) -> tuple[Tensor | tuple[Tensor, Tensor], Columns]:
    """What :func:`linear_token_logps` returns, and what chooses the columns of its gradient."""
    check_tolerance(gradient_tolerance, capturable)
    hidden, weight, head = sliced_head(
        hidden, weight, Head(bias, temperature, logit_scale, logit_softcap), parallel
    )
    check_sliced(head, capturable, gradient_tolerance)
    check_hidden(hidden, weight, labels, head)
    labels = head.labels(labels)
    hidden, weight = under_autocast(hidden, weight)
    if observe is not None:  # the kernels never have the logits as the head's options leave them
        checks.require(
            backend in (None, "torch"),
            lambda: f'observe needs backend="torch", which forms the logits; got {backend!r}',
        )
        backend = "torch"
    backend = choose_backend(hidden, backend)
    check_capturable(capturable, backend)
    columns = Columns(gradient_tolerance, hidden, backend)
    result = head_logps(
        *(hidden, weight, labels, head),
        return_entropy=return_entropy,
        observe=observe,
        workspace_bytes=workspace_bytes,
        backend=backend,
        capturable=capturable,
        columns=columns,
    )
    return result, columns


def head_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    head: Head,
    *,
    return_entropy: bool,
    observe: Observer | None = None,
    workspace_bytes: int,
    backend: str,
    capturable: bool,
    columns: Columns,
) -> Tensor | tuple[Tensor, Tensor]:
    """The same of what is checked, in a dtype that is chosen, on a backend that is."""
    bias = head.bias
    unit = _only_hidden_trains(hidden, weight, bias) and not return_entropy and not capturable
    no_logits = backend == "triton" and not unit
    kind = recomputed.RecomputedBlock if no_logits else BLOCKS[backend]
    rows = block_rows(kind, head.as_wide(weight), head, return_entropy, workspace_bytes)
    logps, entropy = _LinearTokenLogps.apply(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        bias,
        labels.reshape(-1),
        head.for_rows(labels),
        return_entropy,
        observe,
        comfortable_rows(rows, backend == "torch"),
        kind,
        unit,
        capturable,
        columns,
    )
    logps = logps.view(labels.shape)
    return (logps, entropy.view(labels.shape)) if return_entropy else logps


def reference_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    head: Head,
    workspace_bytes: int,
    backend: str,
    capturable: bool,
) -> Tensor:
    """Log-probs without a gradient, of a head that is sliced, and of what is checked."""
    check_capturable(capturable, backend)
    hidden, weight = under_autocast(hidden, weight)
    with torch.no_grad():
        return head_logps(
            *(hidden, weight, head.labels(labels), head),
            return_entropy=False,
            workspace_bytes=workspace_bytes,
            backend=backend,
            capturable=capturable,
            columns=Columns(0.0, hidden, backend),
        )


def check_capturable(capturable: bool, backend: str) -> None:
    """Raise ValueError where the number of rows must be read on the host."""
    checks.require(
        not capturable or backend == "triton",
        'capturable needs backend="triton": the torch backend reads the number of rows',
    )


def _only_hidden_trains(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    head_trains = weight.requires_grad or (bias is not None and bias.requires_grad)
    return torch.is_grad_enabled() and hidden.requires_grad and not head_trains


def under_autocast(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Cast as autocast does for a linear layer, where it is on."""
    device = hidden.device.type
    if not torch.is_autocast_enabled(device):
        return hidden, weight
    dtype = torch.get_autocast_dtype(device)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in (hidden, weight))


class _LinearTokenLogps(torch.autograd.Function):
    @staticmethod
    @autograd.forward
    def forward(
        ctx,
        hidden,
        weight,
        bias,
        labels,
        head,
        with_entropy,
        observe,
        rows,
        kind,
        unit,
        capturable,
        columns,
    ):
        ctx.unit, ctx.head, ctx.rows, ctx.kind = unit, head, rows, kind
        ctx.with_entropy, ctx.capturable, ctx.columns = with_entropy, capturable, columns
        wanted, dh, kept = labels != IGNORE_INDEX, None, ()
        if kind is recomputed.RecomputedBlock:
            kept = recomputed.forward(
                hidden, weight, labels, head, wanted, with_entropy, capturable
            )
            logps, entropy, *_ = kept
        else:
            logps, entropy, dh = _by_blocks(ctx, hidden, weight, labels, wanted, observe)
        ctx.save_for_backward(labels, *((dh,) if unit else (hidden, weight, bias, *kept)))
        return logps, entropy

    @staticmethod
    @autograd.backward
    def backward(ctx, g, g_entropy):
        if ctx.unit:
            labels, dh = ctx.saved_tensors
            dropped = (g == 0) | (labels == IGNORE_INDEX)
            # Filled, not multiplied: a row that overflowed stays out of what it has no part in.
            return scaled_gradient(dh, g).masked_fill_(dropped[:, None], 0), *[None] * 11
        coefficients = Coefficients(g, g_entropy if ctx.with_entropy else None)
        return *_recompute(ctx, coefficients), *[None] * 9


def _by_blocks(
    ctx, hidden: Tensor, weight: Tensor, labels: Tensor, wanted: Tensor, observe: Observer | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Log-probs and entropies of the wanted rows, and unit gradients of hidden if asked for."""
    logps = hidden.new_zeros(len(labels), dtype=compute_dtype(weight.dtype))
    entropy = torch.zeros_like(logps) if ctx.with_entropy else None
    dh = torch.zeros_like(hidden) if ctx.unit else None
    blocks = split_runs(wanted, ctx.rows)
    for block in head_blocks(
        ctx.kind, hidden, weight, ctx.head, labels, blocks, ctx.with_entropy, observe
    ):
        logps[block.index] = block.logps
        if ctx.with_entropy:
            entropy[block.index] = block.entropy
        if ctx.unit:
            dz = block.gradient()
            keep = ctx.columns.choose(dz, None, labels[block.index])
            if keep is not None:
                dz = keep.take_(dz)
            unit = hidden_gradient(dz, weight, labels, block.index, kept=keep)
            dh[block.index] = unit if isinstance(block.index, slice) else unit.to(dh.dtype)
    return logps, entropy, dh


def _recompute(ctx, coefficients: Coefficients) -> tuple[Tensor | None, ...]:
    """Gradients of hidden, weight and bias from the logits of the active rows, formed again."""
    labels, hidden, weight, bias, *kept = ctx.saved_tensors
    need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
    active = coefficients.active() & (labels != IGNORE_INDEX)
    inputs = hidden, weight, ctx.head, labels
    if kept:
        blocks = recomputed.recomputed_blocks(*inputs, active, kept, ctx.rows, ctx.capturable)
    else:
        blocks = head_blocks(ctx.kind, *inputs, split_rows(active, ctx.rows), ctx.with_entropy)
    dh = torch.zeros_like(hidden) if need_hidden else None
    sums = HeadGradients(weight, bias, need_weight, need_bias)
    for block in blocks:
        scale, of_logp, of_entropy = split_scale(coefficients.take(block.index))
        energies = None
        if kept and ctx.columns.looks(len(scale), len(weight)):  # the kernel has them anyway
            weights = row_weights(scale)
            dz, energies = block.gradient(of_logp, of_entropy, weights)
        else:
            dz = block.gradient(of_logp, of_entropy)
        keep = ctx.columns.choose(dz, scale, labels[block.index], energies)
        sums.add_bias(dz, scale, block.hidden, block.count)
        if keep is not None:
            dz = keep.take_(dz)
        sums.add_weight(dz, scale, block.hidden, block.count, keep)
        if need_hidden:
            write_hidden_gradient_(dh, dz, weight, labels, scale, block.index, block.count, keep)
    block = dz = None  # the workspace goes before the sum is rounded into memory of its own
    return (
        dh,
        sums.weight.to(weight.dtype) if need_weight else None,
        sums.bias.to(bias.dtype) if need_bias else None,
    )
