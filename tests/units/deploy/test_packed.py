"""A packed file is the model: every layer, width and granularity comes back bit for bit, or an error says why not."""

import json
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import qsam
from qsam import deploy
from qsam.deploy.packed import pack_rows, unpack_rows
from qsam.functional import integer_limits
from tests.contract.test_export import DTYPES, LAYERS
from tests.methods import assert_same
from tests.models import BERT, CONV, GPT2, MLP, TIED, Task, _inputs

FILES = ("qsam.json", "qsam.safetensors")


@given(
    rows=st.integers(0, 3), n=st.integers(1, 70), bits=st.integers(2, 8), signed=st.booleans(), seed=st.integers(0, 99)
)
def test_unpacking_undoes_packing_and_a_row_is_as_short_as_can_be(rows, n, bits, signed, seed):
    low, high = integer_limits(bits, signed)
    draw = torch.Generator().manual_seed(seed)
    codes = torch.randint(low, high + 1, (rows, n), generator=draw).to(torch.int8 if signed else torch.uint8)
    packed = pack_rows(codes, bits)
    assert packed.shape == (rows, -(-n * bits // 8))
    assert packed.dtype == torch.uint8
    assert torch.equal(unpack_rows(packed, bits, n, signed=signed), codes)


def test_the_lowest_bits_come_first_and_rows_start_at_a_byte():
    codes = torch.tensor([[-4, 3, 0], [-4, -4, -4]], dtype=torch.int8)  # 0b000, 0b111, 0b100: 0b1_00_111_000, 0b1
    assert pack_rows(codes, 3).tolist() == [[0b00111000, 0b1], [0, 0]]


def test_a_code_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"codes from -3 to 1 do not fit 2 bits"):
        pack_rows(torch.tensor([[-3, 1]], dtype=torch.int8), 2)


@settings(max_examples=40)
@given(
    kind=st.sampled_from(sorted(LAYERS)),
    bits=st.integers(2, 8),
    granularity=st.sampled_from(["per_tensor", "per_channel", "per_group"]),
    weights=st.sampled_from(["lsq", "fixed_step", "diffq", "minmax_ema", "stretched", "liq", "qbert"]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 100),
)
def test_every_layer_comes_back_bit_for_bit(tmp_path_factory, kind, bits, granularity, weights, dtype, seed):
    if weights == "qbert" and granularity == "per_group":
        granularity = "per_channel"
    torch.manual_seed(seed)
    model = LAYERS[kind]().to(dtype)
    group = {"group_size": 2} if granularity == "per_group" else {}
    rule = ("*", {"weights": weights, "granularity": granularity, **group})
    qsam.quantize_(model, bits=bits, activations=None, rules=[rule])
    qsam.write_(model)
    folder = tmp_path_factory.mktemp("packed")
    deploy.save(model, folder)
    fresh = LAYERS[kind]().to(dtype)
    deploy.load(fresh, folder)
    assert_same(fresh.state_dict(), model.state_dict())


@pytest.mark.parametrize("task", [MLP, CONV, TIED, BERT, GPT2], ids=str)
@pytest.mark.parametrize("activations", ["lsq", "lsq_plus", "per_token"])
def test_a_loaded_model_computes_the_same_bit_for_bit(task: Task, activations, tmp_path):
    model = task.quantized(bits=3, granularity="per_channel", activations=activations)
    qsam.write_(model)
    spec = deploy.save(model, tmp_path)
    assert spec == tmp_path / "qsam.json"
    fresh = task.build()
    coverage = deploy.load(fresh, tmp_path)
    batch = _inputs(task.batch(3))
    outputs = [m.eval()(**batch) if isinstance(batch, dict) else m.eval()(batch) for m in (model, fresh)]
    assert torch.equal(*[getattr(out, "logits", out) for out in outputs])
    assert str(coverage) == str(qsam.coverage_of(model))
    assert_same(fresh.state_dict(), model.state_dict())


def test_a_tied_weight_is_stored_once_and_stays_tied(tmp_path):
    model = TIED.quantized(bits=4)
    qsam.write_(model)
    deploy.save(model, tmp_path)
    fresh = TIED.build()
    deploy.load(fresh, tmp_path)
    assert fresh.a.weight is fresh.b.weight
    import safetensors.torch

    stored = safetensors.torch.load_file(tmp_path / "qsam.safetensors")
    assert stored["a.weight_packed"].shape == (8, 4)
    assert "b.weight" not in stored and "b.weight_packed" not in stored


def test_the_file_is_as_small_as_the_coverage_says_but_for_its_header(tmp_path):
    model = nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 512))
    coverage = qsam.quantize_(model, bits=2, granularity="per_channel", activations=None, rules=[("*", {})])
    qsam.write_(model)
    deploy.save(model, tmp_path)
    # `limits` of two quantizers, and the header
    assert 0 <= (tmp_path / "qsam.safetensors").stat().st_size - coverage.size_bytes < 2 * 8 + 1500


