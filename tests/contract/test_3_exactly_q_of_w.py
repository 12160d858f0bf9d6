"""Contract 3: outside the blocks the model holds exactly Q(w), whatever happened: exceptions, NaN, infinity, overflow."""

import io

import pytest
import torch
from torch.optim import SGD, AdamW

import qsam
from tests.methods import (
    FUSED,
    KINDS,
    QAT,
    SAQ,
    SQUAT,
    assert_on_grid,
    assert_same,
    buffers_of,
    built,
    closure_of,
    each_alternating,
    each_kind,
    each_perturbing,
    everything,
    latents,
    scales_of,
    train,
)
from tests.models import CONV, MLP, TIED

PASSES = [
    pytest.param(method, number, id=f"{method}-pass{number}")
    for method in [*KINDS, FUSED]
    for number in range({"same_batch": 3, None: 2 if method.perturbs else 1}.get(method.schedule, 2))
]


each_pass = pytest.mark.parametrize(("method", "number"), PASSES)


class Boom(Exception):
    """What the tests raise."""


def at_call(number, act, closure):
    """Return a closure that calls ``act`` in place of the call of this number."""
    calls = []

    def wrapped():
        calls.append(1)
        return act() if len(calls) == number + 1 else closure()

    return wrapped


def fail():
    raise Boom


@each_pass
def test_after_an_exception_in_a_pass_the_step_can_be_taken_again(method, number):
    """The model is on the grid, gradients are gone, and the next steps are as if nothing had happened."""
    ends = []
    for interrupted in (True, False):
        model, optimizer = built(method, MLP)
        train(optimizer, model, MLP, 2)
        closure = closure_of(optimizer, model, MLP, MLP.batch(5))
        if interrupted:
            before = everything(optimizer, model)
            with pytest.raises(Boom):
                optimizer.step(at_call(number, fail, closure))
            assert_on_grid(optimizer)
            assert all(p.grad is None for p in model.parameters())
            if number < 2 and method.schedule != "fused":  # the third pass comes after the step of w
                assert_same(everything(optimizer, model), before)
        if number < 2 and method.schedule != "fused":
            train(optimizer, model, MLP, 3, start=5)
            ends.append(everything(optimizer, model))
        else:
            train(optimizer, model, MLP, 1, start=6)
            assert_on_grid(optimizer)
    if ends:
        assert_same(*ends)


@each_perturbing
def test_an_exception_in_a_later_pass_leaves_buffers_and_random_numbers_as_the_first_left_them(method):
    model, optimizer = built(method, CONV)
    torch.manual_seed(0)
    CONV.loss(model, CONV.batch(0))
    expected, rng = {k: v.clone() for k, v in buffers_of(model).items()}, torch.get_rng_state()

    model, optimizer = built(method, CONV)
    closure = closure_of(optimizer, model, CONV, CONV.batch(0))

    def fail_late():
        closure()
        raise Boom

    torch.manual_seed(0)
    with pytest.raises(Boom):
        optimizer.step(at_call(1, fail_late, closure))
    assert_same(buffers_of(model), expected)
    assert torch.equal(torch.get_rng_state(), rng)


@each_pass
def test_after_a_nan_gradient_in_a_pass_the_model_holds_q_of_w(method, number):
    model, optimizer = built(method, MLP, SGD, lr=0.01)

    def nan():
        optimizer.zero_grad()
        loss = MLP.loss(model, MLP.batch(0)) * float("nan")
        loss.backward()
        return loss

    optimizer.step(at_call(number, nan, closure_of(optimizer, model, MLP, MLP.batch(0))))
    assert_on_grid(optimizer)
    train(optimizer, model, MLP, 1)  # no false alarm
    assert_on_grid(optimizer)


@each_perturbing
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 0.0])
def test_a_first_pass_without_a_usable_norm_perturbs_nothing(method, bad):
    ends = []
    for rho in (0.3, 0.0):
        model, optimizer = built(method, CONV, rho=rho)
        torch.manual_seed(0)

        def spoiled(optimizer=optimizer, model=model):
            optimizer.zero_grad()
            loss = CONV.loss(model, CONV.batch(0)) * bad
            loss.backward()
            return loss

        optimizer.step(at_call(0, spoiled, closure_of(optimizer, model, CONV, CONV.batch(0))))
        ends.append(everything(optimizer, model))
    assert_same(*ends)
    assert all(bool(torch.isfinite(t).all()) for t in ends[0].values())


