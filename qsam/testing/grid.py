"""Laws of a uniform grid, for quantizers that show ``scale`` and ``codes``. Plain formulas, none of qsam's own."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from qsam.quantizers import Quantizer
from qsam.testing.battery import SHORT
from qsam.testing.case import (
    Case,
    claim,
    codes_of,
    holds_scale,
    is_uniform,
    owners,
    row_count,
    same,
    scale_of,
    set_grid,
    set_scale,
    set_shift,
    shift_of,
)
from qsam.testing.table import law
from qsam.testing.universal import PLAIN, gradients

_RANGE = (1e-20, 1e20)
"""Between these, a factor of 2^5 neither overflows nor leaves the normal numbers."""


class Plain(NamedTuple):
    """The grid by its definition, in fp32 (fp64 for fp64), an entry each: v = (x - shift) / s, s, shift and limits."""

    v: Tensor
    s: Tensor
    low: int
    high: int
    offset: float = 0.0
    shift: Tensor | None = None

    @property
    def codes(self) -> Tensor:
        """Return round(clip(v - offset)), ties to even."""
        return torch.round((self.v - self.offset).clip(self.low, self.high))

    def levels(self, codes: Tensor) -> Tensor:
        """Return (codes + offset) * s + shift."""
        levels = (codes.to(self.s.dtype) + self.offset) * self.s
        return levels if self.shift is None else levels + self.shift


def plain(q: Quantizer, x: Tensor) -> Plain:
    """Return the grid of ``q`` at ``x``."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    rows, shift = owners(q, x), shift_of(q)
    if q.dynamic:
        step = q.step_size(x)
        assert step is not None
        s = step.to(wide).expand(x.shape)
    else:
        s = scale_of(q).to(wide).abs().flatten()[rows]
    if shift is None:
        return Plain(x.to(wide) / s, s, q.quant_min, q.quant_max, q.offset)
    b = shift.to(wide).flatten()[rows]
    return Plain((x.to(wide) - b) / s, s, q.quant_min, q.quant_max, q.offset, b)


@law(is_uniform, inputs=("edges",))
def limits_fit_in_the_bits(case: Case) -> None:
    """-2^(bits-1) <= Qn <= 0 < Qp <= 2^(bits-1) - 1; unsigned, or with a shift: Qn = 0, Qp <= 2^bits - 1."""
    q = case.quantizer
    half = 2 ** (q.bits - 1)
    unsigned = q.signed is False or (q.shift is not None and q.quant_min == 0)
    low, high = (0, 2 * half - 1) if unsigned else (-half, half - 1)
    sentence = f"`quant_min` and `quant_max` must lie in [{low}, {high}], with zero inside,"
    claim(low <= q.quant_min <= 0 < q.quant_max <= high, f"{sentence} got {q.quant_min} and {q.quant_max}.")


@law(holds_scale, inputs=(*SHORT, "zeros", "subnormal", "huge"))
def one_positive_fp32_scale_a_row(case: Case) -> None:
    """``scale`` is fp32, positive, never 0-dimensional, with one entry a tensor, channel or group."""
    q = case.quantizer
    rows, scale = row_count(q, case.x), scale_of(q)
    claim(scale.numel() == rows, f"`scale` must have {rows} entries, one a row, got shape {tuple(scale.shape)}.")
    claim(scale.dim() > 0, "`scale` must have shape (1,), not (): FSDP2 refuses scalars.")
    claim(scale.dtype == torch.float32, f"`scale` must be fp32 whatever the input is, got {scale.dtype}.")
    claim(scale > 0, "the initial `scale` must be positive.", got=scale)


@law(is_uniform)
def codes_are_integers_in_range(case: Case) -> None:
    """``codes`` are of an integer dtype, of the shape of x, in [quant_min, quant_max]."""
    q = case.quantizer
    codes = codes_of(q, case.x)
    claim(not codes.is_floating_point(), f"`codes` must have an integer dtype, got {codes.dtype}.")
    claim(codes.shape == case.x.shape, f"`codes` must have the shape of x, got {tuple(codes.shape)}.")
    ok = (codes.int() >= q.quant_min) & (codes.int() <= q.quant_max)
    claim(ok, f"`codes` must lie in [{q.quant_min}, {q.quant_max}].", x=case.x, got=codes)


