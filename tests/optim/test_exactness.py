"""Contract 3: outside the blocks the model holds exactly Q(w), whatever happened."""

import pytest
import torch
from torch.optim import SGD, AdamW

from tests.models import BERT, CONV, MLP, TIED
from tests.optim.methods import (
    ALTERNATING,
    METHODS,
    PERTURBING,
    QUANTIZING,
    assert_on_grid,
    assert_same,
    buffers_of,
    closure_of,
    everything,
    latents,
    scales_of,
    train,
    train_by_hand,
)

each_method = pytest.mark.parametrize("method", METHODS, ids=str)
PASSES = [
    pytest.param(method, number, id=f"{method}-pass{number}")
    for method in METHODS
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


def step_scales_of_next_batch(method, optimizer, model, task=MLP):
    """Bring ``next_batch`` to the batch of its scales, where its second kind of pass is."""
    if method.schedule == "next_batch":
        train(optimizer, model, task, 1, start=8)


def fail():
    raise Boom


@each_pass
def test_after_an_exception_in_a_pass_the_step_can_be_taken_again(method, number):
    """The model is on the grid, gradients are gone, and the next steps are as if nothing had happened."""
    ends = []
    for interrupted in (True, False):
        model = method.model(MLP)
        optimizer = method(model)
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


@pytest.mark.parametrize("method", PERTURBING, ids=str)
def test_an_exception_in_a_later_pass_leaves_buffers_and_random_numbers_as_the_first_left_them(method):
    model = method.model(CONV)
    optimizer = method(model)
    torch.manual_seed(0)
    CONV.loss(model, CONV.batch(0))
    expected, rng = {k: v.clone() for k, v in buffers_of(model).items()}, torch.get_rng_state()

    model = method.model(CONV)
    optimizer = method(model)
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
    model = method.model(MLP)
    optimizer = method(model, SGD, lr=0.01)
    step_scales_of_next_batch(method, optimizer, model) if number else None

    def nan():
        optimizer.zero_grad()
        loss = MLP.loss(model, MLP.batch(0)) * float("nan")
        loss.backward()
        return loss

    optimizer.step(at_call(number, nan, closure_of(optimizer, model, MLP, MLP.batch(0))))
    assert_on_grid(optimizer)
    train(optimizer, model, MLP, 1)  # no false alarm
    assert_on_grid(optimizer)


@pytest.mark.parametrize("method", [m for m in PERTURBING if m.schedule != "fused"], ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 0.0])
def test_a_first_pass_without_a_usable_norm_perturbs_nothing(method, bad):
    ends = []
    for rho in (0.3, 0.0):
        model = method.model(CONV)
        optimizer = method(model, rho=rho)
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
    model = method.model(MLP)
    optimizer = method(model, SGD, lr=0.01)
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


class Failing(AdamW):
    """An AdamW that fails in the middle of its second step."""

    def step(self, closure=None):
        self.steps = getattr(self, "steps", 0) + 1
        super().step()
        if self.steps == 2:
            raise Boom


@each_method
def test_after_an_exception_in_the_base_the_latents_are_rolled_back(method):
    model = method.model(MLP)
    optimizer = method(model, Failing)
    train(optimizer, model, MLP, 2 if method.schedule == "next_batch" else 1)
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


@pytest.mark.parametrize("method", ALTERNATING, ids=str)
def test_after_an_exception_in_the_scale_optimizer_the_model_holds_q_of_w(method):
    class FailingSGD(SGD):
        def step(self, closure=None):
            super().step()
            raise Boom

    model = method.model(MLP)
    optimizer = method(model, scale_lr=0.01, scale_optimizer=FailingSGD)
    with pytest.raises(Boom):
        train(optimizer, model, MLP, 2)
    assert_on_grid(optimizer)


