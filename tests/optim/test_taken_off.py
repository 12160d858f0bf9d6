"""An optimizer whose quantizers were taken off its model can do no harm, and leaves nothing behind."""

import copy

import pytest
import torch

import qsam
from tests.models import MLP
from tests.optim.methods import QUANTIZING, assert_on_grid, assert_same, closure_of, everything, latents, train

each_method = pytest.mark.parametrize("method", QUANTIZING, ids=str)
GONE = (
    r"the quantizers that this optimizer was built on have been taken off its model \(dequantize_\): it can no longer be "
    r"used\. Build a new one; to keep its full-precision weights, call qsam\.dequantize_\(model, optimizer\)"
)


def built(method, **options):
    model = MLP.quantized(**options)
    optimizer = method(model)
    train(optimizer, model, MLP, 2)
    return model, optimizer


def snapshot(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def verbs(optimizer, model):
    closure = closure_of(optimizer, model, MLP, MLP.batch(0))

    def block(context):
        with context:
            pass

    def plain_step():
        closure()
        optimizer.step()

    return {
        "step(closure)": lambda: optimizer.step(closure),
        "step": plain_step,
        "first_pass": lambda: block(optimizer.first_pass()),
        "perturbed": lambda: block(optimizer.perturbed()),
        "scale_phase": lambda: block(optimizer.scale_phase()),
        "latents": lambda: block(optimizer.latents()),
        "sync_latents": optimizer.sync_latents,
        "state_dict": optimizer.state_dict,
        "load_state_dict": lambda: optimizer.load_state_dict({}),
        "diagnostics": optimizer.diagnostics,
        "sharpness": lambda: qsam.sharpness(optimizer, closure, progress=False),
    }


@each_method
@pytest.mark.parametrize(
    "again", [None, {"bits": 2, "activations": None}, {"activations": None}], ids=["float", "other bits", "the same"]
)
def test_an_optimizer_whose_quantizers_were_taken_off_refuses_every_verb(method, again):
    model, optimizer = built(method)
    qsam.dequantize_(model)
    if again is not None:
        qsam.quantize_(model, **again)
    before = snapshot(model)
    for name, verb in verbs(optimizer, model).items():
        if name == "perturbed" and not method.perturbs:
            continue  # QAT has none
        with pytest.raises(RuntimeError, match=GONE):
            verb()
        assert_same(snapshot(model), before)


@each_method
def test_after_dequantize_with_its_optimizer_it_can_no_longer_be_used_either(method):
    model, optimizer = built(method)
    w = latents(optimizer, model)
    qsam.dequantize_(model, optimizer)
    assert_same({name: p.detach() for name, p in model.named_parameters()}, w)
    with pytest.raises(RuntimeError, match=GONE):
        train(optimizer, model, MLP, 1)


@pytest.mark.parametrize("which", ["weight", "input"])
def test_a_single_quantizer_that_was_replaced_is_seen(which):
    model, optimizer = built(QUANTIZING[0])
    setattr(model[2], f"{which}_quantizer", copy.deepcopy(getattr(model[2], f"{which}_quantizer")))
    with pytest.raises(RuntimeError, match=GONE):
        train(optimizer, model, MLP, 1)


@each_method
def test_nothing_of_an_optimizer_stays_on_the_model(method):
    model, optimizer = built(method)
    assert not model._state_dict_pre_hooks
    if method.perturbs:
        with optimizer.first_pass():
            MLP.loss(model, MLP.batch(0)).backward()
        with optimizer.perturbed():
            assert len(model._state_dict_pre_hooks) == 1
            MLP.loss(model, MLP.batch(0)).backward()
    assert not model._state_dict_pre_hooks
    del optimizer
    model.zero_grad()
    second = method(model)
    with pytest.warns(UserWarning, match="on the quantization grid already"):
        train(second, model, MLP, 1)
    assert_on_grid(second)


@pytest.mark.parametrize("given", [True, False])
def test_quantizers_are_not_taken_off_inside_a_block(given):
    (method,) = (m for m in QUANTIZING if m.schedule == "same_batch")
    model, optimizer = built(method)
    before = everything(optimizer, model)
    with optimizer.first_pass():
        MLP.loss(model, MLP.batch(0)).backward()
    with (
        optimizer.perturbed(),
        pytest.raises(RuntimeError, match=r"dequantize_\(\) inside the block perturbed\(\): leave the block first\."),
    ):
        qsam.dequantize_(model, *([optimizer] if given else []))
    assert_same(everything(optimizer, model), before)


def test_a_copy_of_both_is_attached_to_its_own_quantizers():
    model, optimizer = built(QUANTIZING[0])
    model_copy, copied = copy.deepcopy((model, optimizer))
    qsam.dequantize_(model)
    train(copied, model_copy, MLP, 1)
    assert_on_grid(copied)
    assert not torch.equal(model_copy[0].weight, model[0].weight)
