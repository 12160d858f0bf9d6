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
import math
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from qsam import compiling
from qsam.functional import clipped, codes_of, fake_quantize, positive, slope_of, wide_dtype
from qsam.native import Native
from qsam.registry import nearest

BACKENDS = ("auto", "eager", "compiled")

SMALLEST = 2**16
"""Entries from which ``"auto"`` compiles: a small model gains little and need not wait for a compiler."""

OFFSET = 128
"""What is taken off the integers of an unsigned 8-bit grid, so that they fit int8."""


@dataclasses.dataclass
class _Choice:
    """What was chosen, and why kernels cannot be compiled, once that is known."""

    backend: str = "auto"
    failure: str | None = None


_CHOICE = _Choice()


def set_backend(backend: str) -> None:
    """Choose how fake quantization, write and pull-back are computed, for the whole process.

    Args:
        backend: ``"eager"``: one torch operation after the other. ``"compiled"``: fused by torch's compiler, an error
            where that fails. ``"auto"`` (the beginning): fused for tensors of 65,536 entries or more, eager for smaller
            ones and where compiling fails, which is said once.

    On a CPU a Linear layer is fused with the quantization of its input. Where the processor has instructions for int8
    (VNNI), the input 128 rows or more, and the weight is on its grid, it multiplies integers. That is rounded less
    often than a product in fp32: codes and written weights are the same bit for bit with each backend, outputs of such
    a layer to the rounding of fp32.

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
    if not fuses(x, grid) or not (x.is_contiguous() or _is_channels_last(x, grid)):
        return None
    if torch.is_grad_enabled() and (x.requires_grad or grid.scale.requires_grad):
        return _Fused.apply(x, grid.scale, grid)  # type: ignore[no-any-return]
    return on_grid(x, grid)


def on_grid(x: Tensor, grid: Grid) -> Tensor:
    """Return Q(x; s) of what :func:`fuses`, without a graph."""
    out = torch.empty_like(x)
    _run(_write, grid, x, out)
    return out


def mask_(x: Tensor, grid: Grid, grad: Tensor, *, with_scale: bool) -> Tensor | None:
    """Turn dL/dQ into dx, in place, in one sweep: ``grad <- M(x) * grad``; return ds, if it is wanted.

    Args:
        x: What was quantized: dense in memory.
        grid: Of Q.
        grad: Of the layout of ``x``.
        with_scale: Whether ds is wanted.
    """
    return _masked_into(x, grid, grad, grad, with_scale)


def _masked_into(x: Tensor, grid: Grid, grad: Tensor, out: Tensor, with_scale: bool) -> Tensor | None:
    if not with_scale:
        _run(_mask, grid, x, grad, out)
        return None
    return _scaled(_run(_backward, grid, x, grad, out), grid).to(grid.scale.dtype)


def codes(x: Tensor, grid: Grid) -> Tensor | None:
    """Return the integers of Q(x; s) as int8, in one sweep; None for a NaN, which has none, and where nothing fuses.

    Args:
        x: Contiguous, of fp32.
        grid: With one scale. Where it ends above 127, the integers are less by ``OFFSET``.
    """
    if not _fit(grid, x):
        return None
    out = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    largest: Tensor = _run(_codes, grid, x, out)
    return None if math.isnan(largest.item()) else out


def exact_codes(x: Tensor, grid: Grid) -> Tensor | None:
    """Return the integers of what lies on the grid, as :func:`codes` does; None where it does not.

    A first row is tried alone: what is off the grid need not be read to its end.
    """
    if not _fit(grid, x):
        return None
    out = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scale, limits = grid.scale, _limit_tensor(grid.quant_min, grid.quant_max, x.device)
    columns = x.numel() // grid.rows
    for shape in ((1, columns), (grid.rows, columns)) if grid.rows > 1 else ((x.shape[-1],), (columns,)):
        far: Tensor = _call(_exact_codes, shape, (x, out), (scale, limits), _shapes(grid))
        if (far if grid.rows == 1 else far.amax()).item() != 0:  # NaN too
            return None
    return out


def write_(w: Tensor, grid: Grid, out: Tensor) -> bool:
    """Write ``out <- Q(w; s)`` in one sweep; return False, and do nothing, where that cannot be fused."""
    fits = _fit(grid, w) and _is_alike(out, w)
    if fits:
        _run(_write, grid, w, out)
        _note_write(out)
    return fits


def pull_back_(w: Tensor, grid: Grid, grad: Tensor, p: Tensor) -> tuple[Tensor, Tensor | bool] | None:
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
    if not _fit(grid, w, grad, p):
        return None
    ds, far = _run(_pull_back, grid, w, grad, p, grad, p)
    _note_write(grad, p)
    return _scaled(ds, grid), _near(far)


def scale_gradient(w: Tensor, grid: Grid, grad: Tensor, p: Tensor) -> tuple[Tensor, Tensor | bool] | None:
    """Return what :func:`pull_back_` returns, and leave ``grad`` and ``p`` as they are."""
    if not _fit(grid, w, grad, p):
        return None
    ds, far = _run(_scale_gradient, grid, w, grad, p)
    return _scaled(ds, grid), _near(far)


def rescale_(product: Tensor, x_scale: Tensor, scale: Tensor, shift: Tensor, bias: Tensor) -> None:
    """Turn a product of integers into numbers, in its memory: ``product <- s_x s_W (integers + shift) + bias``.

    Args:
        product: fp32 ``(m, n)``, contiguous, whose memory holds int32.
        x_scale: s_x, fp32 ``(1,)``.
        scale: s_W, fp32, of one entry or n.
        shift: int32 ``(n,)``.
        bias: fp32 ``(n,)``.
    """
    kernel = _rescale if scale.numel() == 1 else _rescale_columns
    rows, others = (product.view(torch.int32), product), (x_scale, scale, shift, bias)
    _call(kernel, product.shape, rows, others, (_ROW,) * len(others))


def holds(w: Tensor, grid: Grid, p: Tensor) -> Tensor | bool | None:
    """Return whether ``p`` holds Q(w; s), or a NaN somewhere, in one sweep; None where that cannot be fused."""
    return _near(_run(_distance, grid, w, p)) if _fit(grid, w, p) else None


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
        if torch.is_grad_enabled() or not is_plain(grad):  # create_graph=True; is_grads_batched=True
            dx, ds = _differentiable(x, scale, grid, grad)
            return dx, ds, None
        laid_out = torch.contiguous_format if x.is_contiguous() else torch.channels_last
        grad, dx = grad.contiguous(memory_format=laid_out), torch.empty_like(x)
        return dx, _masked_into(x, grid, grad, dx, ctx.needs_input_grad[1]), None  # type: ignore[attr-defined]


def _scaled(ds: Tensor, grid: Grid) -> Tensor:
    return (ds if grid.rows == 1 == grid.scale.dim() else ds.view(grid.scale.shape)).mul_(grid.grad_scale)


def _differentiable(x: Tensor, scale: Tensor, grid: Grid, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients, with a graph of their own where graphs are made."""
    create_graph = torch.is_grad_enabled()
    leaves = [t if t.requires_grad else t.detach().requires_grad_() for t in (x, scale)]
    shapes = ((-1,), (1,)) if grid.rows == 1 else ((grid.rows, -1), (-1, 1))
    with torch.enable_grad():
        rows, column = (t.reshape(shape) for t, shape in zip(leaves, shapes, strict=True))
        out = fake_quantize(rows, column, grid.quant_min, grid.quant_max, grid.grad_scale).view(x.shape)
        dx, ds = torch.autograd.grad(out, leaves, grad, create_graph=create_graph)
    return dx, ds


