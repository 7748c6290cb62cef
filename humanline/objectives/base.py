"""What an objective is: a frozen value with one method that turns rows into a loss.

To write your own, subclass :class:`TokenObjective` and define ``token_loss`` if a token's gradient
needs nothing but that token, or :class:`Objective` and define ``loss`` otherwise. All entry points,
perceptions and backends then work, at the same cost as for the library's own objectives.
"""

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from humanline import autograd, checks, ops
from humanline.dtypes import at_least_float32
from humanline.joined import Share, join
from humanline.parallel import ALONE, Parallel, check_parallel
from humanline.perception import Identity, Perception
from humanline.rows import IGNORE_INDEX, Layout, Rows
from humanline.seam import Problem
from humanline.sharding import is_dtensor

Result = tuple[Tensor, dict[str, Tensor]]


@dataclass(frozen=True)
class Objective:
    """Base of all objectives.

    Args:
        perception: how log-ratios to the reference are perceived before the loss sees them.

    Raises:
        TypeError: ``perception`` is not a :class:`~humanline.Perception`; an option
            declared as a number, a name or a flag is none, such as ``beta="0.1"``.
        ValueError: a perception was given to an objective that has no reference.
    """

    perception: Perception = field(default=Identity(), kw_only=True)

    #: Whether the loss is built on log-ratios to a reference.
    needs_reference: ClassVar[bool] = True
    #: Whether the entry points compute each row's entropy and hand it to the loss.
    needs_entropy: ClassVar[bool] = False
    #: Which log-probs a row's gradient depends on: its own ("token"), those of its sequence
    #: ("sequence"), of its pair ("pair": sequences i and i + S/2) or any of the batch's ("batch").
    #: What is known earlier is computed in fewer passes; "batch" is always right.
    coupling: ClassVar[str] = "batch"
    #: Whether sequences i and i + S/2 are a pair. Read where ranks share a batch, see
    #: :class:`~humanline.Parallel`.
    in_pairs: ClassVar[bool] = False
    #: Names of what :meth:`prepare` returns with one value a sequence; other tensors have one a
    #: row. Read where ranks share a batch.
    per_sequence: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if "loss" in vars(cls) and "coupling" not in vars(cls):
            cls.coupling = "batch"  # whatever the base's loss was, this is another

    def __post_init__(self):
        name = type(self).__name__
        if not isinstance(self.perception, Perception):
            raise TypeError(
                f"perception must be a humanline Perception such as Clip(), got {self.perception!r}"
            )
        checks.require_fields(self)
        if not self.needs_reference and self.perception != Identity():
            raise ValueError(
                f"{name} is reference-free: there is no log-ratio to perceive, so perception must "
                f"stay Identity(), got {self.perception!r}"
            )

    # What a subclass defines, with the batch's arguments under names of its own: they come by name.
    # ``*args: Any`` beside them is how type checkers are told so.

    def loss(self, rows: Rows, *args: Any, **batch: Any) -> Tensor:
        """The loss, a scalar differentiable with respect to ``rows.logps``."""
        raise NotImplementedError(f"{type(self).__name__} does not define loss()")

    def stats(self, rows: Rows, *args: Any, **batch: Any) -> dict[str, Tensor]:
        """Statistics of a batch, under the names TRL logs. Rows are detached."""
        return {}

    def prepare(
        self, layout: Layout, ref_logps: Tensor | None, *args: Any, **batch: Any
    ) -> dict[str, Any]:
        """Check the batch's own arguments and give them the shape ``loss`` wants.

        Runs before any log-prob is computed: the reference's may be there in shape only. Of what
        is returned, tensors that begin with the rows' shape are set to 0 on masked rows.
        """
        if self.needs_reference:
            self.require_ref_logps(ref_logps)
        return batch

    def sequence_kernel_arguments(self, *args: Any, **batch: Any) -> dict[str, Any] | None:
        """Arguments of ``kernels.sequence_loss`` if this very loss exists as a device function.

        Without one a sequence-level objective takes more, small launches on a GPU.
        """
        return None

    def stats_of(self, report: dict[str, Tensor], *args: Any, **batch: Any) -> dict[str, Tensor]:
        """:meth:`stats` from what that kernel reports."""
        raise NotImplementedError(f"{type(self).__name__} does not define stats_of()")

    def kernel_arguments(
        self, layout: Layout, ref_logps: Tensor | None, *args: Any, **batch: Any
    ) -> dict[str, Any] | None:
        """Arguments of ``kernels.token_loss`` if this very loss exists as a device function; of
        ``kernels.sequence_policy`` if :attr:`coupling` is "sequence".

        Without one a token-level objective takes two launches from logits on a GPU instead of one,
        and small ones for its coefficients and statistics.
        """
        return None

    def token_stats_of(self, report: dict[str, Tensor]) -> dict[str, Tensor]:
        """:meth:`stats` from what ``kernels.token_stats`` names."""
        raise NotImplementedError(f"{type(self).__name__} does not define token_stats_of()")

    def anchor(self, logps: Tensor, ref_logps: Tensor | None, *args: Any, **batch: Any) -> Tensor:
        """The log-probs that the log-ratio is taken to."""
        return ref_logps

    # Entry points

    def from_logps(
        self,
        policy_logps: Tensor,
        ref_logps: Tensor | None,
        mask: Tensor,
        *,
        entropy: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        backend: str | None = None,
        parallel: Parallel | None = None,
        **batch: Any,
    ) -> Result:
        """Loss from per-token log-probs.

        Args:
            policy_logps: ``log π_θ(y_t | …)``, ``[B, T]``, or ``[N]`` packed; float32 or float64
                (halves are computed in float32).
            ref_logps: the same of the reference; None for reference-free objectives.
            mask: completion tokens, same shape, bool or 0/1.
            entropy: entropy of each row in nats, same shape; for objectives with an entropy bonus.
            cu_seqlens: row offsets ``[S+1]`` of packed sequences.
            backend: "triton" or "torch"; None chooses by device.
            parallel: who shares what among processes, a :class:`~humanline.Parallel`.
            **batch: what the objective needs besides, see its own documentation.

        Returns:
            The loss, a differentiable scalar, and a dict of detached statistics.

        Raises:
            TypeError: something else than a tensor or a number.
            ValueError: shapes, dtypes or devices do not fit, or something needed is missing; a
                DTensor; what an objective of one's own returns is no loss. Where looking is free,
                on a CPU, and within :func:`~humanline.debug`: a mask with other values than 0 and
                1, log-probs of the reference that are not finite, a label outside ``[0, V)`` that
                is not -100. Within it alone: an objective whose rows depend on more rows than its
                ``coupling`` says.
        """
        checks.require_tensors(policy_logps=policy_logps, mask=mask)
        checks.require_tensors_or_none(entropy=entropy, cu_seqlens=cu_seqlens)
        checks.require_floating(policy_logps=policy_logps, entropy=entropy)
        checks.require(
            policy_logps.shape == mask.shape,
            lambda: (
                f"policy_logps and mask must have the same shape, got "
                f"{list(policy_logps.shape)} and {list(mask.shape)}"
            ),
        )
        checks.require(
            entropy is None or entropy.shape == mask.shape,
            lambda: (
                f"entropy must have the rows' shape {list(mask.shape)}, got {list(entropy.shape)}"
            ),
        )
        checks.require_same_device(policy_logps=policy_logps, mask=mask, entropy=entropy)
        checks.require_mask("mask", mask)
        parallel = check_parallel(parallel)
        problem = self._problem(Layout.of(mask, cu_seqlens), ref_logps, batch, parallel)
        checks.require(
            entropy is not None or not self.needs_entropy,
            lambda: f"{type(self).__name__} has an entropy bonus: from_logps needs entropy=…",
        )
        backend = ops.choose_backend(policy_logps, backend)
        entropy = entropy if self.needs_entropy else None
        return _finished(
            ops.finish(join(problem, parallel), policy_logps, entropy, backend), parallel
        )

    def from_logits(
        self,
        logits: Tensor,
        labels: Tensor,
        ref_logps: Tensor | None = None,
        *,
        temperature: float | Tensor = 1.0,
        cu_seqlens: Tensor | None = None,
        backend: str | None = None,
        inplace: bool = False,
        parallel: Parallel | None = None,
        **batch: Any,
    ) -> Result:
        """Loss from logits.

        Args:
            logits: ``[B, T, V]``, or ``[N, V]`` packed. Row ``t`` predicts ``labels[t]``.
            labels: integer ``[B, T]`` or ``[N]``; -100 marks rows outside the completion.
            ref_logps: log-probs of the reference, shape of ``labels``, at the same temperature.
            temperature: divides the logits; a float, or a tensor with one value a row.
            cu_seqlens, backend, **batch: see :meth:`from_logps`.
            inplace: let the gradient overwrite ``logits``, which spares a buffer of their size;
                they are contiguous, or cut from such along T, like ``logits[:, :-1]``.
                Token-level objectives only. Autograd raises if anything still needs the logits.
                Spares nothing with float16 logits or under ``torch.compile``, where the gradient
                is not formed in the forward. On the Triton backend an objective without a device
                function is then computed in blocks by torch, which is slower.
            parallel: who shares what among processes; with ``vocab`` the logits are
                ``[..., V/P]``, this rank's slice, and not to be had ``inplace``.

        Returns, raises: see :meth:`from_logps`.
        """
        checks.require_tensors(labels=labels)
        checks.require_tensors_or_none(cu_seqlens=cu_seqlens)
        layout = Layout.of(labels != IGNORE_INDEX, cu_seqlens)
        parallel = check_parallel(parallel)
        checks.require(
            not (inplace and is_dtensor(logits)),
            "inplace=True overwrites logits, and a DTensor's are autograd's: pass the tensor that "
            "it was made of",
        )
        logits, shard = ops.sliced_logits(logits, parallel)
        ops.check_logits(logits, labels, temperature, shard)
        problem = self._problem(layout, ref_logps, batch, parallel)
        backend = ops.choose_backend(logits, backend)
        checks.require(
            shard is None or not inplace,
            lambda: (
                "inplace=True forms the gradient while the logits are at hand: not where their "
                f"vocabulary is split over the {shard.axis}"
            ),
        )
        problem = join(problem, parallel)
        if shard is None:
            at_once = ops.logits_objective(problem, logits, labels, temperature, backend, inplace)
            if at_once is not None:
                return _finished(at_once, parallel)
        logps, entropy = ops.logits_logps(
            logits, labels, temperature, self.needs_entropy, backend, shard
        )
        return _finished(ops.finish(problem, logps, entropy, backend), parallel)

    @autograd.uncompiled
    def from_hidden(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        ref_logps: Tensor | None = None,
        *,
        bias: Tensor | None = None,
        temperature: float | Tensor = 1.0,
        logit_scale: float = 1.0,
        logit_softcap: float | None = None,
        cu_seqlens: Tensor | None = None,
        ref_hidden: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        workspace_bytes: int = ops.WORKSPACE_BYTES,
        backend: str | None = None,
        capturable: bool = False,
        gradient_tolerance: float = 0.0,
        parallel: Parallel | None = None,
        **batch: Any,
    ) -> Result:
        """Loss from hidden states and the output head, never holding all logits.

        Under ``torch.compile`` a graph break: it runs as it stands, with the same numbers.

        Args:
            hidden: ``[B, T, H]``, or ``[N, H]`` packed. Row ``t`` predicts ``labels[t]``.
            weight: the head's weight, ``[V, H]``.
            labels, ref_logps, temperature, cu_seqlens, backend, **batch: see :meth:`from_logits`.
            bias: the head's bias, ``[V]``.
            logit_scale: multiplies the logits (Cohere).
            logit_softcap: ``cap · tanh(logits / cap)`` after the scale (Gemma 2).
            ref_hidden, ref_weight, ref_bias: the reference's hidden states ``[B, T, H']`` and head
                ``[V, H']``, ``[V]``, in place of ``ref_logps``; one GEMM more, no gradient.
            workspace_bytes: bound of the memory for logits; what there is beside it:
                :func:`~humanline.linear_token_logps`.
            capturable: read nothing back from the device, so that forward and backward can be
                captured in a CUDA graph; Triton backend only. 1F + 3F·active for any objective.
            gradient_tolerance: leave columns out of the gradient's products, see
                :func:`~humanline.linear_token_logps`. The share that is kept is the statistic
                "humanline/kept_columns": a mean over blocks weighted by their rows; 0 where there
                was none, or before the backward where that is what chooses them: where it forms the
                logits of active rows again.
            parallel: who shares what among processes; with ``vocab`` weights and biases are
                this rank's slices, ``[V/P, H]`` and ``[V/P]``.

        Returns, raises: see :meth:`from_logps`.
        """
        checks.require_tensors(labels=labels)
        checks.require_tensors_or_none(cu_seqlens=cu_seqlens)
        ops.check_tolerance(gradient_tolerance, capturable)
        layout = Layout.of(labels != IGNORE_INDEX, cu_seqlens)
        parallel = check_parallel(parallel)
        options = ops.Head(bias, temperature, logit_scale, logit_softcap)
        no_head_of_ref = ref_hidden is None and ref_weight is None and ref_bias is None
        if no_head_of_ref and not capturable and not gradient_tolerance:
            of_slice = ops.slice_for_all_rows(hidden, weight, bias, parallel)
            if of_slice is not None:
                shard, hidden, weight, bias = of_slice
                options = replace(options, bias=bias, shard=shard)
                ops.check_hidden(hidden, weight, labels, options)
                problem = join(self._problem(layout, ref_logps, batch, parallel), parallel)
                how = workspace_bytes, ops.choose_backend(hidden, backend), False, 0.0
                result = _all_rows(problem.share, hidden, weight, labels, options, how)
                return _finished(result, parallel)
        hidden, weight, head = ops.sliced_head(hidden, weight, options, parallel)
        ops.check_sliced(head, capturable, gradient_tolerance)
        ops.check_hidden(hidden, weight, labels, head)
        backend = ops.choose_backend(hidden, backend)
        how = workspace_bytes, backend, capturable, gradient_tolerance
        if ref_hidden is None:
            checks.require(
                ref_weight is None and ref_bias is None,
                "ref_weight and ref_bias are the head of ref_hidden, which was not given",
            )
            problem = join(self._problem(layout, ref_logps, batch, parallel), parallel)
            rows = hidden, weight, head.labels(labels), head
            return _finished(ops.linear_objective(problem, *rows, *how), parallel)
        checks.require(
            ref_logps is None and ref_weight is not None,
            "the reference is given by ref_logps, or by ref_hidden and ref_weight; got "
            + ("ref_hidden without ref_weight" if ref_logps is None else "both"),
        )
        options = replace(options, bias=ref_bias)
        *of_ref, ref_head = ops.sliced_head(ref_hidden, ref_weight, options, parallel, "ref_")
        ops.check_hidden(*of_ref, labels, ref_head, "ref_")
        # Whatever is wrong with the batch is found before the reference's GEMM runs.
        unknown = torch.zeros(labels.shape, device=labels.device)
        problem = self._problem(layout, unknown, batch, parallel)
        ref_logps = ops.reference_logps(*of_ref, labels, ref_head, *how[:3])
        problem = join(replace(problem, ref_logps=ref_logps.reshape(-1)), parallel)
        rows = hidden, weight, head.labels(labels), head
        return _finished(ops.linear_objective(problem, *rows, *how), parallel)

    def _problem(
        self,
        layout: Layout,
        ref_logps: Tensor | None,
        batch: dict[str, Any],
        parallel: Parallel = ALONE,
    ) -> Problem:
        if parallel.rows:
            layout = replace(layout, parallel=parallel)
        for name, x in batch.items():  # an objective of one's own may take what it likes, but whole
            if isinstance(x, Tensor):
                checks.require_tensors(**{name: x})
        if ref_logps is not None:
            checks.require_tensors(ref_logps=ref_logps)
            checks.require_floating(ref_logps=ref_logps)
            checks.require(
                tuple(ref_logps.shape) == layout.shape,
                lambda: (
                    f"ref_logps must have the rows' shape {list(layout.shape)}, got "
                    f"{list(ref_logps.shape)}"
                ),
            )
            checks.require_same_device(rows=layout.mask, ref_logps=ref_logps)
            ref_logps = at_least_float32(ref_logps.detach()).reshape(-1)
            checks.require_finite("ref_logps", ref_logps, layout.mask)
        batch = self.prepare(layout, ref_logps, **batch)
        # Once and for every objective: what is on a masked row has no effect, be it NaN.
        batch = {name: layout.masked(x) for name, x in batch.items()}
        return Problem(self, layout, ref_logps, batch)

    def require_ref_logps(self, ref_logps: Tensor | None) -> None:
        """For ``prepare``: the objective cannot do without the reference's log-probs."""
        checks.require(
            ref_logps is not None,
            lambda: (
                f"{type(self).__name__} compares the policy with a reference: it needs ref_logps"
            ),
        )


