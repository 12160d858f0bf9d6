"""Q-BERT: asymmetric ranges from the smallest to the largest weight, one per run of rows, in 128 runs.

    Q(x) = s * k + m,   k = round((x - m) / s),   m = min x,   s = (max x - min x) / (2^bits - 1),   dQ/dx = 1

References:
    Shen et al., Q-BERT: Hessian Based Ultra Low Precision Quantization of BERT, arXiv 1909.05840, section 3.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qsam.functional import SCALE_FLOOR
from qsam.quantizers.affine import Ranged
from qsam.quantizers.base import register_quantizer

RUNS = 128
"""Ranges per weight, the paper's number."""


@register_quantizer("qbert")
class QBert(Ranged):
    """Ranges over runs of rows, renewed at every optimizer step. Nothing is learned; the gradient passes everywhere.

    Args:
        setting: As :class:`~qsam.quantizers.base.Quantizer`. A weight with granularity ``"per_tensor"`` has 128 runs of
            consecutive rows along ``axis``, of sizes that differ by one row at most, or one per row if it has fewer;
            with ``"per_channel"`` one range per row. An input has one range.

    Attributes:
        scale: s, of shape ``(C, 1, ...)``: the rows of a run have one value.
        minimum: m, of the same shape. Codes are unsigned.

    Raises:
        ValueError: The granularity is ``"per_group"``, or an argument is out of its range.

    Example:
        >>> q = QBert(bits=2, axis=0)
        >>> q.observe_(torch.tensor([[-1.0, 5.0, 1.0, 0.9]]))
        >>> q(torch.tensor([[-1.0, 5.0, 1.0, 0.9]])).tolist()
        [[-1.0, 5.0, 1.0, 1.0]]

    Differs from the paper: it splits each head's matrix, while here the runs go over all rows of a matrix. They agree
    if 128 is a multiple of the number of heads and divides the number of rows.
    """

    minimum: Tensor

    def __init__(self, **setting: Any) -> None:
        if setting.get("granularity") == "per_group":
            raise ValueError(
                "the quantizer 'qbert' groups rows, and not the entries of a row: use granularity 'per_tensor' (128 "
                "runs of rows) or 'per_channel'."
            )
        super().__init__(**setting)
        self.register_buffer("minimum", torch.zeros(1, dtype=torch.float32))

    @property
    def granularity(self) -> str:
        """Per channel for a weight, whose scale has one entry per row; ``spec`` holds the given granularity."""
        return self.spec.granularity if self.axis is None else "per_channel"

    @property
    def shift(self) -> Tensor:  # type: ignore[override]
        """The minimum of each run."""
        return self.minimum

    @torch.no_grad()
    def set_shift_(self, values: Tensor) -> None:
        """Write m."""
        self.minimum.copy_(values)

    @property
    def quant_min(self) -> int:
        """0, because the range begins at m."""
        return 0

    @property
    def quant_max(self) -> int:
        """``2^bits - 1``."""
        return int(2**self.bits - 1)

    @torch.no_grad()
    def set_range_(self, low: Tensor, high: Tensor, x: Tensor) -> None:
        """Set s and m, of runs of rows where those have one range."""
        if self.spec.granularity == "per_tensor" and len(low) > RUNS:
            run = torch.arange(len(low), device=low.device) * RUNS // len(low)
            low = torch.full_like(low[:RUNS], torch.inf).scatter_reduce(0, run, low, "amin")[run]
            high = torch.full_like(high[:RUNS], -torch.inf).scatter_reduce(0, run, high, "amax")[run]
        step = ((high - low) / self.quant_max).clamp(SCALE_FLOOR, torch.finfo(torch.float32).max)
        self._put("scale", self._shaped(step, x))
        self._put("minimum", self._shaped(low, x))
