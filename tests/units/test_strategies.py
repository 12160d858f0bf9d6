"""The strategies draw what they say, and reach the awkward values."""

import math

import pytest
import torch
from hypothesis import Phase, find, given, settings
from hypothesis import strategies as st

from qsam.functional import integer_limits
from qsam.quantizers import QUANTIZERS
from qsam.quantizers.base import GRANULARITIES
from qsam.testing.inputs import owners
from tests.strategies import (
    DTYPES,
    Setting,
    awkward_tensors,
    bounds,
    cases,
    fill,
    normal_tensors,
    powers_of_two,
    scale_rows,
    scales,
    settings_of_the_registry,
    shapes,
    ties,
)

ONLY_FIND = settings(phases=[Phase.generate], max_examples=2000)
SETTINGS = settings_of_the_registry()
ANY_CASE = st.sampled_from([setting for setting in SETTINGS if setting.name == "lsq"]).flatmap(cases)


def test_fill_repeats_its_values_in_order():
    assert fill([1.0, 2.0], (3,)).tolist() == [1, 2, 1]


@given(shapes(2, 3))
def test_shapes_have_entries_and_the_dimensions_asked_for(shape):
    assert 2 <= len(shape) <= 3
    assert 1 <= math.prod(shape) <= 125


@given(st.data(), st.integers(2, 8), st.booleans(), powers_of_two())
def test_ties_are_exact_halves_at_scales_that_are_powers_of_two_in_fp16_too(data, bits, signed, scale):
    x = data.draw(ties((4, 3), *integer_limits(bits, signed))) * scale
    assert ((x / scale).frac().abs() == 0.5).all()
    assert torch.equal(x.half().double(), x)


@given(st.data(), st.integers(2, 8), st.booleans())
def test_bounds_stay_within_half_a_unit(data, bits, signed):
    low, high = integer_limits(bits, signed)
    x = data.draw(bounds((5,), low, high))
    distance = (x[:, None] - torch.tensor([low, 0, high])).abs().amin(1)
    assert (distance <= 0.5).all()


@pytest.mark.parametrize("bound", [-8.0, 0.0, 7.0])
def test_bounds_reach_each_bound_exactly(bound):
    assert find(bounds((1,), -8, 7), lambda x: x.item() == bound, settings=ONLY_FIND).item() == bound


@pytest.mark.parametrize(
    "wanted",
    [
        lambda x: (x == 0) & torch.signbit(x),
        lambda x: (x != 0) & (x.abs() < torch.finfo(torch.float32).tiny),
        lambda x: x.abs() == torch.finfo(torch.float32).tiny,
        lambda x: x == 1e-30,
        lambda x: x == -1e30,
    ],
    ids=["minus zero", "subnormal", "smallest normal", "1e-30", "-1e30"],
)
def test_awkward_tensors_reach(wanted):
    assert wanted(find(awkward_tensors((2,)), lambda x: bool(wanted(x).any()), settings=ONLY_FIND)).any()


@given(awkward_tensors((7,)) | normal_tensors((7,)))
def test_tensors_are_finite_in_fp32(x):
    assert x.float().isfinite().all()


@given(st.data(), st.integers(1, 20))
def test_scale_rows_are_positive_fp32_and_one_a_row(data, rows):
    scale = data.draw(scale_rows(rows, scales()))
    assert scale.shape == (rows,)
    assert scale.dtype == torch.float32
    assert (scale >= 2.0**-10).all()
    assert (scale <= 2.0**6).all()


def test_every_registered_quantizer_has_a_setting():
    assert {setting.name for setting in SETTINGS} == set(QUANTIZERS)


def test_settings_leave_out_what_a_quantizer_refuses():
    assert Setting("lsq", "per_group", False) in SETTINGS
    assert Setting("per_channel", "per_group", False) not in SETTINGS
    assert Setting("per_channel", "per_tensor", True) not in SETTINGS


@given(ANY_CASE)
def test_cases_can_be_built(case):
    assert case.x.isfinite().all()
    assert case.build()(case.x).shape == case.x.shape


def units_of(case):
    """Return x in units of its scale, and the limits."""
    q = case.build()
    return case.x.double() / q.scale.detach().double().flatten()[owners(q, case.x)], q.quant_min, q.quant_max


def has_a_tie_inside(case):
    v, low, high = units_of(case)
    return bool(((v.frac().abs() == 0.5) & (v > low) & (v < high)).any())


def has_a_clipped_entry_that_rounds_to_the_limit(case):
    v, _, high = units_of(case)
    return bool(((v > high) & (v < high + 0.5)).any())


WANTED = {
    **{str(dtype): lambda case, dtype=dtype: case.x.dtype == dtype for dtype in DTYPES},
    **{name: lambda case, name=name: case.config["granularity"] == name for name in GRANULARITIES},
    "activation": lambda case: case.config["axis"] is None,
    "tie": has_a_tie_inside,
    "clipped": has_a_clipped_entry_that_rounds_to_the_limit,
}


@pytest.mark.parametrize("wanted", WANTED.values(), ids=WANTED)
def test_cases_reach(wanted):
    assert wanted(find(ANY_CASE, wanted, settings=ONLY_FIND))
