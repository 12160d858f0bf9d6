"""The deterministic inputs on which the laws are asked: ties, bounds, zeros, extremes, four dtypes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from qsam.quantizers import Quantizer
from qsam.testing.case import owners, row_count

WEIGHT_SHAPE = (4, 6, 4)
"""24 or 16 entries a channel. Axes 0 and 2 have one size, so that a scale along the wrong one may fit."""

ACTIVATION_SHAPE = (3, 4, 8)
"""Batch, length, features: 32 features a sample."""

GROUP_SIZE = 8
"""Divides the channels of WEIGHT_SHAPE along every axis."""

SHORT = ("normal", "heavy", "zero_channel", "edges", "ties")
"""The inputs of ordinary size, in fp32."""

NARROWER = ("edges", "ties")
"""What all grids but the widest are asked on."""

GRADIENT = (*SHORT, "normal_bfloat16", "normal_float16", "normal_float64", "edges_bfloat16", "edges_float64")
"""The inputs on which gradients are compared with their closed forms."""

Entry = tuple[str, Tensor, Tensor | None]


def shape_of(q: Quantizer) -> tuple[int, ...]:
    """Return the shape of the inputs for ``q``: a weight's, or an activation's where it has no axis."""
    return ACTIVATION_SHAPE if q.axis is None else WEIGHT_SHAPE


def normal(shape: tuple[int, ...], signed: bool) -> Tensor:
    """Return N(0, .1^2) entries, their magnitudes where unsigned; always the same ones."""
    x = 0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return x if signed else x.abs()


def battery(q: Quantizer) -> Iterator[Entry]:
    """Yield (label, input, scale of each row or None) for a quantizer in the setting of ``q``."""
    x = normal(shape_of(q), q.signed is not False)
    plain = [("normal", x, None), *_special(x), *_extreme(x)]
    on_grid = [("edges", *_edges(q, x)), ("ties", *_ties(q, x))]
    yield from plain
    yield from on_grid
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        suffix = str(dtype).removeprefix("torch.")
        for label, values, scale in (plain[0], on_grid[0]):
            yield f"{label}_{suffix}", values.to(dtype), scale


def _special(x: Tensor) -> Iterator[Entry]:
    generator = torch.Generator().manual_seed(1)
    yield "heavy", x / torch.rand(x.shape, generator=generator).clamp_min(1e-3), None
    yield "zeros", torch.zeros_like(x), None
    yield "constant", torch.full_like(x, 0.3), None
    yield "negative", torch.full_like(x, -0.3), None
    hollow = x.clone()
    hollow[1], hollow[:, 2] = 0, 0
    yield "zero_channel", hollow, None


def _extreme(x: Tensor) -> Iterator[Entry]:
    yield "subnormal", x * 1e-39, None
    yield "tiny", x * 1e-30, None
    yield "huge", x * 1e30, None
    yield "spread", x * torch.logspace(-30, 30, x.numel()).reshape(x.shape), None


def _limits(q: Quantizer) -> tuple[int, int]:
    """Return the limits of the grid, by their definition and not by the quantizer's word."""
    return (0, 2**q.bits - 1) if q.signed is False else (-(2 ** (q.bits - 1)), 2 ** (q.bits - 1) - 1)


def _edges(q: Quantizer, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return exact halves, exact bounds and their neighbours, in units of scales that are powers of two."""
    low, high = _limits(q)
    offsets = torch.tensor([-1.5, -0.5, -0.25, 0.0, 0.25, 0.5, 1.5])
    zero = torch.zeros(1)
    bounds = torch.tensor([float(low), float(high)])
    units = torch.cat([low + offsets, offsets, high + offsets, -zero, torch.nextafter(bounds, zero)])
    scale = 2.0 ** -(torch.arange(row_count(q, like)) % 3 + 1)
    return _fill(units, like) * scale[owners(q, like)], scale


def _ties(q: Quantizer, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return (k + 1/2) * s for scales that are no powers of two: x * (1/s) rounds many of them to the other side."""
    low, high = _limits(q)
    units = (low + 7 * torch.arange(like.numel()) % (high - low + 1)).float() + 0.5
    scale = 0.1 + 0.0137 * torch.arange(row_count(q, like))
    return _fill(units, like) * scale[owners(q, like)], scale


def _fill(units: Tensor, like: Tensor) -> Tensor:
    return units[torch.arange(like.numel()) % units.numel()].reshape(like.shape)
