"""Device functions on one row of logits: its log-sum-exp, and its gradient.

A row is walked in tiles ``[LANES, PER_LANE]``, ``PER_LANE`` adjacent elements to a thread, so that
a thread loads 16 bytes at a time and keeps a running maximum and sum of its own; the threads meet
once, at the end of the row. Arithmetic is float32 throughout.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def row_offset(row, rows_per_batch, batch_stride_rows, row_stride):
    """Element offset of a row of ``[B, T, V]``, see RowTensor in launch.py."""
    row = row.to(tl.int64)
    batch = row // rows_per_batch
    return (batch * batch_stride_rows + (row - batch * rows_per_batch)) * row_stride


@triton.jit
def row_value(ptr, row, PRESENT: tl.constexpr, otherwise):
    """A row's value, or ``otherwise`` where there is no such tensor."""
    if PRESENT:
        return tl.load(ptr + row).to(tl.float32)
    return otherwise


@triton.jit
def inverse_temperature(temperature_ptr, row, PER_ROW: tl.constexpr):
    return 1.0 / tl.load(temperature_ptr + (row if PER_ROW else 0)).to(tl.float32)


@triton.jit
def tile_columns(LANES: tl.constexpr, PER_LANE: tl.constexpr):
    return tl.arange(0, LANES)[:, None] * PER_LANE + tl.arange(0, PER_LANE)[None, :]


@triton.jit
def one_minus_exp(x):
    """``1 − e^x`` for ``x ≤ 0``, exact where ``x → 0`` and the difference would cancel."""
    series = 1.0 + x * (1.0 / 8)
    series = 1.0 + x * (1.0 / 7) * series
    series = 1.0 + x * (1.0 / 6) * series
    series = 1.0 + x * (1.0 / 5) * series
    series = 1.0 + x * (1.0 / 4) * series
    series = 1.0 + x * (1.0 / 3) * series
    series = 1.0 + x * (1.0 / 2) * series
    return tl.where(x > -0.25, -x * series, 1.0 - tl.exp(x))


@triton.jit
def tanh_and_slope(x):
    """``tanh x`` and ``1 − tanh² x``, both to the last digits at either end."""
    e = tl.exp(-2.0 * tl.abs(x))
    tanh = one_minus_exp(-2.0 * tl.abs(x)) / (1.0 + e)
    return tl.where(x < 0, -tanh, tanh), 4.0 * e / ((1.0 + e) * (1.0 + e))


@triton.jit
def head_options(z, columns, inside, bias_ptr, logit_scale, logit_softcap, SOFTCAP: tl.constexpr):
    """Logits from a head's product ``z`` at these columns, and ``d logits / dz``: ``+ bias``,
    ``· logit_scale``, ``logit_softcap · tanh(· / logit_softcap)``."""
    if bias_ptr is not None:
        z += tl.load(bias_ptr + columns, inside, other=0.0).to(tl.float32)
    z *= logit_scale
    slope = logit_scale
    if SOFTCAP:
        tanh, tanh_slope = tanh_and_slope(z / logit_softcap)
        z = logit_softcap * tanh
        slope = logit_scale * tanh_slope
    return z, slope


@triton.jit
def load_logits(
    row_ptr,
    columns,
    V,
    width,
    bias_ptr,
    logit_scale,
    logit_softcap,
    SOFTCAP: tl.constexpr,
    EVICTION: tl.constexpr,
):
    """Logits of a row at these columns, of which there are ``width`` in memory, and their slopes,
    see head_options; from V on they are to be ignored."""
    z = tl.load(
        row_ptr + columns, mask=columns < width, other=float("-inf"), eviction_policy=EVICTION
    )
    return head_options(
        z.to(tl.float32), columns, columns < V, bias_ptr, logit_scale, logit_softcap, SOFTCAP
    )


@triton.jit
def add_tile(m, s, t, z, scale, ENTROPY: tl.constexpr):
    """The statistics ``m, s, t [R]`` (see row_statistics) with a tile ``z [R, C]`` added."""
    m_new = tl.maximum(m, tl.max(z, 1))
    finite = tl.where(m_new == float("-inf"), 0.0, m_new)
    e = tl.exp2((z - finite[:, None]) * scale[:, None])
    shrink = tl.exp2((m - finite) * scale)
    if ENTROPY:
        moved = tl.where(s > 0, s * (m - finite), 0.0)
        t = (t + moved) * shrink
        t += tl.sum(tl.where(e > 0, e * (z - finite[:, None]), 0.0), 1)
    return m_new, s * shrink + tl.sum(e, 1), t


@triton.jit
def merge(m, s, t, scale, ENTROPY: tl.constexpr):
    """One row's statistics from those ``[R]`` of its parts."""
    top = tl.max(m, 0)
    finite = tl.where(top == float("-inf"), 0.0, top)
    shrink = tl.exp2((m - finite) * scale)
    if ENTROPY:
        moved = tl.where(s > 0, s * (m - finite), 0.0)
        t_all = tl.sum(tl.where(s > 0, (t + moved) * shrink, 0.0), 0)
    else:
        t_all = 0.0
    return top, tl.sum(s * shrink, 0), t_all


