"""How rows (tokens) fall into sequences: padded ``[B, T]`` or packed ``[N]`` with ``cu_seqlens``.

Everything above this file works on flat rows ``[N]`` and per-sequence values ``[S]``; this is the
only place that knows which of the two layouts they came from.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from humanline.checks import require
from humanline.gradients import moving

IGNORE_INDEX = -100


@dataclass(frozen=True)
class Layout:
    """Completion mask of flat rows, and their grouping into sequences.

    Attributes:
        mask: bool ``[N]``, True on completion tokens.
        shape: the caller's row shape, ``(B, T)`` or ``(N,)``.
        cu_seqlens: int64 ``[S+1]`` row offsets of packed sequences, or None when padded.
        sequence_of_row: index of each row's sequence, int64 ``[N]``, or None when padded.
        lengths: completion tokens of each sequence, int64 ``[S]``.
        tokens: completion tokens of the batch, an int64 scalar.
        parallel: who has other rows of it, for ``prepare``; None in a process alone, and for the
            rows that a loss sees, which are all of them.
    """

    mask: Tensor
    shape: tuple[int, ...]
    cu_seqlens: Tensor | None
    sequence_of_row: Tensor | None
    lengths: Tensor
    tokens: Tensor
    parallel: Any = None

    @classmethod
    def of(cls, mask: Tensor, cu_seqlens: Tensor | None) -> "Layout":
        """Layout of a completion mask (any dtype) of shape ``[B, T]``, or ``[N]`` when packed.

        Raises:
            ValueError: the mask's shape and ``cu_seqlens`` do not fit each other.
        """
        shape, flat = tuple(mask.shape), mask.reshape(-1).to(torch.bool)
        if cu_seqlens is None:
            require(
                mask.dim() == 2,
                lambda: (
                    f"rows must have shape [B, T], or [N] together with cu_seqlens; got "
                    f"{list(mask.shape)} and no cu_seqlens"
                ),
            )
            sequence_of_row, lengths = None, flat.view(shape).sum(1)
        else:
            _check_cu_seqlens(mask, cu_seqlens)
            cu_seqlens = cu_seqlens.to(torch.int64)
            row = torch.arange(flat.numel(), device=flat.device)
            sequence_of_row = torch.searchsorted(cu_seqlens, row, right=True) - 1
            lengths = _SegmentSum.apply(flat.double(), cu_seqlens, sequence_of_row).long()
        tokens = flat.sum()
        return cls(flat, shape, cu_seqlens, sequence_of_row, lengths, tokens)

    @property
    def length_of_row(self) -> Tensor:
        """Completion tokens of each row's sequence, int64 ``[N]``."""
        if self.cu_seqlens is None:
            return self.lengths[:, None].expand(self.shape).reshape(-1)
        return self.lengths[self.sequence_of_row]

    @property
    def num_sequences(self) -> int:
        return self.shape[0] if self.cu_seqlens is None else self.cu_seqlens.numel() - 1

    def sum(self, x: Tensor) -> Tensor:
        """Sum of row values ``[N]`` over each sequence: ``[S]``."""
        self._require_all(x.shape)
        if self.cu_seqlens is None:
            return x.view(self.shape).sum(1)
        return _SegmentSum.apply(x, self.cu_seqlens, self.sequence_of_row)

    def _require_all(self, shape: torch.Size) -> None:
        require(
            shape == self.mask.shape,
            lambda: (
                f"sums over sequences need all {len(self.mask)} rows of the batch, got values of "
                f"shape {list(shape)}; a TokenObjective may be handed a block of rows"
            ),
        )

    def mean(self, x: Tensor) -> Tensor:
        """Sum of row values over each sequence, divided by its completion tokens (0 if none)."""
        return self.sum(x) / self.lengths.clamp(min=1)

    def expand(self, x: Tensor) -> Tensor:
        """Per-sequence values ``[S]`` repeated on their rows: ``[N]``."""
        if self.cu_seqlens is None:
            return x[:, None].expand(self.shape).reshape(-1)
        return _SegmentExpand.apply(x, self.cu_seqlens, self.sequence_of_row)

    def over_tokens(self, x: float) -> Tensor:
        """A number divided by the batch's completion tokens, a scalar tensor; infinite where there
        are none, so that no row has it."""
        return _number(x) / self.tokens

    def weights(self, share: Tensor | float, like: Tensor) -> Tensor:
        """One share for all, or one for each, as values of the shape of ``like``: of rows, where
        those outside the completion have one too, or of sequences. For kernels."""
        if not isinstance(share, Tensor):
            return torch.full_like(like, share, dtype=torch.float32)
        return share.to(like.device).expand(like.shape)

    def rows(self, x: Tensor, name: str) -> Tensor:
        """``x`` as flat rows ``[N]``, from row values or from one value a sequence.

        Raises:
            ValueError: ``x`` has neither shape.
        """
        if x.shape == (self.num_sequences,):
            return self.expand(x)
        require(
            tuple(x.shape) == self.shape,
            lambda: (
                f"{name} must have shape {[self.num_sequences]} (one a sequence) or "
                f"{list(self.shape)} (one a row), got {list(x.shape)}"
            ),
        )
        return x.reshape(-1)

    def masked(self, x: Any) -> Any:
        """0 on masked rows, whatever was there, NaN included; other rows are as they were.

        Args:
            x: a tensor whose first dimensions are those of the rows, ``[B, T]`` or flat ``[N]``.
                Anything else is returned as it is, and so is what may be one value a sequence.
        """
        if not isinstance(x, Tensor) or x.shape[:1] == (self.num_sequences,) == self.mask.shape:
            return x
        for shape in (self.shape, tuple(self.mask.shape)):
            if tuple(x.shape[: len(shape)]) == shape:
                beside = (1,) * (x.dim() - len(shape))
                return x.masked_fill(~self.mask.view(*shape, *beside), 0)
        return x


