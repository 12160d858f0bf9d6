import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qsam.functional import SCALE_FLOOR, integer_limits
from qsam.scales import INIT_RULES, initial_scale
from tests.strategies import awkward_tensors, normal_tensors

RULES = list(INIT_RULES)
DISTRIBUTIONS = {
    "normal": lambda z, u: z,
    "laplace-like": lambda z, u: z * z.abs(),
    "heavy": lambda z, u: z / u.clamp_min(1e-3),
    "uniform": lambda z, u: 2 * u - 1,
}


def sample(distribution, rows=6, entries=1024):
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(rows, entries, generator=generator)
    return DISTRIBUTIONS[distribution](z, torch.rand(rows, entries, generator=generator))


def squared_error(rows, scale, low, high):
    rows, scale = rows.double(), scale.double().reshape(-1, 1)
    return ((rows / scale).clip(low, high).round() * scale - rows).square().sum(1)


def least_error(rows, low, high):
    """Return the least squared error of each row over 300 steps between max|x| / Qp and a thousandth of it."""
    largest = rows.double().abs().amax(1)
    steps = torch.logspace(0.05, -3, 300, dtype=torch.float64)
    return torch.stack([squared_error(rows, largest * step / high, low, high) for step in steps]).amin(0)


def grid_and_rows(bits, signed, distribution, rows=6):
    rows = sample(distribution, rows)
    return integer_limits(bits, signed), rows if signed else rows.abs()


def rows_of(strategy, shape=(3, 7)):
    return strategy(shape).map(lambda x: x.float())


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
def test_mse_is_near_the_least_error(bits, signed, distribution):
    (low, high), rows = grid_and_rows(bits, signed, distribution)
    error = squared_error(rows, initial_scale(rows, low, high, "mse"), low, high)
    assert (error <= 1.25 * least_error(rows, low, high)).all()


def test_mse_is_within_a_tenth_of_the_least_error():
    worst = []
    for distribution in DISTRIBUTIONS:
        for bits in range(2, 9):
            (low, high), rows = grid_and_rows(bits, False, distribution, rows=16)
            error = squared_error(rows, initial_scale(rows, low, high, "mse"), low, high)
            worst.append(float((error / least_error(rows, low, high)).max()))
    assert max(worst) <= 1.1


@given(rows_of(normal_tensors) | rows_of(awkward_tensors), st.integers(2, 8), st.booleans())
def test_mse_is_never_worse_than_absmax(rows, bits, signed):
    low, high = integer_limits(bits, signed)
    rows = rows[(rows != 0).any(1)]
    mse, absmax = (squared_error(rows, initial_scale(rows, low, high, rule), low, high) for rule in ("mse", "absmax"))
    rounding = 1e-6 * rows.double().square().sum(1)  # the search sums squares in fp32
    assert (mse <= absmax + rounding).all()


def test_mse_is_never_worse_than_lsq():
    for distribution in DISTRIBUTIONS:
        for bits in range(2, 9):
            (low, high), rows = grid_and_rows(bits, False, distribution)
            mse, lsq = (squared_error(rows, initial_scale(rows, low, high, rule), low, high) for rule in ("mse", "lsq"))
            assert (mse <= 1.0001 * lsq).all()


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
def test_mse_is_never_worse_than_lsq_on_normal_rows(bits, signed):
    (low, high), rows = grid_and_rows(bits, signed, "normal")
    mse, lsq = (squared_error(rows, initial_scale(rows, low, high, rule), low, high) for rule in ("mse", "lsq"))
    assert (mse <= lsq).all()


def test_a_long_row_is_sampled_without_harm():
    row = torch.randn(1, 2**19 + 2**17, generator=torch.Generator().manual_seed(0))
    error = squared_error(row, initial_scale(row, -8, 7, "mse"), -8, 7)
    around = torch.linspace(0.3, 0.4, 11)  # round the best step for N(0, 1), 0.335
    assert error <= 1.01 * min(squared_error(row, step, -8, 7) for step in around)


def test_a_sample_of_a_long_row_sees_all_columns():
    matrix = 0.02 * torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
    matrix[:, 1::4] *= 8
    row = matrix.reshape(1, -1)
    mse, lsq = (squared_error(row, initial_scale(row, -8, 7, rule), -8, 7) for rule in ("mse", "lsq"))
    assert mse <= lsq


def test_lsq_is_the_formula_of_the_paper():
    rows = sample("normal")
    torch.testing.assert_close(initial_scale(rows, -8, 7, "lsq"), 2 * rows.abs().mean(1) / 7**0.5)


def test_absmax_puts_the_largest_magnitude_on_the_highest_level():
    rows = sample("normal")
    torch.testing.assert_close(initial_scale(rows, -8, 7, "absmax"), rows.abs().amax(1) / 7)


def test_percentile_leaves_out_one_entry_of_a_thousand():
    rows = torch.linspace(0, 1, 1000)[None].clone()
    torch.testing.assert_close(initial_scale(rows, -8, 7, "percentile"), rows[:, -2] / 7)
    rows[0, -1] = 1e6
    torch.testing.assert_close(initial_scale(rows, -8, 7, "percentile"), rows[:, -2] / 7)


