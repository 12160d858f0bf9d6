"""Contract 2: how often the closure is called and what it returns; the verbs refuse a wrong order and change nothing then."""

import contextlib
import pickle

import pytest
import torch
from torch import nn
from torch.optim import LBFGS, SGD

import qsam
from tests.methods import (
    BY_NAME,
    METHODS,
    SAQ,
    SQUAT,
    assert_on_grid,
    assert_same,
    built,
    closure_of,
    each_kind,
    each_perturbing,
    everything,
    train,
)
from tests.models import CONV, MLP

CALLS = [
    ("qat", {}, [1] * 6),
    ("sam", {}, [2] * 6),
    ("joint", {}, [2] * 6),
    ("saq", {}, [2] * 6),
    ("squat-same_batch", {}, [3] * 6),
    ("squat-next_batch", {}, [2, 1] * 3),
    ("squat-fused", {}, [2] * 6),
    ("sam", {"start": 2}, [1, 1, 2, 2, 2, 2]),
    ("saq", {"every": 3, "start": 1}, [1, 2, 1, 1, 2, 1]),
    ("saq", {"every": 3, "reuse": "perturbation"}, [2, 1, 1, 2, 1, 1]),
    ("saq", {"direction": "momentum"}, [1] * 6),
    ("squat-same_batch", {"every": 2}, [3, 1] * 3),
    ("squat-same_batch", {"direction": "previous"}, [1] + 5 * [2]),
    ("squat-same_batch", {"period": 3}, [2, 2, 3, 2, 2, 3]),
    ("squat-next_batch", {"every": 2}, [2, 1, 1, 2, 1, 1]),  # w perturbed, s, w plain, and again
    ("squat-next_batch", {"start": 2}, [1, 1, 2, 1, 2, 1]),
    ("squat-next_batch", {"period": 3}, [2, 2, 2, 1, 2, 2]),
    ("squat-fused", {"period": 3}, [2] * 6),
]


@pytest.mark.parametrize(("name", "options", "calls"), CALLS, ids=str)
def test_step_calls_the_closure_the_documented_number_of_times(name, options, calls):
    method = BY_NAME[name]
    model, optimizer = built(method, MLP, **options)
    closure = closure_of(optimizer, model, MLP, MLP.batch(0))
    found = []
    for _ in calls:
        made = []
        optimizer.step(lambda made=made: made.append(1) or closure())
        found.append(len(made))
        assert all(p.grad is None for p in model.parameters()), "a step leaves no gradient"
    assert found == calls


@each_kind
def test_step_returns_what_the_closure_returned_in_the_first_pass(method):
    model, optimizer = built(method, MLP)
    closure = closure_of(optimizer, model, MLP, MLP.batch(0))
    for _ in range(2):
        returned = []

        def numbered(returned=returned):
            closure()
            returned.append({"call": len(returned)})
            return returned[-1]

        assert optimizer.step(numbered) is returned[0]


@each_kind
def test_step_clears_the_gradients_before_each_call(method):
    """A closure without zero_grad gives the same run; so do gradients that were left over."""
    runs = []
    for tidy in (True, False):
        model, optimizer = built(method, CONV)
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


def backward(model, number=0):
    MLP.loss(model, MLP.batch(number)).backward()


@each_perturbing
def test_perturbed_needs_gradients_of_a_first_pass(method):
    model, optimizer = built(method, MLP)
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


def test_qat_has_no_perturbed_pass():
    (method,) = (m for m in METHODS if m.name == "qat")
    model, optimizer = built(method, MLP)
    with optimizer.first_pass():
        backward(model)
    with pytest.raises(RuntimeError, match=r"QAT has no perturbed pass: run one backward, then step\(\)\."):
        optimizer.perturbed().__enter__()
    optimizer.step()


@each_kind
def test_a_step_needs_a_new_backward(method):
    model, optimizer = built(method, MLP)
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
        model, optimizer = built(method, MLP, **({} if by_hand else {"start": 9}))
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


@each_kind
@pytest.mark.parametrize("block", ["first_pass", "perturbed", "scale_phase", "latents"])
def test_no_verb_is_allowed_inside_a_block(method, block):
    if block not in verbs_of(method):
        pytest.skip("no such block")
    model, optimizer = built(method, MLP)
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


def test_the_model_refuses_its_state_dict_inside_a_perturbed_pass():
    model, optimizer = built(SAQ, MLP)
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


def test_only_squat_has_a_phase_of_the_scales():
    model, optimizer = built(SAQ, MLP)
    message = r"steps weights and scales together: {}\(\) belongs to SQuAT\."
    with pytest.raises(RuntimeError, match=message.format("scale_phase")):
        optimizer.scale_phase().__enter__()
    backward(model)
    with pytest.raises(RuntimeError, match=message.format("step_scales")):
        optimizer.step_scales()


def test_step_scales_needs_a_backward_of_its_own():
    model, optimizer = built(SQUAT, MLP)
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


@each_kind
def test_a_refused_verb_inside_a_closure_stops_the_step_cleanly(method):
    model, optimizer = built(method, MLP)
    with pytest.raises(RuntimeError, match=r"inside the block|found no gradient"):
        optimizer.step(lambda: optimizer.step())
    assert_on_grid(optimizer)
    train(optimizer, model, MLP, 1)


def test_a_step_that_is_not_due_refuses_a_perturbed_pass():
    model, optimizer = built(SAQ, MLP, start=1)
    with optimizer.first_pass():
        MLP.loss(model, MLP.batch(0)).backward()
    with pytest.raises(
        RuntimeError, match=r"step 0 is not perturbed .*: run the blocks that `optimizer\.blocks` names"
    ):
        optimizer.perturbed().__enter__()
    optimizer.step()
    assert optimizer.blocks == ("first_pass", "perturbed")


def test_a_model_that_was_moved_is_refused():
    model, optimizer = built(SAQ, MLP)
    model.to("meta")
    message = r"moved from cpu to meta \('0\.weight'\), and its latents were not: move the model first, then build"
    with pytest.raises(RuntimeError, match=message):
        optimizer.first_pass().__enter__()
    assert all(slot.latent.device.type == "cpu" for slot in optimizer._latents.slots)


def test_unwrap_finds_the_optimizer_inside_its_wrappers():
    optimizer = SAQ(SAQ.model(MLP))

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
    with pytest.raises(TypeError, match=r"LBFGS calls its closure itself: use step\(closure\)"):
        optimizer.step()
