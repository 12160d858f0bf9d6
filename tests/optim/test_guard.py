"""Contract 8: if somebody else writes a weight or its scale, the next step says so; equal values are no alarm."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from tests.models import MLP, TIED
from tests.optim.methods import QUANTIZING, assert_on_grid, assert_same, closure_of, latents, train

each_method = pytest.mark.parametrize("method", QUANTIZING, ids=str)
ALARM = r"was written by somebody else since the last step.*optimizer\.sync_latents\(\) to take the present weights"


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


@each_method
@pytest.mark.parametrize("write", WRITES, ids=lambda write: write.__name__)
def test_a_foreign_write_stops_the_next_step(method, write):
    model, optimizer = build(method)
    write(model)
    with pytest.raises(RuntimeError, match=ALARM):
        train(optimizer, model, MLP, 1, start=1)


@each_method
@pytest.mark.parametrize("verb", ["first_pass", "latents"])
def test_a_foreign_write_stops_the_blocks(method, verb):
    model, optimizer = build(method)
    in_place(model)
    with pytest.raises(RuntimeError, match=ALARM):
        getattr(optimizer, verb)().__enter__()


@each_method
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


@each_method
def test_the_alarm_names_the_weight(method):
    model, optimizer = build(method)
    one_entry(model)
    with pytest.raises(RuntimeError, match=r"the quantized weight '2\.weight' was written"):
        train(optimizer, model, MLP, 1, start=1)
    model, optimizer = build(method)
    foreach(model)
    with pytest.raises(RuntimeError, match=r"the quantized weight '0\.weight' and 2 more was written"):
        train(optimizer, model, MLP, 1, start=1)


@each_method
def test_a_write_through_data_is_seen_within_two_steps(method):
    """It leaves no trace but the value, which is compared where Q(w) is computed anyway."""
    model, optimizer = build(method)
    model[0].weight.data.mul_(1.1)
    with pytest.raises(RuntimeError, match=ALARM):
        train(optimizer, model, MLP, 2 if method.schedule != "next_batch" else 4, start=1)


@each_method
@pytest.mark.parametrize("options", [{}, {"every": 2}], ids=["", "every"])
def test_a_weight_without_gradient_is_looked_at_too(method, options):
    if options and not method.perturbs:
        pytest.skip("not an option of this method")
    model = MLP.quantized()
    model[2].weight.requires_grad_(False)
    optimizer = method(model, **options)
    train(optimizer, model, MLP, 2)
    model[2].weight.data.mul_(1.1)
    with pytest.raises(RuntimeError, match=r"the quantized weight '2\.weight' was written"):
        train(optimizer, model, MLP, 4, start=2)


@each_method
@pytest.mark.parametrize(
    "write", [w for w in WRITES if w not in (assign, new_parameter, scale)], ids=lambda write: write.__name__
)
@pytest.mark.long
def test_sync_latents_takes_the_written_weights(method, write):
    model, optimizer = build(method)
    write(model)
    written = model[0].weight.detach().clone()
    optimizer.sync_latents()
    assert_on_grid(optimizer)
    assert torch.equal(latents(optimizer, model)["0.weight"], written)
    train(optimizer, model, MLP, 3, start=1)
    assert_on_grid(optimizer)


UNOWNED = r"the quantized weight '0\.weight' has a gradient, but its Parameter is in no group"


@each_method
@pytest.mark.parametrize("replace", [assign, new_parameter], ids=lambda write: write.__name__)
def test_a_replaced_parameter_that_no_group_holds_is_refused(method, replace):
    """The base would go on stepping the old one, in silence."""
    model, optimizer = build(method)
    replace(model)
    optimizer.sync_latents()
    with pytest.raises(RuntimeError, match=UNOWNED if method.schedule != "next_batch" else UNOWNED + "|no gradient"):
        train(optimizer, model, MLP, 2, start=1)
    assert_on_grid(optimizer)


@each_method
def test_a_replaced_parameter_in_a_rewritten_group_trains_on(method):
    """Accelerate and FSDP rewrite the groups after they have replaced the Parameters."""
    ends = []
    for replaces in (True, False):
        model, optimizer = build(method, steps=2)
        if replaces:
            new = nn.Parameter(model[0].weight.detach().clone())
            for group in optimizer.param_groups:
                group["params"][:] = [new if p is model[0].weight else p for p in group["params"]]
            model[0].weight = new
        train(optimizer, model, MLP, 4, start=2)
        ends.append(latents(optimizer, model))
    assert_same(*ends)


@each_method
def test_an_unfrozen_weight_that_no_group_holds_is_refused(method):
    model = MLP.quantized()
    model[0].weight.requires_grad_(False)
    optimizer = method(model)
    train(optimizer, model, MLP, 2)
    model[0].weight.requires_grad_(True)
    with pytest.raises(RuntimeError, match=UNOWNED):
        train(optimizer, model, MLP, 1)
    optimizer.add_param_group({"params": [model[0].weight]})
    before = latents(optimizer, model)["0.weight"]
    train(optimizer, model, MLP, 2)
    assert not torch.equal(latents(optimizer, model)["0.weight"], before)


@each_method
def test_sync_latents_forgets_a_late_alarm(method):
    model, optimizer = build(method)
    model[0].weight.data.mul_(1.1)
    optimizer.sync_latents()
    train(optimizer, model, MLP, 4, start=1)


@each_method
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


@each_method
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_cast_model_is_no_alarm(method, dtype):
    model, optimizer = build(method)
    before = {slot.path: slot.latent.detach().clone() for slot in optimizer._latents.slots}
    model.to(dtype)
    optimizer._latents.check()
    assert_on_grid(optimizer)
    assert_same({slot.path: slot.latent.detach() for slot in optimizer._latents.slots}, before)


@each_method
def test_a_cast_there_and_back_is_an_alarm(method):
    """The values have changed: half precision has dropped digits."""
    model, optimizer = build(method)
    model.half().float()
    with pytest.raises(RuntimeError, match=ALARM):
        train(optimizer, model, MLP, 1, start=1)


@each_method
def test_ordinary_use_is_no_alarm(method):
    """eval, no_grad forwards, state_dict, requires_grad_, copies, gradients of others."""
    model, optimizer = build(method, TIED)
    model.eval()
    with torch.no_grad():
        model(TIED.batch(0)["x"])
    model.train()
    model.state_dict()
    copy.deepcopy(model)
    model.requires_grad_(True)
    train(optimizer, model, TIED, 2)
    assert not any(slot.quantizer.scale.requires_grad for slot in optimizer._latents.slots)
    assert_on_grid(optimizer)


@each_method
def test_the_alarm_leaves_the_latents_alone(method):
    model, optimizer = build(method)
    before = {slot.path: slot.latent.detach().clone() for slot in optimizer._latents.slots}
    in_place(model)
    with pytest.raises(RuntimeError, match=ALARM):
        optimizer.step(closure_of(optimizer, model, MLP, MLP.batch(1)))
    assert_same({slot.path: slot.latent.detach() for slot in optimizer._latents.slots}, before)
