"""``optimizer.blocks``: one loop by hand for every method, schedule and option; and the wrappers it is found in."""

import pickle

import numpy
import pytest
import torch
from torch import nn
from torch.optim import LBFGS, SGD, AdamW

import qsam
from tests.models import CONV, MLP
from tests.optim.methods import (
    ALTERNATING,
    METHODS,
    PERTURBING,
    assert_on_grid,
    assert_same,
    closure_of,
    everything,
    train,
)

each_method = pytest.mark.parametrize("method", METHODS, ids=str)


def step_by_blocks(optimizer, model, task, number, micro_batches=1):
    """Take one step with the blocks that are due."""
    made = []
    for part in range(micro_batches):
        for block in optimizer.blocks:
            with getattr(optimizer, block)():
                (task.loss(model, task.batch(number + part)) / micro_batches).backward()
            made.append(block)
    optimizer.step()
    return made


def follow(method, optimizer, model, task, steps):
    """Do by hand what ``step(closure)`` does, knowing nothing of the method but where its scales' turn is."""
    for i in range(steps):
        if method.schedule == "fused" and len(optimizer.blocks) == 2:
            with optimizer.first_pass():
                task.loss(model, task.batch(i)).backward()
            if optimizer.scales_due:
                optimizer.step_scales()
            with optimizer.perturbed():
                task.loss(model, task.batch(i)).backward()
            optimizer.step()
            continue
        step_by_blocks(optimizer, model, task, i)
        if method.schedule == "same_batch" and optimizer.blocks == ("scale_phase",):
            step_by_blocks(optimizer, model, task, i)


OPTIONS = {
    "plain": {},
    "every": {"every": 2, "start": 1},
    "reuse": {"every": 2, "reuse": "perturbation"},
    "momentum": {"direction": "momentum"},
    "period": {"period": 2},
}


@each_method
@pytest.mark.parametrize("options", OPTIONS)
def test_the_blocks_that_are_due_are_the_passes_of_a_closure(method, options):
    if (options == "period" and not method.alternates) or (options != "plain" and not method.perturbs):
        pytest.skip("not an option of this method")
    if options == "momentum" and method.schedule == "fused":
        pytest.skip("refused: the scales need a first pass")
    ends = []
    for by_hand in (True, False):
        model = method.model(CONV)
        optimizer = method(model, **OPTIONS[options])
        torch.manual_seed(0)
        if by_hand:
            follow(method, optimizer, model, CONV, 5)
        else:
            train(optimizer, model, CONV, 5)
        ends.append(everything(optimizer, model))
    assert_same(*ends)


@pytest.mark.parametrize("method", PERTURBING, ids=str)
def test_micro_batches_of_a_step_without_perturbation_add_up(method):
    """The first pass sets gradients aside only for a perturbed pass that puts them back."""
    ends = []
    for by_blocks in (True, False):
        model = method.model(MLP)
        optimizer = method(model, start=3)
        if by_blocks:
            assert step_by_blocks(optimizer, model, MLP, 0, micro_batches=2) == ["first_pass", "first_pass"]
        else:
            for i in range(2):
                (MLP.loss(model, MLP.batch(i)) / 2).backward()
            optimizer.step()
        ends.append(everything(optimizer, model))
    assert_same(*ends)


@pytest.mark.parametrize("method", PERTURBING, ids=str)
def test_a_step_that_is_not_due_refuses_a_perturbed_pass(method):
    model = method.model(MLP)
    optimizer = method(model, start=1)
    with optimizer.first_pass():
        MLP.loss(model, MLP.batch(0)).backward()
    with pytest.raises(
        RuntimeError, match=r"step 0 is not perturbed .*: run the blocks that `optimizer\.blocks` names"
    ):
        optimizer.perturbed().__enter__()
    optimizer.step()
    assert optimizer.blocks == ("first_pass", "perturbed")


