"""Arguments that the optimizers refuse, each message by its words; a refusal leaves the model as it was and free."""

import functools

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW

import qsam
from qsam.optim import QAT, SAM, SAQ, JointSAM, SQuAT
from tests.methods import (
    assert_on_grid,
    assert_same,
    each_kind,
    everything,
    train,
)
from tests.models import EVERYWHERE, MLP

BAD_FOR_ALL = [
    (TypeError, {"base": "adam"}, r"`base` must be an optimizer class or instance, got 'adam'\."),
    (TypeError, {"base": lambda params, **kw: 3}, r"`base` must build a torch Optimizer, got int\."),
    (TypeError, {"momentun": 0.9, "base": SGD}, r"neither {} nor SGD has an argument 'momentun'\. Did you mean 'momentum'"),
    (TypeError, {"scale_lrs": 0.1}, r"neither {} nor AdamW has an argument 'scale_lrs'\. Did you mean 'scale_lr'"),
    (ValueError, {"ste": "clip"}, r"`ste` must be 'clipped' or 'identity', got 'clip'\."),
    (ValueError, {"rng": "same"}, r"`rng` must be 'shared' or 'independent', got 'same'\."),
    (TypeError, {"max_grad_norm": "1"}, r"`max_grad_norm` must be None or a number > 0, got '1'\."),
    (TypeError, {"max_grad_norm": True}, r"`max_grad_norm` must be None or a number > 0, got True\."),
    (ValueError, {"max_grad_norm": 0}, r"`max_grad_norm` must be > 0, got 0\."),
    (ValueError, {"max_grad_norm": float("nan")}, r"`max_grad_norm` must be > 0, got nan\."),
    (TypeError, {"scale_optimizer": "sgd"}, r"`scale_optimizer` must be a torch Optimizer class, got 'sgd'\."),
    (TypeError, {"scale_lr": "fast"}, r"`scale_lr` must be None, a number or a pair \(weights, activations\), got 'fast'\."),
    (TypeError, {"scale_lr": (1, 2, 3)}, r"`scale_lr` must be None, a number or a pair"),
    (TypeError, {"scale_lr": True}, r"`scale_lr` must be None, a number or a pair"),
    (ValueError, {"scale_lr": -1.0}, r"`scale_lr` must be finite and >= 0, got -1\.0\."),
    (ValueError, {"scale_lr": (0.1, float("inf"))}, r"`scale_lr` must be finite and >= 0, got \(0\.1, inf\)\."),
]  # fmt: skip


BAD_FOR_PERTURBING = [
    (TypeError, {"rho": "0.1"}, r"`rho` must be a number >= 0, got '0\.1'\."),
    (TypeError, {"rho": True}, r"`rho` must be a number >= 0, got True\."),
    (ValueError, {"rho": -0.1}, r"`rho` must be finite and >= 0, got -0\.1\."),
    (ValueError, {"rho": float("nan")}, r"`rho` must be finite and >= 0, got nan\."),
    (ValueError, {"rho": float("inf")}, r"`rho` must be finite and >= 0, got inf\."),
    (TypeError, {"every": 1.0}, r"`every` must be an integer >= 1, got 1\.0\."),
    (TypeError, {"every": True}, r"`every` must be an integer >= 1, got True\."),
    (ValueError, {"every": 0}, r"`every` must be an integer >= 1, got 0\."),
    (TypeError, {"start": "3"}, r"`start` must be an integer >= 0, got '3'\."),
    (ValueError, {"start": -1}, r"`start` must be an integer >= 0, got -1\."),
    (ValueError, {"perturb": "some"}, r"`perturb` must be 'quantized', 'all' or a predicate \(name, parameter\), got 'some'\."),
    (ValueError, {"perturb": None}, r"`perturb` must be 'quantized', 'all' or a predicate"),
    (ValueError, {"reuse": "e"}, r"`reuse` must be None or 'perturbation', got 'e'\."),
    (ValueError, {"perturbation_scope": "local"}, r"`perturbation_scope` must be .*, got 'local'\."),
    (ValueError, {"direction": "sma"}, r"There is no direction 'sma'\. Did you mean 'sam'"),
]  # fmt: skip


def id_of(value):
    return next(iter(value)) if isinstance(value, dict) else None


@pytest.mark.parametrize(("kind", "options", "message"), BAD_FOR_ALL, ids=id_of)
def test_a_bad_argument_is_refused_and_leaves_the_model_as_it_was(kind, options, message):
    model = MLP.quantized()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(kind, match=message.format("SAQ")):
        SAQ(model, **{"base": AdamW, **options})
    assert_same(model.state_dict(), before)
    SAQ(model, AdamW)  # and free: nobody owns it


@pytest.mark.parametrize(("kind", "options", "message"), BAD_FOR_PERTURBING, ids=id_of)
def test_a_bad_argument_of_the_perturbation_is_refused(kind, options, message):
    model = MLP.quantized()
    with pytest.raises(kind, match=message):
        SAQ(model, **{"base": AdamW, **options})
    SAQ(model, AdamW)


def test_the_model_comes_first():
    with pytest.raises(
        TypeError, match=r"`model` must be a torch\.nn\.Module, got type: the model comes first, then the optimizer\."
    ):
        SAQ(AdamW, MLP.build())
    with pytest.raises(TypeError, match=r"`model` must be a torch\.nn\.Module, got list"):
        SAQ(list(MLP.build().parameters()), AdamW)


