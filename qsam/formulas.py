"""What the fused kernels compute: the formulas of :mod:`qsam.functional`, put together to be compiled.

Each takes rows ``(n,)`` with one scale ``(1,)``, or ``(R, n)`` with scales ``(R, 1)``, and limits ``(Qn, Qp)``. What it
writes is handed in (:mod:`qsam.compiling` says how it may be what it reads); what it returns is small.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qsam.functional import clipped, codes_of, positive, slope_of, wide_dtype

OFFSET = 128
"""What is taken off the integers of an unsigned 8-bit grid, so that they fit int8."""


def write(x: Tensor, out: Tensor, scale: Tensor, limits: Tensor) -> None:
    """Write ``out <- Q(x)``."""
    out.copy_(_codes_times_scale(x, scale, limits).to(x.dtype))


def codes(x: Tensor, codes: Tensor, scale: Tensor, limits: Tensor) -> Tensor:
    """Write the integers of Q(x), less ``OFFSET`` where they end above 127; return each row's largest, without sign."""
    found = codes_of(x / positive(scale), *limits.unbind())
    _put(found, codes, limits)
    return found.abs().amax(-1, keepdim=True)


def exact_codes(x: Tensor, codes: Tensor, scale: Tensor, limits: Tensor) -> Tensor:
    """Write the integers of Q(x) as :func:`codes`; return the largest distance of x and Q(x) in each row."""
    s = positive(scale)
    found = codes_of(x / s, *limits.unbind())
    _put(found, codes, limits)
    return _farthest(found * s, x)


def _put(found: Tensor, codes: Tensor, limits: Tensor) -> None:
    codes.copy_((found - (limits[1] > 127) * OFFSET).to(codes.dtype))


def rescale(  # noqa: PLR0917 (tensors of one kernel)
    product: Tensor, product_out: Tensor, x_scale: Tensor, scale: Tensor, shift: Tensor, bias: Tensor
) -> None:
    """Write ``product_out <- s_x s (product + shift) + bias``, with one s."""
    product_out.copy_((product + shift).to(bias.dtype) * positive(x_scale) * positive(scale) + bias)


def rescale_columns(  # noqa: PLR0917
    product: Tensor, product_out: Tensor, x_scale: Tensor, column_scale: Tensor, shift: Tensor, bias: Tensor
) -> None:
    """Do what :func:`rescale` does, with an s for each column."""
    rescale(product, product_out, x_scale, column_scale, shift, bias)


def backward(x: Tensor, grad: Tensor, grad_out: Tensor, scale: Tensor, limits: Tensor) -> Tensor:
    """Write ``grad_out <- M(x) * grad``; return ``<grad, dQ/ds>`` of each row."""
    s = positive(scale).to(wide_dtype(x.dtype))
    found, ds, _ = _pulled(x.to(s.dtype) / s, grad, scale, limits)
    grad_out.copy_(found)
    return ds


def pull_back(  # noqa: PLR0917 (tensors of one kernel)
    w: Tensor, grad: Tensor, p: Tensor, grad_out: Tensor, p_out: Tensor, scale: Tensor, limits: Tensor
) -> tuple[Tensor, Tensor]:
    """Write ``grad_out <- M(w) * grad`` and ``p_out <- w``; return what :func:`scale_gradient` returns."""
    s = positive(scale).to(w.dtype)
    dw, ds, codes = _pulled(w / s, grad, scale, limits)
    far = _farthest(codes * s, p)
    grad_out.copy_(dw)
    p_out.copy_(w)
    return ds, far


def scale_gradient(w: Tensor, grad: Tensor, p: Tensor, scale: Tensor, limits: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``<grad, dQ/ds>`` and the largest distance of Q(w) and p, of each row."""
    s = positive(scale).to(w.dtype)
    _, ds, codes = _pulled(w / s, grad, scale, limits)
    return ds, _farthest(codes * s, p)


def perturb(  # noqa: PLR0917
    w: Tensor, p: Tensor, step: Tensor, p_out: Tensor, scale: Tensor, limits: Tensor, coefficient: Tensor
) -> Tensor:
    """Write ``p_out <- Q(w) + coefficient * step``; return what :func:`distance` does of p as it was."""
    q = _codes_times_scale(w, scale, limits)
    far = _farthest(q, p)
    p_out.copy_(q + step * coefficient)
    return far


def distance(w: Tensor, p: Tensor, scale: Tensor, limits: Tensor) -> Tensor:
    """Return the largest distance of Q(w) and p, of each row."""
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
