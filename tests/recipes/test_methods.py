"""A method as the command line writes it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import qsam
from qsam.optim import DIRECTIONS, OPTIMIZERS
from recipes.methods import method_names, parse_method

SHARED = {"bits": 2, "activation_bits": 8, "rho": 0.05, "schedule": "fused", "scale_lr": None}


def test_every_registered_optimizer_is_a_method() -> None:
    assert set(OPTIMIZERS) | {"fp32", "rtn", "lsq"} == set(method_names())
    for name in method_names():
        parse_method(name).check(SHARED)


@pytest.mark.parametrize("direction", list(DIRECTIONS))
def test_every_registered_direction_is_a_setting(direction: str) -> None:
    method = parse_method(f"saq:direction={direction}")
    model = nn.Sequential(nn.Linear(8, 8))
    optimizer = method.optimizer(model, torch.optim.Adam, method.configured(SHARED), lr=1e-3)
    assert optimizer.perturbation is not None
    assert type(optimizer.perturbation.direction) is DIRECTIONS.get(direction)


@pytest.mark.parametrize("quantizer", qsam.list_quantizers())
def test_every_registered_quantizer_is_a_setting(quantizer: str) -> None:
    method = parse_method(f"qat:weights={quantizer},bits=4")
    method.check(SHARED)
    assert method.quantization(method.configured(SHARED)) == {"weights": quantizer, "bits": 4, "activation_bits": 8}


def test_a_method_takes_of_the_shared_settings_what_it_has() -> None:
    assert parse_method("qat").configured(SHARED) == {"bits": 2, "activation_bits": 8, "scale_lr": None}
    assert parse_method("saq:rho=.2").configured(SHARED)["rho"] == 0.2
    assert parse_method("sam").configured(SHARED) == {"rho": 0.05, "scale_lr": None}
    assert parse_method("fp32").configured(SHARED) == {}


def test_a_pair_of_rates_is_for_weights_and_inputs() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    optimizer = parse_method("qat").optimizer(model, torch.optim.Adam, {"scale_lr": [0.1, 0.2]}, lr=1e-3)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 0.1, 0.2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lsg", r"`--method lsg`: the methods are fp32, rtn, lsq, joint, qat, sam, saq, squat"),
        ("saq:case", r"after the colon comes setting=value, got 'case'"),
        ("saq:case=4", r"`--method saq:case=4`: `case` must be 1, 2 or 3, got 4"),
        ("saq:cases=1", r"saq has no setting 'cases'; it has activation_bits, .*case, "),
        ("qat:rho=1", r"qat has no setting 'rho'"),
        ("rtn:rho=1", r"rtn has no setting 'rho'"),
        ("fp32:bits=2", r"fp32 has no setting 'bits'; it has none"),
        ("rtn2x", r"rtn cannot have 2 times the steps"),
        ("lsq0x", r"qat cannot have 0 times the steps"),
        ("qat:weights=lsg", r"`--method qat:weights=lsg`: '0.weight': There is no quantizer 'lsg'. Did you mean 'lsq'"),
        ("saq:direction=asm", r"There is no direction 'asm'. Did you mean 'asam'"),
        ("qat:bits=9", r"`bits` must be an integer in \[2, 8\], got 9"),
        ("squat:every=0", r"`every` must be"),
    ],
)
def test_nonsense_is_refused_before_anything_runs(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_method(text).check(SHARED)
