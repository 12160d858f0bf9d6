"""Contract 1: a torch Optimizer, whose groups and state schedulers and checkpoints read as those of any other."""

import functools
import warnings

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adadelta, Adam, AdamW
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    CyclicLR,
    LambdaLR,
    LinearLR,
    OneCycleLR,
    SequentialLR,
)

import qsam
from tests.methods import (
    QAT,
    SAQ,
    SQUAT,
    assert_on_grid,
    assert_same,
    built,
    each_kind,
    each_quantizing,
    everything,
    latents,
    scales_of,
    train,
)
from tests.models import MLP


def own(model):
    """Return the model's parameters without the scales."""
    scales = scales_of(model)
    return [p for name, p in model.named_parameters() if name not in scales]


def ids(params):
    return [id(p) for p in params]


@each_kind
def test_the_base_s_groups_come_first_then_the_scales(method):
    model, optimizer = built(method, MLP)
    assert isinstance(optimizer, torch.optim.Optimizer)
    first, *others = optimizer.param_groups
    assert ids(first["params"]) == ids(own(model))
    assert [group["qsam_scales"] for group in others] == (["weights", "inputs"] if method.quantizes else [])
    listed = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(listed) == sorted(ids(model.parameters()))
    assert {id(s) for group in others for s in group["params"]} == {id(p) for p in model.parameters()} - set(
        ids(own(model))
    )


@each_kind
def test_the_groups_are_one_live_list(method):
    model, optimizer = built(method, MLP)
    groups = optimizer.param_groups
    train(optimizer, model, MLP, 2)
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.param_groups is groups
    groups[0]["lr"] = 0.0
    groups[0]["weight_decay"] = 0.0
    before = latents(optimizer, model)
    train(optimizer, model, MLP, 1)
    assert_same(latents(optimizer, model), before)


@pytest.mark.parametrize("method", [SAQ, SQUAT], ids=str)
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


def test_groups_with_settings_of_their_own():
    model = SAQ.model(MLP)
    matrices, vectors = ([p for p in own(model) if p.dim() == d] for d in (2, 1))
    groups = [{"params": matrices, "lr": 0.0, "weight_decay": 0.0}, {"params": vectors, "lr": 1e-2}]
    optimizer = SAQ(model, params=groups)
    before = latents(optimizer, model)
    train(optimizer, model, MLP, 2)
    after = latents(optimizer, model)
    assert {name for name in after if torch.equal(after[name], before[name])} == {"0.weight", "2.weight", "4.weight"}


def test_trainable_parameters_that_nobody_owns_are_named():
    model = SAQ.model(MLP)
    matrices = [p for p in own(model) if p.dim() == 2]
    message = r"3 trainable parameters are in no group of the base optimizer and will not move: \['0\.bias', '2\.bias', '4\.bias'\]"
    with pytest.warns(UserWarning, match=message) as caught:
        optimizer = SAQ(model, params=matrices)
    assert len(caught) == 1
    before = latents(optimizer, model)
    train(optimizer, model, MLP, 2)
    assert torch.equal(latents(optimizer, model)["0.bias"], before["0.bias"])


def test_a_quantized_weight_that_nobody_owns_is_refused():
    model = SAQ.model(MLP)
    with pytest.raises(
        RuntimeError,
        match=r"the quantized weight '2\.weight' is in no parameter group of the base optimizer: add it, or freeze it",
    ):
        SAQ(model, params=[p for p in own(model) if p is not model[2].weight])
    weights = MLP.build().state_dict()
    assert_same({k: v for k, v in model.state_dict().items() if k in weights}, weights)
    SAQ(model)  # the failed one owns nothing


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


@pytest.mark.parametrize("method", [QAT, SQUAT], ids=str)
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


@pytest.mark.parametrize("named", [False, True], ids=["parameters", "named"])
def test_scales_in_an_added_group_stay_with_the_scale_optimizer_and_that_is_said(named):
    """``layer.parameters()`` after quantize_ holds the scales of the layer's weight and input too."""
    ends = []
    for careless in (True, False):
        model = SQUAT.model(MLP)
        layer = model[2].requires_grad_(False)
        given = (lambda m: m.named_parameters()) if named else (lambda m: m.parameters())
        first = [item for child in (model[0], model[4]) for item in given(child)]
        with pytest.warns(UserWarning, match="4 scales were in the base optimizer's groups and are moved"):
            optimizer = SQUAT(model, params=first)
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


@pytest.mark.parametrize("method", [QAT, SAQ], ids=str)
def test_a_base_with_a_rho_of_its_own_keeps_it(method):
    """Adadelta's rho is a decay, not a radius."""
    model = method.model(MLP)
    optimizer = method(model, Adadelta(own(model), rho=0.7))
    assert optimizer.param_groups[0]["rho"] == 0.7
    train(optimizer, model, MLP, 2)
    if method.perturbs:
        assert optimizer.param_groups[0]["qsam_rho"] == 0.1


