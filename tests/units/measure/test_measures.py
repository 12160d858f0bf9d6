"""Sharpness, curvature and slices on losses whose answers can be worked out; and that they leave no trace."""

import contextlib
import copy
import dataclasses
import math
import random
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import SGD, AdamW

import qsam
from qsam.measure.probe import probing
from tests.methods import (
    METHODS,
    assert_on_grid,
    assert_same,
    closure_of,
    everything,
    train,
)
from tests.models import BERT, CONV, EVERYWHERE, MLP

SOME = {str(method): method for method in METHODS if str(method) in {"sam", "qat", "squat-same_batch"}}


class Quadratic(nn.Module):
    """L(W) = b.W + W'AW / 2 in fp64, W a vector of n entries that starts at 0."""

    def __init__(self, curvature, slope):
        super().__init__()
        self.curvature, self.slope = curvature.double(), slope.double()
        self.layer = nn.Linear(len(slope), 1, bias=False, dtype=torch.float64)
        nn.init.zeros_(self.layer.weight)

    def loss(self):
        w = self.layer.weight.flatten()
        return self.slope @ w + w @ self.curvature @ w / 2

    def closure(self):
        self.zero_grad()
        loss = self.loss()
        loss.backward()
        return loss


def symmetric(eigenvalues, seed):
    """Return a matrix with these eigenvalues, and its eigenvectors, in fp64."""
    n = len(eigenvalues)
    basis = torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(seed)).double()).Q
    return basis @ torch.tensor(eigenvalues).double().diag() @ basis.T, basis


def slope_of(n, seed):
    return torch.randn(n, generator=torch.Generator().manual_seed(seed)).double()


def maximum_on_ball(curvature, slope, rho):
    """Return max over ||d|| <= rho of b.d + d'Ad / 2, by the secular equation of the trust region.

    The maximum has ``(mu I - A) d = b`` with mu >= the largest eigenvalue, mu >= 0; ``||d||`` falls in mu.
    """
    eigenvalues, basis = torch.linalg.eigh(curvature)
    b = basis.T @ slope
    low = max(float(eigenvalues[-1]), 0.0)
    high = low + float(b.norm()) / rho
    for _ in range(200):
        mu = (low + high) / 2
        low, high = (mu, high) if float((b / (mu - eigenvalues)).norm()) > rho else (low, mu)
    d = b / (high - eigenvalues)
    return float(b @ d + (eigenvalues * d * d).sum() / 2)


# --- sharpness ----------------------------------------------------------------------------------------------------


@settings(max_examples=20)
@given(st.integers(0, 50), st.floats(-3, 3), st.floats(1e-3, 0.1), st.integers(1, 30))
def test_sharpness_of_equal_curvature_in_all_directions(seed, c, share, steps):
    b, calls = slope_of(6, seed), []
    model, norm = Quadratic(c * torch.eye(6).double(), b), float(b.norm())
    rho = share * norm  # the slope does not change its sign inside the ball
    got = qsam.sharpness(model, lambda: calls.append(1) or model.closure(), rho=rho, steps=steps)
    assert math.isclose(got.value, rho * norm + c * rho**2 / 2, rel_tol=1e-9)
    assert math.isclose(got.lr, 2.5 * rho / (steps * norm)), "the default would cover two and a half radii"
    assert len(calls) == steps + 1


@settings(max_examples=6)
@given(st.integers(0, 50), st.floats(0.01, 0.2))
def test_sharpness_of_any_quadratic_is_its_maximum_on_the_ball(seed, share):
    curvature, _ = symmetric([-1.0, 0.0, 0.5, 1.0, 3.0], seed)
    b = slope_of(5, seed)
    model = Quadratic(curvature, b)
    rho = share * float(b.norm())  # beyond 1 / 4 there may be a second maximum, where the ascent can end
    expected = maximum_on_ball(curvature, b, rho)
    for steps, near in ((20, 0.95), (150, 0.99)):
        got = qsam.sharpness(model, model.closure, rho=rho, steps=steps).value
        assert near * expected <= got <= expected * (1 + 1e-9)


