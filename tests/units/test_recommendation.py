"""The recommended settings and their learning rate."""

import pytest
import torch
from torch import nn
from torch.optim import AdamW

import qsam
from tests.models import EVERYWHERE, MLP


@pytest.mark.parametrize("weights", ["lsq", "stretched"])
@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel", "per_group"])
def test_the_travel_rate_is_two_tau_mean_steps_over_the_updates(weights, granularity):
    group_size = 4 if granularity == "per_group" else None
    model = MLP.quantized(weights=weights, granularity=granularity, group_size=group_size, rules=EVERYWHERE)
    rows = qsam.coverage_of(model).quantized
    steps = torch.cat([r.quantizer.step_size(r.parameter).expand(r.parameter.shape).flatten() for r in rows])
    expected = 2 * 0.3 * steps.double().mean().item() / 50
    assert qsam.travel_lr(model, 50, 0.3) == pytest.approx(expected, rel=1e-12)


def test_a_weight_of_zeros_and_a_grid_without_steps_have_no_travel_rate():
    layer = nn.Linear(4, 4)
    nn.init.zeros_(layer.weight)
    qsam.quantize_(layer, rules=EVERYWHERE)
    gobo = MLP.quantized(weights="gobo", activations=None)
    for model in (layer, gobo):
        with pytest.raises(ValueError, match="no quantized weight has a step size: travel_lr needs a grid"):
            qsam.travel_lr(model, 10)


@pytest.mark.parametrize("steps", [0, -1, 2.5, True])
def test_steps_that_are_no_count_are_refused(steps):
    with pytest.raises(ValueError, match="`steps` must be the number of updates in the run, an integer >= 1"):
        qsam.travel_lr(MLP.quantized(), steps)


@pytest.mark.parametrize("tau", [0, -0.1, float("inf"), float("nan"), "half"])
def test_a_tau_that_is_no_length_is_refused(tau):
    with pytest.raises(ValueError, match="`tau` must be finite and positive"):
        qsam.travel_lr(MLP.quantized(), 10, tau)


def test_a_float_model_has_no_travel_rate():
    with pytest.raises(RuntimeError, match=r"travel_lr needs a quantized model: call qsam\.quantize_"):
        qsam.travel_lr(MLP.build(), 10)


@pytest.mark.parametrize("bits", range(2, 9))
def test_each_width_has_settings_that_train(bits):
    recipe, model = qsam.recommended(bits), MLP.build()
    qsam.quantize_(model, **recipe.quantize)
    optimizer = recipe.optimizer(model, AdamW, steps=20, weight_decay=0.0)
    assert optimizer.param_groups[0]["lr"] == qsam.travel_lr(model, 20, recipe.tau)
    assert optimizer.param_groups[0]["weight_decay"] == 0
    assert model[2].weight_quantizer.bits == bits


def test_a_rate_of_your_own_is_taken():
    recipe, model = qsam.recommended(2), MLP.build()
    qsam.quantize_(model, **recipe.quantize)
    assert recipe.optimizer(model, AdamW, steps=20, lr=0.125).param_groups[0]["lr"] == 0.125


@pytest.mark.parametrize("bits", [1, 9])
def test_a_width_that_does_not_exist_is_refused(bits):
    with pytest.raises(ValueError, match="bits"):
        qsam.recommended(bits)
