"""The maths of :mod:`qsam.functional`, fused: the same formulas through ``torch.compile``.

A fake quantization is some ten elementwise operations, and memory is what they cost. Compiled, forward and backward
are one sweep each, and so are the optimizer's write and pull-back. The formulas are those of ``functional``; only the
order of a sum differs, so codes and weights are equal bit for bit, and gradients of scales to rounding.

``set_backend`` chooses. What cannot be compiled (vmap, a second derivative, a layout with gaps) or is too small to
gain from it runs eagerly, and so does everything where there is no compiler, which is said once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from qsam.functional import clipped, codes_of, fake_quantize, positive, slope_of, wide_dtype
from qsam.registry import nearest

_log = logging.getLogger("qsam")

BACKENDS = ("auto", "eager", "compiled")

SMALLEST = 2**16
"""Entries from which ``"auto"`` compiles: a small model gains little and need not wait for a compiler."""

_OPTIONS: dict[str, Any] = {"cpp.dynamic_threads": True, "cpp.vec_isa_ok": True}
"""Threads are counted when a kernel runs, not when it is compiled: ``torch.set_num_threads`` stays in force. What the
processor says of its vector instructions is believed, where five trial compilations would check it."""


@dataclasses.dataclass
class _Choice:
    """What was chosen, and why kernels cannot be compiled, once that is known."""

    backend: str = "auto"
    failure: str | None = None


_CHOICE = _Choice()


def set_backend(backend: str) -> None:
    """Choose how fake quantization, write and pull-back are computed, for the whole process.

    Args:
        backend: ``"eager"``: one torch operation after the other. ``"compiled"``: fused by ``torch.compile``, an error
            where that fails. ``"auto"`` (the beginning): fused for tensors of 65,536 entries or more, eager for smaller
            ones and where compiling fails, which is said once.

    Raises:
        ValueError: another name.

    Example:
        >>> set_backend("auto")
    """
    if backend not in BACKENDS:
        hint = nearest(str(backend), list(BACKENDS))
        raise ValueError(f"`backend` must be one of {', '.join(BACKENDS)}, got {backend!r}.{hint}")
    _CHOICE.backend, _CHOICE.failure = backend, None


@contextlib.contextmanager
def using(backend: str) -> Iterator[None]:
    """Within this context the backend is another one."""
    before = _CHOICE.backend
    set_backend(backend)
    try:
        yield
    finally:
        set_backend(before)


class Grid(NamedTuple):
    """What LSQ's Q is, for the kernels.

    Attributes:
        scale: Its step sizes.
        quant_min: Qn.
        quant_max: Qp.
        grad_scale: LSQ's gs.
        rows: How many contiguous rows of the tensor have one step size each: as many as there are step sizes.
    """

    scale: Tensor
    quant_min: int
    quant_max: int
    grad_scale: float
    rows: int


def quantized(x: Tensor, grid: Grid) -> Tensor | None:
    """Return ``Q(x; s)`` with LSQ's gradient, as :func:`qsam.functional.fake_quantize` does; None: do not fuse."""
    viewed = _as_rows(x, grid) if _fuses(x, grid) else None
    if viewed is None:
        return None
    rows, back = viewed
    if torch.is_grad_enabled() and (x.requires_grad or grid.scale.requires_grad):
        return back(_Fused.apply(rows, grid.scale, grid))
    return back(_run(_forward, rows, _column(grid), _limits(grid, x.device)))


def write_(w: Tensor, grid: Grid, out: Tensor) -> bool:
    """Write ``out <- Q(w; s)`` in one sweep; return False, and do nothing, where that cannot be fused."""
    rows = _rows_of(grid, w) if out.is_contiguous() and _is_plain(out) else None
    if rows is not None:
        rows.append(out.detach().view(rows[0].shape))
        _run(_write, *rows, _column(grid), _limits(grid, w.device))
        _note_write(out)
    return rows is not None


def pull_back_(w: Tensor, grid: Grid, grad: Tensor, p: Tensor) -> tuple[Tensor, Tensor] | None:
    """Pull ``grad`` back in place, and park w in ``p``: all that an update does to a weight, in one sweep.

    ``grad <- M * grad``, ``p <- w``.

    Args:
        w: The latent.
        grid: Of Q.
        grad: dL/dQ, of the dtype of ``w``; becomes dw.
        p: What holds Q(w), of the dtype of ``w``; becomes w, the copy to which a failed step returns.

    Returns:
        ds, and whether ``p`` held Q(w), or a NaN somewhere; None, and nothing is done, where that cannot be fused.
    """
    found = _with_scale_gradient(_pull_back, w, grid, grad, p)
    if found is not None:
        _note_write(grad, p)
    return found


