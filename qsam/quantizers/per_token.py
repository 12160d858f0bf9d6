"""Per token: each token of an input has its own scale, computed in every forward.

Q(x) = s * round(clip(x / s, Qn, Qp)),   s = max|x| / Qp over the last dimension,   dQ/dx = 1[Qn <= x/s <= Qp]
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qsam.functional import SCALE_FLOOR, wide_dtype
from qsam.quantizers.affine import Rule, _Affine, codes_at, distance
from qsam.quantizers.base import Quantizer, register_quantizer


@register_quantizer("per_token")
class PerToken(Quantizer):
    """Dynamic absmax scales for inputs, one per token, that is, per vector along the last dimension.

    The sign, which the first batch decides as for any input, is its only state. A signed grid is symmetric, -Qp to Qp.

    Args:
        setting: As :class:`~qsam.quantizers.base.Quantizer`. ``axis`` must be None, because it is for inputs.

    Raises:
        ValueError: ``axis`` is not None, or an argument is out of its range.

    Example:
        >>> q = PerToken(bits=4)
        >>> x = torch.tensor([[7.0, -3.2], [0.7, 0.11]])
        >>> q.observe_(x)
        >>> q(x)
        tensor([[ 7.0000, -3.0000],
                [ 0.7000,  0.1000]])

    References:
        The dynamic activation scales of torchao and of NVIDIA's ModelOpt.
    """

    dynamic = True

    def __init__(self, **setting: Any) -> None:
        if setting.get("axis") is not None:
            raise ValueError("the quantizer 'per_token' is for inputs: use 'lsq' or 'minmax_ema' for weights.")
        super().__init__(**setting)

    def init_(self, x: Tensor) -> None:
        """Do nothing: there are no parameters."""

    @property
    def quant_min(self) -> int:
        """-Qp, or 0 for unsigned data."""
        return 0 if self.signed is False else -self.quant_max

    @property
    def stops(self) -> tuple[float, float]:
        """Half a step beyond the outermost levels, so that the entry that sets the scale keeps its gradient."""
        return self.quant_min - 0.5, self.quant_max + 0.5

    def _rule(self) -> Rule:
        return Rule(self.quant_min, self.quant_max, 0.0, *self.stops)

    @torch.no_grad()
    def step_size(self, x: Tensor) -> Tensor:
        """Return the scale of each token: of the shape of ``x``, but 1 along the last dimension."""
        wide = x.detach().to(wide_dtype(x.dtype))
        if not wide.numel():
            return wide.new_ones(*wide.shape[:-1], 1)
        # On an unsigned grid negative entries become 0, so they do not count.
        sizes = wide.clamp_min(0) if self.signed is False else wide.abs()
        return (sizes.amax(-1, keepdim=True) / self.quant_max).clamp_min(SCALE_FLOOR)

    def forward(self, x: Tensor) -> Tensor:
        """Return Q(x), of the shape and dtype of ``x``."""
        if not x.dim():
            return self.forward(x[None])[0]
        return _Affine.apply(x, self.step_size(x), None, self._rule())  # type: ignore[no-any-return]

    @torch.no_grad()
    def codes(self, x: Tensor) -> Tensor:
        """Return the integers: int8, or uint8 for unsigned data; ``codes * step_size(x)`` is Q(x)."""
        codes = codes_at(distance(x, self.step_size(x), None), self._rule())
        return codes.to(torch.uint8 if self.signed is False else torch.int8)
