"""Friendly SAM: the part of the gradient that the batch adds to the long-run gradient.

    d = g - sigma * m,   then m <- lambda * m + (1 - lambda) * g;   norm = ||d||

References:
    Li et al., Friendly Sharpness-Aware Minimization, CVPR 2024, Algorithm 1.

Differs from the paper: sigma = 1 and lambda = .9 are fixed here; the paper's values could not be read.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from qsam.optim.directions.base import Ascent, Direction, global_norm, register_direction

SIGMA = 1.0
LAMBDA = 0.9


@register_direction("friendly")
class Friendly(Direction):
    """``d = g - m``, m an average of past gradients that is moved after its use. Keeps one copy of the weights."""

    averages = True

    def __call__(self, ascents: Sequence[Ascent], step: int) -> tuple[list[Tensor], Tensor]:
        """Return ``g - sigma * m``; move m."""
        directions = [self._one(ascent) for ascent in ascents]
        return directions, global_norm(directions)

    def _one(self, ascent: Ascent) -> Tensor:
        g = ascent.gradient
        m = self.memory.get(ascent.name)
        if m is None:
            self.memory[ascent.name] = (1 - LAMBDA) * g
            return g
        d = g - SIGMA * m
        # A gradient that is not finite is skipped by the perturbation; it must not stay in the average.
        m.lerp_(g.nan_to_num(0.0, 0.0, 0.0), 1 - LAMBDA)
        return d