@triton.jit
def row_statistics(
    row_ptr,
    V,
    scale,
    ENTROPY: tl.constexpr,
    LANES: tl.constexpr,
    PER_LANE: tl.constexpr,
    bias_ptr=None,
    logit_scale=1.0,
    logit_softcap=0.0,
    SOFTCAP: tl.constexpr = False,
    width=None,
):
    """Maximum ``m`` of the row ``z``, ``s = Σ 2^((z−m) scale)``, and with ENTROPY
    ``t = Σ 2^((z−m) scale) (z−m)``.

    The maximum is subtracted before the scale is applied, where it is exact: at logits of 1e4 the
    product alone would lose three digits. ``width`` elements of the row may be read, if that is
    more than V: a multiple of 16 lets a row of any length be loaded 16 bytes at a time.
    """
    columns = tile_columns(LANES, PER_LANE)
    scales = tl.full([LANES], scale, tl.float32)
    m = tl.full([LANES], float("-inf"), tl.float32)
    s = tl.zeros([LANES], tl.float32)
    t = tl.zeros([LANES], tl.float32)
    if width is None:
        width = V
    for start in range(0, V, LANES * PER_LANE):
        at = start + columns
        z, _ = load_logits(
            row_ptr, at, V, width, bias_ptr, logit_scale, logit_softcap, SOFTCAP, "evict_last"
        )
        z = tl.where(at < V, z, float("-inf"))
        m, s, t = add_tile(m, s, t, z, scales, ENTROPY)
    return merge(m, s, t, scale, ENTROPY)


@triton.jit
def label_logp(
    row_ptr,
    label,
    inverse_temperature,
    m,
    s,
    bias_ptr=None,
    logit_scale=1.0,
    logit_softcap=0.0,
    SOFTCAP: tl.constexpr = False,
):
    """Log-prob in nats of the label, from the row's statistics."""
    z = tl.load(row_ptr + label).to(tl.float32)
    z, _ = head_options(z, label, True, bias_ptr, logit_scale, logit_softcap, SOFTCAP)
    return (z - m) * inverse_temperature - tl.log(s)


@triton.jit
def row_entropy(inverse_temperature, s, t):
    """Entropy in nats, from the row's statistics."""
    return tl.log(s) - t / s * inverse_temperature


@triton.jit
def logit_gradient(
    z,
    is_label,
    at_label,
    m,
    log2_s,
    scale,
    entropy,
    g,
    g_entropy,
    ENTROPY: tl.constexpr,
):
    """``g (onehot − p) + g_entropy (−p log p − p H)`` of the logits ``z`` over the temperature.

    Every other argument is of a row: a scalar, or ``[R, 1]`` for a tile ``z [R, C]``. ``at_label``
    is ``g (1 − p)`` of the label, which would cancel where its p is 1.
    """
    log2_p = (z - m) * scale - log2_s
    p = tl.exp2(log2_p)
    grad = tl.where(is_label, at_label, -g * p)
    if ENTROPY:
        grad -= tl.where(p > 0, g_entropy * p * (log2_p * LN2 + entropy), 0.0)
    return grad


@triton.jit
def write_gradient(
    grad_ptr,
    row_ptr,
    V,
    label,
    inverse_temperature,
    m,
    s,
    logp,
    entropy,
    g,
    g_entropy,
    ENTROPY: tl.constexpr,
    LANES: tl.constexpr,
    PER_LANE: tl.constexpr,
    bias_ptr=None,
    logit_scale=1.0,
    logit_softcap=0.0,
    SOFTCAP: tl.constexpr = False,
    width=None,
    OVERLAP: tl.constexpr = False,
):
    """Write ``(g (onehot − p) + g_entropy (−p log p − p H)) / temperature``, each element once.

    ``m`` and ``s`` are the row's statistics, ``logp`` and ``entropy`` in nats. The gradient is that
    of the head's product where options of the head are given, see head_options. ``width`` as in
    row_statistics: so many elements are written. OVERLAP says that the gradient, of elements no
    wider than the logits', may start where the row does.
    """
    if width is None:
        width = V
    scale = inverse_temperature * LOG2E
    log2_s = tl.log2(s)
    columns = tile_columns(LANES, PER_LANE)
    at_label = g * one_minus_exp(logp)
    for start in range(0, V, LANES * PER_LANE):
        at = start + columns
        z, slope = load_logits(
            row_ptr, at, V, width, bias_ptr, logit_scale, logit_softcap, SOFTCAP, "evict_first"
        )
        if OVERLAP:  # what is written lies in this tile or before it: every warp must have read it
            tl.debug_barrier()
        grad = logit_gradient(
            z,
            at == label,
            at_label,
            m,
            log2_s,
            scale,
            entropy,
            g,
            g_entropy,
            ENTROPY,
        )
        grad = (grad * inverse_temperature * slope).to(grad_ptr.dtype.element_ty)
        tl.store(grad_ptr + at, grad, at < width)


@triton.jit
def write_zeros(grad_ptr, V, LANES: tl.constexpr, PER_LANE: tl.constexpr):
    columns = tile_columns(LANES, PER_LANE)
    zeros = tl.zeros([LANES, PER_LANE], grad_ptr.dtype.element_ty)
    for start in range(0, V, LANES * PER_LANE):
        tl.store(grad_ptr + start + columns, zeros, start + columns < V)