def test_inside_the_ball_the_ascent_is_the_printed_recursion():
    curvature, _ = symmetric([0.5, 1.0, 2.0], seed=0)
    b, eta, steps = slope_of(3, 0), 0.1, 7
    model = Quadratic(curvature, b)
    got = qsam.sharpness(model, model.closure, rho=1e3, steps=steps, lr=eta)
    growth = torch.linalg.matrix_power(torch.eye(3) + eta * curvature, steps) - torch.eye(3)
    d = growth @ torch.linalg.solve(curvature, b)  # sum of (I + eta A)^t eta b, t < T
    assert math.isclose(got.value, float(b @ d + d @ curvature @ d / 2), rel_tol=1e-9)
    assert got.lr == eta


def test_at_a_stationary_point_the_ascent_does_not_start():
    model = Quadratic(torch.eye(2), torch.zeros(2))
    got = qsam.sharpness(model, model.closure)
    assert (got.value, got.lr) == (0.0, 0.0)


def test_the_result_holds_all_that_the_number_depends_on():
    model = Quadratic(torch.eye(2), torch.ones(2))
    got = qsam.sharpness(model, model.closure, rho=0.01, steps=3, lr=0.5, data="rows 0 to 9")
    assert (got.rho, got.steps, got.lr, got.data) == (0.01, 3, 0.5, "rows 0 to 9")
    assert got.value == got.loss_end - got.loss_start
    with pytest.raises(dataclasses.FrozenInstanceError):
        got.value = 0.0


def trained(method, task, steps=3, **options):
    model = method.model(task, **options)
    optimizer = method(model)
    torch.manual_seed(0)
    train(optimizer, model, task, steps)
    return optimizer, model


def is_weight(name, method):
    return "quantizer" not in name and (not method.quantizes or name.endswith("weight"))


@pytest.mark.parametrize("method", SOME.values(), ids=SOME)
def test_what_is_perturbed_are_the_quantized_weights_and_for_sam_all_parameters(method):
    optimizer, model = trained(method, MLP, bits=2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    moved = []

    def closure():
        moved.append({name: p.detach() - before[name] for name, p in model.named_parameters()})
        return closure_of(optimizer, model, MLP, MLP.batch(9))()

    qsam.sharpness(optimizer, closure, rho=0.3, steps=4)
    last = moved[-1]
    assert {name for name, d in last.items() if d.any()} == {name for name in before if is_weight(name, method)}
    norm = math.sqrt(sum(float(d.double().square().sum()) for d in last.values()))
    assert math.isclose(norm, 0.3, rel_tol=1e-5)
    assert not any(d.any() for d in moved[0].values()), "the ascent starts at Q(w)"


def test_an_optimizer_its_model_and_a_deepcopy_give_the_same():
    optimizer, model = trained(SOME["squat-same_batch"], MLP)
    pairs = [(optimizer, model), (model, model), copy.deepcopy((optimizer, model))]
    results = [qsam.sharpness(one, closure_of(optimizer, m, MLP, MLP.batch(9))) for one, m in pairs]
    assert results[0] == results[1] == results[2]


def test_a_base_that_maximizes_is_sharp_where_its_objective_falls():
    results = []
    for sign, maximize in ((1, False), (-1, True)):
        model = MLP.quantized()
        optimizer = qsam.QAT(model, SGD, lr=0.1, maximize=maximize)

        def closure(model=model, sign=sign):
            loss = sign * MLP.loss(model, MLP.batch(0))
            loss.backward()
            return loss

        results.append(qsam.sharpness(optimizer, closure))
    assert results[0].value == results[1].value > 0
    assert results[0].loss_end == -results[1].loss_end


def test_a_model_with_quantized_inputs_only_keeps_its_scales():
    model = MLP.quantized(weights=None)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if "quantizer" in name}
    seen = []

    def closure():
        seen.append({name: p.detach().clone() for name, p in model.named_parameters() if "quantizer" in name})
        loss = MLP.loss(model, MLP.batch(0))
        loss.backward()
        return loss

    assert qsam.sharpness(model, closure).value > 0
    assert len(before) == 3
    for each in seen:
        assert_same(before, each)


