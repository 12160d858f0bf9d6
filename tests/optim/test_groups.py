"""Contract 1: the groups, whatever the base is: class, instance or factory."""

import functools
import warnings

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adadelta, Adam, AdamW

import qsam
from tests.models import MLP, TIED
from tests.optim.methods import (
    METHODS,
    PERTURBING,
    QUANTIZING,
    assert_on_grid,
    assert_same,
    everything,
    latents,
    scales_of,
    train,
)

each_method = pytest.mark.parametrize("method", METHODS, ids=str)
each_quantizing = pytest.mark.parametrize("method", QUANTIZING, ids=str)


def own(model):
    """Return the model's parameters without the scales."""
    scales = scales_of(model)
    return [p for name, p in model.named_parameters() if name not in scales]


def ids(params):
    return [id(p) for p in params]


@each_method
def test_the_base_s_groups_come_first_then_the_scales(method):
    model = method.model(MLP)
    optimizer = method(model)
    assert isinstance(optimizer, torch.optim.Optimizer)
    first, *others = optimizer.param_groups
    assert ids(first["params"]) == ids(own(model))
    assert [group["qsam_scales"] for group in others] == (["weights", "inputs"] if method.quantizes else [])
    listed = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(listed) == sorted(ids(model.parameters()))
    assert {id(s) for group in others for s in group["params"]} == {id(p) for p in model.parameters()} - set(
        ids(own(model))
    )


@each_method
def test_every_entry_of_ours_has_the_prefix(method):
    optimizer = method(method.model(MLP))
    bare = set(AdamW([nn.Parameter(torch.zeros(1))]).param_groups[0])
    for group in optimizer.param_groups:
        assert {key for key in group if not key.startswith("qsam_")} - bare <= {"normalized"}


@each_method
def test_the_groups_are_one_live_list(method):
    model = method.model(MLP)
    optimizer = method(model)
    groups = optimizer.param_groups
    train(optimizer, model, MLP, 2)
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.param_groups is groups
    groups[0]["lr"] = 0.0
    groups[0]["weight_decay"] = 0.0
    before = latents(optimizer, model)
    train(optimizer, model, MLP, 1)
    assert_same(latents(optimizer, model), before)


@each_method
def test_class_instance_and_factory_are_the_same(method):
    ends = []
    for kind in ("class", "instance", "partial", "factory"):
        model = method.model(MLP)
        if kind == "class":
            optimizer = method.cls(model, Adam, lr=1e-3, betas=(0.8, 0.9), **schedule(method))
        elif kind == "instance":
            optimizer = method(model, Adam(own(model), lr=1e-3, betas=(0.8, 0.9)))
        elif kind == "partial":
            optimizer = method(model, functools.partial(Adam, betas=(0.8, 0.9)), lr=1e-3)
        else:
            optimizer = method.cls(model, lambda params: Adam(params, lr=1e-3, betas=(0.8, 0.9)), **schedule(method))
        train(optimizer, model, MLP, 4)
        ends.append(everything(optimizer, model))
    for end in ends[1:]:
        assert_same(end, ends[0])


def schedule(method):
    return {} if method.schedule is None else {"schedule": method.schedule}


@each_quantizing
def test_scales_in_the_groups_of_an_instance_are_moved_and_that_is_said_once(method):
    ends = []
    for careless in (True, False):
        model = method.model(MLP)
        if careless:
            base = AdamW(model.parameters(), lr=1e-3)  # after quantize_: the scales are among them
            with pytest.warns(
                UserWarning, match=r"6 scales were in the base optimizer's groups and are moved to the scale optimizer"
            ) as caught:
                optimizer = method(model, base)
            assert len(caught) == 1
        else:
            optimizer = method(model, AdamW(own(model), lr=1e-3))
        train(optimizer, model, MLP, 4)
        ends.append(everything(optimizer, model))
    assert_same(*ends)


@each_method
def test_groups_with_settings_of_their_own(method):
    model = method.model(MLP)
    matrices, vectors = ([p for p in own(model) if p.dim() == d] for d in (2, 1))
    groups = [{"params": matrices, "lr": 0.0, "weight_decay": 0.0}, {"params": vectors, "lr": 1e-2}]
    optimizer = method(model, params=groups)
    before = latents(optimizer, model)
    train(optimizer, model, MLP, 2)
    after = latents(optimizer, model)
    assert {name for name in after if torch.equal(after[name], before[name])} == {"0.weight", "2.weight", "4.weight"}