# --- the kernels: rows (n,) with one scale (1,), or (R, n) with scales (R, 1); limits = (Qn, Qp) -----------------


def _write(x: Tensor, out: Tensor, scale: Tensor, limits: Tensor) -> None:
    out.copy_(_codes_times_scale(x, scale, limits).to(x.dtype))


def _codes(x: Tensor, codes: Tensor, scale: Tensor, limits: Tensor) -> Tensor:
    found = codes_of(x / positive(scale), *limits.unbind())
    codes.copy_((found - (limits[1] > 127) * OFFSET).to(codes.dtype))
    return found.abs().amax(-1, keepdim=True)


def _exact_codes(x: Tensor, codes: Tensor, scale: Tensor, limits: Tensor) -> Tensor:
    s = positive(scale)
    found = codes_of(x / s, *limits.unbind())
    codes.copy_((found - (limits[1] > 127) * OFFSET).to(codes.dtype))
    return _farthest(found * s, x)


def _rescale(  # noqa: PLR0917 (tensors of one kernel)
    product: Tensor, product_out: Tensor, x_scale: Tensor, scale: Tensor, shift: Tensor, bias: Tensor
) -> None:
    product_out.copy_((product + shift).to(bias.dtype) * (positive(x_scale) * positive(scale)) + bias)


