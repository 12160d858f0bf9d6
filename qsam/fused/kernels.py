"""Fused kernels: the choice of the back end, the tensors that it accepts, and the calls.

A kernel computes the formulas of :mod:`qsam.functional` bit for bit; only the order of the sum in ds differs. On a CPU
it is plain C (:mod:`qsam.fused.native`), on a GPU ``torch.compile`` of :mod:`qsam.fused.formulas`.

Kernels access memory directly, which compilers, tracers and dispatch modes do not notice. So the eager formulas run
while one of these is active, for a tensor whose memory differs from its values (vmap, a subclass, a layout with gaps),
for small tensors, and, with one warning, on a machine without a compiler.

The verbs of an optimizer run on all its quantized weights, each weight in one sweep over its memory::

    write      p <- Q(w)
    perturb    p <- Q(w) + c * d            returns whether p was Q(w)
    pull back  g <- M * g,  p <- w          returns ds, and whether p was Q(w)

Each verb prepares every call before the first kernel runs, because a sweep evicts the interpreter's data from the
processor's caches. A weight without a grid or without a fitting kernel is not changed, and its result is None.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import types
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from qsam.fused import native
from qsam.private import dispatch_mode_is_active
from qsam.registry import nearest

if TYPE_CHECKING:
    from qsam.functional import Grid

# --- the back end -------------------------------------------------------------------------------------------------

BACKENDS = ("auto", "eager", "compiled")

SMALLEST = 2**16
"""Entries of one input, or of all weights of a model, from which ``"auto"`` uses kernels. Smaller models gain too
little to wait for a compiler."""


@dataclasses.dataclass
class _Backend:
    """The chosen back end, and the reason why there are no kernels if they could not be compiled."""

    backend: str = "auto"
    failure: str | None = None


_BACKEND = _Backend()


def set_backend(backend: str) -> None:
    """Choose how fake quantization, write and pull-back are computed, for the whole process.

    Args:
        backend: ``"eager"``: separate torch operations. ``"compiled"``: fused kernels for every size, and an error if
            they cannot be compiled. ``"auto"`` (the default): fused kernels for inputs of 65,536 entries or more and
            for models with as many quantized weights; eager for smaller ones, and, with one warning, if the kernels
            cannot be compiled.

    The kernels for a CPU are compiled by the system's C compiler (``$CC``, or cc, gcc or clang) when the first one is
    needed, which takes around a second, and are kept in ``~/.cache/qsam`` for later processes. On Windows there are
    none. On a GPU the kernels are ``torch.compile``'s.

    On a CPU a Linear layer is fused with the quantization of its input. If the processor has instructions for int8
    (VNNI), the input has 128 rows or more, and the weight is on its grid, the layer multiplies integers, which rounds
    less often than a product in fp32. Codes and written weights are equal bit for bit with each back end; outputs of
    such a layer are equal to the rounding of fp32.

    Raises:
        ValueError: ``backend`` is another name.

    Example:
        >>> set_backend("auto")
    """
    if backend not in BACKENDS:
        hint = nearest(str(backend), list(BACKENDS))
        raise ValueError(f"`backend` must be one of {', '.join(BACKENDS)}, got {backend!r}.{hint}")
    _BACKEND.backend, _BACKEND.failure = backend, None


@contextlib.contextmanager
def using(backend: str) -> Iterator[None]:
    """Use another back end within this context."""
    before = _BACKEND.backend
    set_backend(backend)
    try:
        yield
    finally:
        set_backend(before)


def _wants(entries: int) -> bool:
    """Whether a tensor of so many entries is to be given to a kernel."""
    if _BACKEND.backend == "eager" or (_BACKEND.backend == "auto" and entries < SMALLEST):
        return False
    return _BACKEND.failure is None


def _note_failure(error: BaseException) -> None:
    """Warn once that there are no kernels and the formulas run eagerly; raise if the back end is ``"compiled"``."""
    if _BACKEND.backend == "compiled":
        raise error
    reason = [*str(error).strip().splitlines(), ""][0]
    _BACKEND.failure = f"{type(error).__name__}: {reason}"
    warnings.warn(
        f"qsam's fused kernels cannot be compiled here, and the eager formulas, which are slower, run instead "
        f"({_BACKEND.failure}). Install a C compiler or name one in the environment variable CC; "
        'qsam.set_backend("eager") chooses the eager formulas without this warning.',
        UserWarning,
        stacklevel=4,
    )


def is_watched() -> bool:
    """Whether a compiler, a tracer or a dispatch mode is recording the operations."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined,no-untyped-call]
        return True
    return dispatch_mode_is_active()


def is_plain(t: Tensor) -> bool:
    """Whether the memory holds the tensor's values: no subclass, no tensor within vmap, no lazy negation."""
    if type(t) not in (Tensor, torch.nn.Parameter) or t.layout is not torch.strided or t.is_neg():
        return False
    try:
        t.data_ptr()
    except RuntimeError:  # a tensor within vmap has no memory
        return False
    return True


