"""Which tensors a kernel may be given, and how it is called: C on a CPU, ``torch.compile`` on a GPU.

A kernel computes what the formulas of :mod:`qsam.functional` compute, bit for bit; only the order of the sum in ds
differs. What no kernel can do (vmap, a second derivative, a layout with gaps), or what is too small to gain from one,
runs eagerly, as does everything on a machine without a compiler, which is said once (:mod:`qsam.fused.backend`).
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qsam.fused import backend, native

if TYPE_CHECKING:
    from qsam.functional import Grid

Call = Callable[[], tuple[Any, Any]]
"""Runs a kernel; returns ds, or None, and the largest distance of Q(w) and p, as a number or a tensor."""

PARALLEL = 2**15
"""Entries from which a kernel uses torch's threads."""


def quantized(x: Tensor, grid: Grid | None) -> Tensor | None:
    """Return Q(x; s) without a graph; None if no kernel may compute it."""
    if grid is None or not fuses(x, grid):
        return None
    out = torch.empty_like(x)
    return out if run("write", grid, x, out) else None


def pulled_back(x: Tensor, grid: Grid | None, grad: Tensor, overwrite: bool) -> tuple[Tensor, Tensor] | None:
    """Return dx and ds of :func:`quantized`, dx in the memory of ``grad`` if asked to; None if no kernel may."""
    if grid is None or torch.is_grad_enabled() or not backend.is_plain(grad) or not fuses(x, grid):
        return None
    layout = _layout(x, grid.rows)
    assert layout is not None
    grad = grad.contiguous(memory_format=layout)
    dx = grad if overwrite else torch.empty_like(x)
    found = run("backward", grid, x, grad, dx)
    return None if found is None else (dx, scaled(found[0], grid))


def scaled(ds: Tensor, grid: Grid) -> Tensor:
    """Return the sums of a kernel as the gradient of the grid's scale."""
    return ds.view(grid.scale.shape).mul_(grid.grad_scale).to(grid.scale.dtype)


def run(name: str, grid: Grid, *tensors: Tensor) -> tuple[Any, Any] | None:
    """Run a kernel on tensors of which the first :func:`fuses`; None if it does not fit the others."""
    call = bind(name, grid, tensors)
    return None if call is None else call()


def fuses(x: Tensor, grid: Grid, entries: int | None = None) -> bool:
    """Whether ``x`` is worth a kernel, fits the grid, and is plain.

    Args:
        x: What is to be quantized.
        grid: Of Q.
        entries: How many entries the same kernel will see in a row; by default, those of ``x``.
    """
    if not backend.wants(entries or x.numel()) or x.numel() <= grid.rows or backend.is_watched():
        return False
    scale = grid.scale
    if x.device != scale.device or scale.dtype != torch.float32 or not scale.is_contiguous():
        return False
    if x.numel() % grid.rows or not (backend.is_plain(x) and backend.is_plain(scale)):
        return False
    if _layout(x, grid.rows) is None or x.device.type not in BINDERS:
        return False
    return x.device.type != "cpu" or _is_compiled("write", x.dtype)


def _is_compiled(name: str, dtype: torch.dtype) -> bool:
    """Whether there is a C function of this name and dtype; if none can be compiled, say so."""
    try:
        return native.function(name, dtype) is not None
    except OSError as error:
        backend.note_failure(error)
        return False


def _layout(x: Tensor, rows: int) -> torch.memory_format | None:
    """Return the memory format of a tensor without gaps, of which each row is contiguous; None for other layouts."""
    if x.is_contiguous():
        return torch.contiguous_format
    whole_rows = x.dim() == 4 and rows in {1, x.shape[0]}
    return torch.channels_last if whole_rows and x.is_contiguous(memory_format=torch.channels_last) else None


def bind(name: str, grid: Grid, tensors: Sequence[Tensor], coefficient: Tensor | None = None) -> Call | None:
    """Return the call of a kernel with everything known; None if no kernel fits these tensors.

    Args:
        name: Of one of :mod:`qsam.fused.formulas`, which says what it reads and writes.
        grid: Of Q.
        tensors: The first :func:`fuses`; the others have to be like it.
        coefficient: Of ``perturb``.
    """
    x = tensors[0]
    layout = _layout(x, grid.rows)
    assert layout is not None
    for t in tensors[1:]:
        alike = t.shape == x.shape and t.dtype == x.dtype and t.device == x.device
        if not alike or not t.is_contiguous(memory_format=layout) or not backend.is_plain(t):
            return None
    return BINDERS[x.device.type](name, grid, tensors, coefficient)