def test_frozen_weights_stay():
    model = MLP.quantized(activations=None)
    model[2].weight.requires_grad_(False)
    before = model[2].weight.detach().clone()

    def closure():
        assert torch.equal(model[2].weight, before)
        loss = MLP.loss(model, MLP.batch(0))
        loss.backward()
        return loss

    qsam.sharpness(model, closure)
    qsam.loss_slice(model, closure, points=3)


def test_weights_of_sixteen_bits_are_said_to_lose_the_perturbation():
    model = MLP.quantized(activations=None).to(torch.bfloat16)
    optimizer = qsam.QAT(model, AdamW, lr=1e-3)

    def closure():
        optimizer.zero_grad()
        batch = MLP.batch(0)
        loss = MLP.loss(model, {**batch, "x": batch["x"].to(torch.bfloat16)})
        loss.backward()
        return loss

    with pytest.warns(
        UserWarning, match=r"16-bit parameters round the perturbation away: 0\.05 was asked for, 0\.\d+ real"
    ):
        qsam.sharpness(optimizer, closure)
    assert_on_grid(optimizer)


# --- no trace -----------------------------------------------------------------------------------------------------


def hessian(subject, closure, loss_fn):
    return qsam.hessian_top_eigenvalue(subject, loss_fn, iterations=3)


def measures():
    yield "sharpness", lambda subject, closure, loss_fn: qsam.sharpness(subject, closure, steps=3)
    yield "hessian_top_eigenvalue", hessian
    yield "loss_slice", lambda subject, closure, loss_fn: qsam.loss_slice(subject, closure, points=3)


MEASURES = dict(measures())
each_measure = pytest.mark.parametrize("measure", MEASURES)


