"""LSQ+: LSQ for inputs whose range is not symmetric: step size and offset are learned.

    Q(x; s, b) = s * round(clip(v, Qn, Qp)) + b,   v = (x - b) / s
    dQ/ds = round(v) - v inside, Qn or Qp outside;   dQ/db = 0 inside, 1 outside

References:
    Bhalgat et al., LSQ+, CVPR 2020 workshops, arXiv 2004.09576, Eq 1 to 6.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qsam.quantizers.affine import Affine
from qsam.quantizers.base import register_quantizer
from qsam.scales import initial_scale

_STARTS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
"""Shares of the data's range with which the search for the least squared error starts."""


@register_quantizer("lsq_plus")
class LSQPlus(Affine):
    """LSQ with a learned offset for inputs; weights are quantized symmetrically, as LSQ does.

    Args:
        setting: As :class:`~qsam.quantizers.base.Quantizer`.

    Attributes:
        scale: s, a Parameter of the shape of LSQ's.
        far: ``b + span``, a Parameter of shape ``(1,)``, which is learned instead of b: an optimizer that moves a scale
            by a share of itself could not move an offset near 0. It is about the width of the grid.
        span: A buffer: the initial width of the grid.

    Example:
        >>> q = LSQPlus(bits=2, axis=None)
        >>> q.observe_(torch.tensor([-0.25, 0.75, 1.75, 2.75]))
        >>> q.shift + q.scale * q.quant_min  # the lowest level
        tensor([-0.2500], grad_fn=<AddBackward0>)
        >>> q(torch.tensor([-1.0, 0.8, 9.0])).tolist()
        [-0.25, 0.75, 2.75]

    Differs from the paper: the first s and b come from alternating least squares instead of a search by gradient; the
    gradient of b carries the same factor as that of s, in units of a step.
    """

    span: Tensor

    def __init__(self, **setting: Any) -> None:
        super().__init__(**setting)
        self.scale = nn.Parameter(torch.ones(1, dtype=torch.float32))
        if self.axis is None:
            self.far = nn.Parameter(torch.ones(1, dtype=torch.float32))
            self.register_buffer("span", torch.ones(1, dtype=torch.float32))

    @property
    def shift(self) -> Tensor | None:  # type: ignore[override]
        """b; None for a weight."""
        return None if self.axis is not None else self.far - self.span

    @torch.no_grad()
    def set_shift_(self, values: Tensor) -> None:
        """Write b."""
        self.far.copy_(values + self.span)

    @torch.no_grad()
    def init_(self, x: Tensor) -> None:
        """Set s, and of an input b: by least squared error for ``init="mse"``, from the range for ``"absmax"``.

        With the other rules s is LSQ's and b is 0.
        """
        if self.axis is not None or self.init not in ("mse", "absmax"):
            scale = initial_scale(self._rows(x), self.quant_min, self.quant_max, self.init)
            shift = torch.zeros_like(scale)
        else:
            scale, shift = self._least_squares(x.detach().flatten())
        self._put("scale", self._shaped(scale, x))
        if self.axis is None:
            self._put("span", self._shaped(scale * (self.quant_max - self.quant_min), x))
            self._put("far", self._shaped(shift, x) + self.span)

    def _least_squares(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return s and b of the range, or the best result of "round, then fit a line" from several ranges."""
        x = x.double()
        if not bool(x.isfinite().all()):
            raise ValueError("the scale cannot be set from data that holds NaN or infinity.")
        low, width = (x.min(), x.max() - x.min()) if x.numel() else (x.new_zeros(()), x.new_zeros(()))
        if not width > 0:
            scale = initial_scale(x[None], self.quant_min, self.quant_max, "absmax")
            return scale, torch.zeros_like(scale)
        unit = (x - low) / width
        count = self.quant_max - self.quant_min
        best = (torch.inf, 1.0 / count, 0.0)
        for share in _STARTS if self.init == "mse" else (1.0,):
            for start in sorted({0.0, (1 - share) / 2, 1 - share}):
                best = min(best, self._refined(unit, share / count, start, 12 if self.init == "mse" else 0))
        scale = best[1] * width
        shift = low + best[2] * width - self.quant_min * scale
        return scale[None].float().clamp_min(torch.finfo(torch.float32).tiny), shift[None].float()

    def _refined(self, unit: Tensor, step: float, start: float, rounds: int) -> tuple[float, float, float]:
        """Return the squared error, the step and the lowest level after some rounds of least squares."""
        count = self.quant_max - self.quant_min
        for _ in range(rounds):
            codes = ((unit - start) / step).clamp(0, count).round()
            spread = codes - codes.mean()
            square = float(spread.square().sum())
            slope = float((spread * unit).sum()) / square if square > 0 else 0.0
            if not slope > 0:
                break
            step, start = slope, float(unit.mean() - slope * codes.mean())
        codes = ((unit - start) / step).clamp(0, count).round()
        return float((codes * step + start - unit).square().sum()), step, start
