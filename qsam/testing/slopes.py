"""Laws of the gradients of a uniform grid: LSQ's closed forms, written out, and autograd of the plain formula."""

from __future__ import annotations

import torch
from torch import Tensor

from qsam.quantizers import Quantizer
from qsam.testing.battery import GRADIENT, SHORT
from qsam.testing.case import (
    Case,
    claim,
    is_uniform,
    learns_scale,
    learns_shift,
    owners,
    scale_of,
    set_scale,
    shift_of,
)
from qsam.testing.grid import Plain, plain
from qsam.testing.table import law
from qsam.testing.universal import gradients

_TOLERANCE = 1e-5
"""Of the sum of magnitudes: fp32 sums of some hundred terms, each of which carries two or three roundings."""

_TINY = torch.finfo(torch.float32).tiny
"""Below it fp32 keeps few digits."""


def upstream(x: Tensor) -> Tensor:
    """Return a gradient of the output that is different in each entry, of both signs, and exact in 16 bits."""
    return ((torch.arange(x.numel()) * 37 % 101 - 40) / 64).reshape(x.shape).to(x.dtype)


def sharing(q: Quantizer, x: Tensor) -> int:
    """Return N: the entries of one row; for an activation, which has no axis, the features of one sample."""
    if q.axis is None:
        return x[0].numel() if x.dim() > 1 else x.numel()
    return int((owners(q, x) == 0).sum())


def row_sums(q: Quantizer, x: Tensor, terms: Tensor) -> Tensor:
    """Return the fp64 sum of ``terms`` over each row, in the shape of the scale."""
    sums = torch.zeros(scale_of(q).numel(), dtype=torch.float64)
    return sums.index_add(0, owners(q, x).flatten(), terms.double().flatten()).reshape(scale_of(q).shape)


def gradient_factor(q: Quantizer, x: Tensor) -> float:
    """Return LSQ's 1 / sqrt(N * Qp), Qp being the highest level in steps."""
    return float((sharing(q, x) * (q.quant_max + q.offset)) ** -0.5)


def clips(q: Quantizer, grid: Plain) -> Tensor:
    """Return where no gradient of x passes: ``stops`` or beyond, in steps from the shift."""
    low, high = q.stops
    return (grid.v <= low) | (grid.v >= high)


def slope_terms(q: Quantizer, x: Tensor, grad: Tensor) -> Tensor:
    """Return g * dQ/ds an entry: level - v inside, the outermost level in steps outside."""
    grid = plain(q, x)
    level = (grid.codes + grid.offset).double()
    return grad.double() * torch.where(clips(q, grid), level, level - grid.v.double())


def scale_gradient(q: Quantizer, x: Tensor, grad: Tensor) -> Tensor:
    """Return the gradient that autograd gives ``q.scale``, in fp64."""
    return _both_gradients(q, x, grad)[1]


