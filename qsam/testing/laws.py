"""The laws of a quantizer. Each is a function that asserts one property of a :class:`Case`, in plain formulas.

The uniform grid is computed here independently of ``qsam.functional``: v = x / s, codes = round(clip(v)). The docstring
of a law states the property, and a failure repeats it.
"""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from qsam.quantizers import Noise, Quantizer
from qsam.testing.inputs import (
    GRADIENT,
    PLAIN,
    SHORT,
    Case,
    holds_scale,
    is_uniform,
    owners,
    row_count,
    scale_of,
    set_grid,
    set_scale,
    set_shift,
    shift_of,
)

_TOLERANCE = 1e-5
"""Relative to the sum of magnitudes: fp32 sums of some hundred terms, each with two or three roundings."""

_TINY = torch.finfo(torch.float32).tiny


@dataclasses.dataclass(frozen=True)
class Law:
    """One property of a quantizer. Calling it with a :class:`Case` raises AssertionError if the law does not hold.

    Args:
        check: Asserts the property; its name is the law's name.
        applies: Whether the law applies to a given quantizer.
        inputs: Labels of the inputs on which :func:`check_quantizer` checks it; None for all. This limits the cost:
            a law holds for every finite input.
    """

    check: Callable[[Case], None]
    applies: Callable[[Quantizer], bool]
    inputs: frozenset[str] | None

    @property
    def name(self) -> str:
        """The name of the function."""
        return self.check.__name__

    def __call__(self, case: Case) -> None:
        """Raise AssertionError, naming the law, the case and the first offending values, if the law does not hold."""
        try:
            self.check(case)
        except AssertionError as error:
            raise AssertionError(f"{self.name}: {case}: {self.check.__doc__} {error}") from None
        except Exception as error:
            kind = type(error).__name__
            raise AssertionError(f"{self.name}: {case}: the quantizer raised {kind}: {error}") from error


LAWS: dict[str, Law] = {}
"""All laws by name, the universal ones first."""

Check = Callable[[Case], None]


def law(applies: Callable[[Quantizer], bool], *inputs: str) -> Callable[[Check], Check]:
    """Return a decorator that adds a function to :data:`LAWS`; without ``inputs`` it is checked on all of them."""

    def add(check: Check) -> Check:
        LAWS[check.__name__] = Law(check, applies, frozenset(inputs) or None)
        return check

    return add


def _every(q: Quantizer) -> bool:
    return True


def _learns_scale(q: Quantizer) -> bool:
    return holds_scale(q) and isinstance(q.scale, nn.Parameter)


def _learns_shift(q: Quantizer) -> bool:
    return _learns_scale(q) and isinstance(q.shift, Tensor) and q.shift.grad_fn is not None


def _draws_noise(q: Quantizer) -> bool:
    return any(isinstance(module, Noise) for module in q.modules())


def hold(ok: Tensor, **values: Tensor) -> None:
    """Assert that ``ok`` holds everywhere; the message shows the first offending entries of ``values``."""
    wrong = ~ok
    shown = [f"{name}={value.detach().expand(wrong.shape)[wrong][:3].tolist()}" for name, value in values.items()]
    assert ok.all(), f"{int(wrong.sum())} of {wrong.numel()} entries break it, first {', '.join(shown)}."


def agree(got: Tensor, expected: Tensor, **values: Tensor) -> None:
    """Assert that two tensors are equal entry by entry, with NaN equal to NaN."""
    assert got.shape == expected.shape, f"Got shape {tuple(got.shape)}, expected {tuple(expected.shape)}."
    hold((got == expected) | (got.isnan() & expected.isnan()), **values, got=got, expected=expected)