def scale_gradient(w: Tensor, grid: Grid, grad: Tensor, p: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return what :func:`pull_back_` returns, and leave ``grad`` and ``p`` as they are."""
    return _with_scale_gradient(_scale_gradient, w, grid, grad, p)


def holds(w: Tensor, grid: Grid, p: Tensor) -> Tensor | None:
    """Return whether ``p`` holds Q(w; s), or a NaN somewhere, in one sweep; None where that cannot be fused."""
    rows = _rows_of(grid, w, p)
    if rows is None:
        return None
    found: Tensor = _run(_holds, *rows, _column(grid), _limits(grid, w.device))
    return found


def _with_scale_gradient(
    kernel: Callable[..., Any], w: Tensor, grid: Grid, grad: Tensor, p: Tensor
) -> tuple[Tensor, Tensor] | None:
    rows = _rows_of(grid, w, grad, p)
    if rows is None:
        return None
    ds, same = _run(kernel, *rows, _column(grid), _limits(grid, w.device))
    return ds.reshape(grid.scale.shape) * grid.grad_scale, same


class _Fused(torch.autograd.Function):
    """Q(x; s) on rows. Saves x and s, nothing else; a second derivative goes through the eager formulas."""

    @staticmethod
    def forward(ctx: FunctionCtx, rows: Tensor, scale: Tensor, grid: Grid) -> Tensor:
        """Return Q(x)."""
        ctx.save_for_backward(rows, scale)
        ctx.grid = grid._replace(scale=scale.detach())  # type: ignore[attr-defined]
        out: Tensor = _run(_forward, rows, _column(grid), _limits(grid, rows.device))
        return out

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """Return ``M(x) * grad`` and ``gs * <grad, dQ/ds>``."""
        rows, scale = ctx.saved_tensors  # type: ignore[attr-defined]
        grid: Grid = ctx.grid  # type: ignore[attr-defined]
        if torch.is_grad_enabled():  # create_graph=True
            dx, ds = _differentiable(rows, scale, grid, grad)
            return dx, ds, None
        constants = _column(grid), _limits(grid, rows.device)
        if not ctx.needs_input_grad[1]:  # type: ignore[attr-defined]
            return _run(_masked, rows, grad.contiguous(), *constants), None, None
        dx, ds = _run(_backward, rows, grad.contiguous(), *constants)
        return dx, (ds.reshape(scale.shape) * grid.grad_scale).to(scale.dtype), None


def _differentiable(rows: Tensor, scale: Tensor, grid: Grid, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients with a graph of their own."""
    leaves = [t if t.requires_grad else t.detach().requires_grad_() for t in (rows, scale)]
    column = leaves[1].reshape(1) if grid.rows == 1 else leaves[1].reshape(-1, 1)
    out = fake_quantize(leaves[0], column, grid.quant_min, grid.quant_max, grid.grad_scale)
    dx, ds = torch.autograd.grad(out, leaves, grad, create_graph=True)
    return dx, ds


# --- the kernels: rows (n,) with one scale (1,), or (R, n) with scales (R, 1); limits = (Qn, Qp) -----------------


def _forward(x: Tensor, scale: Tensor, limits: Tensor) -> Tensor:
    s = positive(scale).to(wide_dtype(x.dtype))
    return (codes_of(x.to(s.dtype) / s, *limits.unbind()) * s).to(x.dtype)


def _masked(x: Tensor, grad: Tensor, scale: Tensor, limits: Tensor) -> Tensor:
    s = positive(scale).to(wide_dtype(x.dtype))
    return grad.masked_fill(clipped(x.to(s.dtype) / s, *limits.unbind()), 0)


def _backward(x: Tensor, grad: Tensor, scale: Tensor, limits: Tensor) -> tuple[Tensor, Tensor]:
    s = positive(scale).to(wide_dtype(x.dtype))
    dx, ds, _ = _pulled(x.to(s.dtype) / s, grad, scale, limits)
    return dx, ds


def _write(w: Tensor, out: Tensor, scale: Tensor, limits: Tensor) -> None:
    out.copy_(_forward(w, scale, limits))


def _pull_back(w: Tensor, grad: Tensor, p: Tensor, scale: Tensor, limits: Tensor) -> tuple[Tensor, Tensor]:
    s = positive(scale).to(w.dtype)
    dw, ds, codes = _pulled(w / s, grad, scale, limits)
    same = _equal(codes * s, p)
    grad.copy_(dw)
    p.copy_(w)
    return ds, same


def _scale_gradient(w: Tensor, grad: Tensor, p: Tensor, scale: Tensor, limits: Tensor) -> tuple[Tensor, Tensor]:
    s = positive(scale).to(w.dtype)
    _, ds, codes = _pulled(w / s, grad, scale, limits)
    return ds, _equal(codes * s, p)


def _holds(w: Tensor, p: Tensor, scale: Tensor, limits: Tensor) -> Tensor:
    return _equal(_forward(w, scale, limits), p)


def _pulled(v: Tensor, grad: Tensor, scale: Tensor, limits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``M * grad``, ``<grad, dQ/ds>`` over what shares a scale, and the codes."""
    outside, codes = clipped(v, *limits.unbind()), codes_of(v, *limits.unbind())
    total = (slope_of(v, codes, outside) * grad).sum(-1, keepdim=True)
    # s enters as |s|: on the negative side its slope is -1.
    return grad.masked_fill(outside, 0), torch.where(scale < 0, -total, total), codes


def _equal(q: Tensor, p: Tensor) -> Tensor:
    """Whether p is q; also where a NaN is in one of them, which others report.

    As a largest distance, which a processor's vectors do in fewer steps than masks and `all`.
    """
    return ~((q - p).abs().amax() > 0)


# --- calling them ---------------------------------------------------------------------------------------------------


def _run(kernel: Callable[..., Any], *tensors: Tensor) -> Any:
    """Run a kernel compiled, or as it stands where compiling has failed."""
    call = kernel
    if _CHOICE.failure is None:
        try:
            call = _compiled(kernel, tuple((t.dtype, t.dim()) for t in tensors), tensors[0].device)
        except _COMPILER_ERRORS as error:
            if _CHOICE.backend == "compiled":
                raise
            _say_failed(error)
    if isinstance(call, _Direct) and call.bare is not None:  # it sees memory, and nothing of autograd
        return call(*tensors)
    with torch.no_grad():
        return call(*(t.detach() for t in tensors))


_COMPILER_ERRORS = (RuntimeError, OSError)
"""What a missing or failing compiler raises: torch's own errors of compilation are RuntimeErrors."""


def _say_failed(error: BaseException) -> None:
    reason = [*str(error).strip().splitlines(), ""][0]
    _CHOICE.failure = f"{type(error).__name__}: {reason}"
    warnings.warn(
        f"qsam's kernels cannot be compiled here and run eagerly, which is slower ({_CHOICE.failure}). Install a C++ "
        'compiler, or say qsam.set_backend("eager").',
        UserWarning,
        stacklevel=3,
    )


@functools.cache
def _compiled(
    kernel: Callable[..., Any], kinds: tuple[tuple[torch.dtype, int], ...], device: torch.device
) -> Callable[..., Any]:
    """Return a kernel compiled for tensors of these dtypes and numbers of dimensions, of any size.

    It is compiled here, and run, on examples of its own, so that what goes wrong later is not the compiler.
    """
    _log.info("qsam compiles %s for %s", kernel.__name__.strip("_"), kinds[0][0])
    examples = _examples(kinds, device)
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
        if device.type == "cpu":
            return _Direct(kernel, examples)
        call = torch.compile(kernel, fullgraph=True, dynamic=True)
        call(*examples)
        return call


def _examples(kinds: tuple[tuple[torch.dtype, int], ...], device: torch.device) -> list[Tensor]:
    """Return tensors of rows, then their scales, then the limits, with sizes that are all different."""
    rows = 67 if kinds[0][1] == 2 else 0
    shapes = [(rows, 4099) if rows else (2**17 + 3,)] * (len(kinds) - 2) + [(rows, 1) if rows else (1,), (2,)]
    return [torch.ones(shape, dtype=kind[0], device=device) for shape, kind in zip(shapes, kinds, strict=True)]


class _Direct:
    """A kernel on a CPU, called without torch.compile's guards, which would cost more than the kernel.

    Compiled from examples whose sizes are all different it holds for all sizes above 1; dtypes and dimensions are
    checked by who looks it up.

    Raises:
        RuntimeError: torch.compile is switched off.
    """

    def __init__(self, kernel: Callable[..., Any], examples: list[Tensor]) -> None:
        self.call: Callable[..., Any] | None = None
        self.sources: list[int | tuple[int, int]] = []
        self.bare: Callable[[list[Any]], Any] | None = None

        def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
            self.call = torch._inductor.compile(graph, inputs, options=_OPTIONS)
            return functools.partial(self._first, examples)

        torch.compile(kernel, backend=backend, fullgraph=True, dynamic=True)(*examples)
        examples.clear()  # torch.compile holds on to its backend's result; a megabyte a kernel
        if not self.sources:
            raise RuntimeError("torch.compile is switched off")

    def _first(self, examples: list[Tensor], *arguments: Any) -> Any:
        """Learn from the first call which argument of the graph is which tensor, or which size of one."""
        assert self.call is not None
        places = {id(t): i for i, t in enumerate(examples)}
        sizes = {size: (i, d) for i, t in enumerate(examples) for d, size in enumerate(t.shape)}
        self.sources = [sizes[a] if isinstance(a, int) else places[id(a)] for a in arguments]
        found = self.call(*arguments)
        self.bare = _generated(self.call)
        return found

    def __call__(self, *tensors: Tensor) -> Any:
        """Run it."""
        assert self.call is not None
        arguments = [tensors[s] if isinstance(s, int) else tensors[s[0]].shape[s[1]] for s in self.sources]
        found = self.call(*arguments) if self.bare is None else self.bare(arguments)
        return found[0] if len(found) == 1 else found


def _generated(call: Any) -> Callable[[list[Any]], Any] | None:
    """Return the function that the compiler has written, out of the wrappers round it; None: it is not where it was.

    The wrappers check once more what :class:`_Direct` knows, and take as long as a small kernel.
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


def _note_write(*tensors: Tensor) -> None:
    """Count a version of what a kernel wrote, so that autograd refuses to use what it has saved of it."""
    for t in tensors:
        torch.autograd.graph.increment_version(t)


def _fuses(x: Tensor, grid: Grid) -> bool:
    """Whether ``x`` is worth a kernel, and plain: no vmap, no graph being captured, no exotic tensor."""
    if _CHOICE.backend == "eager" or (_CHOICE.backend == "auto" and x.numel() < SMALLEST):
        return False
    if _CHOICE.failure is not None or not x.numel() or torch.compiler.is_compiling():
        return False
    return all(_is_plain(t) for t in (x, grid.scale))


def _is_plain(t: Tensor) -> bool:
    return type(t) in (Tensor, torch.nn.Parameter) and not torch._C._functorch.is_functorch_wrapped_tensor(t)


def _as_rows(x: Tensor, grid: Grid) -> tuple[Tensor, Callable[[Tensor], Tensor]] | None:
    """Return ``x`` as ``(n,)`` or as rows ``(R, n)``, one a step size, and what undoes that; None: it has gaps."""
    if x.is_contiguous() and x.numel() > grid.rows:
        shape = x.shape
        return x.view(-1) if grid.rows == 1 else x.view(grid.rows, -1), lambda out: out.view(shape)
    if grid.rows == 1 and x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        moved = x.permute(0, 2, 3, 1)
        return moved.view(-1), lambda out: out.view(moved.shape).permute(0, 3, 1, 2)
    return None


def _rows_of(grid: Grid, *tensors: Tensor) -> list[Tensor] | None:
    """Return contiguous tensors of one wide dtype as rows, or None."""
    first = tensors[0]
    alike = all(t.dtype == first.dtype and t.is_contiguous() and _is_plain(t) for t in tensors)
    if not (alike and first.dtype == wide_dtype(first.dtype) and first.numel() > grid.rows and _fuses(first, grid)):
        return None
    return [t.detach().view(-1) if grid.rows == 1 else t.detach().view(grid.rows, -1) for t in tensors]


def _column(grid: Grid) -> Tensor:
    """Return the step sizes as ``(1,)``, or as a column ``(R, 1)``."""
    return grid.scale.detach().reshape((1,) if grid.rows == 1 else (-1, 1))


def _limits(grid: Grid, device: torch.device) -> Tensor:
    """Return the integer limits as a tensor: as numbers, each pair would compile kernels of its own."""
    return _limit_tensor(grid.quant_min, grid.quant_max, device)


@functools.lru_cache(maxsize=256)
def _limit_tensor(quant_min: int, quant_max: int, device: torch.device) -> Tensor:
    return torch.tensor([float(quant_min), float(quant_max)], device=device)
