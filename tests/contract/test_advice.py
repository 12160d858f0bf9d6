"""Advice that errors give works: each test provokes the error, follows its words, and the thing then works."""

import copy

import pytest
import torch
from torch import nn

import qsam
from tests.methods import assert_on_grid, train
from tests.models import MLP, TIED


def qat(model):
    return qsam.QAT(model, torch.optim.SGD, lr=0.1)


def test_quantized_already():
    model = MLP.quantized()
    with pytest.raises(RuntimeError, match=r"quantized already: call qsam\.dequantize_\(model, optimizer\) first"):
        qsam.quantize_(model, bits=2)
    qsam.dequantize_(model)
    qsam.quantize_(model, bits=2)


def test_another_optimizer_owns_the_weights():
    model = MLP.quantized()
    first = qat(model)
    with pytest.raises(RuntimeError, match=r"owns the weights"):
        qat(model)
    qsam.dequantize_(model, first)
    qsam.quantize_(model)
    train(qat(model), model, MLP, 1)


def test_parts_that_were_quantized_separately():
    model = nn.Sequential(MLP.build(), MLP.build())
    qsam.quantize_(model[0])
    qsam.quantize_(model[1])
    with pytest.raises(
        RuntimeError, match=r"2 parts of the model were quantized separately: call qsam\.dequantize_ on each"
    ):
        qsam.quantize_(model)
    qsam.dequantize_(model[0])
    qsam.dequantize_(model[1])
    qsam.quantize_(model)


def test_a_part_of_a_quantized_model():
    model = MLP.quantized()
    with pytest.raises(RuntimeError, match=r"take the quantizers off this part with qsam\.dequantize_\(model\)"):
        qsam.write_(model[0])
    qsam.dequantize_(model[0])
    with pytest.raises(RuntimeError, match=r"quantize_\(model\) on the model as it is now"):
        qsam.write_(model)
    qsam.dequantize_(model)
    qsam.quantize_(model)
    qsam.write_(model)


def test_weights_that_were_tied_after_quantize():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    qsam.quantize_(model)
    model[1].weight = model[0].weight
    with pytest.raises(ValueError, match=r"call qsam\.dequantize_\(model\), tie them, and quantize_ again"):
        qat(model)
    qsam.dequantize_(model)
    qsam.quantize_(model)
    qat(model)


def test_a_foreign_write():
    model = MLP.quantized()
    optimizer = qat(model)
    train(optimizer, model, MLP, 1)
    with torch.no_grad():
        model[0].weight.mul_(1.5)
    with pytest.raises(RuntimeError, match=r"call optimizer\.sync_latents\(\)"):
        train(optimizer, model, MLP, 1)
    optimizer.sync_latents()
    optimizer.zero_grad()
    train(optimizer, model, MLP, 1)
    assert_on_grid(optimizer)


def test_quantizers_that_were_taken_off():
    model = MLP.quantized()
    optimizer = qat(model)
    qsam.dequantize_(model)
    with pytest.raises(RuntimeError, match="Build a new one"):
        train(optimizer, model, MLP, 1)
    qsam.quantize_(model)
    new = qat(model)
    with pytest.warns(UserWarning, match="load its state_dict to go on"):
        train(new, model, MLP, 1)


def test_a_batch_that_does_not_reach_an_input():
    model = nn.ModuleDict({"used": nn.Linear(4, 4), "unused": nn.Linear(4, 4)})
    model.forward = lambda x: model["used"](x)
    qsam.quantize_(model)
    with pytest.raises(RuntimeError, match=r"the input of 'unused': .* or set activations=None for it in `rules`"):
        qsam.calibrate(model, [torch.randn(2, 4)])
    qsam.dequantize_(model)
    qsam.quantize_(model, rules=[("unused", {"activations": None})])
    qsam.calibrate(model, [torch.randn(2, 4)])


def test_a_sequential_that_owns_a_parameter():
    chain = nn.Sequential(nn.Linear(2, 2))
    chain.matrix = nn.Parameter(torch.randn(2, 2))
    model = nn.ModuleDict({"chain": chain, "fc": nn.Linear(2, 2)})
    with pytest.raises(ValueError, match="Keep it float in `rules`, or move the parameter to a separate module"):
        qsam.quantize_(model, rules=[("chain.matrix", {})])
    qsam.quantize_(model, rules=[("chain.matrix", None)])
    qsam.dequantize_(model)
    model["own"] = nn.Module()
    model["own"].matrix = chain.matrix
    del chain.matrix
    assert "own.matrix" in {row.name for row in qsam.quantize_(model, rules=[("own.matrix", {})]).quantized}


def test_a_float_model():
    model = MLP.build()
    for verb in (qsam.write_, qsam.dequantize_, qsam.export, lambda m: qsam.calibrate(m, [MLP.batch(0)["x"]])):
        with pytest.raises(RuntimeError, match=r"needs a quantized model: call qsam\.quantize_\(model\) first"):
            verb(model)
    qsam.quantize_(model)
    qsam.calibrate(model, [MLP.batch(0)["x"]])
    qsam.write_(model)
    qsam.export(model)
    qsam.dequantize_(model)


def test_nothing_was_quantized():
    model = nn.Embedding(5, 4)
    with pytest.raises(ValueError, match="Name some in `rules`"):
        qsam.quantize_(model)
    assert qsam.quantize_(model, rules=[("weight", {})]).share == 1


def test_sam_on_a_quantized_model():
    model = MLP.quantized()
    with pytest.raises(RuntimeError, match="use JointSAM or SAQ, or dequantize_ it"):
        qsam.SAM(model, torch.optim.SGD, lr=0.1)
    train(qsam.SAQ(copy.deepcopy(model), torch.optim.SGD, lr=0.1), copy.deepcopy(model), MLP, 0)
    qsam.dequantize_(model)
    train(qsam.SAM(model, torch.optim.SGD, lr=0.1), model, MLP, 1)


def test_tied_weights_are_no_obstacle_to_a_copy():
    model = TIED.quantized()
    other = copy.deepcopy(model)
    optimizer = qat(other)
    train(optimizer, other, TIED, 1)
    assert optimizer.coverage is qsam.coverage_of(other)
