"""Quantizers are attached, saved, rebuilt and taken off again, and no weight changes but by ``write_``."""

import copy
import itertools
import json

import pytest
import torch
from torch import nn

import qsam
from qsam import coverage_of
from qsam.plan import SPEC_NAME, TENSORS_NAME

pytestmark = pytest.mark.usefixtures("seed")


@pytest.fixture
def seed():
    torch.manual_seed(0)


def mlp():
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))


def tied():
    model = mlp()
    model[4] = nn.Linear(8, 8)
    model[4].weight = model[2].weight
    return model


def convolutions():
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.ConvTranspose2d(4, 2, 3))


def attention():
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0), 1, enable_nested_tensor=False)


def vit():
    timm = pytest.importorskip("timm")
    arguments = dict(depth=1, embed_dim=24, num_heads=2, img_size=32, patch_size=16, num_classes=5)
    return timm.create_model("vit_tiny_patch16_224", **arguments)


def bert():
    transformers = pytest.importorskip("transformers")
    sizes = dict(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, vocab_size=20)
    return transformers.BertForSequenceClassification(transformers.BertConfig(**sizes))


def gpt2():
    transformers = pytest.importorskip("transformers")
    sizes = dict(n_embd=8, n_layer=1, n_head=2, vocab_size=20, n_positions=8, bos_token_id=0, eos_token_id=0)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))


TOKENS = {"input_ids": torch.arange(12).reshape(2, 6)}
X = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))

# A model, and a batch for it.
ZOO = {
    "layers": (mlp, X),
    "tied layers": (tied, torch.ones(5, 6)),
    "convolutions": (convolutions, torch.linspace(-1, 1, 2 * 2 * 8 * 8).reshape(2, 2, 8, 8)),
    "recurrent layer": (lambda: nn.LSTM(6, 4), torch.linspace(-1, 1, 7 * 2 * 6).reshape(7, 2, 6)),
    "attention": (attention, torch.linspace(-1, 1, 5 * 2 * 8).sin().reshape(5, 2, 8)),
    "timm ViT": (vit, torch.linspace(-1, 1, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32)),
    "Hugging Face BERT": (bert, TOKENS),
    "Hugging Face GPT-2": (gpt2, TOKENS),
}
OPTIONS = {
    "per channel": {"granularity": "per_channel", "bits": 3, "activation_bits": 4},
    "per group": {"granularity": "per_group", "group_size": 2, "activations": "fixed_step"},
    "names": {"weights": "per_channel", "activations": "identity", "init": "lsq"},
    "inputs only": {"weights": None},
    "weights only": {"activations": None},
}
zoo = pytest.mark.parametrize(("build", "batch"), ZOO.values(), ids=ZOO)


def run(model, batch):
    out = model(**batch) if isinstance(batch, dict) else model(batch)
    out = out[0] if isinstance(out, tuple) else out
    return getattr(out, "logits", out).detach()


def anatomy(model):
    """Return everything that quantize_ adds to, of every module: attributes, hooks, children, parameters, buffers."""
    return {
        name: {"attributes": sorted(vars(module))}
        | {k: len(v) if k.endswith("hooks") else list(v) for k, v in vars(module).items() if isinstance(v, dict)}
        for name, module in model.named_modules()
    }


def weights(model):
    """Return identity, address and value of every Parameter that is not a quantizer's."""
    named = [(name, p) for name, p in model.named_parameters() if "_quantizer." not in name]
    return {name: (id(p), p.data_ptr(), p.detach().clone()) for name, p in named}


def assert_same_weights(before, after):
    assert before.keys() == after.keys()
    for name, (*place, value) in before.items():
        assert place == list(after[name][:2]) and torch.equal(value, after[name][2]), name


def ready(build, batch, **options):
    """Return a model after post-training quantization."""
    model = build()
    qsam.quantize_(model, **options)
    qsam.calibrate(model, [batch])
    qsam.write_(model)
    return model.eval()