def _check_cu_seqlens(mask: Tensor, cu_seqlens: Tensor) -> None:
    require(
        mask.dim() == 1,
        lambda: f"packed rows must have shape [N] when cu_seqlens is given, got {list(mask.shape)}",
    )
    require(
        cu_seqlens.dim() == 1 and cu_seqlens.numel() >= 2 and not cu_seqlens.is_floating_point(),
        lambda: (
            f"cu_seqlens must be an integer tensor [S+1] with S >= 1, got {cu_seqlens.dtype} "
            f"{list(cu_seqlens.shape)}"
        ),
    )
    require(
        cu_seqlens.device == mask.device,
        lambda: f"cu_seqlens is on {cu_seqlens.device}, the rows are on {mask.device}",
    )
    rows = mask.numel()
    require(
        lambda: (
            cu_seqlens[0] == 0 and cu_seqlens[-1] == rows and bool((cu_seqlens.diff() >= 0).all())
        ),
        lambda: f"cu_seqlens must rise from 0 to {rows} rows, got {cu_seqlens.tolist()}",
        on=cu_seqlens,
    )


# Sum and expand are each other's backward. Written out, because autograd's own backward of an
# indexed read is an atomic scatter on GPUs: not the same bits on a rerun.


class _SegmentSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cu_seqlens, sequence_of_row):
        ctx.save_for_backward(cu_seqlens, sequence_of_row)
        # float64: the reduction runs in order, where float32 would lose digits on long sequences
        total = torch.segment_reduce(x.double(), "sum", offsets=cu_seqlens, initial=0, unsafe=True)
        return total.to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        return _SegmentExpand.apply(grad, *ctx.saved_tensors), None, None


class _SegmentExpand(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cu_seqlens, sequence_of_row):
        ctx.save_for_backward(cu_seqlens, sequence_of_row)
        return x[sequence_of_row]

    @staticmethod
    def backward(ctx, grad):
        return _SegmentSum.apply(grad.contiguous(), *ctx.saved_tensors), None, None


