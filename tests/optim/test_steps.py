"""Contract 2: what ``step(closure)`` calls and returns."""

import contextlib

import pytest
import torch
from torch.optim import AdamW

from tests.models import CONV, MLP
from tests.optim.methods import (
    ALTERNATING,
    METHODS,
    PERTURBING,
    QUANTIZING,
    assert_on_grid,
    assert_same,
    closure_of,
    everything,
)

CALLS = {
    "qat": [1] * 6,
    "sam": [2] * 6,
    "joint": [2] * 6,
    "saq": [2] * 6,
    "squat-same_batch": [3] * 6,
    "squat-next_batch": [2, 1] * 3,
    "squat-fused": [2] * 6,
}
each_method = pytest.mark.parametrize("method", METHODS, ids=str)


def calls_per_step(method, **options):
    """Return the number of closure calls of each of six steps."""
    model = method.model(MLP)
    optimizer = method(model, **options)
    closure = closure_of(optimizer, model, MLP, MLP.batch(0))
    counts = []
    for _ in range(6):
        calls = []
        optimizer.step(lambda calls=calls: calls.append(1) or closure())
        counts.append(len(calls))
    return counts


WRITES = {
    "qat": [1, 1],
    "joint": [1, 1],
    "saq": [1, 1],
    "squat-same_batch": [2, 2],
    "squat-next_batch": [1, 1],
    "squat-fused": [2, 2],
}


@pytest.mark.parametrize("method", QUANTIZING, ids=str)
def test_step_writes_the_weights_once_after_each_update(method, monkeypatch):
    """What the perturbed pass leaves in them is not written back first."""
    model = method.model(MLP)
    optimizer = method(model)
    closure = closure_of(optimizer, model, MLP, MLP.batch(0))
    calls, counts = [], []
    write = optimizer._latents.write
    monkeypatch.setattr(optimizer._latents, "write", lambda: calls.append(1) or write())
    for _ in range(2):
        calls.clear()
        optimizer.step(closure)
        counts.append(len(calls))
    assert counts == WRITES[str(method)]
    assert_on_grid(optimizer)


@each_method
def test_step_calls_the_closure_as_often_as_the_method_has_passes(method):
    assert calls_per_step(method) == CALLS[str(method)]


@pytest.mark.parametrize("method", PERTURBING, ids=str)
def test_every_and_start_leave_one_call_to_the_other_steps(method):
    whole = 3 if method.schedule == "same_batch" else 2
    if method.schedule == "next_batch":  # w perturbed, s, w plain, and again
        assert calls_per_step(method, every=2) == [2, 1, 1, 2, 1, 1]
        assert calls_per_step(method, start=2) == [1, 1, 2, 1, 2, 1]
    else:
        assert calls_per_step(method, every=2) == [whole, 1] * 3
        assert calls_per_step(method, every=3, start=1) == [1, whole, 1, 1, whole, 1]
        assert calls_per_step(method, start=2) == [1, 1, whole, whole, whole, whole]


@pytest.mark.parametrize("method", ALTERNATING, ids=str)
def test_a_period_gives_the_scales_fewer_turns(method):
    expected = {"same_batch": [2, 2, 3, 2, 2, 3], "next_batch": [2, 2, 2, 1, 2, 2], "fused": [2] * 6}
    assert calls_per_step(method, period=3) == expected[method.schedule]


@each_method
def test_step_returns_what_the_closure_returned_in_the_first_pass(method):
    model = method.model(MLP)
    optimizer = method(model)
    closure = closure_of(optimizer, model, MLP, MLP.batch(0))
    for _ in range(2):
        returned = []

        def numbered(returned=returned):
            closure()
            returned.append({"call": len(returned)})
            return returned[-1]

        assert optimizer.step(numbered) is returned[0]


@each_method
def test_step_clears_the_gradients_before_each_call(method):
    """A closure without zero_grad gives the same run; so do gradients that were left over."""
    runs = []
    for tidy in (True, False):
        model = method.model(CONV)
        optimizer = method(model)
        torch.manual_seed(0)
        for i in range(4):
            closure = closure_of(optimizer, model, CONV, CONV.batch(i))
            if not tidy:
                for p in model.parameters():
                    p.grad = torch.ones_like(p) if p.requires_grad else None

                def closure(batch=CONV.batch(i), model=model):
                    loss = CONV.loss(model, batch)
                    loss.backward()
                    return loss

            first_untidy = not tidy and i == 0
            says = pytest.warns(UserWarning, match=r"step\(closure\) clears the gradients that it finds: micro-batches")
            with says if first_untidy else contextlib.nullcontext():
                optimizer.step(closure)
        runs.append(everything(optimizer, model))
    assert_same(*runs)


@each_method
def test_step_leaves_no_gradient(method):
    model = method.model(MLP)
    optimizer = method(model)
    optimizer.step(closure_of(optimizer, model, MLP, MLP.batch(0)))
    assert all(p.grad is None for p in model.parameters())


@each_method
def test_a_closure_runs_with_gradients_enabled(method):
    model = method.model(MLP)
    optimizer = method(model)
    with torch.no_grad():
        optimizer.step(closure_of(optimizer, model, MLP, MLP.batch(0)))
    assert optimizer.steps == 1


@each_method
def test_only_steps_of_the_weights_are_counted(method):
    model = method.model(MLP)
    optimizer = method(model)
    for _ in range(4):
        optimizer.step(closure_of(optimizer, model, MLP, MLP.batch(0)))
    assert optimizer.steps == (2 if method.schedule == "next_batch" else 4)


@each_method
def test_hooks_of_torch_optimizers_run_once_a_step(method):
    model = method.model(MLP)
    optimizer = method(model)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    for _ in range(2):
        optimizer.step(closure_of(optimizer, model, MLP, MLP.batch(0)))
    assert seen == ["before", "after"] * 2


@each_method
def test_the_base_steps_once_a_step_of_the_weights(method):
    steps = []

    class Counting(AdamW):
        def step(self, closure=None):
            steps.append(closure)
            super().step(closure)

    model = method.model(MLP)
    optimizer = method(model, Counting)
    for _ in range(4):
        optimizer.step(closure_of(optimizer, model, MLP, MLP.batch(0)))
    assert steps == [None] * (2 if method.schedule == "next_batch" else 4)


@each_method
def test_a_closure_without_a_backward_steps_the_gradients_in_place(method):
    """A framework's hooks may ride in a closure (Lightning's manual optimization)."""
    ends = []
    for hooks in (True, False):
        model = method.model(CONV)
        optimizer = method(model)
        torch.manual_seed(0)
        for block in optimizer.blocks:
            with getattr(optimizer, block)():
                CONV.loss(model, CONV.batch(0)).backward()
        assert optimizer.step(lambda: "hooks") == "hooks" if hooks else optimizer.step() is None
        assert optimizer.steps == 1
        ends.append(everything(optimizer, model))
    assert_same(*ends)
