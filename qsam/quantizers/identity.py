"""Identity: no quantization, ``Q(x) = x``, which makes QAT the base optimizer and the other methods plain SAM."""

from __future__ import annotations

from torch import Tensor

from qsam.quantizers.base import Quantizer, register_quantizer


@register_quantizer("identity")
class Identity(Quantizer):
    """``Q(x) = x``. Arguments as :class:`~qsam.quantizers.base.Quantizer`; none has an effect.

    Example:
        >>> import torch
        >>> Identity(bits=2)(torch.tensor([0.3]))
        tensor([0.3000])
    """

    def init_(self, x: Tensor) -> None:
        """Do nothing: there are no parameters."""

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x``."""
        return x
