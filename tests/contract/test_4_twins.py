"""Every method computes what its slow twin in tests/reference/ computes: fake quantization in the graph."""

import functools

import pytest
import torch
from torch.optim import SGD, AdamW

from qsam import coverage_of
from qsam.optim import OPTIMIZERS
from tests.methods import (
    BY_NAME,
    METHODS,
    QUANTIZING,
    assert_same,
    buffers_of,
    built,
    each_alternating,
    everything,
    latents,
    long_but,
    scales_of,
    train,
    train_by_hand,
)
from tests.models import BERT, CONV, MLP, TIED
from tests.reference.in_graph import Grid
from tests.reference.joint import JointSAM
from tests.reference.qat import QAT
from tests.reference.sam import SAM
from tests.reference.saq import SAQ, Case1, Case2, NormalizedWeights
from tests.reference.squat import Fused, NextBatch, SameBatch

TWINS = {
    "qat": QAT,
    "sam": SAM,
    "joint": JointSAM,
    "saq": SAQ,
    "squat-same_batch": SameBatch,
    "squat-next_batch": NextBatch,
    "squat-fused": Fused,
}
BASES = {AdamW: {"lr": 1e-3, "weight_decay": 0.1}, SGD: {"lr": 0.05, "momentum": 0.9}}
VARIANTS = {"case 1": ({"case": 1}, Case1), "case 2": ({"case": 2}, Case2)}
VARIANTS |= {"normalized": ({"normalize_weights": True}, NormalizedWeights)}
"""Options of SAQ that have a twin of their own."""


STEPS = 12


def twin_of(method, task, model, base, cls=None, **options):
    """Return the method's twin, on the float model, with the grids and initial scales of ``model``."""
    coverage = coverage_of(model)
    weights, inputs = {}, {}
    if coverage is not None:
        weights = {row.name: grid_of(row.quantizer) for row in coverage.quantized}
        inputs = {row.name: grid_of(row.quantizer) for row in coverage.inputs if row.quantizer is not None}
    return (cls or TWINS[str(method)])(task.build(), weights, inputs, base, BASES[base], **options)


def grid_of(quantizer):
    scale = quantizer.scale.detach().clone().requires_grad_()
    return Grid(quantizer.quant_min, quantizer.quant_max, scale, quantizer.group_size)


def train_both(method, task, base, drive=train, quantization=None, steps=STEPS, variant=None, **options):
    """Train the model and its twin from the same seed; return (optimizer, model, losses) and (twin, losses)."""
    model = method.model(task, **(quantization or {}))
    ours, cls = VARIANTS.get(variant, ({}, None))
    twin = twin_of(method, task, model, base, cls, **options)
    if not method.perturbs:
        options.pop("rho", None)
    optimizer = method(model, base, **BASES[base], **options, **ours)
    torch.manual_seed(1)
    losses = drive(optimizer, model, task, steps)
    torch.manual_seed(1)
    return (optimizer, model, losses), (twin, [float(twin.step(task.loss, task.batch(i))) for i in range(steps)])


def assert_equals_its_twin(method, task, base, **options):
    """Assert that losses, latents, scales, float parameters and buffers are equal bit for bit."""
    (optimizer, model, losses), (twin, expected) = train_both(method, task, base, **options)
    assert losses is None or losses == expected
    assert_same(latents(optimizer, model), {name: w.detach() for name, w in twin.parameters.items()})
    scales = {f"{name}_quantizer.scale": grid.scale.detach() for name, grid in twin.weights.items()}
    scales |= {f"{name}.input_quantizer.scale": grid.scale.detach() for name, grid in twin.inputs.items()}
    assert_same(scales_of(model), scales)
    assert_same(buffers_of(model), buffers_of(twin.model))


def test_every_registered_method_has_a_twin():
    assert {str(method) for method in METHODS} == TWINS.keys()
    assert {method.name for method in METHODS} == set(OPTIMIZERS)


PER_CHANNEL, PER_GROUP = {"granularity": "per_channel", "bits": 2}, {"granularity": "per_group", "bits": 3}
SETTINGS = {
    "mlp": (MLP, SGD, {"quantization": PER_CHANNEL}),
    "batch norm and dropout": (CONV, AdamW, {"quantization": PER_GROUP, "rho": 0.5}),
    "clipped norm": (CONV, SGD, {"quantization": {"bits": 4}, "max_grad_norm": 0.1}),
    "tied weights": (TIED, AdamW, {"quantization": {"activations": None}}),
    # Rates that carry no scale past 0: there |s| is in force, and the twin writes the formula for positive scales only.
    "rates of the scales": (MLP, AdamW, {"scale_lr": (0.02, 0.002)}),
    "bert": (BERT, AdamW, {"steps": 6}),
}
LONG = {"bert"}


@pytest.mark.parametrize("setting", long_but(SETTINGS.keys() - LONG, SETTINGS))
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_method_equals_its_twin(method, setting):
    task, base, options = SETTINGS[setting]
    assert_equals_its_twin(method, task, base, **options)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_of_saq_equals_its_twin(variant):
    assert_equals_its_twin(BY_NAME["saq"], CONV, AdamW, variant=variant, rho=0.3, quantization={"bits": 3})


@each_alternating
def test_a_period_equals_its_twin(method):
    assert_equals_its_twin(method, CONV, AdamW, period=3, steps=8)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_by_hand_equals_step_closure(method):
    """With BatchNorm and dropout: buffers and random numbers too."""
    runs = []
    for drive in (train, functools.partial(train_by_hand, method)):
        model, optimizer = built(method, CONV)
        torch.manual_seed(2)
        drive(optimizer, model, CONV, 6)
        runs.append(everything(optimizer, model) | {"rng": torch.get_rng_state()})
    assert_same(*runs)


@pytest.mark.parametrize("base", BASES, ids=lambda base: base.__name__)
def test_no_default_leaves_every_scale_where_it_began(base):
    for method in QUANTIZING:
        model = method.model(MLP)
        before = {name: s.clone() for name, s in scales_of(model).items()}
        train(method(model, base, **BASES[base]), model, MLP, 20)
        moved = {name: float(((s - before[name]) / before[name]).abs().max()) for name, s in scales_of(model).items()}
        assert max(v for name, v in moved.items() if "weight_quantizer" in name) > 1e-3
        assert max(v for name, v in moved.items() if "input_quantizer" in name) > 1e-3
