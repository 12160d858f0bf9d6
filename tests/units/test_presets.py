import pytest
from torch import nn

import qsam


def bert_like(kind, **arguments):
    transformers = pytest.importorskip("transformers")
    if kind == "DistilBert":
        sizes = dict(dim=8, hidden_dim=16, n_layers=2, n_heads=2, vocab_size=20)
    else:
        sizes = dict(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, vocab_size=20)
    config = getattr(transformers, f"{kind}Config")(**sizes)
    return getattr(transformers, f"{kind}ForSequenceClassification")(config)


@pytest.mark.parametrize("kind", ["Bert", "Roberta", "Electra", "DistilBert"])
def test_squat_bert_quantizes_the_linear_layers_of_the_encoder_and_nothing_else(kind):
    model = bert_like(kind)
    coverage = qsam.quantize_(model, bits=2, rules=qsam.presets.squat_bert)
    encoder = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".layer." in name  # neither pooler nor classifier
    }
    assert len(encoder) == 2 * 6
    assert {row.name for row in coverage.quantized} == encoder
    assert {row.quantizer.bits for row in coverage.quantized} == {2}
    assert {row.quantizer.bits for row in coverage.inputs} == {8}


def test_squat_bert_can_be_preceded_by_rules_of_ones_own():
    rules = [("*.layer.0.*", {"bits": 5}), ("classifier", {}), *qsam.presets.squat_bert]
    coverage = qsam.quantize_(bert_like("Bert"), bits=2, rules=rules)
    widths = {row.name: row.quantizer.bits for row in coverage.quantized}
    assert widths["bert.encoder.layer.0.output.dense.weight"] == 5
    assert widths["bert.encoder.layer.1.output.dense.weight"] == widths["classifier.weight"] == 2


def test_squat_bert_leaves_lora_factors_float():
    block = nn.ModuleDict({"fc": nn.Linear(4, 4), "lora_A": nn.Linear(4, 2)})
    model = nn.ModuleDict({"layer": nn.ModuleList([block])})
    coverage = qsam.quantize_(model, rules=qsam.presets.squat_bert)
    assert [row.name for row in coverage.quantized] == ["layer.0.fc.weight"]


def test_squat_bert_on_a_model_without_numbered_layers_is_refused():
    with pytest.raises(ValueError, match=r"_encoder_linear.* matches no parameter"):
        qsam.quantize_(nn.Sequential(nn.Linear(4, 4)), rules=qsam.presets.squat_bert)


EMBEDDINGS = {f"bert.embeddings.{name}_embeddings.weight" for name in ("word", "position", "token_type")}


@pytest.mark.parametrize(
    ("preset", "call", "others", "bits"),
    [
        ("q8bert", {"weights": "minmax_ema", "bits": 8}, {"bert.pooler.dense.weight", "classifier.weight"} | EMBEDDINGS, 8),
        ("qbert", {"weights": "qbert", "bits": 2}, EMBEDDINGS, 8),
        ("gobo", {"weights": "gobo", "bits": 3, "activations": None}, {"bert.pooler.dense.weight"}, 3),
    ],
)  # fmt: skip
def test_a_papers_preset_quantizes_the_papers_layers(preset, call, others, bits):
    model = bert_like("Bert")
    coverage = qsam.quantize_(model, rules=getattr(qsam.presets, preset), **call)
    widths = {row.name: row.quantizer.bits for row in coverage.quantized}
    inside = {name: width for name, width in widths.items() if ".layer." in name}
    assert len(inside) == 2 * 6 and set(inside.values()) == {call["bits"]}
    assert {name: width for name, width in widths.items() if name not in inside} == dict.fromkeys(others, bits)


def llama(**arguments):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=50, **arguments
    )
    return transformers.LlamaForCausalLM(config)


def test_onnx_cpu_gives_the_ends_seven_bits_and_leaves_the_rest():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(4, 2))
    coverage = qsam.quantize_(model, bits=3, rules=qsam.presets.onnx_cpu(model))
    assert [row.quantizer.bits for row in coverage.quantized] == [7, 3, 7]
    assert [row.quantizer.bits for row in coverage.inputs] == [8, 8, 8]


def test_llm_int4_keeps_embeddings_head_and_inputs_float():
    model = llama()
    coverage = qsam.quantize_(model, rules=qsam.presets.llm_int4(model))
    kinds = {(row.quantizer.bits, row.quantizer.group_size) for row in coverage.quantized}
    assert len(coverage.quantized) == 2 * 7 and kinds == {(4, 32)}
    assert {row.quantizer for row in coverage.inputs} == {None}
    assert {row.name for row in coverage.weights if row.bits == 32 and len(row.shape) == 2} == {
        "model.embed_tokens.weight", "lm_head.weight",
    }  # fmt: skip


@pytest.mark.parametrize("tied", [False, True])
def test_gguf_q4_0_gives_embeddings_and_head_eight_bits(tied):
    model = llama(tie_word_embeddings=tied)
    coverage = qsam.quantize_(model, rules=qsam.presets.gguf_q4_0(model))
    wide = {row.name for row in coverage.quantized if row.quantizer.bits == 8}
    assert wide == {"model.embed_tokens.weight"} | (set() if tied else {"lm_head.weight"})
    assert {row.quantizer.group_size for row in coverage.quantized} == {32}
    assert {row.quantizer for row in coverage.inputs} == {None}
