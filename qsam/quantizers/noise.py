r"""Noise instead of rounding while an optimizer's pass is running; the exact Q(x) at any other time.

    Q~(x; s) = s * c,   c = v + error   where M,   clip(v, Qn, Qp) elsewhere;   v = x / s,   M = 1[Qn < v < Qp]
    dQ~/dx = M,         dQ~/ds = c - v  where M,   c elsewhere

The error is a function of v and of a uniform u in (-.5, .5) per entry. u is a hash of (seed, step, index of the entry):
it is the same in every pass of a step and in the pull-back, on every device, and uses no global generator.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from qsam.functional import lsq_grad_scale, positive, wide_dtype
from qsam.quantizers.lsq import LSQ

_FACTOR = 0x45D9F3B
_SHORT = 0xFFFF


def mix_(x: Tensor) -> Tensor:
    """Replace each 32-bit integer by its hash, one to one, in place: products are modulo 2^32.

    Example:
        >>> mix_(torch.arange(3, dtype=torch.int32)).tolist()
        [0, 824515495, 1722258072]
    """
    for _ in range(2):
        x.bitwise_xor_((x >> 16).bitwise_and_(_SHORT)).mul_(_FACTOR)
    return x.bitwise_xor_((x >> 16).bitwise_and_(_SHORT))


def uniform(shape: tuple[int, ...], key: Tensor, dtype: torch.dtype) -> Tensor:
    """Return numbers in (-.5, .5), evenly spread: a pure function of ``key`` and the index of each entry.

    Args:
        shape: The shape of the result; less than 2^31 entries.
        key: 0-dimensional int32, on the result's device.
        dtype: fp32 or fp64; there are 2^24 different numbers in either.
    """
    words = mix_(_indices(math.prod(shape), key.device).bitwise_xor_(key))
    return words.bitwise_right_shift_(8).to(dtype).add_(0.5).mul_(2.0**-24).reshape(shape)


def _indices(count: int, device: torch.device) -> Tensor:
    return torch.arange(count, dtype=torch.int32, device=device)


class Noise(nn.Module):
    """A stream of uniform noise, held by a quantizer of any class. Optimizers set :attr:`on` during their passes.

    Attributes:
        on: Whether to draw. It is a Python flag, because a tensor would break compiled graphs.
        seed (buffer): Distinguishes this stream from others; set from the data.
        step (buffer): The index of the current draw; it moves once per optimizer step.
    """

    on: bool = False
    seed: Tensor
    step: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seed", torch.zeros((), dtype=torch.int64))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def seed_(self, x: Tensor) -> None:
        """Set the seed from data, so that layers differ. To draw other noise for the same weights, write ``seed``."""
        words = x.detach().to(torch.float32).flatten().view(torch.int32)
        words = mix_(words ^ mix_(_indices(words.numel(), words.device)))
        self.seed.copy_(words.sum() & 0x7FFFFFFF)

    @torch.no_grad()
    def advance(self) -> None:
        """Go on to the next draw."""
        self.step.add_(1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the noise of this step for a tensor of the shape of ``x``, in fp32 (fp64 for fp64)."""
        key = mix_(self.seed.to(torch.int32) ^ mix_(self.step.to(torch.int32)))
        return uniform(tuple(x.shape), key, wide_dtype(x.dtype))


class Noisy(LSQ):
    """LSQ while ``noise.on`` is False; otherwise :meth:`noisy_codes` instead of rounding. Not registered.

    The noise of an activation (no ``axis``) also needs training mode.
    """

    def __init__(self, **setting: Any) -> None:
        super().__init__(**setting)
        self.noise = Noise()

    @torch.no_grad()
    def init_(self, x: Tensor) -> None:
        """Set ``scale`` and the noise's seed from the data."""
        super().init_(x)
        self.noise.seed_(x)

    def update(self, w: Tensor) -> None:
        """Go on to the next draw."""
        self.noise.advance()

    def forward(self, x: Tensor) -> Tensor:
        """Return Q(x), or Q~(x) while the noise is on."""
        if not self.noise.on or (self.axis is None and not self.training):
            return super().forward(x)
        grad_scale = lsq_grad_scale(self._count(x), self.quant_max)
        return self._ungroup(self._perturbed(self._group(x), self._group(self.noise(x)), grad_scale), x)

    def noisy_codes(self, v: Tensor, u: Tensor) -> Tensor:
        """Return c.

        Args:
            v: x / s, clipped; fp32 or fp64.
            u: Uniform in (-.5, .5), of the shape and dtype of v.
        """
        raise NotImplementedError

    def _perturbed(self, x: Tensor, u: Tensor, grad_scale: float) -> Tensor:
        """Return Q~(x) with its gradient, by adding terms whose value is exactly 0."""
        wide = wide_dtype(x.dtype)
        s = positive(self._scale_in_force().detach()).to(wide)
        v = x.detach().to(wide) / s
        inside = (v > self.quant_min) & (v < self.quant_max)
        clipped = v.clamp(self.quant_min, self.quant_max)
        codes = torch.where(inside, self.noisy_codes(clipped, u), clipped)
        slope = torch.where(inside, codes - v, codes) * grad_scale
        magnitude = torch.where(self.scale < 0, -self.scale, self.scale)
        nil_x = torch.where(inside, x - x.detach(), 0).to(wide)
        nil_s = (magnitude - magnitude.detach()).to(wide)
        return (codes * s + nil_x + slope * nil_s).to(x.dtype)
