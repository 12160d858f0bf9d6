"""ASAM: steepest ascent in units of each weight, so that a rescaling of layers changes nothing.

    d = T^2 g,   norm = ||T g||,   T = |w| + eta        hence ||e / T|| = rho

References:
    Kwon et al., ASAM: Adaptive Sharpness-Aware Minimization, ICML 2021, Algorithm 1.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from qsam.optim.directions.base import Ascent, Direction, global_norm, register_direction

ETA = 0.01
"""The paper's eta: keeps weights at 0 from being left out."""


@register_direction("asam")
class Asam(Direction):
    """``d = T^2 g`` with ``T = |w| + 0.01``; w is the latent, or the float weight."""

    def __call__(self, ascents: Sequence[Ascent], step: int) -> tuple[list[Tensor], Tensor]:
        """Return ``T^2 g`` and ``||T g||``."""
        units = [_unit(ascent) for ascent in ascents]
        scaled = [a.gradient.mul_(t) for a, t in zip(ascents, units, strict=True)]
        norm = global_norm(scaled)
        return [d.mul_(t) for d, t in zip(scaled, units, strict=True)], norm


def _unit(ascent: Ascent) -> Tensor:
    weight = ascent.parameter if ascent.slot is None else ascent.slot.latent
    return weight.detach().abs().add_(ETA).to(ascent.gradient.dtype)
