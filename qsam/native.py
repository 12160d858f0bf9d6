"""Calling a compiled kernel: one C function of addresses and sizes, in a library that is a module of Python.

A :class:`Plan` says where each of the function's arguments comes from. It is plain data, so a later process can call
what an earlier one has compiled, without the compiler and its import.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.machinery
import importlib.util
import math
import operator
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Size = tuple[int, ...]
"""A size as the dimensions of the rows whose product it is; of none, 1."""

MODULE = "qsam_compiled"

_HEAD = r"""
#define PY_SSIZE_T_CLEAN
#include <Python.h>

static void* (*address_of)(PyObject* tensor);

template <typename T> static T taken(PyObject* value) {
    if constexpr (std::is_pointer_v<T>) {
        return static_cast<T>(address_of(value));
    } else {
        const Py_ssize_t size = PyLong_AsSsize_t(value);
        if (size == -1 && PyErr_Occurred()) throw std::runtime_error("a size was expected");
        return size;
    }
}

template <typename... T, size_t... i>
static void call(void (*kernel)(T...), PyObject* const* given, std::index_sequence<i...>) {
    const auto arguments = std::make_tuple(taken<T>(given[i])...);
    Py_BEGIN_ALLOW_THREADS
    std::apply(kernel, arguments);
    Py_END_ALLOW_THREADS
}

template <auto kernel, typename... T> static PyObject* called(void (*)(T...), PyObject* const* given, Py_ssize_t n) {
    try {
        if (n != static_cast<Py_ssize_t>(sizeof...(T))) throw std::runtime_error("another number of arguments");
        call(kernel, given, std::index_sequence_for<T...>{});
        Py_RETURN_NONE;
    } catch (const std::exception& error) {
        PyErr_SetString(PyExc_RuntimeError, error.what());
        return nullptr;
    }
}

static PyObject* set_address_of(PyObject*, PyObject* value) {
    address_of = reinterpret_cast<decltype(address_of)>(PyLong_AsVoidPtr(value));
    if (PyErr_Occurred()) return nullptr;
    Py_RETURN_NONE;
}

template <auto kernel> static PyObject* bound(PyObject*, PyObject* const* given, Py_ssize_t n) {
    return called<kernel>(kernel, given, n);
}
"""
_TAIL = r"""
static PyMethodDef methods[] = {
    {"set_address_of", set_address_of, METH_O, ""},
%s    {nullptr, nullptr, 0, nullptr}};

static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "%s", nullptr, -1, methods};

PyMODINIT_FUNC PyInit_%s() { return PyModule_Create(&definition); }
"""
_METHOD = """    {"%s", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(bound<%s>)), METH_FASTCALL, ""},
"""


def module_source(functions: Sequence[str]) -> str:
    """Return the C++ that makes a library of these functions a module of Python."""
    methods = "".join(_METHOD % (name, name) for name in functions)
    return _HEAD + _TAIL % (methods, MODULE, MODULE)


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


class Native:
    """A kernel on a CPU: its C function, called as its plan says.

    It sees memory alone: dtypes, dimensions and layout are checked by who looks it up. While it runs, other threads of
    Python run too.

    Raises:
        ImportError: the library cannot be loaded.
        AttributeError: it has no such function.
    """

    def __init__(self, plan: Plan, library: Path) -> None:
        self.plan = plan
        self.library = library
        self._function = getattr(_loaded(str(library)), plan.function)
        self._pick = operator.itemgetter(*plan.arguments)
        self._told_shape = plan.sizes == ((0,), (1,))[: len(plan.sizes)]
        self._makers = [_maker(dtype, shape) for dtype, shape in plan.buffers]

    def __call__(self, *tensors: Tensor) -> Any:
        """Run it on tensors of the shapes that the kernel takes."""
        return self.run(tensors[0].shape, tensors)

    def run(self, shape: Sequence[int], tensors: Sequence[Tensor]) -> Any:
        """Run it on rows of this shape."""
        return self.bound(shape, tensors)()

    def bound(self, shape: Sequence[int], tensors: Sequence[Tensor]) -> Callable[[], Any]:
        """Return what is left to do, once everything is known, to run it on rows of this shape."""
        made = [make(shape) for make in self._makers] if self._makers else ()
        sizes = shape if self._told_shape else [_size(size, shape) for size in self.plan.sizes]
        function, arguments, returned = self._function, self._pick((*tensors, *made, *sizes)), self.plan.returned
        found = tuple([made[i] for i in returned]) if len(returned) > 1 else made[returned[0]] if returned else None

        def run() -> Any:
            function(*arguments)
            return found

        return run


@functools.cache
def _loaded(path: str) -> Any:
    """Return the module in this file, which is told how torch looks up the address of a tensor."""
    loader = importlib.machinery.ExtensionFileLoader(MODULE, path)
    spec = importlib.util.spec_from_file_location(MODULE, path, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    module.set_address_of(torch._C._dynamo.guards._torchinductor_pyobject_tensor_data_ptr)  # type: ignore[attr-defined]
    return module


def _size(size: Size, shape: Sequence[int]) -> int:
    return shape[size[0]] if len(size) == 1 else math.prod([shape[d] for d in size])


def _maker(dtype: str, sizes: tuple[Size, ...]) -> Callable[[Sequence[int]], Tensor]:
    """Return a function that makes a buffer for rows of a shape."""
    empty = torch._C._dynamo.guards._empty_strided_cpu  # type: ignore[attr-defined] # as inductor; fast for a number
    kind = getattr(torch, dtype)
    if not any(sizes):
        ones = (1,) * len(sizes)
        return lambda shape: empty(ones, ones, kind)
    if sizes == ((0,), ()):
        return lambda shape: empty((shape[0], 1), (1, 1), kind)
    return lambda shape: torch.empty([_size(size, shape) for size in sizes], dtype=kind, device="cpu")


def _sizes(found: Any) -> list[Size]:
    return [tuple(int(d) for d in size) for size in found]