def test_percentile_of_hardly_any_nonzero_entries_is_absmax():
    rows = torch.zeros(1, 2000)
    rows[0, 3] = -3.5
    assert initial_scale(rows, -8, 7, "percentile").item() == 0.5


@pytest.mark.parametrize("rule", RULES)
@given(rows=rows_of(normal_tensors) | rows_of(awkward_tensors), bits=st.integers(2, 8), signed=st.booleans())
def test_a_scale_is_finite_and_positive_fp32_one_a_row(rule, rows, bits, signed):
    scale = initial_scale(rows, *integer_limits(bits, signed), rule)
    assert scale.shape == (3,)
    assert scale.dtype == torch.float32
    assert scale.isfinite().all()
    assert torch.equal(scale >= SCALE_FLOOR, (rows != 0).any(1))
    assert (scale[(rows == 0).all(1)] == 0).all()


@pytest.mark.parametrize("rule", RULES)
@given(rows=rows_of(normal_tensors), bits=st.integers(2, 8), exponent=st.integers(-60, 60))
def test_a_power_of_two_factors_out(rule, rows, bits, exponent):
    limits = integer_limits(bits, True)
    scale = initial_scale(rows, *limits, rule)
    assert torch.equal(initial_scale(rows * 2.0**exponent, *limits, rule), scale * 2.0**exponent)


@pytest.mark.parametrize("factor", [1e-30, 0.3, 1e30])
@pytest.mark.parametrize("rule", RULES)
def test_rows_of_any_size_are_treated_alike(rule, factor):
    rows = sample("normal", rows=4, entries=64)
    scaled = initial_scale(rows * factor, -8, 7, rule)
    torch.testing.assert_close(scaled / factor, initial_scale(rows, -8, 7, rule), rtol=1e-3, atol=0)


@pytest.mark.parametrize("rule", RULES)
@given(rows=rows_of(normal_tensors))
def test_each_row_is_on_its_own(rule, rows):
    apart = torch.cat([initial_scale(row[None], -8, 7, rule) for row in rows])
    assert torch.equal(initial_scale(rows, -8, 7, rule), apart)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_dtype_of_the_data_does_not_matter(rule, dtype):
    rows = sample("normal", rows=2, entries=32).to(dtype)
    torch.testing.assert_close(initial_scale(rows, -8, 7, rule), initial_scale(rows.float(), -8, 7, rule))


@pytest.mark.parametrize("rule", RULES)
def test_rows_of_zeros_have_no_scale_and_leave_the_others_alone(rule):
    rows = torch.zeros(4, 6)
    rows[1], rows[2] = torch.linspace(-1, 1, 6), torch.linspace(-3, 3, 6)
    scale = initial_scale(rows, -8, 7, rule)
    assert scale[[0, 3]].tolist() == [0, 0]
    assert torch.equal(scale[[1, 2]], initial_scale(rows[[1, 2]], -8, 7, rule))


@pytest.mark.parametrize("value", [0.3, -0.3, 1e-30, -1e30])
@pytest.mark.parametrize("bits", range(2, 9))
def test_mse_represents_a_constant_row(bits, value):
    low, high = integer_limits(bits, True)
    row = torch.full((1, 9), value)
    error = squared_error(row, initial_scale(row, low, high, "mse"), low, high)
    assert error <= 1e-12 * row.double().square().sum()


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
def test_mse_finds_the_grid_that_the_rows_are_on(bits, signed):
    low, high = integer_limits(bits, signed)
    row = 0.037 * torch.arange(low, high + 1)[None]
    torch.testing.assert_close(initial_scale(row, low, high, "mse"), torch.tensor([0.037]))


@pytest.mark.parametrize("rule", RULES)
def test_an_unsigned_grid_takes_rows_below_zero(rule):
    scale = initial_scale(torch.tensor([[-1.0, -2.0, -3.0]]), 0, 15, rule)
    assert scale.isfinite().all()
    assert (scale > 0).all()


@pytest.mark.parametrize("rule", RULES)
def test_rows_without_entries_have_no_scale(rule):
    assert initial_scale(torch.zeros(2, 0), -8, 7, rule).tolist() == [0, 0]


def test_the_scale_needs_no_gradient():
    assert not initial_scale(torch.ones(1, 3, requires_grad=True), -8, 7, "mse").requires_grad


def test_an_unknown_rule_is_refused_with_the_nearest():
    message = r"`init` must be one of mse, lsq, absmax, percentile, got 'maxabs'\. Did you mean 'absmax'\?"
    with pytest.raises(ValueError, match=message):
        initial_scale(torch.ones(1, 2), -8, 7, "maxabs")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_data_that_are_not_finite_are_refused(value):
    with pytest.raises(ValueError, match="the scale cannot be set from data that holds NaN or infinity"):
        initial_scale(torch.tensor([[1.0, value]]), -8, 7, "mse")
