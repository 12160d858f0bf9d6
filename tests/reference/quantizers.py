"""Every registered quantizer on one number: its value and its slopes, in Python's own arithmetic.

A twin maps x and (s, low, high) to (Q(x), dQ/dx, dQ/ds), the last without LSQ's gradient scale. u is the noise of the
entry, in (-.5, .5), and share how much of the annealing is done; those that draw no noise ignore both.
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


def on_a_grid(x, grid, code):
    s, low, high = grid
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
    "fixed_step": fixed_step,
    "diffq": diffq,
    "stochastic": stochastic,
}
"""By the registered name."""
