"""SAM: the gradient itself.

    d = g,   norm = ||g||

References:
    Foret et al., Sharpness-Aware Minimization, ICLR 2021, Eq 2.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from qsam.optim.directions.base import Ascent, Direction, global_norm, register_direction


@register_direction("sam")
class Sam(Direction):
    """``d = g``: the steepest ascent within an L2 ball."""

    def __call__(self, ascents: Sequence[Ascent], step: int) -> tuple[list[Tensor], Tensor]:
        """Return the gradients."""
        gradients = [ascent.gradient for ascent in ascents]
        return gradients, global_norm(gradients)
