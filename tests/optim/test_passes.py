"""Contract 5: of all passes of a step only the first moves buffers and random numbers, and all see the same dropout."""

import pickle
import random

import pytest
import torch
from torch import nn

from tests.models import BERT, CONV
from tests.optim.methods import METHODS, PERTURBING, assert_same, buffers_of, closure_of, train

each_method = pytest.mark.parametrize("method", METHODS, ids=str)


def draws_of(model):
    """Return a list that gets a few random numbers at the start and at the end of each forward."""
    draws = []

    def draw(*_):
        draws.append(torch.rand(4))

    model.register_forward_pre_hook(draw)
    model.register_forward_hook(draw)
    return draws


def after_one_forward(method):
    """Return buffers, torch's and Python's random states after one plain forward of the written model."""
    model = method.model(CONV)
    optimizer = method(model)
    seed()
    CONV.loss(model, CONV.batch(0))
    random.random()
    del optimizer
    return buffers_of(model), torch.get_rng_state(), random.getstate()


def seed():
    torch.manual_seed(0)
    random.seed(0)


@each_method
@pytest.mark.parametrize("rng", ["shared", "independent"])
def test_buffers_and_random_numbers_move_once_a_step(method, rng):
    buffers, torch_state, python_state = after_one_forward(method)
    model = method.model(CONV)
    optimizer = method(model, rng=rng)
    closure = closure_of(optimizer, model, CONV, CONV.batch(0))
    draws = []
    seed()
    optimizer.step(lambda: draws.append(random.random()) or closure())
    assert_same(buffers_of(model), buffers)
    assert all(module.num_batches_tracked == 1 for module in model.modules() if isinstance(module, nn.BatchNorm2d))
    once = torch.equal(torch.get_rng_state(), torch_state) and random.getstate() == python_state
    assert once == (rng == "shared" or len(draws) == 1)
    assert len(set(draws)) == (1 if rng == "shared" else len(draws))


@each_method
@pytest.mark.parametrize("task", [CONV, BERT], ids=str)
def test_all_passes_of_a_step_see_the_same_dropout(method, task):
    model = method.model(task)
    optimizer = method(model)
    draws = draws_of(model)
    seen = set()
    for _ in range(3):
        draws.clear()
        optimizer.step(closure_of(optimizer, model, task, task.batch(0)))
        first, last = draws[0], draws[1]
        assert all(later.equal(first) for later in draws[::2])
        assert all(later.equal(last) for later in draws[1::2])
        seen |= {tuple(first.tolist()), tuple(last.tolist())}
    assert len(seen) == 6


@pytest.mark.parametrize("method", PERTURBING, ids=str)
def test_independent_passes_see_different_dropout(method):
    model = method.model(CONV)
    optimizer = method(model, rng="independent")
    draws = draws_of(model)
    optimizer.step(closure_of(optimizer, model, CONV, CONV.batch(0)))
    assert len({tuple(draw.tolist()) for draw in draws}) == len(draws)


@pytest.mark.parametrize("method", PERTURBING, ids=str)
def test_by_hand_each_micro_batch_keeps_its_own_dropout(method):
    model = method.model(CONV)
    optimizer = method(model)
    draws = draws_of(model)
    for step in range(2):
        draws.clear()
        for i in range(2):
            for block in (optimizer.first_pass, optimizer.perturbed):
                with block():
                    CONV.loss(model, CONV.batch(i)).backward()
        optimizer.step()
        if method.schedule == "same_batch" and step:
            for i in range(2):
                with optimizer.scale_phase():
                    CONV.loss(model, CONV.batch(i)).backward()
            optimizer.step_scales()
        starts = [tuple(draw.tolist()) for draw in draws[::2]]
        assert starts == [starts[0]] * 2 + [starts[2]] * 2 + starts[::2][: len(starts) - 4]
        assert starts[0] != starts[2]


@pytest.mark.parametrize("method", PERTURBING, ids=str)
def test_a_first_pass_that_failed_leaves_no_random_state_behind(method):
    model = method.model(CONV)
    optimizer = method(model)
    draws = draws_of(model)
    torch.manual_seed(0)
    for i in range(2):
        with pytest.raises(ZeroDivisionError), optimizer.first_pass():
            1 / 0
        torch.rand(i + 1)
        for block in (optimizer.first_pass, optimizer.perturbed):
            with block():
                CONV.loss(model, CONV.batch(i)).backward()
    optimizer.step()
    if method.schedule == "same_batch":
        for i in range(2):
            with optimizer.scale_phase():
                CONV.loss(model, CONV.batch(i)).backward()
        assert [draw.tolist() for draw in draws[8::2]] == [draws[0].tolist(), draws[4].tolist()]
    assert draws[0].equal(draws[2])
    assert draws[4].equal(draws[6])


@each_method
def test_the_momentum_of_batch_norm_is_never_touched(method):
    model = method.model(CONV)
    optimizer = method(model)
    closure = closure_of(optimizer, model, CONV, CONV.batch(0))
    seen = []
    optimizer.step(
        lambda: seen.append([m.momentum for m in model.modules() if isinstance(m, nn.BatchNorm2d)]) or closure()
    )
    assert all(momenta == [0.1, 0.1] for momenta in seen)


@each_method
def test_a_replaced_buffer_is_put_back(method):
    """A module that assigns its buffer, in place of writing it, in every forward."""

    class Counter(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("count", torch.zeros((), dtype=torch.long))

        def forward(self, x):
            self.count = self.count + 1
            return x

    model = method.model(CONV)
    model.append(Counter())
    optimizer = method(model)
    train(optimizer, model, CONV, 4)
    assert model[-1].count == 4


@each_method
def test_a_buffer_that_cannot_be_written_does_no_harm(method):
    model = method.model(CONV)
    model.register_buffer("mask", torch.ones(1, 1).expand(3, 3))
    train(method(model), model, CONV, 2)
    assert torch.equal(model.mask, torch.ones(3, 3))


@each_method
def test_an_optimizer_does_not_grow_with_its_steps(method):
    model = method.model(CONV)
    optimizer = method(model)
    train(optimizer, model, CONV, 4)
    few = len(pickle.dumps(optimizer))
    train(optimizer, model, CONV, 8)
    assert len(pickle.dumps(optimizer)) < few + 5000  # the state of torch's generator alone has 5056 bytes


@pytest.mark.parametrize("method", PERTURBING, ids=str)
def test_an_input_is_never_calibrated_in_a_later_pass(method):
    """The scale of an uncalibrated input comes from the first pass, at Q(w), not from Q(w) + e."""
    if not method.quantizes:
        pytest.skip("SAM has no inputs to calibrate")
    found = []
    for rho in (0.0, 5.0):
        model = CONV.build()
        optimizer = method(model, rho=rho, lr=0.0, scale_lr=0.0)
        torch.manual_seed(0)
        train(optimizer, model, CONV, 1)
        found.append({row.name: row.quantizer.scale.detach() for row in optimizer.coverage.inputs})
    assert_same(*found)
