"""SAQ, case 3: the perturbation follows the quantized weights.

    e = rho * g_Q / ||g_Q||,   g_Q = dL/dQ at Q(w);   h = dL/dQ at Q(w) + e
    dw = M(w) * h,   ds = gs * <h, dQ/ds(w, s)>;   w and s step together
"""

from __future__ import annotations

from typing import Any

from torch import nn

from qsam.optim.base import register_optimizer
from qsam.optim.groups import Base
from qsam.optim.two_pass import TwoPass


@register_optimizer("saq")
class SAQ(TwoPass):
    """Sharpness-aware quantization: SAM on the quantized weights, w and s stepping together from the second pass.

    Args:
        model: As :class:`~qsam.optim.two_pass.TwoPass`, as are all ``options``.
        base: As there.
        case: 3, SAQ proper: e is added to Q(w) and not quantized.
        options: As there.

    References:
        Liu, Cai, Zhuang, SAQ: Sharpness-Aware Quantization, arXiv 2111.12273.

    Differs from the paper: weights are not normalized to unit variance, so ``rho`` is in units of the weights and not
    comparable with the authors' .3 to .9.
    """

    def __init__(self, model: nn.Module, base: Base, *, case: int = 3, **options: Any) -> None:
        if case != 3:
            raise ValueError(f"`case` must be 3, got {case!r}.")
        super().__init__(model, base, **options)
