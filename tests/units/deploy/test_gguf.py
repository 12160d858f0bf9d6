"""Blocks hold codes and scales exactly, and what no block holds is refused before anything is written."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import qsam
from qsam import deploy
from qsam.deploy.gguf import TYPES

gguf = pytest.importorskip("gguf")


def q2_0(blocks):
    """Return what llama.cpp reads from Q2_0, which gguf 0.19 does not know: (q - 1) d, four codes a byte, d first."""
    blocks = blocks.reshape(-1, 18)
    d = blocks[:, :2].copy().view(np.float16).astype(np.float32)
    q = (blocks[:, 2:, None] >> np.array([0, 2, 4, 6], np.uint8)) & 3
    return d * (q.reshape(len(blocks), 64).astype(np.float32) - 1)


@given(
    name=st.sampled_from(list(TYPES)),
    rows=st.integers(1, 3),
    count=st.integers(1, 2),
    by_row=st.booleans(),
    seed=st.integers(0, 99),
)
def test_the_reference_dequantizer_reads_codes_times_scale(name, rows, count, by_row, seed):
    kind, draw = TYPES[name], torch.Generator().manual_seed(seed)
    low = 2 ** (kind.bits - 1)
    codes = torch.randint(-low, low, (rows, count * kind.block), generator=draw).to(torch.int8)
    scale = (torch.rand(rows, 1 if by_row else count, generator=draw) + 2**-10).half().float()
    blocks = kind.blocks(codes, scale).numpy()
    expected = codes * scale.repeat_interleave(codes.shape[1] // scale.shape[1], 1)
    if name == "Q2_0":
        found = q2_0(blocks)
    else:
        assert gguf.GGMLQuantizationType[name] == kind.number
        assert gguf.GGML_QUANT_SIZES[kind.number] == (kind.block, blocks.shape[1] // count)
        found = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType(kind.number))
    assert torch.equal(torch.from_numpy(found).reshape(expected.shape), expected)


class OneBlock(nn.Module):
    """A model with the names of a Llama's layer."""

    def __init__(self, width=64, **options):
        super().__init__()
        self.model = nn.Module()
        layer = nn.Module()
        layer.mlp = nn.Module()
        layer.mlp.up_proj = nn.Linear(width, 8, bias=False, **options)
        self.model.layers = nn.ModuleList([layer])

    def forward(self, x):
        return self.model.layers[0].mlp.up_proj(x)


def quantized(width=64, half=True, **options):
    torch.manual_seed(0)
    model = OneBlock(width)
    qsam.quantize_(model, **{"activations": None, "granularity": "per_channel", **options})
    qsam.write_(model)
    if half:
        deploy.round_scales_(model, torch.float16)
    return model


