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


VIT = {"depth": 1, "embed_dim": 24, "num_heads": 2}
CONVNEXT = {"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 8)}


def hf_model(kind, **arguments):
    transformers = pytest.importorskip("transformers")
    small = {
        "Bert": dict(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, vocab_size=20),
        "GPT2": dict(n_embd=8, n_layer=2, n_head=2, vocab_size=20, n_positions=8, bos_token_id=0, eos_token_id=0),
    }
    family = "Bert" if kind.startswith("Bert") else "GPT2"
    config = getattr(transformers, f"{family}Config")(**small[family], **arguments)
    return getattr(transformers, kind)(config)


# --- layers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("build", "attr", "axis"), LAYERS.values(), ids=LAYERS)
def test_each_layer_is_quantized_by_default_and_its_output_channels_alone(build, attr, axis):
    """Each channel, and each group within one, as a tensor of its own. A maximum knows no order: bit for bit."""
    layer = build()
    before = getattr(layer, attr).detach().clone()
    assert attr in bits(qsam.quantize_(layer, bits=3, init="absmax", rules=[("*", {})]))
    scale = before.abs().max() / 3
    torch.testing.assert_close(getattr(layer, f"{attr}_quantizer").scale, scale[None])
    qsam.dequantize_(layer)
    rows = before.movedim(axis, 0).flatten(1)
    groups = 3 if rows.shape[1] % 2 else 2
    grouped = {"granularity": "per_group", "group_size": rows.shape[1] // groups, "activations": None}
    qsam.quantize_(layer, init="absmax", rules=[(attr, {"bits": 3, **grouped})])
    expected = rows.unflatten(1, (groups, -1)).abs().amax(-1) / 3
    close = dict(rtol=4 * torch.finfo(torch.float32).eps, atol=0)
    torch.testing.assert_close(getattr(layer, f"{attr}_quantizer").scale.squeeze(-1), expected, **close)
    qsam.dequantize_(layer)
    assert attr in bits(qsam.quantize_(layer, bits=3, granularity="per_channel", init="absmax"))
    qsam.write_(layer)
    for channel, alone in zip(getattr(layer, attr).unbind(axis), before.unbind(axis), strict=True):
        q = qsam.quantizers.LSQ(bits=getattr(layer, f"{attr}_quantizer").bits)
        q.init = "absmax"
        q.observe_(alone)
        assert torch.equal(channel, q(alone))


def test_embedding_by_rule_has_a_scale_per_row():
    layer = nn.Embedding(5, 4)
    qsam.quantize_(layer, granularity="per_channel", rules=[(nn.Embedding, {})])
    assert layer.weight_quantizer.scale.shape == (5, 1)


def test_recurrent_layers_have_a_quantizer_for_each_matrix():
    layer = nn.LSTM(4, 6, num_layers=2, bidirectional=True)
    names = {name for name, _ in layer.named_parameters() if name.startswith("weight")}
    assert set(bits(qsam.quantize_(layer))) == names


# --- the default policy -----------------------------------------------------------------------------------------------


def tied_layers():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    model[1].weight = model[0].weight
    return model


def with_lora():
    return nn.ModuleDict({"base": nn.Linear(4, 4), "lora_A": nn.Linear(4, 2), "lora_B": nn.Linear(2, 4)})


WORD = "bert.embeddings.word_embeddings.weight"
POSITION, KIND = (f"bert.embeddings.{name}_embeddings.weight" for name in ("position", "token_type"))
BLOCKS = [f"transformer.h.{i}.{n}.weight" for i in range(2) for n in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")]  # fmt: skip
GPT_FLOAT = {"transformer.wpe.weight": "embedding"}

# What is built; the bits of each quantized weight, 2 being those of the call (None: see below); why the others are float.
POLICY = {
    "the last layer is the head": (lambda: nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4)), {"0.weight": 2, "1.weight": 8}, {}),
    "one layer has no head": (lambda: nn.Sequential(nn.Linear(4, 4)), {"0.weight": 2}, {}),
    "an input convolution": (lambda: nn.Sequential(*[nn.Conv2d(3, 3, 3) for _ in range(3)]), {"0.weight": 8, "1.weight": 2, "2.weight": 8}, {}),
    "a head tied to an embedding": (TinyGPT, {"fc1.weight": 2, "fc2.weight": 2}, {"tokens.weight": "embedding, tied to head"}),
    "LoRA factors": (with_lora, {"base.weight": 2}, {"lora_A.weight": "LoRA factor", "lora_B.weight": "LoRA factor"}),
    "unknown layers": (
        lambda: nn.Sequential(nn.Linear(4, 4), Owner()), {"0.weight": 2},
        {"1.matrix": "no default for a parameter of Owner: name it in `rules`", "1.table": "not floating (torch.int32)"},
    ),
    "BERT": (
        lambda: hf_model("BertForSequenceClassification"), None,
        {WORD: "embedding", POSITION: "embedding", KIND: "embedding"},
    ),
    "masked BERT": (
        lambda: hf_model("BertForMaskedLM"), None,
        {WORD: "embedding, tied to cls.predictions.decoder", POSITION: "embedding", KIND: "embedding"},
    ),
    "GPT-2": (
        lambda: hf_model("GPT2LMHeadModel"), dict.fromkeys(BLOCKS, 2),
        {"transformer.wte.weight": "embedding, tied to lm_head", **GPT_FLOAT},
    ),
    "GPT-2, untied": (
        lambda: hf_model("GPT2LMHeadModel", tie_word_embeddings=False), dict.fromkeys(BLOCKS, 2) | {"lm_head.weight": 8},
        {"transformer.wte.weight": "embedding", **GPT_FLOAT},
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:only .* of the matrices' entries are quantized")
@pytest.mark.parametrize(("build", "widths", "kept"), POLICY.values(), ids=POLICY)
def test_the_default_policy(build, widths, kept):
    model = build()
    names = [name for name, _ in model.named_parameters()]
    coverage = qsam.quantize_(model, bits=2)
    assert [row.name for row in coverage.weights] == names, "every parameter is listed, in order"
    assert all(row.reason for row in coverage.weights if row.quantizer is None)
    assert reasons(coverage) == kept
    assert widths is None or bits(coverage) == widths
    assert {row.reason for row in coverage.quantized if row.quantizer.bits == 8} <= {"input layer", "head"}
    if widths is None:  # six matrices per layer, and the pooler or the head's first layer
        assert sorted(bits(coverage).values())[:13] == [2] * 13
        assert bits(coverage).get("classifier.weight", 8) == 8 and len(bits(coverage)) in (13, 14)


def test_parametrized_weights_stay_float():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 8))
    assert "0.parametrizations.weight.original1" in reasons(qsam.quantize_(model))


PATCHES, TOKENS = {"patch_embed.proj.weight"}, {"cls_token", "pos_embed"}


@pytest.mark.parametrize(
    ("name", "arguments", "ends", "stays"),
    [
        ("vit_tiny_patch16_224", VIT, PATCHES | {"head.weight"}, TOKENS),
        ("vit_tiny_patch16_224", {**VIT, "num_classes": 0}, PATCHES, TOKENS),
        ("resnet18", {}, {"conv1.weight", "fc.weight"}, set()),
        ("convnext_atto", CONVNEXT, {"stem.0.weight", "head.fc.weight"}, set()),
    ],
    ids=["ViT", "ViT without a head", "ResNet", "ConvNeXt"],
)
def test_stem_and_head_of_timm_models_get_8_bits(name, arguments, ends, stays):
    model = pytest.importorskip("timm").create_model(name, **arguments)
    coverage = qsam.quantize_(model, init="absmax")
    assert set(reasons(coverage)) == stays
    assert {name for name, width in bits(coverage).items() if width == 8} == ends
    roles = {row.reason for row in coverage.quantized if row.name in ends}
    assert roles == ({"input layer"} if len(ends) == 1 else {"input layer", "head"})


def test_tied_linear_layers_share_one_quantizer_and_have_an_input_each():
    coverage = qsam.quantize_(tied_layers(), activation_bits=4)
    assert [(row.name, row.reason) for row in coverage.quantized] == [("0.weight", "tied to 1"), ("2.weight", "head")]
    rows = [(row.name, row.reason, row.quantizer.bits) for row in coverage.inputs]
    assert rows == [("0", "", 4), ("1", "shares 0.weight", 4), ("2", "", 8)]


# --- rules ------------------------------------------------------------------------------------------------------------

SELECTORS = {
    "glob on a module": "bo*",
    "glob on a parameter": "body.w*",
    "regular expression on a module": "re:^b.dy$",
    "regular expression on a parameter": r"re:ody\.weight",
    "module type": Body,
    "predicate": lambda name, module: name == "body" and isinstance(module, Body),
}


@pytest.mark.parametrize("selector", SELECTORS.values(), ids=SELECTORS)
def test_a_selector_selects(model, selector):
    coverage = qsam.quantize_(model, bits=3, rules=[(selector, {"bits": 2})])
    assert bits(coverage) == {"stem.weight": 3, "body.weight": 2, "head.weight": 8}


def test_the_first_rule_that_matches_wins(model):
    rules = [("body", {"bits": 2}), ("*", {"bits": 5}), ("head", {"bits": 6})]
    assert bits(qsam.quantize_(model, rules=rules)) == {"stem.weight": 5, "body.weight": 2, "head.weight": 5}


@pytest.mark.parametrize(
    ("overrides", "weight", "given"),
    [
        (None, "a rule keeps it float", None),
        ({"weights": None}, "weights=None", "lsq"),
        ({"activations": None}, "lsq", "activations=None"),
        ({"weights": "identity", "activations": "fixed_step"}, "identity", "fixed_step"),
    ],
)
def test_a_rule_keeps_weight_or_input_float_and_chooses_quantizers(model, overrides, weight, given):
    coverage = qsam.quantize_(model, rules=[("body", overrides)])

    def shown(rows, name):
        row = next((row for row in rows if row.name == name), None)
        return row and (row.reason if row.quantizer is None else qsam.plan.quantizer_name(row.quantizer))

    assert (shown(coverage.weights, "body.weight"), shown(coverage.inputs, "body")) == (weight, given)
    assert hasattr(model.body, "input_quantizer") == (given in ("lsq", "fixed_step"))
    assert (shown(coverage.weights, "stem.weight"), shown(coverage.inputs, "stem")) == ("lsq", "lsq")


def test_a_rule_sets_bits_granularity_and_initial_scale(model):
    settings = {"bits": 2, "activation_bits": 6, "granularity": "per_group", "group_size": 4, "init": "absmax"}
    qsam.quantize_(model, bits=3, activation_bits=5, rules=[("body", settings), ("head", {})])
    q = model.body.weight_quantizer
    assert (q.bits, q.granularity, q.group_size, q.init, q.scale.shape) == (2, "per_group", 4, "absmax", (8, 2, 1))
    assert [layer.input_quantizer.bits for layer in model] == [5, 6, 5], "{} means the call's own, for the head too"
    assert (model.stem.weight_quantizer.bits, model.head.weight_quantizer.bits) == (3, 3)


@pytest.mark.parametrize("selector", [nn.Embedding, "head"])
def test_a_rule_includes_embeddings_by_any_name_of_a_tied_weight(selector):
    model = TinyGPT()
    coverage = qsam.quantize_(model, bits=3, rules=[(selector, {})])
    assert bits(coverage)["tokens.weight"] == 3
    inputs = {row.name: row for row in coverage.inputs}
    assert (inputs["tokens"].quantizer, inputs["tokens"].reason) == (None, "its input is indices")
    assert inputs["head"].quantizer is model.head.input_quantizer


def test_parameters_of_unknown_layers_are_quantized_by_rule_and_their_input_on_request():
    model = nn.Sequential(nn.Linear(4, 4), Owner(), nn.Linear(4, 4))
    model[2].pieces = nn.ParameterList([torch.randn(4, 4)])
    coverage = qsam.quantize_(model, rules=[(Owner, {"bits": 3}), ("*pieces.*", {})])
    assert bits(coverage)["1.matrix"] == 3 and "2.pieces.0" in bits(coverage)
    rows = {row.name: row.reason for row in coverage.inputs}
    assert rows["1"].startswith("the input of Owner is quantized on request")
    qsam.dequantize_(model)
    coverage = qsam.quantize_(model, rules=[(Owner, {"activations": "lsq"}), ("*pieces.*", {})])
    assert model[1].input_quantizer in [row.quantizer for row in coverage.inputs]


WRONG = [  # further ones: tests/contract/test_refused_calls.py
    ([("bodi", None)], ValueError, "'bodi' matches no parameter .* Did you mean 'body.weight'"),
    ([("xyz", None)], ValueError, "'xyz' matches .* There are: stem.weight, body.weight"),
    ([("*.bias", {})], ValueError, "matches no parameter of two or more dimensions"),
    ([("body", {"bit": 2})], TypeError, "cannot override 'bit'. Did you mean 'bits'"),
    ([("body", {"bits": 9})], ValueError, r"in the rule 'body': `bits` must be an integer in \[2, 8\], got 9"),
    ([("body", {"weights": "lsk"})], ValueError, "no quantizer 'lsk'. Did you mean 'lsq'"),
    ([("body", {"weights": nn.Linear})], TypeError, "'body.weight': a quantizer is a registered"),
    ([("body", 4)], TypeError, r"must be None \(float\) or a dict .*, got 4"),
    ([(3, None)], TypeError, "selector must be a glob, .*, got 3"),
    ([(nn.Linear(2, 2), None)], TypeError, "selector must be a glob"),
    ([("re:(", None)], ValueError, r"'re:\(' is not a regular expression"),
    ({"bits": "4"}, TypeError, r"`bits` must be an integer in \[2, 8\], got '4'"),
    ({"activation_bits": 9}, ValueError, r"`activation_bits` must be an integer in \[2, 8\], got 9"),
    ({"init": "msee"}, ValueError, "`init` must be one of mse, .*, got 'msee'. Did you mean 'mse'"),
    ({"activations": "per_channel"}, ValueError, "the input of 'stem': .* per tensor: name another in `activations`"),
    ({"group_size": 4}, ValueError, r"'stem.weight': `group_size` belongs to granularity 'per_group'"),
]


@pytest.mark.parametrize(("wrong", "error", "message"), WRONG)
def test_a_wrong_rule_or_keyword_is_refused(model, wrong, error, message):
    with pytest.raises(error, match=message):
        qsam.quantize_(model, **({"rules": wrong} if isinstance(wrong, list) else wrong))


# --- models that cannot be quantized ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "arguments"),
    [(nn.LayerNorm(4), {}), (nn.Embedding(4, 4), {}), (nn.Linear(4, 4), {"weights": None, "activations": None})],
)
def test_nothing_quantized_is_refused(model, arguments):
    with pytest.raises(ValueError, match=r"nothing was quantized: .* Name some in `rules`"):
        qsam.quantize_(model, **arguments)


