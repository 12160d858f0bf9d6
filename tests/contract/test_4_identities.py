"""Contract 4: what each method becomes when a part of it is switched off. All equalities are bitwise."""

import pytest
import torch
from torch.optim import SGD, AdamW

import qsam
from qsam.optim import QAT, SAM, SAQ, JointSAM, SQuAT
from tests.methods import BY_NAME, assert_same, everything, train
from tests.models import CONV, EVERYWHERE, MLP

SETTINGS = pytest.mark.parametrize(
    ("task", "base", "arguments"),
    [(MLP, SGD, {"lr": 0.05, "momentum": 0.9}), (CONV, AdamW, {"lr": 1e-3})],
    ids=["MLP-SGD", "CONV-AdamW"],
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


@SETTINGS
@pytest.mark.parametrize(
    ("cls", "options"),
    [(SAQ, {}), (SAQ, {"case": 1}), (SAQ, {"case": 2}), (JointSAM, {"ste": "clipped"})],
    ids=["SAQ", "case1", "case2", "JointSAM"],
)
def test_rho_zero_is_qat(task, base, arguments, cls, options):
    qat = run(lambda model: QAT(model, base, **arguments), task)
    assert_same_runs(run(lambda model: cls(model, base, rho=0.0, **options, **arguments), task), qat)


@SETTINGS
def test_rho_zero_with_the_identity_ste_is_qat_with_it(task, base, arguments):
    qat = run(lambda model: QAT(model, base, ste="identity", **arguments), task)
    assert_same_runs(run(lambda model: JointSAM(model, base, rho=0.0, **arguments), task), qat)


@SETTINGS
def test_the_joint_method_with_the_clipped_ste_is_saq(task, base, arguments):
    saq = run(lambda model: SAQ(model, base, **arguments), task)
    assert_same_runs(run(lambda model: JointSAM(model, base, ste="clipped", **arguments), task), saq)
    assert run(lambda model: JointSAM(model, base, **arguments), task)[0] != saq[0]


@pytest.mark.parametrize(("task", "schedule"), [(MLP, "same_batch"), (CONV, "fused")], ids=str)
def test_squat_without_a_scale_rate_is_saq_with_frozen_scales(task, schedule):
    saq = run(lambda model: SAQ(model, AdamW, lr=1e-3, scale_lr=0), task)
    assert_same_runs(run(lambda model: SQuAT(model, AdamW, lr=1e-3, scale_lr=0, schedule=schedule), task), saq)


@SETTINGS
@pytest.mark.parametrize("kind", ["SAM of radius zero", "QAT with the identity quantizer"])
def test_without_perturbation_or_grid_it_is_the_base_optimizer(task, base, arguments, kind):
    model = unquantized(task) if kind.startswith("QAT") else task.build()
    optimizer = QAT(model, base, **arguments) if kind.startswith("QAT") else SAM(model, base, rho=0.0, **arguments)
    torch.manual_seed(3)
    losses = train(optimizer, model, task, 6)
    expected = bare(base, arguments, task)
    assert losses == expected[0]
    assert_same(dict(model.named_parameters()), expected[1])


@pytest.mark.parametrize(
    ("name", "task"), [("saq", CONV), ("joint", MLP), ("squat-same_batch", MLP), ("squat-fused", CONV)]
)
def test_a_method_with_the_identity_quantizer_is_plain_sam(name, task):
    runs = []
    for cls, model in [(BY_NAME[name], unquantized(task)), (SAM, task.build())]:
        torch.manual_seed(3)
        optimizer = cls(model, AdamW, lr=1e-3, perturb="all")
        runs.append((train(optimizer, model, task, 6), {name: p.detach() for name, p in model.named_parameters()}))
    assert_same_runs(*runs)
