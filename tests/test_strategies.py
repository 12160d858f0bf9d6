import math

import pytest
import torch
from hypothesis import Phase, find, given, settings
from hypothesis import strategies as st

from qsam.functional import integer_limits
from qsam.quantizers import LSQ, QUANTIZERS
from qsam.testing.case import owners
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
LSQ_SETTINGS = [setting for setting in SETTINGS if setting.name == "lsq"]


def test_fill_repeats_its_values_in_order():
    assert fill([1.0, 2.0], (3,)).tolist() == [1, 2, 1]


@given(shapes(2, 3))
def test_shapes_have_entries_and_the_dimensions_asked_for(shape):
    assert 2 <= len(shape) <= 3
    assert 1 <= math.prod(shape) <= 125


@given(st.data(), st.integers(2, 8), st.booleans(), powers_of_two())
def test_ties_are_exact_halves_at_scales_that_are_powers_of_two(data, bits, signed, scale):
    x = data.draw(ties((4, 3), *integer_limits(bits, signed))).float() * scale
    assert ((x / scale).frac().abs() == 0.5).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@given(data=st.data(), bits=st.integers(2, 8), signed=st.booleans(), scale=powers_of_two())
def test_ties_survive_the_cast(dtype, data, bits, signed, scale):
    x = data.draw(ties((4, 3), *integer_limits(bits, signed))) * scale
    assert torch.equal(x.to(dtype).double(), x)


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
    assert {setting.name for setting in SETTINGS} == set(QUANTIZERS) - {"per_channel"}  # a name of lsq


def test_settings_leave_out_what_a_quantizer_refuses(monkeypatch):
    class Whole(LSQ):
        def __init__(self, **setting):
            if setting["granularity"] != "per_tensor":
                raise ValueError("one scale per tensor")
            super().__init__(**setting)

    monkeypatch.setitem(QUANTIZERS._classes, "whole", Whole)
    found = settings_of_the_registry()
    assert Setting("whole", "per_tensor", True) in found
    assert Setting("whole", "per_group", False) not in found
    assert Setting("lsq", "per_group", False) in found


@pytest.mark.parametrize("setting", LSQ_SETTINGS, ids=str)
@given(data=st.data())
def test_cases_can_be_built(setting, data):
    case = data.draw(cases(setting))
    assert case.x.isfinite().all()
    assert case.build()(case.x).shape == case.x.shape


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("setting", LSQ_SETTINGS, ids=str)
def test_cases_reach_every_dtype(setting, dtype):
    assert find(cases(setting), lambda case: case.x.dtype == dtype, settings=ONLY_FIND).x.dtype == dtype


@pytest.mark.parametrize("setting", LSQ_SETTINGS, ids=str)
def test_cases_reach_an_exact_tie_inside_the_limits(setting):
    def has_tie(case):
        q = case.build()
        v = case.x.double() / q.scale.detach().double().flatten()[owners(q, case.x)]
        return bool(((v.frac().abs() == 0.5) & (v > q.quant_min) & (v < q.quant_max)).any())

    assert has_tie(find(cases(setting), has_tie, settings=ONLY_FIND))


@pytest.mark.parametrize("setting", LSQ_SETTINGS, ids=str)
def test_cases_reach_a_clipped_entry_that_rounds_to_the_limit(setting):
    def has_one(case):
        q = case.build()
        v = case.x.double() / q.scale.detach().double().flatten()[owners(q, case.x)]
        return bool(((v > q.quant_max) & (v < q.quant_max + 0.5)).any())

    assert has_one(find(cases(setting), has_one, settings=ONLY_FIND))
