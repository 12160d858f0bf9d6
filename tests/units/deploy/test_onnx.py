"""The file holds the trained integers, and what has no exact form in ONNX is refused by its path, with a cure."""

import copy
import sys

import pytest
import torch
from torch import nn

import qsam
from qsam.deploy import export_onnx

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")


def random_codes_(model, seed=0):
    """Write codes over the full range of every grid: trained ones hide what saturates."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for row in qsam.coverage_of(model).quantized:
            row.quantizer.set_from_weight_(row.parameter)
            low, high = row.quantizer.quant_min, row.quantizer.quant_max
            codes = torch.randint(low, high + 1, row.shape, generator=draw).to(row.quantizer.code_dtype)
            row.parameter.copy_(row.quantizer.dequantize(codes))


def ready(model, x, **arguments):
    torch.manual_seed(0)
    qsam.quantize_(model, **arguments)
    if arguments.get("activations", "lsq"):
        qsam.calibrate(model, [x])
    random_codes_(model)
    return model


X = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))


def written(**arguments):
    model = nn.Sequential(nn.Linear(64, 8))
    qsam.quantize_(model, **arguments)
    qsam.calibrate(model, [X]), qsam.write_(model)
    return model


def linear(**arguments):
    return ready(nn.Sequential(nn.Linear(64, 8)), X, **arguments)


class Uncalled(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(64, 8)

    def forward(self, x):
        return nn.functional.linear(x, self.fc.weight)


@pytest.mark.parametrize(
    ("build", "arguments", "error", "message"),
    [
        (linear, {"weights": "int4"}, ValueError, r"`weights` must be one of int8, nbits, got 'int4'"),
        (linear, {"opset": 17}, ValueError, r"`opset` must be at least 21"),
        (linear, {"block_size": 48}, ValueError, r"`block_size` must be 16, 32, 64, 128 or 256"),
        (
            lambda: linear(granularity="per_group", group_size=16),
            {},
            ValueError,
            r"'0\.weight' is quantized per group, .*weights='nbits'",
        ),
        (
            lambda: linear(granularity="per_group", group_size=8),
            {"weights": "nbits"},
            ValueError,
            r"'0\.weight' is quantized in groups of 8, and MatMulNBits has blocks of 16",
        ),
        (linear, {"weights": "nbits", "block_size": 128}, ValueError, r"'0\.weight' has 64 inputs, of which .* 128"),
        (
            lambda: ready(nn.Sequential(nn.Linear(40, 8)), X[:, :40]),
            {"weights": "nbits"},
            ValueError,
            r"'0\.weight' has 40 inputs, of which MatMulNBits takes blocks of 16.*quantize the layer's input.*weights='int8'",
        ),
        (
            lambda: linear(rules=[("*", {"granularity": "per_channel", "axis": 1})]),
            {},
            ValueError,
            r"'0\.weight' has scales along axis 1, .* axis 0: quantize it without `axis`",
        ),
        (
            lambda: ready(
                nn.Sequential(nn.Conv1d(4, 4, 4)), X, activations=None, granularity="per_group", group_size=16
            ),
            {"weights": "nbits"},
            ValueError,
            r"'0\.weight' of Conv1d is quantized per group.*'per_channel'",
        ),
        (
            lambda: ready(nn.Sequential(nn.GRU(4, 4)), X, activations=None),
            {},
            ValueError,
            r"'0\.weight_ih_l0': ONNX's GRU takes float weights only.*rule \('0', None\)",
        ),
        (
            lambda: ready(nn.Sequential(nn.EmbeddingBag(9, 4)), X, activations=None, rules=[("0", {})]),
            {},
            ValueError,
            r"'0\.weight': an EmbeddingBag has no form",
        ),
        (
            lambda: linear(activations="lsq_plus"),
            {},
            TypeError,
            r"the input of '0': the quantizer 'lsq_plus' has levels between",
        ),
        (
            lambda: linear(activations="per_token"),
            {},
            TypeError,
            r"the input of '0': the quantizer 'per_token' follows each batch",
        ),
        (lambda: written(weights="stretched", bits=8), {}, TypeError, r"'0\.weight'.*stretched.*is not codes \* scale"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_has_no_exact_form_is_refused_by_path_before_anything_is_written(
    build, arguments, error, message, tmp_path
):
    model = build()
    with pytest.raises(error, match=message):
        export_onnx(model, X, tmp_path / "m.onnx", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_another_dtype_is_refused_and_the_advice_works(tmp_path):
    model = nn.Sequential(nn.Linear(64, 8)).bfloat16()
    qsam.quantize_(model, activations=None), qsam.write_(model)
    with pytest.raises(ValueError, match=r"'0\.weight' is torch\.bfloat16: export_onnx takes fp32"):
        export_onnx(model, X, tmp_path / "m.onnx")
    wide = copy.deepcopy(model).float()
    qsam.write_(wide)
    assert qsam.export(wide).weights[0].dtype == torch.float32


def test_an_input_without_a_scale_is_refused(tmp_path):
    model = nn.Sequential(nn.Linear(64, 8))
    qsam.quantize_(model), qsam.write_(model)
    with pytest.raises(RuntimeError, match=r"the input of '0' has no scale yet: call qsam\.calibrate"):
        export_onnx(model, X, tmp_path / "m.onnx")


@pytest.mark.parametrize("block", ["perturbed", "latents"])
def test_a_model_off_its_grid_is_refused(block, tmp_path):
    model = nn.Sequential(nn.Linear(64, 8))
    qsam.quantize_(model, activations=None)
    optimizer = qsam.SAQ(model, torch.optim.SGD, lr=0.1)
    with optimizer.first_pass():
        model(X).square().mean().backward()
    with getattr(optimizer, block)():
        with pytest.raises(RuntimeError, match=r"'0\.weight' does not hold its quantized values"):
            export_onnx(model, X, tmp_path / "m.onnx")
        model(X).square().mean().backward()


def test_an_example_of_one_sample_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"example_inputs\[0\] has the size 1 along dimension 0"):
        export_onnx(linear(), X[:1], tmp_path / "m.onnx")


def test_a_missing_package_is_named_with_its_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match=r"needs onnxscript, .*pip install 'qsam\[deploy\]'"):
        export_onnx(linear(), X, tmp_path / "m.onnx")


@pytest.mark.long
def test_a_weight_that_is_used_without_calling_its_layer_is_refused(tmp_path):
    model = ready(Uncalled(), X, activations=None)
    with pytest.raises(RuntimeError, match=r"the exported graph lacks the integers of 'fc\.weight'"):
        export_onnx(model, X, tmp_path / "m.onnx")


@pytest.mark.long
def test_exported_twice_the_bytes_are_the_same_and_the_model_is_not_changed(tmp_path):
    model = ready(nn.Sequential(nn.Linear(64, 8), nn.Linear(8, 4)), X).train()
    before = copy.deepcopy(model.state_dict())
    first, second = (export_onnx(model, X, tmp_path / name) for name in ("a.onnx", "b.onnx"))
    assert first.read_bytes() == second.read_bytes()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.training and [path.name for path in sorted(tmp_path.iterdir())] == ["a.onnx", "b.onnx"]
    assert str(tmp_path).encode() not in first.read_bytes() and b"site-packages" not in first.read_bytes()
