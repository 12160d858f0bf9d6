"""A Linear layer and the quantization of its input as one operation, by integers where both are on their grids.

    y = Q(x) W^T + b                            dx = M(x) * (g W),   dW = g^T Q(x),   ds from x and g W
      = s_x s_W (X Y^T) + b    where W = s_W Y    X, Y the integers

The backward computes Q(x) again from x, in memory that dx will use, so quantizing the inputs costs no memory. A
processor with int8 instructions multiplies codes several times as fast as floats. Integers add up exactly, so y agrees
with an fp32 product to the rounding of fp32. Each forward checks whether the weight is on its grid; in a perturbed pass
it is not, and the product is in fp32. The backward is always in fp32.

The input's hook gives a :class:`DeferredInput` only to a layer without other hooks.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.function import FunctionCtx
from torch.nn import functional

from qsam.functional import Grid, fake_quantize, fake_quantize_vjp
from qsam.fused import kernels, native
from qsam.private import ask, has_global_hook
from qsam.quantizers.base import Quantizer

SMALLEST = 128
"""Rows of an input from which computing the integers of the weight pays."""

COLUMNS = range(16, 2**16 + 1)
"""Columns of a weight: torch's integer product is wrong for one column; up to 2^16 no sum overflows int32."""

OFFSET = 128
"""Subtracted from the integers of an unsigned 8-bit grid, so that they fit int8."""


@dataclasses.dataclass(slots=True, eq=False)
class DeferredInput:
    """A stand-in for an input that its Linear layer will quantize; torch's functions accept it as a tensor."""

    x: Tensor
    grid: Grid
    quantizer: Quantizer
    weights: Quantizer | None

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Quantize the input and call the function, for ``linear`` in one operation."""
        if func is functional.linear and len(args) == 3 and isinstance(args[0], DeferredInput):
            return _linear(*args)
        return func(*_quantized(args), **_quantized(dict(kwargs or {})))


def deferred(module: nn.Module, quantizer: Quantizer, x: Tensor) -> DeferredInput | None:
    """Return a stand-in for ``x``, which ``module`` will quantize; None if ``quantizer`` has to quantize it now."""
    if type(module).forward is not nn.Linear.forward or x.dtype != torch.float32 or not _is_private(module):
        return None
    grid = quantizer.grid(x)
    if grid is None or grid.rows != 1 or grid.offset or x.device.type != "cpu" or x.dim() < 2 or not x.is_contiguous():
        return None
    if not kernels.fuses(x, grid) or torch.is_autocast_enabled("cpu"):
        return None
    if torch.is_grad_enabled() and not (x.requires_grad or grid.scale.requires_grad):
        return None  # autograd keeps Q(x) for dW, because x may change before the backward
    found = DeferredInput(x, grid, quantizer, getattr(module, "weight_quantizer", None))
    return found if torch.overrides.has_torch_function((found,)) else None  # it can be switched off


def _is_private(module: nn.Module) -> bool:
    """Whether a module runs its class's forward, and no hook but the input's is called with its tensors."""
    hooks = (module._forward_hooks, module._backward_hooks, module._backward_pre_hooks)
    if "forward" in vars(module) or len(module._forward_pre_hooks) > 1 or any(hooks):
        return False
    return not has_global_hook()


def _quantized(value: Any) -> Any:
    """Return an argument of a function with every stand-in in it quantized."""
    if isinstance(value, DeferredInput):
        return value.quantizer(value.x)
    if isinstance(value, dict):
        return {key: _quantized(part) for key, part in value.items()}
    return type(value)(map(_quantized, value)) if type(value) in (list, tuple) else value


def _linear(deferred: DeferredInput, weight: Tensor, bias: Tensor | None) -> Tensor:
    x, scale = deferred.x, deferred.grid.scale
    others = [t for t in (weight, bias) if t is not None]
    plain = all(t.dtype == x.dtype and t.device == x.device and kernels.is_plain(t) for t in others)
    fits = weight.dim() == 2 and weight.shape[1] == x.shape[-1] and len(weight) > 0
    unpacked: Callable[[Tensor], Any] = forward_ad.unpack_dual
    with_tangent = any(unpacked(t).tangent is not None for t in (x, scale, *others))
    if not plain or not fits or with_tangent or (bias is not None and bias.shape != weight.shape[:1]):
        return functional.linear(deferred.quantizer(x), weight, bias)
    return _Linear.apply(x, scale, weight, bias, deferred.grid, deferred.weights)  # type: ignore[no-any-return]


class _Linear(torch.autograd.Function):
    """``Q(x) W^T + b``. Saves only x, s and W."""

    @staticmethod
    def forward(  # noqa: PLR0917 (autograd passes no keywords)
        ctx: FunctionCtx,
        x: Tensor,
        scale: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        grid: Grid,
        weights: Quantizer | None,
    ) -> Tensor:
        ctx.save_for_backward(x, scale, weight)
        ctx.grid = grid  # type: ignore[attr-defined]
        out = x.new_empty(*x.shape[:-1], len(weight))  # not a view of a product, because the caller may write into it
        rows = out.view(-1, len(weight))
        if not _of_integers(x, grid, weight, bias, weights, rows):
            quantized = _on_grid(x, scale, grid).view(-1, x.shape[-1])
            if bias is None:
                torch.mm(quantized, weight.t(), out=rows)
            else:
                torch.addmm(bias, quantized, weight.t(), out=rows)
        return out

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return dx, ds, dW and db."""
        x, scale, weight = ctx.saved_tensors  # type: ignore[attr-defined]
        grid: Grid = ctx.grid  # type: ignore[attr-defined]
        needs_x, needs_s, needs_w, needs_b = ctx.needs_input_grad[:4]  # type: ignore[attr-defined]
        # With create_graph=True and is_grads_batched=True nothing may be written in place.
        in_place = not torch.is_grad_enabled() and kernels.is_plain(grad)
        rows = grad.reshape(-1, grad.shape[-1])
        quantized = _on_grid(x, scale, grid).view(-1, x.shape[-1])
        dw = rows.t() @ quantized if needs_w else None
        dx = ds = None
        if needs_x or needs_s:  # Q(x) is no longer needed: its memory takes the gradient
            g = torch.mm(rows, weight, out=quantized if in_place else None).view(x.shape)
            dx, ds = fake_quantize_vjp(x, scale, g, *grid[1:4], overwrite=in_place)
        return dx if needs_x else None, ds if needs_s else None, dw, rows.sum(0) if needs_b else None, None, None


