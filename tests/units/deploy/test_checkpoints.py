"""Each layout's tensors and config, and what a layout does not hold. What loaders make of them: tests/world."""

import json

import pytest
import safetensors.torch
import torch

import qsam
from qsam import deploy
from qsam.deploy.packed import pack_rows, unpack_rows
from tests.models import BERT, GPT2, MLP

pytest.importorskip("transformers")

KEYS = {"compressed-tensors": "weight_packed", "mlx": "weight", "olive": "qweight"}


def bert(**options):
    """Return a BERT with quantized Linears of 16 and 32 columns, and everything else float."""
    rules = [("*embeddings*", None), ("classifier", None), ("*", {})]
    model = BERT.quantized(**{"activations": None, "rules": rules, **options})
    qsam.write_(model)
    return model


def read(folder):
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    return tensors, json.loads((folder / "config.json").read_text())


def llama(**options):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=40, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2,
                         tie_word_embeddings=options.pop("tied", False))  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    qsam.quantize_(model, **{"activations": None, "granularity": "per_group", "group_size": 32, **options})
    qsam.write_(model)
    return model


@pytest.mark.parametrize("layout", sorted(KEYS))
@pytest.mark.parametrize("bits", range(2, 9))
def test_the_codes_in_the_file_are_those_of_the_model(layout, bits, tmp_path):
    model = llama(bits=bits)
    written = deploy.export_checkpoint(model, tmp_path / "out", layout)
    tensors, _ = read(tmp_path / "out")
    layers = {layer.name: layer for layer in deploy.integers(model)}
    assert len(written) == len(layers) == 8
    for linear in written:
        layer = layers.pop(linear.layer.name)
        packed = tensors[f"{layer.path}.{KEYS[layout]}"]
        codes = unpack_rows(packed.view(torch.uint8), linear.bits, layer.codes.shape[1])
        assert torch.equal(codes, layer.codes)
        scales = tensors[f"{layer.path}.{'weight_scale' if layout == 'compressed-tensors' else 'scales'}"]
        assert torch.equal(scales, layer.scale[..., 0])
        assert linear.bits == min(w for w in {"mlx": (2, 3, 4, 5, 6, 8)}.get(layout, (2, 4, 8)) if w >= layer.bits)


def test_compressed_tensors_says_bits_groups_inputs_and_what_is_ignored(tmp_path):
    model = bert(bits=4, activations="lsq")
    deploy.export_checkpoint(model, tmp_path / "out")
    tensors, config = read(tmp_path / "out")
    found = config["quantization_config"]
    assert found["ignore"] == ["classifier"]
    assert (found["quant_method"], found["format"]) == ("compressed-tensors", "pack-quantized")
    assert config["architectures"] == ["BertForSequenceClassification"]
    (group,) = [g for g in found["config_groups"].values() if "bert.pooler.dense" in g["targets"]]
    static = {"type": "int", "dynamic": False, "symmetric": True}
    assert group["weights"] == {**static, "num_bits": 4, "strategy": "channel"}
    assert group["input_activations"] == {**static, "num_bits": 8, "strategy": "tensor"}
    name = "bert.pooler.dense"
    quantizer = model.get_submodule(name).input_quantizer
    assert torch.equal(tensors[f"{name}.input_scale"], quantizer.scale.detach())
    assert tensors[f"{name}.weight_scale"].shape == (16, 1)
    assert tensors[f"{name}.weight_shape"].tolist() == [16, 16]
    assert tensors[f"{name}.weight_packed"].shape == (16, 2)
    assert f"{name}.weight" not in tensors
    assert not any("_quantizer" in key for key in tensors)


def test_an_unsigned_input_has_the_zero_point_of_its_range(tmp_path):
    model = bert(activations="lsq")
    quantizer = model.bert.pooler.dense.input_quantizer
    quantizer.set_sign_(False)
    deploy.export_checkpoint(model, tmp_path / "out")
    tensors, config = read(tmp_path / "out")
    assert tensors["bert.pooler.dense.input_zero_point"].tolist() == [-128]
    groups = config["quantization_config"]["config_groups"].values()
    (group,) = [g for g in groups if "bert.pooler.dense" in g["targets"]]
    assert group["input_activations"]["symmetric"] is False


def test_mlx_and_olive_say_bits_and_groups_of_each_linear(tmp_path):
    model = llama(bits=3)
    deploy.export_checkpoint(model, tmp_path / "mlx", "mlx")
    tensors, config = read(tmp_path / "mlx")
    path = "model.layers.0.mlp.up_proj"
    assert config["quantization"] == config["quantization_config"]
    assert config["quantization"][path] == {"group_size": 32, "bits": 3}
    assert config["quantization"]["lm_head"] == {"group_size": 32, "bits": 8}
    assert torch.equal(tensors[f"{path}.biases"], -4 * tensors[f"{path}.scales"])
    deploy.export_checkpoint(model, tmp_path / "olive", "olive")
    tensors, config = read(tmp_path / "olive")
    found = config["quantization_config"]
    assert (found["quant_method"], found["bits"], found["group_size"], found["symmetric"]) == ("olive", 4, 32, True)
    assert found["overrides"] == {"lm_head": {"group_size": 32, "bits": 8}}
    assert torch.equal(tensors[f"{path}.qzeros"], pack_rows(torch.full((96, 2), 8, dtype=torch.uint8), 4))


def test_a_scale_per_row_is_repeated_for_a_layout_of_groups(tmp_path):
    model = llama(granularity="per_channel", group_size=None)
    deploy.export_checkpoint(model, tmp_path / "out", "mlx")
    tensors, config = read(tmp_path / "out")
    path = "model.layers.0.mlp.down_proj"  # 96 columns: the largest group that divides them
    assert config["quantization"][path] == {"group_size": 32, "bits": 4}
    assert torch.equal(
        tensors[f"{path}.scales"], model.model.layers[0].mlp.down_proj.weight_quantizer.scale.expand(64, 3)
    )