def float_state(model):
    return {key: value for key, value in model.state_dict().items() if "_quantizer." not in key}


def plain(state):
    return {key: value.tolist() for key, value in state.items()}


# --- quantize_, write_, dequantize_ -----------------------------------------------------------------------------------


@zoo
def test_from_quantize_to_dequantize_only_write_changes_a_weight_and_nothing_is_left(build, batch):
    model = build().eval()
    shape, before, keys, expected = anatomy(model), weights(model), set(model.state_dict()), run(model, batch)
    coverage = qsam.quantize_(model, bits=3)
    assert_same_weights(before, weights(model))
    assert set(float_state(model)) == keys
    own = [key for key in model.state_dict() if "_quantizer." in key]
    inputs = [row for row in coverage.inputs if row.quantizer is not None]
    assert len(own) == 2 * (len(coverage.quantized) + len(inputs))
    assert {key.rpartition(".")[2] for key in own} == {"scale", "limits"}
    with pytest.warns(UserWarning, match="passes through in float"):  # float weights and float inputs: the same numbers
        assert torch.equal(run(model, batch), expected)
    rounded = {row.name: row.quantizer(row.parameter).detach() for row in coverage.quantized}
    for _ in range(2):  # written twice is written once
        qsam.write_(model)
        assert_same_weights({k: (*v[:2], rounded.get(k, v[2])) for k, v in before.items()}, weights(model))
    qsam.dequantize_(model)
    assert anatomy(model) == shape
    assert_same_weights({k: (*v[:2], rounded.get(k, v[2])) for k, v in before.items()}, weights(model))


def test_an_identity_changes_nothing():
    build, batch = ZOO["attention"]
    model = build()
    expected = run(model, batch)
    qsam.quantize_(model, weights="identity", activations="identity")
    qsam.calibrate(model, [batch])
    qsam.write_(model)
    assert torch.equal(run(model, batch), expected)


def test_the_global_random_state_is_left_alone():
    model, state = mlp(), torch.get_rng_state()
    qsam.quantize_(model)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_wrapper_is_as_good_as_the_model_inside():
    model = mlp()
    before = anatomy(model)
    wrapper = nn.Sequential(model)
    coverage = qsam.quantize_(model)
    assert coverage_of(wrapper) is coverage
    qsam.calibrate(wrapper, [X])
    qsam.write_(wrapper)
    qsam.dequantize_(wrapper)
    assert anatomy(model) == before


ENTRY = qsam.quantize_(mlp()).to_spec()["weights"]["0.weight"]
WRONG_CALLS = {
    "rule without match": {"rules": [("*", {}), ("nothing", None)]},
    "late bad group": {"rules": [("4", {"granularity": "per_group", "group_size": 7})]},
    "late unknown input quantizer": {"rules": [("4", {"activations": "lsk"})]},
    "late input quantizer that cannot": {"rules": [("4", {"activations": "per_channel"})]},
    "nothing quantized": {"rules": [("*", None)]},
    "spec of another model": {"spec": {"qsam_format": 1, "weights": {"5.weight": ENTRY}, "inputs": {}}},
    "spec that lacks something": {"spec": {"qsam_format": 1, "weights": {"0.weight": {}}, "inputs": {}}},
}


