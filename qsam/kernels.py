"""The maths of :mod:`qsam.functional`, fused: :mod:`qsam.formulas` through torch's compiler.

A fake quantization is some ten elementwise operations, and memory is what they cost. Compiled, forward and backward
are one sweep each, and so are the optimizer's write and pull-back. The formulas are those of ``functional``; only the
order of a sum differs, so codes and weights are equal bit for bit, and gradients of scales to rounding.

``set_backend`` chooses (:mod:`qsam.backend`). What cannot be compiled (vmap, a second derivative, a layout with gaps),
or is too small to gain from it, runs eagerly, and so does everything where there is no compiler, which is said once.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from qsam import backend, compiling, formulas
from qsam.functional import fake_quantize, wide_dtype
from qsam.native import Native


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
    if not fuses(x, grid) or not (x.is_contiguous() or _is_channels_last(x, grid)):
        return None
    if torch.is_grad_enabled() and (x.requires_grad or grid.scale.requires_grad):
        return _Fused.apply(x, grid.scale, grid)  # type: ignore[no-any-return]
    return on_grid(x, grid)


def on_grid(x: Tensor, grid: Grid) -> Tensor:
    """Return Q(x; s) of what :func:`fuses`, without a graph."""
    out = torch.empty_like(x)
    _run(formulas.write, grid, x, out)
    return out


def mask_(x: Tensor, grid: Grid, grad: Tensor) -> Tensor:
    """Turn dL/dQ into dx, in place, in one sweep: ``grad <- M(x) * grad``; return ds.

    Args:
        x: What was quantized: dense in memory.
        grid: Of Q.
        grad: Of the layout of ``x``.
    """
    return _masked_into(x, grid, grad, grad)


def _masked_into(x: Tensor, grid: Grid, grad: Tensor, out: Tensor) -> Tensor:
    return scaled(_run(formulas.backward, grid, x, grad, out), grid)


def codes(x: Tensor, grid: Grid) -> Tensor | None:
    """Return the integers of Q(x; s) as int8, in one sweep; None for a NaN, which has none, and where nothing fuses.

    Args:
        x: Contiguous, of fp32.
        grid: With one scale. Where it ends above 127, the integers are less by ``formulas.OFFSET``.
    """
    if not fit(grid, x):
        return None
    out = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    largest: Tensor = _run(formulas.codes, grid, x, out)
    return None if math.isnan(largest.item()) else out


def exact_codes(x: Tensor, grid: Grid) -> Tensor | None:
    """Return the integers of what lies on the grid, as :func:`codes` does; None where it does not.

    A first row is tried alone: what is off the grid need not be read to its end.
    """
    if not fit(grid, x):
        return None
    out = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scale, limits = grid.scale, _limit_tensor(grid.quant_min, grid.quant_max, x.device)
    columns = x.numel() // grid.rows
    for shape in ((1, columns), (grid.rows, columns)) if grid.rows > 1 else ((x.shape[-1],), (columns,)):
        far: Tensor = _call(formulas.exact_codes, shape, (x, out), (scale, limits), _shapes(grid))
        if (far if grid.rows == 1 else far.amax()).item() != 0:  # NaN too
            return None
    return out


def rescale_(product: Tensor, x_scale: Tensor, scale: Tensor, shift: Tensor, bias: Tensor) -> None:
    """Turn a product of integers into numbers, in its memory: ``product <- s_x s_W (integers + shift) + bias``.

    Args:
        product: fp32 ``(m, n)``, contiguous, whose memory holds int32.
        x_scale: s_x, fp32 ``(1,)``.
        scale: s_W, fp32, of one entry or n.
        shift: int32 ``(n,)``.
        bias: fp32 ``(n,)``.
    """
    kernel = formulas.rescale if scale.numel() == 1 else formulas.rescale_columns
    rows, others = (product.view(torch.int32), product), (x_scale, scale, shift, bias)
    _call(kernel, product.shape, rows, others, (_ROW,) * len(others))


class _Fused(torch.autograd.Function):
    """Q(x; s). Saves x and s, nothing else; a second derivative goes through the eager formulas."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, scale: Tensor, grid: Grid) -> Tensor:
        """Return Q(x)."""
        ctx.save_for_backward(x, scale)
        ctx.grid = grid  # type: ignore[attr-defined]
        return on_grid(x, grid)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """Return ``M(x) * grad`` and ``gs * <grad, dQ/ds>``."""
        x, scale = ctx.saved_tensors  # type: ignore[attr-defined]
        grid: Grid = ctx.grid  # type: ignore[attr-defined]
        if torch.is_grad_enabled() or not backend.is_plain(grad):  # create_graph=True; is_grads_batched=True
            dx, ds = _differentiable(x, scale, grid, grad)
            return dx, ds, None
        laid_out = torch.contiguous_format if x.is_contiguous() else torch.channels_last
        grad, dx = grad.contiguous(memory_format=laid_out), torch.empty_like(x)
        return dx, _masked_into(x, grid, grad, dx), None


