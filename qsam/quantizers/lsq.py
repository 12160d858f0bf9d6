"""LSQ: a uniform grid whose step size is learned.

    Q(x; s) = s * round(clip(x / s, Qn, Qp)),   ds scaled by 1 / sqrt(N * Qp)

There is one s per tensor, channel or group. N counts the entries that share one s; for an activation, those of one
sample.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qsam.functional import (
    Grid,
    are_leading,
    channel_axes,
    channel_count,
    fake_quantize,
    from_groups,
    integer_limits,
    lsq_grad_scale,
    positive,
    quantize,
    to_groups,
)
from qsam.quantizers.base import QUANTIZERS, Quantizer, register_quantizer
from qsam.scales import initial_scale

_LARGEST_GROWTH = 1.01
"""The largest growth per step that the scales' optimizer can follow with its own steps."""

_HEADROOM = 2.0
"""A weight that grows from zeros gets this multiple of the fitting scale, because clipped weights cannot grow."""


@register_quantizer("lsq")
class LSQ(Quantizer):
    """Learned step size quantization.

    The step size is the Parameter ``scale``: fp32, of shape ``(1,)`` per tensor, ``(C, 1, ...)`` per channel (C at
    the channel axis) and ``(C, G, 1)`` per group. See :func:`qsam.functional.fake_quantize` for the equations and
    :class:`~qsam.quantizers.base.Quantizer` for the arguments.

    Example:
        >>> q = LSQ(bits=2, signed=True, granularity="per_channel", axis=0)
        >>> q.observe_(torch.tensor([[-2.0, 1.0], [0.0, 3.0]]))
        >>> q.scale.flatten().tolist(), q(torch.tensor([[-2.0, 1.0], [0.0, 2.0]])).tolist()
        ([1.0, 3.0], [[-2.0, 1.0], [0.0, 3.0]])

    References:
        Esser et al., Learned Step Size Quantization, ICLR 2020.

    Differs from the paper: the initial scale is the one of least squared error (``init="lsq"`` is the paper's).
    """

    scale: Tensor

    def __init__(self, **setting: Any) -> None:
        super().__init__(**setting)
        self.scale = nn.Parameter(torch.zeros(1, dtype=torch.float32))

    @torch.no_grad()
    def init_(self, x: Tensor) -> None:
        """Set ``scale`` from a weight or a batch, by the rule in ``self.init``; 0, no scale yet, for a row of zeros."""
        scale = initial_scale(self._rows(x), self.quant_min, self.quant_max, self.init)
        scale = scale.reshape(self._scale_shape(x)).to(x.device)
        if self.scale.shape == scale.shape and self.scale.device == scale.device:
            self.scale.copy_(scale)
        else:
            self.scale = self._hold(scale)

    @torch.no_grad()
    def complete_(self, w: Tensor) -> bool:
        """Set the scales of rows that were zeros and are not now; return whether all are set.

        A weight that was all zeros (a probe, a ControlNet, adaLN-zero) grows by large factors in its first steps, and
        would be clipped to its size after the first one. So its scales follow it, at twice the fitting size, until no
        scale grows by more than 1 % per step, which a learned scale can follow.
        """
        rows = self._rows(w)
        old = self.scale.flatten()
        if self.calibrated:
            grows = (old == 0) & rows.any(dim=1)
            if bool(grows.any()):
                new = old.clone()
                new[grows] = initial_scale(rows[grows], self.quant_min, self.quant_max, self.init).to(new.device)
                self.scale.copy_(new.view_as(self.scale))
        elif bool(rows.any()):
            new = initial_scale(rows, self.quant_min, self.quant_max, self.init).to(old.device)
            grows = new > _LARGEST_GROWTH * old / _HEADROOM
            if bool(grows.any()):
                self.scale.copy_(torch.where(grows, _HEADROOM * new, old).view_as(self.scale))
            else:
                self.scale.copy_(new.view_as(self.scale))
                self.set_sign_(self.signed is not False)
        return self.calibrated and not bool((self.scale == 0).any())

    def forward(self, x: Tensor) -> Tensor:
        """Return Q(x), of the shape and dtype of ``x``."""
        if self.axis is None and not self._has_plain_limits():
            return self._by_tensors(x)
        return self._fake_quantize(x, self.scale, self.quant_min, self.quant_max)

    def _fake_quantize(self, x: Tensor, scale: Tensor, quant_min: int, quant_max: int) -> Tensor:
        grad_scale = lsq_grad_scale(self._count(x), quant_max)
        return self._ungroup(fake_quantize(self._group(x), scale, quant_min, quant_max, grad_scale), x)

    def _has_plain_limits(self) -> bool:
        """Whether sign and scale can be read as Python numbers and need no correction."""
        limits = self.readable_limits()
        return limits is not None and (not limits[1] > limits[0] or limits[1] - limits[0] == 2**self.bits - 1)

    def _by_tensors(self, x: Tensor) -> Tensor:
        """Return Q(x) by arithmetic on ``limits``, without a branch, so that a graph obeys later calibration.

        Both grids are computed and one is taken. With a scale of 0 (not set) x passes in float.
        """
        s = self._scale_in_force()
        if_signed = self._fake_quantize(x, s, *integer_limits(self.bits, True))
        if_unsigned = self._fake_quantize(x, s, *integer_limits(self.bits, False))
        low, high = self.limits.unbind()
        known = high > low
        is_signed = (known & (low < 0)) | (~known & (self.spec.signed is not False))
        return torch.where(self.scale == 0, x, torch.where(is_signed, if_signed, if_unsigned))

    def _scale_in_force(self) -> Tensor:
        """Return s, corrected if it is an average with scales of 0, which ``limits`` shows in the same proportion."""
        if self.axis is not None or self._has_plain_limits():
            return self.scale
        low, high = self.limits.unbind()
        return self.scale / torch.where(high > low, (high - low) / (2**self.bits - 1), 1)

    def grid(self, x: Tensor) -> Grid | None:
        """Return Q's grid for the fused kernels; None if the step sizes do not belong to contiguous rows of ``x``."""
        if torch.compiler.is_compiling() or (self.axis is None and not self._has_plain_limits()):
            return None
        if not self._has_grid or not (are_leading(self.axis) or self.granularity == "per_tensor"):
            return None
        scale, quant_min, quant_max = self.scale, self.quant_min, self.quant_max
        if self.group_size is not None and x.numel() != scale.numel() * self.group_size:
            return None
        if self.granularity == "per_channel" and x.shape[:1] != scale.shape[:1]:
            return None
        grad_scale = self.gradient_scale(self._count(x))
        return Grid(scale, quant_min, quant_max, grad_scale, scale.numel(), self.offset)

    @property
    def _has_grid(self) -> bool:
        """Whether Q is the formula that the fused kernels compute, and no subclass has overridden it."""
        return type(self).forward is LSQ.forward

    @property
    def rowwise(self) -> bool:
        """Whether no entry depends on another row; False if a subclass has another Q."""
        return self._has_grid and (self.granularity == "per_tensor" or are_leading(self.axis))

    def gradient_scale(self, count: int) -> float:
        """Return LSQ's ``1 / sqrt(N * Qp)``."""
        return lsq_grad_scale(count, self.quant_max)

    @torch.no_grad()
    def codes(self, x: Tensor) -> Tensor:
        """Return the integers of ``x``: int8 (uint8 if unsigned), of its shape; ``codes * scale`` is Q(x)."""
        codes = quantize(self._group(x), self._scale_in_force(), self.quant_min, self.quant_max)
        return self._ungroup(codes, x).to(self.code_dtype)

    @torch.no_grad()
    def dequantize(self, codes: Tensor) -> Tensor:
        """Return ``codes * s`` in fp32, of the shape of ``codes``."""
        return self._ungroup(self._group(codes.to(torch.float32)) * positive(self._scale_in_force()), codes)

    @torch.no_grad()
    def step_size(self, x: Tensor) -> Tensor:
        """Return s, broadcastable against ``x``."""
        if self.group_size is None:
            return positive(self._scale_in_force())
        return self.dequantize(torch.ones_like(x))

    def _hold(self, scale: Tensor) -> Tensor:
        return nn.Parameter(scale, requires_grad=self.scale.requires_grad)

    def _rows(self, x: Tensor) -> Tensor:
        if self.granularity == "per_tensor":
            return x.reshape(1, -1)
        assert self.axis is not None
        size = self.group_size or x.numel() // max(channel_count(x, self.axis), 1)
        return to_groups(x, self.axis, size).flatten(0, 1)

    def _scale_shape(self, x: Tensor) -> tuple[int, ...]:
        if self.granularity == "per_tensor":
            return (1,)
        assert self.axis is not None
        if self.granularity == "per_group":
            return (channel_count(x, self.axis), -1, 1)
        axes = channel_axes(self.axis, x.dim())
        return tuple(x.shape[d] if d in axes else 1 for d in range(x.dim()))

    def _count(self, x: Tensor) -> int:
        """Return N: the entries that share one step size; for an activation, the features of one sample."""
        if self.axis is None:
            return x.numel() // max(self._sample_count(x), 1)
        return x.numel() // max(self.scale.numel(), 1)

    def _sample_count(self, x: Tensor) -> int:
        """Return the number of samples in a batch of an activation; 1 if it is a single sample."""
        if self.batch_first is None:
            return x.shape[0] if x.dim() > 1 else 1
        return x.shape[0 if self.batch_first else 1] if x.dim() > 2 else 1

    def _group(self, x: Tensor) -> Tensor:
        if self.group_size is None:
            return x
        assert self.axis is not None
        return to_groups(x, self.axis, self.group_size)

    def _ungroup(self, groups: Tensor, like: Tensor) -> Tensor:
        if self.group_size is None:
            return groups
        assert self.axis is not None
        return from_groups(groups, like.shape, self.axis)


QUANTIZERS.alias("per_channel", LSQ, granularity="per_channel")
