"""ONNX Runtime and OpenVINO compute with the trained integers what the model computes."""

import numpy as np
import pytest
import torch
from torch import nn

import qsam
from qsam.deploy import check, export_onnx, onnx_runtime

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.long  # torch.onnx.export takes seconds for any model

GRANULARITIES = ("per_tensor", "per_channel")
INPUTS, OUTPUTS = 128, 24


def random_codes_(model):
    """Write codes over the full range of every grid: trained ones hide what saturates."""
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for row in qsam.coverage_of(model).quantized:
            row.quantizer.set_from_weight_(row.parameter)
            low, high = row.quantizer.quant_min, row.quantizer.quant_max
            codes = torch.randint(low, high + 1, row.shape, generator=draw).to(row.quantizer.code_dtype)
            row.parameter.copy_(row.quantizer.dequantize(codes))


class Fan(nn.Module):
    """One Linear for each width and granularity, all of one input."""

    def __init__(self, cases):
        super().__init__()
        self.layers = nn.ModuleDict({name: nn.Linear(INPUTS, OUTPUTS) for name in cases})

    def forward(self, x):
        return [layer(x) for layer in self.layers.values()]


def fan(x, cases, **arguments):
    torch.manual_seed(0)
    model = Fan(cases).eval()
    rules = [(f"layers.{name}", rule) for name, rule in cases.items()]
    qsam.quantize_(model, rules=rules, **arguments)
    if arguments.get("activations", "lsq"):
        qsam.calibrate(model, [x])
    random_codes_(model)
    return model


def by_integers(model, x):
    """Return the outputs by int64 products of the codes."""
    exported = qsam.export(model)
    grids = {record.name: record for record in exported.inputs}
    for record in exported.weights:
        path = record.name.removesuffix(".weight")
        codes, scale = record.codes.long().numpy(), record.scale.double().numpy()
        bias = model.get_submodule(path).bias.detach().double().numpy()
        if grid := grids.get(path):
            low, high = (-(2 ** (grid.bits - 1)), 2 ** (grid.bits - 1) - 1) if grid.signed else (0, 2**grid.bits - 1)
            given = (x / grid.scale).clamp(low, high).round().long().numpy()
            yield given @ codes.T * (grid.scale.double().numpy() * scale.reshape(-1)) + bias
        else:
            groups = codes.reshape(len(codes), -1) * np.repeat(
                np.broadcast_to(scale.reshape(scale.shape[0], -1), (len(codes), scale.size // scale.shape[0])),
                codes.shape[1] * scale.shape[0] // scale.size, 1,
            )  # fmt: skip
            yield x.double().numpy() @ groups.T + bias


def worst(found, expected):
    return max(np.abs(a - b).max() / np.abs(b).max() for a, b in zip(found, expected, strict=True))


WIDTHS = {f"{g}_{bits}_{a}": {"bits": bits, "granularity": g, "activation_bits": a}
          for bits in range(2, 9) for g in GRANULARITIES for a in ((8, 4) if bits == 4 else (8,))}  # fmt: skip
STATIC, DYNAMIC = {}, None


@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
@pytest.mark.parametrize(
    ("shape", "shapes"), [((4, INPUTS), DYNAMIC), ((3, 5, INPUTS), DYNAMIC), ((3, 5, INPUTS), STATIC)], ids=str
)
def test_one_layer_is_its_int64_product_and_runs_on_integers(signed, shape, shapes, tmp_path):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    x = x if signed else x.relu()
    model = fan(x, WIDTHS)
    path = export_onnx(model, x, tmp_path / "m.onnx", dynamic_shapes=shapes)
    runtime = onnx_runtime(path)
    expected = list(by_integers(model, x))
    found = runtime.session.run(None, {runtime.session.get_inputs()[0].name: x.numpy()})
    assert worst(found, expected) <= 1e-6
    assert runtime.operators["MatMulIntegerToFloat"] == len(WIDTHS) and runtime.fallback == ()
    assert not {"MatMul", "Gemm", "FusedMatMul"} & set(runtime.operators)
    if shapes is DYNAMIC:
        runtime.session.run(None, {runtime.session.get_inputs()[0].name: x[:1].numpy()})
    held = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
    for record in qsam.export(model).weights:
        codes = held[record.name.replace(".weight", ".onnx.codes")].astype(np.int64)
        assert np.array_equal(codes.T - (128 if record.bits == 8 else 0), record.codes.numpy())


BLOCKS = {f"{bits}_{g}_{size}": {"bits": bits, "granularity": g, "group_size": size}
          for bits in range(2, 9) for g, size in [("per_tensor", None), ("per_channel", None), ("per_group", 32)]}  # fmt: skip


@pytest.mark.parametrize("activations", [None, "lsq"])
def test_matmulnbits_at_level_0_is_the_product_of_the_integers(activations, tmp_path):
    x = torch.randn(3, 5, INPUTS, generator=torch.Generator().manual_seed(1))
    cases = {name: rule for name, rule in BLOCKS.items() if activations is None or "group" not in name}
    model = fan(x, cases, activations=activations)
    runtime = onnx_runtime(export_onnx(model, x, tmp_path / "m.onnx", weights="nbits"))
    found = runtime.session.run(None, {runtime.session.get_inputs()[0].name: x.numpy()})
    assert worst(found, list(by_integers(model, x))) <= 1e-6
    assert runtime.operators["MatMulNBits"] == len(cases)


FLOAT_32 = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
"""Without the second, OpenVINO rounds the inputs of packed weights to 8 bits once more."""


@pytest.mark.parametrize("weights", ["int8", "nbits"])
def test_openvino_reads_the_same_file(weights, tmp_path):
    openvino = pytest.importorskip("openvino")
    x = torch.randn(3, 5, INPUTS, generator=torch.Generator().manual_seed(1))
    model = fan(x, {f"b{bits}": {"bits": bits} for bits in range(2, 9)}, granularity="per_channel")
    path = export_onnx(model, x, tmp_path / "m.onnx", weights=weights)
    compiled = openvino.Core().compile_model(str(path), "CPU", FLOAT_32)
    found = list(compiled(x.numpy()).values())
    assert worst(found, list(by_integers(model, x))) <= 1e-6


class Tables(nn.Module):
    def __init__(self, cases):
        super().__init__()
        self.tables = nn.ModuleDict({name: nn.Embedding(20, 32) for name in cases})

    def forward(self, ids):
        return [table(ids) for table in self.tables.values()]


def test_embeddings_are_the_rows_of_the_model_bit_for_bit(tmp_path):
    cases = {f"{bits}_{g}_{size}": {"bits": bits, "granularity": g, "group_size": size}
             for bits in (8, 4) for g, size in [("per_tensor", None), ("per_channel", None), ("per_group", 16)]}  # fmt: skip
    model = Tables(cases)
    qsam.quantize_(model, activations=None, rules=[(f"tables.{name}", rule) for name, rule in cases.items()])
    random_codes_(model)
    ids = torch.arange(20).reshape(4, 5)
    runtime = onnx_runtime(export_onnx(model, ids, tmp_path / "m.onnx"))
    found = runtime.session.run(None, {runtime.session.get_inputs()[0].name: ids.numpy()})
    for ours, theirs in zip(model(ids), found, strict=True):
        assert np.array_equal(ours.detach().numpy(), theirs)


def cnn():
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * 64, 5)), torch.randn(4, 3, 18, 18)