def gradients(q: Quantizer, x: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    """Return the gradients of x and of the Parameters, given the output's; zeros for a Parameter that is not used."""
    leaf = x.detach().clone().requires_grad_()
    leaves = [leaf, *(parameter.requires_grad_() for parameter in q.parameters())]
    return torch.autograd.grad(q(leaf), leaves, grad, allow_unused=True, materialize_grads=True)


# --- Every quantizer --------------------------------------------------------------------------------------------------


@law(_every)
def shape_and_dtype_kept(case: Case) -> None:
    """The output must have the shape and the dtype of the input: cast it back."""
    out = case.quantizer(case.x)
    assert (out.shape, out.dtype) == (case.x.shape, case.x.dtype), f"Got {out.dtype} of shape {tuple(out.shape)}."


@law(_every)
def finite(case: Case) -> None:
    """A finite input must give a finite output, on zeros, constants and extremes too: guard the division."""
    out = case.quantizer(case.x)
    hold(out.isfinite(), x=case.x, got=out)


@law(_every, *PLAIN, "zeros", "edges")
def pure_function(case: Case) -> None:
    """Forward must repeat its output and move no input, Parameter, buffer or global random state: see `update`."""
    q, x, state = case.build(), case.x.clone(), torch.get_rng_state()
    before = {key: value.clone() for key, value in q.state_dict().items()}
    out = q(x.requires_grad_())
    if out.requires_grad:
        out.backward(torch.ones_like(out))
    agree(x, case.x)
    assert before.keys() == q.state_dict().keys(), "Parameters or buffers were added or removed."
    for key, value in q.state_dict().items():
        agree(value, before[key])
    agree(q(case.x), out, x=case.x)
    assert torch.equal(state, torch.get_rng_state()), "The global random state moved: draw from a seed in a buffer."


@law(_every, *PLAIN)
def same_in_train_and_eval(case: Case) -> None:
    """The output must not depend on `training` or on gradients being recorded: what is trained is deployed."""
    q = case.build()
    train = q.train()(case.x)
    with torch.no_grad():
        agree(q(case.x), train, x=case.x)
    agree(q.eval()(case.x), train, x=case.x)


@law(_every)
def idempotent(case: Case) -> None:
    """Q(Q(x)) must be Q(x) at fixed parameters, up to the rounding of a scale that follows from the input."""
    once = case.quantizer(case.x)
    if case.quantizer.dynamic:
        again = case.quantizer(once)
        hold((again - once).abs() <= 4 * torch.finfo(once.dtype).eps * once.abs(), x=case.x, once=once, twice=again)
        return
    agree(case.quantizer(once), once, x=case.x)


@law(_every)
def monotone(case: Case) -> None:
    """Of two entries that share their parameters, the larger must not become the smaller."""
    if case.quantizer.dynamic:
        tokens = case.x.sort(-1).values
        hold(case.quantizer(tokens).diff(dim=-1) >= 0, x=tokens[..., 1:])
    elif case.quantizer.granularity == "per_tensor":
        x = case.x.flatten().sort().values
        out = case.quantizer(x.reshape(case.x.shape)).flatten()
        hold(out[1:] >= out[:-1], x=x[1:], got=out[1:], before=out[:-1])


@law(_every, *PLAIN)
def layout_does_not_matter(case: Case) -> None:
    """A transposed view must give the same as its contiguous copy."""
    view = case.x.transpose(0, -1).contiguous().transpose(0, -1)
    agree(case.quantizer(view), case.quantizer(case.x), x=case.x)


@law(_every, *PLAIN)
def parameters_stay_fp32(case: Case) -> None:
    """Parameters and buffers must keep dtype and value through .half(), .bfloat16() and .double()."""
    q = case.build()
    before = copy.deepcopy(q.state_dict())
    for cast in (q.half, q.bfloat16, q.double):
        for key, value in cast().state_dict().items():
            assert value.dtype == before[key].dtype, f"{key!r} became {value.dtype}."
            agree(value, before[key])


@law(_every, "normal", "zeros", "zero_channel", "constant", "negative", "subnormal", "huge", "spread")
def init_sets_finite_parameters(case: Case) -> None:
    """`init_` must set finite leaves of shape (1,) or more, the same each time, and leave its data alone."""
    x = case.x.clone()
    q, again = case.cls(**case.config), case.cls(**case.config)
    q.observe_(x)
    again.observe_(x)
    agree(x, case.x)
    for (key, value), other in zip(q.state_dict(keep_vars=True).items(), again.state_dict().values(), strict=True):
        assert value.is_leaf, f"{key!r} is not a leaf: set it under torch.no_grad()."
        assert value.dim() or not isinstance(value, nn.Parameter), f"{key!r} is a scalar, which FSDP2 refuses."
        hold(value.isfinite(), got=value)
        agree(other, value)


@law(_every, *PLAIN)
def survives_copies(case: Case) -> None:
    """A loaded state_dict, a deepcopy and a pickle must restore the output: keep state in Parameters and buffers."""
    q, other = case.build(), case.build(x=case.x * 1.7 + 1)
    other.load_state_dict(q.state_dict(), strict=True)
    agree(other(case.x), q(case.x), x=case.x)
    agree(copy.deepcopy(q)(case.x), q(case.x), x=case.x)
    agree(pickle.loads(pickle.dumps(q))(case.x), q(case.x), x=case.x)


@law(_every)
def gradient_is_finite(case: Case) -> None:
    """Input and Parameters must receive finite gradients, each of its own shape and dtype."""
    q, x = case.quantizer, case.x
    for tensor, grad in zip([x, *q.parameters()], gradients(q, x, torch.ones_like(x)), strict=True):
        assert (grad.shape, grad.dtype) == (tensor.shape, tensor.dtype), f"Got {grad.dtype}, {tuple(grad.shape)}."
        hold(grad.isfinite(), got=grad)


@law(_every, "normal")
def gradient_passes_through(case: Case) -> None:
    """The gradient of x must not be zero everywhere on a ramp from 1/n to 1: pass it straight through the rounding."""
    x = (torch.arange(1, case.x.numel() + 1) / case.x.numel()).reshape(case.x.shape).to(case.x.dtype)
    dx = gradients(dataclasses.replace(case, x=x, scale=None).build(), x, torch.ones_like(x))[0]
    assert dx.any(), f"All {dx.numel()} entries are 0."


@law(_every, *SHORT)
def update_keeps_it_finite(case: Case) -> None:
    """A finite input must give a finite output after `update`, which is called once per optimizer step."""
    q = case.build()
    q.update(case.x)
    hold(q(case.x).isfinite(), x=case.x, got=q(case.x))


# --- A uniform grid: `scale` and `codes` ------------------------------------------------------------------------------


class Grid(NamedTuple):
    """The grid by its definition, in fp32 (fp64 for fp64): v = (x - shift) / s; s and shift of each entry; limits."""

    v: Tensor
    s: Tensor
    low: int
    high: int
    offset: float
    shift: Tensor | None

    @property
    def codes(self) -> Tensor:
        """Return round(clip(v - offset)), ties to even."""
        return torch.round((self.v - self.offset).clip(self.low, self.high))

    def levels(self, codes: Tensor) -> Tensor:
        """Return (codes + offset) * s + shift."""
        levels = (codes.to(self.s.dtype) + self.offset) * self.s
        return levels if self.shift is None else levels + self.shift


def grid_of(q: Quantizer, x: Tensor) -> Grid:
    """Return the grid of ``q`` at ``x``."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    rows, shift = owners(q, x), shift_of(q)
    if q.dynamic:
        step = q.step_size(x)
        assert step is not None
        s = step.to(wide).expand(x.shape)
    else:
        s = scale_of(q).to(wide).abs().clamp_min(_TINY).flatten()[rows]
    b = None if shift is None else shift.to(wide).flatten()[rows]
    v = (x.to(wide) if b is None else x.to(wide) - b) / s
    return Grid(v, s, q.quant_min, q.quant_max, q.offset, b)


def clips(q: Quantizer, grid: Grid) -> Tensor:
    """Return True where no gradient of x passes: at ``stops`` or beyond."""
    low, high = q.stops
    return (grid.v <= low) | (grid.v >= high)


def codes_of(q: Quantizer, x: Tensor) -> Tensor:
    """Return ``q.codes(x)``."""
    codes: Tensor = getattr(q, "codes")(x)  # noqa: B009  (not every quantizer has this method)
    return codes


@law(is_uniform, "edges")
def limits_fit_in_the_bits(case: Case) -> None:
    """[Qn, Qp] must hold zero and lie in [-2^(bits-1), 2^(bits-1) - 1]; unsigned or shifted, in [0, 2^bits - 1]."""
    q = case.quantizer
    half = 2 ** (q.bits - 1)
    unsigned = q.signed is False or (q.shift is not None and q.quant_min == 0)
    low, high = (0, 2 * half - 1) if unsigned else (-half, half - 1)
    assert low <= q.quant_min <= 0 < q.quant_max <= high, f"Got {q.quant_min} and {q.quant_max}."


@law(holds_scale, *SHORT, "zeros", "subnormal", "huge")
def one_positive_fp32_scale_a_row(case: Case) -> None:
    """`scale` must be fp32, not 0-dimensional, of one entry per row, and positive unless the row is all zeros."""
    rows, scale = row_count(case.quantizer, case.x), scale_of(case.quantizer)
    assert scale.dim() and scale.numel() == rows, f"Got shape {tuple(scale.shape)} for {rows} rows."
    assert scale.dtype == torch.float32, f"Got {scale.dtype}."
    filled = torch.zeros(rows).index_add(0, owners(case.quantizer, case.x).flatten(), case.x.flatten().bool().float())
    hold((scale.flatten() > 0) | ((scale.flatten() == 0) & (filled == 0)), got=scale.flatten())


@law(is_uniform)
def codes_are_integers_in_range(case: Case) -> None:
    """`codes` must have an integer dtype and the shape of x, and lie in [quant_min, quant_max]."""
    q, codes = case.quantizer, codes_of(case.quantizer, case.x)
    assert not codes.is_floating_point(), f"Got {codes.dtype}."
    assert codes.shape == case.x.shape, f"Got shape {tuple(codes.shape)}."
    hold((codes.int() >= q.quant_min) & (codes.int() <= q.quant_max), x=case.x, got=codes)


@law(is_uniform)
def on_the_grid(case: Case) -> None:
    """Q(x) must be (codes + offset) * scale + shift, bit for bit, rounded once: change no value to scale a gradient."""
    levels = grid_of(case.quantizer, case.x).levels(codes_of(case.quantizer, case.x))
    agree(case.quantizer(case.x), levels.to(case.x.dtype), x=case.x)


@law(is_uniform, *PLAIN, "edges")
def step_size_is_that_of_the_grid(case: Case) -> None:
    """`step_size`, if it is implemented, must be |scale| of each entry's row, broadcastable against x."""
    got, expected = case.quantizer.step_size(case.x), grid_of(case.quantizer, case.x).s
    if got is not None:
        agree(got.to(expected.dtype).expand(case.x.shape), expected)


@law(is_uniform, "normal", "heavy", "zero_channel", "edges", "spread", "normal_float64")
def error_within_half_a_step(case: Case) -> None:
    """Inside the limits |Q(x) - x| must be at most s / 2: round to the nearest level."""
    grid, got, eps = grid_of(case.quantizer, case.x), case.quantizer(case.x), torch.finfo(case.x.dtype).eps
    slack = 1 + 2 * (grid.high - grid.low + 1) * eps  # x and Q(x) carry one rounding each
    lost = 0 if grid.shift is None else 4 * eps * grid.shift.abs()  # a sum with the shift is rounded as the shift is
    near = (got - case.x).abs().to(grid.s.dtype) <= grid.s / 2 * slack + lost
    outside = (grid.v < grid.low + grid.offset) | (grid.v > grid.high + grid.offset)
    hold(outside | near, x=case.x, got=got, step=grid.s)


@law(holds_scale, "edges", "edges_float64")
def ties_go_to_even(case: Case) -> None:
    """An exact tie k + 1/2 must go to the even neighbour, as in ONNX and torch: use torch.round."""
    q = case.build()
    set_grid(q, 2.0 ** scale_of(q).log2().round().clamp(-100, 100))  # a power of two, so that ties are exact
    grid, got = grid_of(q, case.x), codes_of(q, case.x)
    v = (case.x.double() - (0 if grid.shift is None else grid.shift.double())) / grid.s.double() - q.offset
    tie = (v.frac().abs() == 0.5) & (v > q.quant_min) & (v < q.quant_max)
    hold(~tie | (got.double() == 2 * torch.round(v / 2)), v=v, got=got)


@law(is_uniform)
def codes_by_true_division(case: Case) -> None:
    """Codes must be round(clip((x - shift) / s - offset, Qn, Qp)) in fp32 or fp64: do not multiply by 1 / s."""
    grid = grid_of(case.quantizer, case.x)
    agree(codes_of(case.quantizer, case.x).to(grid.v.dtype), grid.codes, x=case.x, v=grid.v)


@law(holds_scale, *SHORT)
def powers_of_two_factor_out(case: Case) -> None:
    """Q(2^k x, 2^k s) must be 2^k Q(x, s), bit for bit, with 2^k times the shift if there is one."""
    q = case.build()
    scale, shift, out = scale_of(q), shift_of(q), q(case.x)
    size = torch.cat([case.x[case.x != 0].abs().double(), scale.flatten().double()])
    if case.x.dtype == torch.float16 or bool(((size < 1e-20) | (size > 1e20)).any()):
        return  # a factor of 2^5 would overflow, or give subnormal numbers
    for factor in (2.0**-3, 2.0**5):
        set_scale(q, scale * factor)
        if shift is not None:
            set_shift(q, shift * factor)
            kept = shift_of(q)
            if kept is None or not torch.equal(kept, shift * factor):
                return  # the quantizer stores it in another form and rounded it
        agree(q(case.x * factor), out * factor, x=case.x)


@law(holds_scale, *SHORT)
def channels_commute(case: Case) -> None:
    """Reversing the channels of x and of the scales must reverse those of Q(x): `scale` must run along `axis`."""
    q = case.build()
    if q.granularity == "per_tensor" or q.axis is None:
        return
    assert isinstance(q.axis, int)
    out = q(case.x)
    set_scale(q, scale_of(q).reshape(case.x.shape[q.axis], -1).flip(0).flatten())
    if (shift := shift_of(q)) is not None:
        set_shift(q, shift.reshape(case.x.shape[q.axis], -1).flip(0).flatten())
    agree(q(case.x.flip(q.axis)), out.flip(q.axis), x=case.x.flip(q.axis))


@law(holds_scale, "edges", "ties")
def one_channel_is_per_tensor(case: Case) -> None:
    """On one channel (one group) per_channel (per_group) must be per_tensor, in values and gradients."""
    if case.quantizer.granularity == "per_tensor":
        return
    x = case.x.narrow(case.config["axis"], 0, 1)
    try:
        tensor = case.build(x, granularity="per_tensor", group_size=None)
    except ValueError:
        return
    one = case.build(x, group_size=x.numel() if case.config.get("group_size") else None)
    set_scale(one, scale_of(tensor))
    if (shift := shift_of(tensor)) is not None:
        set_shift(one, shift)
    agree(one(x), tensor(x), x=x)
    grad = torch.linspace(-1, 1, x.numel(), dtype=x.dtype).reshape(x.shape)
    slack = 1e-5 * (x.numel() * one.quant_max) ** 0.5  # relative to the largest sum of gradients in [-1, 1]
    for got, expected in zip(gradients(one, x, grad), gradients(tensor, x, grad), strict=True):
        hold((got.flatten() - expected.flatten()).abs() <= slack, got=got.flatten(), expected=expected.flatten())


@law(holds_scale, *SHORT)
def any_scale_is_safe(case: Case) -> None:
    """A negative scale must act as |s|, and a scale of 0 give finite values and gradients: put a floor under |s|."""
    q = case.build()
    scale, out = scale_of(q), q(case.x)
    set_scale(q, -scale)
    agree(q(case.x), out, x=case.x)
    set_scale(q, torch.zeros_like(scale))
    for tensor in (q(case.x), *gradients(q, case.x, torch.ones_like(case.x))):
        hold(tensor.isfinite(), got=tensor)


# --- The gradients of a uniform grid: LSQ's closed forms --------------------------------------------------------------


def upstream(x: Tensor) -> Tensor:
    """Return a gradient of the output that is different in each entry, of both signs, and exact in 16 bits."""
    return ((torch.arange(x.numel()) * 37 % 101 - 40) / 64).reshape(x.shape).to(x.dtype)


def row_sums(q: Quantizer, x: Tensor, terms: Tensor) -> Tensor:
    """Return the fp64 sum of ``terms`` over each row, in the shape of the scale."""
    sums = torch.zeros(scale_of(q).numel(), dtype=torch.float64)
    return sums.index_add(0, owners(q, x).flatten(), terms.double().flatten()).reshape(scale_of(q).shape)


def slope_terms(q: Quantizer, x: Tensor, grad: Tensor) -> Tensor:
    """Return g * dQ/ds of each entry: level - v inside, the outermost level outside, in steps from the shift."""
    grid = grid_of(q, x)
    level = (grid.codes + grid.offset).double()
    return grad.double() * torch.where(clips(q, grid), level, level - grid.v.double())


def gradient_factor(q: Quantizer, x: Tensor) -> float:
    """Return LSQ's 1 / sqrt(N * Qp), Qp being the highest level in steps."""
    row = int((owners(q, x) == 0).sum())
    count = row // len(x) if q.axis is None and x.dim() > 1 else row
    return float((count * (q.quant_max + q.offset)) ** -0.5)


def gradient_of_scale(q: Quantizer, x: Tensor, grad: Tensor) -> Tensor:
    """Return the gradient that autograd gives ``q.scale``, in fp64."""
    names = [name for name, _ in q.named_parameters()]
    return gradients(q, x, grad)[1 + names.index("scale")].double()


@law(is_uniform, *GRADIENT)
def ste_mask_is_exact(case: Case) -> None:
    """The gradient of x must be g where x/s is between `stops` and 0 elsewhere: decide on x/s, not on its rounding."""
    q, grid, grad = case.quantizer, grid_of(case.quantizer, case.x), upstream(case.x)
    agree(gradients(q, case.x, grad)[0], torch.where(clips(q, grid), 0, grad), v=grid.v)


@law(_learns_scale, *GRADIENT)
def scale_gradient_has_the_slope(case: Case) -> None:
    """The gradient of s must be one positive factor times the sum of g (round(v) - v), or g * limit beyond a limit."""
    q, x, grad = case.quantizer, case.x, upstream(case.x)
    probes = [grad, torch.where(x > 0, grad.abs(), -grad.abs())]
    got = torch.stack([gradient_of_scale(q, x, g) for g in probes])
    form = torch.stack([row_sums(q, x, slope_terms(q, x, g)) for g in probes])
    size = torch.stack([row_sums(q, x, slope_terms(q, x, g).abs()) for g in probes])
    factor = (got * form).sum() / (form * form).sum().clamp_min(1e-300)
    near = (got - factor * form).abs() <= _TOLERANCE * factor.abs() * size + _TINY
    hold(near & (factor >= 0), got=got, expected=factor * form)


@law(_learns_scale, *GRADIENT)
def scale_gradient_is_scaled(case: Case) -> None:
    """The gradient of s must carry 1 / sqrt(N Qp), with N entries of one row, or of one sample of an activation."""
    q, x, grad = case.quantizer, case.x, upstream(case.x)
    terms = gradient_factor(q, x) * slope_terms(q, x, grad)
    got, expected = gradient_of_scale(q, x, grad), row_sums(q, x, terms)
    hold((got - expected).abs() <= _TOLERANCE * row_sums(q, x, terms.abs()) + _TINY, got=got, expected=expected)


@law(_learns_shift, *GRADIENT)
def shift_gradient_is_of_the_clipped(case: Case) -> None:
    """A parameter that moves all levels together must have the gradient of the clipped entries, scaled as that of s."""
    q, x, grad = case.quantizer, case.x, upstream(case.x)
    index = next(i for i, (name, _) in enumerate(q.named_parameters(), start=1) if name != "scale")
    got = gradients(q, x, grad)[index].double()
    terms = gradient_factor(q, x) * torch.where(clips(q, grid_of(q, x)), grad.double(), 0)
    expected = row_sums(q, x, terms)
    hold((got - expected).abs() <= _TOLERANCE * row_sums(q, x, terms.abs()) + _TINY, got=got, expected=expected)


@law(_learns_scale, *SHORT)
def scale_never_dies(case: Case) -> None:
    """At s <= 0 the gradient of s must still move |s| the right way, and away from 0: do not clamp s."""
    q, x = case.build(), case.x
    scale, due = scale_of(q), -gradient_of_scale(q, x, upstream(x))
    set_scale(q, -scale)
    got = gradient_of_scale(q, x, upstream(x))
    hold((got == due) | (scale == 0), got=got, expected=due)  # 0, of a row of zeros, is no scale yet
    outward = x.sign() * (x.abs() > 1e-20) * (x > 0 if q.quant_min == 0 else 1)  # wants larger magnitudes
    alive = row_sums(q, x, outward.abs()) > 0
    for value in (0.0, -1e-40):
        set_scale(q, torch.full_like(scale, value))
        got = gradient_of_scale(q, x, outward)
        hold(~alive | ((got < 0) if value < 0 else (got > 0)), got=got)


# --- Noise that is drawn while an optimizer's pass runs: a `qsam.quantizers.Noise` ------------------------------------


def noisy(case: Case) -> Quantizer:
    """Return the quantizer as in a pass of an optimizer: in training mode, with its noise on."""
    q = case.build().train()
    for module in q.modules():
        if isinstance(module, Noise):
            module.on = True
    return q


@law(_draws_noise, *SHORT)
def noise_is_finite(case: Case) -> None:
    """Output and gradients must be finite with the noise on, and the output keep shape and dtype."""
    q = noisy(case)
    out = q(case.x)
    assert (out.shape, out.dtype) == (case.x.shape, case.x.dtype), f"Got {out.dtype} of shape {tuple(out.shape)}."
    for tensor in (out, *gradients(q, case.x, torch.ones_like(case.x))):
        hold(tensor.isfinite(), got=tensor)


@law(_draws_noise, *PLAIN)
def noise_is_drawn_once_a_step(case: Case) -> None:
    """All passes of a step must draw the same noise, `update` another one, and no global generator may move."""
    q, state = noisy(case), torch.get_rng_state()
    first = q(case.x)
    agree(q(case.x), first, x=case.x)
    assert torch.equal(state, torch.get_rng_state()), "The global random state moved."
    q.update(case.x)
    assert not torch.equal(q(case.x), first), "After `update` the noise is the same: advance the stream there."
