"""SAM: sharpness-aware minimization of a float model.

e = rho * g / ||g||,   g = dL/dw at w;   h = dL/dw at w + e;   w steps with h
"""

from __future__ import annotations

from typing import Any

from torch import nn

from qsam.optim.groups import Base
from qsam.optim.optimizer import QuantizedOptimizer, register_optimizer


@register_optimizer("sam")
class SAM(QuantizedOptimizer):
    """SAM around any torch optimizer, without quantizers, as a float baseline.

    The arguments are those of :class:`~qsam.optim.optimizer.QuantizedOptimizer`. Every trainable parameter is perturbed
    (``perturb="all"``), and the arguments that concern scales have no effect.

    References:
        Foret et al., Sharpness-Aware Minimization for Efficiently Improving Generalization, ICLR 2021.
    """

    quantizes = False

    def __init__(self, model: nn.Module, base: Base, *, perturb: Any = "all", **options: Any) -> None:
        if perturb == "quantized":
            raise ValueError("SAM has no quantized weights: `perturb` must be 'all' or a predicate (name, parameter).")
        super().__init__(model, base, perturb=perturb, **options)