def hugging_face(name, **more):
    def build():
        transformers = pytest.importorskip("transformers")
        sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
        kind = name.partition("For")[0].removesuffix("LMHeadModel")
        if kind == "GPT2":
            sizes = dict(n_embd=32, n_layer=2, n_head=2, vocab_size=50, bos_token_id=0, eos_token_id=0)
        elif kind == "ViT":
            sizes |= dict(image_size=16, patch_size=8)
        else:
            sizes |= dict(vocab_size=50)
        model = getattr(transformers, name)(getattr(transformers, f"{kind}Config")(**sizes, **more)).eval()
        if kind == "ViT":
            return model, {"pixel_values": torch.randn(4, 3, 16, 16)}
        ids = torch.randint(0, 50, (4, 6))
        return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    return build


MODELS = {
    "cnn": cnn,
    "bert": hugging_face("BertForSequenceClassification"),
    "vit": hugging_face("ViTForImageClassification"),
    "gpt2": hugging_face("GPT2LMHeadModel"),
    "llama": hugging_face("LlamaForCausalLM", num_key_value_heads=1),
}


@pytest.mark.parametrize("activations", [None, "lsq"])
@pytest.mark.parametrize(
    ("name", "weights"), [(n, w) for n in MODELS for w in ("int8", "nbits") if (n, w) != ("cnn", "nbits")]
)
def test_a_whole_model_answers_as_torch_does(name, weights, activations, tmp_path):
    """With float inputs up to rounding; with quantized ones rounding flips a code now and then."""
    torch.manual_seed(0)
    model, batch = MODELS[name]()
    model.eval()
    qsam.quantize_(model, activations=activations, granularity="per_channel")
    qsam.calibrate(model, [batch]) if activations else None
    qsam.write_(model)
    path = export_onnx(model, batch, tmp_path / "m.onnx", weights)
    runtime = onnx_runtime(path)
    with torch.no_grad():
        out = model(**batch).logits if isinstance(batch, dict) else model(batch)
    theirs = torch.from_numpy(runtime(batch))
    relative = (theirs - out).abs() / out.abs().max()
    if activations is None:
        assert float(relative.max()) <= 2e-6
    else:
        assert float(relative.mean()) <= 1e-2
        assert out.numel() < 100 or float((relative > 1e-4).float().mean()) < 0.05
    if activations and weights == "int8" and name != "cnn":
        assert runtime.operators["MatMulIntegerToFloat"] > 4 and not [
            n for n in runtime.fallback if "conv" not in n.lower()
        ]
    report = check(model, runtime, [batch], metric=lambda outputs: float(np.mean(outputs[0])))
    assert report.metric[0] == pytest.approx(report.metric[1], abs=1e-2)
