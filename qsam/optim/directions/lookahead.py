"""Lookahead: the gradient is taken where the weights are going, a few updates ahead, so that no first pass is needed.

    e = -rho * lr * sqrt(n) * m / ||m||,    m the base optimizer's first moment, n the number of perturbed entries

``lr * sqrt(n)`` is the length of one full step of Adam, so rho is a number of such steps whatever the model's size, and
e shrinks with the learning rate's schedule. One pass per step; the first step is a plain one.

References:
    Becker, Altrock, Risse, Momentum-SAM, arXiv 2401.12033.

Differs from the paper: its length is rho itself, in units of the weights.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from qsam.optim.directions.base import Ascent, register_direction
from qsam.optim.directions.momentum import Momentum


@register_direction("lookahead")
class Lookahead(Momentum):
    """``d = -m``, in units of ``lr * sqrt(n)``. Costs neither a pass nor memory. ``rho=0.75`` is a good first guess."""

    follows_lr = True

    def __call__(self, ascents: Sequence[Ascent], step: int) -> tuple[list[Tensor], Tensor]:
        """Return the negative first moments, and their norm over sqrt(n).

        Raises:
            ValueError: the base optimizer keeps no first moment.
        """
        moments, norm = super().__call__(ascents, step)
        count = sum(m.numel() for m in moments)
        return [m.neg() for m in moments], norm / max(count, 1) ** 0.5
