import copy
import pickle
import re
from collections import OrderedDict
from itertools import pairwise

import pytest
import torch
from torch import nn

import qsam
from qsam.coverage import owner_of, set_owner
from qsam.plan import SPEC_NAME, TENSORS_NAME, read_spec


def mlp(*sizes):
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(sizes)))


def stack(layers):
    """A model with numbered blocks, the last of which holds the head."""
    block = lambda: nn.ModuleDict({"query": nn.Linear(8, 8), "fc": nn.Linear(8, 16)})  # noqa: E731
    return nn.ModuleDict({"layer": nn.ModuleList(block() for _ in range(layers)), "head": nn.Linear(8, 2)})


def lines(coverage):
    return str(coverage).splitlines()


def expanded(names):
    """The parameter names that a column of the table stands for."""
    for name in names:
        if match := re.search(r"\{([\d,-]+)\}", name):
            for run in match[1].split(","):
                first, _, last = run.partition("-")
                for number in range(int(first), int(last or first) + 1):
                    yield from expanded([name.replace(match[0], str(number), 1)])
        else:
            yield name


ATTENTION = "attention, by its name: scores and probabilities stay float"


def timm_vit(name="vit_tiny_patch16_224", **arguments):
    small = {"depth": 2, "embed_dim": 12, "num_heads": 2, "img_size": 32}
    return pytest.importorskip("timm").create_model(name, **small, **arguments)


def hf_bert():
    transformers = pytest.importorskip("transformers")
    small = dict(hidden_size=8, num_hidden_layers=3, num_attention_heads=2, intermediate_size=16, vocab_size=20)
    return transformers.BertForSequenceClassification(transformers.BertConfig(**small))


ATTENTIONS = {
    "torch": (lambda: nn.MultiheadAttention(4, 2), ("",), ["the model itself"]),
    "torch, in a layer": (lambda: nn.TransformerEncoderLayer(8, 2, 16), ("self_attn",), ["self_attn"]),
    "timm": (timm_vit, ("blocks.0.attn", "blocks.1.attn"), ["blocks.{0-1}.attn"]),
    "timm, by the name in its parent": (
        lambda: timm_vit("xcit_nano_12_p16_224", cls_attn_layers=1),
        ("blocks.0.attn", "blocks.1.attn", "cls_attn_blocks.0.attn"),
        ["blocks.{0-1}.attn", "cls_attn_blocks.0.attn"],
    ),
    "Hugging Face": (
        hf_bert,
        tuple(f"bert.encoder.layer.{i}.attention.self" for i in range(3)),
        ["bert.encoder.layer.{0-2}.attention.self"],
    ),
    "none": (lambda: mlp(8, 16, 4), (), []),
}


# --- sizes ------------------------------------------------------------------------------------------------------------


def test_share_and_bytes_count_codes_scales_and_what_is_float():
    coverage = qsam.quantize_(mlp(8, 16, 4), bits=3)
    assert [row.numel for row in coverage.weights] == [128, 16, 64, 4]
    assert coverage.share == (128 + 64) / (128 + 16 + 64 + 4)
    assert coverage.float_bytes == 4 * (128 + 16 + 64 + 4)
    # codes, of which the head's have 8 bits; scales of two weights and two inputs; biases
    assert coverage.size_bytes == 128 * 3 // 8 + 64 * 8 // 8 + 4 * (2 + 2) + 4 * (16 + 4)


def test_every_scale_of_channels_and_groups_counts():
    rules = [("1", {"granularity": "per_group", "group_size": 4})]
    coverage = qsam.quantize_(mlp(8, 16, 4), bits=4, granularity="per_channel", rules=rules, activations=None)
    assert coverage.size_bytes == (128 + 64) * 4 // 8 + 4 * (16 + 64 // 4) + 4 * (16 + 4)
    assert "lsq 4 bits per_group of 4" in str(coverage)


def test_a_begun_byte_counts():
    coverage = qsam.quantize_(nn.Linear(3, 3, bias=False), bits=2, activations=None)
    assert coverage.size_bytes == 3 + 4  # 18 bits, one scale