@law(is_uniform)
def on_the_grid(case: Case) -> None:
    """Q(x) is (codes + offset) * scale + shift, bit for bit (but for the sign of zero), rounded once to x's dtype."""
    q = case.quantizer
    grid, got = plain(q, case.x), q(case.x)
    expected = grid.levels(codes_of(q, case.x)).to(case.x.dtype)
    sentence = "the output must be codes * scale, bit for bit: never change the value to scale a gradient."
    claim(same(got, expected), sentence, x=case.x, got=got, expected=expected)


@law(is_uniform, inputs=(*PLAIN, "edges"))
def step_size_is_that_of_the_grid(case: Case) -> None:
    """``step_size(x)``, where it is implemented, is the scale of each entry, broadcastable against x."""
    q = case.quantizer
    got, expected = q.step_size(case.x), plain(q, case.x).s
    if got is not None:
        got = got.to(expected.dtype).expand(case.x.shape)
        sentence = "`step_size` must be |scale|, of each entry its own row's."
        claim(got == expected, sentence, got=got, expected=expected)


@law(is_uniform, inputs=("normal", "heavy", "zero_channel", "edges", "spread", "normal_float64"))
def error_within_half_a_step(case: Case) -> None:
    """Inside the limits |Q(x) - x| <= s / 2: each entry goes to the nearest level."""
    q = case.quantizer
    grid, got = plain(q, case.x), q(case.x)
    inside = (grid.v >= grid.low + grid.offset) & (grid.v <= grid.high + grid.offset)
    eps = torch.finfo(case.x.dtype).eps
    slack = 1 + 2 * (grid.high - grid.low + 1) * eps  # x and Q(x) carry one rounding each
    lost = 0 if grid.shift is None else 4 * eps * grid.shift.abs()  # a sum with the shift is rounded as that is
    error = (got - case.x).abs().to(grid.s.dtype)
    sentence = "inside the limits the error must be at most half a step: round to the nearest level."
    claim(~inside | (error <= grid.s / 2 * slack + lost), sentence, x=case.x, got=got, step=grid.s)


@law(holds_scale, inputs=("edges", "edges_float64"))
def ties_go_to_even(case: Case) -> None:
    """Exact ties k + 1/2, at scales that are powers of two, go to the even neighbour, as in ONNX and torch."""
    q = case.build()
    set_grid(q, 2.0 ** scale_of(q).log2().round().clamp(-100, 100))
    grid = plain(q, case.x)
    moved = case.x.double() if grid.shift is None else case.x.double() - grid.shift.double()
    v = moved / grid.s.double() - q.offset
    tie = (v.frac().abs() == 0.5) & (v > q.quant_min) & (v < q.quant_max)
    ok = ~tie | (codes_of(q, case.x).double() == 2 * torch.round(v / 2))
    claim(ok, "an exact tie must go to the even neighbour: use torch.round.", v=v, got=codes_of(q, case.x))


@law(is_uniform)
def codes_by_true_division(case: Case) -> None:
    """``codes`` are round(clip((x - shift) / s - offset, Qn, Qp)) with a division in fp32 (fp64 for fp64)."""
    q = case.quantizer
    grid, got = plain(q, case.x), codes_of(q, case.x)
    sentence = "codes must be round(clip(x / s, Qn, Qp)) in fp32: divide, do not multiply by 1 / s."
    claim(got.to(grid.v.dtype) == grid.codes, sentence, x=case.x, v=grid.v, got=got, expected=grid.codes)


@law(is_uniform, inputs=("normal_bfloat16", "normal_float16", "edges_bfloat16", "edges_float16"))
def half_equals_fp32_rounded(case: Case) -> None:
    """A 16-bit input gives the fp32 result, rounded once: 16-bit arithmetic gives wrong codes."""
    if case.x.dtype not in (torch.bfloat16, torch.float16):
        return
    q = case.quantizer
    got, expected = q(case.x), q(case.x.float()).to(case.x.dtype)
    sentence = "a 16-bit input must give the fp32 result rounded once: compute in fp32."
    claim(same(got, expected), sentence, x=case.x, got=got, expected=expected)