def test_an_instance_has_its_own_settings():
    model = MLP.quantized()
    own = [p for name, p in model.named_parameters() if "quantizer" not in name]
    with pytest.raises(
        TypeError,
        match=r"was given an optimizer instance, which has its own groups and settings: drop \['lr', 'params'\]\.",
    ):
        SAQ(model, AdamW(own), lr=1e-3, params=own)


@pytest.mark.parametrize("name", ["rho", "direction", "perturb", "every", "start", "reuse", "perturbation_scope"])
def test_qat_takes_nothing_of_the_perturbation(name):
    with pytest.raises(
        TypeError, match=rf"QAT has no perturbation and takes no \['{name}'\]: use SAQ or SQuAT, or drop them\."
    ):
        QAT(MLP.quantized(), AdamW, **{name: 1})


def test_sam_has_no_quantized_weights_to_perturb():
    with pytest.raises(
        ValueError, match=r"SAM has no quantized weights: `perturb` must be 'all' or a predicate \(name, parameter\)\."
    ):
        SAM(MLP.build(), AdamW, perturb="quantized")


@pytest.mark.parametrize("case", [0, 4, "3", True])
def test_saq_has_three_cases(case):
    with pytest.raises(ValueError, match=rf"`case` must be 1, 2 or 3, got {case!r}\."):
        SAQ(MLP.quantized(), AdamW, case=case)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (ValueError, {"schedule": "both"}, r"`schedule` must be one of same_batch, next_batch, fused, got 'both'\."),
        (TypeError, {"period": 1.5}, r"`period` must be an integer >= 1, got 1\.5\."),
        (TypeError, {"period": True}, r"`period` must be an integer >= 1, got True\."),
        (ValueError, {"period": 0}, r"`period` must be an integer >= 1, got 0\."),
        (ValueError, {"schedule": "fused", "direction": "previous"}, r"schedule='fused' takes the scales' gradient from the first pass"),
    ],
    ids=str,
)  # fmt: skip
def test_squat_s_own_arguments_are_checked(kind, options, message):
    model = MLP.quantized()
    with pytest.raises(kind, match=message):
        SQuAT(model, AdamW, **options)
    SQuAT(model, AdamW)


def sparse_model():
    """An embedding with sparse gradients, quantized by a rule, before a layer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(10, 8, sparse=True), nn.Flatten(), nn.Linear(16, 4))
    qsam.quantize_(model, rules=EVERYWHERE, activations=None)
    return model


@pytest.mark.parametrize(
    ("build_on", "message"),
    [
        (functools.partial(QAT, lr=0.1), r"'0\.weight' has a sparse gradient, which cannot be pulled back: build its module with sparse=False\."),
        (functools.partial(SAQ, lr=0.1), r"'0\.weight' has a sparse gradient, which cannot be perturbed: build its module with sparse=False\."),
        (functools.partial(SAQ, lr=0.1, start=1), r"'0\.weight' has a sparse gradient, which cannot be"),
        (functools.partial(JointSAM, lr=0.1), r"'0\.weight' has a sparse gradient, which cannot be perturbed"),
    ],
    ids=["QAT", "SAQ", "SAQ-start", "JointSAM"],
)  # fmt: skip
def test_sparse_gradients_are_refused_with_the_path(build_on, message):
    model = sparse_model()
    optimizer = build_on(model, SGD)
    ids = torch.tensor([[1, 2], [3, 4]])

    def closure():
        optimizer.zero_grad()
        loss = model(ids).square().mean()
        loss.backward()
        return loss

    before = everything(optimizer, model)
    with pytest.raises(TypeError, match=message):
        optimizer.step(closure)
    assert_on_grid(optimizer)
    assert_same(everything(optimizer, model), before)
    assert all(p.grad is None for p in model.parameters())
    model[0].sparse = False
    optimizer.step(closure)
    assert_on_grid(optimizer)


@each_kind
def test_a_plain_model_is_quantized_and_its_coverage_logged(method, caplog):
    model = MLP.build()
    with caplog.at_level("INFO", logger="qsam"):
        optimizer = method(model)
    if method.quantizes:
        assert "qsam quantized the model with its defaults" in caplog.text
        assert "0.weight" in caplog.text
        assert [row.name for row in optimizer.coverage.quantized] == ["0.weight", "2.weight", "4.weight"]
    else:
        assert optimizer.coverage is None
        assert not caplog.text
    train(optimizer, model, MLP, 1)


REFUSED = {
    "an argument": {"lrr": 0.1},
    "a direction of one pass in a fused schedule": {"schedule": "fused", "direction": "previous"},
    "a rate of the scales": {"scale_lr": -1.0},
}


@pytest.mark.parametrize("options", REFUSED.values(), ids=REFUSED)
def test_a_refused_optimizer_leaves_a_plain_model_plain_and_lets_later_weights_set_the_scales(options):
    model = MLP.build()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises((TypeError, ValueError)):
        SQuAT(model, AdamW, **options)
    assert_same(model.state_dict(), before)
    assert qsam.coverage_of(model) is None

    qsam.quantize_(model, activations=None)
    with torch.no_grad():
        model[0].weight.mul_(3.0)
    with pytest.raises((TypeError, ValueError)):
        SQuAT(model, AdamW, **options)
    SQuAT(model, AdamW)
    other = MLP.build()
    with torch.no_grad():
        other[0].weight.mul_(3.0)
    qsam.quantize_(other, activations=None)
    assert torch.equal(model[0].weight_quantizer.scale, other[0].weight_quantizer.scale)
