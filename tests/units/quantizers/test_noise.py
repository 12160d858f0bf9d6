"""Quantizers that draw noise: their values and slopes, and the stream that they draw from."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qsam.functional import lsq_grad_scale
from qsam.quantizers import QUANTIZERS, DiffQ, Noise
from qsam.testing.inputs import owners
from tests.reference.quantizers import ENTRY_BY_ENTRY, TWINS
from tests.strategies import normal_tensors

NOISY = ["diffq", "stochastic"]
KINDS = [
    {"axis": 0},
    {"granularity": "per_channel", "axis": 1},
    {"granularity": "per_group", "axis": 0, "group_size": 4},
    {"signed": False},
]
SHAPE = (4, 6, 2)
DTYPES = [torch.float32, torch.bfloat16, torch.float64]

each_noisy = pytest.mark.parametrize("name", NOISY)


def build(name, x, step=0, on=True, **kind):
    """Return a quantizer that was set from ``x``, at its draw number ``step``."""
    q = QUANTIZERS.get(name)(**{"bits": 3, **kind})
    q.observe_(x)
    for noise in (module for module in q.modules() if isinstance(module, Noise)):
        noise.on = on
        noise.step.fill_(step)
    return q


def normal(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def slopes(q, x):
    """Return Q(x), its gradient by x, and that by the scale (one number per row)."""
    leaf = x.clone().requires_grad_()
    out = q(leaf)
    dx, *ds = torch.autograd.grad(out.sum(), [leaf, *q.parameters()], materialize_grads=True)
    return out.detach(), dx, ds


# --- values and slopes ------------------------------------------------------------------------------------------------


def takes(name, kind):
    try:
        QUANTIZERS.get(name)(bits=3, **kind)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("name", ENTRY_BY_ENTRY)
@given(data=st.data(), x=normal_tensors(SHAPE), step=st.integers(0, 1500))
def test_a_quantizer_is_its_twin_entry_by_entry(name, data, x, step):
    kinds = [{"axis": 1}] if name == "per_channel" else [kind for kind in KINDS if takes(name, kind)]
    q = build(name, x, step, **data.draw(st.sampled_from(kinds)))
    u = q.noise(x) if name in NOISY else torch.zeros(SHAPE)
    s = q.step_size(x)
    s = torch.ones(SHAPE) if s is None else s.expand(SHAPE)
    b = torch.zeros(SHAPE) if q.shift is None else q.shift.detach().expand(SHAPE)
    share = min(step / 1000, 1.0)
    twins = [
        TWINS[name](float(entry), (float(step_size), q.quant_min, q.quant_max, float(shift)), float(noise), share)
        for entry, step_size, shift, noise in zip(x.flatten(), s.flatten(), b.flatten(), u.flatten(), strict=True)
    ]
    value, dx, ds = (torch.tensor(column, dtype=torch.float64) for column in zip(*twins, strict=True))
    out, got_dx, got_ds = slopes(q, x)
    # fp32 annealing share and fp64 arithmetic against Python's: a few roundings of numbers of at most 8 steps
    assert torch.allclose(out.flatten(), value, rtol=0, atol=1e-6 * float(s.max() + b.abs().max()))
    assert torch.equal(got_dx.flatten(), dx)
    if got_ds:
        rows = torch.zeros(got_ds[0].numel(), dtype=torch.float64).index_add(0, owners(q, x).flatten(), ds)
        count = x[0].numel() if q.axis is None else x.numel() // rows.numel()
        expected = rows * (1.0 if name in ("pact", "liq") else lsq_grad_scale(count, q.quant_max + q.offset))
        assert torch.allclose(got_ds[0].flatten().double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "on", "step"),
    [("diffq", False, 0), ("stochastic", False, 0), ("diffq", True, 1000), ("diffq", True, 10**9)],
)
@settings(max_examples=12)  # all pairs
@given(kind=st.sampled_from(KINDS), dtype=st.sampled_from(DTYPES))
def test_without_noise_and_after_annealing_it_is_lsq(name, on, step, kind, dtype):
    x = normal(SHAPE).to(dtype)
    (out, dx, (ds,)), (value, mask, (slope,)) = (
        slopes(build(name, x, step, on, **kind), x),
        slopes(build("lsq", x, **kind), x),
    )
    assert torch.equal(out, value)
    assert torch.equal(dx, mask)
    if on:  # the sum over a row is taken in another order
        assert torch.allclose(ds, slope, rtol=1e-5, atol=1e-6)
    else:
        assert torch.equal(ds, slope)


@pytest.mark.parametrize("steps", [1, 10, 1000])
def test_the_noise_of_diffq_goes_down_linearly_over_anneal_steps(steps):
    q = build("diffq", normal(SHAPE), axis=0)
    q.anneal_steps = steps
    x = q.scale.detach().double() * torch.arange(-3, 3).repeat_interleave(8).reshape(SHAPE)  # on the grid: no rounding
    for step in range(0, steps + 1, max(1, steps // 5)):
        q.noise.step.fill_(step)
        noise = (q(x) - x).detach() / q.scale.detach()
        assert torch.allclose(noise, (1 - step / steps) * q.noise(x), rtol=0, atol=1e-6)


def test_anneal_steps_must_be_positive_and_are_shown():
    assert DiffQ.anneal_steps == 1000
    q = build("diffq", normal(SHAPE), axis=0)
    assert repr(q).startswith("DiffQ(\n  bits=3, signed, per_tensor, anneal_steps=1000")
    q.anneal_steps = 0
    with pytest.raises(ValueError, match="`anneal_steps` must be an integer >= 1, got 0: for no noise, use 'lsq'"):
        q(normal(SHAPE))


@given(kind=st.sampled_from(KINDS), step=st.integers(0, 10**6))
def test_stochastic_rounding_is_on_the_grid_and_leaves_what_is_on_it(kind, step):
    x = normal(SHAPE)
    q = build("stochastic", x, step, **kind)
    once = q(x).detach()
    codes = once / q.step_size(x)
    assert torch.equal(codes.round(), codes)
    assert q.quant_min <= codes.min()
    assert codes.max() <= q.quant_max
    assert torch.equal(q(once), once)


def test_stochastic_rounding_is_right_on_average():
    draws = 1000
    q = build("stochastic", normal(SHAPE), axis=0)
    x = normal(SHAPE, seed=1)
    mean = torch.zeros(SHAPE).double()
    for step in range(draws):
        q.noise.step.fill_(step)
        mean += q(x).detach() / draws
    s = float(q.scale.detach())
    limit = 5 * 0.5 * s / draws**0.5  # five standard deviations of the worst entry, half way between two levels
    assert float((mean - x.clip(s * q.quant_min, s * q.quant_max)).abs().max()) < limit


# --- the stream -------------------------------------------------------------------------------------------------------


def stream(seed, step, count):
    noise = Noise()
    noise.seed.fill_(seed)
    noise.step.fill_(step)
    return noise(torch.empty(count)).double()


@settings(max_examples=4)
@given(seed=st.integers(0, 2**31 - 1))
@example(seed=0)
@example(seed=2**31 - 1)
def test_the_noise_is_uniform_and_its_entries_steps_and_seeds_are_not_correlated(seed):
    count = 2**16
    u = stream(seed, 0, count)
    assert -0.5 < u.min()
    assert u.max() < 0.5
    unit = 5 * count**-0.5  # five standard deviations of a mean of unit variance
    z = u * 12**0.5
    assert abs(float(z.mean())) < unit
    assert abs(float(z.square().mean()) - 1) < unit  # the square of a uniform number varies less than 1
    shifted = [u.roll(shift) for shift in (1, 2, 16, 64, 768, 1024)]
    for other in [stream(seed, 1, count), stream(seed ^ 1, 0, count), *shifted]:
        assert abs(float((z * other * 12**0.5).mean())) < unit
    cells = torch.histc(u, 64, -0.5, 0.5)
    chi_square = float(((cells - count / 64) ** 2).sum() / (count / 64))
    assert 25 < chi_square < 125  # 63 degrees of freedom, 5 standard deviations of 11


def test_one_entry_over_many_steps_is_uniform():
    u = torch.stack([stream(3, step, 8) for step in range(4000)])
    z = u * 12**0.5
    assert float(z.mean(0).abs().max()) < 5 / 4000**0.5
    assert float((z[1:] * z[:-1]).mean(0).abs().max()) < 5 / 4000**0.5


@each_noisy
def test_the_draw_is_a_pure_function_of_seed_step_and_index(name):
    x = normal(SHAPE)
    q = build(name, x, axis=0)
    first = q(x)
    assert torch.equal(q(x.transpose(0, -1).contiguous().transpose(0, -1)), first)
    q.update(x)
    assert not torch.equal(q(x), first)
    other = build(name, 2 * x + 1, axis=0)
    other.load_state_dict(q.state_dict())
    assert torch.equal(other(x), q(x))
    q.noise.step.fill_(0)
    assert torch.equal(q(x), first)


def test_layers_of_other_weights_draw_other_noise_and_the_seed_follows_from_the_data():
    seeds = [int(build("diffq", normal(SHAPE, seed), axis=0).noise.seed) for seed in (0, 0, 1, 2)]
    assert seeds[0] == seeds[1]
    assert len(set(seeds)) == 3


@each_noisy
def test_an_input_is_noisy_in_training_mode_only(name):
    x = normal((3, 8))
    q = build(name, x)
    exact = build("lsq", x)(x)
    assert not torch.equal(q(x), exact)
    assert torch.equal(q.eval()(x), exact)
    weight = build(name, x, axis=0).eval()
    assert not torch.equal(weight(x), exact), "whether a weight is noisy, its optimizer says"


@each_noisy
def test_noise_compiles_in_one_graph(name):
    x = normal((3, 8)).float()
    q = build(name, x)
    compiled = torch.compile(q, fullgraph=True, backend="eager")
    for _ in range(3):
        assert torch.equal(compiled(x), q(x))
        q.update(x)
    q.noise.on = False
    assert torch.equal(compiled(x), q(x))
