"""Uniform grids that LSQ's formula does not cover: shifted levels, asymmetric ranges, other straight-through rules.

    Q(x; s, b) = s * (k + offset) + b,   k = round(clip(v - offset, Qn, Qp)),   v = (x - b) / s

    dQ/dx = M = 1[low < v < high]
    dQ/ds = k + offset - v  where M,   k + offset elsewhere
    dQ/db = 0               where M,   1 elsewhere

The offset is 0 or 1/2. The straight-through gradient stops at low and high, mostly the outermost levels.
"""

from __future__ import annotations

import copy
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from qsam.functional import lsq_grad_scale, positive, wide_dtype
from qsam.quantizers.lsq import LSQ


class Rule(NamedTuple):
    """The settings of a grid beside its scale and its shift.

    Attributes:
        quant_min: Qn.
        quant_max: Qp.
        offset: The offset of the levels, in steps: 0 or 1/2.
        low: The gradient of x stops here, in steps from b; -inf for no bound.
        high: The same above.
        inside: Whether entries between the two contribute to the gradient of s.
        grad_scale: Factor of the gradients of s and b.
    """

    quant_min: int
    quant_max: int
    offset: float
    low: float
    high: float
    inside: bool = True
    grad_scale: float = 1.0


def distance(x: Tensor, scale: Tensor, shift: Tensor | None) -> Tensor:
    """Return ``v = (x - b) / s`` in the wide dtype."""
    wide = wide_dtype(x.dtype)
    moved = x.to(wide) if shift is None else x.to(wide) - shift.to(wide)
    return moved / positive(scale).to(wide)


def codes_at(v: Tensor, rule: Rule) -> Tensor:
    """Return k, ties to even."""
    return (v - rule.offset).clamp_(rule.quant_min, rule.quant_max).round_()


def levels_of(codes: Tensor, scale: Tensor, shift: Tensor | None, offset: float) -> Tensor:
    """Return ``s * (k + offset) + b`` in the dtype of ``codes``."""
    levels = (codes + offset).mul_(positive(scale).to(codes.dtype))
    return levels if shift is None else levels.add_(shift.to(codes.dtype))


