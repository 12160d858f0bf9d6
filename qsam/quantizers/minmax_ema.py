"""Q8BERT's ranges: min-max with a moving average. Nothing is learned, and the gradient passes everywhere.

    Q(x; s) = s * round(clip(x / s, -Qp, Qp)),   dQ/dx = 1
    weights: s = max|w| / Qp of every step;   inputs: s <- .9999 s + .0001 max|x| / Qp, from the first batch

References:
    Zafrir et al., Q8BERT: Quantized 8Bit BERT, arXiv 1910.06188, section 2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qsam.functional import SCALE_FLOOR
from qsam.quantizers.affine import Ranged
from qsam.quantizers.base import register_quantizer

DECAY = 0.9999
"""The decay of the average of an input's largest magnitude, as in the paper."""


@register_quantizer("minmax_ema")
class MinMaxEMA(Ranged):
    """A symmetric range that holds the largest magnitude. Arguments as :class:`~qsam.quantizers.base.Quantizer`.

    The scale is a buffer. A weight's scale is set again at every optimizer step. An input's moves at every optimizer
    step after a forward in training mode, by the data of the first pass; in evaluation it does not move.

    Example:
        >>> q = MinMaxEMA(bits=8, axis=0)
        >>> q.observe_(torch.tensor([[-127.0, 5.2]]))
        >>> q(torch.tensor([[-127.0, 5.2]])).tolist(), list(q.parameters())
        ([[-127.0, 5.0]], [])
        >>> q.update(torch.tensor([[-254.0, 5.2]]))
        >>> q.scale
        tensor([2.])

    Differs from the paper: an input without negative entries uses the unsigned grid. With several processes max|x| is
    that of all of them.
    """

    seen: Tensor

    def __init__(self, **setting: Any) -> None:
        super().__init__(**setting)
        # A buffer, because the optimizers restore buffers after every pass but the first; the step moves the scale.
        self.register_buffer("seen", torch.zeros(1, dtype=torch.float32), persistent=False)

    @property
    def quant_min(self) -> int:
        """-Qp, or 0 for unsigned data."""
        return 0 if self.signed is False else -self.quant_max

    @torch.no_grad()
    def set_range_(self, low: Tensor, high: Tensor, x: Tensor) -> None:
        """Put the largest magnitude on the outermost level; a row of zeros takes the mean of the others."""
        largest = torch.maximum(low.abs(), high.abs())
        filled = largest[largest > 0]
        largest[largest == 0] = filled.mean() if filled.numel() else float(self.quant_max)
        self._put("scale", self._shaped((largest / self.quant_max).clamp_min(SCALE_FLOOR), x))

    def forward(self, x: Tensor) -> Tensor:
        """Return Q(x), and note the largest magnitude of an input in training mode."""
        if self.axis is None and self.training and x.numel():
            with torch.no_grad():
                self.seen.copy_(torch.maximum(self.seen, x.detach().abs().amax().to(torch.float32)))
        return super().forward(x)

    def observations(self) -> Tensor | None:
        """Return max|x| since the last step, of an input."""
        return self.seen if self.axis is None else None

    @torch.no_grad()
    def take_observations(self) -> None:
        """Move an input's range by the largest magnitude since the last step, if it is finite."""
        moved = DECAY * self.scale + (1 - DECAY) * self.seen / self.quant_max
        self.scale.copy_(torch.where(torch.isfinite(self.seen) & (self.seen > 0), moved, self.scale))
        self.seen.zero_()
