"""Stretched: a uniform grid with as many levels above zero as below, and none at zero; its step size is learned.

    Q(x; s) = s * (k + 1/2),   k = round(clip(x / s - 1/2, Qn, Qp)),   ds scaled by 1 / sqrt(N * (Qp + 1/2))

At 2 bits the levels are -3/2, -1/2, 1/2 and 3/2 times s, where LSQ's are -2, -1, 0 and 1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qsam.quantizers.affine import Affine
from qsam.quantizers.base import register_quantizer
from qsam.scales import initial_scale


@register_quantizer("stretched")
class Stretched(Affine):
    """A uniform grid without a level at zero, with a learned step size, for signed data.

    With ``v = x / s`` and ``h = 2^(bits-1)``::

        dQ/dx = 1[|v| < h]
        dQ/ds = k + 1/2 - v  where |v| < h,   -(h - 1/2) where v <= -h,   h - 1/2 where v >= h

    The codes k are ``bits``-bit integers in [-h, h - 1], which pack as LSQ's do; ``(codes + 1/2) * scale`` is Q(x).

    Args:
        setting: As :class:`~qsam.quantizers.base.Quantizer`. ``signed`` must be True, because the grid has no zero, and
            unsigned data (the output of a ReLU) have many.

    Raises:
        ValueError: ``signed`` is not True, or another argument is out of its range.

    Example:
        >>> q = Stretched(bits=2)
        >>> q.init = "absmax"
        >>> q.observe_(torch.tensor([-1.5, -0.5, 0.5, 1.5]))
        >>> x = torch.tensor([-9.0, -0.6, 0.0, 0.1, 1.2])
        >>> q(x).tolist(), q.codes(x).tolist()
        ([-1.5, -0.5, 0.5, 0.5, 1.5], [-2, -1, 0, 0, 1])

    References:
        Liu et al., ParetoQ, arXiv 2502.02631 (its stretched elastic quantization); Liu et al., Oscillation-free
        Quantization, arXiv 2302.02210.

    Differs from the papers: the gradient of s is LSQ's rule on this grid, and the initial scale is the one of least
    squared error.
    """

    offset = 0.5

    def __init__(self, **setting: Any) -> None:
        super().__init__(**setting)
        if setting.get("signed", True) is not True:
            raise ValueError(
                f"the quantizer 'stretched' has no level at zero and is for signed weights, got "
                f"signed={setting['signed']}. Use 'lsq' for inputs."
            )
        self.scale = nn.Parameter(torch.ones(1, dtype=torch.float32))

    @property
    def _has_grid(self) -> bool:
        return type(self).forward is Affine.forward

    @property
    def stops(self) -> tuple[float, float]:
        """The outer ends of the outermost cells, half a step beyond their levels."""
        return self.quant_min, self.quant_max + 1

    @torch.no_grad()
    def init_(self, x: Tensor) -> None:
        """Set ``scale`` from the data, by the rule in ``self.init``, with the outermost levels as limits."""
        lowest, highest = self.quant_min + self.offset, self.quant_max + self.offset
        self._put("scale", self._shaped(initial_scale(self._rows(x), lowest, highest, self.init), x))
