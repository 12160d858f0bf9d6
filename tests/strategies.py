"""Hypothesis strategies: awkward tensors, scales, and cases of every registered quantizer."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from qsam.quantizers import QUANTIZERS, build_quantizer
from qsam.testing import Case
from qsam.testing.inputs import owners, row_count

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

AWKWARD = (0.0, -0.0, 1e-45, -1e-40, 1.1754943508222875e-38, 1e-30, -1e-30, 0.5, -1.0, 3e4, 1e30, -1e30)
"""Both zeros, the smallest subnormal, a subnormal, the smallest normal number, small, ordinary, large."""


class Setting(NamedTuple):
    """A registered quantizer, and what it is asked to quantize."""

    name: str
    granularity: str
    activation: bool

    def __str__(self) -> str:
        return f"{self.name}-{self.granularity}" + ("-activation" if self.activation else "")


def settings_of_the_registry() -> list[Setting]:
    """Return every registered quantizer in every granularity that it takes."""
    kinds = [("per_tensor", True), ("per_tensor", False), ("per_channel", False), ("per_group", False)]
    return [s for name in QUANTIZERS for s in (Setting(name, *kind) for kind in kinds) if _takes(s)]


def _takes(setting: Setting) -> bool:
    axis = None if setting.activation else 0
    group_size = 2 if setting.granularity == "per_group" else None
    try:
        q = build_quantizer(setting.name, bits=4, granularity=setting.granularity, axis=axis, group_size=group_size)
    except ValueError:
        return False
    return q.granularity == setting.granularity


def shapes(min_dims: int = 1, max_dims: int = 3) -> st.SearchStrategy[tuple[int, ...]]:
    """Shapes of at most 5 entries a dimension, none of them empty."""
    return st.lists(st.integers(1, 5), min_size=min_dims, max_size=max_dims).map(tuple)


def fill(values: list[float], shape: tuple[int, ...]) -> Tensor:
    """Return an fp64 tensor that repeats ``values`` in order."""
    flat = torch.tensor(values, dtype=torch.float64)
    return flat[torch.arange(math.prod(shape)) % len(values)].reshape(shape)


def awkward_tensors(shape: tuple[int, ...]) -> st.SearchStrategy[Tensor]:
    """Few different values: zeros, subnormals, 1e-30, 1e30, and any fp32 number between."""
    number = st.sampled_from(AWKWARD) | st.floats(-(2.0**99), 2.0**99, width=32)
    return st.lists(number, min_size=1, max_size=8).map(lambda values: fill(values, shape))


def normal_tensors(shape: tuple[int, ...]) -> st.SearchStrategy[Tensor]:
    """N(0, 1) at a magnitude of 2^-20 to 2^20, some of it cubed to give it tails."""

    def draw(seed: int, exponent: int, power: int) -> Tensor:
        x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return x.pow(power).to(torch.float32).to(torch.float64) * 2.0**exponent

    return st.builds(draw, st.integers(0, 2**32 - 1), st.integers(-20, 20), st.sampled_from([1, 3]))


def ties(shape: tuple[int, ...], low: int, high: int) -> st.SearchStrategy[Tensor]:
    """Exact k + 1/2, k from below ``low`` to above ``high``."""
    return st.lists(st.integers(low - 2, high + 1), min_size=1, max_size=8).map(
        lambda ks: fill([k + 0.5 for k in ks], shape)
    )


def bounds(shape: tuple[int, ...], low: int, high: int) -> st.SearchStrategy[Tensor]:
    """Values at most half a unit from ``low``, 0 or ``high``, the three included."""
    offset = st.sampled_from([0.0, 2.0**-20, -(2.0**-20)]) | st.floats(-0.5, 0.5, width=16)
    value = st.builds(lambda base, off: base + off, st.sampled_from([low, 0, high]), offset)
    return st.lists(value, min_size=1, max_size=8).map(lambda values: fill(values, shape))


def powers_of_two() -> st.SearchStrategy[float]:
    """2^-10 to 2^6: exact scales, whose grid of 8 bits fp16 can hold."""
    return st.integers(-10, 6).map(lambda exponent: 2.0**exponent)


def scales() -> st.SearchStrategy[float]:
    """Any fp32 number from 2^-10 to 2^6."""
    return st.floats(2.0**-10, 2.0**6, width=32)


def scale_rows(rows: int, each: st.SearchStrategy[float]) -> st.SearchStrategy[Tensor]:
    """One positive fp32 scale a row, of at most 6 different ones."""
    return st.lists(each, min_size=1, max_size=6).map(lambda values: fill(values, (rows,)).float())


@st.composite
def configs(draw: st.DrawFn, setting: Setting, shape: tuple[int, ...]) -> dict[str, object]:
    """Keyword arguments of a quantizer for a tensor of ``shape``: bits, sign, axis, a group size that divides."""
    axis = None if setting.activation else draw(st.integers(0, len(shape) - 1))
    group_size = None
    if setting.granularity == "per_group" and axis is not None:
        entries = math.prod(shape) // shape[axis]
        group_size = draw(st.sampled_from([size for size in range(1, entries + 1) if entries % size == 0]))
    return {
        "bits": draw(st.integers(2, 8)),
        "signed": draw(st.booleans()),
        "granularity": setting.granularity,
        "axis": axis,
        "group_size": group_size,
    }


@st.composite
def cases(draw: st.DrawFn, setting: Setting) -> Case:
    """A quantizer of ``setting`` with an input of any kind and dtype, and scales on which that input is exact."""
    shape = draw(shapes(min_dims=1 if setting.activation else 2))
    config = draw(configs(setting, shape))
    cls, dtype = QUANTIZERS.get(setting.name), draw(st.sampled_from(DTYPES))
    try:
        q = cls(**config)
    except ValueError:  # one for signed data only
        config["signed"] = True
        q = cls(**config)
    low, high = q.quant_min, q.quant_max
    kind = draw(st.sampled_from(["ties", "bounds", "normal", "awkward"]))
    if kind in ("ties", "bounds"):
        units = draw(ties(shape, low, high) if kind == "ties" else bounds(shape, low, high))
        scale = draw(scale_rows(row_count(q, units), draw(st.sampled_from([powers_of_two(), scales()]))))
        x = units * scale[owners(q, units)].double()
    else:
        x = draw(normal_tensors(shape) if kind == "normal" else awkward_tensors(shape))
        scale = None
        if dtype == torch.float16:  # which has 5 exponents of two bits less: give it a grid that it can hold
            scale = draw(scale_rows(row_count(q, x), scales()))
            x = x.clamp(-1e4, 1e4)
    return Case(cls, x.to(dtype), config, scale, kind)
