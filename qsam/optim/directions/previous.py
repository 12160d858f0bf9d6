"""Previous: the gradient of the last step, so that no first pass is needed.

d = h_{t-1},   norm = ||h_{t-1}||;   one pass a step; the first step is a plain one
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from qsam.optim.directions.base import Ascent, Direction, global_norm, register_direction


@register_direction("previous")
class Previous(Direction):
    """``d = h_{t-1}``: the gradient that updated the weights last. Keeps one copy of the weights."""

    passes = 1

    def __call__(self, ascents: Sequence[Ascent], step: int) -> tuple[list[Tensor], Tensor]:
        """Return the last step's gradients."""
        directions = [ascent.gradient for ascent in ascents]
        return directions, global_norm(directions)

    def ready(self, step: int) -> bool:
        """Whether a step has been taken."""
        return bool(self.memory)

    def learn(self, ascents: Sequence[Ascent]) -> None:
        """Keep the gradients: copies, for they are pulled back in place."""
        self.memory = {ascent.name: ascent.gradient.clone() for ascent in ascents}
