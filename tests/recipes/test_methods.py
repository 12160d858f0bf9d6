"""Methods as a command line writes them."""

import pytest
import torch
from torch import nn

import qsam
from recipes.methods import parse_method

SHARED = {"bits": 2, "activation_bits": 8, "rho": 0.1, "schedule": "fused", "scale_lr": [0.5, 0.25]}


@pytest.mark.parametrize(
    ("text", "own"),
    [
        ("fp32", set()),
        ("rtn", {"bits", "activation_bits"}),
        ("lsq", {"bits", "activation_bits", "scale_lr"}),
        ("sam", {"rho", "scale_lr"}),
        ("saq", {"bits", "activation_bits", "rho", "scale_lr"}),
        ("squat", {"bits", "activation_bits", "rho", "schedule", "scale_lr"}),
    ],
)
def test_a_method_takes_the_shared_settings_that_it_has(text: str, own: set[str]) -> None:
    found = parse_method(text).configured(SHARED)
    assert set(found) - {"scale_lr"} == own - {"scale_lr"}
    assert text == "sam" or ("scale_lr" in found) == ("scale_lr" in own)


@pytest.mark.parametrize(
    ("text", "name", "widths", "quantizers"),
    [
        ("q8bert", "qat", (8, 8), ("minmax_ema", "minmax_ema")),
        ("q8bert:bits=4", "qat", (4, 8), ("minmax_ema", "minmax_ema")),
        ("qbert", "qat", (2, 8), ("qbert", "qbert")),
        ("gobo", "rtn", (2, 8), ("gobo", None)),
        ("gobo:bits=3", "rtn", (3, 8), ("gobo", None)),
    ],
)
def test_a_preset_is_a_method_with_the_settings_and_layers_of_its_paper(
    text: str, name: str, widths: tuple[int, int], quantizers: tuple[str, str | None]
) -> None:
    method = parse_method(text)
    config = method.configured(SHARED)
    assert method.name == name
    assert (config["bits"], config["activation_bits"]) == widths
    assert (config["weights"], config["activations"]) == quantizers
    assert method.rules is getattr(qsam.presets, text.partition(":")[0])


def test_own_settings_go_before_the_shared_ones_and_reach_the_optimizer() -> None:
    method = parse_method("squat2x:rho=.02,schedule=next_batch,period=3,granularity=per_channel")
    config = method.configured(SHARED)
    assert (method.factor, config["rho"], config["schedule"], config["period"]) == (2.0, 0.02, "next_batch", 3)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    method.quantize_(model, config, rules=[("*", {})])
    assert model[0].weight_quantizer.scale.shape == (8, 1)  # one scale per channel
    optimizer = method.optimizer(model, torch.optim.Adam, config, lr=1e-3)
    assert (optimizer.schedule, optimizer.period) == ("next_batch", 3)  # type: ignore[attr-defined]


def test_the_source_of_the_inputs_follows_an_at_sign() -> None:
    method = parse_method("saq2x:rho=.02@frozen")
    assert (method.name, method.factor, method.settings, method.source) == ("saq", 2.0, {"rho": 0.02}, "frozen")
    assert parse_method("saq").source == ""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sqat", "the methods are fp32, rtn, lsq, recommended, q8bert, qbert, gobo, "),
        ("saq@", "after the @ comes the source of a quantized model's inputs"),
        ("fp32@real", "after the @ comes the source of a quantized model's inputs"),
        ("lsq0x", "qat cannot have 0 times the steps"),
        ("gobo2x", "rtn cannot have 2 times the steps"),
        ("q8bert:rho=1", "no perturbation and takes no"),
        ("rtn2x", "rtn cannot have 2 times the steps"),
        ("squat:rho", "after the colon comes setting=value, got 'rho'"),
        ("squat:radius=1", "has an argument 'radius'"),
        ("squat:ddp=1", "squat has no setting 'ddp'"),
        ("sam:bits=4", "sam has no setting 'bits'"),
        ("fp32:rho=1", "fp32 has no setting 'rho'"),
        ("qat:rho=1", "no perturbation and takes no"),
        ("squat:rho=wide", "`rho` must be a number >= 0, got 'wide'"),
        ("squat:schedule=never", "`schedule` must be one of "),
        ("qat:weights=lsqq", "lsqq"),
    ],
)
def test_a_method_that_makes_no_sense_is_refused_with_its_text(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=rf"`--method {text}`: .*{message}"):
        parse_method(text).configured(SHARED)


@pytest.mark.parametrize(("bits", "weights"), [(2, "stretched"), (3, "lsq"), (4, "lsq")])
def test_recommended_takes_what_qsam_recommends_at_these_bits(bits: int, weights: str) -> None:
    method = parse_method("recommended2x")
    config = method.configured({"bits": bits, "activation_bits": 8, "rho": 0.1})
    assert (method.name, method.factor) == ("qat", 2.0)
    assert {"weights": weights, "granularity": "per_channel"}.items() <= config.items()
    assert parse_method("recommended:weights=lsq").configured({"bits": bits})["weights"] == "lsq"
