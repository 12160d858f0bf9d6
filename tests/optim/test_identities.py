"""Contract 4: what each method becomes when a part of it is switched off. All equalities are bitwise."""

import dataclasses

import pytest
import torch
from torch.optim import SGD, AdamW

import qsam
from qsam.optim import QAT, SAM, SAQ, JointSAM, SQuAT
from tests.models import CONV, EVERYWHERE, MLP, TIED
from tests.optim.methods import METHODS, PERTURBING, QUANTIZING, assert_same, everything, latents, train

TASKS = pytest.mark.parametrize("task", [MLP, CONV], ids=str)
BASES = pytest.mark.parametrize(
    ("base", "arguments"), [(AdamW, {"lr": 1e-3}), (SGD, {"lr": 0.05, "momentum": 0.9})], ids=["AdamW", "SGD"]
)


def run(build, task, model=None, steps=6):
    """Train from a seed; return what is left."""
    model = task.quantized() if model is None else model
    optimizer = build(model)
    torch.manual_seed(3)
    losses = train(optimizer, model, task, steps)
    return losses, everything(optimizer, model) | {"rng": torch.get_rng_state()}


def assert_same_runs(one, other):
    assert one[0] == other[0]
    assert_same(one[1], other[1])


def bare(base, arguments, task, steps=6):
    """Train the float model with the bare base optimizer; return losses and parameters."""
    model = task.build()
    optimizer = base(model.parameters(), **arguments)
    torch.manual_seed(3)
    losses = []
    for i in range(steps):
        optimizer.zero_grad()
        loss = task.loss(model, task.batch(i))
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses, {name: p.detach() for name, p in model.named_parameters()}


def unquantized(task):
    model = task.build()
    qsam.quantize_(model, weights="identity", activations=None, rules=EVERYWHERE)
    return model


@TASKS
@BASES
@pytest.mark.parametrize(("cls", "options"), [(SAQ, {}), (JointSAM, {"ste": "clipped"})], ids=["SAQ", "JointSAM"])
def test_rho_zero_is_qat(task, base, arguments, cls, options):
    qat = run(lambda model: QAT(model, base, **arguments), task)
    assert_same_runs(run(lambda model: cls(model, base, rho=0.0, **options, **arguments), task), qat)


@TASKS
@BASES
def test_rho_zero_with_the_identity_ste_is_qat_with_it(task, base, arguments):
    qat = run(lambda model: QAT(model, base, ste="identity", **arguments), task)
    assert_same_runs(run(lambda model: JointSAM(model, base, rho=0.0, **arguments), task), qat)


@TASKS
@BASES
def test_the_joint_method_with_the_clipped_ste_is_saq(task, base, arguments):
    saq = run(lambda model: SAQ(model, base, **arguments), task)
    assert_same_runs(run(lambda model: JointSAM(model, base, ste="clipped", **arguments), task), saq)


def test_the_two_stes_differ_where_weights_are_clipped():
    clipped, identity = (
        run(lambda model, ste=ste: SAQ(model, AdamW, lr=1e-3, ste=ste), MLP)[0] for ste in ("clipped", "identity")
    )
    assert clipped != identity


@TASKS
@pytest.mark.parametrize("schedule", ["same_batch", "fused"])
def test_squat_without_a_scale_rate_is_saq_with_frozen_scales(task, schedule):
    saq = run(lambda model: SAQ(model, AdamW, lr=1e-3, scale_lr=0), task)
    squat = run(lambda model: SQuAT(model, AdamW, lr=1e-3, scale_lr=0, schedule=schedule), task)
    assert squat[0] == saq[0]
    assert_same(squat[1], saq[1])


@TASKS
@BASES
def test_sam_of_radius_zero_is_the_base_optimizer(task, base, arguments):
    model = task.build()
    torch.manual_seed(3)
    optimizer = SAM(model, base, rho=0.0, **arguments)
    losses = train(optimizer, model, task, 6)
    expected = bare(base, arguments, task)
    assert losses == expected[0]
    assert_same(dict(model.named_parameters()), expected[1])


@pytest.mark.parametrize("task", [MLP, CONV, TIED], ids=str)
@BASES
def test_qat_with_the_identity_quantizer_is_the_base_optimizer(task, base, arguments):
    model = unquantized(task)
    torch.manual_seed(3)
    losses = train(QAT(model, base, **arguments), model, task, 6)
    expected = bare(base, arguments, task)
    assert losses == expected[0]
    assert_same(dict(model.named_parameters()), expected[1])


@pytest.mark.parametrize("method", [m for m in QUANTIZING if m.perturbs and m.schedule != "next_batch"], ids=str)
@TASKS
def test_a_method_with_the_identity_quantizer_is_plain_sam(method, task):
    runs = []
    for cls, model in [(method, unquantized(task)), (SAM, task.build())]:
        torch.manual_seed(3)
        optimizer = cls(model, AdamW, lr=1e-3, perturb="all")
        runs.append((train(optimizer, model, task, 6), {name: p.detach() for name, p in model.named_parameters()}))
    assert runs[0][0] == runs[1][0]
    assert_same(runs[0][1], runs[1][1])


def test_squat_on_every_other_batch_with_the_identity_quantizer_is_plain_sam_on_these():
    model, other = unquantized(MLP), MLP.build()
    train(SQuAT(model, AdamW, lr=1e-3, perturb="all", schedule="next_batch"), model, MLP, 6)
    optimizer = SAM(other, AdamW, lr=1e-3)
    for i in (0, 2, 4):
        train(optimizer, other, MLP, 1, start=i)
    assert_same(dict(model.named_parameters()), dict(other.named_parameters()))


@pytest.mark.parametrize("method", [m for m in PERTURBING if m.quantizes], ids=str)
def test_steps_before_the_start_are_qat(method):
    qat = run(lambda model: QAT(model, AdamW, lr=1e-3, ste=method(CONV.quantized()).ste), CONV)
    assert_same_runs(run(lambda model: method(model, start=6), CONV), qat)


@pytest.mark.parametrize("method", PERTURBING, ids=str)
def test_a_step_between_the_perturbed_ones_is_an_unperturbed_one(method):
    """From the same state, the step that ``every`` leaves out equals the step of a method that starts later."""
    ends = []
    for options in ({"every": 2}, {"start": 9}):
        model = method.model(MLP)
        optimizer = method(model)
        train(optimizer, model, MLP, 1 if method.schedule != "next_batch" else 2)
        optimizer.perturbation.options = dataclasses.replace(optimizer.perturbation.options, **options)
        train(optimizer, model, MLP, 1, start=5)
        ends.append(latents(optimizer, model))
    assert_same(*ends)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_two_runs_are_the_same(method):
    assert_same_runs(*(run(method, CONV, method.model(CONV)) for _ in range(2)))
