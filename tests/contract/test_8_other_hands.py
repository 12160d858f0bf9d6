"""Contract 8: if somebody else writes a weight or its scale, or takes the quantizers off, the next step says so."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import qsam
from tests.methods import (
    FUSED,
    QAT,
    SAQ,
    SQUAT,
    assert_on_grid,
    assert_same,
    closure_of,
    each_quantizing,
    everything,
    latents,
    train,
)
from tests.models import MLP

ALARM = r"was written by other code since the last step.*optimizer\.sync_latents\(\) to take the present weights"


def build(method, task=MLP, steps=1):
    model = task.quantized()
    optimizer = method(model)
    train(optimizer, model, task, steps)
    return model, optimizer


def in_place(model):
    with torch.no_grad():
        model[0].weight.mul_(1.1)


def one_entry(model):
    with torch.no_grad():
        model[2].weight[0, 0] += 0.01


def load(model):
    state = model.state_dict()
    state["0.weight"] = state["0.weight"] + 0.01
    model.load_state_dict(state)


def assign(model):
    state = {name: t.clone() for name, t in model.state_dict().items()}
    state["0.weight"] += 0.01
    model.load_state_dict(state, assign=True)


def inference(model):
    with torch.inference_mode():
        model[0].weight.add_(0.01)


def foreach(model):
    torch._foreach_mul_([p.detach() for p in model.parameters()], 0.9)


def from_vector(model):
    vector_to_parameters(parameters_to_vector(model.parameters()) * 1.01, model.parameters())


def new_data(model):
    model[0].weight.data = model[0].weight.data * 1.1


def new_parameter(model):
    model[0].weight = nn.Parameter(model[0].weight.detach() * 1.1)


def scale(model):
    with torch.no_grad():
        model[0].weight_quantizer.scale.mul_(1.1)


WRITES = [in_place, one_entry, load, assign, inference, foreach, from_vector, new_data, new_parameter, scale]
ONE_FOR_THE_OTHERS = [(QAT, in_place), (SQUAT, scale), (FUSED, one_entry)]


@pytest.mark.parametrize(("method", "write"), [*((SAQ, write) for write in WRITES), *ONE_FOR_THE_OTHERS])
def test_a_foreign_write_stops_the_next_step(method, write):
    model, optimizer = build(method)
    write(model)
    with pytest.raises(RuntimeError, match=ALARM):
        train(optimizer, model, MLP, 1, start=1)


@each_quantizing
@pytest.mark.parametrize("verb", ["first_pass", "latents"])
def test_a_foreign_write_stops_the_blocks(method, verb):
    model, optimizer = build(method)
    in_place(model)
    with pytest.raises(RuntimeError, match=ALARM):
        getattr(optimizer, verb)().__enter__()


@each_quantizing
def test_the_alarm_leaves_what_was_written(method):
    """Also where the first pass of the step is the perturbed one: ``sync_latents`` takes it from there."""
    model = MLP.quantized()
    once = method.perturbs and method.schedule != "fused"  # a fused schedule wants a first pass
    optimizer = method(model, **({"direction": "momentum"} if once else {}))
    train(optimizer, model, MLP, 2)
    in_place(model)
    written = model[0].weight.detach().clone()
    with pytest.raises(RuntimeError, match=ALARM):
        train(optimizer, model, MLP, 1, start=2)
    assert torch.equal(model[0].weight, written)
    if optimizer.blocks == ("perturbed",):
        with pytest.raises(RuntimeError, match=ALARM):
            optimizer.perturbed().__enter__()
        assert torch.equal(model[0].weight, written)


def test_the_alarm_names_the_weight():
    model, optimizer = build(SAQ)
    one_entry(model)
    with pytest.raises(RuntimeError, match=r"the quantized weight '2\.weight' was written"):
        train(optimizer, model, MLP, 1, start=1)
    model, optimizer = build(SAQ)
    foreach(model)
    with pytest.raises(RuntimeError, match=r"the quantized weight '0\.weight' and 2 more was written"):
        train(optimizer, model, MLP, 1, start=1)


@each_quantizing
def test_a_write_through_data_is_seen_within_two_steps(method):
    """It leaves no trace but the value, which is compared where Q(w) is computed anyway."""
    model, optimizer = build(method)
    model[0].weight.data.mul_(1.1)
    with pytest.raises(RuntimeError, match=ALARM):
        train(optimizer, model, MLP, 2, start=1)


@pytest.mark.parametrize(("method", "options"), [(QAT, {}), (SAQ, {"every": 2}), (SQUAT, {})], ids=str)
def test_a_weight_without_gradient_is_looked_at_too(method, options):
    model = MLP.quantized()
    model[2].weight.requires_grad_(False)
    optimizer = method(model, **options)
    train(optimizer, model, MLP, 2)
    model[2].weight.data.mul_(1.1)
    with pytest.raises(RuntimeError, match=r"the quantized weight '2\.weight' was written"):
        train(optimizer, model, MLP, 4, start=2)


@pytest.mark.parametrize("write", [w for w in WRITES if w not in (assign, new_parameter, scale)])
def test_sync_latents_takes_the_written_weights(write):
    model, optimizer = build(SAQ)
    write(model)
    written = model[0].weight.detach().clone()
    optimizer.sync_latents()
    assert_on_grid(optimizer)
    assert torch.equal(latents(optimizer, model)["0.weight"], written)
    train(optimizer, model, MLP, 3, start=1)
    assert_on_grid(optimizer)


UNOWNED = r"the quantized weight '0\.weight' has a gradient, but its Parameter is in no group"


@pytest.mark.parametrize("method", [SAQ, SQUAT], ids=str)
@pytest.mark.parametrize("replace", [assign, new_parameter], ids=lambda write: write.__name__)
def test_a_replaced_parameter_that_no_group_holds_is_refused(method, replace):
    """The base would go on stepping the old one, in silence."""
    model, optimizer = build(method)
    replace(model)
    optimizer.sync_latents()
    with pytest.raises(RuntimeError, match=UNOWNED):
        train(optimizer, model, MLP, 2, start=1)
    assert_on_grid(optimizer)


def test_a_replaced_parameter_in_a_rewritten_group_trains_on():
    """Accelerate and FSDP rewrite the groups after they have replaced the Parameters."""
    ends = []
    for replaces in (True, False):
        model, optimizer = build(SAQ, steps=2)
        if replaces:
            new = nn.Parameter(model[0].weight.detach().clone())
            for group in optimizer.param_groups:
                group["params"][:] = [new if p is model[0].weight else p for p in group["params"]]
            model[0].weight = new
        train(optimizer, model, MLP, 4, start=2)
        ends.append(latents(optimizer, model))
    assert_same(*ends)


def test_an_unfrozen_weight_that_no_group_holds_is_refused():
    model = MLP.quantized()
    model[0].weight.requires_grad_(False)
    optimizer = SAQ(model)
    train(optimizer, model, MLP, 2)
    model[0].weight.requires_grad_(True)
    with pytest.raises(RuntimeError, match=UNOWNED):
        train(optimizer, model, MLP, 1)
    optimizer.add_param_group({"params": [model[0].weight]})
    before = latents(optimizer, model)["0.weight"]
    train(optimizer, model, MLP, 2)
    assert not torch.equal(latents(optimizer, model)["0.weight"], before)


@each_quantizing
def test_equal_values_are_no_alarm(method):
    """DDP broadcasts, load_state_dict of the own state, and copies write the same values again."""
    ends = []
    for rewrites in (True, False):
        model, optimizer = build(method)
        if rewrites:
            model.load_state_dict(copy.deepcopy(model.state_dict()))
            with torch.no_grad():
                for p in model.parameters():
                    p.copy_(p.clone())
        train(optimizer, model, MLP, 3, start=1)
        ends.append(latents(optimizer, model))
    assert_same(*ends)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_cast_model_is_no_alarm(dtype):
    model, optimizer = build(SAQ)
    before = {slot.path: slot.latent.detach().clone() for slot in optimizer._latents.slots}
    model.to(dtype)
    optimizer._latents.check()
    assert_on_grid(optimizer)
    assert_same({slot.path: slot.latent.detach() for slot in optimizer._latents.slots}, before)


GONE = (
    r"the quantizers that this optimizer was built on have been taken off its model \(dequantize_\): it can no longer be "
    r"used\. Build a new one; to keep its full-precision weights, call qsam\.dequantize_\(model, optimizer\)"
)


def after_two_steps(method, **options):
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


@each_quantizing
@pytest.mark.parametrize(
    "again", [None, {"bits": 2, "activations": None}, {"activations": None}], ids=["float", "other bits", "the same"]
)
def test_an_optimizer_whose_quantizers_were_taken_off_refuses_every_verb(method, again):
    model, optimizer = after_two_steps(method)
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


@pytest.mark.parametrize("method", [QAT, SAQ], ids=str)
def test_nothing_of_an_optimizer_stays_on_the_model(method):
    model, optimizer = after_two_steps(method)
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
    model, optimizer = after_two_steps(SQUAT)
    before = everything(optimizer, model)
    with optimizer.first_pass():
        MLP.loss(model, MLP.batch(0)).backward()
    with (
        optimizer.perturbed(),
        pytest.raises(RuntimeError, match=r"dequantize_\(\) inside the block perturbed\(\): leave the block first\."),
    ):
        qsam.dequantize_(model, *([optimizer] if given else []))
    assert_same(everything(optimizer, model), before)
