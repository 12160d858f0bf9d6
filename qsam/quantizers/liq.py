"""LIQ: the interval of a tensor is learned, and its levels include both ends. SAQ's code uses this quantizer.

    Q(x; a) = a * (2 k / n - 1),   k = round(n * (clip(x / a, -1, 1) + 1) / 2),   n = 2^bits - 1     (signed)
    Q(x; a) = a * k / n,           k = round(n * clip(x / a, 0, 1))                                   (unsigned)
    dQ/dx = 1 inside, 0 outside;   dQ/da = (Q - x) / a inside, and outside -1, 0 or 1: the level at that end over a

The signed grid has no zero: it is that of ``stretched`` with the step ``2 a / n``, clipped at its outermost level.

References:
    Liu, Cai, Zhuang, Sharpness-aware Quantization, arXiv 2111.12273, and its public code.
"""

from __future__ import annotations

from qsam.quantizers.base import register_quantizer
from qsam.quantizers.pact import Clipped


@register_quantizer("liq")
class LIQ(Clipped):
    """A learned interval, its levels spread evenly from end to end.

    Arguments as :class:`~qsam.quantizers.base.Quantizer`.

    Example:
        >>> import torch
        >>> q = LIQ(bits=2)
        >>> q.init = "absmax"
        >>> q.observe_(torch.tensor([-3.0, 3.0]))
        >>> x = torch.tensor([-9.0, -0.5, 0.5, 2.5])
        >>> q(x).tolist(), q.codes(x).tolist()
        ([-3.0, -1.0, 1.0, 3.0], [-2, -1, 0, 1])

    Differs from SAQ's code: the weights are not brought to unit variance before (an optimizer's
    ``normalize_weights`` does that for e), the first interval is set from data, and the gradient at the very ends is 0.
    """

    @property
    def offset(self) -> float:  # type: ignore[override]
        """1/2, or 0 for unsigned data."""
        return 0.0 if self.signed is False else 0.5