def test_an_optimizer_that_lives_changes_nothing_and_another_goes_on_from_the_file(tmp_path):
    model = MLP.quantized()
    optimizer = qsam.QAT(model, torch.optim.SGD, lr=0.1)
    deploy.save(model, tmp_path)
    fresh = MLP.build()
    deploy.load(fresh, tmp_path)
    assert_same(fresh.state_dict(), model.state_dict())
    with pytest.warns(UserWarning, match="grid"):
        later = qsam.QAT(fresh, torch.optim.SGD, lr=0.1)
        later.step(lambda: MLP.loss(fresh, MLP.batch(0)).backward())
    del optimizer


def test_a_weight_kept_by_identity_is_stored_as_it_is(tmp_path):
    model = MLP.quantized(rules=[("0", {"weights": "identity"}), ("2", {}), ("4", None)])
    qsam.write_(model)
    deploy.save(model, tmp_path)
    fresh = MLP.build()
    deploy.load(fresh, tmp_path)
    assert_same(fresh.state_dict(), model.state_dict())


def test_a_quantizer_with_outliers_is_refused():
    model = MLP.quantized(weights="gobo", activations=None)
    qsam.write_(model)
    with pytest.raises(TypeError, match=r"'0\.weight': the quantizer 'gobo' has no `scale`"):
        deploy.save(model, "nowhere")


def test_state_that_is_no_tensor_is_refused(tmp_path):
    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"a": 1}

    model = nn.Sequential(Extra(4, 4), nn.Linear(4, 4))
    qsam.quantize_(model, activations=None)
    qsam.write_(model)
    with pytest.raises(TypeError, match=r"'0\._extra_state' in the model's state_dict is no tensor but dict"):
        deploy.save(model, tmp_path)


def other_models():
    yield "more", nn.Sequential(*MLP.build(), nn.Linear(4, 4)), r"lacks '5\.weight'"
    yield "less", MLP.build()[:-1], r"the spec names '4\.weight', which this model does not have"
    yield (
        "fewer biases",
        with_(MLP.build(), 4, nn.Linear(12, 4, bias=False)),
        r"holds '4\.bias', which this model lacks",
    )
    yield (
        "shape",
        with_(MLP.build(), 2, nn.Linear(12, 16)),
        r"'2\.weight' has shape \[16, 12\], the spec's has \[12, 16\]",
    )
    yield (
        "dtype",
        MLP.build().half(),
        r"'0\.weight' was saved with dtype float32 and has float16.*model\.to\(torch\.float32\)",
    )
    buffer = MLP.build()
    buffer.register_buffer("extra", torch.ones(3))
    yield "buffer", buffer, "lacks 'extra'"


def with_(model, index, module):
    model[index] = module
    return model


@pytest.mark.parametrize(("model", "message"), [pytest.param(m, t, id=i) for i, m, t in other_models()])
def test_another_model_is_refused_and_stays_as_it_was(model, message, tmp_path):
    saved = MLP.quantized()
    qsam.write_(saved)
    deploy.save(saved, tmp_path)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        deploy.load(model, tmp_path)
    assert qsam.coverage_of(model) is None
    assert_same(model.state_dict(), before)


