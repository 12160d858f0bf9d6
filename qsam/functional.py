"""The maths of fake quantization, as pure functions of tensors.

    v = x / s,    codes = round(clip(v, Qn, Qp)),    Q(x; s) = s * codes

Everything is computed in fp32 (fp64 for fp64 input) whatever the dtype of ``x``, and by true division, because a
multiplication by ``1 / s`` rounds exact ties to the other side, and 16-bit arithmetic gives wrong codes.
"""

from __future__ import annotations

import inspect
import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from qsam.fused import kernels

SCALE_FLOOR = float(torch.finfo(torch.float32).tiny)
"""The smallest scale that is ever divided by: the smallest normal fp32 number."""


class Grid(NamedTuple):
    """A grid for a fused kernel: limits Qn and Qp, the factor gs, one step size per contiguous row, and the offset."""

    scale: Tensor
    quant_min: int
    quant_max: int
    grad_scale: float
    rows: int
    offset: float = 0.0


Limit = int | Tensor
"""Qn or Qp; a tensor in a compiled kernel, in which a number would be a constant."""


def integer_limits(bits: int, signed: bool) -> tuple[int, int]:
    """Return the integer limits ``(Qn, Qp)`` of a ``bits``-bit grid.

    Signed: ``Qn = -2^(bits-1)``, ``Qp = 2^(bits-1) - 1``. Unsigned: ``Qn = 0``, ``Qp = 2^bits - 1``.

    Args:
        bits: Width of the integers, in [2, 8].
        signed: Whether the grid holds negative values.

    Returns:
        The lowest and the highest integer.

    Raises:
        TypeError: ``bits`` is not an integer.
        ValueError: ``bits`` lies outside [2, 8].

    Example:
        >>> integer_limits(2, signed=True), integer_limits(4, signed=False)
        ((-2, 1), (0, 15))

    References:
        Esser et al., Learned Step Size Quantization, ICLR 2020, section 2.
    """
    if isinstance(bits, bool) or not isinstance(bits, int):
        raise TypeError(f"`bits` must be an integer in [2, 8], got {bits!r} of type {type(bits).__name__}.")
    if not 2 <= bits <= 8:
        raise ValueError(f"`bits` must be an integer in [2, 8], got {bits}. To keep a tensor in float, give None.")
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which a tensor of ``dtype`` is quantized: fp32, or fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)


def positive(scale: Tensor) -> Tensor:
    """Return the effective step size ``max(|scale|, SCALE_FLOOR)``."""
    return scale.abs().clamp_min(SCALE_FLOOR)


def quantize(x: Tensor, scale: Tensor, quant_min: int, quant_max: int) -> Tensor:
    """Return the integer codes ``round(clip(x / s, Qn, Qp))``, ties to even, as fp32 (fp64) numbers.

    Args:
        x: Any shape, any floating dtype.
        scale: Step size s, broadcastable against ``x``; used as ``positive(scale)``.
        quant_min: Qn.
        quant_max: Qp.

    Returns:
        Integers of the shape of ``x``, in ``wide_dtype(x.dtype)``.

    Example:
        >>> quantize(torch.tensor([-9.0, -0.5, 0.5, 1.5, 9.0]), torch.ones(1), -2, 1)
        tensor([-2., -0.,  0.,  1.,  1.])
    """
    wide = wide_dtype(x.dtype)
    return codes_of(x.to(wide) / positive(scale).to(wide), quant_min, quant_max)


def codes_of(v: Tensor, quant_min: Limit, quant_max: Limit) -> Tensor:
    """Return ``round(clip(v, Qn, Qp))`` of ``v = x / s``, ties to even."""
    return torch.clamp(v, quant_min, quant_max).round()  # type: ignore[arg-type]


def clipped(v: Tensor, quant_min: Limit, quant_max: Limit) -> Tensor:
    """Return ``1 - M``, True where ``v <= Qn`` or ``v >= Qp`` and no gradient passes."""
    return (v <= quant_min) | (v >= quant_max)


def slope_of(v: Tensor, codes: Tensor, outside: Tensor) -> Tensor:
    """Return ``dQ/ds``: ``codes - v`` inside, the limit (which is the code there) outside."""
    return codes - v.masked_fill(outside, 0)


