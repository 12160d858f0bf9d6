"""Contract 6: ||e|| = rho over the perturbed set only, in the direction of the gradient."""

import weakref

import pytest
import torch
from torch.optim import SGD, AdamW

from tests.methods import (
    FUSED,
    SAM,
    SAQ,
    SQUAT,
    assert_same,
    everything,
    latents,
    scales_of,
    train,
)
from tests.models import CONV, MLP

SELECTIONS = {
    "all": "all",
    "biases": lambda name, p: name.endswith("bias"),
    "one": lambda name, p: name == "2.weight",
}


def build(method, task=MLP, selection=None, **options):
    model = method.model(task)
    if selection is not None:
        options["perturb"] = SELECTIONS[selection]
    return model, method(model, **options)


def weights(model):
    """Return what the model holds, in fp64, without the scales."""
    scales = scales_of(model)
    return {name: p.detach().double() for name, p in model.named_parameters() if name not in scales}


def first_pass(optimizer, model, task=MLP, factor=1.0):
    """Run it; return the gradients it gave."""
    with optimizer.first_pass():
        (task.loss(model, task.batch(0)) * factor).backward()
    scales = scales_of(model)
    return {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None and name not in scales}


def perturbation(optimizer, model, task=MLP, factor=1.0):
    """Return e and the first pass's gradients, by name; the block is left with the step not taken."""
    gradients = {k: v.clone() for k, v in first_pass(optimizer, model, task, factor).items()}
    before = weights(model)
    with optimizer.perturbed():
        inside = weights(model)
    return {name: inside[name] - before[name] for name in before}, gradients


def norm(tensors):
    return torch.cat([t.flatten() for t in tensors]).norm()


def rounding(model, rho):
    """How far ||e|| may be from rho: each entry of p + e is rounded once, and rho / ||g|| three times, in fp32."""
    eps = torch.finfo(torch.float32).eps
    return eps * (float(norm(weights(model).values())) / 2 + 3 * rho)


@pytest.mark.parametrize("method", [SAM, SAQ], ids=str)
@pytest.mark.parametrize(("selection", "rho"), [(None, 0.1), (None, 1e-3), ("all", 5.0), ("biases", 0.1), ("one", 5.0)])
def test_the_norm_of_e_is_rho(method, rho, selection):
    model, optimizer = build(method, selection=selection, rho=rho)
    e, _ = perturbation(optimizer, model)
    assert abs(float(norm(e.values())) - rho) <= rounding(model, rho)


@pytest.mark.parametrize("method", [SAM, SAQ], ids=str)
def test_only_what_is_selected_is_perturbed(method):
    everywhere = set(weights(method.model(MLP)))
    matrices = {name for name in everywhere if name.endswith("weight")}
    expected = {
        None: matrices if method.quantizes else everywhere,
        "all": everywhere,
        "biases": everywhere - matrices,
        "one": {"2.weight"},
    }
    for selection, names in expected.items():
        model, optimizer = build(method, selection=selection)
        e, _ = perturbation(optimizer, model)
        assert {name for name, t in e.items() if bool(t.any())} == names


@pytest.mark.parametrize("method", [SAM, FUSED], ids=str)
def test_the_first_pass_may_be_scaled_by_any_power_of_two(method):
    runs = []
    for factor in (1.0, 2.0**12):
        model, optimizer = build(method, CONV, rho=0.1)
        torch.manual_seed(0)
        runs.append(perturbation(optimizer, model, CONV, factor)[0])
    assert_same(*runs)


def test_a_group_may_have_its_own_radius():
    model = SAQ.model(MLP)
    groups = [{"params": model[0].parameters(), "rho": 0.2}, {"params": model[2].parameters(), "rho": 0.0}]
    own = [p for name, p in model.named_parameters() if name in ("4.weight", "4.bias")]
    groups = [{**g, "params": [p for p in g["params"] if p.dim() < 3 and p.shape != (1,)]} for g in groups]
    optimizer = SAQ(model, rho=0.1, params=[*groups, {"params": own}], perturb="all")
    assert [group["qsam_rho"] for group in optimizer.param_groups[:3]] == [0.2, 0.0, 0.1]
    e, g = perturbation(optimizer, model)
    size = norm(g.values())
    for layer, rho in (("0", 0.2), ("2", 0.0), ("4", 0.1)):
        expected = rho * norm([g[f"{layer}.weight"], g[f"{layer}.bias"]]) / size
        actual = norm([e[f"{layer}.weight"], e[f"{layer}.bias"]])
        assert abs(float(actual - expected)) <= rounding(model, rho)


@pytest.mark.parametrize("method", [SAM, SAQ, SQUAT], ids=str)
@pytest.mark.parametrize("base", [AdamW, SGD], ids=lambda base: base.__name__)
def test_maximizing_a_loss_is_minimizing_its_negative(method, base):
    """e, w and s all turn round."""
    ends = []
    for maximize in (True, False):
        model, optimizer = build(method, base=base, lr=0.01, maximize=maximize, rho=0.3)
        sign = -1.0 if maximize else 1.0

        def closure(optimizer=optimizer, model=model, sign=sign):
            optimizer.zero_grad()
            loss = sign * MLP.loss(model, MLP.batch(0))
            loss.backward()
            return loss

        for _ in range(6):
            optimizer.step(closure)
        ends.append(latents(optimizer, model) | scales_of(model))
    assert_same(*ends)


@pytest.mark.parametrize("method", [SAM, SAQ], ids=str)
def test_a_frozen_weight_is_not_perturbed(method):
    model = method.model(MLP)
    model[2].weight.requires_grad_(False)
    optimizer = method(model, rho=0.2)
    e, _ = perturbation(optimizer, model)
    assert not bool(e["2.weight"].any())
    assert abs(float(norm(e.values())) - 0.2) <= rounding(model, 0.2)


@pytest.mark.parametrize("method", [SAM, SAQ], ids=str)
@pytest.mark.parametrize("block", ["perturbed", "latents"])
def test_reading_the_diagnostics_changes_nothing(method, block):
    """Wherever it is called: no false alarm of the guard either."""
    ends = []
    for reads in (True, False):
        model, optimizer = build(method, CONV)
        torch.manual_seed(0)
        for i in range(3):
            for name in ("first_pass", "perturbed"):
                with getattr(optimizer, name)():
                    CONV.loss(model, CONV.batch(i)).backward()
                    if reads and block == name:
                        optimizer.diagnostics()
            optimizer.step()
            with optimizer.latents():
                if reads and block == "latents":
                    optimizer.diagnostics()
        train(optimizer, model, CONV, 1)
        ends.append(everything(optimizer, model))
    assert_same(*ends)


@pytest.mark.parametrize("method", [SAM, SAQ], ids=str)
def test_the_first_pass_gradients_do_not_live_through_the_perturbed_pass(method):
    model, optimizer = build(method)
    with optimizer.first_pass():
        MLP.loss(model, MLP.batch(0)).backward()
    first = weakref.ref(model.get_parameter("0.weight").grad)
    assert first() is not None
    with optimizer.perturbed():
        assert first() is None