@pytest.mark.parametrize("method", ALTERNATING, ids=str)
def test_a_step_after_the_phase_of_the_scales_is_theirs(method):
    model = method.model(MLP)
    optimizer = method(model, period=1)
    if method.schedule != "fused":
        step_by_blocks(optimizer, model, MLP, 0)
        assert optimizer.blocks == ("scale_phase",)
    weights = [slot.latent.detach().clone() for slot in optimizer._latents.slots]
    scales = [slot.quantizer.scale.clone() for slot in optimizer._latents.slots]
    with optimizer.scale_phase():
        MLP.loss(model, MLP.batch(0)).backward()
    optimizer.step()
    assert all(torch.equal(s.latent, w) for s, w in zip(optimizer._latents.slots, weights, strict=True))
    assert not any(torch.equal(s.quantizer.scale, old) for s, old in zip(optimizer._latents.slots, scales, strict=True))
    assert optimizer.blocks == ("first_pass", "perturbed")
    assert_on_grid(optimizer)


@pytest.mark.parametrize("method", ALTERNATING, ids=str)
def test_a_phase_of_the_scales_that_was_cleared_leaves_the_next_step_to_the_weights(method):
    model = method.model(MLP)
    optimizer = method(model)
    with optimizer.scale_phase():
        MLP.loss(model, MLP.batch(0)).backward()
    optimizer.zero_grad()
    with optimizer.first_pass():
        MLP.loss(model, MLP.batch(0)).backward()
    with optimizer.perturbed():
        MLP.loss(model, MLP.batch(0)).backward()
    optimizer.step()
    assert optimizer.steps == 1


@each_method
def test_all_passes_see_the_same_numbers_of_numpy(method):
    """Wav2Vec2 draws the spans that it masks from numpy's global generator."""
    model = method.model(MLP)
    optimizer = method(model)
    closure = closure_of(optimizer, model, MLP, MLP.batch(0))
    numpy.random.seed(0)
    expected = numpy.random.rand(2)
    numpy.random.seed(0)
    draws = []
    optimizer.step(lambda: draws.append(numpy.random.rand()) or closure())
    assert set(draws) == {expected[0]}
    assert numpy.random.rand() == expected[1]


@each_method
def test_a_model_that_was_moved_is_refused(method):
    if not method.quantizes:
        pytest.skip("a method without latents is an ordinary optimizer: torch's own rules hold")
    model = method.model(MLP)
    optimizer = method(model)
    model.to("meta")
    message = r"moved from cpu to meta \('0\.weight'\), and its latents were not: move the model first, then build"
    with pytest.raises(RuntimeError, match=message):
        optimizer.first_pass().__enter__()
    assert all(slot.latent.device.type == "cpu" for slot in optimizer._latents.slots)


@each_method
def test_unwrap_finds_the_optimizer_inside_its_wrappers(method):
    optimizer = method(method.model(MLP))

    class Wrapper:
        def __init__(self, optimizer):
            self.optimizer = optimizer

    assert qsam.unwrap(optimizer) is optimizer
    assert qsam.unwrap(Wrapper(Wrapper(optimizer))) is optimizer
    assert qsam.unwrap(pickle.loads(pickle.dumps(optimizer))).blocks == optimizer.blocks


def test_unwrap_refuses_what_holds_no_optimizer_of_ours():
    plain = SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    turning = type("Turning", (), {})()
    turning.optimizer = turning
    for other, name in ((plain, "SGD"), (turning, "Turning"), (None, "NoneType"), ("adam", "str")):
        with pytest.raises(
            TypeError, match=rf"`optimizer` must be a qsam optimizer or a wrapper around one, got {name}"
        ):
            qsam.unwrap(other)


def test_a_base_that_calls_its_closure_by_itself_has_no_step_by_hand():
    model = MLP.quantized()
    optimizer = qsam.QAT(model, LBFGS, lr=0.1)
    MLP.loss(model, MLP.batch(0)).backward()
    with pytest.raises(TypeError, match=r"LBFGS calls its closure by itself: use step\(closure\)"):
        optimizer.step()


def test_blocks_of_a_base_with_moments_are_known_from_its_second_step():
    model = MLP.quantized()
    optimizer = qsam.SQuAT(model, AdamW, lr=1e-3, direction="momentum", schedule="next_batch")
    made = [step_by_blocks(optimizer, model, MLP, i) for i in range(4)]
    assert made == [["first_pass"], ["perturbed"], ["scale_phase"], ["perturbed"]]
