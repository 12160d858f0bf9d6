"""PACT: the range of an input is clipped at a learned level, and divided evenly.

    Q(x; a) = s * round(clip(x, 0, a) / s),   s = a / (2^bits - 1)
    dQ/dx = 1[0 < x < a],   dQ/da = 1[x >= a]

References:
    Choi et al., PACT: Parameterized Clipping Activation, arXiv 1805.06085, Eq 1 to 3.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qsam.quantizers.affine import Affine
from qsam.quantizers.base import register_quantizer
from qsam.scales import initial_scale


class Clipped(Affine):
    """A grid whose outermost level is learned instead of its step: ``scale = clip / highest level``. Not registered.

    The Parameter ``clip``, a, is fp32, of the shape that LSQ's scale would have; its gradient has no factor.
    """

    normalizes = False

    def __init__(self, **setting: Any) -> None:
        super().__init__(**setting)
        self.clip = nn.Parameter(torch.ones(1, dtype=torch.float32))

    @property
    def scale(self) -> Tensor:  # type: ignore[override]
        """s, computed from the clip."""
        return self.clip / (self.quant_max + self.offset)

    @torch.no_grad()
    def init_(self, x: Tensor) -> None:
        """Set ``clip`` to the outermost level of the grid that the rule in ``self.init`` gives."""
        lowest, highest = self.quant_min + self.offset, self.quant_max + self.offset
        clip = initial_scale(self._rows(x), lowest, highest, self.init).double() * highest
        largest = torch.finfo(torch.float32).max
        self._put("clip", self._shaped(clip.clamp(highest * torch.finfo(torch.float32).tiny, largest), x))


@register_quantizer("pact")
class PACT(Clipped):
    """Inputs with a learned clipping level a; entries that are not clipped do not contribute to its gradient.

    Signed data have the levels -a to a, as many below zero as above.

    Args:
        setting: As :class:`~qsam.quantizers.base.Quantizer`. ``axis`` must be None, because it is for inputs.

    Raises:
        ValueError: ``axis`` is not None, or an argument is out of its range.

    Example:
        >>> q = PACT(bits=2, signed=False)
        >>> q.init = "absmax"
        >>> q.observe_(torch.tensor([0.0, 3.0]))
        >>> x = torch.tensor([-1.0, 0.4, 1.6, 7.0]).requires_grad_()
        >>> q(x).sum().backward()
        >>> q(x).tolist(), x.grad.tolist(), q.clip.grad.tolist()
        ([0.0, 0.0, 2.0, 3.0], [0.0, 1.0, 1.0, 0.0], [1.0])

    Differs from the paper: the first level is set from data (the paper starts from a constant); signed inputs are
    accepted too; weights need another quantizer (the paper uses DoReFa's).
    """

    slope_inside = False

    def __init__(self, **setting: Any) -> None:
        if setting.get("axis") is not None:
            raise ValueError("the quantizer 'pact' is for inputs, whose range it clips: use 'lsq' for weights.")
        super().__init__(**setting)

    @property
    def quant_min(self) -> int:
        """-Qp, or 0 for unsigned data."""
        return 0 if self.signed is False else -self.quant_max
