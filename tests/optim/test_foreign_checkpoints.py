"""State dicts of something else, or torn by hand: refused by name, before anything is changed."""

import copy

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam

import qsam
from tests.models import MLP
from tests.optim.methods import METHODS, QUANTIZING, assert_same, everything, train

each_method = pytest.mark.parametrize("method", METHODS, ids=str)


def trained(method, base=Adam, steps=2):
    model = method.model(MLP)
    optimizer = method(model, base)
    train(optimizer, model, MLP, steps)
    return model, optimizer


def plain_groups(optimizer):
    return copy.deepcopy([{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups])


def newer(state):
    state["param_groups"][0]["qsam_format"] = 2
    return ValueError, r"the checkpoint has qsam_format 2; this qsam reads 1: install a newer qsam\."


def a_list(state):
    state["param_groups"] = [1, 2]
    return ValueError, r"the checkpoint's 'param_groups' is no list of groups: it is not an optimizer's state_dict\."


def no_groups(state):
    state["param_groups"] = {}
    return ValueError, r"the checkpoint's 'param_groups' is no list of groups"


def swapped(state):
    """The same parameters in another order: state would land in the wrong ones."""
    own = state["param_groups"][0]["qsam_parameters"]
    state["param_groups"][0]["qsam_parameters"] = dict(reversed(own.items()))
    return ValueError, (
        r"'0\.weight' here has the place of '4\.bias' in the checkpoint: it is of another model, or its "
        r"parameters were given in another order\."
    )


def another_shape(state):
    state["param_groups"][0]["qsam_parameters"]["2.bias"] = "11"
    return ValueError, r"'2\.bias' has shape 12 here and 11 in the checkpoint: another model\."


def another_base(state):
    state["param_groups"][0]["qsam_base_class"] = "Muon"
    return (
        ValueError,
        r"the checkpoint is of the base optimizer Muon, this one is Adam: build it as it was built then\.",
    )


def without_a_latent(state):
    del state["state"][2]["qsam_latent"]
    return ValueError, (
        r"the checkpoint has no latent of '2\.weight': its full-precision weights are lost\. "
        r"Save the whole optimizer\.state_dict\(\)\."
    )


def latent_of_another_shape(state):
    state["state"][2]["qsam_latent"] = torch.zeros(3, 3)
    return ValueError, r"a saved qsam_latent has shape \(3, 3\), its parameter \(12, 16\): another model\."


FOREIGN = [newer, a_list, no_groups, swapped, another_shape, another_base]
TORN = [without_a_latent, latent_of_another_shape]


@pytest.mark.parametrize(
    ("method", "spoil"),
    [
        pytest.param(m, spoil, id=f"{m}-{spoil.__name__}")
        for m in METHODS
        if m.name in {"sam", "qat"} or m.schedule == "next_batch"
        for spoil in (FOREIGN + TORN if m.quantizes else FOREIGN)
    ],
)
def test_a_foreign_state_dict_is_refused_and_changes_nothing(method, spoil):
    ends = []
    for disturbed in (True, False):
        model, optimizer = trained(method)
        if disturbed:
            _, other = trained(method, steps=3)
            state = copy.deepcopy(other.state_dict())
            kind, message = spoil(state)
            before, groups = everything(optimizer, model), plain_groups(optimizer)
            with pytest.raises(kind, match=message):
                optimizer.load_state_dict(state)
            assert_same(everything(optimizer, model), before)
            assert plain_groups(optimizer) == groups
        train(optimizer, model, MLP, 1, start=2)
        ends.append(everything(optimizer, model))
    assert_same(*ends)


@each_method
@pytest.mark.parametrize("thing", [None, [1, 2], torch.zeros(3)], ids=["None", "a list", "a tensor"])
def test_what_is_no_dict_is_refused(method, thing):
    _, optimizer = trained(method, steps=0)
    with pytest.raises(
        TypeError,
        match=rf"`state_dict` must be a dict, what optimizer\.state_dict\(\) returned, got {type(thing).__name__}\.",
    ):
        optimizer.load_state_dict(thing)


@pytest.mark.parametrize("method", QUANTIZING, ids=str)
def test_a_checkpoint_of_another_model_with_equal_quantized_weights_is_refused(method):
    """Only a float parameter differs: without the names it would be found out in the middle of the next step."""

    def build(width):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(width, 8), nn.Flatten(), nn.Linear(16, 4))
        qsam.quantize_(model, activations=None)
        return method(model)

    with pytest.raises(
        ValueError, match=r"'0\.weight' has shape 10x8 here and 12x8 in the checkpoint: another model\."
    ):
        build(10).load_state_dict(build(12).state_dict())


@each_method
def test_a_checkpoint_without_the_newer_entries_still_loads(method):
    """Those of before the format was written into the optimizer's state."""
    model, optimizer = trained(method)
    state = copy.deepcopy(optimizer.state_dict())
    for key in ("qsam_format", "qsam_parameters", "qsam_base_class"):
        del state["param_groups"][0][key]
    before = everything(optimizer, model)
    optimizer.load_state_dict(state)
    assert_same(everything(optimizer, model), before)


@each_method
def test_the_names_follow_a_group_that_is_added(method):
    model = method.model(MLP)
    extra = model[4].bias
    extra.requires_grad_(False)
    optimizer = method(model, SGD)
    extra.requires_grad_(True)
    optimizer.add_param_group({"params": [extra]})
    assert list(optimizer.state_dict()["param_groups"][0]["qsam_parameters"])[-1] == "4.bias"
    optimizer.load_state_dict(optimizer.state_dict())
