"""Momentum: the base optimizer's averaged gradient, so that no first pass is needed.

    d = m_{t-1},   norm = ||m_{t-1}||;   one pass a step; the first step is a plain one

References:
    Becker, Altrock, Risse, Momentum-SAM, arXiv 2401.12033.

Differs from the paper: the momentum is that of the latents (masked gradients), whatever the base optimizer averages.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qsam.optim.directions.base import Ascent, Direction, global_norm, register_direction

KEYS = ("exp_avg", "momentum_buffer")
"""Where torch's optimizers (and most others) keep their first moment."""


@register_direction("momentum")
class Momentum(Direction):
    """``d`` is the base optimizer's first moment. Costs neither a pass nor memory."""

    passes = 1

    def __call__(self, ascents: Sequence[Ascent], step: int) -> tuple[list[Tensor], Tensor]:
        """Return the first moments.

        Raises:
            ValueError: the base optimizer keeps none.
        """
        moments = [_moment(ascent) for ascent in ascents]
        if all(m is None for m in moments):
            raise ValueError(
                f"direction 'momentum' needs a first moment ({' or '.join(KEYS)}), and the base "
                "optimizer keeps none: use "
                "Adam or SGD(momentum=...), or direction 'previous'."
            )
        directions = [torch.zeros_like(a.gradient) if m is None else m for a, m in zip(ascents, moments, strict=True)]
        return directions, global_norm(directions)


def _moment(ascent: Ascent) -> Tensor | None:
    found = [ascent.base_state[key] for key in KEYS if isinstance(ascent.base_state.get(key), Tensor)]
    return found[0] if found else None