def traces(optimizer, model):
    """Return everything that a measurement could disturb, by value and by identity."""
    kept = {f"model.{name}": value.clone() for name, value in model.state_dict().items()}
    kept |= {f"grad.{name}": p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    kept |= {f"latent.{slot.path}": slot.latent.detach().clone() for slot in optimizer._latents.slots}
    kept["rng"] = torch.get_rng_state()
    identities = [(id(p), id(p.grad), p.data_ptr(), p.requires_grad) for p in model.parameters()]
    identities += [id(b) for b in model.buffers()]
    return kept, (identities, [module.training for module in model.modules()], random.getstate())


@each_measure
@pytest.mark.parametrize(
    ("method", "mode", "fails"),
    [("sam", True, False), ("squat-same_batch", False, True), ("squat-same_batch", True, False), ("qat", True, True)],
)
def test_everything_is_left_as_it_was(method, measure, mode, fails):
    optimizer, model = trained(SOME[method], CONV)
    model.train(mode)
    CONV.loss(model, CONV.batch(5)).backward()
    calls = []

    def loss_fn():
        model.train()  # a closure may do that
        calls.append(1)
        loss = CONV.loss(model, CONV.batch(7))
        if fails and len(calls) > (measure != "hessian_top_eigenvalue"):  # which has one call
            raise KeyError("in the closure")
        return loss

    def closure():
        optimizer.zero_grad(set_to_none=False)
        loss = loss_fn()
        loss.backward()
        return loss

    before = traces(optimizer, model)
    with pytest.raises(KeyError, match="in the closure") if fails else contextlib.nullcontext():
        MEASURES[measure](optimizer, closure, loss_fn)
    after = traces(optimizer, model)
    assert_same(before[0], after[0])
    assert before[1] == after[1]


@pytest.mark.parametrize(("measure", "method"), list(zip(MEASURES, SOME.values(), strict=False)), ids=str)
def test_training_goes_on_as_if_nothing_had_been_measured(measure, method):
    runs = []
    for interrupted in (False, True):
        optimizer, model = trained(method, CONV)
        if interrupted:
            closure = closure_of(optimizer, model, CONV, CONV.batch(8))
            MEASURES[measure](optimizer, closure, lambda model=model: CONV.loss(model, CONV.batch(8)))
        train(optimizer, model, CONV, 3, start=3)
        runs.append(everything(optimizer, model) | {"rng": torch.get_rng_state()})
    assert_same(*runs)


def test_all_evaluations_see_the_same_dropout_and_batch_norm():
    optimizer, model = trained(SOME["qat"], CONV)
    closure = closure_of(optimizer, model, CONV, CONV.batch(8))
    sharp = qsam.sharpness(optimizer, closure, steps=2)
    line = qsam.loss_slice(optimizer, closure, points=5)
    state = torch.get_rng_state()
    plain = float(closure().detach())
    assert not torch.equal(state, torch.get_rng_state()), "the model draws random numbers"
    assert sharp.loss_start == line.losses["gradient"][2] == line.losses["random"][2] == plain


def test_inputs_are_not_calibrated():
    model = MLP.build()
    qsam.quantize_(model, rules=EVERYWHERE)
    optimizer = qsam.QAT(model, AdamW, lr=1e-3)
    with pytest.warns(UserWarning, match="passes through in float"):
        qsam.sharpness(optimizer, closure_of(optimizer, model, MLP, MLP.batch(0)), steps=1)
    assert not any(row.quantizer.calibrated for row in optimizer.coverage.inputs)


# --- the largest eigenvalue ---------------------------------------------------------------------------------------


@settings(max_examples=12)
@given(st.lists(st.floats(-4, 4), min_size=1, max_size=6), st.integers(0, 20))
def test_top_eigenvalue_of_a_quadratic(eigenvalues, seed):
    curvature, _ = symmetric(eigenvalues, seed)
    model = Quadratic(curvature, slope_of(len(eigenvalues), seed))
    got = qsam.hessian_top_eigenvalue(model, model.loss, iterations=2000, tolerance=1e-13)
    assert abs(got.value - max(eigenvalues)) <= max(2 * got.residual, 1e-6)
    assert got.residual < 1e-2


@pytest.mark.parametrize("eigenvalues", [[0.0, 0.0], [-2.0, -2.0, -2.0], [-5.0], [-5.0, 1.0, 2.0]])
def test_top_eigenvalue_where_power_iteration_alone_would_not_do(eigenvalues):
    curvature, _ = symmetric(eigenvalues, 3)
    model = Quadratic(curvature, slope_of(len(eigenvalues), 3))
    got = qsam.hessian_top_eigenvalue(model, model.loss, tolerance=1e-10)
    assert got.converged
    assert abs(got.value - max(eigenvalues)) < 1e-4


def test_the_residual_bounds_the_distance_to_an_eigenvalue_and_too_few_products_are_said():
    curvature, _ = symmetric([1.0, 2.0, 2.9, 3.0], 0)
    model = Quadratic(curvature, slope_of(4, 0))
    got = qsam.hessian_top_eigenvalue(model, model.loss, iterations=2, tolerance=1e-12)
    assert not got.converged
    assert got.iterations == 2
    assert min(abs(got.value - e) for e in (1.0, 2.0, 2.9, 3.0)) <= got.residual


def hessian_matrix(model, task, batch):
    weights = [row.module.weight for row in qsam.coverage_of(model).quantized]
    gradients = torch.autograd.grad(task.loss(model, batch), weights, create_graph=True)
    flat = torch.cat([g.flatten() for g in gradients])
    rows = [torch.autograd.grad(entry, weights, retain_graph=True, materialize_grads=True) for entry in flat]
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])


@pytest.mark.parametrize("activations", [None, "lsq"])
def test_top_eigenvalue_of_a_network_is_that_of_its_hessian_matrix(activations):
    optimizer, model = trained(SOME["qat"], MLP, steps=10, activations=activations)
    batch = MLP.batch(10)
    matrix = hessian_matrix(model, MLP, batch).double()
    tolerance = 1e-4 * float(matrix.norm())  # fp32
    assert float((matrix - matrix.T).norm()) < tolerance, "the surrogate of a staircase has a Hessian, too"
    got = qsam.hessian_top_eigenvalue(optimizer, lambda: MLP.loss(model, batch), iterations=2000, tolerance=1e-7)
    assert abs(got.value - float(torch.linalg.eigvalsh(matrix)[-1])) < tolerance