@each_method
def test_trainable_parameters_that_nobody_owns_are_named(method):
    model = method.model(MLP)
    matrices = [p for p in own(model) if p.dim() == 2]
    message = r"3 trainable parameters are in no group of the base optimizer and will not move: \['0\.bias', '2\.bias', '4\.bias'\]"
    with pytest.warns(UserWarning, match=message) as caught:
        optimizer = method(model, params=matrices)
    assert len(caught) == 1
    before = latents(optimizer, model)
    train(optimizer, model, MLP, 2)
    assert torch.equal(latents(optimizer, model)["0.bias"], before["0.bias"])


@each_quantizing
def test_a_quantized_weight_that_nobody_owns_is_refused(method):
    model = method.model(MLP)
    with pytest.raises(
        RuntimeError,
        match=r"the quantized weight '2\.weight' is in no parameter group of the base optimizer: add it, or freeze it",
    ):
        method(model, params=[p for p in own(model) if p is not model[2].weight])
    weights = MLP.build().state_dict()
    assert_same({k: v for k, v in model.state_dict().items() if k in weights}, weights)
    method(model)  # the failed one owns nothing


@each_quantizing
def test_a_frozen_weight_stays_and_its_scale_too(method):
    model = method.model(MLP)
    model[2].weight.requires_grad_(False)
    optimizer = method(model)
    w, s = latents(optimizer, model)["2.weight"], model[2].weight_quantizer.scale.detach().clone()
    p = model[2].weight.detach().clone()
    train(optimizer, model, MLP, 4)
    assert torch.equal(latents(optimizer, model)["2.weight"], w)
    assert torch.equal(model[2].weight_quantizer.scale, s)
    assert torch.equal(model[2].weight, p)
    assert_on_grid(optimizer)


@each_method
def test_a_tied_weight_steps_once(method):
    """With one step of plain SGD the latent moves by lr times the sum over both uses, once."""
    model = method.model(TIED, activations=None)
    options = {"rho": 0.0} if method.perturbs else {}
    optimizer = method(model, SGD, lr=0.1, ste="identity", scale_lr=0.0, **options)
    before = latents(optimizer, model)["a.weight"]
    TIED.loss(model, TIED.batch(0)).backward()
    gradient = model.a.weight.grad.clone()
    optimizer.zero_grad()
    train(optimizer, model, TIED, 1)
    assert model.a.weight is model.b.weight
    assert torch.equal(latents(optimizer, model)["a.weight"], before.sub(gradient, alpha=0.1))
    assert sum(slot.parameter is model.a.weight for slot in optimizer._latents.slots) == method.quantizes


@each_method
def test_a_group_may_be_added(method):
    """A frozen layer joins later, in the order of arrival, with its latent and its scale."""
    model = method.model(MLP)
    for p in (model[2].weight, model[2].bias):
        p.requires_grad_(False)
    optimizer = method(model)
    train(optimizer, model, MLP, 2)
    added = [model[2].weight, model[2].bias]
    for p in added:
        p.requires_grad_(True)
    groups = len(optimizer.param_groups)
    optimizer.add_param_group({"params": added, "lr": 5e-3, "rho": 0.2})
    assert ids(optimizer.param_groups[groups]["params"]) == ids(added)
    assert optimizer.param_groups[groups]["qsam_rho"] == (0.2 if method.perturbs else 0.0)
    before = latents(optimizer, model)
    train(optimizer, model, MLP, 2, start=2)
    after = latents(optimizer, model)
    assert not any(torch.equal(after[name], before[name]) for name in ("0.weight", "2.weight", "2.bias"))
    assert_on_grid(optimizer)
    state = optimizer.state_dict()
    train(optimizer, model, MLP, 2, start=4)
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[groups]["lr"] == 5e-3
    with pytest.raises(ValueError, match="some parameters appear in more than one parameter group"):
        optimizer.add_param_group({"params": [model[2].weight]})


@each_quantizing
@pytest.mark.parametrize("named", [False, True], ids=["parameters", "named"])
def test_scales_in_an_added_group_stay_with_the_scale_optimizer_and_that_is_said(method, named):
    """``layer.parameters()`` after quantize_ holds the scales of the layer's weight and input too."""
    ends = []
    for careless in (True, False):
        model = method.model(MLP)
        layer = model[2].requires_grad_(False)
        given = (lambda m: m.named_parameters()) if named else (lambda m: m.parameters())
        first = [item for child in (model[0], model[4]) for item in given(child)]
        with pytest.warns(UserWarning, match="4 scales were in the base optimizer's groups and are moved"):
            optimizer = method(model, params=first)
        layer.requires_grad_(True)
        scales = ids([layer.weight_quantizer.scale, layer.input_quantizer.scale])
        added = [item for item in given(layer) if careless or id(item[1] if named else item) not in scales]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.add_param_group({"params": iter(added), "lr": 1e-2})
        assert [str(w.message)[:12] for w in caught] == (["2 scales were"[:12]] if careless else [])
        assert all(w.filename == __file__ for w in caught)
        assert ids(optimizer.param_groups[-1]["params"]) == ids([layer.weight, layer.bias])
        assert optimizer.param_groups[-1].get("param_names") == (["weight", "bias"] if named else None)
        listed = [id(p) for group in optimizer.param_groups for p in group["params"]]
        assert len(listed) == len(set(listed))
        train(optimizer, model, MLP, 4)
        ends.append(everything(optimizer, model))
        optimizer.load_state_dict(optimizer.state_dict())
    assert_same(*ends)