# --- one tensor ---------------------------------------------------------------------------------------------------

Call = Callable[[], tuple[Any, Any]]
"""Runs a kernel; returns ds or None, and the largest distance between Q(w) and p, as a number or a tensor."""

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
    if grid is None or torch.is_grad_enabled() or not is_plain(grad) or not fuses(x, grid):
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
    """Run a kernel on tensors, the first of which :func:`fuses`; None if it does not fit the others."""
    call = bind(name, grid, tensors)
    return None if call is None else call()


def fuses(x: Tensor, grid: Grid, entries: int | None = None) -> bool:
    """Whether ``x`` is large enough for a kernel, fits the grid, and is plain.

    ``entries`` is the number of entries of all tensors of a sweep, by default those of ``x``.
    """
    if not _wants(entries or x.numel()) or x.numel() <= grid.rows or is_watched():
        return False
    scale = grid.scale
    if x.device != scale.device or scale.dtype != torch.float32 or not scale.is_contiguous():
        return False
    if x.numel() % grid.rows or not (is_plain(x) and is_plain(scale)):
        return False
    if _layout(x, grid.rows) is None or x.device.type not in BINDERS:
        return False
    return x.device.type != "cpu" or _is_compiled("write", x.dtype)


def _is_compiled(name: str, dtype: torch.dtype) -> bool:
    """Whether there is a C function of this name and dtype; warn if none can be compiled."""
    try:
        return native.function(name, dtype) is not None
    except OSError as error:
        _note_failure(error)
        return False


def _layout(x: Tensor, rows: int) -> torch.memory_format | None:
    """Return the memory format of a tensor without gaps whose rows are contiguous; None for other layouts."""
    if x.is_contiguous():
        return torch.contiguous_format
    whole_rows = x.dim() == 4 and rows in {1, x.shape[0]}
    return torch.channels_last if whole_rows and x.is_contiguous(memory_format=torch.channels_last) else None


def bind(name: str, grid: Grid, tensors: Sequence[Tensor], coefficient: Tensor | None = None) -> Call | None:
    """Return the call of a kernel, named as in :mod:`qsam.fused.formulas`; None if no kernel fits these tensors.

    The first tensor :func:`fuses`; the others must have its shape, dtype, device and layout.
    """
    x = tensors[0]
    layout = _layout(x, grid.rows)
    assert layout is not None
    for t in tensors[1:]:
        alike = t.shape == x.shape and t.dtype == x.dtype and t.device == x.device
        if not alike or not t.is_contiguous(memory_format=layout) or not is_plain(t):
            return None
    return BINDERS[x.device.type](name, grid, tensors, coefficient)


