"""LSQ's grid with statistics instead of a learned scale: the scale is computed from the weights at every step.

    Q(x; s) = s * round(clip(x / s, Qn, Qp)),   s = rule(w) after every optimizer step,   dQ/dx = 1[Qn < x/s < Qp]

References:
    Liu et al., Oscillation-free Quantization, arXiv 2302.02210, section 4.1 (its StatsQ).
"""

from __future__ import annotations

from torch import Tensor

from qsam.quantizers.base import register_quantizer
from qsam.quantizers.fixed_step import FixedStep


@register_quantizer("lsq_statistics")
class LSQStatistics(FixedStep):
    """LSQ's grid, to which the rule ``init`` of the first scale is applied again at every step.

    Arguments as :class:`~qsam.quantizers.base.Quantizer`. ``init="lsq"``, twice the mean magnitude over sqrt(Qp), costs
    almost nothing; ``"mse"`` searches, which takes longer than a step of a small model. Calibration sets an input's
    scale, which then stays constant.

    Example:
        >>> import torch
        >>> q = LSQStatistics(bits=2, axis=0)
        >>> q.init = "lsq"
        >>> q.observe_(torch.tensor([[-1.0, 1.0]]))
        >>> before = q.scale.item()
        >>> q.update(torch.tensor([[-3.0, 3.0]]))
        >>> before, q.scale.item()
        (2.0, 6.0)

    Differs from the paper: the grid is LSQ's; the paper's is that of ``stretched``.
    """

    moves_grid = True

    def update(self, w: Tensor) -> None:
        """Set a weight's scale again."""
        if self.axis is not None:
            self.init_(w)
