"""Grid: steepest ascent in units of the step size, so that rho means the same at every scale and bit width.

    d = T^2 g,   norm = ||T g||,   T = s                hence ||e / s|| = rho

With ``rho = sqrt(number of weights) / 2`` an evenly spread e moves each weight by half a step.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from qsam.optim.directions.base import Ascent, Direction, global_norm, register_direction


@register_direction("grid")
class Grid(Direction):
    """``d = s^2 g``; ours, derived from ASAM."""

    def __call__(self, ascents: Sequence[Ascent], step: int) -> tuple[list[Tensor], Tensor]:
        """Return ``s^2 g`` and ``||s g||``.

        Raises:
            ValueError: a perturbed parameter has no step size.
        """
        units = [_unit(ascent) for ascent in ascents]
        scaled = [a.gradient.mul_(t) for a, t in zip(ascents, units, strict=True)]
        norm = global_norm(scaled)
        return [d.mul_(t) for d, t in zip(scaled, units, strict=True)], norm


def _unit(ascent: Ascent) -> Tensor:
    step_size = None if ascent.slot is None else ascent.slot.step_size()
    if step_size is None:
        raise ValueError(
            f"direction 'grid' needs a step size, and {ascent.name!r} has none: perturb the uniformly "
            "quantized weights "
            "only (perturb='quantized'), or use direction 'asam'."
        )
    return step_size.to(ascent.gradient.dtype)
