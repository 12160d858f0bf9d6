"""Quantizers that draw noise: what they draw, when, and that the pull-back draws the same."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim import LBFGS, SGD

import qsam
from qsam.functional import lsq_grad_scale
from qsam.quantizers import QUANTIZERS, DiffQ, Noise
from qsam.testing.case import owners
from tests.models import CONV, EVERYWHERE, MLP
from tests.optim.methods import (
    QUANTIZING,
    Method,
    assert_on_grid,
    assert_same,
    closure_of,
    everything,
    latents,
    train,
    train_by_hand,
)
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
QAT = next(method for method in QUANTIZING if method.name == "qat")

each_noisy = pytest.mark.parametrize("name", NOISY)
each_method = pytest.mark.parametrize("method", QUANTIZING, ids=str)


def build(name, x, step=0, on=True, **kind):
    """Return a quantizer that was set from ``x``, at its draw number ``step``."""
    q = QUANTIZERS.get(name)(**{"bits": 3, **kind})
    q.observe_(x)
    for noise in (module for module in q.modules() if isinstance(module, Noise)):
        noise.on = on
        noise.step.fill_(step)
    return q


def takes(name, kind):
    try:
        QUANTIZERS.get(name)(bits=3, **kind)
    except ValueError:
        return False
    return True


def normal(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def slopes(q, x):
    """Return Q(x), its gradient by x, and that by the scale (one number a row)."""
    leaf = x.clone().requires_grad_()
    out = q(leaf)
    dx, *ds = torch.autograd.grad(out.sum(), [leaf, *q.parameters()], materialize_grads=True)
    return out.detach(), dx, ds


# --- values and slopes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind"), [(name, kind) for name in ENTRY_BY_ENTRY for kind in KINDS if takes(name, kind)], ids=str
)
@settings(max_examples=20)
@given(data=st.data())
def test_a_quantizer_is_its_twin_entry_by_entry(name, kind, data):
    if name == "per_channel":
        kind = {"axis": 1}
    x = data.draw(normal_tensors(SHAPE))
    step = data.draw(st.integers(0, 1500))
    q = build(name, x, step, **kind)
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
        factor = 1.0 if name in ("pact", "liq") else lsq_grad_scale(count, q.quant_max + q.offset)
        assert torch.allclose(got_ds[0].flatten().double(), rows * factor, rtol=1e-5, atol=1e-5)


@each_noisy
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_without_noise_it_is_lsq(name, kind, dtype):
    x = normal(SHAPE).to(dtype)
    ours, lsq = build(name, x, on=False, **kind), build("lsq", x, **kind)
    (out, dx, (ds,)), (value, mask, (slope,)) = slopes(ours, x), slopes(lsq, x)
    assert_same({"out": out, "dx": dx, "ds": ds}, {"out": value, "dx": mask, "ds": slope})


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_diffq_that_is_annealed_is_lsq(kind, dtype):
    x = normal(SHAPE).to(dtype)
    for step in (DiffQ.anneal_steps, 10**9):
        annealed, lsq = build("diffq", x, step, **kind), build("lsq", x, **kind)
        (out, dx, (ds,)), (q, mask, (slope,)) = slopes(annealed, x), slopes(lsq, x)
        assert torch.equal(out, q)
        assert torch.equal(dx, mask)
        assert torch.allclose(ds, slope, rtol=1e-5, atol=1e-6)


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
    q = build("diffq", normal(SHAPE), axis=0)
    assert repr(q).startswith("DiffQ(\n  bits=3, signed, per_tensor, anneal_steps=1000")
    q.anneal_steps = 0
    with pytest.raises(ValueError, match="`anneal_steps` must be an integer >= 1, got 0: for no noise, use 'lsq'"):
        q(normal(SHAPE))


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_stochastic_rounding_is_on_the_grid_and_leaves_what_is_on_it(kind):
    x = normal(SHAPE)
    for step in range(20):
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


# --- the draw -----------------------------------------------------------------------------------------------------


def stream(seed, step, count):
    noise = Noise()
    noise.seed.fill_(seed)
    noise.step.fill_(step)
    return noise(torch.empty(count)).double()


@pytest.mark.parametrize("seed", [0, 1, 2**31 - 1])
def test_the_noise_is_uniform_and_its_entries_and_steps_are_not_correlated(seed):
    count = 2**16
    u, following = stream(seed, 0, count), stream(seed, 1, count)
    assert -0.5 < u.min()
    assert u.max() < 0.5
    unit = 5 * count**-0.5  # five standard deviations of a mean of unit variance
    z = u * 12**0.5
    assert abs(float(z.mean())) < unit
    assert abs(float(z.square().mean()) - 1) < unit  # the square of a uniform number varies less than 1
    others = [following, stream(seed ^ 1, 0, count), *(u.roll(shift) for shift in (1, 2, 16, 64, 768, 1024))]
    for other in others:
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
def test_the_draw_is_a_pure_function_of_seed_and_step(name):
    x = normal(SHAPE)
    q = build(name, x, axis=0)
    before = torch.get_rng_state()
    first = q(x)
    assert torch.equal(q(x), first)
    assert torch.equal(torch.get_rng_state(), before)
    strided = x.transpose(0, -1).contiguous().transpose(0, -1)
    assert torch.equal(q(strided), first)
    q.update(x)
    assert not torch.equal(q(x), first)
    for twin in (copy.deepcopy(q), pickle.loads(pickle.dumps(q))):
        assert torch.equal(twin(x), q(x))
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
def test_state_and_scale_survive_a_cast_of_the_model(name):
    q = build(name, normal(SHAPE), axis=0)
    before = copy.deepcopy(q.state_dict())
    q.half()
    assert_same(before, q.state_dict())
    assert sorted(before) == ["noise.seed", "noise.step", "scale"]


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


# --- in an optimizer ----------------------------------------------------------------------------------------------


def noisy_model(name, task=MLP, activations="lsq", **options):
    return task.quantized(weights=name, activations=activations, bits=2, **options)


def run_of(method, name, task, steps, drive=train, **options):
    model = noisy_model(name, task, activations=name)
    optimizer = method(model, **options)
    torch.manual_seed(0)
    drive(optimizer, model, task, steps)
    return optimizer, model


@each_noisy
@each_method
def test_p_is_noisy_in_the_blocks_and_exact_outside(name, method):
    model = noisy_model(name)
    optimizer = method(model)
    slot = optimizer.latents_of.slots[0]

    def noisy_weight():
        slot.quantizer.noise.on = True
        try:
            return slot.quantizer(slot.latent).detach()
        finally:
            slot.quantizer.noise.on = False

    for i in range(3):
        assert_on_grid(optimizer)
        with optimizer.first_pass():
            assert torch.equal(slot.parameter, noisy_weight())
            with pytest.raises(RuntimeError, match=r"inside first_pass\(\) would save weights that are not Q\(w\)"):
                model.state_dict()
            MLP.loss(model, MLP.batch(i)).backward()
        assert_on_grid(optimizer)
        assert not torch.equal(slot.parameter, noisy_weight())
        if method.perturbs:
            with optimizer.perturbed():
                e = slot.parameter.detach() - noisy_weight()
                assert 0 < float(e.norm()) < 0.2
                MLP.loss(model, MLP.batch(i)).backward()
        optimizer.step()
        model.state_dict()
        if method.alternates:
            with optimizer.scale_phase():
                assert torch.equal(slot.parameter, noisy_weight())
                MLP.loss(model, MLP.batch(i)).backward()
            optimizer.step_scales()
    assert_on_grid(optimizer)


@each_noisy
def test_qat_equals_noise_in_the_graph(name):
    """The slow twin: the quantizers themselves in the graph, with their noise on."""
    model = noisy_model(name, activations=None)
    optimizer = qsam.QAT(model, SGD, lr=0.05, scale_lr=0.05)
    w = {slot.path: slot.latent.detach().clone().requires_grad_() for slot in optimizer.latents_of.slots}
    quantizers = {slot.path: copy.deepcopy(slot.quantizer).requires_grad_() for slot in optimizer.latents_of.slots}
    floats = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters() if n.endswith("bias")}
    for q in quantizers.values():
        q.noise.on = True
    groups = [*w.values(), *floats.values(), *(q.scale for q in quantizers.values())]
    reference = SGD(groups, lr=0.05)
    plain = MLP.build()
    for i in range(10):
        train(optimizer, model, MLP, 1, start=i)
        reference.zero_grad()
        weights = {path: quantizers[path](w[path]) for path in w}
        MLP.loss(lambda x, all=weights | floats: torch.func.functional_call(plain, all, (x,)), MLP.batch(i)).backward()
        reference.step()
        for path, q in quantizers.items():
            q.update(w[path])
    expected = {**{n: p.detach() for n, p in (w | floats).items()}}
    assert_same(latents(optimizer, model), expected)
    for slot in optimizer.latents_of.slots:
        assert torch.equal(slot.quantizer.scale, quantizers[slot.path].scale)


@each_noisy
@each_method
@pytest.mark.long
def test_by_hand_equals_step_closure_with_noise(name, method):
    def by_hand(*args):
        train_by_hand(method, *args)

    runs = [everything(*run_of(method, name, CONV, 6, drive)) for drive in (train, by_hand)]
    assert_same(*runs)


@each_noisy
@each_method
@pytest.mark.parametrize("stop", [3, 4])
@pytest.mark.long
def test_a_resumed_run_equals_one_that_did_not_stop(name, method, stop):
    optimizer, model = run_of(method, name, CONV, stop)
    checkpoint = copy.deepcopy((model.state_dict(), optimizer.state_dict(), torch.get_rng_state()))
    train(optimizer, model, CONV, 4, start=stop)
    resumed_model = noisy_model(name, CONV, activations=name)
    resumed = method(resumed_model)
    resumed_model.load_state_dict(checkpoint[0])
    resumed.load_state_dict(checkpoint[1])
    torch.set_rng_state(checkpoint[2])
    train(resumed, resumed_model, CONV, 4, start=stop)
    assert_same(everything(optimizer, model), everything(resumed, resumed_model))


@each_noisy
def test_every_stream_moves_once_a_step_of_the_weights(name):
    for method in QUANTIZING:
        optimizer, _ = run_of(method, name, MLP, 6)
        assert len(optimizer.latents_of.noises) == 6
        assert {int(noise.step) for noise in optimizer.latents_of.noises} == {optimizer.steps}


@each_noisy
def test_both_passes_of_a_step_see_the_same_noise(name):
    model = noisy_model(name)
    optimizer = qsam.SAQ(model, SGD, lr=0.1, rho=0.0)
    seen = []

    def closure():
        seen.append([slot.parameter.detach().clone() for slot in optimizer.latents_of.slots])
        return closure_of(optimizer, model, MLP, MLP.batch(0))()

    for _ in range(2):
        optimizer.step(closure)
    first, second, third, _ = seen
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, third, strict=True))


@each_noisy
@pytest.mark.parametrize("case", [1, 2, 3])
def test_rho_zero_is_qat_with_noise(name, case):
    saq = Method("saq", qsam.SAQ)
    perturbed = run_of(saq, name, CONV, 4, case=case, rho=0.0)
    assert_same(everything(*perturbed), everything(*run_of(QAT, name, CONV, 4)))


@each_noisy
def test_steps_that_are_not_perturbed_have_noise_too(name):
    saq = Method("saq", qsam.SAQ)
    assert_same(everything(*run_of(saq, name, CONV, 4, start=100)), everything(*run_of(QAT, name, CONV, 4)))


@each_noisy
@each_method
def test_after_an_exception_the_weights_are_exact_and_the_noise_is_off(name, method):
    optimizer, model = run_of(method, name, MLP, 2)
    calls = []

    def closure():
        calls.append(1)
        if len(calls) > 1 or not method.perturbs:
            raise KeyError("in the closure")
        return closure_of(optimizer, model, MLP, MLP.batch(3))()

    with pytest.raises(KeyError):
        optimizer.step(closure)
        optimizer.step(closure)
    assert_on_grid(optimizer)
    assert not any(noise.on for noise in optimizer.latents_of.noises)
    model.state_dict()
    train(optimizer, model, MLP, 2)
    assert_on_grid(optimizer)


@each_noisy
@each_method
def test_a_foreign_write_is_seen_before_the_noise_overwrites_it(name, method):
    optimizer, model = run_of(method, name, MLP, 2)
    model[0].weight.data.mul_(1.5)  # leaves no trace but the values
    written = model[0].weight.detach().clone()
    with pytest.raises(RuntimeError, match="was written by somebody else"):
        train(optimizer, model, MLP, 1)
    assert torch.equal(model[0].weight, written)
    optimizer.sync_latents()
    train(optimizer, model, MLP, 2)


@each_noisy
def test_a_step_by_hand_without_the_block_has_no_noise_and_says_so(name):
    model = noisy_model(name, activations=None)
    optimizer = qsam.QAT(model, SGD, lr=0.05, scale_lr=0.05)
    lsq = noisy_model("lsq", activations=None)
    reference = qsam.QAT(lsq, SGD, lr=0.05, scale_lr=0.05)
    for each, own in ((optimizer, model), (reference, lsq)):
        MLP.loss(own, MLP.batch(0)).backward()
        if own is model:
            with pytest.warns(UserWarning, match="this step's gradients were taken at the rounded weights"):
                each.step()
        else:
            each.step()
    assert_same(latents(optimizer, model), latents(reference, lsq))


@each_noisy
def test_evaluation_and_post_training_quantization_round(name):
    _, model = run_of(QAT, name, MLP, 3)
    lsq = MLP.quantized(bits=2)
    lsq.load_state_dict({k: v for k, v in model.state_dict().items() if ".noise." not in k})
    x = MLP.batch(5)["x"]
    assert torch.equal(model.eval()(x), lsq.eval()(x))
    floats = MLP.build()
    qsam.quantize_(floats, weights=name, activations=None, bits=2, rules=EVERYWHERE)
    qsam.write_(floats)
    assert len(floats[0].weight.unique()) <= 4


@each_noisy
def test_a_spec_brings_back_the_stream(name, tmp_path):
    optimizer, model = run_of(QAT, name, MLP, 3)
    optimizer.coverage.save(tmp_path)
    rebuilt = MLP.build()
    qsam.quantize_(rebuilt, spec=tmp_path)
    ours = {n: b for n, b in model.named_buffers() if "noise" in n}
    assert_same(ours, {n: b for n, b in rebuilt.named_buffers() if "noise" in n})
    assert len(ours) == 12


@each_noisy
def test_a_base_that_calls_its_closure_itself_sees_one_draw_a_step(name):
    model = noisy_model(name, activations=None)
    optimizer = qsam.QAT(model, LBFGS, lr=0.5, max_iter=4)
    weights = []

    def closure():
        loss = closure_of(optimizer, model, MLP, MLP.batch(0))()
        weights.append(optimizer.latents_of.slots[0].quantizer.noise.step.item())
        return loss

    optimizer.step(closure)
    assert set(weights) == {0}
    assert_on_grid(optimizer)


def test_quantizers_without_noise_have_no_part_in_it():
    model = MLP.quantized()
    optimizer = qsam.SAQ(model, SGD, lr=0.1)
    assert optimizer.latents_of.noises == []
    versions = [slot.parameter._version for slot in optimizer.latents_of.slots]
    with optimizer.first_pass():
        MLP.loss(model, MLP.batch(0)).backward()
    assert versions == [slot.parameter._version for slot in optimizer.latents_of.slots], "p is not written"
    assert not optimizer.latents_of.noisy


def test_a_quantizer_of_another_kind_draws_from_a_stream_of_its_own():
    class Jitter(qsam.Quantizer):
        """Not LSQ: adds noise to x and rounds to tenths."""

        def __init__(self, **setting):
            super().__init__(**setting)
            self.noise = Noise()

        def init_(self, x):
            self.noise.seed_(x)

        def update(self, w):
            self.noise.advance()

        def forward(self, x):
            rounded = (10 * x + self.noise(x) if self.noise.on else 10 * x).round() / 10
            return x + (rounded - x).detach()

    qsam.register_quantizer("test_jitter")(Jitter)
    try:
        optimizer, _ = run_of(QAT, "test_jitter", MLP, 3)
    finally:
        del QUANTIZERS._classes["test_jitter"]
    assert {int(noise.step) for noise in optimizer.latents_of.noises} == {3}
    assert_on_grid(optimizer)