def _bind_native(name: str, grid: Grid, tensors: Sequence[Tensor], coefficient: Tensor | None) -> Call | None:
    x = tensors[0]
    call = native.function(name, x.dtype)
    if call is None:
        return None
    ds = torch.empty(grid.rows, dtype=torch.promote_types(x.dtype, torch.float32)) if name in native.SUMS else None
    arguments = [*(t.data_ptr() for t in tensors), *([] if ds is None else [ds.data_ptr()])]
    if coefficient is not None:
        arguments.append(coefficient.item())  # type: ignore[arg-type]
    entries = x.numel()
    limits = (grid.quant_min, grid.quant_max)
    arguments += [grid.scale.data_ptr(), grid.rows, entries // grid.rows, *limits, thread_count(entries)]
    return functools.partial(_called, call, arguments, ds, (tensors, grid.scale))


def _called(call: Callable[..., float], arguments: list[Any], ds: Tensor | None, owners: Any) -> tuple[Any, Any]:
    """Call C; ``owners`` are the tensors whose memory it sees."""
    farthest = call(*arguments)
    if farthest < 0:
        raise MemoryError("there is no memory for the sums of a kernel")
    return ds, farthest


def thread_count(entries: int) -> int:
    """Return on how many threads a kernel runs: torch's, or one for a small tensor."""
    return torch.get_num_threads() if entries >= PARALLEL else 1


def _bind_compiled(name: str, grid: Grid, tensors: Sequence[Tensor], coefficient: Tensor | None) -> Call | None:
    x = tensors[0]
    shape, column = ((-1,), (1,)) if grid.rows == 1 else ((grid.rows, -1), (grid.rows, 1))
    rows = [_flat(t.detach()).view(shape) for t in tensors]
    others = [] if coefficient is None else [coefficient.detach().view(1)]
    others += [grid.scale.detach().view(column), _limits(grid.quant_min, grid.quant_max, x.device)]
    try:
        formula = _compiled(name, x.dtype, len(shape), x.device)
    except (RuntimeError, OSError, ImportError) as error:
        backend.note_failure(error)
        return None

    def call() -> tuple[Any, Any]:
        with torch.no_grad():
            return formula(*rows, *others)  # type: ignore[no-any-return]

    return call


@functools.cache
def _compiled(name: str, dtype: torch.dtype, dims: int, device: torch.device) -> Callable[..., Any]:
    """Return a formula compiled for rows of any size, and run once here, so that a failure is the compiler's.

    ``torch.compile`` counts how often it has compiled the code of one function, and gives up at eight: so each kind of
    tensor has a copy of its own.
    """
    from qsam.fused import formulas

    formula = getattr(formulas, name)
    own = types.FunctionType(formula.__code__.replace(), formula.__globals__, name)
    call: Callable[..., Any] = torch.compile(own, fullgraph=True, dynamic=True)
    shape, column = ((4099,), (1,)) if dims == 1 else ((67, 131), (67, 1))
    make = functools.partial(torch.ones, device=device)
    rows = [make(shape, dtype=dtype) for _ in range(native.ROWS[name])]
    others = [make(1, dtype=dtype)] if name == "perturb" else []
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
        call(*rows, *others, make(column, dtype=torch.float32), _limits(-2, 1, device))
    return call


def _flat(t: Tensor) -> Tensor:
    """Return a view of memory without gaps in its order."""
    return t.view(-1) if t.is_contiguous() else t.permute(0, 2, 3, 1).view(-1)


@functools.lru_cache(maxsize=256)
def _limits(quant_min: int, quant_max: int, device: torch.device) -> Tensor:
    return torch.tensor([float(quant_min), float(quant_max)], device=device, dtype=torch.float32)


BINDERS = {"cpu": _bind_native, "cuda": _bind_compiled, "xpu": _bind_compiled}
"""How the kernels of a kind of device are called; on other devices the formulas run eagerly."""