def _on_grid(x: Tensor, scale: Tensor, grid: Grid) -> Tensor:
    """Return Q(x); without a graph by the kernel directly, which takes half as long to call as an autograd Function."""
    fused = None if torch.is_grad_enabled() else kernels.quantized(x, grid)
    return fake_quantize(x, scale, *grid[1:4]) if fused is None else fused


# --- by integers ------------------------------------------------------------------------------------------------------


def _of_integers(  # noqa: PLR0917
    x: Tensor, grid: Grid, weight: Tensor, bias: Tensor | None, weights: Quantizer | None, out: Tensor
) -> bool:
    """Write y by integers; return False if an operand is not on its grid, or the processor lacks the instructions."""
    if weights is None or weights.off_grid or not _has_instructions() or not weight.is_contiguous():
        return False
    of_weight = _of_whole_levels(weights.grid(weight))
    if of_weight is None or of_weight.quant_max >= OFFSET or of_weight.scale.dtype != torch.float32:
        return False
    if len(out) < SMALLEST or x.shape[-1] not in COLUMNS or of_weight.rows not in {1, len(weight)}:
        return False
    w_codes, gap = codes(weight, of_weight)
    if gap != 0:
        return False
    x_codes, gap = codes(x, grid)
    if not math.isfinite(gap):
        return False
    torch._int_mm(x_codes.view(-1, x.shape[-1]), w_codes.t(), out=out.view(torch.int32))
    shift = w_codes.sum(1, dtype=torch.int32) * OFFSET if grid.quant_max >= OFFSET else None
    bias = None if bias is None else bias.contiguous()
    others = [None if t is None else t.data_ptr() for t in (shift, bias)]
    scales = grid.scale.data_ptr(), of_weight.scale.data_ptr(), of_weight.rows
    native.call("rescale", x.dtype, out.data_ptr(), *scales, *others, *out.shape, kernels.thread_count(out.numel()))
    return True


def _of_whole_levels(grid: Grid | None) -> Grid | None:
    """Return the same levels as integers: those half-way between integers are odd multiples of half a step."""
    if grid is None or not grid.offset:
        return grid
    low, high = 2 * grid.quant_min + 1, 2 * grid.quant_max + 1
    return grid._replace(scale=grid.scale / 2, quant_min=low, quant_max=high, offset=0.0)


def codes(x: Tensor, grid: Grid) -> tuple[Tensor, float]:
    """Return the integers of Q(x) as int8, and the largest distance between Q(x) and x (infinity if x holds a NaN).

    On a grid that ends above 127 ``OFFSET`` is subtracted from the integers.
    """
    out = torch.empty(x.shape, dtype=torch.int8)
    sizes = grid.rows, x.numel() // grid.rows, grid.quant_min, grid.quant_max, 0.0, kernels.thread_count(x.numel())
    return out, native.call("codes", x.dtype, x.data_ptr(), out.data_ptr(), grid.scale.data_ptr(), *sizes)


@functools.cache
def _has_instructions() -> bool:
    """Whether this processor has int8 instructions, and torch's integer product is exact on it."""
    if not torch.cpu.get_capabilities().get("avx512_vnni"):
        return False
    shapes = ((1, 16, 3), (7, 67, 9), (130, 300, 70))
    return ask("torch._int_mm", lambda: all(_is_exact(*shape) for shape in shapes), False)


def _is_exact(rows: int, columns: int, outputs: int) -> bool:
    """Whether torch's product is exact on extreme values of int8, which may saturate."""
    corners = torch.tensor([-128, 127, -128, -1, 0, 1, 77], dtype=torch.int8)
    a = corners.repeat(rows * columns)[: rows * columns].view(rows, columns)
    b = corners.flip(0).repeat(outputs * columns)[: outputs * columns].view(outputs, columns)
    a[0], b[0] = -128, -128
    return torch.equal(torch._int_mm(a, b.t()), (a.long() @ b.long().t()).int())
