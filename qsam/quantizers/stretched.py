"""Stretched: a uniform grid with as many levels above zero as below, and none at zero; its step size is learned.

    Q(x; s) = s * (k + 1/2),   k = round(clip(x / s - 1/2, Qn, Qp)),   ds scaled by 1 / sqrt(N * (Qp + 1/2))

At 2 bits the levels are -3/2, -1/2, 1/2 and 3/2 times s, where LSQ's are -2, -1, 0 and 1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from qsam.functional import lsq_grad_scale, positive, wide_dtype
from qsam.quantizers.base import register_quantizer
from qsam.quantizers.lsq import LSQ
from qsam.scales import initial_scale


class _Stretch(torch.autograd.Function):
    """Q(x; s) with its straight-through gradient. Saves x and s, nothing else."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, scale: Tensor, half: int, grad_scale: float) -> Tensor:
        """Return ``s * (k + 1/2)`` in the dtype of ``x``; ``half`` is 2^(bits-1)."""
        codes = _codes(x, scale, half)
        return ((codes + 0.5) * positive(scale).to(codes.dtype)).to(x.dtype)

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep what the backward needs."""
        x, scale, *ctx.setting = inputs  # type: ignore[attr-defined]
        ctx.save_for_backward(x, scale)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        """Return ``M(x) * grad`` and ``gs * <grad, dQ/ds>``."""
        x, scale = ctx.saved_tensors  # type: ignore[attr-defined]
        half, grad_scale = ctx.setting  # type: ignore[attr-defined]
        wide = wide_dtype(x.dtype)
        v = x.to(wide) / positive(scale).to(wide)
        outside = v.abs() >= half
        grad_x = grad_s = None
        if ctx.needs_input_grad[0]:  # type: ignore[attr-defined]
            grad_x = grad.masked_fill(outside, 0)
        if ctx.needs_input_grad[1]:  # type: ignore[attr-defined]
            slope = _codes(x, scale, half) + 0.5 - v.masked_fill(outside, 0)
            grad_s = (slope * grad).sum_to_size(scale.shape) * grad_scale
            # s enters as |s|: on the negative side its slope is -1, so that a descent still moves |s| the right way.
            grad_s = torch.where(scale < 0, -grad_s, grad_s).to(scale.dtype)
        return grad_x, grad_s, None, None


def _codes(x: Tensor, scale: Tensor, half: int) -> Tensor:
    """Return k, in fp32 (fp64 for fp64)."""
    wide = wide_dtype(x.dtype)
    v = x.to(wide) / positive(scale).to(wide)
    return torch.clamp(v - 0.5, -half, half - 1).round()


@register_quantizer("stretched")
class Stretched(LSQ):
    """A uniform grid without a level at zero, with a learned step size, for signed data.

    With ``v = x / s`` and ``h = 2^(bits-1)``::

        dQ/dx = 1[|v| < h]
        dQ/ds = k + 1/2 - v  where |v| < h,   -(h - 1/2) where v <= -h,   h - 1/2 where v >= h

    The codes k are ``bits``-bit integers in [-h, h - 1], which pack as LSQ's do; ``(codes + offset) * scale`` is Q(x).

    Args:
        bits: Width of the integers, in [2, 8].
        signed: True. The grid has no zero, which unsigned data (the output of a ReLU) are full of.
        granularity: As :class:`~qsam.quantizers.base.Quantizer`, and so are
        axis: the channel dimension, and
        group_size: the entries of a group.

    Raises:
        ValueError: ``signed`` is not True, or another argument is out of its range.

    Example:
        >>> q = Stretched(bits=2)
        >>> q.observe_(torch.tensor([-1.5, -0.5, 0.5, 1.5]))
        >>> x = torch.tensor([-9.0, -0.6, 0.0, 0.1, 1.2])
        >>> q(x).tolist(), q.codes(x).tolist()
        ([-1.5, -0.5, -0.5, 0.5, 1.5], [-2, -1, -1, 0, 1])

    References:
        Liu et al., ParetoQ, arXiv 2502.02631 (its stretched elastic quantization); Liu et al., Oscillation-free
        Quantization, arXiv 2302.02210.

    Differs from the papers: the gradient of s is LSQ's rule on this grid, and the initial scale is the one of least
    squared error.
    """

    offset = 0.5

    def __init__(
        self,
        *,
        bits: int,
        signed: bool | None = True,
        granularity: str = "per_tensor",
        axis: int | None = None,
        group_size: int | None = None,
    ) -> None:
        super().__init__(bits=bits, signed=signed, granularity=granularity, axis=axis, group_size=group_size)
        if signed is not True:
            raise ValueError(
                f"the quantizer 'stretched' has no level at zero and is for signed weights: got signed={signed}. Use "
                "'lsq' for inputs."
            )

    @torch.no_grad()
    def init_(self, x: Tensor) -> None:
        """Set ``scale`` from the data, by the rule in ``self.init``, with the outermost levels as limits."""
        lowest, highest = self.quant_min + self.offset, self.quant_max + self.offset
        self._set_scale(initial_scale(self._rows(x), lowest, highest, self.init), x)

    def forward(self, x: Tensor) -> Tensor:
        """Return Q(x), of the shape and dtype of ``x``."""
        half = -self.quant_min
        grad_scale = lsq_grad_scale(self._count(x), half - 0.5)
        groups = self._group(x)
        if not groups.dim():
            return _Stretch.apply(groups[None], self.scale, half, grad_scale)[0]  # type: ignore[no-any-return]
        return self._ungroup(_Stretch.apply(groups, self.scale, half, grad_scale), x)

    def grid(self, x: Tensor) -> None:
        """Return None: the fused kernels multiply integers by s, and these levels are no integers times s."""

    @torch.no_grad()
    def codes(self, x: Tensor) -> Tensor:
        """Return k: int8, of the shape of ``x``; ``(codes + 1/2) * scale`` is Q(x)."""
        return self._ungroup(_codes(self._group(x), self.scale, -self.quant_min), x).to(torch.int8)

    @torch.no_grad()
    def dequantize(self, codes: Tensor) -> Tensor:
        """Return ``(codes + 1/2) * s`` in fp32, of the shape of ``codes``."""
        return self._ungroup((self._group(codes.to(torch.float32)) + self.offset) * positive(self.scale), codes)

    @torch.no_grad()
    def step_size(self, x: Tensor) -> Tensor:
        """Return s, the distance of neighbouring levels, broadcastable against ``x``."""
        if self.group_size is None:
            return positive(self.scale)
        return self._ungroup(positive(self.scale).expand_as(self._group(x)), x)