def test_a_tied_weight_counts_once():
    model = mlp(4, 4, 4)
    model[1].weight, model[1].bias = model[0].weight, None
    coverage = qsam.quantize_(model)
    assert coverage.float_bytes == 4 * (16 + 4)
    assert re.search(r"\n1 +lsq 8 bits not calibrated  shares 0.weight\n", str(coverage))


@pytest.mark.parametrize(
    ("options", "scales"), [({"weights": "identity", "activations": None}, 0), ({"weights": None}, 2)]
)
def test_identity_and_none_are_float(options, scales):
    coverage = qsam.quantize_(mlp(8, 16, 4), **options)
    assert (coverage.share, coverage.size_bytes) == (0, coverage.float_bytes + scales * 4)
    assert "0.0% of 212 parameters quantized\n" in str(coverage)


class TestTable:
    def test_a_small_model(self):
        model = nn.Sequential(OrderedDict(stem=nn.Linear(8, 16), act=nn.ReLU(), head=nn.Linear(16, 4)))
        coverage = qsam.quantize_(model, bits=2)
        qsam.calibrate(model, [torch.linspace(-1, 1, 16).reshape(2, 8)])
        assert lines(coverage) == [
            "parameter                shape  weight                 input",
            "stem.weight               16x8  lsq 2 bits per_tensor  lsq 8 bits signed",
            "head.weight               4x16  lsq 8 bits per_tensor  lsq 8 bits unsigned  head",
            "vectors and scalars (2)         float                                       biases, norms: fewer than two "
            "dimensions",
            "90.6% of 212 parameters quantized, 4.00 bits on average",
            "0.85 kB in fp32, 0.19 kB packed (scales included)",
        ]

    def test_attention_says_what_stays_float(self):
        coverage = qsam.quantize_(nn.MultiheadAttention(4, 2))
        text = repr(coverage)
        assert str(qsam.quantize_(nn.MultiheadAttention(4, 2), spec=coverage.to_spec())) == text
        assert "the hidden states stay float" in str(qsam.quantize_(nn.LSTM(4, 4)))
        assert re.search(r"in_proj_weight +12x4  lsq 4 bits per_tensor  lsq 8 bits not calibrated\n", text)
        assert re.search(
            r"out_proj.weight +4x4  lsq .* +float +head; weights only: .* never calls its out_proj\n", text
        )

    @pytest.mark.parametrize(("build", "paths", "shown"), ATTENTIONS.values(), ids=ATTENTIONS)
    def test_attention_says_that_its_probabilities_stay_float(self, build, paths, shown):
        coverage = qsam.quantize_(build(), init="absmax")
        assert coverage.attention == paths
        rows = [line for line in lines(coverage) if line.endswith(ATTENTION)]
        assert [line.removesuffix(ATTENTION).strip() for line in rows] == shown

    def test_float_weights_name_their_reason_and_show_their_input(self):
        model = nn.Sequential(nn.Embedding(5, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2))
        text = str(qsam.quantize_(model, rules=[("1", None), ("2", {"weights": None})]))
        assert re.search(r"0.weight +5x8  float +embedding\n", text)
        assert re.search(r"1.weight +8x8  float +a rule keeps it float\n", text)
        assert re.search(r"2.weight +8x8  float +lsq 8 bits not calibrated  weights=None\n", text)

    def test_layers_that_are_alike_share_a_line(self):
        table = lines(qsam.quantize_(stack(12)))
        assert [line.split()[0] for line in table[1:4]] == [
            "layer.{0-11}.query.weight",
            "layer.{0-11}.fc.weight",
            "head.weight",
        ]
        assert len(table) == 1 + 3 + 1 + 2

    def test_layers_that_are_not_alike_do_not(self):
        table = lines(qsam.quantize_(stack(5), rules=[("layer.2.query", {"bits": 2})]))
        assert [line.split()[0] for line in table[1:4]] == [
            "layer.{0-1,3-4}.query.weight", "layer.{0-4}.fc.weight", "layer.2.query.weight",
        ]  # fmt: skip

    def test_a_line_stands_for_whole_blocks_only(self):
        model = nn.ModuleList([mlp(8, 8, 8), mlp(8, 8), mlp(8, 2)])
        names = [line.split()[0] for line in lines(qsam.quantize_(model))[1:5]]
        assert names == ["0.0.weight", "0.1.weight", "1.0.weight", "2.0.weight"]

    @pytest.mark.parametrize("kind", ["stack", "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
    def test_every_matrix_is_named_once(self, kind):
        if kind == "stack":
            model = stack(3)
        else:
            heads = 2 if "vit" in kind else (1, 2, 3, 6)
            model = pytest.importorskip("timm").create_model(kind, embed_dim=24, num_heads=heads)
        coverage = qsam.quantize_(model, init="absmax")
        table = lines(coverage)
        rows = [line for line in table[1:-3] if not line.endswith(ATTENTION)]  # a header; vectors and two totals
        names = [line.split()[0] for line in rows]
        assert sorted(expanded(names)) == sorted(row.name for row in coverage.weights if len(row.shape) >= 2)
        assert len(table) < 50
        assert not any(line != line.rstrip() for line in table)

    def test_names_with_braces_are_shown_as_they_are(self):
        model = nn.ModuleDict({"{0}": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
        assert lines(qsam.quantize_(model))[1].startswith("{0}.weight ")


class TestRows:
    def test_quantizers_have_the_paths_that_the_model_gives_them(self):
        model = mlp(8, 16, 4)
        coverage = qsam.quantize_(model)
        modules = {name: module for name, module in model.named_modules() if isinstance(module, qsam.Quantizer)}
        assert coverage.quantizers == modules
        assert set(qsam.quantize_(nn.Linear(4, 4)).quantizers) == {"weight_quantizer", "input_quantizer"}


class TestSave:
    @pytest.fixture
    def model(self):
        return mlp(8, 16, 4)

    @pytest.fixture
    def coverage(self, model):
        return qsam.quantize_(model)

    def test_it_makes_the_folder_and_returns_the_path(self, coverage, tmp_path):
        folder = tmp_path / "new" / "folder"
        assert coverage.save(str(folder)) == folder / SPEC_NAME
        assert sorted(path.name for path in folder.iterdir()) == sorted([SPEC_NAME, TENSORS_NAME])

    def test_the_tensors_are_those_of_the_state_dict(self, model, coverage, tmp_path):
        coverage.save(tmp_path)
        _, tensors = read_spec(tmp_path)
        expected = {key: value for key, value in model.state_dict().items() if "_quantizer." in key}
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensors[key], value) for key, value in expected.items())

    @pytest.mark.parametrize("at", [0, 1], ids=["first file", "second file"])
    def test_an_interrupted_save_is_never_read_as_a_whole_one(self, model, coverage, tmp_path, monkeypatch, at):
        coverage.save(tmp_path)
        before = coverage.to_spec(), {key: value.tolist() for key, value in read_spec(tmp_path)[1].items()}
        with torch.no_grad():
            model[0].weight_quantizer.scale.mul_(2)
        renames, rename = [], qsam.plan.os.replace

        def interrupted(source, target):
            if len(renames) == at:
                raise KeyboardInterrupt
            renames.append(rename(source, target))

        monkeypatch.setattr(qsam.plan.os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            coverage.save(tmp_path)
        assert len(list(tmp_path.iterdir())) == 2
        if at == 0:
            plan, tensors = read_spec(tmp_path)
            assert plan.to_spec() == before[0]
            assert {key: value.tolist() for key, value in tensors.items()} == before[1]
        else:
            with pytest.raises(ValueError, match=r"was not saved with the qsam.json beside it"):
                read_spec(tmp_path)


class Owner:
    """Stands for an optimizer, of which only the identity and the life matter here."""


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda coverage: pickle.loads(pickle.dumps(coverage))])
def test_an_owner_is_held_weakly_and_a_copy_has_none(copied):
    coverage, owner = qsam.quantize_(mlp(4, 4)), Owner()
    assert owner_of(coverage) is None
    set_owner(coverage, owner)
    assert owner_of(coverage) is owner
    other = copied(coverage)
    assert owner_of(other) is None
    assert str(other) == str(coverage)
    del owner
    assert owner_of(coverage) is None