class _Affine(torch.autograd.Function):
    """Q(x; s, b) with its straight-through gradient. Saves only x, s and b."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, scale: Tensor, shift: Tensor | None, rule: Rule) -> Tensor:
        return levels_of(codes_at(distance(x, scale, shift), rule), scale, shift, rule.offset).to(x.dtype)

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, scale, shift, ctx.rule = inputs  # type: ignore[attr-defined]
        ctx.save_for_backward(x, scale, shift)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, shift = ctx.saved_tensors  # type: ignore[attr-defined]
        rule: Rule = ctx.rule  # type: ignore[attr-defined]
        needs = ctx.needs_input_grad  # type: ignore[attr-defined]
        v = distance(x, scale, shift)
        outside = (v <= rule.low) | (v >= rule.high)
        grad_x = grad.masked_fill(outside, 0) if needs[0] else None
        grad_s = grad_b = None
        if needs[1]:
            slope = codes_at(v, rule).add_(rule.offset)
            slope = slope.sub_(v.masked_fill_(outside, 0)) if rule.inside else slope.masked_fill_(~outside, 0)
            grad_s = (slope * grad).sum_to_size(scale.shape) * rule.grad_scale
            # Q depends on |s|, whose slope is -1 for a negative s, so that a descent still moves |s| the right way.
            grad_s = torch.where(scale < 0, -grad_s, grad_s).to(scale.dtype)
        if needs[2]:
            grad_b = (grad.to(v.dtype).masked_fill(~outside, 0).sum_to_size(shift.shape) * rule.grad_scale).to(
                shift.dtype
            )
        return grad_x, grad_s, grad_b, None


class Affine(LSQ):
    """A uniform grid by the formulas of this file. Not registered; a subclass sets ``scale``, and may set the rest.

    It inherits the handling of rows, groups and shapes from LSQ. The fused kernels compute it if ``_has_grid`` says so.

    Attributes:
        scale: s; a Parameter, a buffer or a property.
        shift: b, broadcastable as the scale is; None for 0.
        offset: The offset of the levels, in steps.
        slope_inside: Whether entries that are not clipped contribute to the gradient of s.
        normalizes: Whether the gradients of s and b carry LSQ's ``1 / sqrt(N * highest level)``.
    """

    slope_inside = True
    normalizes = True

    def __init__(self, **setting: Any) -> None:
        super(LSQ, self).__init__(**setting)  # LSQ's would make the scale a Parameter

    @property
    def stops(self) -> tuple[float, float]:
        """The bounds of the straight-through gradient, in steps from b: the outermost levels."""
        return self.quant_min + self.offset, self.quant_max + self.offset

    def rule(self, x: Tensor) -> Rule:
        """Return the rule for a tensor of the shape of ``x``."""
        factor = lsq_grad_scale(self._count(x), self.quant_max + self.offset) if self.normalizes else 1.0
        return Rule(self.quant_min, self.quant_max, self.offset, *self.stops, self.slope_inside, factor)

    def forward(self, x: Tensor) -> Tensor:
        """Return Q(x), of the shape and dtype of ``x``."""
        if not x.dim():
            return self.forward(x[None])[0]
        return self._ungroup(_Affine.apply(self._group(x), self.scale, self.shift, self.rule(x)), x)

    def gradient_scale(self, count: int) -> float:
        """Return LSQ's factor, or 1 if the gradient does not carry it."""
        return lsq_grad_scale(count, self.quant_max + self.offset) if self.normalizes else 1.0

    @property
    def _has_grid(self) -> bool:
        return False

    @torch.no_grad()
    def complete_(self, w: Tensor) -> bool:
        """Set the scales of rows that were zeros and are not now; return whether all are set."""
        if not bool(w.any()):
            return False
        if not self.calibrated:
            self.observe_(w)
        elif bool((self.scale == 0).any()):
            fresh, missing = copy.deepcopy(self), self.scale == 0
            fresh.init_(w)
            for mine, new in zip(self._fitted(), fresh._fitted(), strict=True):
                mine.copy_(torch.where(missing, new, mine))
        return not bool((self.scale == 0).any())

    def _fitted(self) -> list[Tensor]:
        """Return the tensors that are set from data, with one entry per row."""
        shape = self.scale.shape
        return [t for t in (*self.parameters(), *self.buffers()) if t.shape == shape and t is not self.limits]

    @torch.no_grad()
    def codes(self, x: Tensor) -> Tensor:
        """Return k, of the shape of ``x``: int8, or uint8 if none is negative; :meth:`dequantize` gives Q(x)."""
        codes = codes_at(distance(self._group(x), self.scale, self.shift), self.rule(x))
        return self._ungroup(codes, x).to(torch.int8 if self.quant_min < 0 else torch.uint8)

    @torch.no_grad()
    def dequantize(self, codes: Tensor) -> Tensor:
        """Return ``(codes + offset) * s + b`` in fp32, of the shape of ``codes``."""
        return self._ungroup(
            levels_of(self._group(codes.to(torch.float32)), self.scale, self.shift, self.offset), codes
        )

    @torch.no_grad()
    def step_size(self, x: Tensor) -> Tensor:
        """Return s, the distance between neighbouring levels, broadcastable against ``x``."""
        scale = positive(self.scale)
        return scale if self.group_size is None else self._ungroup(scale.expand_as(self._group(x)), x)

    def _shaped(self, values: Tensor, x: Tensor) -> Tensor:
        """Return one value per row in the shape of the scale, on the device of ``x``."""
        return values.to(torch.float32).reshape(self._scale_shape(x)).to(x.device)

    def _put(self, name: str, values: Tensor) -> None:
        """Write a Parameter or buffer, in place if it has the shape already."""
        before = getattr(self, name)
        if before.shape == values.shape and before.device == values.device:
            before.copy_(values)
        elif isinstance(before, torch.nn.Parameter):
            setattr(self, name, torch.nn.Parameter(values, requires_grad=before.requires_grad))
        else:
            setattr(self, name, values)


class Ranged(Affine):
    """A grid over the range of the data, set again at every optimizer step. Nothing is learned. Not registered.

    The scale is a buffer, and the gradient passes everywhere, because the range holds all weights. A subclass
    implements :meth:`set_range_`.
    """

    moves_grid = True

    def __init__(self, **setting: Any) -> None:
        super().__init__(**setting)
        self.register_buffer("scale", torch.ones(1, dtype=torch.float32))

    @property
    def stops(self) -> tuple[float, float]:
        """Infinities, because the range holds all weights."""
        return -math.inf, math.inf

    def set_range_(self, low: Tensor, high: Tensor, x: Tensor) -> None:
        """Set the grid from the smallest and the largest entry of each row of ``x``, in fp64."""
        raise NotImplementedError

    @torch.no_grad()
    def init_(self, x: Tensor) -> None:
        """Set the range from data.

        Raises:
            ValueError: the data hold NaN or infinity.
        """
        rows = self._rows(x).detach()
        low, high = rows.aminmax(dim=1) if rows.numel() else rows.new_zeros(2, len(rows))
        if not bool((low.isfinite() & high.isfinite()).all()):  # a NaN is both the smallest and the largest
            raise ValueError("the range cannot be set from data that holds NaN or infinity.")
        self.set_range_(low.double(), high.double(), x)

    def update(self, w: Tensor) -> None:
        """Set a weight's range again."""
        if self.axis is not None:
            self.init_(w)