def _both_gradients(q: Quantizer, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    names = [name for name, _ in q.named_parameters()]
    of_x, *of_parameters = gradients(q, x, grad)
    return of_x, of_parameters[names.index("scale")].double()


@law(is_uniform, inputs=GRADIENT)
def ste_mask_is_exact(case: Case) -> None:
    """The gradient of x is g * 1[low < v < high], decided on v: v = Qp + .2 is clipped although it rounds to Qp.

    low and high are the quantizer's ``stops``: Qn and Qp, where it does not say otherwise.
    """
    q, grad = case.quantizer, upstream(case.x)
    grid, got = plain(q, case.x), gradients(q, case.x, grad)[0]
    expected = torch.where(clips(q, grid), 0, grad)
    bounds = "{:g} < x/s < {:g}".format(*q.stops)
    sentence = f"dx must be g where {bounds} and else 0, at the bounds too: decide on x/s, not on its rounding."
    claim(got == expected, sentence, v=grid.v, got=got, expected=expected)


@law(learns_scale, inputs=GRADIENT)
def scale_gradient_has_the_slope(case: Case) -> None:
    """The gradient of s is proportional to the sum of g * dQ/ds, with one positive factor for all rows and all g."""
    q, grad = case.quantizer, upstream(case.x)
    probes = [grad, torch.where(case.x > 0, grad.abs(), -grad.abs())]
    got = torch.stack([scale_gradient(q, case.x, g) for g in probes])
    terms = [slope_terms(q, case.x, g) for g in probes]
    form = torch.stack([row_sums(q, case.x, t) for t in terms])
    size = torch.stack([row_sums(q, case.x, t.abs()) for t in terms])
    factor = (got * form).sum() / (form * form).sum().clamp_min(1e-300)
    ok = (got - factor * form).abs() <= _TOLERANCE * factor.abs() * size + _TINY
    sentence = "ds must sum g * (round(v) - v) inside, g * Qn where v <= Qn, g * Qp where v >= Qp, times one factor."
    claim(ok & (factor >= 0), sentence, got=got, expected=factor * form)


@law(learns_scale, inputs=GRADIENT)
def scale_gradient_is_scaled(case: Case) -> None:
    """The gradient of s carries 1 / sqrt(N Qp); N counts the entries of one row, or of an activation's sample."""
    q, grad = case.quantizer, upstream(case.x)
    terms, count, factor = slope_terms(q, case.x, grad), sharing(q, case.x), gradient_factor(q, case.x)
    got, expected = scale_gradient(q, case.x, grad), factor * row_sums(q, case.x, terms)
    ok = (got - expected).abs() <= _TOLERANCE * factor * row_sums(q, case.x, terms.abs()) + _TINY
    sentence = f"ds must be scaled by 1 / sqrt(N * Qp), N = {count} entries of one row (activation: of one sample)."
    claim(ok, sentence, got=got, expected=expected)


@law(learns_scale, inputs=SHORT)
def gradients_match_autograd(case: Case) -> None:
    """In fp64 dx and ds equal autograd of s * clip(v + (round(v) - v).detach(), Qn, Qp), times gs for s."""
    q, x = case.quantizer, case.x.double()
    grad, factor = upstream(x), gradient_factor(q, x)
    dx, ds = _autograd_of_the_formula(q, x, grad)
    got_x, got_s = _both_gradients(q, x, grad)
    sentence = "must be autograd's of the plain formula."
    claim((got_x - dx).abs() <= _TOLERANCE * dx.abs(), f"dx {sentence}", got=got_x, expected=dx)
    lost = 1e-12 * q.quant_max * row_sums(q, x, grad.abs())  # autograd subtracts v from round(v) after rounding
    slack = factor * (_TOLERANCE * row_sums(q, x, slope_terms(q, x, grad).abs()) + lost) + _TINY
    claim((got_s - factor * ds).abs() <= slack, f"ds {sentence}", got=got_s, expected=factor * ds)


def _autograd_of_the_formula(q: Quantizer, x: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    leaf, s = x.clone().requires_grad_(), scale_of(q).double().requires_grad_()
    shift = shift_of(q)
    b = torch.zeros(()) if shift is None else shift.double().flatten()[owners(q, x)]
    of_each = s.flatten()[owners(q, x)]
    v = (leaf - b) / of_each
    level = torch.round((v - q.offset).clip(q.quant_min, q.quant_max)).detach() + q.offset
    low, high = q.stops
    levels = torch.where((v <= low) | (v >= high), level, v + (level - v).detach())
    return torch.autograd.grad(levels * of_each + b, (leaf, s), grad)


@law(learns_shift, inputs=GRADIENT)
def shift_gradient_is_of_the_clipped(case: Case) -> None:
    """What moves all levels together has the sum of g over the clipped entries, with the scale's factor."""
    q, grad = case.quantizer, upstream(case.x)
    (name,) = [name for name, _ in q.named_parameters() if name != "scale"]
    names = [name for name, _ in q.named_parameters()]
    got = gradients(q, case.x, grad)[1 + names.index(name)].double()
    outside, factor = clips(q, plain(q, case.x)), gradient_factor(q, case.x)
    terms = torch.where(outside, grad.double(), 0)
    expected, size = factor * row_sums(q, case.x, terms), factor * row_sums(q, case.x, terms.abs())
    ok = (got - expected).abs() <= _TOLERANCE * size + _TINY
    claim(ok, f"{name!r} must have the gradient of the clipped entries.", got=got, expected=expected)


@law(learns_scale, inputs=SHORT)
def scale_never_dies(case: Case) -> None:
    """At s <= 0 and at a vanishing s the gradient of s still moves |s| the right way."""
    q, grad = case.build(), upstream(case.x)
    scale, due = scale_of(q), -scale_gradient(q, case.x, grad)
    set_scale(q, -scale)
    got = scale_gradient(q, case.x, grad)
    claim(got == due, "at -s the gradient must be minus that at s: a step moves |s|.", got=got, expected=due)
    outward = case.x.sign() * (case.x.abs() > 1e-20) * (case.x > 0 if q.quant_min == 0 else 1)
    alive = row_sums(q, case.x, outward.abs()) > 0
    for value in (0.0, -1e-40):
        set_scale(q, torch.full_like(scale, value))
        got = scale_gradient(q, case.x, outward)
        sentence = f"at s = {value} a loss that wants larger magnitudes must move s away from 0: do not clamp s."
        claim(~alive | ((got < 0) if value < 0 else (got > 0)), sentence, got=got)