@dataclass(frozen=True)
class Rows:
    """What an objective sees: log-probs of a block of rows, and the batch they belong to.

    A token-level objective may be handed a block of rows at a time; ``tokens``, ``num_sequences``
    and ``length`` always speak of the whole batch. :meth:`sum` and :meth:`expand` need all rows.

    Attributes:
        logps: ``log π_θ`` of each row's label, ``[n]``, 0 where masked.
        ref_logps: the same of the reference, or None for reference-free objectives.
        log_ratio: perceived log-ratio ``c``, ``[n]``, 0 where masked; None without a reference.
        raw_log_ratio: log-ratio ``d`` before perception.
        unclamped: bool ``[n]``, tokens whose gradient the perception kept.
        entropy: entropy of each row's distribution in nats, 0 where masked, or None if not asked
            for.
        mask: bool ``[n]``, completion tokens.
        length: completion tokens of each row's sequence, ``[n]``.
        layout: how all rows of the batch fall into sequences.
    """

    logps: Tensor
    # To a type checker these are tensors: whoever writes an objective knows whether they are None.
    ref_logps: Tensor | Any
    log_ratio: Tensor | Any
    raw_log_ratio: Tensor | Any
    unclamped: Tensor | Any
    entropy: Tensor | Any
    mask: Tensor
    length: Tensor
    layout: Layout = field(repr=False)

    @classmethod
    def blank(cls, layout: Layout, length: Tensor) -> "Rows":
        """All rows of a batch whose log-probs are not known yet; ``length`` may be that of each
        sequence, where what is asked of them is one value a sequence."""
        unknown = [None] * 6
        return cls(*unknown, layout.mask, length, layout)

    @property
    def requires_grad(self) -> bool:
        """Whether anything of the policy in them does."""
        policys = (self.logps, self.entropy)
        return any(x is not None and x.requires_grad for x in policys)

    @property
    def perceived_logps(self) -> Tensor:
        """``logps``, with the gradient that the perception leaves them."""
        return self.logps.detach() + moving(self.log_ratio)

    @property
    def tokens(self) -> Tensor:
        """Completion tokens in the whole batch."""
        return self.layout.tokens

    @property
    def num_sequences(self) -> int:
        """Sequences in the whole batch."""
        return self.layout.num_sequences

    def sum(self, x: Tensor) -> Tensor:
        """Per-sequence sums ``[S]`` of row values."""
        return self.layout.sum(x)

    def mean(self, x: Tensor) -> Tensor:
        """Per-sequence means ``[S]`` over completion tokens of row values that are 0 elsewhere."""
        return self.layout.mean(x)

    def expand(self, x: Tensor) -> Tensor:
        """Row values ``[N]`` from per-sequence values ``[S]``."""
        self.layout._require_all(self.mask.shape)
        return self.layout.expand(x)

    def token_mean(self, x: Tensor | float) -> Tensor:
        """Each row's share of the mean of ``x`` over all completion tokens of the batch. Of a
        number, that of a completion token, see :meth:`Layout.over_tokens`."""
        if isinstance(x, Tensor):
            return torch.where(self.mask, x, 0) / self.tokens.clamp(min=1)
        return self.layout.over_tokens(x)

    def sequence_mean(self, x: Tensor | float) -> Tensor:
        """Each row's share of the mean over sequences of their token means; of a number, that
        of a completion token, infinite where the sequence has none."""
        sequences = max(self.num_sequences, 1)
        if isinstance(x, Tensor):
            return torch.where(self.mask, x, 0) / self.length.clamp(min=1) / sequences
        return _number(x / sequences) / self.length


def _number(x: float) -> Tensor:
    """A number as a tensor on the CPU, which a device divides by a tensor of its own in one go."""
    return torch.tensor(x, dtype=torch.float32)
