"""The exported record is the model: ``codes * scale`` is each weight bit for bit, and formats need nothing else."""

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import qsam
from qsam.functional import integer_limits
from tests.methods import QUANTIZING, train
from tests.models import MLP, TIED

LAYERS = {
    "Linear": lambda: nn.Linear(6, 4),
    "Conv2d": lambda: nn.Conv2d(2, 4, 3),
    "ConvTranspose2d": lambda: nn.ConvTranspose2d(2, 4, 3),
    "Conv1D": lambda: pytest.importorskip("transformers.pytorch_utils").Conv1D(4, 6),
    "Embedding": lambda: nn.Embedding(4, 6),
    "MultiheadAttention": lambda: nn.MultiheadAttention(4, 2, kdim=6, vdim=6),
    "LSTM": lambda: nn.LSTM(6, 4),
}
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@settings(max_examples=25)
@given(
    kind=st.sampled_from(sorted(LAYERS)),
    bits=st.integers(2, 8),
    granularity=st.sampled_from(["per_tensor", "per_channel", "per_group"]),
    weights=st.sampled_from(["lsq", "fixed_step", "diffq", "stochastic"]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 100),
)
def test_dequantized_is_the_weight_bit_for_bit(kind, bits, granularity, weights, dtype, seed):
    torch.manual_seed(seed)
    model = LAYERS[kind]().to(dtype)
    group = {"group_size": 2} if granularity == "per_group" else {}
    rule = ("*", {"weights": weights, "granularity": granularity, **group})
    coverage = qsam.quantize_(model, bits=bits, activations=None, rules=[rule])
    qsam.write_(model)
    records = qsam.export(model).weights
    assert [record.name for record in records] == [row.name for row in coverage.quantized]
    low, high = integer_limits(bits, signed=True)
    for record in records:
        p = model.get_parameter(record.name)
        assert (record.codes.dtype, record.codes.shape, record.bits, record.signed) == (torch.int8, p.shape, bits, True)
        assert low <= int(record.codes.min()) <= int(record.codes.max()) <= high
        assert record.scale.dtype == torch.float32 and bool((record.scale > 0).all())
        assert (record.axis is None) == (granularity == "per_tensor")
        assert record.scale.numel() == 1 or granularity != "per_tensor"
        assert record.dequantized().dtype == dtype
        assert torch.equal(record.dequantized(), p)


@pytest.mark.parametrize(("method", "lives"), list(zip(QUANTIZING, itertools.cycle([True, False]))), ids=str)
def test_after_training_the_record_computes_what_the_model_computes(method, lives):
    """A float copy with the dequantized weights, whose inputs are rounded by hand, gives the model's outputs."""
    model = MLP.quantized(bits=3, granularity="per_channel")
    optimizer = method(model)
    train(optimizer, model, MLP, 3)
    if not lives:
        del optimizer
    x = MLP.batch(0)["x"]
    expected = model.eval()(x)
    exported = qsam.export(model)
    twin = copy.deepcopy(model)
    qsam.dequantize_(twin)
    with torch.no_grad():
        for record in exported.weights:
            twin.get_parameter(record.name).copy_(record.dequantized())
    for record in exported.inputs:
        low, high = integer_limits(record.bits, record.signed)
        assert record.zero_point is None and record.scale.shape == (1,)

        def rounded(module, args, scale=record.scale, low=low, high=high):
            return ((args[0] / scale).clamp(low, high).round() * scale, *args[1:])

        twin.get_submodule(record.name).register_forward_pre_hook(rounded)
    torch.testing.assert_close(twin(x), expected)


def test_the_record_is_a_copy():
    model = MLP.quantized(activations=None)
    qsam.write_(model)
    record = qsam.export(model).weights[0]
    before = model[0].weight.detach().clone()
    record.codes.zero_()
    record.scale.zero_()
    assert torch.equal(model[0].weight, before) and torch.equal(qsam.export(model).weights[0].dequantized(), before)


def test_a_tied_weight_comes_once_by_its_first_name():
    model = TIED.quantized(activations=None)
    qsam.write_(model)
    assert [record.name for record in qsam.export(model).weights] == ["a.weight", "head.weight"]


def test_what_is_float_is_left_out():
    model = MLP.quantized(activations="identity", rules=[("0", {"weights": "identity"}), ("2", None)])
    qsam.calibrate(model, [MLP.batch(0)["x"]])
    qsam.write_(model)
    exported = qsam.export(model)
    assert [record.name for record in exported.weights] == ["4.weight"]
    assert exported.inputs == ()


class Levels(qsam.Quantizer):
    """No integers: Q(w) is the sign of w."""

    def init_(self, x):
        pass

    def forward(self, x):
        return torch.sign(x) + x - x.detach()


class Offset(qsam.quantizers.LSQ):
    """Integers, but Q(w) is more than codes times scale."""

    def forward(self, x):
        return super().forward(x - 1) + 1

    def codes(self, x):
        return super().codes(x - 1)


class Scaleless(Levels):
    """Integers without a scale."""

    def codes(self, x):
        return torch.sign(x).to(torch.int8)


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (Levels, r"'0\.weight': Levels has no integer codes: .* implements `step_size\(x\)`.*Export a model"),
        (Scaleless, r"'0\.weight': the quantizer 'Scaleless' has no `scale` to export"),
        (Offset, r"'0\.weight': the quantizer 'Offset' is not codes \* scale"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_quantizer_that_is_no_grid_is_refused_with_the_path(cls, message):
    model = MLP.quantized(activations=None)
    quantizer = cls(bits=4)
    quantizer.observe_(model[0].weight.detach())
    row = qsam.coverage_of(model).quantized[0]
    model[0].weight_quantizer = quantizer
    object.__setattr__(row, "quantizer", quantizer)
    qsam.write_(model)
    with pytest.raises(TypeError, match=message):
        qsam.export(model)


def test_weights_that_are_not_written_are_refused_and_the_advice_works():
    model = MLP.quantized(activations=None)
    with pytest.raises(RuntimeError, match=r"'0\.weight' does not hold its quantized values: call qsam\.write_\("):
        qsam.export(model)
    qsam.write_(model)
    qsam.export(model)


def test_inside_a_block_the_advice_works():
    model = MLP.quantized(activations=None)
    optimizer = qsam.SAQ(model, torch.optim.SGD, lr=0.1)
    with optimizer.first_pass():
        MLP.loss(model, MLP.batch(0)).backward()
    with optimizer.perturbed():
        with pytest.raises(RuntimeError, match="leave the optimizer's blocks"):
            qsam.export(model)
        MLP.loss(model, MLP.batch(0)).backward()
    optimizer.step()
    qsam.export(model)


def test_an_input_without_a_scale_is_refused_and_the_advice_works():
    model = MLP.build()
    qsam.quantize_(model)
    qsam.write_(model)
    with pytest.raises(RuntimeError, match=r"the input of '0' has no scale yet: call qsam\.calibrate\(model, batches"):
        qsam.export(model)
    qsam.calibrate(model, [MLP.batch(0)["x"]])
    assert [record.name for record in qsam.export(model).inputs] == ["0", "2", "4"]
