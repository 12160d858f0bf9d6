"""Building kernels: torch's compiler writes a C++ function for each, and the C++ compiler is run once for all of them.

A kernel is traced for sizes that are symbols, and handed to inductor, whose C++ is taken before inductor would compile
it: its headers take most of the time that a C++ compiler needs, and here they are read once for several kernels. The
wrapper that inductor writes in Python is run once, on examples, with a spy in the function's place. So it is known
what the wrapper passes to the function, and the wrapper is no longer needed (:class:`qsam.native.Plan`).

What does not have this form (two functions, or something done between them) is :class:`Unfit`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import itertools
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from qsam.native import Plan, Size, module_source

Kernel = Callable[..., Any]

OPTIONS = {
    "cpp.dynamic_threads": True,  # counted when a kernel runs: torch.set_num_threads stays in force
    "cpp.vec_isa_ok": True,
    "cpp_wrapper": False,
    "fx_graph_cache": False,
    "pattern_matcher": False,  # its patterns are for models, and are slow to load
    "size_asserts": False,
}
_POINTER, _INTEGER = "*", "int64_t"


class Unfit(Exception):
    """What the compiler made of a kernel is not one C function of addresses and sizes."""


@dataclasses.dataclass(frozen=True)
class Draft:
    """A kernel before the C++ compiler.

    Attributes:
        source: A function in C++.
        plan: How to call it.
    """

    source: str
    plan: Plan


def draft(kernel: Kernel, examples: list[Tensor], others: list[Tensor], function: str) -> Draft:
    """Return what the compiler writes for a kernel.

    Args:
        kernel: A function of tensors; see :mod:`qsam.compiling`.
        examples: Its arguments, rows first; the sizes of their dimensions are all different.
        others: The same with other sizes, on which the plan is verified.
        function: How the C function shall be called.

    Raises:
        Unfit: see the module.
    """
    spies: list[_Spy] = []
    with _replaced(spies):
        wrapper = _wrapper(kernel, examples)
    plans = [_plan(wrapper, spies, tensors, function) for tensors in (examples, others)]
    if plans[0] != plans[1]:
        raise Unfit(f"its call depends on the sizes: {plans}")
    return Draft(spies[0].source, plans[0])


def library(drafts: Sequence[Draft], directory: Path) -> Path:
    """Compile the functions of these drafts into one library in this directory, and return its path.

    Raises:
        RuntimeError: there is no C++ compiler, or it fails.
    """
    builder: Any = importlib.import_module("torch._inductor.cpp_builder")
    source = directory / "kernels.cpp"
    source.write_text(_joined(drafts), encoding="utf-8")
    with _believed_isa(), _options():
        isa = importlib.import_module("torch._inductor.cpu_vec_isa").pick_vec_isa()
        options = builder.CppTorchDeviceOptions(vec_isa=isa, device_type="cpu", include_pytorch=False, shared=True)
        build = builder.CppBuilder("kernels", [str(source)], options, str(directory))
        build.build()
    return Path(build.get_target_file_path())


def _joined(drafts: Sequence[Draft]) -> str:
    """Return the functions' sources as one. Inductor calls each `kernel`, and includes its header before it."""
    parts = ["#include <torch/csrc/inductor/cpp_prefix.h>"]
    for each in drafts:
        parts += [f"#define kernel {each.plan.function}", each.source, "#undef kernel"]
    return "\n".join([*parts, module_source([each.plan.function for each in drafts])])


# --- tracing --------------------------------------------------------------------------------------------------------


def _wrapper(kernel: Kernel, examples: list[Tensor]) -> Callable[[list[Any]], Any]:
    """Return inductor's Python wrapper of a kernel: a function of the list (sizes of the rows..., tensors...)."""
    compiler: Any = importlib.import_module("torch._inductor.compile_fx")
    guards: Any = importlib.import_module("torch._guards")
    graph = _traced(kernel, examples)
    values = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]
    context = guards.TracingContext(guards.detect_fake_mode(values))
    with guards.tracing(context), _believed_isa(), _options():
        return compiler.compile_fx_inner(graph, values)  # type: ignore[no-any-return]


