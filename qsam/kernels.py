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
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from qsam import compiling
from qsam.functional import clipped, codes_of, fake_quantize, positive, slope_of, wide_dtype
from qsam.registry import nearest

BACKENDS = ("auto", "eager", "compiled")

SMALLEST = 2**16
"""Entries from which ``"auto"`` compiles: a small model gains little and need not wait for a compiler."""


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
    found = _with_scale_gradient(_pull_back, w, grid, grad, p, grad, p)
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
    return _near(_run(_distance, *rows, _column(grid), _limits(grid, w.device)))


def _with_scale_gradient(
    kernel: Callable[..., Any], w: Tensor, grid: Grid, *others: Tensor
) -> tuple[Tensor, Tensor] | None:
    rows = _rows_of(grid, w, *others)
    if rows is None:
        return None
    ds, far = _run(kernel, *rows, _column(grid), _limits(grid, w.device))
    return ds.reshape(grid.scale.shape) * grid.grad_scale, _near(far)


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


def _pull_back(  # noqa: PLR0917 (tensors of one kernel)
    w: Tensor, grad: Tensor, p: Tensor, grad_out: Tensor, p_out: Tensor, scale: Tensor, limits: Tensor
) -> tuple[Tensor, Tensor]:
    s = positive(scale).to(w.dtype)
    dw, ds, codes = _pulled(w / s, grad, scale, limits)
    far = _farthest(codes * s, p)
    grad_out.copy_(dw)
    p_out.copy_(w)
    return ds, far


def _scale_gradient(w: Tensor, grad: Tensor, p: Tensor, scale: Tensor, limits: Tensor) -> tuple[Tensor, Tensor]:
    s = positive(scale).to(w.dtype)
    _, ds, codes = _pulled(w / s, grad, scale, limits)
    return ds, _farthest(codes * s, p)


def _distance(w: Tensor, p: Tensor, scale: Tensor, limits: Tensor) -> Tensor:
    return _farthest(_forward(w, scale, limits), p)


def _pulled(v: Tensor, grad: Tensor, scale: Tensor, limits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``M * grad``, ``<grad, dQ/ds>`` over what shares a scale, and the codes."""
    outside, codes = clipped(v, *limits.unbind()), codes_of(v, *limits.unbind())
    total = (slope_of(v, codes, outside) * grad).sum(-1, keepdim=True)
    # s enters as |s|: on the negative side its slope is -1.
    return grad.masked_fill(outside, 0), torch.where(scale < 0, -total, total), codes


def _farthest(q: Tensor, p: Tensor) -> Tensor:
    """Return the largest distance of q and p in each row; NaN where one is among them.

    A processor's vectors find it in fewer steps than masks and `all`, and over the same rows as ds it shares its sweep.
    """
    return (q - p).abs().amax(-1, keepdim=True)


def _near(far: Tensor) -> Tensor:
    """Whether no distance is above 0; also where a NaN is among them, which others report."""
    return ~(far.amax() > 0)


# --- calling them ---------------------------------------------------------------------------------------------------


def _run(kernel: Callable[..., Any], *tensors: Tensor) -> Any:
    """Run a kernel compiled, or as it stands where compiling has failed."""
    call = kernel
    if _CHOICE.failure is None:
        try:
            call = compiling.compiled(kernel, tuple((t.dtype, t.dim()) for t in tensors), tensors[0].device)
        except compiling.ERRORS as error:
            if _CHOICE.backend == "compiled":
                raise
            _say_failed(error)
    if isinstance(call, compiling.Direct) and call.bare is not None:  # it sees memory, and nothing of autograd
        return call(*tensors)
    with torch.no_grad():
        return call(*(t.detach() for t in tensors))


def _say_failed(error: BaseException) -> None:
    reason = [*str(error).strip().splitlines(), ""][0]
    _CHOICE.failure = f"{type(error).__name__}: {reason}"
    warnings.warn(
        f"qsam's kernels cannot be compiled here and run eagerly, which is slower ({_CHOICE.failure}). Install a C++ "
        'compiler, or say qsam.set_backend("eager").',
        UserWarning,
        stacklevel=3,
    )


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
