"""Compiling a kernel: ``torch.compile`` once for all sizes, called without its guards, and checked against its formula.

A kernel is a function of tensors: rows ``(n,)`` or ``(R, n)`` first, then their scales ``(1,)`` or ``(R, 1)`` and the
two limits, or instead of both three rows ``(n,)``. One that writes has parameters for that: ``out``; or ``x_out``,
which is the very tensor that it was given as ``x``. The compiler is not told that they are one. What it writes is right
all the same if each entry is read before it is written, as in one sweep, and whether that is so is tried out.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_log = logging.getLogger("qsam")

Kernel = Callable[..., Any]
ERRORS = (RuntimeError, OSError)
"""What a missing or failing compiler raises: torch's own errors of compilation are RuntimeErrors."""


@functools.cache
def compiled(kernel: Kernel, dtypes: tuple[torch.dtype, ...], dims: int, device: torch.device) -> Kernel:
    """Return a kernel compiled for rows of any size.

    It is compiled here, and run, on examples of its own, so that what goes wrong later is not the compiler.

    Args:
        kernel: A function of tensors; see the module.
        dtypes: Of its rows and of its scale. Limits are fp32.
        dims: 1 for one row, 2 for several.
        device: Of all.

    Raises:
        RuntimeError: it cannot be compiled, or does not compute what its formula does.
        OSError: there is no compiler.
    """
    _log.info("qsam compiles %s for %s", kernel.__name__.strip("_"), dtypes[0])
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
        examples = _examples(kernel, dtypes, dims, device)
        if device.type == "cpu":
            call: Kernel = Direct(kernel, examples)
        else:
            call = torch.compile(kernel, fullgraph=True, dynamic=True)
        _check(kernel, call, _examples(kernel, dtypes, dims, device))
        return call


def _examples(kernel: Kernel, dtypes: tuple[torch.dtype, ...], dims: int, device: torch.device) -> list[Tensor]:
    """Return arguments that clip and that do not, with sizes that are all different."""
    rows = 67 if dims == 2 else 0
    length = 4099 if rows else 2**17 + 3
    line = functools.partial(torch.linspace, device=device, dtype=torch.float32)
    found = []
    for i, dtype in enumerate(dtypes[:-1]):
        values = line(i - 3, 3 - i / 2, length)
        values = values if dtype.is_floating_point else 100 * values
        found.append((values.repeat(rows, 1) if rows else values).to(dtype))
    if "limits" in inspect.signature(kernel).parameters:
        scale = line(0.2, 0.3, rows or 1).view(-1, *[1] * bool(rows))
        return [*found, scale.to(dtypes[-1]), torch.tensor([-2.0, 1.0], device=device, dtype=torch.float32)]
    return [*found, line(0.2, 0.3, length).to(dtypes[-1]), line(-9, 9, length).int(), line(-1.0, 1.0, length)]


def _check(kernel: Kernel, call: Kernel, examples: list[Tensor]) -> None:
    """See that a compiled kernel does what its formula does, also where it writes over what it reads."""
    names = list(inspect.signature(kernel).parameters)
    apart, shared = ([t.clone() for t in examples] for _ in range(2))
    overwritten = {}
    for i, name in enumerate(names):
        source = name.removesuffix("_out")
        if source != name and source in names:
            overwritten[names.index(source)] = i
            shared[i] = shared[names.index(source)].view(shared[i].dtype)
    expected, found = kernel(*apart), call(*shared)
    for place, out in overwritten.items():
        apart[place] = apart[out].view(apart[place].dtype)
    same = all(torch.equal(a, b) for a, b in zip(apart, shared, strict=True))
    if not same or not _agree(expected, found):
        raise RuntimeError(f"the compiled kernel {kernel.__name__.strip('_')!r} does not compute what its formula does")


def _agree(expected: Any, found: Any) -> bool:
    """Whether results are equal, those that are sums to rounding."""
    if isinstance(expected, tuple):
        return all(_agree(e, f) for e, f in zip(expected, found, strict=True))
    if expected is None:
        return found is None
    if expected.numel() > 2**10:
        return torch.equal(expected, found)
    return torch.allclose(expected, found, rtol=1e-3, atol=0.0)


