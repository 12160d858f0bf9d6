"""The settings that won at equal passes where they were measured, and the learning rate that goes with them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from torch import nn
from torch.optim import Optimizer

from qsam.coverage import require_coverage
from qsam.functional import SCALE_FLOOR, integer_limits
from qsam.optim import QAT, QuantizedOptimizer


@dataclasses.dataclass(frozen=True)
class Recommendation:
    """Settings that go together; :func:`recommended` returns them.

    Attributes:
        bits: Width of the weights.
        quantize: Keywords of :func:`qsam.quantize_`.
        method: The optimizer class.
        tau: How far weights may travel, in steps of their grid: see :func:`travel_lr`.
        evidence: What was measured, in a sentence.
    """

    bits: int
    quantize: Mapping[str, Any]
    method: type[QuantizedOptimizer]
    tau: float
    evidence: str

    def optimizer(
        self, model: nn.Module, base: Callable[..., Optimizer], *, steps: int, **settings: Any
    ) -> QuantizedOptimizer:
        """Return the method's optimizer around ``base``, with the rate :func:`travel_lr` unless ``lr`` is given.

        Args:
            model: The quantized model.
            base: A factory like ``torch.optim.AdamW``.
            steps: Updates in the whole run.
            settings: Other arguments of the optimizer and of the base.
        """
        lr = travel_lr(model, steps, self.tau)
        return self.method(model, base, **{"lr": lr, **settings})


_STRETCHED = (
    "MiniLM-L6 at W2A8, equal passes, each arm at its own best rate, three seeds on CoLA and on STS-B: above LSQ on "
    "the dev sets, equal to it on held-out training rows (docs/lowbit.md)."
)
_LSQ = "Nothing has been measured to be above LSQ at this width; tau is a guess."


def recommended(bits: int) -> Recommendation:
    """Return quantizer, method and learning rate for weights of so many bits.

    At 2 bits: the ``stretched`` grid per channel, plain QAT, tau .25. At 3 bits and more: LSQ per channel, plain QAT.
    Schedule the rate with a short warm-up and a cosine to 0, for which ``tau`` was chosen.

    Args:
        bits: In [2, 8].

    Raises:
        TypeError: ``bits`` is not an integer.
        ValueError: It lies outside [2, 8].

    Example:
        >>> import torch, qsam
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> recipe = qsam.recommended(2)
        >>> coverage = qsam.quantize_(model, **recipe.quantize)
        >>> optimizer = recipe.optimizer(model, torch.optim.AdamW, steps=1000, weight_decay=0.0)
        >>> type(model[2].weight_quantizer).__name__, type(optimizer).__name__
        ('Stretched', 'QAT')
    """
    integer_limits(bits, signed=True)  # checks `bits`
    weights, evidence = ("stretched", _STRETCHED) if bits == 2 else ("lsq", _LSQ)
    settings = {"weights": weights, "bits": bits, "granularity": "per_channel"}
    return Recommendation(bits, MappingProxyType(settings), QAT, 0.25, evidence)


def travel_lr(model: nn.Module, steps: int, tau: float = 0.5) -> float:
    """Return the peak learning rate at which Adam can move a weight by ``tau`` steps of its grid.

        lr = 2 * tau * mean(s) / T

    One update of Adam moves a weight by about the rate. A warm-up followed by a cosine to 0 (or a linear decay) has
    half the peak rate on average, so in T updates a weight that always goes the same way moves ``T * lr / 2``. Setting
    this to ``tau * mean(s)`` gives the formula. A code changes when its weight crosses the border of its cell, at most
    half a step away, so with ``tau`` far below .1 little but the scales is trained. The best rates measured at 2 bits
    had ``tau`` .44 and .57 for LSQ, and .22 and .32 for ``stretched`` (docs/lowbit.md).

    Args:
        model: A quantized model.
        steps: T, the updates in the whole run; at least 1.
        tau: Steps of the grid; finite and positive.

    Returns:
        The rate. mean(s) is over all entries of quantized weights, float ones left out.

    Raises:
        RuntimeError: The model is not quantized.
        ValueError: ``steps`` or ``tau`` is out of its range, or no weight has a step size yet.

    References:
        Derived here; ParetoQ (arXiv 2502.02631) observes that 2-bit training moves weights much further than 4-bit.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"`steps` must be the number of updates in the run, an integer >= 1, got {steps!r}.")
    if isinstance(tau, bool) or not isinstance(tau, int | float) or not (0 < tau < math.inf):
        raise ValueError(f"`tau` must be finite and positive, got {tau!r}.")
    total, count = 0.0, 0
    for row in require_coverage(model, "travel_lr").quantized:
        step = None if row.quantizer is None else row.quantizer.step_size(row.parameter.detach())
        if step is not None:
            total += float(step.detach().expand(row.parameter.shape).double().mean()) * row.numel
            count += row.numel
    if not total > count * SCALE_FLOOR:
        raise ValueError(
            "no quantized weight has a step size: travel_lr needs a grid with equal steps ('lsq', 'stretched'), and "
            "weights that are not all zero."
        )
    return 2 * tau * total / count / steps