def scaled(ds: Tensor, grid: Grid) -> Tensor:
    """Return what a kernel has summed up, as the gradient of the grid's scale."""
    ds = ds if grid.rows == 1 == grid.scale.dim() else ds.view(grid.scale.shape)
    return ds.mul_(grid.grad_scale).to(grid.scale.dtype)


def alias(t: Tensor) -> Tensor:
    """Return another tensor of the same values, to differentiate by it alone and not by what it was made of."""
    return t.view_as(t) if t.requires_grad else t.detach().requires_grad_()


def _differentiable(x: Tensor, scale: Tensor, grid: Grid, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients, with a graph of their own where graphs are made."""
    create_graph = torch.is_grad_enabled()
    shapes = ((-1,), (1,)) if grid.rows == 1 else ((grid.rows, -1), (-1, 1))
    with torch.enable_grad():
        leaves = [alias(t) for t in (x, scale)]
        rows, column = (t.reshape(shape) for t, shape in zip(leaves, shapes, strict=True))
        out = fake_quantize(rows, column, grid.quant_min, grid.quant_max, grid.grad_scale).view(x.shape)
        dx, ds = torch.autograd.grad(out, leaves, grad, create_graph=create_graph)
    return dx, ds


# --- calling them ---------------------------------------------------------------------------------------------------


_ROW, _COLUMN = (-1,), (-1, 1)


def _shapes(grid: Grid) -> Sequence[Sequence[int]]:
    """Return the shapes in which a formula takes scales and limits."""
    return (_ROW, _ROW) if grid.rows == 1 else (_COLUMN, _ROW)


def _run(kernel: compiling.Kernel, grid: Grid, *tensors: Tensor) -> Any:
    """Run a kernel on rows of a grid, in any shape, and its scales and limits."""
    return bound(kernel, grid, tensors)()


def bound(
    kernel: compiling.Kernel, grid: Grid, tensors: Sequence[Tensor], others: Sequence[Tensor] = ()
) -> Callable[[], Any]:
    """Return what is left to do, once everything is known, to run a kernel on rows of a grid.

    Args:
        kernel: One of :mod:`qsam.formulas`.
        grid: Whose scales and limits it takes.
        tensors: The rows, in any shape: dense in memory, all alike.
        others: What comes after scales and limits, of one entry each.
    """
    first, scale = tensors[0], grid.scale
    shape = (first.numel(),) if grid.rows == 1 else (grid.rows, first.numel() // grid.rows)
    limits = _limit_tensor(grid.quant_min, grid.quant_max, first.device)
    return _bound(kernel, shape, tensors, (scale, limits, *others), (*_shapes(grid), *[_ROW] * len(others)))


def _call(
    kernel: compiling.Kernel,
    shape: Sequence[int],
    tensors: Sequence[Tensor],
    others: Sequence[Tensor],
    shapes: Sequence[Sequence[int]],
) -> Any:
    return _bound(kernel, shape, tensors, others, shapes)()


def _bound(
    kernel: compiling.Kernel,
    shape: Sequence[int],
    tensors: Sequence[Tensor],
    others: Sequence[Tensor],
    shapes: Sequence[Sequence[int]],
) -> Callable[[], Any]:
    """Return the call of a kernel, compiled, or as it stands where compiling has failed.

    Args:
        kernel: One of :mod:`qsam.formulas`.
        shape: Of the rows.
        tensors: The rows, in any shape: dense in memory, all alike.
        others: What comes after them.
        shapes: Of the others.
    """
    call = kernel
    if not backend.has_failed():
        try:
            dtypes = (*[t.dtype for t in tensors], others[0].dtype)
            call = compiling.compiled(kernel, dtypes, len(shape), tensors[0].device, _of_a_step)
        except compiling.ERRORS as error:
            backend.note_failure(error)
    if isinstance(call, Native):  # it sees memory: no shapes, nothing of autograd
        return call.bound(shape, (*tensors, *others))
    return functools.partial(_run_by_torch, call, shape, tensors, others, shapes)


@torch.no_grad()
def _run_by_torch(
    call: compiling.Kernel,
    shape: Sequence[int],
    tensors: Sequence[Tensor],
    others: Sequence[Tensor],
    shapes: Sequence[Sequence[int]],
) -> Any:
    rows = [_flat(t)[: math.prod(shape)].view(shape) for t in tensors]
    return call(*rows, *(t.detach().view(s) for t, s in zip(others, shapes, strict=True)))


def _of_a_step(
    kernel: compiling.Kernel, dtypes: tuple[torch.dtype, ...], dims: int
) -> Iterator[tuple[compiling.Kernel, tuple[torch.dtype, ...], int]]:
    """Yield what a step calls besides this kernel; the optimizer's part of it is of wide dtypes, integers of fp32."""
    x, scale = dtypes[0], dtypes[-1]
    if kernel in {formulas.rescale, formulas.rescale_columns}:
        return
    names: list[tuple[compiling.Kernel, int]] = [(formulas.write, 2), (formulas.backward, 3)]
    if x == wide_dtype(x):
        names += [(formulas.distance, 2), (formulas.scale_gradient, 3), (formulas.pull_back, 5), (formulas.perturb, 4)]
    for each, tensors in names:
        yield each, (*[x] * tensors, scale), dims
    if x == torch.float32:
        yield from ((each, (x, torch.int8, scale), dims) for each in (formulas.codes, formulas.exact_codes))
        yield formulas.rescale, (torch.int32, x, scale), 2


def _flat(t: Tensor) -> Tensor:
    """Return a view of dense memory in its order."""
    return t.detach().view(-1) if t.is_contiguous() else t.detach().permute(0, 2, 3, 1).view(-1)


def fuses(x: Tensor, grid: Grid, entries: int | None = None) -> bool:
    """Whether ``x`` is worth a kernel, fits the grid, and is plain: a kernel sees memory, and nobody sees a kernel.

    Args:
        x: What is to be quantized.
        grid: Of Q.
        entries: How many entries the same kernel will see in a row; by default, those of ``x``.
    """
    if not backend.wants(entries or x.numel()) or x.numel() <= grid.rows or backend.is_watched():
        return False
    if grid.rows > 1 and (x.shape[0] != grid.scale.shape[0] or x.numel() % grid.rows):
        return False  # the formula says what is wrong
    if not (backend.is_plain(x) and backend.is_plain(grid.scale) and grid.scale.is_contiguous()):
        return False
    return x.device == grid.scale.device


def is_alike(t: Tensor, like: Tensor) -> bool:
    """Whether ``t`` is plain, and as large as ``like`` and where that is."""
    return t.shape == like.shape and t.device == like.device and t.is_contiguous() and backend.is_plain(t)


def _is_channels_last(x: Tensor, grid: Grid) -> bool:
    return grid.rows == 1 and x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)


def fit(grid: Grid, *tensors: Tensor, entries: int | None = None) -> bool:
    """Whether these are contiguous tensors of one wide dtype, and worth a kernel; see :func:`fuses`."""
    first = tensors[0]
    if not fuses(first, grid, entries) or first.dtype != wide_dtype(first.dtype):
        return False
    return all(t.dtype == first.dtype and is_alike(t, first) for t in tensors)


@functools.lru_cache(maxsize=256)
def _limit_tensor(quant_min: int, quant_max: int, device: torch.device) -> Tensor:
    return torch.tensor([float(quant_min), float(quant_max)], device=device, dtype=torch.float32)
