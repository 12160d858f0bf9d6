"""Stochastic rounding: up or down at random, right on average.

    Q~(x; s) = s * (floor(v) + 1[v - floor(v) > t]),   v = clip(x / s, Qn, Qp),   t ~ U(0, 1)

so that the expectation of Q~(x) is the clipped x. A value on the grid stays where it is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qsam.quantizers.base import register_quantizer
from qsam.quantizers.noise import Noisy


@register_quantizer("stochastic")
class Stochastic(Noisy):
    """Stochastic rounding while an optimizer's pass runs, LSQ's rounding to the nearest at any other time.

    Arguments as :class:`~qsam.quantizers.base.Quantizer`. The gradient is LSQ's, with the drawn code instead of the
    nearest one. The model that is evaluated, saved and deployed is rounded to the nearest.

    Example:
        >>> q = Stochastic(bits=4, axis=0)
        >>> q.observe_(torch.linspace(-8, 7, 16))
        >>> q.noise.on = True  # what an optimizer does in its passes
        >>> x = torch.full((1000,), 2.25)
        >>> q(x).unique().tolist(), bool((q(x).mean() - 2.25).abs() < 0.05)
        ([2.0, 3.0], True)

    References:
        Gupta et al., Deep Learning with Limited Numerical Precision, ICML 2015, arXiv 1502.02551.

    Differs from the paper: it rounds weights for 16-bit arithmetic in training; here the full-precision weights stay in
    the optimizer, and the step size is learned.
    """

    def noisy_codes(self, v: Tensor, u: Tensor) -> Tensor:
        """Return ``floor(v)``, or one more with probability ``v - floor(v)``."""
        low = torch.floor(v)
        return low + (v - low > 0.5 - u)
