"""Contract 2: the verbs refuse a wrong order, and leave everything as it was when they do."""

import pytest
import torch
from torch.optim import AdamW

import qsam
from tests.models import MLP
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
each_perturbing = pytest.mark.parametrize("method", PERTURBING, ids=str)
each_alternating = pytest.mark.parametrize("method", ALTERNATING, ids=str)


def build(method, **options):
    model = method.model(MLP)
    return model, method(model, **options)


def backward(model, number=0):
    MLP.loss(model, MLP.batch(number)).backward()


@each_perturbing
def test_perturbed_needs_gradients_of_a_first_pass(method):
    model, optimizer = build(method)
    with pytest.raises(RuntimeError, match=r"perturbed\(\) needs gradients of a first pass: run backward inside"):
        optimizer.perturbed().__enter__()
    with optimizer.first_pass():
        pass
    with pytest.raises(RuntimeError, match=r"perturbed\(\) needs gradients of a first pass"):
        optimizer.perturbed().__enter__()
    backward(model)
    with pytest.raises(RuntimeError, match=r"perturbed\(\) needs gradients of a first pass"):
        optimizer.perturbed().__enter__()
    assert_on_grid(optimizer)


@each_perturbing
def test_perturbed_does_not_take_gradients_that_were_cleared(method):
    model, optimizer = build(method)
    with optimizer.first_pass():
        backward(model)
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match=r"perturbed\(\) needs gradients of a first pass"):
        optimizer.perturbed().__enter__()


@each_perturbing
def test_one_first_pass_serves_one_perturbed_pass(method):
    model, optimizer = build(method)
    with optimizer.first_pass():
        backward(model)
    with optimizer.perturbed():
        backward(model)
    with pytest.raises(RuntimeError, match=r"perturbed\(\) needs gradients of a first pass"):
        optimizer.perturbed().__enter__()


def test_qat_has_no_perturbed_pass():
    (method,) = (m for m in METHODS if m.name == "qat")
    model, optimizer = build(method)
    with optimizer.first_pass():
        backward(model)
    with pytest.raises(RuntimeError, match=r"QAT has no perturbed pass: run one backward, then step\(\)\."):
        optimizer.perturbed().__enter__()
    optimizer.step()


@each_method
def test_a_step_needs_a_new_backward(method):
    model, optimizer = build(method)
    with pytest.raises(RuntimeError, match=r"step\(\) found no gradient: run a new backward before each step\."):
        optimizer.step()
    with optimizer.first_pass():
        backward(model)
    if method.perturbs:
        with optimizer.perturbed():
            backward(model)
    optimizer.step()
    before = everything(optimizer, model)
    with pytest.raises(RuntimeError, match=r"step\(\) found no gradient"):
        optimizer.step()
    assert_same(everything(optimizer, model), before)


@each_perturbing
def test_a_step_without_a_first_pass_is_plain_qat_and_says_so_once(method):
    ends = []
    for by_hand in (True, False):
        model, optimizer = build(method, **({} if by_hand else {"start": 9}))
        for i in range(3):
            if by_hand:
                backward(model, i)
                if i == 0:
                    with pytest.warns(
                        UserWarning, match=r"\.step\(\) without first_pass\(\) and perturbed\(\) is a plain QAT step"
                    ):
                        optimizer.step()
                else:
                    optimizer.step()
            else:
                train(optimizer, model, MLP, 1, start=i)
        ends.append(everything(optimizer, model))
    assert_same(*ends)


@each_perturbing
def test_a_step_that_is_not_due_may_come_without_a_first_pass(method):
    model, optimizer = build(method, start=1)
    backward(model)
    optimizer.step()
    assert optimizer.steps == 1


@each_method
def test_qat_by_hand_is_a_torch_loop(method):
    if method.name != "qat":
        pytest.skip("the others need two passes")
    ends = []
    for by_hand in (True, False):
        model, optimizer = build(method)
        for i in range(3):
            if by_hand:
                optimizer.zero_grad()
                backward(model, i)
                optimizer.step()
            else:
                train(optimizer, model, MLP, 1, start=i)
        ends.append(everything(optimizer, model))
    assert_same(*ends)


