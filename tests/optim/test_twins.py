"""Every method computes what its slow twin in tests/reference/ computes: fake quantization in the graph."""

import functools

import pytest
import torch
from torch.optim import SGD, AdamW

from qsam import coverage_of
from qsam.optim import OPTIMIZERS
from tests.models import BERT, CONV, MLP, TIED
from tests.optim.methods import (
    ALTERNATING,
    METHODS,
    QUANTIZING,
    assert_same,
    buffers_of,
    everything,
    latents,
    long_but,
    scales_of,
    train,
    train_by_hand,
)
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
STEPS = 20

each_method = pytest.mark.parametrize("method", METHODS, ids=str)
GRANULARITIES = ["per_tensor", "per_channel", "per_group"]
each_granularity = pytest.mark.parametrize("granularity", GRANULARITIES)
each_base = pytest.mark.parametrize("base", BASES, ids=lambda base: base.__name__)
crosswise = pytest.mark.parametrize(("bits", "base"), [(2, AdamW), (4, SGD)], ids=["2-AdamW", "4-SGD"])
the_other_way = pytest.mark.parametrize(("bits", "base"), [(4, AdamW), (2, SGD)], ids=["4-AdamW", "2-SGD"])


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


@each_method
@pytest.mark.parametrize("granularity", long_but(["per_channel"], GRANULARITIES))
@crosswise
def test_a_method_equals_its_twin_on_an_mlp(method, granularity, bits, base):
    assert_equals_its_twin(method, MLP, base, quantization={"granularity": granularity, "bits": bits})


@each_method
@pytest.mark.parametrize("granularity", long_but(["per_group"], GRANULARITIES))
@pytest.mark.parametrize(("bits", "base"), [(2, AdamW), pytest.param(4, SGD, marks=pytest.mark.long)])
def test_a_method_equals_its_twin_with_batch_norm_and_dropout(method, granularity, bits, base):
    assert_equals_its_twin(method, CONV, base, quantization={"granularity": granularity, "bits": bits})


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("task", long_but([CONV], [MLP, CONV, BERT]), ids=str)
@pytest.mark.parametrize("base", long_but([AdamW], BASES))
def test_a_variant_of_saq_equals_its_twin(variant, task, base):
    (saq,) = (method for method in METHODS if method.name == "saq")
    steps = 5 if task is BERT else STEPS
    assert_equals_its_twin(saq, task, base, variant=variant, rho=0.3, quantization={"bits": 3}, steps=steps)


@pytest.mark.long
@each_method
@each_granularity
@the_other_way
@pytest.mark.parametrize("task", [MLP, CONV], ids=str)
def test_a_method_equals_its_twin_at_the_other_bits(method, granularity, bits, base, task):
    assert_equals_its_twin(method, task, base, quantization={"granularity": granularity, "bits": bits})


@each_method
@pytest.mark.long
def test_a_method_equals_its_twin_on_a_w4a8_bert(method):
    assert_equals_its_twin(method, BERT, AdamW, steps=6)


@pytest.mark.long
@each_method
@each_granularity
@crosswise
def test_a_method_equals_its_twin_on_a_bert_of_any_granularity(method, granularity, bits, base):
    assert_equals_its_twin(method, BERT, base, quantization={"granularity": granularity, "bits": bits})


# Rates that carry no scale past 0: there |s| is in force, and the twin writes the formula for positive scales only.
@each_method
@pytest.mark.parametrize("scale_lr", long_but([(0.02, 0.002)], [0.05, (0.02, 0.002)]), ids=["number", "pair"])
def test_a_method_equals_its_twin_at_a_given_rate_of_the_scales(method, scale_lr):
    assert_equals_its_twin(method, MLP, AdamW, scale_lr=scale_lr)


@pytest.mark.parametrize("method", QUANTIZING, ids=str)
def test_the_two_rates_are_the_weights_and_the_inputs(method):
    for scale_lr, moved, still in [
        ((0.1, 0.0), "weight_quantizer", "input"),
        ((0.0, 0.1), "input", "weight_quantizer"),
    ]:
        model = method.model(MLP)
        before = {name: s.clone() for name, s in scales_of(model).items()}
        train(method(model, scale_lr=scale_lr), model, MLP, 4)
        same = {name: torch.equal(s, before[name]) for name, s in scales_of(model).items()}
        assert all(same[name] for name in same if still in name)
        assert not any(same[name] for name in same if moved in name)


@pytest.mark.parametrize(
    "method", long_but([m for m in METHODS if str(m) in {"qat", "squat-same_batch"}], METHODS), ids=str
)
def test_max_grad_norm_clips_as_the_twin_clips(method):
    assert_equals_its_twin(method, MLP, SGD, max_grad_norm=0.1)
    clipped, unclipped = (train_both(method, MLP, SGD, max_grad_norm=norm)[0] for norm in (0.1, None))
    assert clipped[2] != unclipped[2]


@pytest.mark.parametrize("method", ALTERNATING, ids=str)
@pytest.mark.parametrize("period", [2, 3])
def test_a_period_equals_its_twin(method, period):
    assert_equals_its_twin(method, CONV, AdamW, period=period)


@each_method
def test_a_method_equals_its_twin_on_tied_weights(method):
    assert_equals_its_twin(method, TIED, AdamW, quantization={"activations": None})


@each_method
@pytest.mark.parametrize("rho", [0.0, 0.5])
@pytest.mark.long
def test_a_method_equals_its_twin_at_any_radius(method, rho):
    assert_equals_its_twin(method, MLP, AdamW, rho=rho)


@each_method
@pytest.mark.parametrize("base", long_but([AdamW], BASES))
@pytest.mark.parametrize("task", long_but([CONV], [CONV, BERT]), ids=str)
@pytest.mark.long
def test_by_hand_equals_step_closure(method, base, task):
    runs = []
    for drive in (train, functools.partial(train_by_hand, method)):
        model = method.model(task)
        optimizer = method(model, base, **BASES[base])
        torch.manual_seed(2)
        drive(optimizer, model, task, 6)
        runs.append(everything(optimizer, model) | {"rng": torch.get_rng_state()})
    assert_same(*runs)


@pytest.mark.parametrize("method", QUANTIZING, ids=str)
@each_base
@pytest.mark.parametrize("task", long_but([MLP], [MLP, CONV, BERT]), ids=str)
def test_no_default_leaves_every_scale_where_it_began(method, base, task):
    model = method.model(task)
    before = {name: s.clone() for name, s in scales_of(model).items()}
    train(method(model, base, **BASES[base]), model, task, 20)
    moved = {name: float(((s - before[name]) / before[name]).abs().max()) for name, s in scales_of(model).items()}
    assert max(v for name, v in moved.items() if "weight_quantizer" in name) > 1e-3
    assert max(v for name, v in moved.items() if "input_quantizer" in name) > 1e-3
