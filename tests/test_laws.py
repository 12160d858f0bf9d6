"""Each law is proved by quantizers that break it: the plants, wrong in one place each, and named by what is wrong."""

import contextlib
import re
from typing import ClassVar

import pytest
import torch
from torch import nn

from qsam.functional import from_groups, to_groups
from qsam.quantizers import LSQ, QUANTIZERS, DiffQ, FixedStep, Identity, LSQPlus, Quantizer, Stretched
from qsam.testing import LAWS, Case, check_quantizer
from qsam.testing.battery import battery
from qsam.testing.case import owners

PLANTS = []


def breaks(*laws, **setting):
    """Return a decorator that plants a class which breaks ``laws``, if asked in ``setting``."""

    def add(cls):
        PLANTS.extend(pytest.param(cls, law, setting, id=f"{cls.__name__}-{law}") for law in laws)
        return cls

    return add


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


@breaks("ste_mask_is_exact")
class MasksOnTheRounding(Twin):
    def inside(self, v):
        return super().inside(v) | ((torch.round(v) >= self.quant_min) & (torch.round(v) <= self.quant_max))


@breaks("ste_mask_is_exact")
class PassesTheBounds(Twin):
    def inside(self, v):
        return (v >= self.quant_min) & (v <= self.quant_max)


@breaks("scale_gradient_is_scaled", granularities=["per_channel"])
@breaks("scale_gradient_is_scaled", granularities=["per_group"])
class CountsTheWholeTensor(Twin):
    def count(self, x):
        return x.numel()


@breaks("scale_gradient_is_scaled", granularities=["per_tensor"])
class CountsTheBatch(Twin):
    def count(self, x):
        return x.numel() if self.axis is None else super().count(x)


@breaks("scale_gradient_is_scaled", granularities=["per_tensor"])
class CountsOneToken(Twin):
    def count(self, x):
        return x.shape[-1] if self.axis is None else super().count(x)


@breaks("scale_gradient_is_scaled", "gradients_match_autograd")
class ForgetsTheGradientScale(Twin):
    def factor(self, x):
        return 1.0


@breaks("scale_gradient_has_the_slope", "gradients_match_autograd")
class NeverClipsTheSlope(Twin):
    def slope(self, v):
        return torch.round(v) - v


@breaks("scale_gradient_has_the_slope")
class HasTheSlopeOfTheClippedEntriesOnly(Twin):
    def slope(self, v):
        return super().slope(v) * ~self.inside(v)


@breaks("scale_gradient_has_the_slope")
class AscendsTheScale(Twin):
    def slope(self, v):
        return -super().slope(v)


@breaks("codes_by_true_division")
class MultipliesByTheReciprocal(Twin):
    def divide(self, x):
        return x * (1 / self.step().to(x.dtype))


@breaks("limits_fit_in_the_bits")
class SwapsTheLimits(LSQ):
    @property
    def quant_min(self):
        return -super().quant_max

    @property
    def quant_max(self):
        return -super().quant_min or 1


@breaks("codes_by_true_division", "monotone")
class WrapsInsteadOfClipping(Twin):
    def clip(self, v):
        levels = self.quant_max - self.quant_min + 1
        return (v - self.quant_min) % levels + self.quant_min


@breaks("one_positive_fp32_scale_a_row", granularities=["per_channel"], axes=[0])
class RunsAlongTheWrongAxis(LSQ):
    other = 1

    def init_(self, x):
        axis, self.axis = self.axis, self.other
        super().init_(x)
        self.axis = axis


@breaks("channels_commute", "on_the_grid", "codes_by_true_division", granularities=["per_channel"], axes=[0])
class RunsAlongAWrongAxisOfTheSameSize(RunsAlongTheWrongAxis):
    other = 2


@breaks("scale_never_dies")
class ClampsTheScale(Twin):
    def step(self):
        return self.scale.clamp_min(1e-8)


@breaks("scale_never_dies")
class IgnoresTheSign(Twin):
    def step(self):
        return super().step().detach() + self.nil(self.scale)


@breaks("any_scale_is_safe")
class LetsTheScaleGoNegative(Twin):
    def step(self):
        return self.scale


@breaks("half_equals_fp32_rounded", "codes_by_true_division")
class ComputesInSixteenBits(Twin):
    def wide(self, x):
        return x


