"""GOBO: for rounding after training. Outliers of a Gaussian stay float; the other weights go to few centroids.

    outliers:  log N(w; mean, std) <= -4
    centroids: start from the means of 2^bits bins of equal population; repeat "assign to the nearest, take the means",
               and keep the iterate with the least sum of |w - centroid|

References:
    Zadeh et al., GOBO: Quantizing Attention-Based NLP Models for Low Latency and Energy Efficient Inference, MICRO
    2020, arXiv 2005.03842, section 4.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from qsam.functional import wide_dtype
from qsam.quantizers.base import Quantizer, register_quantizer

LOG_DENSITY = -4.0
"""The paper's bound of the outliers."""

LEAST_DEVIATIONS = 3.0
"""Outliers lie at least this many standard deviations from the mean. A density depends on the unit of the weights: for
a deviation of more than .24 the paper's rule alone would keep more than the tails, and from 22 on everything."""

_ROUNDS = 50


class _Nearest(torch.autograd.Function):
    """The nearest centroid, or x itself if it is an outlier; the gradient passes straight through."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, centroids: Tensor, bounds: Tensor) -> Tensor:
        wide = x.to(wide_dtype(x.dtype))
        values = centroids.to(wide.dtype)[_nearest(wide, centroids)]
        return torch.where((wide <= bounds[0]) | (wide >= bounds[1]), wide, values).to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad, None, None


def _nearest(x: Tensor, centroids: Tensor) -> Tensor:
    """Return the index of the nearest centroid, the lower of two that are equally near."""
    middles = (centroids[:-1].to(x.dtype) + centroids[1:].to(x.dtype)) / 2
    return torch.bucketize(x.contiguous(), middles)


@register_quantizer("gobo")
class GOBO(Quantizer):
    """Centroids of one weight, and its outliers in full precision. Nothing is learned.

    The levels are not a uniform grid: there is no step size, ``grid`` is None, and codes are indices of centroids, to
    be used with ``dequantize`` and :meth:`outliers` only.

    Args:
        setting: As :class:`~qsam.quantizers.base.Quantizer`. Granularity ``"per_tensor"`` with an ``axis``: weights
            only, and one set of centroids per layer.

    Attributes:
        centroids: Buffer, fp32, shape ``(2^bits,)``, ascending.
        bounds: Buffer, fp32, shape ``(2,)``: outliers lie at or beyond these.

    Raises:
        ValueError: ``axis`` is None (an input), the granularity is another one, or an argument is out of its range.

    Example:
        >>> q = GOBO(bits=2, axis=0)
        >>> w = torch.tensor([[-1.1, -0.9, -0.4, -0.2, 0.2, 0.4, 0.9, 1.1]])
        >>> q.observe_(w)
        >>> q(w)
        tensor([[-1.0000, -1.0000, -0.3000, -0.3000,  0.3000,  0.3000,  1.0000,  1.0000]])

    Differs from the paper: the bounds are at least three standard deviations from the mean.
    """

    centroids: Tensor
    bounds: Tensor

    def __init__(self, **setting: Any) -> None:
        if setting.get("granularity", "per_tensor") != "per_tensor":
            raise ValueError(
                f"the quantizer 'gobo' has one set of centroids per layer: granularity must be 'per_tensor', got "
                f"{setting['granularity']!r}."
            )
        super().__init__(**setting)
        if self.axis is None:
            raise ValueError("the quantizer 'gobo' is for weights: use activations=None, or 'lsq', for inputs.")
        self.register_buffer("centroids", torch.linspace(-1, 1, 2**self.bits, dtype=torch.float32))
        self.register_buffer("bounds", torch.tensor([-math.inf, math.inf], dtype=torch.float32).clamp(*_ENDS))

    @torch.no_grad()
    def init_(self, x: Tensor) -> None:
        """Fit Gaussian and centroids to the weight; raise ValueError if it holds NaN or infinity."""
        w = x.detach().double().flatten()
        if not bool(w.isfinite().all()):
            raise ValueError("the centroids cannot be set from data that holds NaN or infinity.")
        if not w.numel():
            return
        low, high = _bounds(w)
        inliers = w[(w > low) & (w < high)].sort().values
        self.bounds.copy_(torch.stack([low, high]).clamp(*_ENDS))
        self.centroids.copy_(_centroids(inliers if inliers.numel() else w.sort().values, 2**self.bits))

    def forward(self, x: Tensor) -> Tensor:
        """Return Q(x), of the shape and dtype of ``x``."""
        return _Nearest.apply(x, self.centroids, self.bounds)  # type: ignore[no-any-return]

    @torch.no_grad()
    def outliers(self, x: Tensor) -> Tensor:
        """Return which entries stay float."""
        wide = x.to(wide_dtype(x.dtype))
        return (wide <= self.bounds[0]) | (wide >= self.bounds[1])

    @torch.no_grad()
    def codes(self, x: Tensor) -> Tensor:
        """Return indices of centroids: uint8, of the shape of ``x``; those of outliers mean nothing."""
        return _nearest(x.to(wide_dtype(x.dtype)), self.centroids).to(torch.uint8)

    @torch.no_grad()
    def dequantize(self, codes: Tensor) -> Tensor:
        """Return the centroids in fp32, of the shape of ``codes``."""
        return self.centroids[codes.long()]


_ENDS = (-torch.finfo(torch.float32).max, torch.finfo(torch.float32).max)


def _bounds(w: Tensor) -> tuple[Tensor, Tensor]:
    mean, std = w.mean(), w.std(correction=0)
    if not std > 0:
        return mean - torch.inf, mean + torch.inf
    square = 2 * (-LOG_DENSITY - torch.log(std * math.sqrt(2 * math.pi)))
    radius = std * square.clamp_min(LEAST_DEVIATIONS**2).sqrt()
    return mean - radius, mean + radius


def _centroids(w: Tensor, count: int) -> Tensor:
    """Return ``count`` ascending centroids of ascending values, of the least L1 error among the iterates."""
    total = torch.cat([w.new_zeros(1), w.cumsum(0)])
    edges = (torch.arange(count + 1, device=w.device) * len(w)) // count
    best, least = w[:1].expand(count), w.new_tensor(torch.inf)
    centroids = w.new_zeros(count)
    for _ in range(_ROUNDS):
        sizes = edges.diff()
        means = (total[edges[1:]] - total[edges[:-1]]) / sizes.clamp_min(1)
        nearest = w[edges[:-1].clamp_max(len(w) - 1)]
        # A bin's mean lies in the bin, but the difference of two rounded sums may not.
        lowest, highest = nearest, torch.where(sizes > 0, w[(edges[1:] - 1).clamp_min(0)], nearest)
        centroids = torch.maximum(torch.minimum(torch.where(sizes > 0, means, nearest), highest), lowest)
        error = (w - centroids.repeat_interleave(sizes)).abs().sum()
        if not error < least:
            break
        best, least = centroids, error
        middles = (centroids[:-1] + centroids[1:]) / 2
        inner = torch.searchsorted(w, middles, right=True)
        edges = torch.cat([edges[:1], inner, edges[-1:]])
    return best.float()