def _traced(kernel: Kernel, examples: list[Tensor]) -> torch.fx.GraphModule:
    """Return a kernel's graph, which takes the sizes of the rows first."""
    tracer: Any = importlib.import_module("torch.fx.experimental.proxy_tensor")
    decompositions = importlib.import_module("torch._inductor.decomposition").select_decomp_table()

    def returns_tuple(*tensors: Tensor) -> tuple[Any, ...]:
        found = kernel(*tensors)
        return found if isinstance(found, tuple) else () if found is None else (found,)

    graph = tracer.make_fx(returns_tuple, decomposition_table=decompositions, tracing_mode="symbolic")(*examples)
    first = next(iter(graph.graph.nodes))
    with graph.graph.inserting_before(first):
        for d, size in enumerate(first.meta["val"].shape):
            graph.graph.placeholder(f"size{d}").meta["val"] = size
    _move_writes(graph.graph)
    graph.recompile()
    return graph  # type: ignore[no-any-return]


def _move_writes(graph: torch.fx.Graph) -> None:
    """Move the copies into arguments, and what they need, before the first reduction.

    Only in this order the compiler makes one sweep of what a kernel writes and what it sums up.
    """
    aten = torch.ops.aten
    nodes = list(graph.nodes)
    reductions = [node for node in nodes if node.target in (aten.sum.dim_IntList, aten.amax.default)]
    left = [node for node in nodes if node.target is aten.copy_.default]
    needed = set()
    while left and reductions:
        node = left.pop()
        if node not in needed:
            needed.add(node)
            left += node.all_input_nodes
    for node in nodes[nodes.index(reductions[0]) :] if needed else ():
        if node in needed:
            reductions[0].prepend(node)


# --- what the wrapper does ------------------------------------------------------------------------------------------


@dataclasses.dataclass
class _Spy:
    """Stands for a C function, and notes what it is given."""

    types: list[str]
    source: str
    calls: list[tuple[Any, ...]] = dataclasses.field(default_factory=list)

    def __call__(self, *arguments: Any) -> None:
        self.calls.append(arguments)


