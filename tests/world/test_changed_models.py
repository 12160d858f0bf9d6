"""A model that changes after ``quantize_``: heads replaced, weights pruned or parametrized. Refused, with a cure."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

import qsam
from tests.methods import QUANTIZING, assert_on_grid, latents, train
from tests.models import MLP

LEFT = r"the coverage has '4\.weight', whose module has left the model since quantize_"


class Doubled(nn.Module):
    def forward(self, w):
        return 2 * w


@pytest.mark.parametrize("method", [m for m in QUANTIZING if str(m) in ("qat", "squat-next_batch")], ids=str)
def test_a_head_replaced_after_quantize_is_refused_by_its_path_and_the_advice_works(method):
    model = MLP.build()
    qsam.quantize_(model)
    model[4] = nn.Linear(model[4].in_features, model[4].out_features)
    with pytest.raises(
        RuntimeError, match=LEFT + r".* Call qsam\.dequantize_\(model\) and then qsam\.quantize_\(model\)"
    ):
        method(model)
    qsam.dequantize_(model)
    assert qsam.coverage_of(model) is None
    qsam.quantize_(model)
    optimizer = method(model)
    train(optimizer, model, MLP, 2)
    assert_on_grid(optimizer)
    assert optimizer.coverage.quantized[-1].module is model[4]


@pytest.mark.parametrize("steps", [0, 2])
def test_a_head_replaced_under_an_optimizer_is_refused_before_the_next_step_and_the_advice_works(steps):
    model = MLP.quantized()
    optimizer = qsam.QAT(model, torch.optim.SGD, lr=0.1)
    train(optimizer, model, MLP, steps)
    w = latents(optimizer, model)["0.weight"].clone()
    model[4] = nn.Linear(model[4].in_features, model[4].out_features)
    with pytest.raises(RuntimeError, match=LEFT + r".* Call qsam\.dequantize_\(model, optimizer\)"):
        train(optimizer, model, MLP, 1)
    qsam.dequantize_(model, optimizer)
    assert torch.equal(model[0].weight, w)
    qsam.quantize_(model)
    train(qsam.QAT(model, torch.optim.SGD, lr=0.1), model, MLP, 1)


@pytest.mark.parametrize(
    ("kind", "verb"),
    [("prune", "step"), ("parametrize", "sync_latents"), ("prune", "latents"), ("parametrize", "dequantize_")],
)
def test_a_weight_that_is_computed_is_refused_and_the_advice_works(kind, verb):
    model = MLP.quantized()
    optimizer = qsam.SQuAT(model, torch.optim.SGD, lr=0.1)
    train(optimizer, model, MLP, 1)
    if kind == "prune":
        prune.l1_unstructured(model[2], "weight", 0.5)
        undo, name = (lambda: prune.remove(model[2], "weight")), r"prune\.remove\(module, 'weight'\)"
    else:
        parametrize.register_parametrization(model[2], "weight", Doubled())
        undo = lambda: parametrize.remove_parametrizations(model[2], "weight")  # noqa: E731
        name = r"parametrize\.remove_parametrizations\(module, 'weight'\)"
    verbs = {
        "step": lambda: train(optimizer, model, MLP, 1, start=1),
        "sync_latents": optimizer.sync_latents,
        "latents": lambda: optimizer.latents().__enter__(),
        "dequantize_": lambda: qsam.dequantize_(model, optimizer),
    }
    with pytest.raises(
        RuntimeError,
        match=rf"'2\.weight' is no Parameter any more.*{name}.*then, if an optimizer owns the weights, optimizer\.sync_latents\(\)",
    ):
        verbs[verb]()
    undo()
    expected = model[2].weight.detach().clone()
    optimizer.sync_latents()
    assert torch.equal(latents(optimizer, model)["2.weight"], expected)
    if kind == "prune":
        assert (model[2].weight == 0).sum() >= model[2].weight.numel() // 2
    train(optimizer, model, MLP, 2, start=1)
    assert_on_grid(optimizer)


def test_a_mask_that_stays_while_the_model_trains_needs_a_rule():
    """prune first: a rule quantizes ``weight_orig``, and the mask is applied to its grid values."""
    model = MLP.build()
    prune.l1_unstructured(model[2], "weight", 0.5)
    qsam.quantize_(model, rules=[("2.weight_orig", {})])
    optimizer = qsam.SQuAT(model, torch.optim.SGD, lr=0.1)
    train(optimizer, model, MLP, 3)
    model.eval()(MLP.batch(0)["x"])
    assert (model[2].weight == 0).sum() >= model[2].weight.numel() // 2
    assert model[2].weight.unique().numel() <= 2**4


def test_without_an_optimizer_a_computed_weight_is_refused_too():
    model = MLP.quantized(activations=None)
    qsam.write_(model)
    prune.l1_unstructured(model[2], "weight", 0.5)
    for verb in (qsam.write_, qsam.export):
        with pytest.raises(RuntimeError, match=r"'2\.weight' is no Parameter any more.*prune\.remove"):
            verb(model)
    prune.remove(model[2], "weight")
    qsam.write_(model)
    qsam.export(model)


def test_a_module_that_is_wrapped_trains_on():
    model = MLP.quantized()
    optimizer = qsam.QAT(model, torch.optim.SGD, lr=0.1)
    train(optimizer, model, MLP, 1)
    model[2] = nn.Sequential(model[2])
    train(optimizer, model, MLP, 2)
    assert_on_grid(optimizer)