def test_a_lazy_module_must_have_run_once():
    model = nn.Sequential(nn.LazyLinear(4))
    with pytest.raises(ValueError, match=r"'0.weight' is not initialized yet: run one forward of the lazy module"):
        qsam.quantize_(model)
    model(torch.randn(2, 3))
    assert set(bits(qsam.quantize_(model))) == {"0.weight"}


def test_a_meta_parameter_is_refused_unless_it_stays_float():
    for arguments in ({}, {"weights": None}):
        with pytest.raises(ValueError, match="'weight' is on the meta device: materialize the model"):
            qsam.quantize_(nn.Linear(2, 2, device="meta"), **arguments)
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))
    assert set(bits(qsam.quantize_(model, rules=[("1", None)]))) == {"0.weight"}


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_with_their_path(model, poison):
    with torch.no_grad():
        model.body.weight[0, 0] = poison
    with pytest.raises(ValueError, match=r"'body.weight': .*NaN or infinity"):
        qsam.quantize_(model)


def test_a_name_that_is_taken_is_refused_with_its_path(model):
    model.body.weight_quantizer = "mine"
    with pytest.raises(ValueError, match=r"'body.weight': its module has an attribute 'weight_quantizer' already"):
        qsam.quantize_(model)
    del model.body.weight_quantizer
    model.body.input_quantizer = nn.Identity()
    with pytest.raises(ValueError, match="'body': its module has an attribute 'input_quantizer' already"):
        qsam.quantize_(model)


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