@pytest.mark.parametrize("arguments", WRONG_CALLS.values(), ids=WRONG_CALLS)
def test_an_error_leaves_the_model_untouched(arguments):
    model = mlp()
    before, shape = weights(model), anatomy(model)
    with pytest.raises(ValueError):
        qsam.quantize_(model, **arguments)
    assert anatomy(model) == shape
    assert_same_weights(before, weights(model))
    qsam.quantize_(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_grid_of_a_cast_model_is_rounded_once(dtype):
    model = mlp().to(dtype)
    coverage = qsam.quantize_(model)
    latent = {row.name: row.module.weight.detach().clone() for row in coverage.quantized}
    qsam.write_(model)
    for row in coverage.quantized:
        wide = torch.promote_types(dtype, torch.float32)
        assert torch.equal(row.module.weight, row.quantizer(latent[row.name].to(wide)).to(dtype))


def test_a_model_with_an_optimizer_is_not_written_while_that_lives():
    model = mlp()
    optimizer = qsam.QAT(model, torch.optim.SGD, lr=0.1)
    with pytest.raises(RuntimeError, match="an optimizer owns the weights of this model"):
        qsam.write_(model)
    del optimizer
    qsam.write_(model)


def test_hooks_of_others_stay():
    model = mlp()
    model[0].register_forward_pre_hook(lambda module, args: None)
    before = anatomy(model)
    qsam.quantize_(model)
    qsam.dequantize_(model)
    assert anatomy(model) == before


def test_dequantize_puts_the_latents_of_an_optimizer_back_and_refuses_another_one():
    model, other = mlp(), mlp()
    before = weights(model)
    optimizer = qsam.QAT(model, torch.optim.SGD, lr=0.1)
    foreign = qsam.QAT(other, torch.optim.SGD, lr=0.1)
    assert not torch.equal(model[0].weight, before["0.weight"][2])
    for target in (model, copy.deepcopy(model)):
        with pytest.raises(RuntimeError, match="this optimizer does not own the model's weights"):
            qsam.dequantize_(target, foreign)
    assert hasattr(model[0], "weight_quantizer")
    qsam.dequantize_(model, optimizer)
    assert_same_weights(before, weights(model))
    assert qsam.quantize_(model, bits=2).quantized[0].quantizer.bits == 2


def test_a_copy_is_dequantized_alone():
    model = ready(mlp, X)
    other = copy.deepcopy(model)
    qsam.dequantize_(other)
    assert coverage_of(other) is None
    assert hasattr(model[0], "weight_quantizer") and coverage_of(model) is not None


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    """A quantized model, and the folder that holds its spec."""
    model = ready(mlp, X)
    coverage_of(model).save(tmp_path)
    return model, tmp_path


@pytest.mark.parametrize(
    ("build", "batch", "form"),
    [(*row, form) for row, form in zip(ZOO.values(), itertools.cycle(["folder", "path", "text"]))],
    ids=ZOO,
)
def test_the_files_and_a_dict_with_a_strict_load_rebuild_the_model_bit_for_bit(build, batch, form, tmp_path):
    model = ready(build, batch)
    coverage, expected = coverage_of(model), run(model, batch)
    path = coverage.save(tmp_path)
    other, third = build(), build()
    other.load_state_dict(float_state(model))
    rebuilt = qsam.quantize_(other, spec={"folder": tmp_path, "path": path, "text": str(path)}[form])
    qsam.quantize_(third, spec=json.loads(json.dumps(coverage.to_spec())))
    third.load_state_dict(model.state_dict(), strict=True)
    assert str(rebuilt) == str(coverage)
    for copied in (other, third):
        assert torch.equal(run(copied.eval(), batch), expected)
        assert coverage_of(copied).to_spec() == coverage.to_spec()
        assert plain(copied.state_dict()) == plain(model.state_dict())


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_kind_of_quantizer_is_rebuilt(options, tmp_path):
    model = ready(mlp, X, rules=[("4", None)], **options)
    coverage_of(model).save(tmp_path)
    other = mlp()
    other.load_state_dict(float_state(model))
    assert str(qsam.quantize_(other, spec=tmp_path)) == str(coverage_of(model))
    assert torch.equal(run(other.eval(), X), run(model, X))


def test_inputs_without_a_scale_are_rebuilt_as_such(saved, tmp_path):
    """A dict holds no scales; the file of a model that was not calibrated holds none of its inputs."""
    qsam.quantize_(mlp()).save(tmp_path / "fresh")
    for spec in (coverage_of(saved[0]).to_spec(), tmp_path / "fresh"):
        other = mlp().eval()
        qsam.quantize_(other, spec=spec)
        with pytest.warns(UserWarning, match="passes through in float"):
            other(X)


def test_a_rebuilt_model_keeps_signs_and_trains_on(saved):
    other = mlp()
    qsam.quantize_(other, spec=saved[1])
    assert [other[i].input_quantizer.signed for i in (0, 2, 4)] == [True, False, False]
    assert not any(p.requires_grad for name, p in other.named_parameters() if "weight_quantizer" in name)
    optimizer = qsam.QAT(other, torch.optim.SGD, lr=0.1)
    other(X).sum().backward()
    optimizer.step()


def test_layers_that_are_not_in_the_spec_stay_float_and_say_so(saved):
    other = nn.Sequential(*mlp(), nn.Linear(3, 2))
    rows = {row.name: row for row in qsam.quantize_(other, spec=saved[1]).weights}
    assert (rows["5.weight"].quantizer, rows["5.weight"].reason) == (None, "not in the spec")


def test_a_meta_model_is_refused(saved):
    with torch.device("meta"):
        other = mlp()
    with pytest.raises(ValueError, match=r"'0.weight' is on the meta device"):
        qsam.quantize_(other, spec=saved[1])


def test_an_entry_that_cannot_be_built_is_refused_with_its_path(saved):
    spec = coverage_of(saved[0]).to_spec()
    for key, value, message in (
        ("quantizer", "lsk", "'0.weight': There is no quantizer 'lsk'"),
        ("granularity", "per_group", "'0.weight': granularity 'per_group' needs `group_size`"),
    ):
        changed = copy.deepcopy(spec)
        changed["weights"]["0.weight"][key] = value
        with pytest.raises(ValueError, match=message):
            qsam.quantize_(mlp(), spec=changed)
    del spec["inputs"]["2"]["bits"]
    with pytest.raises(ValueError, match="the input of '2': its entry in the spec lacks 'bits'"):
        qsam.quantize_(mlp(), spec=spec)


NO_JSON = r"qsam.json' is not JSON .* `Coverage.save\(folder\)` writes a spec"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", NO_JSON),
        ("{", NO_JSON),
        ("{}", "is not a qsam spec: it lacks"),
        ("[]", "is not a qsam spec: it lacks"),
        ('{"qsam_format": 2, "weights": {}, "inputs": {}}', "has qsam_format 2; this qsam reads 1: install a newer"),
    ],
)
def test_a_file_that_is_no_spec_of_this_format_is_refused(tmp_path, content, message):
    (tmp_path / SPEC_NAME).write_text(content)
    with pytest.raises(ValueError, match=message):
        qsam.quantize_(mlp(), spec=tmp_path)


