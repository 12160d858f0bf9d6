"""A Linear layer and the quantization of its input, as one operation, by integers where both are on their grids.

    y = Q(x) W^T + b                            dx = M(x) * (g W),   dW = g^T Q(x),   ds from x and g W
      = s_x s_W (X Y^T) + b    where W = s_W Y    X, Y the integers

**One operation**: Q(x) is not kept for the backward, which makes it anew from x; so quantization of the inputs costs no
memory, and no time for new memory.

**Integers**: a processor with instructions for int8 multiplies codes several times as fast as numbers. It is what the
deployed layer computes. Integers add up exactly, so y is rounded less often than a product in fp32, and agrees with it
to the rounding of that. Whether the weight is on its grid is read off the weight in each forward: in a perturbed pass
it is not, and is multiplied as it is. The backward is that of any Linear, for its gradients are no integers.

Nothing of this shows: the input's hook gives a :class:`Pending` only to a layer that nobody else looks into.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn import functional
from torch.nn.modules import module as every_module

from qsam import backend, formulas, kernels
from qsam.functional import fake_quantize
from qsam.quantizers.base import Quantizer

_log = logging.getLogger("qsam")

SMALLEST = 128
"""Rows of an input from which it is worth to find the integers of a weight."""

COLUMNS = range(16, 2**16 + 1)
"""Columns of a weight: torch's product of integers is wrong for one; up to 2^16 no sum of products leaves int32."""


def pending(module: nn.Module, quantizer: Quantizer, x: Tensor) -> Pending | None:
    """Return ``x``, to be quantized in its layer; None where it has to be quantized now.

    Args:
        module: Whose input it is.
        quantizer: Of the input.
        x: The input.
    """
    if type(module).forward is not nn.Linear.forward or not _is_private(module) or x.dtype != torch.float32:
        return None
    grid = quantizer.grid(x)
    if grid is None or grid.rows != 1 or not kernels.fuses(x, grid):
        return None
    if x.device.type != "cpu" or x.dim() < 2 or not x.is_contiguous() or torch.is_autocast_enabled("cpu"):
        return None
    if not torch._C._is_torch_function_enabled():
        return None
    if torch.is_grad_enabled() and not (x.requires_grad or grid.scale.requires_grad):
        return None  # Q(x) is kept for dW, as any input is, and x need not stay as it is
    return Pending(x, grid, quantizer, module._modules.get("weight_quantizer"))  # type: ignore[arg-type]


def _is_private(module: nn.Module) -> bool:
    """Whether a module runs as its class says, and nobody but the input's hook is called with its tensors."""
    hooks = (module._forward_hooks, module._backward_hooks, module._backward_pre_hooks)
    if "forward" in vars(module) or len(module._forward_pre_hooks) > 1 or any(hooks):
        return False
    return not every_module._has_any_global_hook()  # type: ignore[no-untyped-call]


@dataclasses.dataclass(slots=True, eq=False)
class Pending:
    """An input on its way into its Linear layer, which will quantize it; torch's functions take it for a tensor.

    Attributes:
        x: The input.
        grid: Of Q.
        quantizer: Of the input.
        weights: The quantizer of the layer's weight, or None.
    """

    x: Tensor
    grid: kernels.Grid
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
        """Quantize, whoever asks; a Linear does it in one operation with its own."""
        if func is functional.linear and len(args) == 3 and isinstance(args[0], Pending):
            return _linear(*args)
        args, kwargs = torch.utils._pytree.tree_map_only(Pending, lambda p: p.quantizer(p.x), (args, kwargs or {}))
        return func(*args, **kwargs)


def _linear(pending: Pending, weight: Tensor, bias: Tensor | None) -> Tensor:
    x, scale = pending.x, pending.grid.scale
    fits = weight.dim() == 2 and weight.shape[1] == x.shape[-1] and len(weight) > 0 and _is_like(weight, x)
    if not fits or not (bias is None or (bias.shape == weight.shape[:1] and _is_like(bias, x))):
        return functional.linear(pending.quantizer(x), weight, bias)
    return _Linear.apply(x, scale, weight, bias, pending.grid, pending.weights)  # type: ignore[no-any-return]


def _is_like(t: Tensor, x: Tensor) -> bool:
    return t.dtype == x.dtype and t.device == x.device and backend.is_plain(t)


