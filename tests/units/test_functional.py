import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qsam.functional import (
    SCALE_FLOOR,
    fake_quantize,
    from_groups,
    integer_limits,
    lsq_grad_scale,
    positive,
    quantize,
    to_groups,
    wide_dtype,
)
from tests.strategies import bounds, powers_of_two, shapes

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


@given(st.integers(2, 8))
def test_integer_limits_hold_all_numbers_of_that_many_bits(bits):
    for signed in (True, False):
        low, high = integer_limits(bits, signed)
        assert high - low + 1 == 2**bits
        assert low == (-(high + 1) if signed else 0)


def test_bits_out_of_range_or_of_another_type_are_refused():
    for bits in (1, 9, -4):
        with pytest.raises(ValueError, match=rf"`bits` must be an integer in \[2, 8\], got {bits}\. To keep"):
            integer_limits(bits, signed=True)
    for bits in (4.0, "4", None, True):
        with pytest.raises(TypeError, match=r"`bits` must be an integer in \[2, 8\], got .* of type"):
            integer_limits(bits, signed=True)


def test_wide_dtype_is_fp32_at_least():
    wide = {dtype: wide_dtype(dtype) for dtype in (torch.float16, torch.bfloat16, torch.float32)}
    assert set(wide.values()) == {torch.float32}
    assert wide_dtype(torch.float64) == torch.float64


@given(st.floats(allow_nan=False, allow_infinity=False, width=32))
def test_positive_is_the_magnitude_above_a_floor(value):
    assert positive(torch.tensor([value])).item() == max(abs(value), SCALE_FLOOR)


@given(st.data(), st.integers(2, 8), st.booleans(), powers_of_two())
def test_quantize_is_the_definition_in_python(data, bits, signed, scale):
    low, high = integer_limits(bits, signed)
    x = data.draw(bounds((6,), low, high)) * scale
    expected = [round(min(max(value / scale, low), high)) for value in x.tolist()]
    assert quantize(x, torch.tensor([scale]), low, high).tolist() == expected


def test_the_gradient_in_a_bin_and_at_each_bound():
    x = torch.tensor([-2.2, -2.0, -1.9, 0.25, 0.9, 1.0, 1.2], requires_grad=True)
    slopes = []
    for entry in range(7):
        s = torch.ones(1, requires_grad=True)
        fake_quantize(x, s, -2, 1)[entry].backward()
        slopes.append(s.grad.item())
    assert x.grad.tolist() == [0, 0, 1, 1, 1, 0, 0]
    torch.testing.assert_close(torch.tensor(slopes), torch.tensor([-2, -2, -0.1, -0.25, 0.1, 1, 1]))


@pytest.mark.parametrize("shape", [(1,), (3, 1), (1, 4), (3, 4)])
def test_the_gradient_of_a_broadcast_scale_has_its_shape(shape):
    s = torch.full(shape, 0.1, requires_grad=True)
    fake_quantize(X, s, -8, 7).sum().backward()
    assert s.grad.shape == shape


@given(st.sampled_from([0.5, 1.0, 2.0**-7]))
def test_the_gradient_scale_moves_the_gradient_of_s_and_no_value(factor):
    results = []
    for grad_scale in (1.0, factor):
        x, s = X.clone().requires_grad_(), torch.full((1,), 0.1, requires_grad=True)
        out = fake_quantize(x, s, -8, 7, grad_scale)
        out.sum().backward()
        results.append((out.detach(), x.grad, s.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert torch.equal(results[0][2] * factor, results[1][2])


@pytest.mark.parametrize("which", ["x", "s"])
def test_what_needs_no_gradient_gets_none(which):
    x, s = X.clone().requires_grad_(which == "x"), torch.full((1,), 0.1).requires_grad_(which == "s")
    fake_quantize(x, s, -8, 7).sum().backward()
    assert (x.grad is None) == (which == "s")
    assert (s.grad is None) == (which == "x")


def test_a_second_derivative_exists():
    x, s = X.clone().requires_grad_(), torch.full((1,), 0.1, requires_grad=True)
    (grad,) = torch.autograd.grad(fake_quantize(x, s, -8, 7).pow(3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), x)
    inside = (X / 0.1 > -8) & (X / 0.1 < 7)
    torch.testing.assert_close(second, torch.where(inside, 6 * fake_quantize(X, s.detach(), -8, 7), 0))
    (ds,) = torch.autograd.grad(fake_quantize(x, s, -8, 7).pow(3).sum(), s, create_graph=True)
    assert torch.autograd.grad(ds, s)[0].isfinite().all()


def test_many_gradients_of_one_output_equal_one_at_a_time():
    x, s = X.clone().requires_grad_(), torch.full((1,), 0.1, requires_grad=True)
    out, grads = fake_quantize(x, s, -8, 7), torch.stack([X, X.flip(0), X.abs()])
    dx, ds = torch.autograd.grad(out, (x, s), grads, is_grads_batched=True, retain_graph=True)
    expected = [torch.autograd.grad(out, (x, s), grad, retain_graph=True) for grad in grads]
    assert torch.equal(dx, torch.stack([each for each, _ in expected]))
    torch.testing.assert_close(ds, torch.stack([each for _, each in expected]))


def test_a_tensor_without_dimensions_keeps_its_shape():
    assert fake_quantize(torch.tensor(0.3), torch.ones(1), -8, 7).shape == ()


@given(st.integers(1, 10**9), st.integers(1, 255))
def test_lsq_grad_scale_is_its_formula(count, quant_max):
    assert lsq_grad_scale(count, quant_max) == pytest.approx(1 / math.sqrt(count * quant_max), rel=1e-12)


@given(shapes(2, 3), st.data())
def test_groups_are_consecutive_entries_of_one_channel(shape, data):
    axis = data.draw(st.integers(0, len(shape) - 1))
    entries = math.prod(shape) // shape[axis]
    size = data.draw(st.sampled_from([size for size in range(1, entries + 1) if entries % size == 0]))
    x = torch.arange(math.prod(shape)).reshape(shape)
    groups = to_groups(x, axis, size)
    assert groups.shape == (shape[axis], entries // size, size)
    for channel in range(shape[axis]):
        assert torch.equal(groups[channel].flatten(), x.select(axis, channel).flatten())
    assert torch.equal(from_groups(groups, x.shape, axis), x)


@pytest.mark.parametrize("size", [0, -4, 3, 8])
def test_a_group_size_that_does_not_divide_is_refused(size):
    message = rf"must divide the 4 entries of each channel of a tensor of shape \(3, 4\) \(channel axis 0\), got {size}"
    with pytest.raises(ValueError, match=message):
        to_groups(X, 0, size)
