"""NaN, infinity and overflow: where they come in, what they can reach, and how the user is told."""

import io

import pytest
import torch
from torch.optim import SGD

import qsam
from tests.models import CONV, MLP
from tests.optim.methods import METHODS, QUANTIZING, assert_on_grid, assert_same, closure_of, everything, train

INF = float("inf")
each_method = pytest.mark.parametrize("method", METHODS, ids=str)


class StoppedByTheUser(Exception):
    """What a careful closure raises where the loss is not finite."""


@each_method
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


@each_method
def test_after_an_infinite_gradient_a_checkpoint_mends_the_run(method):
    model = method.model(CONV)
    optimizer = method(model, SGD, lr=0.01, momentum=0.9)
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
    if method.schedule == "next_batch":
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


@pytest.mark.parametrize("method", QUANTIZING, ids=str)
def test_an_fp16_weight_that_cannot_hold_its_grid_is_refused(method):
    model = half_model(70000.0)
    before = snapshot(model)
    for call in (lambda: method(model), lambda: qsam.write_(model)):
        with pytest.raises(ValueError, match=OVERFLOW):
            call()
        assert_same(snapshot(model), before)
    model.bfloat16()
    qsam.write_(model)
    assert bool(torch.isfinite(model[0].weight).all())


def test_an_fp16_overflow_in_training_is_told_one_step_later():
    model = half_model(60000.0)
    (qat,) = (m for m in QUANTIZING if m.name == "qat")
    optimizer = qat(model, SGD, lr=0.0, scale_lr=1.0)
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
