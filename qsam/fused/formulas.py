"""The kernels as formulas, which ``torch.compile`` compiles for a GPU and with which every kernel is compared.

Each takes rows ``(n,)`` with one scale ``(1,)``, or ``(R, n)`` with scales ``(R, 1)``, and ``(Qn, Qp, offset)``. It
writes in place, and returns ``<grad, dQ/ds>`` of each row and the largest distance between Q(w) and p, each of them
None if the kernel does not compute it. Arguments are in the order of ``sweeps.c``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qsam.functional import clipped, codes_of, positive, slope_of, wide_dtype

Found = tuple[Tensor | None, Tensor | None]


def write(x: Tensor, out: Tensor, scale: Tensor, limits: Tensor) -> Found:
    """Write ``out <- Q(x)``."""
    out.copy_(_quantized(x, scale, limits).to(x.dtype))
    return None, None


def backward(x: Tensor, grad: Tensor, out: Tensor, scale: Tensor, limits: Tensor) -> Found:
    """Write ``out <- M(x) * grad``; return ds."""
    dx, ds, _ = _pulled(x, grad, scale, limits)
    out.copy_(dx)
    return ds, None


def pull_back(w: Tensor, grad: Tensor, p: Tensor, scale: Tensor, limits: Tensor) -> Found:
    """Write ``grad <- M(w) * grad`` and ``p <- w``; return ds, and the distance of p as it was."""
    dw, ds, q = _pulled(w, grad, scale, limits)
    far = _farthest(q, p)
    grad.copy_(dw)
    p.copy_(w)
    return ds, far


def scale_gradient(w: Tensor, grad: Tensor, p: Tensor, scale: Tensor, limits: Tensor) -> Found:
    """Return ds and the distance of p."""
    _, ds, q = _pulled(w, grad, scale, limits)
    return ds, _farthest(q, p)


def perturb(  # noqa: PLR0917 (tensors of one kernel)
    w: Tensor, p: Tensor, step: Tensor, coefficient: Tensor, scale: Tensor, limits: Tensor
) -> Found:
    """Write ``p <- Q(w) + coefficient * step``; return the distance of p as it was."""
    q = _quantized(w, scale, limits)
    far = _farthest(q, p)
    p.copy_(q + step * coefficient)
    return None, far


def _quantized(x: Tensor, scale: Tensor, limits: Tensor) -> Tensor:
    s = positive(scale).to(wide_dtype(x.dtype))
    low, high, offset = limits.unbind()
    return _level(x.to(s.dtype) / s, low, high, offset) * s


def _pulled(x: Tensor, grad: Tensor, scale: Tensor, limits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``M * grad``, ``<grad, dQ/ds>`` over what shares a scale, and Q(x)."""
    s = positive(scale).to(wide_dtype(x.dtype))
    v = x.to(s.dtype) / s
    low, high, offset = limits.unbind()
    outside, levels = clipped(v, low, high + 2 * offset), _level(v, low, high, offset)
    total = (slope_of(v, levels, outside) * grad).sum(-1, keepdim=True)
    # s enters as |s|: on the negative side its slope is -1.
    return grad.masked_fill(outside, 0), torch.where(scale < 0, -total, total), levels * s


def _level(v: Tensor, low: Tensor, high: Tensor, offset: Tensor) -> Tensor:
    """Return Q(x) / s; subtracting ``0 - offset`` leaves a level of -0 as it is where the offset is 0."""
    return codes_of(v - offset, low, high) - (0 - offset)


def _farthest(q: Tensor, p: Tensor) -> Tensor:
    """Return the largest distance between q and p, in which NaN counts as 0."""
    return (q - p).abs().nan_to_num(0.0, torch.inf).amax()
