import copy
import gc
import json

import pytest
import torch
from torch import nn

import qsam
from qsam import coverage_of
from qsam.plan import SPEC_NAME, TENSORS_NAME


@pytest.fixture(autouse=True)
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


TOKENS = torch.arange(12).reshape(2, 6)

# A model, and a batch for it.
ZOO = {
    "layers": (mlp, torch.randn(5, 6, generator=torch.Generator().manual_seed(1))),
    "tied layers": (tied, torch.ones(5, 6)),
    "convolutions": (convolutions, torch.linspace(-1, 1, 2 * 2 * 8 * 8).reshape(2, 2, 8, 8)),
    "recurrent layer": (lambda: nn.LSTM(6, 4), torch.linspace(-1, 1, 7 * 2 * 6).reshape(7, 2, 6)),
    "attention": (attention, torch.linspace(-1, 1, 5 * 2 * 8).sin().reshape(5, 2, 8)),
    "timm ViT": (vit, torch.linspace(-1, 1, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32)),
    "Hugging Face BERT": (bert, {"input_ids": TOKENS}),
    "Hugging Face GPT-2": (gpt2, {"input_ids": TOKENS}),
}
OPTIONS = {
    "defaults": {},
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
    """Everything that quantize_ adds to, of every module."""
    return {
        name: {key: len(value) if key.endswith("hooks") else list(value) for key, value in parts(module).items()}
        for name, module in model.named_modules()
    }


def parts(module):
    """The dicts of a module: its hooks, children, parameters and buffers; and the names of its attributes."""
    return {"attributes": vars(module).keys()} | {k: v for k, v in vars(module).items() if isinstance(v, dict)}


def weights(model):
    return {name: (id(p), p.data_ptr(), p.detach().clone()) for name, p in model.named_parameters()}


def same_weights(before, after):
    return before.keys() == after.keys() and all(
        before[name][:2] == after[name][:2] and torch.equal(before[name][2], after[name][2]) for name in before
    )


def ready(build, batch, **options):
    """A model after post-training quantization."""
    model = build()
    qsam.quantize_(model, **options)
    qsam.calibrate(model, [batch])
    qsam.write_(model)
    return model.eval()


def float_state(model):
    return {key: value for key, value in model.state_dict().items() if "_quantizer." not in key}


WRONG_CALLS = {
    "rule without match": {"rules": [("*", {}), ("nothing", None)]},
    "late bad group": {"rules": [("4", {"granularity": "per_group", "group_size": 7})]},
    "late unknown input quantizer": {"rules": [("4", {"activations": "lsk"})]},
    "late input quantizer that cannot": {"rules": [("4", {"activations": "per_channel"})]},
    "nothing quantized": {"rules": [("*", None)]},
    "spec of another model": {"spec": {"qsam_format": 1, "weights": {"5.weight": {}}, "inputs": {}}},
    "spec that lacks something": {"spec": {"qsam_format": 1, "weights": {"0.weight": {}}, "inputs": {}}},
}


class TestQuantize:
    @zoo
    def test_no_weight_changes(self, build, batch):
        model = build()
        before, keys = weights(model), set(model.state_dict())
        qsam.quantize_(model)
        after = {name: value for name, value in weights(model).items() if "_quantizer." not in name}
        assert same_weights(before, after)
        assert set(float_state(model)) == keys

    @zoo
    def test_a_layer_gets_scale_and_limits_for_each_matrix_and_for_its_input(self, build, batch):
        model = build()
        coverage = qsam.quantize_(model)
        keys = [key for key in model.state_dict() if "_quantizer." in key]
        inputs = [row for row in coverage.inputs if row.quantizer is not None]
        assert len(keys) == 2 * (len(coverage.quantized) + len(inputs))
        assert all(key.endswith(".scale") for key in keys)

    @zoo
    def test_float_weights_on_float_inputs_give_the_float_output(self, build, batch):
        model = build().eval()
        expected = run(model, batch)
        qsam.quantize_(model)
        with pytest.warns(UserWarning, match="passes through in float"):
            assert torch.equal(run(model, batch), expected)

    def test_an_identity_changes_nothing(self):
        build, batch = ZOO["attention"]
        model = build()
        expected = run(model, batch)
        qsam.quantize_(model, weights="identity", activations="identity")
        qsam.calibrate(model, [batch])
        qsam.write_(model)
        assert torch.equal(run(model, batch), expected)

    def test_the_global_random_state_is_left_alone(self):
        model, state = mlp(), torch.get_rng_state()
        qsam.quantize_(model)
        assert torch.equal(torch.get_rng_state(), state)

    def test_twice_is_refused_and_names_the_cure(self):
        model = mlp()
        qsam.quantize_(model)
        before = anatomy(model)
        with pytest.raises(RuntimeError, match=r"quantized already: call qsam.dequantize_\(model, optimizer\) first"):
            qsam.quantize_(model)
        assert anatomy(model) == before

    def test_a_part_of_a_quantized_model_is_refused(self):
        model = mlp()
        qsam.quantize_(model)
        with pytest.raises(RuntimeError, match="'weight' is quantized already, as a part of a larger model"):
            qsam.quantize_(model[0])

    def test_two_parts_quantized_apart_are_refused(self):
        model = nn.Sequential(mlp(), mlp())
        qsam.quantize_(model[0])
        qsam.quantize_(model[1])
        for verb in (qsam.quantize_, qsam.write_, qsam.dequantize_):
            with pytest.raises(RuntimeError, match="2 parts of the model were quantized apart"):
                verb(model)

    def test_a_wrapper_is_as_good_as_the_model_inside(self):
        model, batch = mlp(), ZOO["layers"][1]
        before = anatomy(model)
        wrapper = nn.Sequential(model)
        coverage = qsam.quantize_(model)
        assert coverage_of(wrapper) is coverage
        qsam.calibrate(wrapper, [batch])
        qsam.write_(wrapper)
        qsam.dequantize_(wrapper)
        assert anatomy(model) == before

    @pytest.mark.parametrize("arguments", WRONG_CALLS.values(), ids=WRONG_CALLS)
    def test_an_error_leaves_the_model_untouched(self, arguments):
        model = mlp()
        before, shape = weights(model), anatomy(model)
        with pytest.raises(ValueError):
            qsam.quantize_(model, **arguments)
        assert anatomy(model) == shape
        assert same_weights(before, weights(model))
        qsam.quantize_(model)


class TestWrite:
    @zoo
    def test_each_weight_becomes_q_of_itself_in_place(self, build, batch):
        model = build()
        coverage = qsam.quantize_(model, bits=3)
        before = weights(model)
        expected = {row.name: row.quantizer(row.module.get_parameter(row.attr)).detach() for row in coverage.quantized}
        qsam.write_(model)
        after = weights(model)
        for name, (identity, address, value) in before.items():
            assert after[name][:2] == (identity, address)
            assert torch.equal(after[name][2], expected.get(name, value))

    def test_again_changes_nothing(self):
        model = ready(*ZOO["layers"])
        before = weights(model)
        qsam.write_(model)
        assert same_weights(before, weights(model))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    def test_the_grid_of_a_cast_model_is_rounded_once(self, dtype):
        model = mlp().to(dtype)
        coverage = qsam.quantize_(model)
        latent = {row.name: row.module.weight.detach().clone() for row in coverage.quantized}
        qsam.write_(model)
        for row in coverage.quantized:
            wide = torch.promote_types(dtype, torch.float32)
            assert torch.equal(row.module.weight, row.quantizer(latent[row.name].to(wide)).to(dtype))

    def test_a_float_model_is_refused(self):
        with pytest.raises(RuntimeError, match=r"write_ needs a quantized model: call qsam.quantize_\(model\) first"):
            qsam.write_(mlp())

    def test_a_model_with_an_optimizer_is_refused_while_that_lives(self):
        model = mlp()
        optimizer = qsam.QAT(model, torch.optim.SGD, lr=0.1)
        with pytest.raises(RuntimeError, match="an optimizer owns the weights of this model"):
            qsam.write_(model)
        del optimizer
        gc.collect()
        qsam.write_(model)


class TestDequantize:
    @zoo
    def test_nothing_is_left(self, build, batch):
        model = build()
        shape, before = anatomy(model), weights(model)
        qsam.quantize_(model)
        qsam.dequantize_(model)
        assert anatomy(model) == shape
        assert same_weights(before, weights(model))

    def test_hooks_of_others_stay(self):
        model = mlp()
        model[0].register_forward_pre_hook(lambda module, args: None)
        before = anatomy(model)
        qsam.quantize_(model)
        qsam.dequantize_(model)
        assert anatomy(model) == before

    def test_without_an_optimizer_the_weights_stay_on_the_grid(self):
        build, batch = ZOO["layers"]
        model = ready(build, batch)
        before = float_state(model)
        qsam.dequantize_(model)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())

    def test_an_optimizer_puts_its_latents_back(self):
        model = mlp()
        before = weights(model)
        optimizer = qsam.QAT(model, torch.optim.SGD, lr=0.1)
        assert not torch.equal(model[0].weight, before["0.weight"][2])
        qsam.dequantize_(model, optimizer)
        assert same_weights(before, weights(model))

    def test_another_optimizer_is_refused(self):
        model, other = mlp(), mlp()
        optimizer = qsam.QAT(model, torch.optim.SGD, lr=0.1)
        foreign = qsam.QAT(other, torch.optim.SGD, lr=0.1)
        for target in (model, copy.deepcopy(model)):
            with pytest.raises(RuntimeError, match="this optimizer does not own the model's weights"):
                qsam.dequantize_(target, foreign)
        assert hasattr(model[0], "weight_quantizer")
        qsam.dequantize_(model, optimizer)

    def test_then_it_can_be_quantized_again(self):
        model = mlp()
        qsam.dequantize_(model, qsam.QAT(model, torch.optim.SGD, lr=0.1))
        assert qsam.quantize_(model, bits=2).quantized[0].quantizer.bits == 2
        qsam.QAT(model, torch.optim.SGD, lr=0.1)

    def test_a_float_model_is_refused(self):
        with pytest.raises(RuntimeError, match="dequantize_ needs a quantized model"):
            qsam.dequantize_(mlp())

    def test_a_copy_is_dequantized_alone(self):
        model = ready(*ZOO["layers"])
        other = copy.deepcopy(model)
        qsam.dequantize_(other)
        assert coverage_of(other) is None
        assert hasattr(model[0], "weight_quantizer")
        assert coverage_of(model) is not None