def test_a_tied_head_is_left_out_and_ignored(tmp_path):
    deploy.export_checkpoint(llama(tied=True), tmp_path / "out")
    tensors, config = read(tmp_path / "out")
    assert "lm_head.weight" not in tensors and "model.embed_tokens.weight" in tensors
    assert config["quantization_config"]["ignore"] == ["lm_head"]


def test_dtype_casts_floats_and_refuses_scales_that_it_would_round(tmp_path):
    model = llama()
    with pytest.raises(
        ValueError, match=r"has scales that torch\.float16 rounds.*round_scales_\(model, torch\.float16\)"
    ):
        deploy.export_checkpoint(model, tmp_path / "out", dtype=torch.float16)
    assert not list(tmp_path.iterdir())
    deploy.round_scales_(model, torch.float16)
    deploy.export_checkpoint(model, tmp_path / "out", dtype=torch.float16)
    tensors, config = read(tmp_path / "out")
    assert config["dtype"] == "float16"
    assert {t.dtype for key, t in tensors.items() if "packed" not in key and "shape" not in key} == {torch.float16}


def test_tensors_keep_their_own_dtype_and_a_rounded_scale_of_an_input_is_refused(tmp_path):
    model = llama()
    model.model.norm.to(torch.float64)
    deploy.export_checkpoint(model, tmp_path / "out")
    tensors, config = read(tmp_path / "out")
    assert config["dtype"] == "float32"
    assert tensors["model.norm.weight"].dtype == torch.float64
    model = bert(activations="lsq")
    deploy.round_scales_(model, torch.bfloat16)
    with pytest.raises(
        ValueError, match=r"the input of 'bert.* has a scale that torch\.bfloat16 rounds.*torch\.float32"
    ):
        deploy.export_checkpoint(model, tmp_path / "half", dtype=torch.bfloat16)


def test_exact_width_keeps_three_bits(tmp_path):
    (written, *_) = deploy.export_checkpoint(llama(bits=3), tmp_path / "out", exact_width=True)
    tensors, _ = read(tmp_path / "out")
    assert written.bits == 3
    assert tensors[f"{written.layer.path}.weight_packed"].shape == (64, 64 * 3 // 32)


def refusals():
    conv1d = {"task": GPT2, "rules": [("*wte", None), ("*wpe", None), ("*", {})]}
    yield (
        "Conv1D",
        conv1d,
        {},
        r"is a Conv1D, and the layout 'compressed-tensors' takes Linear only: use deploy\.export_gguf",
    )
    yield (
        "Embedding",
        {"rules": [("*", {})]},
        {"layout": "olive"},
        r"is the weight of Embedding, and the layout 'olive'",
    )
    yield (
        "group",
        {"granularity": "per_group", "group_size": 8},
        {"layout": "mlx"},
        r"a scale per 8, .*groups of 128, 64, 32",
    )
    yield (
        "row",
        {},
        {"layout": "mlx"},
        r"has a scale per 16, and the layout 'mlx' has groups of 128, 64, 32: quantize it",
    )
    yield "axis", {"granularity": "per_channel", "rules": [("*query", {"axis": 1}), ("*", None)]}, {}, "along axis 1"
    yield (
        "input",
        {"activations": "minmax_ema"},
        {},
        r"has levels from -127 to 127, .* would add one below: quantize inputs",
    )
    yield "layout", {}, {"layout": "awq"}, r"`layout` must be one of compressed-tensors, mlx, olive, got 'awq'"


@pytest.mark.parametrize(("options", "call", "message"), [pytest.param(o, c, m, id=i) for i, o, c, m in refusals()])
def test_what_a_layout_does_not_hold_is_refused_and_nothing_is_written(options, call, message, tmp_path):
    options = dict(options)
    task = options.pop("task", None)
    if task is None:
        model = bert(**options)
    else:
        model = task.quantized(activations=None, **options)
        qsam.write_(model)
    with pytest.raises(ValueError, match=message):
        deploy.export_checkpoint(model, tmp_path / "out", **call)
    assert not list(tmp_path.iterdir())


def test_inputs_that_a_layout_leaves_out_are_told(tmp_path):
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(vocab_size=40, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    model = BertForSequenceClassification(config)
    qsam.quantize_(model, rules=qsam.presets.squat_bert)
    qsam.calibrate(model, [{"input_ids": torch.ones(1, 4, dtype=torch.long)}])
    qsam.write_(model)
    with pytest.warns(
        UserWarning, match=r"the layout 'mlx' holds weights only: the inputs of 6 layers .*activations=None"
    ):
        deploy.export_checkpoint(model, tmp_path / "out", "mlx")


def test_a_plain_model_and_a_folder_in_use_are_refused(tmp_path):
    model = MLP.quantized(activations=None)
    qsam.write_(model)
    with pytest.raises(
        TypeError, match=r"a checkpoint needs a model of transformers.*got Sequential: use deploy\.save"
    ):
        deploy.export_checkpoint(model, tmp_path)
    (tmp_path / "other.safetensors").write_bytes(b"")
    with pytest.raises(FileExistsError, match=r"exists: give a new folder, so that no file of another model stays"):
        deploy.export_checkpoint(llama(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["other.safetensors"]


def test_an_empty_folder_is_taken_and_twice_the_same_is_written(tmp_path):
    model = llama()
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        deploy.export_checkpoint(model, tmp_path / name)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == ["config.json", "generation_config.json", "model.safetensors"]
    assert all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