class Direct:
    """A kernel on a CPU, called without torch.compile's guards, which would cost more than the kernel.

    Compiled from examples whose sizes are all different it holds for all sizes above 1; dtypes and dimensions are
    checked by who looks it up.

    Attributes:
        bare: What the compiler has written, out of its wrappers; it takes memory as it comes. None: it was not found.

    Raises:
        RuntimeError: torch.compile is switched off.
    """

    def __init__(self, kernel: Kernel, examples: list[Tensor]) -> None:
        self.call: Kernel | None = None
        self.sources: list[int] = []
        self.bare: Callable[[list[Any]], Any] | None = None

        def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Kernel:
            self.call = torch._inductor.compile(graph, inputs, options=_options())
            return functools.partial(self._first, examples)

        # Each kind compiles code of its own: torch.compile counts how often it has compiled one, and gives up at eight.
        fresh = types.FunctionType(kernel.__code__.replace(), kernel.__globals__, kernel.__name__)
        torch.compile(fresh, backend=backend, fullgraph=True, dynamic=True)(*examples)
        examples.clear()  # torch.compile holds on to its backend's result; a megabyte a kernel
        if not self.sources:
            raise RuntimeError("torch.compile is switched off")

    def _first(self, examples: list[Tensor], *arguments: Any) -> Any:
        """Learn from the first call which argument of the graph is which tensor, or (below 0) which size of the rows.

        torch.compile orders them as it likes, and drops what a kernel does not use.
        """
        assert self.call is not None
        places = {id(t): i for i, t in enumerate(examples)}
        sizes = {size: ~d for d, size in enumerate(examples[0].shape)}
        self.sources = [sizes[a] if isinstance(a, int) else places[id(a)] for a in arguments]
        found = self.call(*arguments)
        self.bare = _generated(self.call)
        return found

    def __call__(self, *tensors: Tensor) -> Any:
        """Run it on tensors of the shapes that the kernel takes."""
        return self.run(tensors[0].shape, tensors)

    def run(self, shape: Sequence[int], tensors: Sequence[Tensor]) -> Any:
        """Run it on rows of this shape."""
        assert self.call is not None
        arguments = [tensors[s] if s >= 0 else shape[~s] for s in self.sources]
        found = self.call(*arguments) if self.bare is None else self.bare(arguments)
        return tuple(found) if len(found) > 1 else found[0] if found else None


def _generated(call: Any) -> Callable[[list[Any]], Any] | None:
    """Return the function that the compiler has written, out of the wrappers round it; None: it is not where it was.

    The wrappers check once more what :class:`Direct` knows, and take as long as a small kernel.
    """
    seen: set[int] = set()
    left = [call]
    while left:
        found = left.pop()
        if callable(getattr(found, "current_callable", None)):
            return found.current_callable  # type: ignore[no-any-return]
        seen.add(id(found))
        cells = [cell.cell_contents for cell in getattr(found, "__closure__", None) or () if cell != _EMPTY_CELL]
        below = [getattr(found, name, None) for name in ("__wrapped__", "compiled_fn")]
        left += [f for f in (*cells, *below) if callable(f) and id(f) not in seen]
    return None


_EMPTY_CELL = types.CellType()


@functools.cache
def _options() -> dict[str, Any]:
    """Return the compiler's options.

    Threads are counted when a kernel runs, not when it is compiled: ``torch.set_num_threads`` stays in force. What the
    processor says of its vector instructions is believed, where five trial compilations would check it. Shapes are not
    looked at: ``bare`` is given others, of the same memory.
    """
    passes: Any = importlib.import_module("torch._inductor.custom_graph_pass")

    class WritesFirst(passes.CustomGraphPass):  # type: ignore[misc]
        """What a kernel writes comes before what it sums up: only in this order the compiler makes one sweep of both.

        Its own order is the other one, and two sweeps.
        """

        def __call__(self, graph: torch.fx.Graph) -> None:
            _move_writes(graph)

        def uuid(self) -> Any:
            """Say to torch's cache of kernels what was done to them."""
            return passes.get_hash_for_files((__file__,))

    return {
        "cpp.dynamic_threads": True,
        "cpp.vec_isa_ok": True,
        "size_asserts": False,
        "post_grad_custom_post_pass": WritesFirst(),
    }


def _move_writes(graph: torch.fx.Graph) -> None:
    """Move the copies into arguments, and what they need, before the first reduction."""
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
