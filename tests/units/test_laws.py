"""Each law is proved by quantizers that break it, wrong in one place each; `check_quantizer` names law, input and values."""

import contextlib
import dataclasses
import subprocess
import sys
from typing import ClassVar

import pytest
import torch
from torch import nn

from qsam.functional import from_groups, positive, to_groups
from qsam.quantizers import LSQ, QUANTIZERS, DiffQ, FixedStep, Identity, LSQPlus, Quantizer, Stretched
from qsam.testing import LAWS, Case, check_quantizer
from qsam.testing.inputs import battery, owners
from qsam.testing.laws import gradients, grid_of, row_sums, slope_terms, upstream


class Twin(LSQ):
    """LSQ once more, in plain formulas, with a method for each thing that can be got wrong."""

    def forward(self, x):
        g, s = self._group(x), self.step()
        value = self.codes_of(g) * s.detach().to(self.wide(g).dtype)
        gradient = self.inside(self.v(g)) * self.nil(self.wide(g)) + self.slope(self.v(g)) * self.nil(
            s * self.factor(x)
        )
        return self._ungroup((value + gradient).to(x.dtype), x)

    def codes(self, x):
        return self._ungroup(self.codes_of(self._group(x)), x).detach().to(torch.int16)

    def nil(self, x):
        """Return 0 with the gradient of ``x``."""
        return x - x.detach()

    def wide(self, x):
        return x.to(torch.promote_types(x.dtype, torch.float32))

    def step(self):
        """Return |s|, at least the smallest normal number, and straight through that guard."""
        s = torch.where(self.scale < 0, -self.scale, self.scale)
        return s.detach().clamp_min(torch.finfo(torch.float32).tiny) + self.nil(s)

    def divide(self, x):
        return x / self.step().to(x.dtype)

    def v(self, x):
        return self.divide(self.wide(x)).detach()

    def round(self, v):
        return torch.round(v)

    def clip(self, v):
        return v.clip(self.quant_min, self.quant_max)

    def codes_of(self, x):
        return self.round(self.clip(self.v(x)))

    def inside(self, v):
        return (v > self.quant_min) & (v < self.quant_max)

    def slope(self, v):
        return torch.where(self.inside(v), torch.round(v) - v, v.clip(self.quant_min, self.quant_max))

    def count(self, x):
        return x[0].numel() if self.axis is None else int((owners(self, x) == 0).sum())

    def factor(self, x):
        return (self.count(x) * self.quant_max) ** -0.5


def after_init(change):
    """Return an ``init_`` that does LSQ's and then ``change``."""

    def init_(self, x):
        LSQ.init_(self, x)
        change(self, x)

    return {"init_": init_}


def scale_along(other):
    """Return an ``init_`` whose scales run along another axis; that of the setting comes back afterwards."""

    def init_(self, x):
        spec = self.spec
        self.spec = dataclasses.replace(spec, axis=other)
        LSQ.init_(self, x)
        self.spec = spec

    return {"init_": init_}


def counting_its_calls(self, x):
    self.zeros = getattr(self, "zeros", 0)
    self.scale.data *= 2
    return LSQ.forward(self, x)


def scaling_the_value(self, x):
    s = self.step().to(x.dtype)
    s = (s - s * self.factor(x)).detach() + s * self.factor(x)
    return self._ungroup((self.codes_of(self._group(x)) * s).to(x.dtype), x)


def keeping_a_float(self, x):
    self.level = float(x.abs().mean())


def of_a_float(self, x):
    return x + ((x / self.level).round() * self.level - x).detach()


def nan_on_zeros(self, x):
    return x / x.detach().abs().amax() * x.detach().abs().amax()


def dividing_its_noise(self, v, u):
    return DiffQ.noisy_codes(self, v, u) + 0.1 / torch.zeros_like(u)


def drawing_at_each_call(self, x):
    if self.noise.on:
        self.noise.advance()
    return DiffQ.forward(self, x)


class HoldsALambda(LSQ):
    def init_(self, x):
        super().init_(x)
        self.rule = lambda x: x


NAMES = [name for name in QUANTIZERS if not QUANTIZERS.options(name)]
"""One name per class: an alias is a class that has one."""

