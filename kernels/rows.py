"""Device functions on one row of logits: its log-sum-exp, and its gradient.

A row is walked in tiles ``[LANES, PER_LANE]``, ``PER_LANE`` adjacent elements to a thread: what it
loads at a time. Several tiles are loaded before the first of them is used, so that a thread has as
many loads in flight; it keeps a running maximum and sum of its own, and the threads meet once, at
the end of the row. Arithmetic is float32 throughout, exponentials are to base 2:

    y = z · scale − c,  scale = log2(e) / temperature,  c = max z · scale

is one multiply-add a logit. Rounding c loses digits of a logit of 1e4, the same ones for all of a
row, and of the maximum itself exactly the remainder ``r = max z · scale − c``: with it the sums are
those of ``2^((z − max z) · scale)``, whose largest term is 1 to the last bit.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# Below every maximum: finite, so that no difference of two maxima is NaN.
LOWEST = tl.constexpr(-1e30)
IGNORE_INDEX = tl.constexpr(-100)


@triton.jit
def row_offset(row, rows_per_batch, batch_stride_rows, row_stride):
    """Element offset of a row of ``[B, T, V]``, see RowTensor in launch.py."""
    row = row.to(tl.int64)
    batch = row // rows_per_batch
    return (batch * batch_stride_rows + (row - batch * rows_per_batch)) * row_stride


@triton.jit
def row_value(ptr, row, PRESENT: tl.constexpr, otherwise):
    """A row's value, or those of some rows; ``otherwise`` where there is no such tensor."""
    if PRESENT:
        value = tl.load(ptr + row).to(tl.float32)
    else:
        value = otherwise
    return value


@triton.jit
def inverse_temperature(temperature_ptr, row, PER_ROW: tl.constexpr):
    return 1.0 / tl.load(temperature_ptr + (row if PER_ROW else 0)).to(tl.float32)


@triton.jit
def tile_columns(LANES: tl.constexpr, PER_LANE: tl.constexpr):
    return tl.arange(0, LANES)[:, None] * PER_LANE + tl.arange(0, PER_LANE)[None, :]


@triton.jit
def like(x, tile):
    """A scalar as a tile; Triton's fma takes nothing else."""
    return tl.full(tile.shape, x, tl.float32)


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


@triton.constexpr_function
def tiles_in_flight(lane_bits):
    """Tiles to load before the first is used: four, where a thread loads 16 bytes at a time.

    Elsewhere it loads an element at a time, of which one tile is as many as there are registers.
    """
    return 4 if lane_bits >= 128 else 1


@triton.jit
def load_tiles(
    row_ptr,
    start,
    columns,
    width,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
    INSIDE: tl.constexpr,
    EVICTION: tl.constexpr,
):
    """So many tiles of a row from ``start`` on; −inf beyond ``width``, if they are not all INSIDE
    of it."""
    tiles = ()
    for i in tl.static_range(TILES):
        at = start + i * TILE + columns
        if INSIDE:
            z = tl.load(row_ptr + at, eviction_policy=EVICTION)
        else:
            z = tl.load(row_ptr + at, at < width, other=float("-inf"), eviction_policy=EVICTION)
        tiles = tiles + (z,)  # noqa: RUF005 (Triton knows no starred tuple)
    return tiles


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
def add_tiles(m, c, s, t, tiles, scale, ENTROPY: tl.constexpr):
    """Each thread's ``m = max z, c = m · scale, s = Σ 2^y, t = Σ 2^y y`` with some tiles added.

    ``c`` is carried along: recomputed, it might be fused into the difference of two of them.
    """
    for i in tl.static_range(len(tiles)):
        m = tl.maximum(m, tl.max(tiles[i].to(tl.float32), 1))
    top = tl.maximum(c, m * scale)
    shift = c - top
    shrink = tl.exp2(shift)
    if ENTROPY:
        t = (t + s * shift) * shrink
    s *= shrink
    for i in tl.static_range(len(tiles)):
        z = tiles[i].to(tl.float32)
        y = tl.fma(z, like(scale, z), tl.broadcast_to(-top[:, None], z.shape))
        e = tl.exp2(y)
        s += tl.sum(e, 1)
        if ENTROPY:
            t += tl.sum(tl.where(e > 0, e * y, 0.0), 1)
    return m, top, s, t


@triton.jit
def rounded_maximum(m, scale):
    """``c``, the product ``m · scale`` as rounded, and what it lacks."""
    c = m * scale
    return c, tl.fma(m, scale, -c)