@each_pass
def test_a_parameter_without_gradient_in_one_pass(method, number):
    """The pass sees only the first layer; what had no gradient in the pass that updates it stays where it is."""
    model, optimizer = built(method, MLP, SGD, lr=0.01)
    before = latents(optimizer, model)

    def first_layer_only():
        optimizer.zero_grad()
        loss = model[0](MLP.batch(0)["x"]).square().mean()
        loss.backward()
        return loss

    optimizer.step(at_call(number, first_layer_only, closure_of(optimizer, model, MLP, MLP.batch(0))))
    assert_on_grid(optimizer)
    after = latents(optimizer, model)
    updating = 1 if method.perturbs else 0
    still = {name for name in after if torch.equal(after[name], before[name])}
    assert still == ({name for name in after if not name.startswith("0.")} if number == updating else set())
    train(optimizer, model, MLP, 1)  # no false alarm


class Failing(AdamW):
    """An AdamW that fails in the middle of its second step."""

    def step(self, closure=None):
        self.steps = getattr(self, "steps", 0) + 1
        super().step()
        if self.steps == 2:
            raise Boom


@each_kind
def test_after_an_exception_in_the_base_the_latents_are_rolled_back(method):
    model, optimizer = built(method, MLP, Failing)
    train(optimizer, model, MLP, 1)
    before = {slot.path: slot.latent.detach().clone() for slot in optimizer._latents.slots}
    scales, steps = {k: v.clone() for k, v in scales_of(model).items()}, optimizer.steps
    with pytest.raises(Boom):
        train(optimizer, model, MLP, 1, start=3)
    assert_on_grid(optimizer)
    assert_same({slot.path: slot.latent.detach() for slot in optimizer._latents.slots}, before)
    assert optimizer.steps == steps
    assert all(p.grad is None for p in model.parameters())
    if method.schedule != "fused":  # there the scales have stepped before
        assert_same(scales_of(model), scales)
    train(optimizer, model, MLP, 2, start=4)
    assert_on_grid(optimizer)


@each_alternating
def test_after_an_exception_in_the_scale_optimizer_the_model_holds_q_of_w(method):
    class FailingSGD(SGD):
        def step(self, closure=None):
            super().step()
            raise Boom

    model, optimizer = built(method, MLP, scale_lr=0.01, scale_optimizer=FailingSGD)
    with pytest.raises(Boom):
        train(optimizer, model, MLP, 2)
    assert_on_grid(optimizer)


@pytest.mark.parametrize("method", [QAT, SAQ], ids=str)
def test_an_exception_in_the_scale_optimizer_takes_the_step_of_the_weights_back(method):
    class FailingSGD(SGD):
        def step(self, closure=None):
            raise Boom

    model, optimizer = built(method, MLP, scale_lr=0.01, scale_optimizer=FailingSGD)
    before = [slot.latent.detach().clone() for slot in optimizer._latents.slots]
    with pytest.raises(Boom):
        train(optimizer, model, MLP, 1)
    assert all(torch.equal(slot.latent, w) for slot, w in zip(optimizer._latents.slots, before, strict=True))
    assert optimizer.steps == 0
    assert_on_grid(optimizer)


@each_kind
@pytest.mark.parametrize("task", [MLP, TIED], ids=str)
def test_parameters_keep_identity_and_address(method, task):
    model = method.model(task, activations=None)
    places = {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()}
    optimizer = method(model)

    def check():
        assert {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()} == places

    check()
    train(optimizer, model, task, 2)
    check()
    with optimizer.latents():
        check()
    with pytest.raises(Boom):
        optimizer.step(fail)
    optimizer.load_state_dict(optimizer.state_dict())
    check()
    optimizer.sync_latents()
    train(optimizer, model, task, 1)
    check()


INF = float("inf")


class StoppedByTheUser(Exception):
    """What a careful closure raises where the loss is not finite."""