ROWS = {"granularities": ["per_channel"], "axes": [0]}
TENSOR = {"granularities": ["per_tensor"]}
FORWARD = LSQ.forward


def moving_under_every_entry(self, x):
    out = LSQPlus.forward(self, x)
    return out if self.shift is None else out + (self.shift - self.shift.detach()).to(x.dtype)


PLANTS = [
    # the law, the mistake, the class that makes it, its methods, the setting in which the law sees it
    ("shape_and_dtype_kept", "returns fp32", LSQ, {"forward": lambda self, x: FORWARD(self, x.float())}, {}),
    ("shape_and_dtype_kept", "flattens", LSQ, {"forward": lambda self, x: FORWARD(self, x).flatten()}, {}),
    ("finite", "is NaN on zeros", LSQ, {"forward": nan_on_zeros}, {}),
    ("pure_function", "draws", Twin, {"round": lambda self, v: torch.round(v + torch.rand_like(v) - 0.5)}, {}),
    ("pure_function", "writes its scale", LSQ, {"forward": counting_its_calls}, {}),
    ("pure_function", "writes its input", LSQ, {"forward": lambda self, x: FORWARD(self, x.data.mul_(0.5))}, {}),
    ("same_in_train_and_eval", "rounds in training", LSQ, {"forward": lambda self, x: FORWARD(self, x) if self.training else x}, {}),
    ("idempotent", "shrinks", LSQ, {"forward": lambda self, x: FORWARD(self, x) * 0.6}, {}),
    ("monotone", "wraps", Twin, {"clip": lambda self, v: (v - self.quant_min) % (self.quant_max - self.quant_min + 1) + self.quant_min}, {}),
    ("layout_does_not_matter", "reads the storage", LSQ, {"forward": lambda self, x: FORWARD(self, x.as_strided(x.shape, torch.empty(x.shape).stride()))}, {}),
    ("parameters_stay_fp32", "halves with the model", LSQ, {"_apply": nn.Module._apply}, {}),
    ("init_sets_finite_parameters", "starts at random", LSQ, after_init(lambda self, x: self.scale.data.mul_(1 + torch.rand(1))), {}),
    ("init_sets_finite_parameters", "writes its data", LSQ, after_init(lambda self, x: x.clamp_(-0.01, 0.01)), {}),
    ("init_sets_finite_parameters", "divides by the data", LSQ, after_init(lambda self, x: self.scale.data.div_(x.abs().amax())), {}),
    ("init_sets_finite_parameters", "holds a scalar", LSQ, after_init(lambda self, x: setattr(self, "scale", nn.Parameter(self.scale.detach().squeeze()))), TENSOR),
    ("survives_copies", "keeps a float", Quantizer, {"init_": keeping_a_float, "forward": of_a_float}, {}),
    ("survives_copies", "holds a lambda", HoldsALambda, {}, {}),
    ("gradient_is_finite", "divides in the backward", LSQ, {"forward": lambda self, x: FORWARD(self, x) + 0 * x.square().sqrt()}, {}),
    ("gradient_passes_through", "rounds only", Quantizer, {"init_": lambda self, x: None, "forward": lambda self, x: torch.round(x)}, {}),
    ("update_keeps_it_finite", "loses its range", LSQ, {"update": lambda self, w: self.scale.data.mul_(torch.nan)}, {}),
    ("limits_fit_in_the_bits", "swaps the limits", LSQ, {"quant_min": -7, "quant_max": 8}, {"signed": [True]}),
    ("one_positive_fp32_scale_a_row", "runs along axis 1", LSQ, scale_along(1), ROWS),
    ("codes_are_integers_in_range", "shows floats", LSQ, {"codes": lambda self, x: LSQ.codes(self, x).float()}, {}),
    ("codes_are_integers_in_range", "shows doubles", Twin, {"codes": lambda self, x: Twin.codes(self, x) * 2}, {}),
    ("on_the_grid", "scales the value", Twin, {"forward": scaling_the_value}, {}),
    ("step_size_is_that_of_the_grid", "shows the first row's", LSQ, {"step_size": lambda self, x: self.scale.detach().flatten()[:1]}, {}),
    ("error_within_half_a_step", "rounds down", Twin, {"round": lambda self, v: torch.floor(v)}, {}),
    ("ties_go_to_even", "rounds halves up", Twin, {"round": lambda self, v: torch.floor(v + 0.5)}, {}),
    ("codes_by_true_division", "multiplies by 1 / s", Twin, {"divide": lambda self, x: x * (1 / self.step().to(x.dtype))}, {}),
    ("codes_by_true_division", "computes in 16 bits", Twin, {"wide": lambda self, x: x}, {}),
    ("powers_of_two_factor_out", "hides an epsilon", Twin, {"step": lambda self: Twin.step(self) + 1e-3}, {}),
    ("channels_commute", "runs along axis 2", LSQ, scale_along(2), ROWS),
    ("one_channel_is_per_tensor", "loses a level per channel", LSQ, {"quant_max": property(lambda self: 7 - (self.granularity == "per_channel"))}, {**ROWS, "signed": [True]}),
    ("any_scale_is_safe", "lets s be negative", Twin, {"step": lambda self: self.scale}, {}),
    ("ste_mask_is_exact", "passes the bounds", Twin, {"inside": lambda self, v: (v >= self.quant_min) & (v <= self.quant_max)}, {}),
    ("scale_gradient_has_the_slope", "never clips the slope", Twin, {"slope": lambda self, v: torch.round(v) - v}, {}),
    ("scale_gradient_has_the_slope", "ascends", Twin, {"slope": lambda self, v: -Twin.slope(self, v)}, {}),
    ("scale_gradient_is_scaled", "counts the tensor", Twin, {"count": lambda self, x: x.numel()}, ROWS),
    ("scale_gradient_is_scaled", "counts one token", Twin, {"count": lambda self, x: x.shape[-1] if self.axis is None else Twin.count(self, x)}, TENSOR),
    ("shift_gradient_is_of_the_clipped", "moves under every entry", LSQPlus, {"forward": moving_under_every_entry}, TENSOR),
    ("on_the_grid", "says nothing of its half", Stretched, {"offset": 0.0, "forward": lambda self, x: Stretched.forward(self, x) + (self.scale.detach() / 2).to(x.dtype)}, TENSOR),
    ("ste_mask_is_exact", "stops where it does not say", Stretched, {"rule": lambda self, x: Stretched.rule(self, x)._replace(low=self.quant_min + 0.5, high=self.quant_max + 0.5)}, TENSOR),
    ("scale_never_dies", "clamps s", Twin, {"step": lambda self: self.scale.clamp_min(1e-8)}, {}),
    ("noise_is_finite", "divides its noise", DiffQ, {"noisy_codes": dividing_its_noise}, {}),
    ("noise_is_drawn_once_a_step", "draws at each call", DiffQ, {"forward": drawing_at_each_call}, {}),
    ("noise_is_drawn_once_a_step", "draws once", DiffQ, {"update": lambda self, w: None}, {}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("law", "mistake", "base", "methods", "setting"), PLANTS, ids=[f"{p[0]}-{p[1]}" for p in PLANTS]
)
def test_a_planted_mistake_is_named_by_its_law(law, mistake, base, methods, setting):
    planted = type("Planted", (base,), methods) if methods else base
    with pytest.raises(AssertionError) as raised:
        check_quantizer(planted, bits=4, laws=[law], **setting)
    assert str(raised.value).startswith(f"{law}: {planted.__name__}(bits=4, ")
    wanted = "the quantizer raised" if mistake == "holds a lambda" else LAWS[law].check.__doc__
    assert wanted in str(raised.value)


def test_every_law_is_broken_by_a_plant():
    assert [law for law in LAWS if law not in {plant[0] for plant in PLANTS}] == []


def test_without_a_mistake_the_plants_keep_all_laws():
    check_quantizer(Twin, bits=3, axes=(0,))


@pytest.mark.parametrize("name", ["lsq", *(pytest.param(n, marks=pytest.mark.long) for n in NAMES if n != "lsq")])
def test_every_registered_quantizer_keeps_all_laws(name):
    asked, cls, meant = check_quantizer(name, bits=2), QUANTIZERS.get(name), set()
    for axis in (0, None):  # some are for weights only, or for inputs only
        with contextlib.suppress(ValueError):
            meant |= {law.name for law in LAWS.values() if law.applies(cls(bits=4, axis=axis))}
    assert set(asked) == meant


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_every_registered_quantizer_keeps_all_laws_at_every_width(name):
    check_quantizer(name, axes=(0, 1, 2))


def test_a_negative_axis_counts_from_the_end():
    check_quantizer("lsq", bits=4, axes=(-1,), signed=[True], granularities=["per_channel", "per_group"])


def test_which_laws_apply_follows_from_what_a_quantizer_shows():
    classes = (LSQ, DiffQ, FixedStep, LSQPlus)
    laws = {cls: {name for name, law in LAWS.items() if law.applies(cls(bits=4))} for cls in classes}
    assert laws[DiffQ] | laws[LSQPlus] == set(LAWS)
    assert laws[LSQPlus] - laws[LSQ] == {"shift_gradient_is_of_the_clipped"}
    assert laws[DiffQ] - laws[LSQ] == {"noise_is_finite", "noise_is_drawn_once_a_step"}
    of_the_scale = {"scale_gradient_has_the_slope", "scale_gradient_is_scaled", "scale_never_dies"}
    assert laws[LSQ] - laws[FixedStep] == of_the_scale
    universal = {name for name, law in LAWS.items() if law.applies(Identity(bits=4))}
    assert "idempotent" in universal
    assert "on_the_grid" not in universal
    assert universal == {name for name, law in LAWS.items() if law.applies(Ternary(bits=2))}


class Ternary(Quantizer):
    """Levels -a, 0, a, with no scale and no codes, per tensor and of 2 bits only."""

    def __init__(self, **setting):
        super().__init__(**setting)
        if self.bits != 2 or self.granularity != "per_tensor" or not self.signed:
            raise ValueError("Ternary is signed, of 2 bits, per tensor.")
        self.level = nn.Parameter(torch.ones(1))

    @torch.no_grad()
    def init_(self, x):
        self.level.copy_(x.float().abs().mean().reshape(1))

    def forward(self, x):
        level = self.level.detach()
        values = torch.where(x.float().abs() > 0.7 * level, x.float().sign() * level, 0.0).to(x.dtype)
        return values + (x - x.detach()) + (values.sign() * (self.level - level)).to(x.dtype)


class Stripes(Ternary):
    """Neither monotone nor idempotent, on purpose."""

    def forward(self, x):
        return torch.remainder(super().forward(x) + 0.5 * self.level.detach().to(x.dtype), 2)


class ExcusedStripes(Stripes):
    exempt_laws: ClassVar = {"monotone": "stripes fold the range", "idempotent": "so twice is not once"}


def test_a_class_exempts_itself_by_name_and_reason():
    with pytest.raises(AssertionError, match=r"^(monotone|idempotent): Stripes"):
        check_quantizer(Stripes)
    asked = check_quantizer(ExcusedStripes)
    assert not set(ExcusedStripes.exempt_laws) & set(asked)
    assert asked["finite"] > 0


def test_an_error_of_the_quantizer_is_named_by_the_law():
    class Raises(LSQ):
        def forward(self, x):
            raise RuntimeError("out of order")

    with pytest.raises(
        AssertionError, match=r"^shape_and_dtype_kept: Raises\(.*the quantizer raised RuntimeError: out of"
    ):
        check_quantizer(Raises, bits=4)


def vague(**laws):
    return type("Vague", (LSQ,), {"exempt_laws": laws})


@pytest.mark.parametrize(
    ("thing", "options", "error", "message"),
    [
        ("lsg", {}, ValueError, r"There is no quantizer 'lsg'\. Did you mean 'lsq'\?"),
        (nn.Linear, {}, TypeError, r"`name_or_class` must be a registered name or a qsam\.Quantizer class, got <class"),
        (3, {}, TypeError, r"`name_or_class` must be a registered name or a qsam\.Quantizer class, got 3\."),
        ("lsq", {"laws": ["idempotence"]}, ValueError, r"There is no law 'idempotence'\. Did you mean 'idempotent'"),
        (vague(monoton="no"), {}, ValueError, r"There is no law 'monoton'\. Did you mean 'monotone'\? See qsam\.test"),
        (vague(monotone=""), {}, ValueError, r"Vague\.exempt_laws must give a reason for each law"),
        ("lsq", {"bits": []}, ValueError, "`bits`, `signed`, `granularities` and `axes` leave no setting to check"),
        (Ternary, {"bits": (3, 4)}, AssertionError, "Ternary refused every setting with ValueError: there was nothing"),
    ],
)
def test_a_call_that_can_check_nothing_is_refused(thing, options, error, message):
    with pytest.raises(error, match=message):
        check_quantizer(thing, **options)


def test_a_message_shows_the_law_the_setting_the_input_and_the_first_values():
    class PassesTheBounds(Twin):
        def inside(self, v):
            return (v >= self.quant_min) & (v <= self.quant_max)

    message = (
        r"^ste_mask_is_exact: PassesTheBounds\(bits=3, signed=True, granularity='per_channel', axis=0\) on 'edges', "
        r"float32 of shape \(4, 6, 4\): The gradient of x must be g where .* decide on x/s, not on its rounding\. "
        r"\d+ of 96 entries break it, first v=\[.*\], got=\[.*\], expected=\[.*\]\."
    )
    with pytest.raises(AssertionError, match=message):
        check_quantizer(
            PassesTheBounds, bits=3, signed=[True], laws=["ste_mask_is_exact"], granularities=["per_channel"]
        )


@pytest.mark.long  # Python compiles torch again
def test_without_assertions_nothing_would_be_checked_and_that_is_refused():
    program = "import qsam.testing; qsam.testing.check_quantizer('lsq')"
    run = subprocess.run([sys.executable, "-O", "-c", program], capture_output=True, text=True, check=False)
    message = "RuntimeError: check_quantizer needs Python's assertions: run it without `python -O` (PYTHONOPTIMIZE)."
    assert message in run.stderr


def test_the_battery_is_finite_the_same_each_time_and_holds_every_input_that_a_law_names():
    first, second = battery(LSQ(bits=8, axis=0)), battery(LSQ(bits=8, axis=0))
    assert list(first) == list(second)
    for (x, _), (y, _) in zip(first.values(), second.values(), strict=True):
        assert torch.equal(x, y) and x.isfinite().all()
    assert all(law.inputs is None or law.inputs <= set(first) for law in LAWS.values())


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
def test_owners_agree_with_the_groups_of_the_library(axis):
    q = LSQ(bits=4, granularity="per_group", axis=axis, group_size=4)
    x = torch.zeros(4, 6, 8)
    rows = to_groups(owners(q, x), axis, 4)
    assert torch.equal(rows, torch.arange(rows.shape[0] * rows.shape[1]).reshape(*rows.shape[:2], 1).expand_as(rows))
    if axis >= 0:
        assert torch.equal(from_groups(rows, x.shape, axis), owners(q, x))


@pytest.mark.parametrize("label", ["normal", "heavy", "zero_channel", "edges", "ties"])
def test_the_closed_forms_of_the_laws_are_autograd_of_the_plain_formula(label):
    """s * clip(v + (round(v) - v).detach(), Qn, Qp), in fp64."""
    q = LSQ(bits=3, granularity="per_group", axis=0, group_size=8)
    x, scale = battery(q)[label]
    q = Case(LSQ, x, {"bits": 3, "granularity": "per_group", "axis": 0, "group_size": 8}, scale).quantizer
    x = x.double()
    leaf, s = x.clone().requires_grad_(), positive(q.scale.detach()).double().requires_grad_()  # 0 for a group of zeros
    v = leaf / s.flatten()[owners(q, x)]
    rounded = v + (torch.round(v) - v).detach()
    codes = torch.where(v <= q.quant_min, q.quant_min, torch.where(v >= q.quant_max, q.quant_max, rounded))
    dx, ds = torch.autograd.grad(codes * s.flatten()[owners(q, x)], (leaf, s), upstream(x))
    torch.testing.assert_close(row_sums(q, x, slope_terms(q, x, upstream(x))), ds, rtol=1e-12, atol=1e-12)
    grid = grid_of(q, x)
    torch.testing.assert_close(torch.where((grid.v > grid.low) & (grid.v < grid.high), upstream(x), 0), dx)
    assert torch.equal(gradients(q, x, upstream(x))[0].ne(0), dx.ne(0))
