"""Device functions on one token: perception and the clipped surrogates, value and derivative.

The torch definitions in ``humanline/objectives`` are the oracle; a test holds each against them.
"""

import triton
import triton.language as tl

# Kinds of loss, as compile-time constants. Everything else is a run-time argument.
CLIPPED = tl.constexpr(0)
CISPO = tl.constexpr(1)
SAPO = tl.constexpr(2)
NLL = tl.constexpr(3)
KINDS = {"clipped": CLIPPED, "cispo": CISPO, "sapo": SAPO, "nll": NLL}

# Beyond the first an exponential of a log-ratio is held constant, below the second it is 0: see
# objectives/grpo.py.
MAX_EXPONENT = tl.constexpr(80.0)
MIN_LOG_RATIO = tl.constexpr(-1e4)

# Kinds of KL penalty.
NO_KL = tl.constexpr(0)
K1 = tl.constexpr(1)
K3 = tl.constexpr(2)
K3_TIMES_RATIO = tl.constexpr(3)
PENALTIES = {None: NO_KL, "k1": K1, "k3": K3, "k3·ratio": K3_TIMES_RATIO}


@triton.jit
def perceive(d, log_eps_P, log_eps_R):
    """Humanline clipping ``c(d)`` and ``dc/dd``; infinite bounds are the identity."""
    c = tl.minimum(tl.maximum(d, log_eps_P), log_eps_R)
    c = tl.where(d == d, c, d)  # minimum and maximum lose a NaN
    return c, tl.where((d >= log_eps_P) & (d <= log_eps_R), 1.0, 0.0)


@triton.jit
def clipped_surrogate(ratio, advantage, low, high, delta):
    """``−min(A·min(r, δ), A·clamp(r, 1−low, 1+high))`` and its derivative by ``r``."""
    clipped = tl.minimum(tl.maximum(ratio, 1.0 - low), 1.0 + high)
    first = tl.minimum(ratio, delta) * advantage
    second = clipped * advantage
    first_slope = tl.where(ratio <= delta, advantage, 0.0)
    second_slope = tl.where((ratio >= 1.0 - low) & (ratio <= 1.0 + high), advantage, 0.0)
    # Where the two are equal, torch gives each half of the gradient.
    slope = tl.where(first < second, first_slope, second_slope)
    slope = tl.where(first == second, 0.5 * (first_slope + second_slope), slope)
    return -tl.minimum(first, second), -slope


@triton.jit
def sapo_gate(ratio, advantage, temperature_pos, temperature_neg):
    """``−A·4σ(T(r−1))/T`` and its derivative by ``r``."""
    temperature = tl.where(advantage > 0, temperature_pos, temperature_neg)
    gate = tl.sigmoid(temperature * (ratio - 1.0))
    return -gate * 4.0 / temperature * advantage, -4.0 * gate * (1.0 - gate) * advantage


@triton.jit
def k3(d):
    """``e^{−d} + d − 1``, constant below −80, and its derivative."""
    e = tl.exp(tl.minimum(-d, MAX_EXPONENT))
    return e + tl.maximum(d, -MAX_EXPONENT) - 1.0, tl.where(d >= -MAX_EXPONENT, 1.0 - e, 0.0)


@triton.jit
def k3_times_ratio(d, c, slope):
    """``k3(d) · e^c`` and its derivative by the log-prob, by which ``d`` has slope 1."""
    d_slope = tl.where(d >= MIN_LOG_RATIO, 1.0, 0.0)
    c_slope = tl.where((c >= MIN_LOG_RATIO) & (c <= MAX_EXPONENT), slope, 0.0)
    d = tl.maximum(d, MIN_LOG_RATIO)
    c = tl.minimum(tl.maximum(c, MIN_LOG_RATIO), MAX_EXPONENT)
    apart = c - d
    e = tl.exp(tl.minimum(apart, MAX_EXPONENT))
    held = apart > MAX_EXPONENT
    e_slope = tl.where(held, 0.0, e * (c_slope - d_slope))
    d = tl.where(held, c - MAX_EXPONENT, d)
    d_slope = tl.where(held, c_slope, d_slope)
    ratio = tl.exp(c)
    return e + (d - 1.0) * ratio, e_slope + ratio * (d_slope + c_slope * (d - 1.0))


@triton.jit
def surrogate(
    logp, ratio, advantage, low, high, delta, temperature_pos, temperature_neg, KIND: tl.constexpr
):
    """What a token loses by its ratio, and the derivative by that; CISPO's is by the perceived
    log-prob instead."""
    if KIND == CISPO:
        weight = -tl.minimum(ratio, high) * advantage
        # The log-prob may be minus infinity.
        loss, slope = tl.where(weight == 0, 0.0, weight * logp), weight
    elif KIND == SAPO:
        loss, slope = sapo_gate(ratio, advantage, temperature_pos, temperature_neg)
    else:
        loss, slope = clipped_surrogate(ratio, advantage, low, high, delta)
    return loss, slope


@triton.jit
def policy_loss(
    logp,
    anchor,
    ref,
    advantage,
    log_eps_P,
    log_eps_R,
    low,
    high,
    delta,
    beta,
    temperature_pos,
    temperature_neg,
    KIND: tl.constexpr,
    PENALTY: tl.constexpr,
):
    """Loss of a token and its derivative by ``logp``, before the row's weight."""
    if KIND == NLL:
        loss, g = -logp, -1.0
    else:
        c, slope = perceive(logp - anchor, log_eps_P, log_eps_R)
        ratio = tl.exp(tl.minimum(c, MAX_EXPONENT))
        ratio_slope = tl.where(c <= MAX_EXPONENT, ratio * slope, 0.0)
        loss, g = surrogate(
            logp, ratio, advantage, low, high, delta, temperature_pos, temperature_neg, KIND
        )
        g *= slope if KIND == CISPO else ratio_slope
        if PENALTY != NO_KL:
            d = logp - ref
            if PENALTY == K1:
                loss += beta * d
                g += beta
            else:
                if PENALTY == K3_TIMES_RATIO:
                    kl, kl_slope = k3_times_ratio(d, c, slope)
                else:
                    kl, kl_slope = k3(d)
                loss += beta * kl
                g += beta * kl_slope
        # Minimum, maximum and comparisons lose a NaN: a policy that has diverged would not show.
        known = logp - anchor + advantage
        loss, g = tl.where(known == known, loss, known), tl.where(known == known, g, known)
    return loss, g
