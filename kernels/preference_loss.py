"""Device functions on one pair of sequences, or one sequence: losses and their derivatives.

``w`` and ``l`` are the sequences' perceived log-ratios (without a reference: their log-probs),
summed or (PER_TOKEN_KINDS) per token; the kinds on single sequences (kto, apo_zero_unpaired) look
at ``w`` alone. ``p`` and ``q`` are the kind's own parameters:

| kind | p | q |
|---|---|---|
| sigmoid, robust, exo_pair | label smoothing | |
| discopop | temperature of the blend | |
| simpo | target margin of the rewards | |
| slic | margin of the log-probs | weight of the likelihood of the chosen |
| kto, apo_zero_unpaired | weight of desirable sequences | of undesirable ones |

The torch definitions in ``humanline/objectives`` are the oracle; a test holds each against them.
"""

import triton
import triton.language as tl

PAIR_KINDS = (
    *("sigmoid", "robust", "hinge", "ipo", "exo_pair", "nca_pair", "bco_pair", "sppo_hard"),
    *("apo_zero", "apo_down", "discopop", "sigmoid_norm", "simpo", "slic"),
)
SINGLE_KINDS = ("kto", "apo_zero_unpaired")
PER_TOKEN_KINDS = ("ipo", "sigmoid_norm", "simpo")


@triton.jit
def log_sigmoid(x):
    e = tl.exp(-tl.abs(x))
    u = 1.0 + e
    log1p = tl.log(u) - ((u - 1.0) - e) / u  # what the addition rounded away, put back
    return tl.minimum(x, 0.0) - log1p


@triton.jit
def sigmoid_slope(x):
    """Derivative of the sigmoid; the product of both tails keeps digits at either end."""
    return tl.sigmoid(x) * tl.sigmoid(-x)


@triton.jit
def pair_loss(w, l, beta, p, q, KIND: tl.constexpr):
    """Loss of a pair, and its derivatives by ``w`` and ``l``."""
    x = beta * (w - l)
    if KIND == "sigmoid":
        loss = -(1.0 - p) * log_sigmoid(x) - p * log_sigmoid(-x)
        slope = -(1.0 - p) * tl.sigmoid(-x) + p * tl.sigmoid(x)
        return loss, beta * slope, -beta * slope
    elif KIND == "robust":
        loss = -(1.0 - p) * log_sigmoid(x) + p * log_sigmoid(-x)
        slope = -(1.0 - p) * tl.sigmoid(-x) - p * tl.sigmoid(x)
        scale = 1.0 / (1.0 - 2.0 * p)
        return loss * scale, beta * slope * scale, -beta * slope * scale
    elif KIND == "hinge":
        slope = tl.where(x < 1.0, -beta, 0.0)
        return tl.maximum(1.0 - x, 0.0, tl.PropagateNan.ALL), slope, -slope
    elif KIND == "ipo":
        off = w - l - 0.5 / beta
        return off * off, 2.0 * off, -2.0 * off
    elif KIND == "exo_pair":
        win = log_sigmoid(x) - tl.log(1.0 - p)
        lose = log_sigmoid(-x) - tl.log(p)
        s = tl.sigmoid(x)
        t = tl.sigmoid(-x)
        slope = beta * (s * t * (win - lose))  # the terms of d log_sigmoid cancel
        return s * win + t * lose, slope, -slope
    elif KIND == "nca_pair":
        a = beta * w
        b = beta * l
        loss = -log_sigmoid(a) - 0.5 * log_sigmoid(-a) - 0.5 * log_sigmoid(-b)
        by_w = -tl.sigmoid(-a) + 0.5 * tl.sigmoid(a)
        return loss, beta * by_w, beta * 0.5 * tl.sigmoid(b)
    elif KIND == "bco_pair":
        a = beta * w
        b = beta * l
        loss = -log_sigmoid(a) - log_sigmoid(-b)
        return loss, -beta * tl.sigmoid(-a), beta * tl.sigmoid(b)
    elif KIND == "sppo_hard":
        a = w - 0.5 / beta
        b = l + 0.5 / beta
        return a * a + b * b, 2.0 * a, 2.0 * b
    elif KIND == "apo_zero":
        a = beta * w
        b = beta * l
        loss = tl.sigmoid(-a) + tl.sigmoid(b)
        return loss, -beta * sigmoid_slope(a), beta * sigmoid_slope(b)
    elif KIND == "apo_down":
        a = beta * w
        slope = beta * sigmoid_slope(x)
        # 0 where l is, though a product and a sum may be rounded together.
        of_w = tl.where(a == x, 0.0, beta * sigmoid_slope(a) - slope)
        return tl.sigmoid(a) + tl.sigmoid(-x), of_w, slope
    elif KIND == "discopop":
        m = tl.sigmoid(x / p)
        e = tl.exp(log_sigmoid(x / p) - x)
        slope = -tl.sigmoid(-x) * (1.0 - m) + log_sigmoid(x) * sigmoid_slope(x / p) / p
        slope += e * (tl.sigmoid(-x / p) / p - 1.0)
        return e - log_sigmoid(x) * (1.0 - m), beta * slope, -beta * slope
    elif KIND == "simpo":
        return -log_sigmoid(x - p), -beta * tl.sigmoid(p - x), beta * tl.sigmoid(p - x)
    elif KIND == "slic":
        slope = tl.where(w - l < p, 1.0, 0.0)
        return tl.maximum(p - (w - l), 0.0, tl.PropagateNan.ALL) - q * w, -slope - q, slope
    else:
        tl.static_assert(KIND == "sigmoid_norm")
        return -log_sigmoid(x), -beta * tl.sigmoid(-x), beta * tl.sigmoid(-x)


@triton.jit
def single_loss(w, z0, desirable, beta, p, q, KIND: tl.constexpr):
    """Loss of a sequence, and its derivative by ``w``."""
    sign = tl.where(desirable, 1.0, -1.0)
    weight = tl.where(desirable, p, q)
    if KIND == "kto":
        margin = sign * beta * (w - z0)
    else:
        tl.static_assert(KIND == "apo_zero_unpaired")
        margin = sign * beta * w
    return weight * tl.sigmoid(-margin), -weight * sign * beta * sigmoid_slope(margin)
