import re
from collections import OrderedDict

import pytest
import torch
from torch import nn

import qsam
from qsam.layers import find_sites, unwrap_model


class Body(nn.Linear):
    """A type of its own, for rules on types."""


class TinyGPT(nn.Module):
    """Embedding, one layer, and a head whose weight is the embedding's."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(11, 8)
        self.fc1, self.fc2 = nn.Linear(8, 16), nn.Linear(16, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids):
        return self.head(self.fc2(self.fc1(self.tokens(ids)).relu()))


class Owner(nn.Module):
    """A layer qsam does not know, with parameters of several kinds."""

    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(4, 4))
        self.vector = nn.Parameter(torch.randn(4))
        self.table = nn.Parameter(torch.ones(4, 4, dtype=torch.int32), requires_grad=False)

    def forward(self, x):
        return x @ self.matrix


def hf_conv1d():
    return pytest.importorskip("transformers.pytorch_utils").Conv1D(4, 6)


# The parameter, and the dimension that counts its output channels.
LAYERS = {
    "Linear": (lambda: nn.Linear(6, 4), "weight", 0),
    "Conv1d": (lambda: nn.Conv1d(6, 4, 3), "weight", 0),
    "Conv2d": (lambda: nn.Conv2d(6, 4, 3), "weight", 0),
    "Conv2d in groups": (lambda: nn.Conv2d(6, 4, 3, groups=2), "weight", 0),
    "Conv2d, depthwise": (lambda: nn.Conv2d(6, 6, 3, groups=6), "weight", 0),
    "Conv3d": (lambda: nn.Conv3d(6, 4, 3), "weight", 0),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(6, 4, 3), "weight", 1),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(6, 4, 3), "weight", 1),
    "ConvTranspose3d": (lambda: nn.ConvTranspose3d(6, 4, 3), "weight", 1),
    "ConvTranspose2d in groups": (lambda: nn.ConvTranspose2d(6, 4, 3, groups=2), "weight", 1),
    "ConvTranspose2d, depthwise": (lambda: nn.ConvTranspose2d(6, 6, 3, groups=6), "weight", 0),
    "Hugging Face Conv1D": (hf_conv1d, "weight", 1),
    "MultiheadAttention": (lambda: nn.MultiheadAttention(4, 2), "in_proj_weight", 0),
    "MultiheadAttention, key": (lambda: nn.MultiheadAttention(4, 2, kdim=6, vdim=8), "k_proj_weight", 0),
    "LSTM": (lambda: nn.LSTM(6, 4), "weight_ih_l0", 0),
    "LSTM, recurrent, reverse": (lambda: nn.LSTM(6, 4, bidirectional=True), "weight_hh_l0_reverse", 0),
    "LSTM, projection": (lambda: nn.LSTM(6, 4, proj_size=2), "weight_hr_l0", 0),
    "GRU": (lambda: nn.GRU(6, 4), "weight_hh_l0", 0),
    "RNN": (lambda: nn.RNN(6, 4), "weight_ih_l0", 0),
    "LSTMCell": (lambda: nn.LSTMCell(6, 4), "weight_ih", 0),
    "GRUCell": (lambda: nn.GRUCell(6, 4), "weight_hh", 0),
    "RNNCell": (lambda: nn.RNNCell(6, 4), "weight_ih", 0),
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def model():
    return nn.Sequential(OrderedDict(stem=nn.Linear(6, 8), body=Body(8, 8), head=nn.Linear(8, 4)))


def bits(coverage):
    """Bits of each quantized weight, by name."""
    return {row.name: row.quantizer.bits for row in coverage.quantized}


def reasons(coverage):
    """Why each float weight of two or more dimensions is float, by name."""
    return {row.name: row.reason for row in coverage.weights if row.quantizer is None and len(row.shape) >= 2}


def timm_model(name, **arguments):
    return pytest.importorskip("timm").create_model(name, **arguments)


def hf_model(kind, **arguments):
    transformers = pytest.importorskip("transformers")
    small = {
        "Bert": dict(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, vocab_size=20),
        "GPT2": dict(n_embd=8, n_layer=2, n_head=2, vocab_size=20, n_positions=8, bos_token_id=0, eos_token_id=0),
    }
    family = "Bert" if kind.startswith("Bert") else "GPT2"
    config = getattr(transformers, f"{family}Config")(**small[family], **arguments)
    return getattr(transformers, kind)(config)


class TestLayers:
    @pytest.mark.parametrize(("build", "attr", "axis"), LAYERS.values(), ids=LAYERS)
    def test_per_channel_quantizes_each_output_channel_alone(self, build, attr, axis):
        layer = build()
        before = getattr(layer, attr).detach().clone()
        qsam.quantize_(layer, bits=3, granularity="per_channel", init="absmax", rules=[("*", {})])
        qsam.write_(layer)
        for channel, alone in zip(getattr(layer, attr).unbind(axis), before.unbind(axis), strict=True):
            q = qsam.quantizers.LSQ(bits=3)
            q.init = "absmax"  # a maximum does not depend on the order of its terms: bitwise
            q.observe_(alone)
            assert torch.equal(channel, q(alone))

    @pytest.mark.parametrize(("build", "attr", "axis"), LAYERS.values(), ids=LAYERS)
    def test_per_tensor_quantizes_all_entries_with_one_scale(self, build, attr, axis):
        layer = build()
        before = getattr(layer, attr).detach().flatten()
        qsam.quantize_(layer, bits=3, init="absmax", rules=[("*", {})])
        qsam.write_(layer)
        scale = before.abs().max() / 3
        expected = scale * torch.round(before / scale)
        torch.testing.assert_close(getattr(layer, attr).detach().flatten(), expected)

    @pytest.mark.parametrize(("build", "attr", "axis"), LAYERS.values(), ids=LAYERS)
    def test_quantized_by_default(self, build, attr, axis):
        assert attr in bits(qsam.quantize_(build()))

    @pytest.mark.parametrize(("build", "attr", "axis"), LAYERS.values(), ids=LAYERS)
    def test_a_group_lies_within_one_output_channel(self, build, attr, axis):
        layer = build()
        before = getattr(layer, attr).detach().movedim(axis, 0).flatten(1)
        groups = 3 if before.shape[1] % 2 else 2
        group = before.shape[1] // groups
        qsam.quantize_(
            layer,
            bits=3,
            init="absmax",
            activations=None,
            rules=[(attr, dict(granularity="per_group", group_size=group))],
        )
        scale = getattr(layer, f"{attr}_quantizer").scale
        expected = before.unflatten(1, (groups, group)).abs().amax(-1) / 3
        torch.testing.assert_close(scale.squeeze(-1), expected, rtol=4 * torch.finfo(torch.float32).eps, atol=0)

    def test_embedding_by_rule_has_a_scale_a_row(self):
        layer = nn.Embedding(5, 4)
        qsam.quantize_(layer, granularity="per_channel", rules=[(nn.Embedding, {})])
        assert layer.weight_quantizer.scale.shape == (5, 1)

    def test_recurrent_layers_have_a_quantizer_for_each_matrix(self):
        layer = nn.LSTM(4, 6, num_layers=2, bidirectional=True)
        coverage = qsam.quantize_(layer)
        assert set(bits(coverage)) == {
            name for name, p in layer.named_parameters() if name.startswith("weight") and "." not in name
        }

    def test_a_group_that_does_not_divide_is_refused_with_the_path(self, model):
        with pytest.raises(ValueError, match=r"'stem.weight': `group_size` must divide the 6 entries"):
            qsam.quantize_(model, granularity="per_group", group_size=4)

    def test_a_group_size_without_groups_is_refused(self, model):
        with pytest.raises(ValueError, match=r"'stem.weight': `group_size` belongs to granularity 'per_group'"):
            qsam.quantize_(model, group_size=4)


class TestDefaultPolicy:
    def test_every_parameter_is_listed_in_order(self, model):
        names = [name for name, _ in model.named_parameters()]
        assert [row.name for row in qsam.quantize_(model).weights] == names

    def test_float_parameters_have_a_reason(self, model):
        assert all(row.reason for row in qsam.quantize_(model).weights if row.quantizer is None)

    def test_the_last_layer_is_the_head_and_gets_8_bits(self, model):
        coverage = qsam.quantize_(model, bits=2, activation_bits=4)
        assert bits(coverage) == {"stem.weight": 2, "body.weight": 2, "head.weight": 8}
        assert {row.name: row.quantizer.bits for row in coverage.inputs} == {"stem": 4, "body": 4, "head": 8}

    def test_a_model_of_one_layer_has_no_head(self):
        assert bits(qsam.quantize_(nn.Sequential(nn.Linear(4, 4)), bits=2)) == {"0.weight": 2}

    def test_an_input_convolution_gets_8_bits(self):
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3))
        coverage = qsam.quantize_(model, bits=3)
        assert bits(coverage) == {"0.weight": 8, "1.weight": 3, "2.weight": 8}
        assert [row.reason for row in coverage.quantized] == ["input layer", "", "head"]

    def test_a_head_tied_to_an_embedding_counts_as_the_embedding(self):
        coverage = qsam.quantize_(TinyGPT(), bits=2)
        assert bits(coverage) == {"fc1.weight": 2, "fc2.weight": 2}
        assert reasons(coverage) == {"tokens.weight": "embedding, tied to head"}

    def test_lora_factors_stay_float(self):
        model = nn.ModuleDict({"base": nn.Linear(4, 4), "lora_A": nn.Linear(4, 2), "lora_B": nn.Linear(2, 4)})
        coverage = qsam.quantize_(model, bits=2)
        assert bits(coverage) == {"base.weight": 2}
        assert reasons(coverage) == {"lora_A.weight": "LoRA factor", "lora_B.weight": "LoRA factor"}

    def test_parameters_of_unknown_layers_stay_float(self):
        coverage = qsam.quantize_(nn.Sequential(nn.Linear(4, 4), Owner()))
        assert reasons(coverage) == {
            "1.matrix": "no default for a parameter of Owner: name it in `rules`",
            "1.table": "not floating (torch.int32)",
        }

    def test_parametrized_weights_stay_float(self):
        model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 8))
        assert "0.parametrizations.weight.original1" in reasons(qsam.quantize_(model))

    def test_bert(self):
        coverage = qsam.quantize_(hf_model("BertForSequenceClassification"), bits=3)
        assert reasons(coverage) == {
            f"bert.embeddings.{name}_embeddings.weight": "embedding" for name in ("word", "position", "token_type")
        }
        widths = bits(coverage)
        assert widths.pop("classifier.weight") == 8
        assert set(widths.values()) == {3}
        assert len(widths) == 2 * 6 + 1  # six matrices a layer, and the pooler

    def test_masked_bert_has_its_head_in_the_embedding(self):
        coverage = qsam.quantize_(hf_model("BertForMaskedLM"))
        tied = "embedding, tied to cls.predictions.decoder"
        assert reasons(coverage)["bert.embeddings.word_embeddings.weight"] == tied
        assert set(bits(coverage).values()) == {4}

    def test_gpt2(self):
        coverage = qsam.quantize_(hf_model("GPT2LMHeadModel"))
        assert reasons(coverage) == {
            "transformer.wte.weight": "embedding, tied to lm_head",
            "transformer.wpe.weight": "embedding",
        }
        names = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
        assert bits(coverage) == {f"transformer.h.{i}.{name}.weight": 4 for i in range(2) for name in names}

    def test_untied_gpt2_gives_its_head_8_bits(self):
        assert bits(qsam.quantize_(hf_model("GPT2LMHeadModel", tie_word_embeddings=False)))["lm_head.weight"] == 8

    def test_vit(self):
        coverage = qsam.quantize_(timm_model("vit_tiny_patch16_224", depth=1, embed_dim=24, num_heads=2))
        assert set(reasons(coverage)) == {"cls_token", "pos_embed"}
        assert {name for name, width in bits(coverage).items() if width == 8} == {
            "patch_embed.proj.weight",
            "head.weight",
        }

    def test_a_headless_vit_gives_8_bits_to_its_patches_only(self):
        coverage = qsam.quantize_(timm_model("vit_tiny_patch16_224", depth=1, embed_dim=24, num_heads=2, num_classes=0))
        assert [name for name, width in bits(coverage).items() if width == 8] == ["patch_embed.proj.weight"]

    def test_resnet(self):
        coverage = qsam.quantize_(timm_model("resnet18"), init="absmax")
        assert not reasons(coverage)
        assert {name for name, width in bits(coverage).items() if width == 8} == {"conv1.weight", "fc.weight"}
        assert len(bits(coverage)) == 21

    @pytest.mark.parametrize(
        ("name", "arguments", "ends"),
        [
            ("mobilenetv2_035", {}, {"conv_stem.weight", "classifier.weight"}),
            (
                "convnext_atto",
                {"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 8)},
                {"stem.0.weight", "head.fc.weight"},
            ),
        ],
    )
    def test_stem_and_classifier_of_convolutional_models_get_8_bits(self, name, arguments, ends):
        coverage = qsam.quantize_(timm_model(name, **arguments), init="absmax")
        assert not reasons(coverage)
        assert {name for name, width in bits(coverage).items() if width == 8} == ends
        assert {row.reason for row in coverage.quantized if row.name in ends} == {"input layer", "head"}

    def test_transformer_encoder(self):
        layer = nn.TransformerEncoderLayer(8, 2, 16)
        coverage = qsam.quantize_(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))
        assert not reasons(coverage)
        assert len(bits(coverage)) == 2 * 4

    def test_tied_linear_layers_share_one_quantizer(self):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
        model[1].weight = model[0].weight
        coverage = qsam.quantize_(model)
        assert [(row.name, row.reason) for row in coverage.quantized] == [
            ("0.weight", "tied to 1"),
            ("2.weight", "head"),
        ]
        assert [(row.name, row.reason) for row in coverage.inputs] == [("0", ""), ("1", "shares 0.weight"), ("2", "")]
        assert all(row.quantizer for row in coverage.inputs)


SELECTORS = {
    "glob on a module": "bo*",
    "glob on a parameter": "body.w*",
    "regular expression on a module": "re:^b.dy$",
    "regular expression on a parameter": r"re:ody\.weight",
    "module type": Body,
    "predicate": lambda name, module: name == "body" and isinstance(module, Body),
}


OVERRIDES = {
    "weights": ("identity", "weight_quantizer", "identity"),
    "bits": (2, "weight_quantizer", 2),
    "granularity": ("per_channel", "weight_quantizer", "per_channel"),
    "init": ("lsq", "weight_quantizer", "lsq"),
    "activations": ("fixed_step", "input_quantizer", "fixed_step"),
    "activation_bits": (6, "input_quantizer", 6),
}


WRONG_RULES = {
    "no match, near miss": (
        [("bodi", None)],
        ValueError,
        "'bodi' matches no parameter .* Did you mean 'body.weight'",
    ),
    "no match, nothing near": ([("xyz", None)], ValueError, "'xyz' matches .* There are: stem.weight, body.weight"),
    "no match among types": ([(nn.Conv2d, None)], ValueError, "Conv2d.* matches no parameter of two or more dim"),
    "a vector": ([("*.bias", {})], ValueError, "matches no parameter of two or more dimensions"),
    "unknown key": ([("body", {"bit": 2})], TypeError, "cannot override 'bit'. Did you mean 'bits'"),
    "unlike any key": ([("body", {"zzz": 2})], TypeError, "cannot override 'zzz'. Known: .*'activation_bits'"),
    "bad value": (
        [("body", {"bits": 9})],
        ValueError,
        r"in the rule 'body': `bits` must be an integer in \[2, 8\], got 9",
    ),
    "bad kind": ([("body", {"bits": 4.0})], TypeError, r"in the rule 'body': `bits` must be an integer"),
    "unknown quantizer": ([("body", {"weights": "lsk"})], ValueError, "no quantizer 'lsk'. Did you mean 'lsq'"),
    "a class for a name": (
        [("body", {"weights": nn.Linear})],
        TypeError,
        "'body.weight': a quantizer is a registered",
    ),
    "overrides of a wrong kind": ([("body", 4)], TypeError, r"must be None \(float\) or a dict .*, got 4"),
    "selector of a wrong kind": ([(3, None)], TypeError, "selector must be a glob, .*, got 3"),
    "type that is no module": ([(int, None)], TypeError, "selector must be a glob, .*, got <class 'int'>"),
    "module for its type": ([(nn.Linear(2, 2), None)], TypeError, "selector must be a glob"),
    "regular expression": ([("re:(", None)], ValueError, re.escape("'re:(' is not a regular expression")),
    "dict of rules": ({"body": None}, TypeError, r"sequence of pairs \(selector, overrides\), got {'body'"),
    "one bare rule": (("body", None), TypeError, r"sequence of pairs \(selector, overrides\), got 'body' in it"),
    "a string": ("body", TypeError, r"sequence of pairs \(selector, overrides\), got 'body'"),
}


class TestRules:
    @pytest.mark.parametrize("selector", SELECTORS.values(), ids=SELECTORS)
    def test_a_selector_selects(self, model, selector):
        coverage = qsam.quantize_(model, bits=3, rules=[(selector, {"bits": 2})])
        assert bits(coverage) == {"stem.weight": 3, "body.weight": 2, "head.weight": 8}

    def test_none_keeps_weight_and_input_float(self, model):
        coverage = qsam.quantize_(model, rules=[("body", None)])
        assert reasons(coverage) == {"body.weight": "a rule keeps it float"}
        assert "body" not in {row.name for row in coverage.inputs}
        assert not hasattr(model.body, "input_quantizer")

    def test_an_empty_dict_means_the_keywords_of_the_call_for_the_head_too(self, model):
        coverage = qsam.quantize_(model, bits=3, activation_bits=5, rules=[("head", {})])
        assert bits(coverage)["head.weight"] == 3
        assert model.head.input_quantizer.bits == 5

    def test_an_empty_dict_includes_embeddings_and_their_tied_head(self):
        model = TinyGPT()
        coverage = qsam.quantize_(model, bits=3, rules=[(nn.Embedding, {})])
        assert bits(coverage)["tokens.weight"] == 3
        inputs = {row.name: row for row in coverage.inputs}
        assert (inputs["tokens"].quantizer, inputs["tokens"].reason) == (None, "its input is indices")
        assert inputs["head"].quantizer is model.head.input_quantizer

    def test_a_tied_weight_is_found_by_any_of_its_names(self):
        assert bits(qsam.quantize_(TinyGPT(), bits=3, rules=[("head", {"bits": 2})]))["tokens.weight"] == 2

    @pytest.mark.parametrize("key", OVERRIDES)
    def test_each_keyword_can_be_overridden(self, model, key):
        value, where, expected = OVERRIDES[key]
        qsam.quantize_(model, rules=[("body", {key: value})])
        described = [
            {
                "weights": qsam.plan.quantizer_name(layer.weight_quantizer),
                "activations": qsam.plan.quantizer_name(layer.input_quantizer),
                "activation_bits": layer.input_quantizer.bits,
                **{name: getattr(layer.weight_quantizer, name) for name in ("bits", "granularity", "init")},
            }[key]
            for layer in (model.stem, model.body)
        ]
        assert hasattr(model.body, where)
        assert described[1] == expected != described[0]

    def test_group_size_can_be_overridden(self, model):
        qsam.quantize_(model, rules=[("body", {"granularity": "per_group", "group_size": 4})])
        assert model.body.weight_quantizer.scale.shape == (8, 2, 1)

    def test_weights_none_quantizes_the_input_only(self, model):
        coverage = qsam.quantize_(model, rules=[("body", {"weights": None})])
        assert reasons(coverage) == {"body.weight": "weights=None"}
        assert hasattr(model.body, "input_quantizer")

    def test_activations_none_quantizes_the_weight_only(self, model):
        coverage = qsam.quantize_(model, rules=[("body", {"activations": None})])
        assert "body.weight" in bits(coverage)
        assert [row.reason for row in coverage.inputs if row.quantizer is None] == ["activations=None"]

    def test_the_first_rule_that_matches_wins(self, model):
        rules = [("body", {"bits": 2}), ("*", {"bits": 5}), ("head", {"bits": 6})]
        assert bits(qsam.quantize_(model, rules=rules)) == {"stem.weight": 5, "body.weight": 2, "head.weight": 5}

    def test_parameters_of_unknown_layers_are_quantized_by_rule_and_their_input_on_request(self):
        model = nn.Sequential(nn.Linear(4, 4), Owner(), nn.Linear(4, 4))
        coverage = qsam.quantize_(model, rules=[(Owner, {"bits": 3})])
        assert bits(coverage)["1.matrix"] == 3
        assert {row.name: row.reason for row in coverage.inputs}["1"].startswith(
            "the input of Owner is quantized on request"
        )
        qsam.dequantize_(model)
        coverage = qsam.quantize_(model, rules=[(Owner, {"activations": "lsq"})])
        assert model[1].input_quantizer in [row.quantizer for row in coverage.inputs]

    def test_a_parameter_list_can_be_quantized_by_rule(self):
        model = nn.Module()
        model.pieces = nn.ParameterList([torch.randn(4, 4), torch.randn(4, 4)])
        assert set(bits(qsam.quantize_(model, rules=[("pieces.*", {})]))) == {"pieces.0", "pieces.1"}
        assert len(model.pieces) == 2 and model.pieces[1].shape == (4, 4)

    @pytest.mark.parametrize(("rules", "error", "message"), WRONG_RULES.values(), ids=WRONG_RULES)
    def test_a_wrong_rule_is_refused(self, model, rules, error, message):
        with pytest.raises(error, match=message):
            qsam.quantize_(model, rules=rules)


BAD_VALUES = {
    "bits too few": (dict(bits=1), ValueError, r"`bits` must be an integer in \[2, 8\], got 1"),
    "bits of a wrong kind": (dict(bits="4"), TypeError, r"`bits` must be an integer in \[2, 8\], got '4'"),
    "activation_bits": (
        dict(activation_bits=9),
        ValueError,
        r"`activation_bits` must be an integer in \[2, 8\], got 9",
    ),
    "init": (dict(init="msee"), ValueError, "`init` must be one of mse, .*, got 'msee'. Did you mean 'mse'"),
    "init, weights float": (dict(init="msee", weights=None), ValueError, "`init` must be one of"),
    "granularity": (
        dict(granularity="channel"),
        ValueError,
        "'stem.weight': `granularity` must be one of per_tensor",
    ),
    "unknown weights": (dict(weights="lsg"), ValueError, "There is no quantizer 'lsg'. Did you mean 'lsq'"),
    "unknown activations": (dict(activations="lsg"), ValueError, "There is no quantizer 'lsg'"),
    "activations of a wrong kind": (
        dict(activations=4),
        TypeError,
        "the input of 'stem': a quantizer is a registered",
    ),
    "activations per channel": (
        dict(activations="per_channel"),
        ValueError,
        "the input of 'stem': .* Inputs are quantized per tensor: name another in `activations`",
    ),
}


class TestArguments:
    @pytest.mark.parametrize(("arguments", "error", "message"), BAD_VALUES.values(), ids=BAD_VALUES)
    def test_a_bad_value_is_refused(self, model, arguments, error, message):
        with pytest.raises(error, match=message):
            qsam.quantize_(model, **arguments)

    def test_the_model_must_be_a_module(self):
        with pytest.raises(TypeError, match=r"`model` must be a torch.nn.Module, got list"):
            qsam.quantize_([nn.Linear(2, 2)])

    @pytest.mark.parametrize(
        ("model", "arguments"),
        [
            (nn.LayerNorm(4), {}),
            (nn.Embedding(4, 4), {}),
            (nn.Linear(4, 4), {"weights": None, "activations": None}),
            (nn.Linear(4, 4), {"rules": [("*", None)]}),
        ],
        ids=["a norm", "an embedding", "float by keyword", "float by rule"],
    )
    def test_nothing_quantized_is_refused(self, model, arguments):
        with pytest.raises(ValueError, match=r"nothing was quantized: .* Name some in `rules`"):
            qsam.quantize_(model, **arguments)

    def test_a_lazy_module_must_have_run_once(self):
        model = nn.Sequential(nn.LazyLinear(4))
        with pytest.raises(ValueError, match=r"'0.weight' is not initialized yet: run one forward of the lazy module"):
            qsam.quantize_(model)
        model(torch.randn(2, 3))
        assert set(bits(qsam.quantize_(model))) == {"0.weight"}

    @pytest.mark.parametrize("arguments", [{}, {"weights": None}])
    def test_a_model_without_data_is_refused(self, arguments):
        with pytest.raises(ValueError, match="'weight' is on the meta device: materialize the model"):
            qsam.quantize_(nn.Linear(2, 2, device="meta"), **arguments)

    def test_meta_parameters_that_stay_float_are_no_obstacle(self):
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))
        assert set(bits(qsam.quantize_(model, rules=[("1", None)]))) == {"0.weight"}

    @pytest.mark.parametrize("poison", [float("nan"), float("inf")])
    def test_weights_that_are_not_finite_are_refused_with_their_path(self, model, poison):
        with torch.no_grad():
            model.body.weight[0, 0] = poison
        with pytest.raises(ValueError, match=r"'body.weight': .*NaN or infinity"):
            qsam.quantize_(model)

    def test_a_name_that_is_taken_is_refused_with_its_path(self, model):
        model.body.weight_quantizer = "mine"
        with pytest.raises(ValueError, match=r"'body.weight': its module has an attribute 'weight_quantizer' already"):
            qsam.quantize_(model)
        del model.body.weight_quantizer
        model.body.input_quantizer = nn.Identity()
        with pytest.raises(ValueError, match="'body': its module has an attribute 'input_quantizer' already"):
            qsam.quantize_(model)

    @pytest.mark.parametrize("container", [nn.Sequential, nn.ModuleList, nn.ModuleDict])
    def test_an_owner_that_iterates_its_children_is_refused_with_its_path(self, container):
        owner = type("Chain", (container,), {})()
        owner.matrix = nn.Parameter(torch.randn(2, 2))
        model = nn.ModuleDict({"chain": owner, "fc": nn.Linear(2, 2)})
        with pytest.raises(
            ValueError, match=r"'chain.matrix' belongs to a Chain, which iterates its children: .* Keep it float"
        ):
            qsam.quantize_(model, rules=[("chain.matrix", {})])


def test_sites_name_each_parameter_once():
    model = TinyGPT()
    sites = find_sites(model)
    assert [site.name for site in sites] == [name for name, _ in model.named_parameters()]
    assert [(name, attr) for name, _, attr in sites[0].owners()] == [("tokens", "weight"), ("head", "weight")]


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile, lambda m: torch.compile(nn.DataParallel(m))])
def test_wrappers_are_looked_through(model, wrap):
    wrapped = wrap(model)
    assert unwrap_model(wrapped) is model
    assert "stem.weight" in bits(qsam.quantize_(wrapped))
