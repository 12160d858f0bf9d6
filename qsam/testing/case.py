"""One quantizer, one setting, one input: what every law is asked about."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qsam.quantizers import Quantizer

_SHOWN = 3
"""How many offending entries a message shows."""


@dataclass(frozen=True, eq=False)
class Case:
    """A quantizer class in one setting, and one input.

    Args:
        cls: The class under test.
        x: The input, any shape of one or more dimensions, floating.
        config: The keyword arguments of ``cls``: bits, signed, granularity, axis, group_size.
        scale: One step size a row (see :func:`owners`), flat and fp32, that replaces the initial one where the
            quantizer holds a ``scale``; None keeps the initial one.
        label: What the input is, for messages.
    """

    cls: type[Quantizer]
    x: Tensor
    config: Mapping[str, Any] = field(default_factory=lambda: {"bits": 4})
    scale: Tensor | None = None
    label: str = "input"

    @functools.cached_property
    def quantizer(self) -> Quantizer:
        """The quantizer as :meth:`build` gives it, one for all laws that leave its state alone."""
        return self.build()

    def build(self, x: Tensor | None = None, **changes: Any) -> Quantizer:
        """Return a new quantizer, set from ``x`` (default: the case's own input), with ``changes`` to the setting.

        The initial scale is the LSQ paper's: it is cheap, and it clips, which a law about clipping needs. A row of
        zeros, which has no scale yet, gets 1.
        """
        q = self.cls(**{**self.config, **changes})
        q.init = "lsq"
        q.observe_((self.x if x is None else x).clone())  # a copy: a class under test may write its data
        if holds_scale(q) and scale_of(q).numel() == row_count(q, self.x):
            rows, counts = owners(q, self.x).flatten(), torch.zeros(row_count(q, self.x), dtype=torch.int64)
            hollow = counts.index_add(0, rows, (self.x != 0).flatten().to(torch.int64)) == 0
            set_scale(q, torch.where(hollow & (scale_of(q).flatten() == 0), 1, scale_of(q).flatten()))
        if self.scale is not None and holds_scale(q) and scale_of(q).numel() == self.scale.numel():
            set_scale(q, self.scale)
        return q

    def __str__(self) -> str:
        setting = ", ".join(f"{key}={value!r}" for key, value in self.config.items() if value is not None)
        dtype = str(self.x.dtype).removeprefix("torch.")
        return f"{self.cls.__name__}({setting}) on {self.label!r}, {dtype} of shape {tuple(self.x.shape)}"


def is_uniform(q: Quantizer) -> bool:
    """Whether ``q`` shows a symmetric uniform grid: a tensor ``scale``, codes or a step size, and no ``zero_point``."""
    has_codes = type(q).codes is not Quantizer.codes or type(q).step_size is not Quantizer.step_size
    return isinstance(getattr(q, "scale", None), Tensor) and has_codes and not hasattr(q, "zero_point")


def holds_scale(q: Quantizer) -> bool:
    """Whether ``q`` is uniform and its ``scale`` is its own Parameter or buffer, so that a law can set it."""
    return is_uniform(q) and "scale" in {**q._parameters, **q._buffers}


def learns_scale(q: Quantizer) -> bool:
    """Whether ``q`` is uniform and its ``scale`` is a Parameter."""
    return is_uniform(q) and isinstance(q.scale, nn.Parameter)


def scale_of(q: Quantizer) -> Tensor:
    """Return a copy of ``q.scale``."""
    assert isinstance(q.scale, Tensor)
    return q.scale.detach().clone()


def codes_of(q: Quantizer, x: Tensor) -> Tensor:
    """Return ``q.codes(x)``."""
    return q.codes(x)


@torch.no_grad()
def set_scale(q: Quantizer, values: Tensor) -> None:
    """Write ``values``, one step size a row, into ``q.scale`` in place."""
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
    assert q.axis is not None
    axis = q.axis % x.dim()
    channels_first = [x.shape[axis], *(size for dim, size in enumerate(x.shape) if dim != axis)]
    in_a_row = q.group_size or x.numel() // x.shape[axis]
    return (torch.arange(x.numel()) // in_a_row).reshape(channels_first).movedim(0, axis)


def row_count(q: Quantizer, x: Tensor) -> int:
    """Return how many rows, each with one scale, ``q`` divides ``x`` into."""
    return int(owners(q, x).max()) + 1 if x.numel() else 0


def claim(ok: Tensor | bool, sentence: str, **values: Tensor) -> None:
    """Raise unless ``ok`` holds everywhere.

    Args:
        ok: One truth value, or one an entry.
        sentence: What must hold, why or what to change; ends in a full stop.
        values: Tensors of the shape of ``ok``, of which the first offending entries are shown.

    Raises:
        AssertionError: with ``sentence`` and those entries.
    """
    wrong = ~torch.as_tensor(ok)
    if not bool(wrong.any()):
        return
    shown = [f"{name}={value.detach().expand(wrong.shape)[wrong][:_SHOWN].tolist()}" for name, value in values.items()]
    count = f" {int(wrong.sum())} of {wrong.numel()} entries break it, first {', '.join(shown)}." if shown else ""
    raise AssertionError(sentence + count)


def same(a: Tensor, b: Tensor) -> Tensor:
    """Compare entry by entry, NaN equal to NaN."""
    return (a == b) | (a.isnan() & b.isnan())