def test_an_instance_that_has_stepped_keeps_its_moments():
    """Wrapping in mid-run: the state moves to the latents."""
    model = SAQ.model(MLP)
    base = AdamW(own(model), lr=1e-3)
    MLP.loss(model, MLP.batch(0)).backward()
    base.step()
    moments = {id(p): base.state[p]["exp_avg"].clone() for p in own(model)}
    for p in model.parameters():
        p.grad = None
    optimizer = SAQ(model, base)
    assert all(torch.equal(optimizer.state[p]["exp_avg"], moments[id(p)]) for p in own(model))
    optimizer.load_state_dict(optimizer.state_dict())
    train(optimizer, model, MLP, 1)
    assert all(int(optimizer.state[p]["step"]) == 2 for p in own(model))


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


def test_dequantize_wants_the_owner():
    model, other = SAQ.model(MLP), SAQ.model(MLP)
    optimizer, stranger = SAQ(model), SAQ(other)
    with pytest.raises(RuntimeError, match="does not own the model's weights"):
        qsam.dequantize_(model, stranger)
    train(optimizer, model, MLP, 1)


def test_sam_refuses_a_quantized_model():
    with pytest.raises(
        RuntimeError,
        match=r"SAM trains a float model, and this one is quantized: use JointSAM or SAQ, or dequantize_ it\.",
    ):
        qsam.SAM(MLP.quantized(), AdamW)


def test_a_radius_of_a_group_is_checked():
    model = SAQ.model(MLP)
    with pytest.raises(ValueError, match=r"`rho` must be finite and >= 0, got -1"):
        SAQ(model, params=[{"params": own(model), "rho": -1.0}])
    optimizer = SAQ(model)
    with pytest.raises(ValueError, match=r"`rho` must be finite and >= 0, got inf"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))], "rho": float("inf")})
    assert len(optimizer.base.param_groups) == 1


RELATIVE = {
    "lambda": lambda o: LambdaLR(o, lambda step: 1 / (1 + step)),
    "restarts": lambda o: CosineAnnealingWarmRestarts(o, T_0=2),
    "warm-up": lambda o: SequentialLR(o, [LinearLR(o, 0.1, 1.0, 2), CosineAnnealingLR(o, 4)], milestones=[2]),
}
"""They multiply each group's own rate."""


ABSOLUTE = {
    "one-cycle": lambda o: OneCycleLR(o, max_lr=0.01, total_steps=6),
    "cyclic": lambda o: CyclicLR(o, base_lr=1e-4, max_lr=1e-3, step_size_up=2),
}
"""They set each group's rate, and the base's momentum or betas too."""


def rates(scheduler_of, model, optimizer, steps=5):
    """Return the groups' rates after each step."""
    scheduler = scheduler_of(optimizer)
    found = []
    for i in range(steps):
        train(optimizer, model, MLP, 1, start=i)
        scheduler.step()
        found.append([group["lr"] for group in optimizer.param_groups])
    return found


def bare_rates(scheduler_of, base, steps=5):
    """Return what the scheduler gives a bare base optimizer, and its group."""
    model = MLP.build()
    optimizer = base(model.parameters(), lr=1e-3)
    scheduler = scheduler_of(optimizer)
    found = []
    for _ in range(steps):
        optimizer.step()
        scheduler.step()
        found.append(optimizer.param_groups[0]["lr"])
    return found, optimizer.param_groups[0]


@pytest.mark.parametrize("name", RELATIVE | ABSOLUTE)
@pytest.mark.parametrize(("base", "options"), [(AdamW, {}), (SGD, {"momentum": 0.9})], ids=["AdamW", "SGD"])
def test_a_scheduler_drives_the_base_as_it_does_alone_and_a_relative_one_scales_all_rates_alike(name, base, options):
    scheduler_of = (RELATIVE | ABSOLUTE)[name]
    model, optimizer = built(SQUAT, MLP, base, **options)
    first = [group["lr"] for group in optimizer.param_groups]
    found = rates(scheduler_of, model, optimizer)
    expected, group = bare_rates(scheduler_of, lambda params, lr: base(params, lr=lr, **options))
    assert [row[0] for row in found] == expected
    assert all(optimizer.param_groups[0].get(key) == group.get(key) for key in ("betas", "momentum"))
    for row in found if name in RELATIVE else ():
        for rate, start in zip(row, first, strict=True):
            assert rate == pytest.approx(start * row[0] / first[0], rel=1e-6, abs=1e-12)  # torch rounds in float64


@each_quantizing
def test_the_scales_step_with_the_scheduled_rate(method):
    """Half the rate is half the step, with plain descent on the first step of the scales."""
    moved = []
    for factor in (1.0, 0.5):
        model, optimizer = built(method, MLP, scale_lr=0.125)
        LambdaLR(optimizer, lambda step, factor=factor: factor)
        optimizer.param_groups[0]["lr"] = 0.0  # w stays, so that both see the same gradients
        before = {name: s.clone() for name, s in scales_of(model).items()}
        train(optimizer, model, MLP, 2 if method.schedule == "next_batch" else 1)
        moved.append({name: (s - before[name]).double() for name, s in scales_of(model).items()})
    eps = torch.finfo(torch.float32).eps
    for name in moved[0]:
        assert bool(moved[0][name].any())
        # Each difference of two numbers near 1 is rounded once.
        assert torch.allclose(moved[0][name], 2 * moved[1][name], rtol=0, atol=2 * eps)