class _NoOperation(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Nothing but memory may be made by a wrapper."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        allowed = {torch.ops.aten.empty_strided.default, torch.ops.aten.as_strided.default}
        if func not in allowed:
            raise Unfit(f"its wrapper calls {func}")
        return func(*args, **(kwargs or {}))


def _plan(wrapper: Callable[[list[Any]], Any], spies: list[_Spy], tensors: list[Tensor], function: str) -> Plan:
    """Run a wrapper on these tensors, and return what it does."""
    shape = list(tensors[0].shape)
    for spy in spies:
        spy.calls.clear()
    with _NoOperation():  # type: ignore[no-untyped-call]
        found = wrapper([*shape, *tensors])
    if len(spies) != 1 or len(spies[0].calls) != 1:
        raise Unfit(f"it became {len(spies)} functions")
    notes = _Notes(tensors, shape)
    arguments = [notes.argument(kind, value) for kind, value in zip(spies[0].types, spies[0].calls[0], strict=True)]
    returned = [notes.returned(t) for t in found or ()]
    return notes.plan(function, arguments, returned)


class _Notes:
    """What is known of one call: which memory is whose, and which number is which size."""

    def __init__(self, tensors: list[Tensor], shape: list[int]) -> None:
        self.tensors = [t.data_ptr() for t in tensors]
        self.shape = shape
        self.sizes: list[Size] = []
        self.buffers: list[Tensor] = []

    def argument(self, kind: str, value: Any) -> tuple[str, int]:
        """Return what an argument is, and which of these."""
        kind = kind.strip().split(" ")[-1]
        if isinstance(value, Tensor) and kind.endswith(_POINTER):
            if value.data_ptr() in self.tensors:
                return "tensor", self.tensors.index(value.data_ptr())
            if value.data_ptr() not in [t.data_ptr() for t in self.buffers]:
                self.buffers.append(value)
            return "buffer", self._buffer(value)
        if isinstance(value, int) and kind == _INTEGER:
            size = self._size(value)
            self.sizes += [] if size in self.sizes else [size]
            return "size", self.sizes.index(size)
        raise Unfit(f"an argument {kind} is {type(value)}")

    def returned(self, value: Any) -> int:
        """Return which buffer is returned, in the shape that it is returned in."""
        if not isinstance(value, Tensor) or not value.is_contiguous():
            raise Unfit(f"it returns {type(value)}")
        i = self._buffer(value)
        if (value.dtype, value.numel()) != (self.buffers[i].dtype, self.buffers[i].numel()):
            raise Unfit("it returns a part of its memory")
        self.buffers[i] = value
        return i

    def plan(self, function: str, arguments: list[tuple[str, int]], returned: list[int]) -> Plan:
        """Return what was noted."""
        offsets = {"tensor": 0, "buffer": len(self.tensors), "size": len(self.tensors) + len(self.buffers)}
        buffers = tuple((str(t.dtype).removeprefix("torch."), tuple(map(self._size, t.shape))) for t in self.buffers)
        places = tuple(offsets[what] + i for what, i in arguments)
        return Plan(function, len(self.tensors), buffers, tuple(self.sizes), places, tuple(returned))

    def _buffer(self, value: Tensor) -> int:
        places = [i for i, t in enumerate(self.buffers) if t.data_ptr() == value.data_ptr()]
        if not places:
            raise Unfit("it returns what its function was not given")
        return places[0]

    def _size(self, value: int) -> Size:
        """Return which dimensions have this product."""
        dims = range(len(self.shape))
        for size in itertools.chain.from_iterable(itertools.combinations(dims, n) for n in range(len(dims) + 1)):
            if math.prod(self.shape[d] for d in size) == value:
                return size
        raise Unfit(f"the size {value} is none of {self.shape}")


# --- inductor, as it is needed here -----------------------------------------------------------------------------------


def _options() -> Any:
    return importlib.import_module("torch._inductor.config").patch(OPTIONS)


@contextlib.contextmanager
def _replaced(spies: list[_Spy]) -> Iterator[None]:
    """Within this context what inductor would compile in this thread becomes a spy."""
    owner: Any = importlib.import_module("torch._inductor.async_compile").AsyncCompile
    before, thread = owner.cpp_pybinding, threading.get_ident()

    def cpp_pybinding(self: Any, argtypes: list[str], source_code: str) -> Any:
        if threading.get_ident() != thread:
            return before(self, argtypes, source_code)
        spies.append(_Spy(list(argtypes), source_code))
        return spies[-1]

    owner.cpp_pybinding = cpp_pybinding
    try:
        yield
    finally:
        owner.cpp_pybinding = before


@contextlib.contextmanager
def _believed_isa() -> Iterator[None]:
    """Within this context the processor is believed, of what it says of its vectors.

    Inductor would try six programs, a second each. Its matrix instructions are left out: no kernel uses them.
    """
    isas: Any = importlib.import_module("torch._inductor.cpu_vec_isa")
    has = isas.x86_isa_checker()
    known = [isa for isa in isas.supported_vec_isa_list if has and all(flag in has for flag in str(isa).split())]
    chosen = next((isa for isa in known if "amx" not in str(isa)), None)
    before = isas.valid_vec_isa_list
    if chosen is not None:
        of = type(chosen)
        believed = type(of.__name__, (of,), {"__bool__": lambda self: True, "__hash__": of.__hash__})()
        isas.valid_vec_isa_list = lambda: [believed]
    try:
        yield
    finally:
        isas.valid_vec_isa_list = before