VERBS = {
    "first_pass": lambda o, m: o.first_pass().__enter__(),
    "perturbed": lambda o, m: o.perturbed().__enter__(),
    "scale_phase": lambda o, m: o.scale_phase().__enter__(),
    "latents": lambda o, m: o.latents().__enter__(),
    "step": lambda o, m: o.step(),
    "step_scales": lambda o, m: o.step_scales(),
    "state_dict": lambda o, m: o.state_dict(),
    "load_state_dict": lambda o, m: o.load_state_dict({}),
    "sync_latents": lambda o, m: o.sync_latents(),
    "dequantize_": lambda o, m: qsam.dequantize_(m, o),
}


def verbs_of(method):
    missing = set()
    if not method.perturbs:
        missing |= {"perturbed"}
    if not method.alternates:
        missing |= {"scale_phase", "step_scales"}
    if not method.quantizes:
        missing |= {"dequantize_"}
    return {name: verb for name, verb in VERBS.items() if name not in missing}


@each_method
@pytest.mark.parametrize("block", ["first_pass", "perturbed", "scale_phase", "latents"])
def test_no_verb_is_allowed_inside_a_block(method, block):
    if block not in verbs_of(method):
        pytest.skip("no such block")
    model, optimizer = build(method)
    if block == "perturbed":
        with optimizer.first_pass():
            backward(model)
    with getattr(optimizer, block)():
        if block != "latents":
            backward(model)
        for name, verb in verbs_of(method).items():
            with pytest.raises(
                RuntimeError, match=rf"{name}\(\) inside the block {block}\(\): leave the block first\."
            ):
                verb(optimizer, model)
        with pytest.raises(RuntimeError, match=rf"step\(\) inside the block {block}\(\)"):
            optimizer.step(closure_of(optimizer, model, MLP, MLP.batch(0)))
    assert_on_grid(optimizer)
    optimizer.zero_grad()
    train(optimizer, model, MLP, 1)


@each_perturbing
def test_the_model_refuses_its_state_dict_inside_a_perturbed_pass(method):
    model, optimizer = build(method)
    with optimizer.first_pass():
        backward(model)
        model.state_dict()
    with optimizer.perturbed():
        with pytest.raises(
            RuntimeError, match=r"model\.state_dict\(\) inside perturbed\(\) would save weights that are not Q\(w\)"
        ):
            model.state_dict()
        backward(model)
    model.state_dict()


@pytest.mark.parametrize("method", [m for m in METHODS if not m.alternates], ids=str)
def test_only_squat_has_a_phase_of_the_scales(method):
    model, optimizer = build(method)
    message = r"steps weights and scales together: {}\(\) belongs to SQuAT\."
    with pytest.raises(RuntimeError, match=message.format("scale_phase")):
        optimizer.scale_phase().__enter__()
    backward(model)
    with pytest.raises(RuntimeError, match=message.format("step_scales")):
        optimizer.step_scales()


@each_alternating
def test_step_scales_needs_a_backward_of_its_own(method):
    model, optimizer = build(method)
    message = r"step_scales\(\) found no gradient: run a backward inside `with optimizer\.scale_phase\(\):` before\."
    with pytest.raises(RuntimeError, match=message):
        optimizer.step_scales()
    with optimizer.first_pass():
        backward(model)
    with optimizer.perturbed():
        backward(model)
    before = everything(optimizer, model)
    with pytest.raises(
        RuntimeError, match=r"found the gradients of perturbed\(\), which are the weights': call step\(\) first"
    ):
        optimizer.step_scales()
    assert_same(everything(optimizer, model), before)
    optimizer.step()
    with pytest.raises(RuntimeError, match=message):
        optimizer.step_scales()


@each_alternating
def test_the_scales_step_between_the_passes_only_where_they_are_fused(method):
    model, optimizer = build(method)
    with optimizer.first_pass():
        backward(model)
    if method.schedule == "fused":
        optimizer.step_scales()
    else:
        with pytest.raises(RuntimeError, match=r"between the first and the perturbed pass is for schedule='fused'\."):
            optimizer.step_scales()
    with optimizer.perturbed():
        backward(model)
    optimizer.step()


@each_method
def test_a_refused_verb_inside_a_closure_stops_the_step_cleanly(method):
    model, optimizer = build(method)
    with pytest.raises(RuntimeError, match=r"inside the block|found no gradient"):
        optimizer.step(lambda: optimizer.step())
    assert_on_grid(optimizer)
    train(optimizer, model, MLP, 1)


def test_a_scheduler_sees_that_the_optimizer_has_stepped():
    (method,) = (m for m in METHODS if m.name == "saq")
    model, optimizer = build(method, base=AdamW)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    train(optimizer, model, MLP, 1)
    scheduler.step()  # torch warns where the optimizer has not stepped before