class _FakeQuantize(torch.autograd.Function):
    """Q(x; s) with the straight-through gradient of LSQ, by a kernel if one fits. Saves x and s, nothing else."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, scale: Tensor, quant_min: int, quant_max: int, grad_scale: float) -> Tensor:
        fused = kernels.quantized(x, _grid(x, scale, quant_min, quant_max, grad_scale))
        if fused is not None:
            return fused
        codes = quantize(x, scale, quant_min, quant_max)
        return (codes * positive(scale).to(codes.dtype)).to(x.dtype)

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple[Tensor, Tensor, int, int, float], output: Tensor) -> None:
        x, scale, *ctx.settings = inputs  # type: ignore[attr-defined]
        ctx.save_for_backward(x, scale)
        ctx.save_for_forward(x, scale)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        x, scale = ctx.saved_tensors  # type: ignore[attr-defined]
        needs = ctx.needs_input_grad[:2]  # type: ignore[attr-defined]
        dx, ds = fake_quantize_vjp(x, scale, grad, *ctx.settings, needs=needs)  # type: ignore[attr-defined]
        return dx, ds, None, None, None


class _WithTangent(_FakeQuantize):
    """The same with a tangent, for ``torch.func.jvp``; ``torch.compile`` refuses a Function that has one."""

    @staticmethod
    def jvp(ctx: FunctionCtx, x_tangent: Tensor | None, scale_tangent: Tensor | None, *_: None) -> Tensor:
        """Return ``M(x) * dx + gs * dQ/ds * ds``: the backward's Jacobian times the tangents."""
        x, scale = ctx.saved_tensors  # type: ignore[attr-defined]
        quant_min, quant_max, grad_scale = ctx.settings  # type: ignore[attr-defined]
        v, outside = _clipping(x, scale, quant_min, quant_max)
        tangent: Tensor = torch.zeros_like(x) if x_tangent is None else x_tangent.masked_fill(outside, 0)
        if scale_tangent is None:
            return tangent
        slope = slope_of(v, codes_of(v, quant_min, quant_max), outside)
        of_scale = torch.where(scale < 0, -scale_tangent, scale_tangent) * grad_scale
        return tangent.add((slope * of_scale).to(x.dtype))


def _clipping(x: Tensor, scale: Tensor, quant_min: int, quant_max: int) -> tuple[Tensor, Tensor]:
    wide = wide_dtype(x.dtype)
    v = x.to(wide) / positive(scale).to(wide)
    return v, clipped(v, quant_min, quant_max)


def _grid(x: Tensor, scale: Tensor, quant_min: int, quant_max: int, grad_scale: float) -> Grid | None:
    """Return the grid, if each scale belongs to a contiguous row of a contiguous ``x``; else None."""
    if torch.compiler.is_compiling() or scale.dim() > x.dim():
        return None
    if scale.numel() == 1:
        return Grid(scale, quant_min, quant_max, grad_scale, 1)
    if scale.dim() != x.dim():
        return None
    leading = next((d for d, size in enumerate(scale.shape) if size != x.shape[d]), x.dim())
    if any(size != 1 for size in scale.shape[leading:]):
        return None
    return Grid(scale, quant_min, quant_max, grad_scale, scale.numel())


# torch binds the arguments of each call by this signature, and would otherwise compute it again each time, in 0.1 ms.
_FakeQuantize.forward.__signature__ = inspect.signature(_FakeQuantize.forward)  # type: ignore[attr-defined]


def fake_quantize(x: Tensor, scale: Tensor, quant_min: int, quant_max: int, grad_scale: float = 1.0) -> Tensor:
    r"""Return ``Q(x; s) = s * round(clip(x / s, Qn, Qp))`` with LSQ's straight-through gradient.

    With ``v = x / s`` and ``M = 1[Qn < v < Qp]``, both decided on ``v`` and not on ``round(v)``::

        dQ/dx = M
        dQ/ds = round(v) - v  where M,   Qn where v <= Qn,   Qp where v >= Qp

    and the gradient of ``s`` is the sum over the entries that share it, times ``grad_scale``. The gradient is scaled
    directly, because the usual detach trick changes the value of ``s`` by up to 1e-3 in fp16.

    Args:
        x: Any shape, any floating dtype; the result has the same shape and dtype.
        scale: Step size s, fp32, broadcastable against ``x``. ``max(|s|, tiny)`` is used, and the gradient passes
            through it with the sign of ``s``, so that a scale at the bound still learns.
        quant_min: Qn <= 0.
        quant_max: Qp > 0.
        grad_scale: LSQ's ``gs = 1 / sqrt(N * Qp)``; see :func:`lsq_grad_scale`.

    Returns:
        The quantized tensor, differentiable in ``x`` and ``scale``.

    Example:
        >>> x = torch.tensor([0.3, 7.2]).requires_grad_()
        >>> s = torch.ones(1).requires_grad_()
        >>> fake_quantize(x, s, -8, 7).sum().backward()
        >>> x.grad, s.grad  # (0 - .3) + 7: the entry at 7.2 is clipped although it rounds to 7
        (tensor([1., 0.]), tensor([6.7000]))

    References:
        Esser et al., ICLR 2020, Eq 1-3 and section 2.2.
    """
    if not x.dim():
        return fake_quantize(x[None], scale, quant_min, quant_max, grad_scale)[0]
    function = _FakeQuantize if torch.compiler.is_compiling() else _WithTangent
    return function.apply(x, scale, quant_min, quant_max, grad_scale)  # type: ignore[no-any-return]