@triton.jit
def row_statistics(
    row_ptr,
    V,
    scale,
    EVICTION: tl.constexpr,
    ENTROPY: tl.constexpr,
    LANES: tl.constexpr,
    PER_LANE: tl.constexpr,
    bias_ptr=None,
    logit_scale=1.0,
    logit_softcap=0.0,
    SOFTCAP: tl.constexpr = False,
    width=None,
):
    """Maximum ``m`` of the row ``z``, ``s = Σ 2^y`` with ``y = (z − m) · scale``, and with ENTROPY
    ``t = Σ 2^y y``.

    ``width`` elements of the row may be read, if that is more than V: a multiple of 16 lets a row
    of any length be loaded 16 bytes at a time. EVICTION "evict_last" is for a row that is read
    again soon.
    """
    BITS: tl.constexpr = PER_LANE * row_ptr.dtype.element_ty.primitive_bitwidth
    TILES: tl.constexpr = tiles_in_flight(BITS)
    TILE: tl.constexpr = LANES * PER_LANE
    OPTIONS: tl.constexpr = SOFTCAP or bias_ptr is not None
    columns = tile_columns(LANES, PER_LANE)
    m = tl.full([LANES], LOWEST, tl.float32)
    c = tl.full([LANES], LOWEST, tl.float32)
    s = tl.zeros([LANES], tl.float32)
    t = tl.zeros([LANES], tl.float32)
    if not OPTIONS:  # a scale alone is that of the temperature
        scale *= logit_scale
    if width is None:
        width = V
    whole = V // (TILE * TILES) * (TILE * TILES)
    if not OPTIONS:
        for start in range(0, whole, TILE * TILES):
            tiles = load_tiles(row_ptr, start, columns, width, TILES, TILE, True, EVICTION)
            m, c, s, t = add_tiles(m, c, s, t, tiles, scale, ENTROPY)
    else:
        whole = 0
    for start in range(whole, V, TILE):
        at = start + columns
        tiles = load_tiles(row_ptr, start, columns, width, 1, TILE, False, EVICTION)
        z = tiles[0].to(tl.float32)
        if OPTIONS:
            z, _ = head_options(z, at, at < V, bias_ptr, logit_scale, logit_softcap, SOFTCAP)
        z = tl.where(at < V, z, float("-inf"))
        m, c, s, t = add_tiles(m, c, s, t, (z,), scale, ENTROPY)
    top = tl.max(c, 0)
    shift = c - top
    shrink = tl.exp2(shift)
    m = tl.max(m, 0)
    remainder = tl.fma(m, scale, -top)  # see rounded_maximum
    largest = tl.exp2(remainder)
    total = tl.sum(s * shrink, 0)
    t_all = 0.0
    if ENTROPY:
        t_all = (tl.sum((t + s * shift) * shrink, 0) - total * remainder) / largest
    return m, tl.div_rn(total, largest), t_all


@triton.jit
def label_logit(row_ptr, label, V):
    """The label's element of a row; NaN of a label that is none, which reads nothing."""
    inside = (label >= 0) & (label < V)
    return tl.load(row_ptr + label, inside, other=float("nan")).to(tl.float32)


@triton.jit
def label_logp(
    row_ptr,
    label,
    inverse_temperature,
    m,
    s,
    V,
    bias_ptr=None,
    logit_scale=1.0,
    logit_softcap=0.0,
    SOFTCAP: tl.constexpr = False,
):
    """Log-prob in nats of the label, from the row's statistics."""
    z = label_logit(row_ptr, label, V)
    if SOFTCAP or bias_ptr is not None:
        inside = (label >= 0) & (label < V)
        z, _ = head_options(z, label, inside, bias_ptr, logit_scale, logit_softcap, SOFTCAP)
    else:
        inverse_temperature *= logit_scale
    return (z - m) * inverse_temperature - tl.log(s)


@triton.jit
def scaled_logits(
    z,
    columns,
    inside,
    inverse_temperature,
    bias_ptr,
    logit_scale,
    logit_softcap,
    SOFTCAP: tl.constexpr,
):
    """From a head's product ``z``: logits, what they are to be multiplied by, their slope.

    The same numbers as in row_statistics, but where a compiler fuses the last product into what is
    subtracted from it: half a unit in the last place of a logit.
    """
    scale = inverse_temperature * LOG2E
    slope = logit_scale
    if SOFTCAP or bias_ptr is not None:
        z, slope = head_options(z, columns, inside, bias_ptr, logit_scale, logit_softcap, SOFTCAP)
    else:
        scale *= logit_scale
    return z, scale, slope


