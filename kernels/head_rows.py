"""What happens to a block of logits between the head's GEMMs: its softmax, and its gradient.

The block ``[n, V]`` is the float32 product of hidden states and weight, in a workspace. A first
kernel reads it for each row's statistics; a second one, once the rows' coefficients are known,
reads the rows that have one and writes their gradient in the dtype of the GEMMs that follow, into
the same memory or a smaller one. Bytes per logit: 4 written by the GEMM, 4 read, then 4 read and 2
written for active rows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import READ_AGAIN, dense, row_config, row_length
from .rows import (
    LN2,
    LOG2E,
    inverse_temperature,
    label_logp,
    row_entropy,
    row_statistics,
    row_value,
    write_gradient,
)
from .token_epilogue import NO_TOKEN_LOSS, TokenLoss, write_token_loss

# Values of some rows of a batch, wherever among all these start: loaded one by one, so that their
# alignment is of no account and must not compile anew.
_ROW_VALUES = [
    f"{name}_ptr"
    for name in (
        *("labels", "temperature", "logps", "max", "sum", "entropy", "active", "kept"),
        *("anchor", "ref", "advantages", "weight", "entropy_weight"),
        *("loss", "g", "scale", "of_logp", "of_entropy"),
    )
]


@triton.jit(do_not_specialize_on_alignment=_ROW_VALUES)
def humanline_head_softmax(
    z_ptr,
    labels_ptr,
    temperature_ptr,
    bias_ptr,
    logps_ptr,
    max_ptr,
    sum_ptr,
    entropy_ptr,
    V,
    width,
    row_stride,
    logit_scale,
    logit_softcap,
    anchor_ptr,
    ref_ptr,
    advantages_ptr,
    weight_ptr,
    entropy_weight_ptr,
    loss_ptr,
    g_ptr,
    scale_ptr,
    of_logp_ptr,
    of_entropy_ptr,
    log_eps_P,
    log_eps_R,
    low,
    high,
    delta,
    beta,
    temperature_pos,
    temperature_neg,
    TEMPERATURE_PER_ROW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    TOKEN_LOSS: tl.constexpr,
    KIND: tl.constexpr,
    PENALTY: tl.constexpr,
    LANES: tl.constexpr,
    PER_LANE: tl.constexpr,
):
    row = tl.program_id(0)
    row_ptr = z_ptr + row.to(tl.int64) * row_stride
    inverse = inverse_temperature(temperature_ptr, row, TEMPERATURE_PER_ROW)
    m, s, t = row_statistics(
        row_ptr,
        V,
        inverse * LOG2E,
        "evict_last",  # for the gradient's kernel, which begins with the rows that come last here
        ENTROPY,
        LANES,
        PER_LANE,
        bias_ptr,
        logit_scale,
        logit_softcap,
        SOFTCAP,
        width,
    )
    label = tl.load(labels_ptr + row).to(tl.int32)
    logp = label_logp(
        row_ptr, label, inverse, m, s, V, bias_ptr, logit_scale, logit_softcap, SOFTCAP
    )
    tl.store(logps_ptr + row, logp)
    tl.store(max_ptr + row, m)
    tl.store(sum_ptr + row, s)
    entropy = 0.0
    if ENTROPY:
        entropy = row_entropy(LN2, s, t)
        tl.store(entropy_ptr + row, entropy)
    if TOKEN_LOSS:
        write_token_loss(
            row,
            logp,
            entropy,
            anchor_ptr,
            ref_ptr,
            advantages_ptr,
            weight_ptr,
            entropy_weight_ptr,
            loss_ptr,
            g_ptr,
            scale_ptr,
            of_logp_ptr,
            of_entropy_ptr,
            log_eps_P,
            log_eps_R,
            low,
            high,
            delta,
            beta,
            temperature_pos,
            temperature_neg,
            KIND,
            PENALTY,
            ENTROPY,
        )


@triton.jit(do_not_specialize_on_alignment=_ROW_VALUES)
def humanline_head_gradient(
    dz_ptr,
    z_ptr,
    kept_ptr,
    active_ptr,
    labels_ptr,
    temperature_ptr,
    bias_ptr,
    logps_ptr,
    max_ptr,
    sum_ptr,
    entropy_ptr,
    of_logp_ptr,
    of_entropy_ptr,
    V,
    width,
    row_stride,
    out_stride,
    logit_scale,
    logit_softcap,
    TEMPERATURE_PER_ROW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    KEPT: tl.constexpr,
    ACTIVE: tl.constexpr,
    OF_LOGP: tl.constexpr,
    ENTROPY: tl.constexpr,
    LANES: tl.constexpr,
    PER_LANE: tl.constexpr,
):
    out = tl.num_programs(0) - 1 - tl.program_id(0)  # first what was read last: it may be in L2
    place = out.to(tl.int64)
    active = True
    if ACTIVE:
        active = tl.load(active_ptr + out) != 0
    if not active:
        return
    row = out
    if KEPT:
        row = tl.load(kept_ptr + out).to(tl.int32)
    entropy = 0.0
    if ENTROPY:
        entropy = tl.load(entropy_ptr + row)
    write_gradient(
        dz_ptr + place * out_stride,
        z_ptr + row.to(tl.int64) * row_stride,
        V,
        tl.load(labels_ptr + row).to(tl.int32),
        inverse_temperature(temperature_ptr, row, TEMPERATURE_PER_ROW),
        tl.load(max_ptr + row),
        tl.load(sum_ptr + row),
        tl.load(logps_ptr + row),
        entropy,
        row_value(of_logp_ptr, out, OF_LOGP, 1.0),
        row_value(of_entropy_ptr, out, ENTROPY, 0.0),
        ENTROPY,
        LANES,
        PER_LANE,
        bias_ptr,
        logit_scale,
        logit_softcap,
        SOFTCAP,
        width,
        OVERLAP=True,
    )


def _aligned(x: Tensor) -> bool:
    """Whether every row starts at a multiple of 16 bytes and of 16 elements."""
    return x.data_ptr() % 16 == 0 and x.stride(0) % 16 == 0


class HeadRows:
    """Softmax of the rows of a block, and the way back.

    Args:
        z: ``hidden @ weight.T`` in float32, ``[n, V]``. Where its rows start at multiples of 16
            elements, there is memory up to the next one behind each: that is read (and ignored),
            so that a vocabulary of any size is loaded 16 bytes at a time.
        labels: integer ``[n]``, each in ``[0, V)``.
        temperature: a scalar, or ``[n]``.
        bias: ``[V]`` or None.
        logit_scale, logit_softcap: options of the head, applied after the bias in this order.
        with_entropy: also compute each row's entropy.
        logps, entropy: where to write them; memory of its own if None.
        token_loss: a loss that is evaluated at each row's log-prob.

    Attributes:
        logps, entropy: float32 ``[n]``, in nats; entropy is None if not asked for.
    """

    def __init__(
        self,
        z: Tensor,
        labels: Tensor,
        temperature: Tensor,
        bias: Tensor | None = None,
        logit_scale: float = 1.0,
        logit_softcap: float | None = None,
        with_entropy: bool = False,
        logps: Tensor | None = None,
        entropy: Tensor | None = None,
        token_loss: TokenLoss | None = None,
    ):
        self._z, self._labels, self._temperature, self._bias = z, labels, temperature, bias
        vocab, aligned = z.shape[1], _aligned(z)
        self._width = row_length(vocab) if aligned else vocab
        self._scalars = float(logit_scale), float(logit_softcap or 0.0)
        self._constants = {
            "TEMPERATURE_PER_ROW": temperature.dim() > 0,
            "SOFTCAP": logit_softcap is not None,
            **row_config(vocab, z.dtype, aligned, READ_AGAIN),
        }
        self.logps = z.new_empty(len(z)) if logps is None else logps
        self._max, self._sum = (z.new_empty(len(z)) for _ in range(2))
        self.entropy = entropy
        if with_entropy and entropy is None:
            self.entropy = torch.empty_like(self.logps)
        arguments = NO_TOKEN_LOSS if token_loss is None else token_loss.arguments
        loss = {"KIND": 0, "PENALTY": 0} if token_loss is None else token_loss.constants
        if len(z):
            with torch.cuda.device_of(z):
                humanline_head_softmax[(len(z),)](
                    z,
                    dense(labels),
                    dense(temperature),
                    bias,
                    self.logps,
                    self._max,
                    self._sum,
                    self.entropy,
                    vocab,
                    self._width,
                    z.stride(0),
                    *self._scalars,
                    *arguments,
                    ENTROPY=with_entropy,
                    TOKEN_LOSS=token_loss is not None,
                    **loss,
                    **self._constants,
                )

    def merge(self, shard) -> None:
        """Make the statistics those of a whole vocabulary, of which ``z`` is a slice.

        Args:
            shard: the slice, a ``humanline.ops.vocabulary.Shard``.
        """
        nats = 1.0 / self._temperature
        if self._bias is None and not self._constants["SOFTCAP"]:
            nats = nats * self._scalars[0]  # the maximum is that of the bare product
        mine = self.logps, self._max, self._sum, self.entropy
        for x, whole in zip(mine, shard.merge(self._labels, *mine, nats), strict=True):
            if x is not None:
                x.copy_(whole)

    def gradient(
        self,
        out: Tensor,
        kept: Tensor | None = None,
        of_logp: Tensor | None = None,
        of_entropy: Tensor | None = None,
        active: Tensor | None = None,
    ) -> Tensor:
        """Gradient by ``z`` of ``Σ of_logp·logp + of_entropy·entropy`` over some rows.

        Args:
            out: where to write it, ``[≥ k, V]``, rows as those of z. It may be the memory of z
                itself, row i in row i of it, in any dtype no wider than float32, if each
                ``kept[i]`` is i or at least k; then this can be called once.
            kept: the rows, integer ``[k]``; all if None.
            of_logp: float ``[k]``; 1 for all if None.
            of_entropy: float ``[k]``; 0 for all if None.
            active: number ``[k]``; rows where it is 0 are neither read nor written.

        Returns:
            ``out[:k]``.
        """
        vocab, k = self._z.shape[1], len(self._z if kept is None else kept)
        if k:
            with torch.cuda.device_of(out):
                humanline_head_gradient[(k,)](
                    out,
                    self._z,
                    kept,
                    active,
                    dense(self._labels),
                    dense(self._temperature),
                    self._bias,
                    self.logps,
                    self._max,
                    self._sum,
                    self.entropy,
                    dense(of_logp),
                    dense(of_entropy),
                    vocab,
                    self._width if _aligned(out) else vocab,
                    self._z.stride(0),
                    out.stride(0),
                    *self._scalars,
                    KEPT=kept is not None,
                    ACTIVE=active is not None,
                    OF_LOGP=of_logp is not None,
                    ENTROPY=of_entropy is not None,
                    **self._constants,
                )
        return out[:k]
