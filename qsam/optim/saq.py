"""SAQ: sharpness-aware quantization, in its three cases.

case 1   L(Q(w) + e),   e = rho * M*g_Q / ||M*g_Q||      the perturbation ignores the noise
case 2   L(Q(w + e)),   e as in case 1                   the noise depends on the perturbation
case 3   L(Q(w) + e),   e = rho * g_Q / ||g_Q||          the perturbation depends on the noise: SAQ proper

g_Q = dL/dQ at Q(w);  h the same gradient in the perturbed pass;  M the clip mask of the quantizer
dw = M(w) * h,   ds = gs * <h, dQ/ds(w, s)>   (case 2: M and dQ/ds at w + e);   w and s step together
"""

from __future__ import annotations

from typing import Any

from torch import nn

from qsam.optim.groups import Base
from qsam.optim.optimizer import QuantizedOptimizer, register_optimizer


@register_optimizer("saq")
class SAQ(QuantizedOptimizer):
    """Sharpness-aware quantization: SAM on the quantized weights; w and s step together after the second pass.

    Args:
        model: As :class:`~qsam.optim.optimizer.QuantizedOptimizer`, as are all ``options``.
        base: As there.
        case: 1, 2 or 3; see the module. In case 1 the clip mask zeroes entries of e that would change the loss. In
            case 2 a small e is rounded away, and e is kept until the update (one copy of the weights).
        options: As there. ``normalize_weights=True`` puts rho in the unit of the authors' code, which gives every
            tensor unit variance before it quantizes (their rho is .3 to .9); otherwise it is in units of the weights.

    Raises:
        ValueError: ``case`` is not 1, 2 or 3.

    References:
        Liu, Cai, Zhuang, SAQ: Sharpness-Aware Quantization, arXiv 2111.12273. Update gradients at the unperturbed w
        and s are derived here and agree with the authors' public code.

    Differs from the paper: e covers the quantized weights (``perturb="all"`` adds biases and norms, as the authors'
    code for CNNs does); ``normalize_weights`` rescales e and leaves the network's function as it is.
    """

    def __init__(self, model: nn.Module, base: Base, *, case: int = 3, **options: Any) -> None:
        if case not in (1, 2, 3) or isinstance(case, bool):
            raise ValueError(f"`case` must be 1, 2 or 3, got {case!r}.")
        self.case = case
        self.masked = case in (1, 2)
        self.inside = case == 2
        super().__init__(model, base, **options)