@pytest.mark.parametrize("method", [SAQ, SQUAT], ids=str)
@pytest.mark.parametrize("bad", [float("nan"), INF])
def test_a_bad_batch_that_the_closure_refuses_changes_nothing(method, bad):
    ends = []
    for poisoned in (True, False):
        model = method.model(MLP, activations=None)  # an input quantizer clips infinity to its grid
        optimizer = method(model)
        train(optimizer, model, MLP, 2)
        if poisoned:
            batch = MLP.batch(7)
            batch["x"][0, 0] = bad
            before = everything(optimizer, model)

            def careful(optimizer=optimizer, model=model, batch=batch):
                optimizer.zero_grad()
                loss = MLP.loss(model, batch)
                if not torch.isfinite(loss):
                    raise StoppedByTheUser
                loss.backward()
                return loss

            with pytest.raises(StoppedByTheUser):
                optimizer.step(careful)
            assert_on_grid(optimizer)
            assert_same(everything(optimizer, model), before)
        train(optimizer, model, MLP, 2, start=2)
        ends.append(everything(optimizer, model))
    assert_same(*ends)


@each_kind
def test_after_an_infinite_gradient_a_checkpoint_mends_the_run(method):
    model, optimizer = built(method, CONV, SGD, lr=0.01, momentum=0.9)
    train(optimizer, model, CONV, 2)
    saved = {"model": snapshot(model), "optimizer": optimizer.state_dict()}
    buffer = io.BytesIO()
    torch.save(saved["optimizer"], buffer)
    before = everything(optimizer, model)
    closure = closure_of(optimizer, model, CONV, CONV.batch(3))

    def infinite():
        loss = closure()
        for p in model.parameters():
            if p.grad is not None:
                p.grad.fill_(INF)
        return loss

    optimizer.step(infinite)
    assert not all(bool(torch.isfinite(t).all()) for t in everything(optimizer, model).values())
    assert_on_grid(optimizer)
    buffer.seek(0)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(torch.load(buffer, weights_only=True))
    assert_same(everything(optimizer, model), before)
    train(optimizer, model, CONV, 1, start=4)
    assert all(bool(torch.isfinite(t).all()) for t in everything(optimizer, model).values())


def snapshot(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def half_model(largest):
    """A layer in fp16 whose 2-bit grid under the scale that is set here ends at ``largest``."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 4, bias=False)).half()
    with torch.no_grad():
        model[0].weight.uniform_(55000, 60000)
        model[0].weight[::2] *= -1
    qsam.quantize_(model, bits=2, activations=None, rules=[("*", {})])
    with torch.no_grad():
        model[0].weight_quantizer.scale.fill_(largest / 2)
    return model


OVERFLOW = (
    r"'0\.weight' is fp16, which ends at 65504, and its quantized values reach 7e\+04: keep the parameters in fp32 under "
    r"autocast, or use bf16\."
)


def test_an_fp16_weight_that_cannot_hold_its_grid_is_refused():
    model = half_model(70000.0)
    before = snapshot(model)
    for call in (lambda: SAQ(model), lambda: qsam.write_(model)):
        with pytest.raises(ValueError, match=OVERFLOW):
            call()
        assert_same(snapshot(model), before)
    model.bfloat16()
    qsam.write_(model)
    assert bool(torch.isfinite(model[0].weight).all())


def test_an_fp16_overflow_in_training_is_told_one_step_later():
    model = half_model(60000.0)
    optimizer = QAT(model, SGD, lr=0.0, scale_lr=1.0)
    (slot,) = optimizer._latents.slots

    def step(grow):
        slot.parameter.grad = torch.zeros_like(slot.parameter)
        optimizer.step()
        if grow:
            with torch.no_grad():
                slot.quantizer.scale.fill_(35000.0)
            optimizer._latents.write()

    step(grow=False)
    step(grow=True)
    assert bool(torch.isinf(slot.parameter).any())
    step(grow=False)
    with pytest.raises(
        ValueError, match=r"the scale of '0\.weight' has grown so much .* beyond fp16's 65504.*lower `scale_lr`"
    ):
        step(grow=False)
    assert bool(torch.isfinite(slot.latent).all())
    assert bool(torch.isfinite(slot.quantizer.scale).all())
