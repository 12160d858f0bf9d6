"""Fixed step: LSQ's grid with the step size frozen at its initial value.

Q(x; s) = s * round(clip(x / s, Qn, Qp)),   dQ/dx = 1[Qn < x/s < Qp],   s constant
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qsam.quantizers.base import register_quantizer
from qsam.quantizers.lsq import LSQ


@register_quantizer("fixed_step")
class FixedStep(LSQ):
    """LSQ's grid with a constant scale, a buffer. Arguments as :class:`~qsam.quantizers.base.Quantizer`.

    Example:
        >>> q = FixedStep(bits=4)
        >>> q.observe_(torch.linspace(-8, 7, 16)), list(q.parameters()), q.scale
        (None, [], tensor([1.]))
    """

    def __init__(self, **setting: Any) -> None:
        super().__init__(**setting)
        del self.scale
        self.register_buffer("scale", torch.zeros(1, dtype=torch.float32))

    def _hold(self, scale: Tensor) -> Tensor:
        return scale