@breaks("on_the_grid")
class ScalesTheValue(Twin):
    def forward(self, x):
        s = self.step().to(x.dtype)
        s = (s - s * self.factor(x)).detach() + s * self.factor(x)
        return self._ungroup((self.codes_of(self._group(x)) * s).to(x.dtype), x)


@breaks("finite", "init_sets_finite_parameters")
class IsNaNOnAZeroChannel(Quantizer):
    def __init__(self, **setting):
        super().__init__(**setting)
        self.register_buffer("inverse", torch.ones(1))

    def init_(self, x):
        self.inverse = self.quant_max / x.detach().abs().amax().float().reshape(1)

    def forward(self, x):
        return (torch.round(x.float() * self.inverse) / self.inverse).to(x.dtype)


@breaks("deterministic", "monotone", "idempotent")
class AddsNoise(Twin):
    def forward(self, x):
        return super().forward(x) + self.step().max().to(x.dtype) * torch.rand_like(x)


@breaks("forward_moves_no_state")
class CountsItsCalls(LSQ):
    def __init__(self, **setting):
        super().__init__(**setting)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


@breaks("forward_moves_no_state")
class WritesItsInput(LSQ):
    def forward(self, x):
        x.data.mul_(0.5)
        return super().forward(x)


@breaks("error_within_half_a_step")
class RoundsDown(Twin):
    def round(self, v):
        return torch.floor(v)


@breaks("ties_go_to_even")
class RoundsHalvesAwayFromZero(Twin):
    def round(self, v):
        return v.sign() * torch.floor(v.abs() + 0.5)


@breaks("shape_and_dtype_kept")
class ReturnsFp32(LSQ):
    def forward(self, x):
        return super().forward(x.float())


@breaks("shape_and_dtype_kept")
class Flattens(LSQ):
    def forward(self, x):
        return super().forward(x).flatten()


@breaks("on_the_grid", "codes_by_true_division")
class ShowsCodesOffByOne(LSQ):
    def codes(self, x):
        return super().codes(x).clamp_max(self.quant_max - 1) + 1


@breaks("codes_are_integers_in_range")
class ShowsFloatCodes(LSQ):
    def codes(self, x):
        return super().codes(x).float()


@breaks("codes_are_integers_in_range")
class ShowsUnclippedCodes(Twin):
    def codes(self, x):
        return super().codes(x) * 2


@breaks("step_size_is_that_of_the_grid")
class ShowsTheStepOfTheFirstRow(LSQ):
    def step_size(self, x):
        return self.scale.detach().flatten()[:1]


@breaks("idempotent")
class Shrinks(LSQ):
    def forward(self, x):
        return super().forward(x) * 0.6


@breaks("same_in_train_and_eval")
class QuantizesInTrainingOnly(LSQ):
    def forward(self, x):
        return super().forward(x) if self.training else x


@breaks("layout_does_not_matter")
class ReadsTheStorage(LSQ):
    def forward(self, x):
        return super().forward(x.as_strided(x.shape, torch.empty(x.shape).stride()))


@breaks("parameters_stay_fp32")
class HalvesWithTheModel(LSQ):
    _apply = nn.Module._apply


@breaks("parameters_have_dimensions", "one_positive_fp32_scale_a_row", granularities=["per_tensor"])
class HoldsAScalar(LSQ):
    def init_(self, x):
        super().init_(x)
        self.scale = nn.Parameter(self.scale.detach().squeeze())


@breaks("init_sets_finite_parameters")
class StartsAtRandom(LSQ):
    def init_(self, x):
        super().init_(x)
        self.scale.data *= 1 + torch.rand(1)


@breaks("init_sets_finite_parameters")
class WritesItsData(LSQ):
    def init_(self, x):
        super().init_(x)
        x.clamp_(-0.01, 0.01)


@breaks("state_dict_round_trip")
class ForgetsItsState(Quantizer):
    def init_(self, x):
        self.step = float(x.abs().mean())

    def forward(self, x):
        return x + ((x / self.step).round() * self.step - x).detach()


@breaks("survives_deepcopy_and_pickle")
class HoldsALambda(LSQ):
    def init_(self, x):
        super().init_(x)
        self.rule = lambda x: x


@breaks("gradient_passes_through")
class ForgetsTheStraightThrough(Quantizer):
    def init_(self, x):
        pass

    def forward(self, x):
        return torch.round(x)