@law(holds_scale, inputs=SHORT)
def powers_of_two_factor_out(case: Case) -> None:
    """Q(2^k x, 2^k s) = 2^k Q(x, s), bit for bit; a shift is multiplied too."""
    q = case.build()
    size = torch.cat([case.x[case.x != 0].abs().flatten().double(), scale_of(q).flatten().double()])
    if case.x.dtype == torch.float16 or bool((size < _RANGE[0]).any()) or bool((size > _RANGE[1]).any()):
        return
    out, scale, shift = q(case.x), scale_of(q), shift_of(q)
    for factor in (2.0**-3, 2.0**5):
        set_scale(q, scale * factor)
        if shift is not None:
            set_shift(q, shift * factor)
            kept = shift_of(q)
            if kept is None or not torch.equal(kept, shift * factor):
                return  # it is not kept as it is, and was rounded
        claim(same(q(case.x * factor), out * factor), "Q(2^k x, 2^k s) must be 2^k Q(x, s).", x=case.x, expected=out)


@law(holds_scale, inputs=SHORT)
def channels_commute(case: Case) -> None:
    """Reversing the channels, of x and of the scales, reverses those of Q(x) and moves nothing else."""
    q = case.build()
    if q.granularity == "per_tensor":
        return
    assert q.axis is not None
    out, channels = q(case.x), case.x.shape[q.axis]
    set_scale(q, scale_of(q).reshape(channels, -1).flip(0).flatten())
    if (shift := shift_of(q)) is not None:
        set_shift(q, shift.reshape(channels, -1).flip(0).flatten())
    got = q(case.x.flip(q.axis))
    sentence = f"reversing the channels must reverse the output: does `scale` run along axis {q.axis}?"
    claim(same(got, out.flip(q.axis)), sentence, x=case.x, got=got, expected=out.flip(q.axis))


@law(holds_scale, inputs=("edges", "ties"))
def one_channel_is_per_tensor(case: Case) -> None:
    """On a tensor of one channel (one group) per_channel (per_group) is per_tensor, in values and gradients."""
    if case.quantizer.granularity == "per_tensor":
        return
    x = case.x.narrow(case.config["axis"], 0, 1)
    group_size = x.numel() if case.config.get("group_size") else None
    try:
        tensor = case.build(x, granularity="per_tensor", group_size=None)
    except ValueError:
        return
    one = case.build(x, group_size=group_size)
    set_scale(one, scale_of(tensor))
    if (shift := shift_of(tensor)) is not None:
        set_shift(one, shift)
    sentence = "one channel or group must behave as one tensor, in"
    claim(same(one(x), tensor(x)), f"{sentence} values.", x=x, got=one(x), expected=tensor(x))
    grad = torch.linspace(-1, 1, x.numel(), dtype=x.dtype).reshape(x.shape)
    for got, expected in zip(gradients(one, x, grad), gradients(tensor, x, grad), strict=True):
        slack = 1e-5 * (x.numel() * one.quant_max) ** 0.5  # of the largest sum that g in [-1, 1] can give
        ok = (got.flatten() - expected.flatten()).abs() <= slack
        claim(ok, f"{sentence} gradients.", got=got.flatten(), expected=expected.flatten())


@law(holds_scale, inputs=SHORT)
def any_scale_is_safe(case: Case) -> None:
    """A scale that an optimizer made negative acts as |s|; one that it made 0 gives finite values and gradients."""
    q = case.build()
    scale, out = scale_of(q), q(case.x)
    set_scale(q, -scale)
    sentence = "a negative scale must act as its magnitude: use |s|."
    claim(same(q(case.x), out), sentence, x=case.x, got=q(case.x), expected=out)
    set_scale(q, torch.zeros_like(scale))
    claim(q(case.x).isfinite(), "a scale of 0 must give a finite output: put a floor under |s|.", x=case.x)
    for grad in gradients(q, case.x, torch.ones_like(case.x)):
        claim(grad.isfinite(), "a scale of 0 must give finite gradients: put a floor under |s|.", got=grad)