def test_attention_has_a_second_derivative():
    optimizer, model = trained(SOME["qat"], BERT)
    model.eval()
    loss = BERT.loss(model, BERT.batch(0))
    assert model.config._attn_implementation == "sdpa"
    assert qsam.hessian_top_eigenvalue(optimizer, lambda: BERT.loss(model, BERT.batch(0)), iterations=3).value > 0
    assert torch.equal(loss, BERT.loss(model, BERT.batch(0)))


@pytest.mark.parametrize("quantized", [False, True])
def test_differences_of_gradients_are_no_derivatives_where_inputs_are_quantized(quantized):
    """Why second derivatives are taken: at the edge of a stair a difference quotient grows as 1 / distance.

    L = (w2 * Q(w1))^2 / 2 with the step .5 of Q: w1 = .75 lies halfway between the levels .5 and 1. All numbers are
    sums of a few powers of two, so that they are exact on any processor.
    """
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))
    with torch.no_grad():
        model[0].weight.fill_(0.75)
        model[1].weight.fill_(1.0)
    x = torch.ones(1, 1)
    if quantized:
        qsam.quantize_(model, weights=None, rules=[("1.*", {}), ("1", {}), ("*", None)])
        qsam.calibrate(model, [x])
        model[1].input_quantizer.scale.data.fill_(0.5)

    def loss_fn():
        return model(x).square().sum() / 2

    def closure():
        model.zero_grad()
        loss = loss_fn()
        loss.backward()
        return loss

    top = qsam.hessian_top_eigenvalue(model, loss_fn, tolerance=1e-6).value
    assert 0 < top < 10
    for distance in (2.0**-6, 2.0**-10, 2.0**-14):
        with probing(model, closure, "difference", 2, False) as probe:
            d = probe.zeros()
            d[0] = distance
            difference = float((probe.gradient(d)[1] - probe.gradient(-d)[1]).norm())
        if quantized:  # dL/dw1 = Q, dL/dw2 = Q^2: from (.5, .25) to (1, 1)
            assert math.isclose(difference, math.hypot(0.5, 0.75), rel_tol=4 * torch.finfo(torch.float32).eps)
        else:
            assert difference / (2 * distance) <= top


# --- slices -------------------------------------------------------------------------------------------------------


def test_a_slice_of_a_quadratic_is_a_parabola():
    curvature, _ = symmetric([-1.0, 0.5, 2.0], 0)
    b = slope_of(3, 0)
    model = Quadratic(curvature, b)
    own = torch.tensor([[1.0, -2.0, 2.0]]).double()
    line = qsam.loss_slice(model, model.closure, {"own": [own]}, radius=0.7, points=5)
    t = torch.linspace(-0.7, 0.7, 5).double()
    u = own.flatten() / 3
    assert torch.allclose(line.distances, t, rtol=1e-6)
    assert torch.allclose(line.losses["own"], t * (b @ u) + t**2 * (u @ curvature @ u) / 2, rtol=1e-6)
    steepest = qsam.loss_slice(model, model.closure, "gradient", radius=0.7, points=5).losses["gradient"]
    u = b / b.norm()
    assert torch.allclose(steepest, t * b.norm() + t**2 * (u @ curvature @ u) / 2, rtol=1e-6)


def test_the_random_direction_follows_from_its_seed():
    optimizer, model = trained(SOME["qat"], MLP)
    closure = closure_of(optimizer, model, MLP, MLP.batch(3))
    first, again, other = (qsam.loss_slice(optimizer, closure, "random", points=3, seed=s) for s in (0, 0, 1))
    assert torch.equal(first.losses["random"], again.losses["random"])
    assert not torch.equal(first.losses["random"], other.losses["random"])


@pytest.mark.long  # imports matplotlib
def test_a_slice_is_plotted(tmp_path):
    model = Quadratic(torch.eye(2), torch.ones(2))
    path = tmp_path / "slice.png"
    qsam.loss_slice(model, model.closure, points=5).plot(path)
    assert path.read_bytes()[:4] == b"\x89PNG"


# --- progress, errors ---------------------------------------------------------------------------------------------