@breaks("gradient_is_finite")
class DividesByZeroInTheBackward(LSQ):
    def forward(self, x):
        return super().forward(x) + 0 * x.square().sqrt()


@breaks("update_keeps_it_finite")
class LosesItsRange(LSQ):
    def update(self, w):
        self.scale.data /= 0


@breaks("noise_is_finite")
class DividesByItsNoise(DiffQ):
    def noisy_codes(self, v, u):
        return super().noisy_codes(v, u) + 0.1 / torch.zeros_like(u)


@breaks("noise_repeats_within_a_step")
class DrawsAtEachCall(DiffQ):
    def forward(self, x):
        if self.noise.on:
            self.noise.advance()
        return super().forward(x)


@breaks("noise_differs_from_step_to_step")
class DrawsOnce(DiffQ):
    def update(self, w):
        pass


@breaks("powers_of_two_factor_out")
class HidesAnEpsilon(Twin):
    def step(self):
        return super().step() + 1e-3


@breaks("one_channel_is_per_tensor", granularities=["per_channel"])
class LosesALevelPerChannel(LSQ):
    @property
    def quant_max(self):
        return super().quant_max - (self.granularity == "per_channel" and self.bits > 2)


@breaks("shift_gradient_is_of_the_clipped")
class MovesItsLevelsUnderEveryEntry(LSQPlus):
    def forward(self, x):
        out = super().forward(x)
        return out if self.shift is None else out + (self.shift - self.shift.detach()).to(x.dtype)


@breaks("on_the_grid")
class SaysNothingOfItsHalf(Stretched):
    offset = 0.0

    def forward(self, x):
        return super().forward(x) + (self.scale.detach() / 2).to(x.dtype)


@breaks("ste_mask_is_exact")
class StopsWhereItDoesNotSay(Stretched):
    def rule(self, x):
        return super().rule(x)._replace(low=self.quant_min + 0.5, high=self.quant_max + 0.5)


@pytest.mark.parametrize(("cls", "law", "setting"), PLANTS)
def test_a_planted_mistake_is_named_by_its_law(cls, law, setting):
    with pytest.raises(AssertionError, match=rf"^{law}: {cls.__name__}\(bits=4, .*: .*\."):
        check_quantizer(cls, bits=4, laws=[law], **setting)


@pytest.mark.parametrize("cls", sorted({plant.values[0] for plant in PLANTS}, key=lambda cls: cls.__name__))
@pytest.mark.long
def test_a_planted_mistake_is_caught_by_all_laws_together(cls):
    with pytest.raises(AssertionError, match=rf"^\w+: {cls.__name__}\("):
        check_quantizer(cls, bits=4)


def test_every_law_is_broken_by_a_plant():
    assert {plant.values[1] for plant in PLANTS} == set(LAWS)


def test_without_a_mistake_the_plants_keep_all_laws():
    check_quantizer(Twin, bits=(3, 4), axes=(0,))


@pytest.mark.parametrize("name", ["lsq", *(pytest.param(n, marks=pytest.mark.long) for n in QUANTIZERS if n != "lsq")])
def test_every_registered_quantizer_keeps_all_laws(name):
    asked, cls, meant = check_quantizer(name, bits=2), QUANTIZERS.get(name), set()
    for axis in (0, None):  # some are for weights only, or for inputs only
        with contextlib.suppress(ValueError):
            meant |= {law.name for law in LAWS.values() if law.applies(cls(bits=4, axis=axis))}
    assert set(asked) == meant


@pytest.mark.long
@pytest.mark.parametrize("name", list(QUANTIZERS))
def test_every_registered_quantizer_keeps_all_laws_at_every_width(name):
    for bits in range(2, 9):
        check_quantizer(name, bits=bits, axes=(0, 1, 2))


@pytest.mark.parametrize("name", ["lsq", "fixed_step"])
def test_a_negative_axis_counts_from_the_end(name):
    check_quantizer(name, bits=4, axes=(-1,))


def test_all_laws_are_for_lsq_and_only_the_universal_ones_for_identity():
    assert all(law.applies(LSQ(bits=4)) or law.name.startswith(("noise_", "shift_")) for law in LAWS.values())
    assert all(law.applies(DiffQ(bits=4)) or law.name.startswith("shift_") for law in LAWS.values())
    assert all(law.applies(LSQPlus(bits=4)) or law.name.startswith("noise_") for law in LAWS.values())
    of_identity = {law.name for law in LAWS.values() if law.applies(Identity(bits=4))}
    assert "idempotent" in of_identity
    assert "on_the_grid" not in of_identity