def test_a_scale_alone_is_no_group_of_the_base():
    model = MLP.quantized()
    optimizer = qsam.QAT(model, AdamW)
    with pytest.warns(UserWarning, match="1 scales were in the base optimizer's groups"):
        optimizer.add_param_group({"params": model[2].weight_quantizer.scale})
    assert not optimizer.param_groups[-1]["params"]
    train(optimizer, model, MLP, 1)


@each_quantizing
def test_scales_among_named_parameters_are_moved_with_their_names(method):
    model = method.model(MLP)
    with pytest.warns(UserWarning, match="6 scales were in the base optimizer's groups and are moved"):
        optimizer = method(model, params=model.named_parameters())
    group = optimizer.param_groups[0]
    assert group["param_names"] == ["0.weight", "0.bias", "2.weight", "2.bias", "4.weight", "4.bias"]
    assert ids(group["params"]) == ids(own(model))
    train(optimizer, model, MLP, 2)
    optimizer.load_state_dict(optimizer.state_dict())


@each_method
def test_a_base_with_a_rho_of_its_own_keeps_it(method):
    """Adadelta's rho is a decay, not a radius."""
    model = method.model(MLP)
    optimizer = method(model, Adadelta(own(model), rho=0.7))
    assert optimizer.param_groups[0]["rho"] == 0.7
    train(optimizer, model, MLP, 2)
    if method.perturbs:
        assert optimizer.param_groups[0]["qsam_rho"] == 0.1


@each_method
def test_an_instance_that_has_stepped_keeps_its_moments(method):
    """Wrapping in mid-run: the state moves to the latents."""
    model = method.model(MLP)
    base = AdamW(own(model), lr=1e-3)
    MLP.loss(model, MLP.batch(0)).backward()
    base.step()
    moments = {id(p): base.state[p]["exp_avg"].clone() for p in own(model)}
    for p in model.parameters():
        p.grad = None
    optimizer = method(model, base)
    assert all(torch.equal(optimizer.state[p]["exp_avg"], moments[id(p)]) for p in own(model))
    optimizer.load_state_dict(optimizer.state_dict())
    train(optimizer, model, MLP, 1)
    assert all(int(optimizer.state[p]["step"]) == 2 for p in own(model))


@each_method
def test_a_module_whose_name_ends_in_quantizer_trains_like_any_other(method):
    """Only qsam's own quantizers hold scales."""

    class Vector(nn.Module):
        def __init__(self):
            super().__init__()
            self.vector_quantizer = nn.Linear(8, 8)
            self.head = nn.Linear(8, 4)

        def forward(self, x):
            return self.head(self.vector_quantizer(x))

    torch.manual_seed(0)
    model = Vector()
    if method.quantizes:
        qsam.quantize_(model, activations=None)
    optimizer = method(model, **({"perturb": "all", "rho": 0.1} if method.perturbs else {}))
    before = latents(optimizer, model)
    with optimizer.first_pass():
        MLP.loss(model, MLP.batch(0)).backward()
    if method.perturbs:
        biases = model.vector_quantizer.bias.detach().clone()
        with optimizer.perturbed():
            assert not torch.equal(model.vector_quantizer.bias, biases)
    optimizer.zero_grad()
    train(optimizer, model, MLP, 1)
    after = latents(optimizer, model)
    assert not any(torch.equal(after[name], before[name]) for name in after)


@each_method
def test_options_reach_the_base(method):
    optimizer = method(method.model(MLP), SGD, lr=0.5, momentum=0.3, nesterov=True, dampening=0)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["momentum"], group["nesterov"]) == (0.5, 0.3, True)
    assert optimizer.defaults["momentum"] == 0.3


# --- one owner -----------------------------------------------------------------------------------------------------