def write_float(model, path, **more):
    """Write a GGUF file of floats; ``more`` are other tensors by name."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_head_count(2)
    writer.add_array("some.list", ["a", "b"])
    weight = model.model.layers[0].mlp.up_proj.weight.detach().numpy()
    for name, values in {"blk.0.ffn_up.weight": weight, "other.weight": np.ones((2, 3), np.float32), **more}.items():
        writer.add_tensor(name, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_everything_else_is_copied(tmp_path):
    model = quantized(bits=4)
    source = write_float(model, tmp_path / "float.gguf")
    (patched,) = deploy.export_gguf(model, source, tmp_path / "q.gguf")
    assert (patched.tensor, patched.layer.name, patched.type) == (
        "blk.0.ffn_up.weight", "model.layers.0.mlp.up_proj.weight", "Q4_0")  # fmt: skip
    before, after = gguf.GGUFReader(source), gguf.GGUFReader(tmp_path / "q.gguf")
    for name, field in before.fields.items():
        if not name.startswith("GGUF."):
            assert after.fields[name].contents() == field.contents()
    assert after.fields["general.quantization_version"].contents() == 2
    found = {tensor.name: tensor for tensor in after.tensors}
    assert np.array_equal(found["other.weight"].data, np.ones((2, 3), np.float32))
    weight = gguf.quants.dequantize(found[patched.tensor].data, found[patched.tensor].tensor_type)
    assert torch.equal(torch.from_numpy(weight), model.model.layers[0].mlp.up_proj.weight)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["float.gguf", "q.gguf"]
    assert found[patched.tensor].n_bytes == patched.blocks.numel() == 8 * 64 // 32 * 18


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_the_float_file_may_be_of_the_model_before_its_scales_were_rounded(dtype, tmp_path):
    model = quantized(bits=8, half=False)
    weight = model.model.layers[0].mlp.up_proj.weight.detach().numpy().copy()
    source = write_float(model, tmp_path / "float.gguf", **{"blk.0.ffn_up.weight": weight.astype(dtype)})
    deploy.round_scales_(model, torch.float16)
    deploy.export_gguf(model, source, tmp_path / "q.gguf")
    found = next(t for t in gguf.GGUFReader(tmp_path / "q.gguf").tensors if t.name == "blk.0.ffn_up.weight")
    values = torch.from_numpy(gguf.quants.dequantize(found.data, found.tensor_type))
    assert torch.equal(values, model.model.layers[0].mlp.up_proj.weight)
    assert not np.array_equal(values.numpy(), weight)


def test_rows_in_rotary_order_are_found_by_value(tmp_path):
    model = quantized(bits=8)
    weight = model.model.layers[0].mlp.up_proj.weight.detach().numpy()
    turned = weight.reshape(2, 2, 2, 64).swapaxes(1, 2).reshape(8, 64)
    source = write_float(model, tmp_path / "float.gguf", **{"blk.0.ffn_up.weight": turned})
    deploy.export_gguf(model, source, tmp_path / "q.gguf")
    found = next(t for t in gguf.GGUFReader(tmp_path / "q.gguf").tensors if t.name == "blk.0.ffn_up.weight")
    assert np.array_equal(gguf.quants.dequantize(found.data, found.tensor_type), turned)


@pytest.mark.parametrize(
    ("options", "width", "expected"),
    [
        ({"bits": 2}, 256, "Q2_0"),
        ({"bits": 2}, 64, "Q2_0"),
        ({"bits": 2, "granularity": "per_group", "group_size": 32}, 64, "Q4_0"),
        ({"bits": 2, "types": ["TQ2_0", "Q8_0"]}, 256, "TQ2_0"),
        ({"bits": 2, "types": ["Q2_K", "Q8_0"]}, 256, "Q2_K"),
        ({"bits": 3}, 256, "Q3_K"),
        ({"bits": 3}, 64, "Q4_0"),
        ({"bits": 3, "granularity": "per_group", "group_size": 128}, 256, "Q4_0"),
        ({"bits": 5, "granularity": "per_tensor"}, 64, "Q5_0"),
        ({"bits": 6}, 256, "Q6_K"),
        ({"bits": 7}, 256, "Q8_0"),
        ({"bits": 8}, 32, "Q8_0"),
    ],
)
def test_each_weight_gets_the_smallest_type_that_holds_its_grid(options, width, expected, tmp_path):
    types = options.pop("types", None)
    model = quantized(width, **options)
    (patched,) = deploy.export_gguf(model, write_float(model, tmp_path / "float.gguf"), tmp_path / "q.gguf", types)
    assert patched.type == expected


def refusals():
    yield "type", {}, {"types": ["Q4_1"]}, r"`types` must name some of TQ2_0, .*, got 'Q4_1'\. Did you mean"
    yield (
        "half",
        {"half": False},
        {},
        r"scales that are no fp16 numbers.*deploy\.round_scales_\(model, torch\.float16\)",
    )
    yield "width", {"width": 40}, {}, r"has rows of 40 and a scale per 40 of 4 bits, which no block type divides"
    yield "bits", {"bits": 8}, {"types": ["Q4_0"]}, r"none has so many bits"
    yield (
        "group",
        {"granularity": "per_group", "group_size": 16},
        {},
        r"a scale per 16 of 4 bits.*use groups of a multiple",
    )
    yield "axis", {"rules": [("*", {"axis": 1})]}, {}, r"has its scales along axis 1"


@pytest.mark.parametrize(("options", "call", "message"), [pytest.param(o, c, m, id=i) for i, o, c, m in refusals()])
def test_what_no_block_holds_is_refused_and_nothing_is_written(options, call, message, tmp_path):
    model = quantized(**options)
    source = write_float(model, tmp_path / "float.gguf")
    with pytest.raises(ValueError, match=message):
        deploy.export_gguf(model, source, tmp_path / "q.gguf", **call)
    assert [p.name for p in tmp_path.iterdir()] == ["float.gguf"]


def test_a_float_file_of_other_values_of_another_type_or_without_the_tensor_is_refused(tmp_path):
    model = quantized()
    weight = model.model.layers[0].mlp.up_proj.weight.detach().numpy()
    for other in (weight + 1e-3, weight * 1.003, weight[::-1], weight.astype(np.float16).view(np.int16), weight[:4]):
        source = write_float(model, tmp_path / "float.gguf", **{"blk.0.ffn_up.weight": other})
        with pytest.raises(
            ValueError, match=r"'blk\.0\.ffn_up\.weight' in the float GGUF does not hold the values of 'm"
        ):
            deploy.export_gguf(model, source, tmp_path / "q.gguf")
    model.model.layers[0].mlp.odd = nn.Linear(64, 8)
    qsam.dequantize_(model)
    qsam.quantize_(model, activations=None, bits=8)
    qsam.write_(model)
    deploy.round_scales_(model, torch.float16)
    source = write_float(model, tmp_path / "float.gguf")
    with pytest.raises(ValueError, match=r"'model\.layers\.0\.mlp\.odd\.weight' has no tensor in .*float\.gguf'"):
        deploy.export_gguf(model, source, tmp_path / "q.gguf")
    with pytest.raises(ValueError, match=r"float\.gguf' is the float file itself: give another path"):
        deploy.export_gguf(model, source, source)
    with pytest.raises(FileNotFoundError, match=r"there is no .*convert_hf_to_gguf\.py --outtype f32"):
        deploy.export_gguf(model, tmp_path / "none.gguf", tmp_path / "q.gguf")


def test_a_convolution_and_an_architecture_that_gguf_does_not_know_are_refused(tmp_path):
    conv = nn.Sequential(nn.Conv2d(4, 4, 3))
    qsam.quantize_(conv, activations=None)
    qsam.write_(conv)
    model = quantized()
    source = write_float(model, tmp_path / "float.gguf")
    with pytest.raises(ValueError, match=r"'0\.weight' is the weight of Conv2d, and GGUF has types for matrices of"):
        deploy.export_gguf(conv, source, tmp_path / "q.gguf")
    writer = gguf.GGUFWriter(tmp_path / "odd.gguf", "nonesuch")
    writer.add_block_count(1)
    writer.add_tensor("a", np.ones((2, 2), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match=r"the package gguf does not know the architecture 'nonesuch'"):
        deploy.export_gguf(model, tmp_path / "odd.gguf", tmp_path / "q.gguf")