def fake_quantize_vjp(  # noqa: PLR0917 (those of fake_quantize, and the gradient)
    x: Tensor, scale: Tensor, grad: Tensor, quant_min: int, quant_max: int, grad_scale: float,
    *, needs: tuple[bool, bool] = (True, True), overwrite: bool = False,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """Return ``M(x) * grad`` and ``gs * <grad, dQ/ds>``, as the backward of :func:`fake_quantize`.

    ``grad`` is dL/dQ. ``needs`` selects the results; the other one is None. ``overwrite`` lets dx overwrite ``grad``.
    """
    fused = kernels.pulled_back(x, _grid(x, scale, quant_min, quant_max, grad_scale), grad, overwrite)
    if fused is not None:
        return fused[0] if needs[0] else None, fused[1] if needs[1] else None
    v, outside = _clipping(x, scale, quant_min, quant_max)
    dx = grad.masked_fill(outside, 0) if needs[0] else None
    if not needs[1]:
        return dx, None
    slope = slope_of(v, codes_of(v, quant_min, quant_max), outside)
    ds = (slope * grad).sum_to_size(scale.shape) * grad_scale
    # Q depends on |s|, whose slope is -1 for a negative s, so that a descent still moves |s| the right way.
    return dx, torch.where(scale < 0, -ds, ds).to(scale.dtype)


def lsq_grad_scale(count: int, quant_max: float) -> float:
    """Return LSQ's gradient scale ``gs = 1 / sqrt(N * Qp)``.

    Args:
        count: N, how many entries of ONE sample share the step size: the weights of the tensor, channel or group;
            for activations the features of one sample.
        quant_max: Qp, the highest level in units of s.

    Returns:
        The factor of the step size's gradient.

    Example:
        >>> lsq_grad_scale(100, 1)
        0.1

    References:
        Esser et al., ICLR 2020, section 2.2.
    """
    return float((max(count, 1) * quant_max) ** -0.5)


Axis = int | tuple[int, ...]
"""The channel dimension, or several: then each index of all of them together is a channel (expert and output)."""


def channel_axes(axis: Axis, dims: int) -> tuple[int, ...]:
    """Return the channel dimensions of a tensor of ``dims`` dimensions, from the front, ascending."""
    return tuple(sorted([a % dims for a in axis])) if isinstance(axis, tuple) else (axis % dims,)


def channel_count(x: Tensor, axis: Axis) -> int:
    """Return the number of channels of ``x``."""
    return math.prod([x.shape[a] for a in channel_axes(axis, x.dim())])


def are_leading(axis: Axis | None) -> bool:
    """Whether the channel dimensions are the first ones, so that channels are consecutive rows in memory.

    Example:
        >>> are_leading(0), are_leading((0, 1)), are_leading(1), are_leading((0, 2))
        (True, True, False, False)
    """
    return axis == 0 or (isinstance(axis, tuple) and axis == tuple(range(len(axis))))


def to_groups(x: Tensor, axis: Axis, group_size: int) -> Tensor:
    """View ``x`` as ``(C, G, group_size)``: channels first, then groups of consecutive flattened entries.

    Args:
        x: Two or more dimensions, with C channels along ``axis``.
        axis: The channel dimension, or several.
        group_size: Entries per group; divides ``x.numel() / C``.

    Returns:
        A view or copy of shape ``(C, G, group_size)``.

    Raises:
        ValueError: ``group_size`` does not divide the entries of a channel.
    """
    channels = channel_count(x, axis)
    per_channel = x.numel() // max(channels, 1)
    if group_size < 1 or per_channel % group_size:
        raise ValueError(
            f"`group_size` must divide the {per_channel} entries of each channel of a tensor of shape "
            f"{tuple(x.shape)} (channel axis {axis}), got {group_size}."
        )
    axes = channel_axes(axis, x.dim())
    return x.movedim(axes, tuple(range(len(axes)))).reshape(channels, -1, group_size)


def from_groups(groups: Tensor, shape: torch.Size, axis: Axis) -> Tensor:
    """Undo :func:`to_groups`: return a tensor of ``shape`` from ``(C, G, group_size)``."""
    axes = channel_axes(axis, len(shape))
    moved = [shape[a] for a in axes] + [size for d, size in enumerate(shape) if d not in axes]
    return groups.reshape(moved).movedim(tuple(range(len(axes))), axes)