@each_quantizing
def test_a_second_optimizer_is_refused_and_names_the_way_out(method):
    model = method.model(MLP)
    optimizer = method(model)
    before = everything(optimizer, model)
    with pytest.raises(
        RuntimeError,
        match=r"another qsam optimizer owns the weights of this model: call its release\(\) first, which hands the model "
        r"over with its scales and latents, or qsam\.dequantize_\(model, optimizer\), which takes the quantizers off",
    ):
        method(model)
    assert_same(everything(optimizer, model), before)
    with pytest.raises(
        RuntimeError, match=r"the model is quantized already: call qsam\.dequantize_\(model, optimizer\) first"
    ):
        qsam.quantize_(model)
    train(optimizer, model, MLP, 1)


@each_quantizing
def test_dequantize_puts_the_latents_back_and_takes_everything_off(method):
    model = MLP.build()
    keys, hooks = list(model.state_dict()), [len(m._forward_pre_hooks) for m in model.modules()]
    optimizer = method(model)
    train(optimizer, model, MLP, 3)
    expected = latents(optimizer, model)
    qsam.dequantize_(model, optimizer)
    assert list(model.state_dict()) == keys
    assert [len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert not model._state_dict_pre_hooks
    assert_same(model.state_dict(), expected)
    again = method(model)
    train(again, model, MLP, 1)


@each_quantizing
def test_dequantize_wants_the_owner(method):
    model, other = method.model(MLP), method.model(MLP)
    optimizer, stranger = method(model), method(other)
    with pytest.raises(RuntimeError, match="does not own the model's weights"):
        qsam.dequantize_(model, stranger)
    train(optimizer, model, MLP, 1)


@each_quantizing
@pytest.mark.long
def test_an_optimizer_on_weights_that_were_rounded_says_so(method):
    model = method.model(MLP)
    optimizer = method(model)
    train(optimizer, model, MLP, 1)
    saved = optimizer.state_dict()
    del optimizer
    optimizer = method(model)
    with pytest.warns(
        UserWarning,
        match=r"the model's weights are on the quantization grid already: training starts from rounded weights",
    ):
        train(optimizer, model, MLP, 1)
    train(optimizer, model, MLP, 1)
    del optimizer
    resumed = method(model)
    resumed.load_state_dict(saved)  # it brings the full-precision weights: there is nothing to say
    train(resumed, model, MLP, 1)


def test_sam_refuses_a_quantized_model():
    with pytest.raises(
        RuntimeError,
        match=r"SAM trains a float model, and this one is quantized: use JointSAM or SAQ, or dequantize_ it\.",
    ):
        qsam.SAM(MLP.quantized(), AdamW)


# --- the latents in the model --------------------------------------------------------------------------------------


@each_method
def test_inside_latents_the_model_holds_w(method):
    model = method.model(MLP)
    optimizer = method(model)
    train(optimizer, model, MLP, 2)
    p = {name: t.clone() for name, t in model.state_dict().items()}
    with optimizer.latents():
        for slot in optimizer._latents.slots:
            assert torch.equal(slot.parameter, slot.latent)
        w = {name: t.clone() for name, t in model.state_dict().items()}  # may be saved here
    assert_same(model.state_dict(), p)
    assert (w["0.weight"] != p["0.weight"]).any() == method.quantizes


@each_method
def test_what_is_written_inside_latents_is_undone(method):
    model = method.model(MLP)
    optimizer = method(model)
    before = everything(optimizer, model)
    with pytest.raises(ZeroDivisionError), optimizer.latents():
        if method.quantizes:
            model[0].weight.data.zero_()
        1 / 0
    assert_on_grid(optimizer)
    assert_same(everything(optimizer, model), before)


@each_quantizing
def test_an_average_of_the_latents_goes_back_through_sync_latents(method):
    """EMA: average inside latents(), write the average, sync."""
    model = method.model(MLP)
    optimizer = method(model)
    with optimizer.latents():
        average = model[0].weight.detach().clone()
    for i in range(3):
        train(optimizer, model, MLP, 1, start=i)
        with optimizer.latents():
            average.lerp_(model[0].weight.detach(), 0.5)
    with torch.no_grad():
        model[0].weight.copy_(average)
    optimizer.sync_latents()
    assert torch.equal(latents(optimizer, model)["0.weight"], average)
    assert_on_grid(optimizer)


@pytest.mark.parametrize("method", PERTURBING, ids=str)
def test_a_radius_of_a_group_is_checked(method):
    model = method.model(MLP)
    with pytest.raises(ValueError, match=r"`rho` must be finite and >= 0, got -1"):
        method(model, params=[{"params": own(model), "rho": -1.0}])
    optimizer = method(model)
    with pytest.raises(ValueError, match=r"`rho` must be finite and >= 0, got inf"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))], "rho": float("inf")})
    assert len(optimizer.base.param_groups) == 1