@pytest.mark.parametrize("method", [m for m in QUANTIZING if not m.alternates], ids=str)
def test_an_exception_in_the_scale_optimizer_takes_the_step_of_the_weights_back(method):
    class FailingSGD(SGD):
        def step(self, closure=None):
            raise Boom

    model = method.model(MLP)
    optimizer = method(model, scale_lr=0.01, scale_optimizer=FailingSGD)
    before = [slot.latent.detach().clone() for slot in optimizer._latents.slots]
    with pytest.raises(Boom):
        train(optimizer, model, MLP, 1)
    assert all(torch.equal(slot.latent, w) for slot, w in zip(optimizer._latents.slots, before, strict=True))
    assert optimizer.steps == 0
    assert_on_grid(optimizer)


def overflow_by_hand(method, optimizer, model, scaler):
    """Make one iteration whose update gradients overflow, up to the step that the scaler skips."""
    batch = CONV.batch(3)
    with optimizer.first_pass():
        scaler.scale(CONV.loss(model, batch)).backward()
    if method.perturbs:
        with optimizer.perturbed():
            scaler.scale(CONV.loss(model, batch) * float("inf")).backward()
    else:
        for p in model.parameters():
            if p.grad is not None:
                p.grad.fill_(float("inf"))
    scaler.step(optimizer)


@each_method
def test_a_skipped_step_of_a_grad_scaler_changes_nothing(method):
    """An overflow in one batch: the run goes on as if that batch had not been there."""
    ends = []
    for overflow in (True, False):
        model = method.model(CONV)
        optimizer = method(model)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        torch.manual_seed(0)
        train_by_hand(method, optimizer, model, CONV, 2, scaler=scaler)
        if overflow:
            before = everything(optimizer, model)
            overflow_by_hand(method, optimizer, model, scaler)
            scaler.update(2.0**10)
            assert_on_grid(optimizer)
            with torch.no_grad():  # the skipped batch may move these
                for name, buffer in buffers_of(model).items():
                    buffer.copy_(before[f"model.{name}"])
            assert_same(everything(optimizer, model), before)
        torch.manual_seed(1)
        train_by_hand(method, optimizer, model, CONV, 2, start=2, scaler=scaler)
        ends.append(everything(optimizer, model))
    assert_same(*ends)


def test_the_scales_may_step_after_a_skipped_step_of_the_weights():
    (method,) = (m for m in METHODS if m.schedule == "same_batch")
    model = method.model(CONV)
    optimizer = method(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    w, s = latents(optimizer, model), {name: scale.clone() for name, scale in scales_of(model).items()}
    overflow_by_hand(method, optimizer, model, scaler)
    with optimizer.scale_phase():
        scaler.scale(CONV.loss(model, CONV.batch(3))).backward()
    scaler.step(optimizer.scales)
    assert_same(latents(optimizer, model), w)
    assert all(
        bool(torch.isfinite(scale).all()) and not torch.equal(scale, s[name])
        for name, scale in scales_of(model).items()
    )


@each_method
@pytest.mark.parametrize("task", [MLP, BERT, TIED], ids=str)
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


@each_method
def test_an_autocast_context_round_the_step_sees_the_written_weights(method):
    """Autocast caches 16-bit copies of weights: a stale one would serve the perturbed pass the unperturbed weights."""
    losses = []
    for outside in (True, False):
        model = method.model(MLP)
        optimizer = method(model)
        found = []

        def closure(optimizer=optimizer, model=model, found=found, outside=outside):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=True, cache_enabled=True):
                loss = MLP.loss(model, MLP.batch(0))
            loss.backward()
            found.append(float(loss.detach()))

        for _ in range(3):
            with torch.autocast("cpu", torch.bfloat16, enabled=outside):
                optimizer.step(closure)
        losses.append(found)
    assert losses[0] == losses[1]


@each_method
def test_the_weights_are_on_the_grid_after_every_step(method):
    model = method.model(CONV, granularity="per_channel", bits=2)
    optimizer = method(model)
    assert_on_grid(optimizer)
    for i in range(4):
        train(optimizer, model, CONV, 1, start=i)
        assert_on_grid(optimizer)
        for row in optimizer.coverage.quantized if method.quantizes else ():
            codes = getattr(row.module, row.attr) / row.quantizer.scale
            assert torch.allclose(codes, codes.round(), atol=4 * torch.finfo(torch.float32).eps)
            assert codes.min() >= -2.5
            assert codes.max() <= 1.5