def test_a_fixed_scale_is_not_asked_for_its_gradient():
    of_lsq_only = {law.name for law in LAWS.values() if law.applies(LSQ(bits=4)) and not law.applies(FixedStep(bits=4))}
    assert of_lsq_only == {
        "scale_gradient_has_the_slope",
        "scale_gradient_is_scaled",
        "gradients_match_autograd",
        "scale_never_dies",
    }


class Ternary(Quantizer):
    """Someone else's: levels -a, 0, a; no scale, no codes; per tensor and 2 bits only."""

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


def test_a_quantizer_of_another_kind_is_asked_the_universal_laws():
    assert set(check_quantizer(Ternary)) == set(check_quantizer("identity", bits=2))


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
    assert "finite" in asked


def test_an_exemption_needs_a_reason_and_a_law():
    with pytest.raises(ValueError, match=r"Vague\.exempt_laws must give a reason for each law"):
        check_quantizer(type("Vague", (LSQ,), {"exempt_laws": {"monotone": ""}}))
    with pytest.raises(ValueError, match=r"There is no law 'monoton'\. Did you mean 'monotone'\?"):
        check_quantizer(type("Vague", (LSQ,), {"exempt_laws": {"monoton": "it is not"}}))


def test_an_unknown_law_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match=r"There is no law 'idempotence'\. Did you mean 'idempotent'"):
        check_quantizer("lsq", laws=["idempotence"])


def test_an_unknown_quantizer_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match=r"There is no quantizer 'lsg'\. Did you mean 'lsq'\?"):
        check_quantizer("lsg")


@pytest.mark.parametrize("thing", [3, nn.Linear, Case])
def test_what_is_no_quantizer_is_refused(thing):
    with pytest.raises(TypeError, match=r"must be a registered name or a qsam\.Quantizer class, got"):
        check_quantizer(thing)


def test_a_class_that_refuses_every_setting_is_not_passed():
    with pytest.raises(
        AssertionError, match="Ternary refused every setting with ValueError: there was nothing to check"
    ):
        check_quantizer(Ternary, bits=(3, 4))


def test_an_error_of_the_quantizer_is_named_by_the_law():
    class Raises(LSQ):
        def forward(self, x):
            raise RuntimeError("out of order")

    with pytest.raises(
        AssertionError, match=r"^shape_and_dtype_kept: Raises\(.*the quantizer raised RuntimeError: out of"
    ):
        check_quantizer(Raises, bits=4)


def test_a_message_shows_the_setting_the_input_and_the_first_values():
    with pytest.raises(AssertionError) as raised:
        check_quantizer(
            MasksOnTheRounding, bits=3, signed=[True], laws=["ste_mask_is_exact"], granularities=["per_channel"]
        )
    pattern = (
        r"ste_mask_is_exact: MasksOnTheRounding\(bits=3, signed=True, granularity='per_channel', axis=0\) on '\w+', "
        r"float32 of shape \(4, 6, 4\): dx must be g where .* decide on x/s, not on its rounding\. "
        r"\d+ of 96 entries break it, first v=\[.*\], got=\[.*\], expected=\[.*\]\."
    )
    assert re.fullmatch(pattern, str(raised.value))


def test_a_law_can_be_asked_of_one_case():
    case = Case(LSQ, torch.tensor([0.3, 7.2]), {"bits": 4}, scale=torch.ones(1))
    LAWS["ste_mask_is_exact"](case)


def test_the_battery_is_the_same_each_time_and_finite():
    q = LSQ(bits=8, axis=0)
    for (label, x, _), (again, y, _) in zip(battery(q), battery(q), strict=True):
        assert label == again
        assert torch.equal(x, y)
        assert x.isfinite().all()


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
def test_owners_agree_with_the_groups_of_the_library(axis):
    q = LSQ(bits=4, granularity="per_group", axis=axis, group_size=4)
    x = torch.zeros(4, 6, 8)
    rows = to_groups(owners(q, x), axis, 4)
    assert torch.equal(rows, torch.arange(rows.shape[0] * rows.shape[1]).reshape(*rows.shape[:2], 1).expand_as(rows))
    if axis >= 0:
        assert torch.equal(from_groups(rows, x.shape, axis), owners(q, x))
