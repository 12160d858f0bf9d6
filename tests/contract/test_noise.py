"""Noise in the passes of an optimizer: the weights are noisy inside the blocks and exact outside, in every method."""

import copy
import itertools

import pytest
import torch
from torch.optim import LBFGS, SGD

import qsam
from qsam.quantizers import QUANTIZERS, Noise
from tests.methods import (
    METHODS,
    Method,
    assert_on_grid,
    assert_same,
    closure_of,
    everything,
    latents,
    train,
    train_by_hand,
)
from tests.models import CONV, EVERYWHERE, MLP

NOISY = ["diffq", "stochastic"]
QUANTIZING = [method for method in METHODS if method.quantizes]
QAT = next(method for method in METHODS if method.name == "qat")
SAQ = Method("saq", qsam.SAQ)
PAIRS = list(zip(itertools.cycle(NOISY), QUANTIZING))

each_noisy = pytest.mark.parametrize("name", NOISY)
each_pair = pytest.mark.parametrize(("name", "method"), PAIRS, ids=[f"{name}-{method}" for name, method in PAIRS])
"""Every method, each with one of the two quantizers in turn."""


def noisy_model(name, task=MLP, activations="lsq", **options):
    return task.quantized(weights=name, activations=activations, bits=2, **options)


def run_of(method, name, task, steps, drive=train, **options):
    model = noisy_model(name, task, activations=name)
    optimizer = method(model, **options)
    torch.manual_seed(0)
    drive(optimizer, model, task, steps)
    return optimizer, model


@each_pair
def test_p_is_noisy_in_the_blocks_and_exact_outside(name, method):
    model = noisy_model(name)
    optimizer = method(model)
    slot = optimizer._latents.slots[0]

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
    assert len(optimizer._latents.noises) == 3
    assert {int(noise.step) for noise in optimizer._latents.noises} == {optimizer.steps}


@each_noisy
def test_qat_equals_noise_in_the_graph(name):
    """The slow twin: the quantizers themselves in the graph, with their noise on."""
    model = noisy_model(name, activations=None)
    optimizer = qsam.QAT(model, SGD, lr=0.05, scale_lr=0.05)
    w = {slot.path: slot.latent.detach().clone().requires_grad_() for slot in optimizer._latents.slots}
    quantizers = {slot.path: copy.deepcopy(slot.quantizer).requires_grad_() for slot in optimizer._latents.slots}
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
    for slot in optimizer._latents.slots:
        assert torch.equal(slot.quantizer.scale, quantizers[slot.path].scale)


@each_pair
@pytest.mark.long
def test_by_hand_equals_step_closure_with_noise(name, method):
    def by_hand(*args):
        train_by_hand(method, *args)

    runs = [everything(*run_of(method, name, CONV, 6, drive)) for drive in (train, by_hand)]
    assert_same(*runs)


@each_pair
@pytest.mark.long
def test_a_resumed_run_equals_one_that_did_not_stop(name, method, stop=3):
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
def test_both_passes_of_a_step_see_the_same_noise(name):
    model = noisy_model(name)
    optimizer = qsam.SAQ(model, SGD, lr=0.1, rho=0.0)
    seen = []

    def closure():
        seen.append([slot.parameter.detach().clone() for slot in optimizer._latents.slots])
        return closure_of(optimizer, model, MLP, MLP.batch(0))()

    for _ in range(2):
        optimizer.step(closure)
    first, second, third, _ = seen
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, third, strict=True))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("diffq", {"case": 1, "rho": 0.0}),
        ("stochastic", {"case": 2, "rho": 0.0}),
        ("diffq", {"case": 3, "rho": 0.0}),
        ("stochastic", {"start": 100}),
    ],
    ids=str,
)
def test_at_rho_zero_and_in_steps_that_are_not_perturbed_it_is_qat_with_noise(name, options):
    perturbed = run_of(SAQ, name, CONV, 3, **options)
    assert_same(everything(*perturbed), everything(*run_of(QAT, name, CONV, 3)))


@pytest.mark.parametrize(("name", "method"), PAIRS[::2], ids=str)
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
    assert not any(noise.on for noise in optimizer._latents.noises)
    model.state_dict()
    train(optimizer, model, MLP, 2)
    assert_on_grid(optimizer)


@each_noisy
def test_a_foreign_write_is_seen_before_the_noise_overwrites_it(name):
    optimizer, model = run_of(SAQ, name, MLP, 2)
    model[0].weight.data.mul_(1.5)  # leaves no trace but the values
    written = model[0].weight.detach().clone()
    with pytest.raises(RuntimeError, match="was written by other code"):
        train(optimizer, model, MLP, 1)
    assert torch.equal(model[0].weight, written)
    optimizer.sync_latents()
    train(optimizer, model, MLP, 2)


def test_a_step_by_hand_without_the_block_has_no_noise_and_says_so(name="diffq"):
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


def test_a_spec_brings_back_the_stream(tmp_path, name="stochastic"):
    optimizer, model = run_of(QAT, name, MLP, 3)
    optimizer.coverage.save(tmp_path)
    rebuilt = MLP.build()
    qsam.quantize_(rebuilt, spec=tmp_path)
    ours = {n: b for n, b in model.named_buffers() if "noise" in n}
    assert_same(ours, {n: b for n, b in rebuilt.named_buffers() if "noise" in n})
    assert len(ours) == 12


def test_a_base_that_calls_its_closure_itself_sees_one_draw_per_step(name="stochastic"):
    model = noisy_model(name, activations=None)
    optimizer = qsam.QAT(model, LBFGS, lr=0.5, max_iter=4)
    weights = []

    def closure():
        loss = closure_of(optimizer, model, MLP, MLP.batch(0))()
        weights.append(optimizer._latents.slots[0].quantizer.noise.step.item())
        return loss

    optimizer.step(closure)
    assert set(weights) == {0}
    assert_on_grid(optimizer)


def test_quantizers_without_noise_have_no_part_in_it():
    model = MLP.quantized()
    optimizer = qsam.SAQ(model, SGD, lr=0.1)
    assert optimizer._latents.noises == []
    versions = [slot.parameter._version for slot in optimizer._latents.slots]
    with optimizer.first_pass():
        MLP.loss(model, MLP.batch(0)).backward()
    assert versions == [slot.parameter._version for slot in optimizer._latents.slots], "p is not written"
    assert not optimizer._latents.noisy


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
    assert {int(noise.step) for noise in optimizer._latents.noises} == {3}
    assert_on_grid(optimizer)
