"""Random: a Gaussian direction of the same norm, the control that shows what the adversary adds.

d ~ N(0, 1),   norm = ||d||
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qsam.optim.directions.base import Ascent, Direction, global_norm, register_direction
from qsam.shards import own_part


@register_direction("random")
class Random(Direction):
    """``d ~ N(0, 1)``, drawn from the step's number: a resumed run draws the same, and no global generator moves."""

    def __call__(self, ascents: Sequence[Ascent], step: int) -> tuple[list[Tensor], Tensor]:
        """Return Gaussian tensors."""
        generator = torch.Generator().manual_seed(step)
        directions = [
            own_part(
                torch.randn(a.gradient.shape, generator=generator).to(a.gradient.device, a.gradient.dtype), a.gradient
            )
            for a in ascents
        ]
        return directions, global_norm(directions)