@triton.jit
def row_entropy(nats, s, t):
    """Entropy in nats, from the row's statistics; ``t`` is in units of so many nats."""
    return tl.log(s) - t / s * nats


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
def write_tiles(
    grad_ptr,
    row_ptr,
    start,
    columns,
    V,
    width,
    inverse_temperature,
    c,
    by_exp,
    by_exp_y,
    bias_ptr,
    logit_scale,
    logit_softcap,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
    INSIDE: tl.constexpr,
    OVERLAP: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
):
    """``2^y (by_exp + by_exp_y · y)`` of so many tiles of a row, times the head's slope."""
    tiles = load_tiles(row_ptr, start, columns, width, TILES, TILE, INSIDE, "evict_first")
    if OVERLAP:  # what is written lies in these tiles or before them: every warp must have read it
        tl.debug_barrier()
    for i in tl.static_range(TILES):
        at = start + i * TILE + columns
        z, scale, slope = scaled_logits(
            tiles[i].to(tl.float32),
            at,
            at < V,
            inverse_temperature,
            bias_ptr,
            logit_scale,
            logit_softcap,
            SOFTCAP,
        )
        y = tl.fma(z, like(scale, z), like(-c, z))
        e = tl.exp2(y)
        factor = by_exp
        if ENTROPY:
            factor = tl.where(e > 0, tl.fma(y, like(by_exp_y, y), like(by_exp, y)), 0.0)
        if SOFTCAP:
            factor *= slope
        grad = (e * factor).to(grad_ptr.dtype.element_ty)
        # The first to leave the caches, or rows would that are read again: 2.5 to 4 % on an H100.
        if INSIDE:
            tl.store(grad_ptr + at, grad, eviction_policy="evict_first")
        else:
            tl.store(grad_ptr + at, grad, at < width, eviction_policy="evict_first")


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
    """Write ``(g (onehot − p) + g_entropy (−p log p − p H)) / temperature``.

    ``m`` and ``s`` are the row's statistics, ``logp`` and ``entropy`` in nats. The gradient is that
    of the head's product where options of the head are given, see head_options. ``width`` as in
    row_statistics: so many elements are written. The gradient may be written over its row. OVERLAP
    says that its elements may be narrower than the row's: such a row is walked forwards. Any other
    is walked from its end, which is the youngest in the caches of a row that was just read.
    """
    BITS: tl.constexpr = PER_LANE * row_ptr.dtype.element_ty.primitive_bitwidth
    TILES: tl.constexpr = tiles_in_flight(BITS)
    TILE: tl.constexpr = LANES * PER_LANE
    OPTIONS: tl.constexpr = SOFTCAP or bias_ptr is not None
    if width is None:
        width = V
    columns = tile_columns(LANES, PER_LANE)
    is_label = (label >= 0) & (label < V)
    _, scale, slope = scaled_logits(
        label_logit(row_ptr, label, V),
        label,
        is_label,
        inverse_temperature,
        bias_ptr,
        logit_scale,
        logit_softcap,
        SOFTCAP,
    )
    c, remainder = rounded_maximum(m, scale)
    # 1 − p from the log-prob: the difference would cancel where p is 1.
    at_label = g * one_minus_exp(logp)
    by_exp = -g
    by_exp_y = 0.0
    if ENTROPY:
        at_label -= g_entropy * tl.exp(logp) * (logp + entropy)
        by_exp -= g_entropy * (entropy - tl.log(s) - remainder * LN2)
        by_exp_y = -g_entropy * LN2
    at_label *= inverse_temperature * slope
    factor = inverse_temperature / (s * tl.exp2(remainder))
    if not SOFTCAP:
        factor *= logit_scale
    by_exp *= factor
    by_exp_y *= factor
    tl.debug_barrier()  # every warp has the label's logit, which the first tiles may overwrite
    whole = 0
    if not OPTIONS:
        whole = V // (TILE * TILES) * (TILE * TILES)
    for step in range(0, whole, TILE * TILES):
        start = step if OVERLAP else whole - TILE * TILES - step
        write_tiles(
            grad_ptr,
            row_ptr,
            start,
            columns,
            V,
            width,
            inverse_temperature,
            c,
            by_exp,
            by_exp_y,
            bias_ptr,
            logit_scale,
            logit_softcap,
            TILES,
            TILE,
            True,
            OVERLAP,
            SOFTCAP,
            ENTROPY,
        )
    for start in range(whole, V, TILE):
        write_tiles(
            grad_ptr,
            row_ptr,
            start,
            columns,
            V,
            width,
            inverse_temperature,
            c,
            by_exp,
            by_exp_y,
            bias_ptr,
            logit_scale,
            logit_softcap,
            1,
            TILE,
            False,
            OVERLAP,
            SOFTCAP,
            ENTROPY,
        )
    tl.debug_barrier()  # the label's element is written twice, by two threads
    tl.store(grad_ptr + label, at_label.to(grad_ptr.dtype.element_ty), is_label)


@triton.jit
def write_zeros(grad_ptr, V, LANES: tl.constexpr, PER_LANE: tl.constexpr):
    columns = tile_columns(LANES, PER_LANE)
    zeros = tl.zeros([LANES, PER_LANE], grad_ptr.dtype.element_ty)
    for start in range(0, V, LANES * PER_LANE):
        tl.store(grad_ptr + start + columns, zeros, start + columns < V)
