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

        The initial scale is the LSQ paper's: it is cheap, and it clips, which a law about clipping needs.
        """
        q = self.cls(**{**self.config, **changes})
        q.init = "lsq"
        q.observe_((self.x if x is None else x).clone())  # a copy: a class under test may write its data
        if self.scale is not None and holds_scale(q) and scale_of(q).numel() == self.scale.numel():
            set_grid(q, self.scale)
        return q

    def __str__(self) -> str:
        setting = ", ".join(f"{key}={value!r}" for key, value in self.config.items() if value is not None)
        dtype = str(self.x.dtype).removeprefix("torch.")
        return f"{self.cls.__name__}({setting}) on {self.label!r}, {dtype} of shape {tuple(self.x.shape)}"


def is_uniform(q: Quantizer) -> bool:
    """Whether ``q`` has a uniform grid: a method ``codes``, and a tensor ``scale`` or, if dynamic, a ``step_size``."""
    return hasattr(q, "codes") and (q.dynamic or isinstance(getattr(q, "scale", None), Tensor))


def holds_scale(q: Quantizer) -> bool:
    """Whether ``q`` is uniform and its ``scale`` is its own Parameter or buffer, so that a law can set it."""
    return is_uniform(q) and "scale" in {**q._parameters, **q._buffers}


def learns_scale(q: Quantizer) -> bool:
    """Whether ``q`` is uniform and its ``scale`` is a Parameter."""
    return holds_scale(q) and isinstance(q.scale, nn.Parameter)


def learns_shift(q: Quantizer) -> bool:
    """Whether ``q`` is uniform and a Parameter moves all its levels together."""
    return learns_scale(q) and isinstance(q.shift, Tensor) and q.shift.requires_grad


def scale_of(q: Quantizer) -> Tensor:
    """Return a copy of ``q.scale``."""
    assert isinstance(q.scale, Tensor)
    return q.scale.detach().clone()


def shift_of(q: Quantizer) -> Tensor | None:
    """Return a copy of what all levels are shifted by, or None."""
    return None if q.shift is None else q.shift.detach().clone()


def codes_of(q: Quantizer, x: Tensor) -> Tensor:
    """Return ``q.codes(x)``."""
    codes: Tensor = getattr(q, "codes")(x)  # noqa: B009  (no method of the base class)
    return codes


@torch.no_grad()
def set_scale(q: Quantizer, values: Tensor) -> None:
    """Write ``values``, one step size a row, into ``q.scale`` in place."""
    assert isinstance(q.scale, Tensor)
    q.scale.copy_(values.reshape(q.scale.shape))


@torch.no_grad()
def set_shift(q: Quantizer, values: Tensor) -> None:
    """Write ``values``, one a row, into what all levels are shifted by."""
    getattr(q, "set_shift_")(values.reshape(q.shift.shape))  # type: ignore[union-attr]  # noqa: B009


def set_grid(q: Quantizer, values: Tensor) -> None:
    """Write step sizes, and with them the shift by which the lowest level is that of the same setting of LSQ."""
    set_scale(q, values)
    if q.shift is not None:
        lowest = 0 if q.signed is False else -(2 ** (q.bits - 1))
        set_shift(q, (lowest - q.quant_min) * scale_of(q))


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