class TestSpec:
    @pytest.fixture
    def saved(self, tmp_path):
        """A quantized model, and the folder that holds its spec."""
        model = ready(*ZOO["layers"])
        coverage_of(model).save(tmp_path)
        return model, tmp_path

    @zoo
    @pytest.mark.parametrize("form", ["folder", "path", "text"])
    def test_the_files_rebuild_the_model_bit_for_bit(self, build, batch, form, tmp_path):
        model = ready(build, batch)
        coverage = coverage_of(model)
        path = coverage.save(tmp_path)
        other = build()
        other.load_state_dict(float_state(model))
        rebuilt = qsam.quantize_(other, spec={"folder": tmp_path, "path": path, "text": str(path)}[form])
        assert torch.equal(run(other.eval(), batch), run(model, batch))
        assert str(rebuilt) == str(coverage)
        assert rebuilt.to_spec() == coverage.to_spec()
        assert {k: v.tolist() for k, v in other.state_dict().items()} == {
            k: v.tolist() for k, v in model.state_dict().items()
        }

    @pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
    def test_every_kind_of_quantizer_is_rebuilt(self, options, tmp_path):
        build, batch = ZOO["layers"]
        model = ready(build, batch, rules=[("4", None)], **options)
        coverage_of(model).save(tmp_path)
        other = build()
        other.load_state_dict(float_state(model))
        assert str(qsam.quantize_(other, spec=tmp_path)) == str(coverage_of(model))
        assert torch.equal(run(other.eval(), batch), run(model, batch))

    @zoo
    def test_a_dict_rebuilds_the_keys_for_a_strict_load(self, build, batch):
        model = ready(build, batch)
        spec = json.loads(json.dumps(coverage_of(model).to_spec()))
        other = build()
        qsam.quantize_(other, spec=spec)
        other.load_state_dict(model.state_dict(), strict=True)
        assert torch.equal(run(other.eval(), batch), run(model, batch))
        assert coverage_of(other).to_spec() == spec

    def test_a_dict_has_no_scales_so_the_inputs_are_not_calibrated(self):
        build, batch = ZOO["layers"]
        other = build().eval()
        qsam.quantize_(other, spec=coverage_of(ready(build, batch)).to_spec())
        with pytest.warns(UserWarning, match="passes through in float"):
            other(batch)

    def test_a_model_that_was_not_calibrated_is_rebuilt_as_such(self, tmp_path):
        model, batch = mlp(), ZOO["layers"][1]
        qsam.quantize_(model).save(tmp_path)
        other = mlp().eval()
        qsam.quantize_(other, spec=tmp_path)
        with pytest.warns(UserWarning, match="passes through in float"):
            other(batch)

    def test_the_sign_of_an_input_is_kept(self, saved):
        other = mlp()
        qsam.quantize_(other, spec=saved[1])
        assert [other[i].input_quantizer.signed for i in (0, 2, 4)] == [True, False, False]

    def test_layers_that_are_not_in_the_spec_stay_float_and_say_so(self, saved):
        other = nn.Sequential(*mlp(), nn.Linear(3, 2))
        rows = {row.name: row for row in qsam.quantize_(other, spec=saved[1]).weights}
        assert (rows["5.weight"].quantizer, rows["5.weight"].reason) == (None, "not in the spec")

    def test_training_goes_on_from_a_rebuilt_model(self, saved):
        other = mlp()
        qsam.quantize_(other, spec=saved[1])
        assert not any(p.requires_grad for name, p in other.named_parameters() if "weight_quantizer" in name)
        optimizer = qsam.QAT(other, torch.optim.SGD, lr=0.1)
        other(ZOO["layers"][1]).sum().backward()
        optimizer.step()

    def test_another_model_is_refused(self, saved):
        with pytest.raises(
            ValueError, match=r"the spec names '4.weight', which this model does not have: it belongs to an"
        ):
            qsam.quantize_(mlp()[:3], spec=saved[1])

    def test_another_shape_is_refused(self, saved):
        other = mlp()
        other[4] = nn.Linear(8, 9)
        with pytest.raises(ValueError, match=r"'4.weight' has shape \[9, 8\], the spec's has \[3, 8\]"):
            qsam.quantize_(other, spec=saved[1])

    def test_a_meta_model_is_refused(self, saved):
        with torch.device("meta"):
            other = mlp()
        with pytest.raises(ValueError, match=r"'0.weight' is on the meta device"):
            qsam.quantize_(other, spec=saved[1])

    def test_an_unknown_quantizer_is_refused(self, saved):
        spec = coverage_of(saved[0]).to_spec()
        spec["weights"]["0.weight"]["quantizer"] = "lsk"
        with pytest.raises(ValueError, match="There is no quantizer 'lsk'"):
            qsam.quantize_(mlp(), spec=spec)

    def test_a_missing_entry_is_refused_with_its_path(self, saved):
        spec = coverage_of(saved[0]).to_spec()
        del spec["inputs"]["2"]["bits"]
        with pytest.raises(ValueError, match="the input of '2': its entry in the spec lacks 'bits'"):
            qsam.quantize_(mlp(), spec=spec)

    def test_a_quantized_model_is_refused(self, saved):
        with pytest.raises(RuntimeError, match="quantized already"):
            qsam.quantize_(saved[0], spec=saved[1])

    @pytest.mark.parametrize("content", ["", "{", "no json"])
    def test_what_is_not_json_is_refused(self, tmp_path, content):
        (tmp_path / SPEC_NAME).write_text(content)
        with pytest.raises(ValueError, match=r"qsam.json' is not JSON .* `Coverage.save\(folder\)` writes a spec"):
            qsam.quantize_(mlp(), spec=tmp_path)

    @pytest.mark.parametrize("content", [{}, [], {"qsam_format": 1, "weights": {}}])
    def test_json_that_is_no_spec_is_refused(self, tmp_path, content):
        (tmp_path / SPEC_NAME).write_text(json.dumps(content))
        with pytest.raises(ValueError, match="is not a qsam spec: it lacks"):
            qsam.quantize_(mlp(), spec=tmp_path)

    def test_a_newer_format_is_refused_by_name(self, saved):
        content = {**coverage_of(saved[0]).to_spec(), "qsam_format": 2}
        with pytest.raises(
            ValueError, match="the given spec has qsam_format 2; this qsam reads 1: install a newer qsam"
        ):
            qsam.quantize_(mlp(), spec=content)

    @pytest.mark.parametrize("name", ["nowhere", "nowhere/qsam.json"])
    def test_a_missing_file_is_refused(self, tmp_path, name):
        with pytest.raises(FileNotFoundError, match=r"there is no quantizer spec .*nowhere"):
            qsam.quantize_(mlp(), spec=tmp_path / name)

    def test_missing_scales_are_refused(self, saved):
        (saved[1] / TENSORS_NAME).unlink()
        with pytest.raises(
            FileNotFoundError, match=r"qsam.safetensors', the scales that belong to qsam.json, is missing"
        ):
            qsam.quantize_(mlp(), spec=saved[1])

    def test_scales_of_another_save_are_refused(self, saved, tmp_path):
        other = ready(mlp, 2 * ZOO["layers"][1])
        coverage_of(other).save(tmp_path / "other")
        (tmp_path / "other" / TENSORS_NAME).replace(saved[1] / TENSORS_NAME)
        with pytest.raises(ValueError, match=r"was not saved with the qsam.json beside it: save again, or copy both"):
            qsam.quantize_(mlp(), spec=saved[1])


class TestHuggingFace:
    @pytest.mark.parametrize("build", [bert, gpt2])
    def test_a_plain_load_gives_the_weights_on_the_grid_and_the_spec_the_same_logits(self, build, tmp_path):
        batch = {"input_ids": TOKENS}
        model = ready(build, batch, bits=3)
        model.save_pretrained(tmp_path)
        coverage_of(model).save(tmp_path)
        other = type(model).from_pretrained(tmp_path)
        assert {key: value.tolist() for key, value in other.state_dict().items()} == {
            key: value.tolist() for key, value in float_state(model).items()
        }
        qsam.quantize_(other, spec=tmp_path)
        assert torch.equal(run(other.eval(), batch), run(model, batch))