@each_measure
def test_a_bar_is_shown_on_request_only(measure, capsys):
    model = Quadratic(torch.eye(2), torch.ones(2))
    call = {
        "sharpness": lambda **k: qsam.sharpness(model, model.closure, **k),
        "hessian_top_eigenvalue": lambda **k: qsam.hessian_top_eigenvalue(model, model.loss, **k),
        "loss_slice": lambda **k: qsam.loss_slice(model, model.closure, **k),
    }[measure]
    call(progress=False)
    call()  # not a terminal
    assert capsys.readouterr().err == ""
    call(progress=True)
    assert measure in capsys.readouterr().err


def test_without_tqdm_there_is_no_bar(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    model = Quadratic(torch.eye(2), torch.ones(2))
    qsam.sharpness(model, model.closure)
    with pytest.raises(ImportError, match="tqdm"):
        qsam.sharpness(model, model.closure, progress=True)


POSITIVE = "must be finite and > 0"
REFUSED = [  # further ones: tests/contract/test_refused_calls.py
    (lambda m: qsam.sharpness(m, m.closure, rho=math.inf), ValueError, f"`rho` {POSITIVE}, got inf"),
    (lambda m: qsam.sharpness(m, m.closure, rho=True), TypeError, "`rho` must be a number > 0, got True"),
    (lambda m: qsam.sharpness(m, m.closure, steps=0), ValueError, "`steps` must be an integer >= 1, got 0"),
    (lambda m: qsam.sharpness(m, m.closure, steps=1.0), TypeError, r"`steps` must be an integer >= 1, got 1\.0"),
    (lambda m: qsam.sharpness(m, m.closure, lr=-1.0), ValueError, rf"`lr` {POSITIVE}, got -1\.0"),
    (lambda m: qsam.sharpness(m, m.loss), RuntimeError, r"it must call backward\(\) on the loss"),
    (lambda m: qsam.sharpness(m, lambda: None), TypeError, "the closure must return the loss, .* got None"),
    (lambda m: qsam.sharpness("model", m.closure), TypeError, "sharpness needs a qsam optimizer or .* got str"),
    (lambda m: qsam.sharpness(nn.ReLU(), m.closure), RuntimeError, "sharpness found no trainable weight"),
    (lambda m: qsam.hessian_top_eigenvalue(m, m.loss, iterations=1), ValueError, "`iterations` must .* >= 2, got 1"),
    (lambda m: qsam.hessian_top_eigenvalue(m, m.loss, tolerance=0.0), ValueError, f"`tolerance` {POSITIVE}"),
    (lambda m: qsam.hessian_top_eigenvalue(m, m.closure), RuntimeError, r"`loss_fn` called backward\(\)"),
    (lambda m: qsam.hessian_top_eigenvalue(m, lambda: m.loss().detach()), RuntimeError, "does not depend on the weights"),
    (lambda m: qsam.loss_slice(m, m.closure, radius=0.0), ValueError, f"`radius` {POSITIVE}"),
    (lambda m: qsam.loss_slice(m, m.closure, points=4), ValueError, "`points` must be odd, .* got 4"),
    (lambda m: qsam.loss_slice(m, m.closure, {"mine": [torch.zeros(1, 2)]}), ValueError, r"'mine' has length 0\.0: it must"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), REFUSED)
def test_what_means_nothing_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call(Quadratic(torch.eye(2), torch.ones(2)))


@each_measure
def test_inside_a_block_nothing_is_measured(measure):
    optimizer, model = trained(SOME["qat"], MLP)
    closure = closure_of(optimizer, model, MLP, MLP.batch(0))
    with pytest.raises(RuntimeError, match=rf"inside {measure}\(\) would save weights that are not Q\(w\)"):
        MEASURES[measure](optimizer, model.state_dict, model.state_dict)
    model.state_dict()
    with optimizer.first_pass(), pytest.raises(RuntimeError, match=rf"{measure}\(\) inside the block first_pass\(\)"):
        MEASURES[measure](optimizer, closure, closure)


def test_weights_that_somebody_else_wrote_are_not_measured():
    optimizer, model = trained(SOME["qat"], MLP)
    with torch.no_grad():
        model[0].weight.mul_(2)
    with pytest.raises(RuntimeError, match="was written by other code"):
        qsam.sharpness(optimizer, closure_of(optimizer, model, MLP, MLP.batch(0)))
