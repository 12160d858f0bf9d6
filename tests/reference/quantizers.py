"""Every registered quantizer on one number: its value and its slopes, in Python's own arithmetic.

A twin maps x and (s, low, high, b), b what all levels are shifted by, to (Q(x), dQ/dx, and the slope of what is
learned: s, or the clipping level of `pact` and `liq`), the last without LSQ's gradient scale. u is the noise of the
entry, in (-.5, .5), and share how much of the annealing is done; those that draw no noise ignore both. The twin of
`gobo` maps a whole weight, for its levels are no grid.
"""

from __future__ import annotations

import math


def identity(x, grid, u, share):
    return x, 1.0, 0.0


def lsq(x, grid, u, share):
    return on_a_grid(x, grid, round)  # Python rounds ties to even


def fixed_step(x, grid, u, share):
    return *lsq(x, grid, u, share)[:2], 0.0


def stochastic(x, grid, u, share):
    def up_or_down(v):
        goes_up = v - math.floor(v) > 0.5 - u
        return math.floor(v) + goes_up

    return on_a_grid(x, grid, up_or_down)


def diffq(x, grid, u, share):
    def noisy(v):
        return v + (1 - share) * u + share * (round(v) - v)

    return on_a_grid(x, grid, noisy)


def stretched(x, grid, u, share):
    s, low, high, _ = grid
    v, half = x / s, high + 1
    level = min(max(round(v - 0.5), low), high) + 0.5
    if abs(v) >= half:
        return level * s, 0.0, level
    return level * s, 1.0, level - v


def lsq_plus(x, grid, u, share):
    s, low, high, b = grid
    value, dx, ds = on_a_grid(x - b, (s, low, high, 0.0), round)
    return value + b, dx, ds


def range_of_the_data(x, grid, u, share):
    """`minmax_ema` and `qbert`: the gradient passes everywhere, and nothing is learned."""
    s, low, high, b = grid
    return min(max(round((x - b) / s), low), high) * s + b, 1.0, 0.0


def per_token(x, grid, u, share):
    s, low, high, _ = grid
    inside = low - 0.5 < x / s < high + 0.5
    return min(max(round(x / s), low), high) * s, float(inside), 0.0


def pact(x, grid, u, share):
    value, dx, _ = on_a_grid(x, grid, round)
    s, low, high, _ = grid
    return value, dx, float(x / s >= high) - float(low < 0 and x / s <= low)


def liq(x, grid, u, share):
    """In the words of SAQ's code: to [-1, 1] or [0, 1], to whole numbers up to n, and back."""
    s, low, high, _ = grid
    n = high - low
    clip = s * n / (2 if low < 0 else 1)
    part = x / clip
    if low < 0:
        value = (2 * round(n * (min(max(part, -1.0), 1.0) + 1) / 2) / n - 1) * clip
    else:
        value = round(n * min(max(part, 0.0), 1.0)) / n * clip
    if part >= 1:
        return value, 0.0, 1.0
    if part <= (-1 if low < 0 else 0):
        return value, 0.0, -1.0 if low < 0 else 0.0
    return value, 1.0, (value - x) / clip


def gobo(weights, bits):
    """Return Q of every weight: the paper's algorithm, one weight at a time."""
    mean = math.fsum(weights) / len(weights)
    std = math.sqrt(math.fsum((w - mean) ** 2 for w in weights) / len(weights))

    def is_outlier(w):
        density = math.exp(-((w - mean) ** 2) / (2 * std**2)) / (std * math.sqrt(2 * math.pi))
        return (density == 0 or math.log(density) <= -4) and abs(w - mean) >= 3 * std

    inliers = sorted(w for w in weights if not is_outlier(w))
    count = 2**bits
    bins = [inliers[i * len(inliers) // count : (i + 1) * len(inliers) // count] for i in range(count)]
    best, least = None, math.inf
    while True:
        centroids = [math.fsum(some) / len(some) for some in bins]
        error = math.fsum(abs(w - c) for some, c in zip(bins, centroids, strict=True) for w in some)
        if error >= least:
            return [w if is_outlier(w) else min(best, key=lambda c: abs(w - c)) for w in weights]
        best, least = centroids, error
        bins = [[] for _ in centroids]
        for w in inliers:
            bins[min(range(count), key=lambda i: abs(w - centroids[i]))].append(w)


def on_a_grid(x, grid, code):
    s, low, high, _ = grid
    v = x / s
    if v <= low:
        return low * s, 0.0, low
    if v >= high:
        return high * s, 0.0, high
    return code(v) * s, 1.0, code(v) - v


TWINS = {
    "identity": identity,
    "lsq": lsq,
    "per_channel": lsq,
    "lsq_statistics": fixed_step,
    "fixed_step": fixed_step,
    "diffq": diffq,
    "stochastic": stochastic,
    "stretched": stretched,
    "lsq_plus": lsq_plus,
    "minmax_ema": range_of_the_data,
    "qbert": range_of_the_data,
    "per_token": per_token,
    "pact": pact,
    "liq": liq,
    "gobo": gobo,
}
"""By the registered name."""

ENTRY_BY_ENTRY = sorted(TWINS.keys() - {"gobo"})
