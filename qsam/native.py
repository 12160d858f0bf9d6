"""Calling a compiled kernel: one C function of addresses and sizes, in a library of its own, through ctypes.

A :class:`Plan` says where each of the function's arguments comes from. It is plain data, so a later process can call
what an earlier one has compiled, without the compiler and its import.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import math
import operator
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Size = tuple[int, ...]
"""A size as the dimensions of the rows whose product it is; of none, 1."""

_CPU = torch.device("cpu")


@dataclasses.dataclass(frozen=True)
class Plan:
    """How to call a C function.

    Attributes:
        function: Its name.
        tensors: How many tensors the kernel takes.
        buffers: dtype (its name in torch) and shape of the memory that is made for each call.
        sizes: The sizes that it is told.
        arguments: What its arguments are, as places in (tensors..., buffers..., sizes...).
        returned: Which buffers the kernel returns.
    """

    function: str
    tensors: int
    buffers: tuple[tuple[str, tuple[Size, ...]], ...]
    sizes: tuple[Size, ...]
    arguments: tuple[int, ...]
    returned: tuple[int, ...]

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> Plan:
        """Return the plan of which this is the JSON.

        Raises:
            ValueError: it is none.
        """
        try:
            buffers = tuple((str(dtype), tuple(_sizes(shape))) for dtype, shape in found["buffers"])
            numbers = [tuple(int(i) for i in found[name]) for name in ("arguments", "returned")]
            plan = cls(str(found["function"]), int(found["tensors"]), buffers, tuple(_sizes(found["sizes"])), *numbers)
        except (KeyError, TypeError) as error:
            raise ValueError(f"not the plan of a kernel: {error!r}") from error
        plan.check()
        return plan

    def check(self) -> None:
        """Raise a ValueError where this cannot be followed."""
        dtypes = [getattr(torch, name, None) for name, _ in self.buffers]
        sizes = [*self.sizes, *(size for _, shape in self.buffers for size in shape)]
        places = self.tensors + len(self.buffers) + len(self.sizes)
        right = (
            re.fullmatch(r"\w+", self.function) is not None
            and all(isinstance(dtype, torch.dtype) for dtype in dtypes)
            and all(d in {0, 1} for size in sizes for d in size)
            and len(self.arguments) > 1
            and all(0 <= place < places for place in self.arguments)
            and all(0 <= i < len(self.buffers) for i in self.returned)
        )
        if not right:
            raise ValueError(f"not the plan of a kernel: {self}")

    def types(self) -> list[Any]:
        """Return the C types of the arguments."""
        memory = self.tensors + len(self.buffers)
        return [ctypes.c_void_p if place < memory else ctypes.c_int64 for place in self.arguments]


class Native:
    """A kernel on a CPU: its C function, called as its plan says.

    It sees memory alone: dtypes, dimensions and layout are checked by who looks it up. While it runs, other threads of
    Python run too.

    Raises:
        OSError: the library cannot be loaded.
        ValueError: it has no such function.
    """

    def __init__(self, plan: Plan, library: Path) -> None:
        self.plan = plan
        try:
            self.function = getattr(_loaded(str(library)), plan.function)
        except AttributeError as error:
            raise ValueError(str(error)) from error
        self.function.argtypes, self.function.restype = plan.types(), None
        self._pick = operator.itemgetter(*plan.arguments)
        self._made = [_maker(dtype, shape) for dtype, shape in plan.buffers]

    def __call__(self, *tensors: Tensor) -> Any:
        """Run it on tensors of the shapes that the kernel takes."""
        return self.run(tensors[0].shape, tensors)

    def run(self, shape: Sequence[int], tensors: Sequence[Tensor]) -> Any:
        """Run it on rows of this shape."""
        made = [make(shape) for make in self._made]
        addresses = [t.data_ptr() for t in (*tensors, *made)]
        self.function(*self._pick((*addresses, *[_size(size, shape) for size in self.plan.sizes])))
        found = tuple(made[i] for i in self.plan.returned)
        return found if len(found) > 1 else found[0] if found else None


@functools.cache
def _loaded(path: str) -> ctypes.CDLL:
    return ctypes.CDLL(path)


def _size(size: Size, shape: Sequence[int]) -> int:
    return shape[size[0]] if len(size) == 1 else math.prod([shape[d] for d in size])


def _maker(dtype: str, sizes: tuple[Size, ...]) -> Any:
    """Return a function that makes a buffer for rows of a shape."""
    make = functools.partial(torch.empty, dtype=getattr(torch, dtype), device=_CPU)
    if not any(sizes):
        fixed = [1] * len(sizes)
        return lambda shape: make(fixed)
    return lambda shape: make([_size(size, shape) for size in sizes])


def _sizes(found: Any) -> list[Size]:
    return [tuple(int(d) for d in size) for size in found]
