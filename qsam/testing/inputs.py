"""The inputs of the laws: a quantizer in one setting, and tensors with ties, bounds, zeros and extremes in four dtypes.

They are the same in every run.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qsam.quantizers import Quantizer

WEIGHT_SHAPE = (4, 6, 4)
"""24 or 16 entries per channel. Axes 0 and 2 have one size, so a scale along the wrong one of them still fits."""

ACTIVATION_SHAPE = (3, 4, 8)
"""Batch, length, features: 32 features per sample."""

GROUP_SIZE = 8
"""Divides the channels of WEIGHT_SHAPE along every axis."""

PLAIN = ("normal", "normal_bfloat16")
"""The inputs for laws that do not depend on particular values."""

SHORT = ("normal", "heavy", "zero_channel", "edges", "ties")
"""The inputs of ordinary size, in fp32."""

NARROWER = ("edges", "ties")
"""The inputs for all grids but the widest."""

GRADIENT = (*SHORT, "normal_bfloat16", "normal_float16", "normal_float64", "edges_bfloat16", "edges_float64")
"""The inputs on which gradients are compared with their closed forms."""


@dataclass(frozen=True, eq=False)
class Case:
    """A quantizer class in one setting, and one input.

    Args:
        cls: The class under test.
        x: The input, any shape of one or more dimensions, floating.
        config: The keyword arguments of ``cls``: bits, signed, granularity, axis, group_size.
        scale: One step size per row (see :func:`owners`), flat and fp32, which replaces the initial one if the
            quantizer holds a ``scale``; None keeps the initial one.
        label: The name of the input, for messages.
    """

    cls: type[Quantizer]
    x: Tensor
    config: Mapping[str, Any] = field(default_factory=lambda: {"bits": 4})
    scale: Tensor | None = None
    label: str = "input"

    @functools.cached_property
    def quantizer(self) -> Quantizer:
        """The result of :meth:`build`, shared by all laws that do not change its state."""
        return self.build()

    def build(self, x: Tensor | None = None, **changes: Any) -> Quantizer:
        """Return a new quantizer, set from ``x`` (default: the case's own input), with ``changes`` to the setting.

        The initial scale is the LSQ paper's, because it is cheap and clips, which laws about clipping need.
        """
        q = self.cls(**{**self.config, **changes})
        q.init = "lsq"
        q.observe_((self.x if x is None else x).clone())  # a copy, because a class under test may write its data
        if self.scale is not None and holds_scale(q) and scale_of(q).numel() == self.scale.numel():
            set_grid(q, self.scale)
        return q

    def __str__(self) -> str:
        setting = ", ".join(f"{key}={value!r}" for key, value in self.config.items() if value is not None)
        dtype = str(self.x.dtype).removeprefix("torch.")
        return f"{self.cls.__name__}({setting}) on {self.label!r}, {dtype} of shape {tuple(self.x.shape)}"


def is_uniform(q: Quantizer) -> bool:
    """Whether ``q`` has a uniform grid: a tensor ``scale``, or a dynamic one, and codes or a step size."""
    own_codes = getattr(type(q), "codes", None) is not getattr(Quantizer, "codes", None)
    own_grid = own_codes or (hasattr(q, "codes") and type(q).step_size is not Quantizer.step_size)
    return (q.dynamic or isinstance(getattr(q, "scale", None), Tensor)) and own_grid and not hasattr(q, "zero_point")


def holds_scale(q: Quantizer) -> bool:
    """Whether ``q`` is uniform and its ``scale`` is its own Parameter or buffer, so that a law can set it."""
    return is_uniform(q) and "scale" in {**q._parameters, **q._buffers}


def scale_of(q: Quantizer) -> Tensor:
    """Return a copy of ``q.scale``."""
    assert isinstance(q.scale, Tensor)
    return q.scale.detach().clone()


def shift_of(q: Quantizer) -> Tensor | None:
    """Return a copy of the shift of all levels, or None."""
    return None if q.shift is None else q.shift.detach().clone()


@torch.no_grad()
def set_shift(q: Quantizer, values: Tensor) -> None:
    """Write ``values``, one per row, into the shift of all levels."""
    assert q.shift is not None
    getattr(q, "set_shift_")(values.reshape(q.shift.shape))  # noqa: B009  (not every quantizer has this method)


def set_grid(q: Quantizer, values: Tensor) -> None:
    """Write step sizes, and the shift that makes the lowest level that of LSQ in the same setting."""
    set_scale(q, values)
    if q.shift is not None:
        set_shift(q, (_limits(q)[0] - q.quant_min) * scale_of(q))


@torch.no_grad()
def set_scale(q: Quantizer, values: Tensor) -> None:
    """Write ``values``, one step size per row, into ``q.scale`` in place."""
    assert isinstance(q.scale, Tensor)
    q.scale.copy_(values.reshape(q.scale.shape))


def owners(q: Quantizer, x: Tensor) -> Tensor:
    """Return for each entry of ``x`` the row (tensor, channel or group) whose scale it uses, counted from 0.

    Example:
        >>> from qsam.quantizers import LSQ
        >>> owners(LSQ(bits=4, granularity="per_channel", axis=1), torch.zeros(2, 3)).tolist()
        [[0, 1, 2], [0, 1, 2]]
    """
    if q.granularity == "per_tensor":
        return torch.zeros(x.shape, dtype=torch.int64)
    assert isinstance(q.axis, int)
    axis = q.axis % x.dim()
    channels_first = [x.shape[axis], *(size for dim, size in enumerate(x.shape) if dim != axis)]
    per_row = q.group_size or x.numel() // x.shape[axis]
    return (torch.arange(x.numel()) // per_row).reshape(channels_first).movedim(0, axis)


def row_count(q: Quantizer, x: Tensor) -> int:
    """Return the number of rows, each with one scale, into which ``q`` divides ``x``."""
    return int(owners(q, x).max()) + 1 if x.numel() else 0


def normal(q: Quantizer) -> Tensor:
    """Return N(0, .1^2) entries, their magnitudes if ``q`` is unsigned, in the shape of a weight or an activation."""
    shape = ACTIVATION_SHAPE if q.axis is None else WEIGHT_SHAPE
    x = 0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return x.abs() if q.signed is False else x


def battery(q: Quantizer) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Return inputs for a quantizer in the setting of ``q``: label -> (tensor, step size of each row or None)."""
    x = normal(q)
    uniform = torch.rand(x.shape, generator=torch.Generator().manual_seed(1))
    hollow = x.clone()
    hollow[1], hollow[:, 2] = 0, 0
    inputs: dict[str, tuple[Tensor, Tensor | None]] = {
        "normal": (x, None),
        "heavy": (x / uniform.clamp_min(1e-3), None),
        "zeros": (torch.zeros_like(x), None),
        "constant": (torch.full_like(x, 0.3), None),
        "negative": (torch.full_like(x, -0.3), None),
        "zero_channel": (hollow, None),
        "subnormal": (x * 1e-39, None),
        "tiny": (x * 1e-30, None),
        "huge": (x * 1e30, None),
        "spread": (x * torch.logspace(-30, 30, x.numel()).reshape(x.shape), None),
        "edges": _edges(q, x),
        "ties": _ties(q, x),
    }
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        for label in ("normal", "edges"):
            values, scale = inputs[label]
            inputs[f"{label}_{str(dtype).removeprefix('torch.')}"] = values.to(dtype), scale
    return inputs


def _limits(q: Quantizer) -> tuple[int, int]:
    """Return the limits of the grid by their definition, independently of the quantizer."""
    return (0, 2**q.bits - 1) if q.signed is False else (-(2 ** (q.bits - 1)), 2 ** (q.bits - 1) - 1)


def _edges(q: Quantizer, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return exact halves, exact bounds and their neighbours, in units of scales that are powers of two."""
    low, high = _limits(q)
    offsets = torch.tensor([-1.5, -0.5, -0.25, 0.0, 0.25, 0.5, 1.5])
    inner = torch.nextafter(torch.tensor([float(low), float(high)]), torch.zeros(1))
    units = torch.cat([low + offsets, offsets, high + offsets, torch.tensor([-0.0]), inner])
    scale = 2.0 ** -(torch.arange(row_count(q, like)) % 3 + 1)
    return units[torch.arange(like.numel()) % units.numel()].reshape(like.shape) * scale[owners(q, like)], scale


def _ties(q: Quantizer, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return (k + 1/2) * s for scales that are not powers of two: x * (1/s) rounds many of them to the other side."""
    low, high = _limits(q)
    units = (low + 7 * torch.arange(like.numel()) % (high - low + 1)).float() + 0.5
    scale = 0.1 + 0.0137 * torch.arange(row_count(q, like))
    return units.reshape(like.shape) * scale[owners(q, like)], scale