def test_missing_files_and_scales_of_another_save_are_refused(saved, tmp_path):
    for name in ("nowhere", "nowhere/qsam.json"):
        with pytest.raises(FileNotFoundError, match=r"there is no quantizer spec .*nowhere"):
            qsam.quantize_(mlp(), spec=tmp_path / name)
    coverage_of(ready(mlp, 2 * X)).save(tmp_path / "other")
    (tmp_path / "other" / TENSORS_NAME).replace(saved[1] / TENSORS_NAME)
    with pytest.raises(ValueError, match=r"was not saved with the qsam.json beside it: save again, or copy both"):
        qsam.quantize_(mlp(), spec=saved[1])
    (saved[1] / TENSORS_NAME).unlink()
    with pytest.raises(FileNotFoundError, match=r"qsam.safetensors', the scales that belong to qsam.json, is missing"):
        qsam.quantize_(mlp(), spec=saved[1])


@pytest.mark.parametrize("build", [bert, gpt2])
def test_a_plain_load_gives_the_weights_on_the_grid_and_the_spec_the_same_logits(build, tmp_path):
    model = ready(build, TOKENS, bits=3)
    model.save_pretrained(tmp_path)
    coverage_of(model).save(tmp_path)
    other = type(model).from_pretrained(tmp_path)
    assert plain(other.state_dict()) == plain(float_state(model))
    qsam.quantize_(other, spec=tmp_path)
    assert torch.equal(run(other.eval(), TOKENS), run(model, TOKENS))
