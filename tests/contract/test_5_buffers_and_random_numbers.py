"""Contract 5: of all passes of a step only the first moves buffers and random numbers, and all see the same dropout."""

import pickle
import random

import numpy
import pytest
import torch
from torch import nn

from tests.methods import SAQ, SQUAT, assert_same, buffers_of, built, closure_of, each_kind, train
from tests.models import CONV


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
    model, optimizer = built(method, CONV)
    seed()
    CONV.loss(model, CONV.batch(0))
    random.random()
    del optimizer
    return buffers_of(model), torch.get_rng_state(), random.getstate()


def seed():
    torch.manual_seed(0)
    random.seed(0)


@each_kind
@pytest.mark.parametrize("rng", ["shared", "independent"])
def test_buffers_and_random_numbers_move_once_a_step(method, rng):
    buffers, torch_state, python_state = after_one_forward(method)
    model, optimizer = built(method, CONV, rng=rng)
    closure = closure_of(optimizer, model, CONV, CONV.batch(0))
    draws = []
    seed()
    optimizer.step(lambda: draws.append(random.random()) or closure())
    assert_same(buffers_of(model), buffers)
    assert all(module.num_batches_tracked == 1 for module in model.modules() if isinstance(module, nn.BatchNorm2d))
    once = torch.equal(torch.get_rng_state(), torch_state) and random.getstate() == python_state
    assert once == (rng == "shared" or len(draws) == 1)
    assert len(set(draws)) == (1 if rng == "shared" else len(draws))


@each_kind
def test_all_passes_of_a_step_see_the_same_dropout(method):
    task = CONV
    model, optimizer = built(method, task)
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


def test_by_hand_each_micro_batch_keeps_its_own_dropout():
    model, optimizer = built(SQUAT, CONV)
    draws = draws_of(model)
    for step in range(2):
        draws.clear()
        for i in range(2):
            for block in (optimizer.first_pass, optimizer.perturbed):
                with block():
                    CONV.loss(model, CONV.batch(i)).backward()
        optimizer.step()
        if step:
            for i in range(2):
                with optimizer.scale_phase():
                    CONV.loss(model, CONV.batch(i)).backward()
            optimizer.step_scales()
        starts = [tuple(draw.tolist()) for draw in draws[::2]]
        assert starts == [starts[0]] * 2 + [starts[2]] * 2 + starts[::2][: len(starts) - 4]
        assert starts[0] != starts[2]


def test_a_first_pass_that_failed_leaves_no_random_state_behind():
    model, optimizer = built(SQUAT, CONV)
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
    for i in range(2):
        with optimizer.scale_phase():
            CONV.loss(model, CONV.batch(i)).backward()
    assert [draw.tolist() for draw in draws[8::2]] == [draws[0].tolist(), draws[4].tolist()]
    assert draws[0].equal(draws[2])
    assert draws[4].equal(draws[6])


@pytest.mark.parametrize("method", [SAQ, SQUAT], ids=str)
def test_an_optimizer_does_not_grow_with_its_steps(method):
    model, optimizer = built(method, CONV)
    train(optimizer, model, CONV, 4)
    few = len(pickle.dumps(optimizer))
    train(optimizer, model, CONV, 8)
    assert len(pickle.dumps(optimizer)) < few + 5000  # the state of torch's generator alone has 5056 bytes


def test_all_passes_see_the_same_numbers_of_numpy():
    """Wav2Vec2 draws the spans that it masks from numpy's global generator."""
    model, optimizer = built(SQUAT, CONV)
    closure = closure_of(optimizer, model, CONV, CONV.batch(0))
    numpy.random.seed(0)
    expected = numpy.random.rand(2)
    numpy.random.seed(0)
    draws = []
    optimizer.step(lambda: draws.append(numpy.random.rand()) or closure())
    assert draws == [expected[0]] * 3
    assert numpy.random.rand() == expected[1]
