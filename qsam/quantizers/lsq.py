"""LSQ: a uniform grid whose step size is learned.

    Q(x; s) = s * round(clip(x / s, Qn, Qp)),   ds scaled by 1 / sqrt(N * Qp)

One s a tensor, a channel or a group; N counts the entries that share one s, of one sample.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qsam import kernels
from qsam.functional import fake_quantize, from_groups, lsq_grad_scale, positive, quantize, to_groups
from qsam.quantizers.base import Quantizer, register_quantizer
from qsam.scales import initial_scale


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

    _known: tuple[Any, Any] | None = None
    """The last shape, which is mostly the next one, and its grid without the scale."""

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
        self.scale = nn.Parameter(torch.ones(1))

    @torch.no_grad()
    def init_(self, x: Tensor) -> None:
        """Set ``scale`` from the data, by the rule in ``self.init``.

        Args:
            x: The weight, or a batch of the activation.
        """
        scale = initial_scale(self._rows(x), self.quant_min, self.quant_max, self.init)
        scale = scale.reshape(self._scale_shape(x)).to(x.device)
        if self.scale.shape == scale.shape and self.scale.device == scale.device:
            self.scale.copy_(scale)
        else:
            self.scale = self._hold(scale)

    def forward(self, x: Tensor) -> Tensor:
        """Return Q(x), of the shape and dtype of ``x``."""
        grid = self.grid(x)
        fused = None if grid is None else kernels.quantized(x, grid)
        if fused is not None:
            return fused
        grad_scale = lsq_grad_scale(self._count(x), self.quant_max)
        return self._ungroup(fake_quantize(self._group(x), self.scale, self.quant_min, self.quant_max, grad_scale), x)

    def grid(self, x: Tensor) -> kernels.Grid | None:
        """Return what Q is, for the fused kernels; None where step sizes do not belong to contiguous rows of ``x``."""
        if torch.compiler.is_compiling():
            return None
        scale, known = self.scale, self._known
        key = (x.shape, scale.shape, self.bits, self.signed, self.granularity, self.axis, self.group_size)
        if known is not None and known[0] == key:
            return kernels.Grid(scale, *known[1])
        found = self._new_grid(x)
        if found is not None and self._limits_are_those_of_bits:
            self._known = key, found[1:]
        return found

    def _new_grid(self, x: Tensor) -> kernels.Grid | None:
        if not self._is_lsq or not (self.axis == 0 or self.granularity == "per_tensor"):
            return None
        scale, quant_min, quant_max = self.scale, self.quant_min, self.quant_max
        if self.group_size is not None and x.numel() != scale.numel() * self.group_size:
            return None
        return kernels.Grid(scale, quant_min, quant_max, lsq_grad_scale(self._count(x), quant_max), scale.numel())

    @property
    def _limits_are_those_of_bits(self) -> bool:
        cls = type(self)
        return cls.quant_min is Quantizer.quant_min and cls.quant_max is Quantizer.quant_max

    @property
    def _is_lsq(self) -> bool:
        """Whether Q is what is written here, and not what a subclass made of it."""
        return type(self).forward is LSQ.forward

    @torch.no_grad()
    def codes(self, x: Tensor) -> Tensor:
        """Return the integers of ``x``: int8 (uint8 where unsigned), of its shape; ``codes * scale`` is Q(x)."""
        codes = quantize(self._group(x), self.scale, self.quant_min, self.quant_max)
        return self._ungroup(codes, x).to(torch.uint8 if self.signed is False else torch.int8)

    @torch.no_grad()
    def dequantize(self, codes: Tensor) -> Tensor:
        """Return ``codes * s`` in fp32, of the shape of ``codes``."""
        return self._ungroup(self._group(codes.to(torch.float32)) * positive(self.scale), codes)

    @torch.no_grad()
    def step_size(self, x: Tensor) -> Tensor:
        """Return s, broadcastable against ``x``."""
        if self.group_size is None:
            return positive(self.scale)
        return self.dequantize(torch.ones_like(x))

    def _hold(self, scale: Tensor) -> Tensor:
        return nn.Parameter(scale, requires_grad=self.scale.requires_grad)

    def _rows(self, x: Tensor) -> Tensor:
        if self.granularity == "per_tensor":
            return x.reshape(1, -1)
        assert self.axis is not None
        return to_groups(x, self.axis, self.group_size or x.numel() // max(x.shape[self.axis], 1)).flatten(0, 1)

    def _scale_shape(self, x: Tensor) -> tuple[int, ...]:
        if self.granularity == "per_tensor":
            return (1,)
        assert self.axis is not None
        if self.granularity == "per_group":
            return (x.shape[self.axis], -1, 1)
        return tuple(x.shape[d] if d == self.axis % x.dim() else 1 for d in range(x.dim()))

    def _count(self, x: Tensor) -> int:
        """Return N: the entries that share one step size; for an activation, the features of one sample."""
        if self.axis is None:
            return x.numel() // x.shape[0] if x.dim() > 1 and len(x) else x.numel()
        return x.numel() // max(self.scale.numel(), 1)

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


@register_quantizer("per_channel")
class PerChannel(LSQ):
    """LSQ with a scale per output channel, whatever granularity the call asked for.

    It exists so that a registered name can say "per channel" where only a name can be given.
    """

    def __init__(
        self,
        *,
        bits: int,
        signed: bool | None = True,
        granularity: str = "per_channel",
        axis: int | None = None,
        group_size: int | None = None,
    ) -> None:
        if granularity == "per_group":
            raise ValueError(
                "the quantizer 'per_channel' has one scale a channel: use 'lsq' for granularity 'per_group'."
            )
        super().__init__(bits=bits, signed=signed, granularity="per_channel", axis=axis, group_size=group_size)