@dataclass(frozen=True)
class TokenObjective(Objective):
    """An objective whose gradient on a row depends on that row alone: subclass it and define
    :meth:`token_loss`. Tensors of the batch come to it as row values, 0 where masked.

    Args:
        perception: how a token's log-ratio to the reference is perceived: Clip, BetaRejection,
            ProspectWeight or a Perception of one's own; Identity() for as it is.
    """

    coupling: ClassVar[str] = "token"

    def token_loss(self, rows: Rows, *args: Any, **batch: Any) -> Tensor:
        """Each row's share ``[n]`` of the loss; their sum is the loss. Masked rows are ignored.

        ``rows.token_mean`` and ``rows.sequence_mean`` turn per-token values into such shares. They
        must be differentiable with respect to the rows, and a row's must not depend on another:
        ``rows`` may be all of the batch or a block of it. :func:`~humanline.debug` looks at that.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define token_loss()")

    def loss(self, rows: Rows, *args: Any, **batch: Any) -> Tensor:
        shares = self.token_loss(rows, **batch)
        name = f"{type(self).__name__}.token_loss()"
        is_tensor = isinstance(shares, Tensor)
        checks.require(
            is_tensor and shares.shape == rows.mask.shape,
            lambda: (
                f"{name} must return a tensor {list(rows.mask.shape)}, each row's share of the "
                f"loss, got {checks.given(shares)}"
            ),
            error=ValueError if is_tensor else TypeError,
        )
        checks.require(
            shares.requires_grad or not (torch.is_grad_enabled() and rows.requires_grad),
            f"{name} must be differentiable with respect to the rows it is given, got shares that "
            "are detached from them: from detach(), item(), no_grad() or rows.ref_logps alone",
        )
        return torch.where(rows.mask, shares, 0).sum()

    def prepare(
        self, layout: Layout, ref_logps: Tensor | None, *args: Any, **batch: Any
    ) -> dict[str, Any]:
        """As in :class:`Objective`; besides, every tensor becomes flat row values ``[N]``."""
        batch = super().prepare(layout, ref_logps, **batch)
        return {
            name: layout.rows(x, name) if isinstance(x, Tensor) and x.dim() else x
            for name, x in batch.items()
        }


def _all_rows(
    share: Share, hidden: Tensor, weight: Tensor, labels: Tensor, head: ops.Head, how: tuple
) -> Result:
    """From hidden states of all ranks, this one's being ``hidden``, and a slice of the head."""

    def everyones(x):
        return ops.rows_of_all_ranks(x.reshape(len(share.own), *x.shape[labels.dim() :]), share)

    if isinstance(head.temperature, Tensor) and head.temperature.dim():
        head = replace(head, temperature=everyones(head.temperature))
    labels, hidden = head.labels(everyones(labels)), everyones(hidden)
    return ops.linear_objective(share.problem, hidden, weight, labels, head, *how)


def _finished(result: Result, parallel: Parallel) -> Result:
    loss, stats = result
    return parallel.attach(loss), stats


def as_count(num_items: int | Tensor | None) -> int | Tensor | None:
    """A normaliser the caller counted: at least 1, a number or a scalar tensor."""
    if num_items is not None:
        checks.require_number_or_tensor("num_items_in_batch", num_items)
    if isinstance(num_items, Tensor):
        checks.require(
            num_items.numel() == 1,
            lambda: f"num_items_in_batch must be one number, got shape {list(num_items.shape)}",
        )
        return num_items.detach().reshape(()).clamp(min=1)
    return None if num_items is None else max(num_items, 1)
