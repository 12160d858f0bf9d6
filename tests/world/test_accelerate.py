"""Accelerate needs no integration: its wrapper passes closures on, the blocks are called on what it wraps."""

import pytest
import torch
from accelerate import Accelerator
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

import qsam
from tests.frameworks import steps_by_hand
from tests.methods import METHODS, assert_on_grid, assert_same, closure_of, everything, train
from tests.models import MLP

BY_NAME = {str(method): method for method in METHODS}


def prepared(method, **settings):
    accelerator = Accelerator(cpu=True, **settings)
    model = method.model(MLP)
    optimizer = method(model)
    model, optimizer = accelerator.prepare(model, optimizer)
    return accelerator, model, optimizer


@pytest.mark.parametrize(
    ("name", "precision"), [("saq", "no"), ("squat-next_batch", "no"), ("squat-same_batch", "bf16"), ("qat", "bf16")]
)
def test_a_closure_goes_through_the_wrapper(name, precision):
    method = BY_NAME[name]
    accelerator, model, optimizer = prepared(method, mixed_precision=precision)
    scheduler = accelerator.prepare(LambdaLR(optimizer, lambda step: 1 / (1 + step)))
    twin = method.model(MLP)
    expected = method(twin)
    expected_scheduler = LambdaLR(expected, lambda step: 1 / (1 + step))
    for i in range(4):

        def closure(i=i):
            optimizer.zero_grad()
            loss = MLP.loss(model, MLP.batch(i))
            accelerator.backward(loss)
            return loss

        def twin_closure(i=i):
            expected.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                logits = twin(MLP.batch(i)["x"])
            loss = MLP.loss(
                lambda x: logits.float(), MLP.batch(i)
            )  # Accelerate's outputs are fp32, and the loss outside
            loss.backward()
            return loss

        optimizer.step(closure)
        scheduler.step()
        expected.step(twin_closure)
        expected_scheduler.step()
    inner = qsam.unwrap(optimizer)
    assert_same(everything(inner, accelerator.unwrap_model(model)), everything(expected, twin))


@pytest.mark.parametrize("name", ["qat", "saq", "squat-next_batch"])
def test_micro_batches_by_blocks(name):
    method = BY_NAME[name]
    accelerator, model, optimizer = prepared(method, gradient_accumulation_steps=2)
    inner = qsam.unwrap(optimizer)
    for i in range(4):
        with accelerator.accumulate(model):
            for block in inner.blocks:
                with getattr(inner, block)():
                    accelerator.backward(MLP.loss(model, MLP.batch(i)))
            optimizer.step()
            optimizer.zero_grad()
    twin = method.model(MLP)
    expected = method(twin)
    steps_by_hand(expected, twin, MLP, [[0, 1], [2, 3]], seed=False)
    assert_same(everything(inner, model), everything(expected, twin))


def test_accelerate_never_calls_a_closure_between_the_steps():
    """Which is why docs/loops.md accumulates by blocks."""
    accelerator, model, optimizer = prepared(METHODS[0], gradient_accumulation_steps=2)
    calls = []
    for i in range(2):
        with accelerator.accumulate(model):
            optimizer.step(lambda i=i: calls.append(i) or accelerator.backward(MLP.loss(model, MLP.batch(i))))
    assert set(calls) == {1}


@pytest.mark.parametrize("name", ["qat", "squat-next_batch"])
def test_a_saved_state_resumes_as_if_nothing_had_stopped(name, tmp_path):
    method = BY_NAME[name]
    accelerator, model, optimizer = prepared(method)
    inner = qsam.unwrap(optimizer)
    train(inner, model, MLP, 3)
    accelerator.save_state(str(tmp_path))
    train(inner, model, MLP, 3, start=3)
    other_accelerator, other, resumed = prepared(method)
    other_accelerator.load_state(str(tmp_path))
    train(qsam.unwrap(resumed), other, MLP, 3, start=3)
    assert_same(everything(qsam.unwrap(resumed), other), everything(inner, model))


@pytest.mark.parametrize("method", [BY_NAME[name] for name in ("sam", "saq", "squat-same_batch")], ids=str)
def test_clipping_by_accelerate_sees_the_gradient_of_the_model_s_weights(method):
    accelerator, model, optimizer = prepared(method)
    inner = qsam.unwrap(optimizer)
    for block in inner.blocks:
        with getattr(inner, block)():
            accelerator.backward(MLP.loss(model, MLP.batch(0)))
    norm = accelerator.clip_grad_norm_(model.parameters(), 1e-3)
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert float(norm) > 1e-3 and torch.cat([g.flatten() for g in grads]).norm() <= 1.001e-3
    optimizer.step()
    assert inner.steps == 1
    if method.quantizes:
        assert_on_grid(inner)


def test_unwrap_reaches_through_accelerate():
    accelerator = Accelerator(cpu=True)
    model = MLP.quantized()
    optimizer = qsam.SQuAT(model, AdamW, lr=1e-3)
    wrapped = accelerator.prepare(optimizer)
    assert wrapped is not optimizer and qsam.unwrap(wrapped) is optimizer
    wrapped.step(closure_of(optimizer, model, MLP, MLP.batch(0)))
    assert optimizer.steps == 1
