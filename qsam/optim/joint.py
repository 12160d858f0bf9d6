"""Joint SAM: SQuAT's ablation, in which w and s step together.

e = rho * g_Q / ||g_Q||;   h = dL/dQ at Q(w) + e;   dw = h (no clip mask),   ds = gs * <h, dQ/ds>
"""

from __future__ import annotations

from typing import Any

from torch import nn

from qsam.optim.groups import Base
from qsam.optim.optimizer import QuantizedOptimizer, register_optimizer


@register_optimizer("joint")
class JointSAM(QuantizedOptimizer):
    """SAM on the quantized weights with one joint step of w and s, and no clip mask on dw.

    With ``ste="clipped"`` it is bitwise :class:`~qsam.SAQ`, case 3. The arguments are those of
    :class:`~qsam.optim.optimizer.QuantizedOptimizer`, with ``ste="identity"`` by default.

    References:
        Wang et al., SQuAT, arXiv 2210.07171, Eq 5 to 7.
    """

    def __init__(self, model: nn.Module, base: Base, *, ste: str = "identity", **options: Any) -> None:
        super().__init__(model, base, ste=ste, **options)