class _Linear(torch.autograd.Function):
    """``Q(x) W^T + b``. Saves x, s and W, nothing else; a second derivative goes through the formulas."""

    @staticmethod
    def forward(  # noqa: PLR0917 (autograd passes no keywords)
        ctx: FunctionCtx,
        x: Tensor,
        scale: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        grid: kernels.Grid,
        weights: Quantizer | None,
    ) -> Tensor:
        """Return y."""
        ctx.save_for_backward(x, scale, weight, bias)  # type: ignore[arg-type]
        ctx.grid = grid  # type: ignore[attr-defined]
        out = x.new_empty(*x.shape[:-1], len(weight))  # not a view of a product: somebody may write into it
        rows = out.view(-1, len(weight))
        if not _of_integers(x, grid, weight, bias, weights, rows):
            quantized = kernels.on_grid(x, grid).view(-1, x.shape[-1])
            if bias is None:
                torch.mm(quantized, weight.t(), out=rows)
            else:
                torch.addmm(bias, quantized, weight.t(), out=rows)
        return out

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return dx, ds, dW and db."""
        grid: kernels.Grid = ctx.grid  # type: ignore[attr-defined]
        needs = ctx.needs_input_grad[:4]  # type: ignore[attr-defined]
        saved = ctx.saved_tensors  # type: ignore[attr-defined]
        if torch.is_grad_enabled() or not backend.is_plain(grad):  # create_graph=True; is_grads_batched=True
            return (*_differentiable(saved, grid, needs, grad), None, None)
        x, _, weight, _ = saved
        rows = grad.reshape(-1, grad.shape[-1])
        dx = ds = dw = None
        if needs[2]:
            dx = kernels.on_grid(x, grid)
            dw = rows.t() @ dx.view(-1, x.shape[-1])
        if needs[0] or needs[1]:
            dx = torch.empty_like(x) if dx is None else dx  # Q(x) has served: its memory is there
            torch.mm(rows, weight, out=dx.view(-1, x.shape[-1]))
            ds = kernels.mask_(x, grid, dx)
        return dx if needs[0] else None, ds if needs[1] else None, dw, rows.sum(0) if needs[3] else None, None, None


def _differentiable(
    saved: tuple[Tensor | None, ...], grid: kernels.Grid, needs: tuple[bool, ...], grad: Tensor
) -> list[Tensor | None]:
    """Return the gradients of x, s, W and b, with a graph of their own where graphs are made."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        leaves = [t if t is None or not need else kernels.alias(t) for t, need in zip(saved, needs, strict=True)]
        x, scale, weight, bias = leaves
        assert x is not None and scale is not None and weight is not None
        quantized = fake_quantize(x, scale, grid.quant_min, grid.quant_max, grid.grad_scale)
        out = functional.linear(quantized, weight, bias)
        wanted = [t for t, need in zip(leaves, needs, strict=True) if t is not None and need]
        found = iter(torch.autograd.grad(out, wanted, grad, create_graph=create_graph))
    return [next(found) if need else None for need in needs]


# --- by integers ------------------------------------------------------------------------------------------------------


def _of_integers(  # noqa: PLR0917
    x: Tensor, grid: kernels.Grid, weight: Tensor, bias: Tensor | None, weights: Quantizer | None, out: Tensor
) -> bool:
    """Write y; return False where an operand is not on its grid, or this processor has no use for integers."""
    if weights is None or getattr(weights, "off_grid", False) or not _has_instructions():
        return False
    of_weight = weights.grid(weight)
    if of_weight is None or of_weight.quant_max >= formulas.OFFSET or of_weight.rows not in {1, len(weight)}:
        return False
    if len(out) < SMALLEST or x.shape[-1] not in COLUMNS:
        return False
    if grid.scale.dtype != torch.float32 or of_weight.scale.dtype != torch.float32:
        return False
    codes = kernels.exact_codes(weight, of_weight)
    x_codes = None if codes is None else kernels.codes(x, grid)
    if codes is None or x_codes is None:
        return False
    torch._int_mm(x_codes.view(-1, x.shape[-1]), codes.t(), out=out.view(torch.int32))
    integer, zero = _zeros(len(weight))
    shift = codes.sum(1, dtype=torch.int32) * formulas.OFFSET if grid.quant_max >= formulas.OFFSET else integer
    kernels.rescale_(out, grid.scale, of_weight.scale, shift, zero if bias is None else bias.contiguous())
    return True


@functools.cache
def _zeros(count: int) -> tuple[Tensor, Tensor]:
    """Return a shift and a bias of nothing."""
    return torch.zeros(count, dtype=torch.int32), torch.zeros(count, dtype=torch.float32)


@functools.cache
def _has_instructions() -> bool:
    """Whether this processor multiplies int8 by instructions of its own, and torch does so without an error."""
    if not torch.cpu._is_vnni_supported():
        return False
    try:
        return all(_is_exact(*shape) for shape in ((1, 16, 3), (7, 67, 9), (130, 300, 70)))
    except RuntimeError as error:
        _log.info("qsam multiplies no integers: %s", error)
        return False


def _is_exact(rows: int, columns: int, outputs: int) -> bool:
    """Try torch's product out on corners of int8: what saturates on the way is wrong."""
    corners = torch.tensor([-128, 127, -128, -1, 0, 1, 77], dtype=torch.int8)
    a = corners.repeat(rows * columns)[: rows * columns].view(rows, columns)
    b = corners.flip(0).repeat(outputs * columns)[: outputs * columns].view(outputs, columns)
    a[0], b[0] = -128, -128
    return torch.equal(torch._int_mm(a, b.t()), (a.long() @ b.long().t()).int())