def _rescale_columns(  # noqa: PLR0917
    product: Tensor, product_out: Tensor, x_scale: Tensor, column_scale: Tensor, shift: Tensor, bias: Tensor
) -> None:
    _rescale(product, product_out, x_scale, column_scale, shift, bias)


def _mask(x: Tensor, grad: Tensor, grad_out: Tensor, scale: Tensor, limits: Tensor) -> None:
    s = positive(scale).to(wide_dtype(x.dtype))
    grad_out.copy_(grad.masked_fill(clipped(x.to(s.dtype) / s, *limits.unbind()), 0))


def _backward(x: Tensor, grad: Tensor, grad_out: Tensor, scale: Tensor, limits: Tensor) -> Tensor:
    s = positive(scale).to(wide_dtype(x.dtype))
    found, ds, _ = _pulled(x.to(s.dtype) / s, grad, scale, limits)
    grad_out.copy_(found)
    return ds


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
    return _farthest(_codes_times_scale(w, scale, limits), p)


def _codes_times_scale(x: Tensor, scale: Tensor, limits: Tensor) -> Tensor:
    s = positive(scale).to(wide_dtype(x.dtype))
    return codes_of(x.to(s.dtype) / s, *limits.unbind()) * s


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


def _near(far: Tensor) -> Tensor | bool:
    """Whether no distance is above 0; also where a NaN is among them, which others report.

    On a CPU it is known now; elsewhere to ask would wait for the device.
    """
    largest = far if far.numel() == 1 else far.amax()
    return not largest.item() > 0 if far.device.type == "cpu" else ~(largest.view(()) > 0)


# --- calling them ---------------------------------------------------------------------------------------------------


_ROW, _COLUMN = (-1,), (-1, 1)


def _shapes(grid: Grid) -> Sequence[Sequence[int]]:
    """Return the shapes in which a formula takes scales and limits."""
    return (_ROW, _ROW) if grid.rows == 1 else (_COLUMN, _ROW)