def _bind_native(name: str, grid: Grid, tensors: Sequence[Tensor], coefficient: Tensor | None) -> Call | None:
    x = tensors[0]
    call = native.function(name, x.dtype)
    if call is None:
        return None
    ds = torch.empty(grid.rows, dtype=torch.promote_types(x.dtype, torch.float32)) if name in native.SUMS else None
    arguments: list[Any] = [*(t.data_ptr() for t in tensors), *([] if ds is None else [ds.data_ptr()])]
    if coefficient is not None:
        arguments.append(coefficient.item())
    entries = x.numel()
    limits = (grid.quant_min, grid.quant_max, grid.offset)
    arguments += [grid.scale.data_ptr(), grid.rows, entries // grid.rows, *limits, thread_count(entries)]
    return functools.partial(_called, call, arguments, ds, (tensors, grid.scale))


def _called(call: Callable[..., float], arguments: list[Any], ds: Tensor | None, owners: Any) -> tuple[Any, Any]:
    """Call a C function; ``owners`` keeps the tensors alive whose memory it uses."""
    farthest = call(*arguments)
    if farthest < 0:
        raise MemoryError("there is no memory for the sums of a kernel")
    return ds, farthest


def thread_count(entries: int) -> int:
    """Return the number of threads of a kernel: torch's, or one for a small tensor."""
    return torch.get_num_threads() if entries >= PARALLEL else 1


def _bind_compiled(name: str, grid: Grid, tensors: Sequence[Tensor], coefficient: Tensor | None) -> Call | None:
    x = tensors[0]
    shape, column = ((-1,), (1,)) if grid.rows == 1 else ((grid.rows, -1), (grid.rows, 1))
    rows = [_flat(t.detach()).view(shape) for t in tensors]
    others = [] if coefficient is None else [coefficient.detach().view(1)]
    others += [grid.scale.detach().view(column), _limits(grid.quant_min, grid.quant_max, grid.offset, x.device)]
    try:
        formula = _compiled(name, x.dtype, len(shape), x.device)
    except (RuntimeError, OSError, ImportError) as error:
        _note_failure(error)
        return None

    def call() -> tuple[Any, Any]:
        with torch.no_grad():
            return formula(*rows, *others)  # type: ignore[no-any-return]

    return call


@functools.cache
def _compiled(name: str, dtype: torch.dtype, dims: int, device: torch.device) -> Callable[..., Any]:
    """Return a formula compiled for rows of any size, and run it once, so that compiler errors occur here.

    ``torch.compile`` gives up after compiling the code of one function eight times, so each kind of tensor has a
    separate copy of the code.
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
        call(*rows, *others, make(column, dtype=torch.float32), _limits(-2, 1, 0.0, device))
    return call


def _flat(t: Tensor) -> Tensor:
    """Return a flat view of a tensor without gaps, in the order of its memory."""
    return t.view(-1) if t.is_contiguous() else t.permute(0, 2, 3, 1).view(-1)


@functools.lru_cache(maxsize=256)
def _limits(quant_min: int, quant_max: int, offset: float, device: torch.device) -> Tensor:
    return torch.tensor([float(quant_min), float(quant_max), offset], device=device, dtype=torch.float32)


BINDERS = {"cpu": _bind_native, "cuda": _bind_compiled, "xpu": _bind_compiled}
"""The function that binds kernels for each kind of device; on other devices the formulas run eagerly."""


# --- all weights of an optimizer ----------------------------------------------------------------------------------


class Weight(NamedTuple):
    """A quantized weight: the latent w, the Parameter p that holds Q(w), and Q's grid (None if kernels lack Q)."""

    w: Tensor
    p: Tensor
    grid: Grid | None


Verdict = Tensor | bool
"""Whether p held Q(w), ignoring NaN: a bool on a CPU, and a tensor elsewhere, so that nothing waits for the device."""


def write_(weights: Sequence[Weight]) -> list[bool]:
    """Write ``p <- Q(w; s)``; return for each weight whether a kernel did it."""
    done = [found is not None for found in _sweep("write", weights, [(weight.p,) for weight in weights])]
    _note_writes(weight.p for weight, fused in zip(weights, done, strict=True) if fused)
    return done


def pull_back_(
    weights: Sequence[Weight], grads: Sequence[Tensor], *, overwrite: bool
) -> list[tuple[Tensor, Verdict] | None]:
    """Pull gradients, dL/dQ of each weight, back through Q; return ds, and whether p held Q(w).

    With ``overwrite`` each gradient becomes dw, ``M * grad``, and each p becomes w, the copy to which a failed step
    returns. Otherwise gradients and p stay as they are.
    """
    rows = [(g, weight.p) for weight, g in zip(weights, grads, strict=True)]
    answers = _sweep("pull_back" if overwrite else "scale_gradient", weights, rows)
    if overwrite:
        _note_writes(t for row, answer in zip(rows, answers, strict=True) if answer is not None for t in row)
    return [
        None if answer is None or weight.grid is None else (scaled(answer[0], weight.grid), answer[1] == 0)
        for weight, answer in zip(weights, answers, strict=True)
    ]


def perturb_(
    weights: Sequence[Weight], steps: Sequence[Tensor], coefficients: Sequence[Tensor]
) -> list[Verdict | None]:
    """Write ``p <- Q(w; s) + coefficient * step``; return for each p whether it held Q(w)."""
    rows = [(weight.p, step) for weight, step in zip(weights, steps, strict=True)]
    scalars = [c.to(weight.w.device, weight.w.dtype) for weight, c in zip(weights, coefficients, strict=True)]
    answers = _sweep("perturb", weights, rows, scalars)
    _note_writes(weight.p for weight, answer in zip(weights, answers, strict=True) if answer is not None)
    return [None if answer is None else answer[1] == 0 for answer in answers]


def _sweep(
    name: str,
    weights: Sequence[Weight],
    rows: Sequence[tuple[Tensor, ...]],
    scalars: Sequence[Tensor | None] | None = None,
) -> list[Any]:
    """Run a kernel on w and these tensors of each weight; return its results, None if it was not run."""
    # The entries of all weights count together, because a model of many small ones gains too.
    entries = sum(weight.w.numel() for weight in weights if weight.grid is not None)
    calls: list[Call | None] = []
    for weight, tensors, scalar in zip(weights, rows, scalars or [None] * len(weights), strict=True):
        w, grid = weight.w, weight.grid
        fits = grid is not None and fuses(w, grid, entries)
        calls.append(bind(name, grid, (w, *tensors), scalar) if fits and grid is not None else None)
    return [None if call is None else call() for call in calls]


def _note_writes(tensors: Iterable[Tensor]) -> None:
    """Increment the version of what a kernel wrote, so that autograd notices the change of a saved tensor."""
    for t in tensors:
        torch.autograd.graph.increment_version(t)
