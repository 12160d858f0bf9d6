"""SAM: the gradient itself, ``d = g``.

References:
    Foret et al., Sharpness-Aware Minimization, ICLR 2021, Eq 2.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from qsam.optim.directions.base import Ascent, Direction, register_direction


@register_direction("sam")
class Sam(Direction):
    """``d = g``."""

    def __call__(self, ascents: Sequence[Ascent]) -> list[Tensor]:
        """Return the gradients."""
        return [ascent.gradient for ascent in ascents]