def _run(kernel: compiling.Kernel, grid: Grid, *tensors: Tensor) -> Any:
    """Run a kernel on rows of a grid, in any shape, and its scales and limits."""
    first, scale = tensors[0], grid.scale
    shape = (first.numel(),) if grid.rows == 1 else (grid.rows, first.numel() // grid.rows)
    limits = _limit_tensor(grid.quant_min, grid.quant_max, first.device)
    return _call(kernel, shape, tensors, (scale, limits), _shapes(grid))


def _call(
    kernel: compiling.Kernel,
    shape: Sequence[int],
    tensors: Sequence[Tensor],
    others: Sequence[Tensor],
    shapes: Sequence[Sequence[int]],
) -> Any:
    """Run a kernel compiled, or as it stands where compiling has failed.

    Args:
        kernel: One of the above.
        shape: Of the rows.
        tensors: The rows, in any shape: dense in memory, all alike.
        others: What comes after them.
        shapes: Of the others.
    """
    call = kernel
    if _CHOICE.failure is None:
        try:
            dtypes = (*[t.dtype for t in tensors], others[0].dtype)
            call = compiling.compiled(kernel, dtypes, len(shape), tensors[0].device, _of_a_step)
        except compiling.ERRORS as error:
            if _CHOICE.backend == "compiled":
                raise
            _say_failed(error)
    if isinstance(call, Native):  # it sees memory: no shapes, nothing of autograd
        return call.run(shape, (*tensors, *others))
    with torch.no_grad():
        rows = [_flat(t)[: math.prod(shape)].view(shape) for t in tensors]
        return call(*rows, *(t.detach().view(s) for t, s in zip(others, shapes, strict=True)))


def _of_a_step(
    kernel: compiling.Kernel, dtypes: tuple[torch.dtype, ...], dims: int
) -> Iterator[tuple[compiling.Kernel, tuple[torch.dtype, ...], int]]:
    """Yield what a step calls besides this kernel; the optimizer's part of it is of wide dtypes, integers of fp32."""
    x, scale = dtypes[0], dtypes[-1]
    if kernel in {_rescale, _rescale_columns, _mask}:
        return
    names: list[tuple[compiling.Kernel, int]] = [(_write, 2), (_backward, 3)]
    if x == wide_dtype(x):
        names += [(_distance, 2), (_scale_gradient, 3), (_pull_back, 5)]
    for each, tensors in names:
        yield each, (*[x] * tensors, scale), dims
    if x == torch.float32:
        yield from ((each, (x, torch.int8, scale), dims) for each in (_codes, _exact_codes))
        yield _rescale, (torch.int32, x, scale), 2


def _flat(t: Tensor) -> Tensor:
    """Return a view of dense memory in its order."""
    return t.detach().view(-1) if t.is_contiguous() else t.detach().permute(0, 2, 3, 1).view(-1)


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


def fuses(x: Tensor, grid: Grid) -> bool:
    """Whether ``x`` is worth a kernel, fits the grid, and is plain: a kernel sees memory, and nobody sees a kernel."""
    if _CHOICE.backend == "eager" or (_CHOICE.backend == "auto" and x.numel() < SMALLEST):
        return False
    if _CHOICE.failure is not None or x.numel() <= grid.rows or _is_watched():
        return False
    if grid.rows > 1 and (x.shape[0] != grid.scale.shape[0] or x.numel() % grid.rows):
        return False  # the formula says what is wrong
    return is_plain(x) and is_plain(grid.scale) and grid.scale.is_contiguous()


def _is_watched() -> bool:
    """Whether somebody follows the operations: a compiler, a tracer, a dispatch mode, forward-mode differentiation."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return True
    return torch._C._len_torch_dispatch_stack() > 0 or torch.autograd.forward_ad._current_level >= 0


def is_plain(t: Tensor) -> bool:
    """Whether what is in memory is what the tensor says: no subclass, no tensor within vmap, no lazy negation."""
    if type(t) not in (Tensor, torch.nn.Parameter) or t.is_neg() or not torch._C._has_storage(t):
        return False
    return not torch._C._functorch.is_functorch_wrapped_tensor(t)


def _is_alike(t: Tensor, like: Tensor) -> bool:
    """Whether ``t`` is plain, and as large as ``like`` and where that is."""
    return t.shape == like.shape and t.device == like.device and t.is_contiguous() and is_plain(t)


def _is_channels_last(x: Tensor, grid: Grid) -> bool:
    return grid.rows == 1 and x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)


def _fit(grid: Grid, *tensors: Tensor) -> bool:
    """Whether these are contiguous tensors of one wide dtype, and worth a kernel."""
    first = tensors[0]
    if not fuses(first, grid) or first.dtype != wide_dtype(first.dtype):
        return False
    return all(t.dtype == first.dtype and _is_alike(t, first) for t in tensors)


@functools.lru_cache(maxsize=256)
def _limit_tensor(quant_min: int, quant_max: int, device: torch.device) -> Tensor:
    return torch.tensor([float(quant_min), float(quant_max)], device=device, dtype=torch.float32)