def test_a_quantized_model_a_missing_file_and_a_folder_of_coverage_save_are_refused_with_the_cure(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"there is no .*qsam\.json': qsam\.deploy\.save\(model, folder\) writes"
    ):
        deploy.load(MLP.build(), tmp_path)
    model = MLP.quantized()
    qsam.write_(model)
    qsam.coverage_of(model).save(tmp_path)
    with pytest.raises(ValueError, match=r"has no packed weights: it was written by Coverage\.save.*from_pretrained"):
        deploy.load(MLP.build(), tmp_path)
    deploy.save(model, tmp_path)
    with pytest.raises(RuntimeError, match=r"the model is quantized already: load into a float model"):
        deploy.load(model, tmp_path)
    (tmp_path / "qsam.safetensors").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"qsam\.safetensors', the scales that belong to qsam\.json, is missing"
    ):
        deploy.load(MLP.build(), tmp_path)


def test_a_packed_folder_is_a_spec_like_any_other(tmp_path):
    model = MLP.quantized()
    qsam.write_(model)
    deploy.save(model, tmp_path)
    fresh = MLP.build()
    qsam.quantize_(fresh, spec=tmp_path)
    assert torch.equal(fresh[0].weight_quantizer.scale, model[0].weight_quantizer.scale)


def spoiled(content, chance):
    """Return bytes that differ a little: flipped, cut, doubled, moved or replaced."""
    at, length = chance.randrange(len(content)), chance.randrange(1, 9)
    kind = chance.randrange(5)
    if kind == 0:
        other = bytearray(content)
        other[at] ^= 1 << chance.randrange(8)
        return bytes(other)
    if kind == 1:
        return content[:at]
    if kind == 2:
        return content[:at] + content[at + length :]
    if kind == 3:
        return content[:at] + content[at : at + length] + content[at:]
    digits = chance.choice([b"0", b"1", b"8", b"null", b"true", b"[]", b'"x"', b"{}", b"-1", b"1e9", b" "])
    return content[:at] + digits + content[at + chance.randrange(3) :]


def check_mutations(folder, count, seed):
    """Every mutation of either file gives an error that names a file or a weight, or exactly the saved model."""
    model = TIED.quantized(bits=3, granularity="per_channel")
    qsam.write_(model)
    deploy.save(model, folder)
    whole = {name: (folder / name).read_bytes() for name in FILES}
    expected, chance, refused = model.state_dict(), random.Random(seed), 0
    for _ in range(count):
        name = chance.choice(FILES)
        (folder / name).write_bytes(spoiled(whole[name], chance))
        fresh = TIED.build()
        before = {key: value.clone() for key, value in fresh.state_dict().items()}
        try:
            deploy.load(fresh, folder)
        except (ValueError, FileNotFoundError) as error:
            assert "qsam.json" in str(error) or "qsam.safetensors" in str(error)
            assert_same(fresh.state_dict(), before)
            refused += 1
        else:
            assert_same(fresh.state_dict(), expected)
        (folder / name).write_bytes(whole[name])
    assert refused > 0.8 * count


def test_mutated_files_are_refused_or_harmless(tmp_path):
    check_mutations(tmp_path, 200, seed=0)


@pytest.mark.long
def test_2000_mutated_files_are_refused_or_harmless(tmp_path):
    check_mutations(tmp_path, 2000, seed=1)


def test_a_spec_that_was_edited_is_refused_even_where_it_would_fit(tmp_path):
    model = MLP.quantized()
    qsam.write_(model)
    path = deploy.save(model, tmp_path)
    spec = json.loads(path.read_text())
    spec["inputs"]["2"]["bits"] = 7
    path.write_text(json.dumps(spec))
    with pytest.raises(ValueError, match=r"qsam\.json' was changed since it was written"):
        deploy.load(MLP.build(), tmp_path)
    path.write_text("[" * 10**5)
    with pytest.raises(ValueError, match=r"qsam\.json' is no spec of qsam"):
        deploy.load(MLP.build(), tmp_path)
