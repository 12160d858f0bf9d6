"""Readers that are not ours find the trained integers in our files, and runtimes compute the model's answers."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import qsam
from qsam import deploy
from qsam.deploy.gguf import TYPES
from qsam.deploy.packed import pack_rows
from tests.models import BERT

pytest.importorskip("transformers")

# An environment with torchao lets transformers import it, and torchao uses what torch calls deprecated.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


def llama(bits=4, width=64, tied=False, **options):
    """Return a small Llama on its grid, inputs float unless asked for."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=tied, bos_token_id=1, eos_token_id=2,
        initializer_range=0.4 / math.sqrt(width),
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    coverage = qsam.quantize_(model, **{"bits": bits, "activations": None, **options})
    if any(row.quantizer is not None for row in coverage.inputs):
        qsam.calibrate(model, [{"input_ids": tokens(9)}])
    qsam.write_(model)
    return model


def tokens(seed, rows=4, length=12):
    return torch.randint(3, 64, (rows, length), generator=torch.Generator().manual_seed(seed))


# --- codes ------------------------------------------------------------------------------------------------------------


@given(bits=st.integers(2, 8), rows=st.integers(1, 4), columns=st.integers(1, 70), seed=st.integers(0, 99))
def test_compressed_tensors_unpacks_our_rows(bits, rows, columns, seed):
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    low = 2 ** (bits - 1)
    codes = torch.randint(-low, low, (rows, columns), generator=torch.Generator().manual_seed(seed)).to(torch.int8)
    packed = pack_rows(codes, bits)
    packed = nn.functional.pad(packed, (0, -packed.shape[1] % 4)).view(torch.int32)
    assert torch.equal(packed, helpers.pack_to_int32(codes, bits))
    assert torch.equal(helpers.unpack_from_int32(packed, bits, torch.Size(codes.shape)), codes)


@settings(max_examples=20)
@given(
    kind=st.sampled_from(["Linear", "Conv2d", "Conv1D", "Tied"]),
    bits=st.integers(2, 8),
    granularity=st.sampled_from(["per_tensor", "per_channel", "per_group"]),
    columns=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_compressed_tensors_unpacks_a_packed_file(tmp_path_factory, kind, bits, granularity, columns, seed):
    """Odd sizes too: a row of our file is a row of theirs without the bytes that fill its last word."""
    import safetensors.torch
    from transformers.pytorch_utils import Conv1D

    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    torch.manual_seed(seed)
    size = 3 * columns
    build = {"Linear": lambda: nn.Linear(size, 5), "Conv2d": lambda: nn.Conv2d(columns, 5, 3),
             "Conv1D": lambda: Conv1D(5, size), "Tied": lambda: nn.ModuleDict({"a": nn.Linear(size, 5)})}  # fmt: skip
    model = build[kind]()
    if kind == "Tied":
        model["b"] = nn.Linear(size, 5)
        model["b"].weight = model["a"].weight
    group = {"group_size": 3} if granularity == "per_group" else {}
    qsam.quantize_(model, activations=None, granularity=granularity, **group, rules=[("*", {"bits": bits})])
    qsam.write_(model)
    folder = tmp_path_factory.mktemp("packed")
    deploy.save(model, folder)
    tensors = safetensors.torch.load_file(folder / "qsam.safetensors")
    (record,) = qsam.export(model).weights
    rows = record.codes.flatten(1)
    packed = tensors[f"{record.name}_packed"]
    words = nn.functional.pad(packed, (0, -packed.shape[1] % 4)).view(torch.int32)
    codes = helpers.unpack_from_int32(words, bits, torch.Size(rows.shape)).reshape(record.codes.shape)
    assert torch.equal(codes, record.codes)
    assert torch.equal(tensors[f"{record.name}_quantizer.scale"], record.scale)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_mlx_dequantizes_our_rows(bits):
    mx = pytest.importorskip("mlx.core")
    low = 2 ** (bits - 1)
    codes = torch.randint(-low, low, (5, 96), generator=torch.Generator().manual_seed(bits)).to(torch.int8)
    scale = torch.full((5, 3), 0.5)  # a power of two: products and sums are exact
    packed = mx.array(pack_rows(codes, bits).view(torch.int32).numpy()).view(mx.uint32)
    found = mx.dequantize(packed, mx.array(scale.numpy()), mx.array((-low * scale).numpy()), group_size=32, bits=bits)
    assert np.array_equal(np.array(found), codes.numpy() * 0.5)


# --- compressed-tensors in transformers -------------------------------------------------------------------------------


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 4, "granularity": "per_group", "group_size": 32},
        {"bits": 2, "granularity": "per_channel"},
        {"bits": 3},
        {"bits": 3, "exact_width": True},
        {"bits": 7, "tied": True},
        {"bits": 8, "granularity": "per_channel", "activations": "lsq"},
        {"bits": 4, "activations": "lsq", "activation_bits": 6},
    ],
    ids=str,
)
def test_from_pretrained_computes_the_trained_model_bit_for_bit(options, tmp_path):
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM

    options = dict(options)
    exact = options.pop("exact_width", False)
    model = llama(**options)
    deploy.export_checkpoint(model, tmp_path / "out", exact_width=exact)
    fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert qsam.coverage_of(fresh) is None
    inputs = {"input_ids": tokens(1)}
    assert torch.equal(logits(fresh, inputs), logits(model, inputs))
    assert not torch.equal(logits(llama(bits=8), inputs), logits(model, inputs))


@pytest.mark.filterwarnings("ignore:the input of .* held no negative entry")
@pytest.mark.parametrize("signed", [True, False])
def test_a_bert_with_static_inputs_comes_back_without_qsam(signed, tmp_path):
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForSequenceClassification

    rules = [("*embeddings*", None), ("classifier", None), ("*", {})]
    model = BERT.quantized(bits=4, granularity="per_channel", rules=rules)
    qsam.write_(model)
    if not signed:
        for row in qsam.coverage_of(model).inputs:
            row.quantizer.set_sign_(False)
    model.eval()
    deploy.export_checkpoint(model, tmp_path / "out")
    fresh = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    inputs = {key: value for key, value in BERT.batch(2).items() if key != "labels"}
    assert torch.equal(logits(fresh, inputs), logits(model, inputs))
    qsam.dequantize_(model)  # the same weights with float inputs are another function
    assert not torch.equal(logits(fresh, inputs), logits(model, inputs))


# --- mlx-lm -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "tied"), [(2, False), (3, False), (4, True), (6, False)])
def test_mlx_lm_computes_the_trained_model(bits, tied, tmp_path):
    """Products are summed in another order: allow the fp32 noise of a float model, some 1e-6 of the largest logit."""
    mx = pytest.importorskip("mlx.core")
    load = pytest.importorskip("mlx_lm.utils").load_model
    model = llama(bits=bits, tied=tied, granularity="per_group", group_size=32)
    deploy.export_checkpoint(model, tmp_path / "out", "mlx")
    found, _ = load(tmp_path / "out")
    ids = tokens(1)
    theirs = torch.from_numpy(np.array(found(mx.array(ids.numpy()))))
    ours = logits(model, {"input_ids": ids})
    assert float((theirs - ours).abs().max() / ours.abs().max()) < 1e-5


# --- llama.cpp --------------------------------------------------------------------------------------------------------


def write_float_gguf(model, path):
    """Write what llama.cpp's converter makes of a Llama: its names, and rows of queries and keys in rotary order."""
    gguf = pytest.importorskip("gguf")
    config = model.config
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(10000.0)
    words = ["<unk>", "<s>", "</s>", "<0x0A>", *(f"t{i}" for i in range(4, config.vocab_size))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(words)
    writer.add_token_scores([0.0] * len(words))
    writer.add_token_types([2, 3, 3, 6, *[1] * (len(words) - 4)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, value in model.state_dict().items():
        if "_quantizer." in name or (name == "lm_head.weight" and config.tie_word_embeddings):
            continue
        values = value.numpy()
        if count := heads.get(name.split(".")[-2]):
            values = values.reshape(count, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


GRIDS = {
    "Q4_0": {"bits": 4, "granularity": "per_group", "group_size": 32},
    "Q8_0": {"bits": 8, "granularity": "per_channel"},
    "Q5_0": {"bits": 5, "granularity": "per_channel"},
    "Q2_0": {"bits": 2, "granularity": "per_group", "group_size": 64},
    "TQ2_0": {"bits": 2, "granularity": "per_channel", "width": 256},
    "Q2_K": {"bits": 2, "granularity": "per_channel", "width": 256},
    "Q3_K": {"bits": 3, "granularity": "per_tensor", "width": 256},
    "Q6_K": {"bits": 6, "granularity": "per_channel", "width": 256},
}


def patched(kind, folder, **more):
    model = llama(**GRIDS[kind], **more, rules=[("*embed_tokens", None), ("*", {})])
    deploy.round_scales_(model, torch.float16)
    found = deploy.export_gguf(model, write_float_gguf(model, folder / "f.gguf"), folder / "q.gguf", [kind])
    assert {each.type for each in found} == {kind}
    return model, found


@pytest.mark.parametrize("kind", [kind for kind in GRIDS if kind != "Q2_0"])  # gguf 0.19 does not know that one
def test_gguf_dequantizes_the_trained_weights(kind, tmp_path):
    gguf = pytest.importorskip("gguf")
    model, found = patched(kind, tmp_path)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "q.gguf").tensors}
    assert len(found) == len(deploy.integers(model)) == 15
    for each in found:
        values = gguf.quants.dequantize(tensors[each.tensor].data, tensors[each.tensor].tensor_type)
        assert torch.equal(torch.from_numpy(values), each.layer.module.weight[each.rows])
        is_rotary = each.layer.path.endswith(("q_proj", "k_proj"))
        assert is_rotary != torch.equal(each.rows, torch.arange(len(each.rows)))


def test_gguf_holds_the_conv1d_of_a_gpt2_with_the_outputs_as_rows(tmp_path):
    """The converter transposes what GPT-2 has as (in, out)."""
    gguf = pytest.importorskip("gguf")
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=12, n_embd=32, n_layer=1, n_head=2))
    rules = [("*wpe", None), ("*", {})]
    qsam.quantize_(model, bits=4, granularity="per_channel", activations=None, rules=rules)
    qsam.write_(model)
    deploy.round_scales_(model, torch.float16)
    writer = gguf.GGUFWriter(tmp_path / "f.gguf", "gpt2")
    writer.add_block_count(1)
    writer.add_head_count(2)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, 1)
    rows = {}
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and "_quantizer." not in name:
            turn = type(model.get_submodule(name.removesuffix(".weight"))).__name__ == "Conv1D"
            own = names.get_name(name, try_suffixes=(".weight",))
            rows[own] = parameter.detach().t().contiguous() if turn else parameter.detach()
            writer.add_tensor(own, rows[own].numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = deploy.export_gguf(model, tmp_path / "f.gguf", tmp_path / "q.gguf")
    assert {each.tensor for each in found} == rows.keys() - {"position_embd.weight"}
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "q.gguf").tensors}
    for own, expected in rows.items():
        assert np.array_equal(gguf.quants.dequantize(tensors[own].data, tensors[own].tensor_type), expected.numpy())


def llama_cpp(path, prompts):
    """Return llama.cpp's log-probabilities of the token after each prompt."""
    xllamacpp = pytest.importorskip("xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.warmup, params.n_gpu_layers = 64, 1, False, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(params)
    rows = []
    for prompt in prompts.tolist():
        request = {"prompt": prompt, "n_predict": 1, "logprobs": 64, "temperature": 1.0, "cache_prompt": False,
                   "top_k": 0, "top_p": 1.0, "min_p": 0.0}  # fmt: skip
        (token,) = server.handle_completions(request)["choices"][0]["logprobs"]["content"]
        assert len(token["top_logprobs"]) == 64
        rows.append([each["logprob"] for each in sorted(token["top_logprobs"], key=lambda each: each["id"])])
    return torch.tensor(rows)


def divergence(ours, theirs):
    return float((ours.exp() * (ours - theirs)).sum(-1).max())


@pytest.mark.long
@pytest.mark.parametrize(("kind", "tied"), [*((kind, False) for kind in GRIDS), ("Q4_0", True)])
def test_llama_cpp_computes_the_trained_model(kind, tied, tmp_path):
    """It rounds the inputs of each layer to 8 bits per block of 32, which leaves some 1e-5; other codes would cost more."""
    pytest.importorskip("xllamacpp")
    model, _ = patched(kind, tmp_path, tied=tied)
    prompts = tokens(3, rows=32)
    ours = logits(model, {"input_ids": prompts})[:, -1].log_softmax(-1)
    first, second = ours.topk(2).values.unbind(-1)
    clear = (first - second).topk(8).indices  # a random model has ties that any rounding breaks
    prompts, ours = prompts[clear], ours[clear]
    theirs = llama_cpp(tmp_path / "q.gguf", prompts)
    assert torch.equal(theirs.argmax(-1), ours.argmax(-1))
    assert divergence(ours, theirs) < 5e-5
    assert divergence(ours, llama_cpp(tmp_path / "f.gguf", prompts)) < 5e-6
    other = logits(llama(bits=4, width=GRIDS[kind].get("width", 64)), {"input_ids": prompts})[:, -1].log_softmax(-1)
    assert TYPES[kind].bits == 8 or divergence(ours, other) > 5e-4


# --- onnxruntime-genai ------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("bits", [2, 3])
def test_the_builder_of_onnxruntime_genai_makes_the_trained_model(bits, tmp_path):
    """At accuracy level 0 the kernels add in fp32, in another order: some 1e-6 of the largest logit."""
    pytest.importorskip("onnxruntime_genai")
    onnxruntime = pytest.importorskip("onnxruntime")
    tokenizers = pytest.importorskip("tokenizers")
    from transformers import PreTrainedTokenizerFast

    model = llama(bits=bits, granularity="per_group", group_size=32)
    deploy.export_checkpoint(model, tmp_path / "in", "olive")
    words = tokenizers.models.WordLevel({f"t{i}": i for i in range(64)}, unk_token="t0")
    PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(words)).save_pretrained(tmp_path / "in")
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", tmp_path / "in", "-o", tmp_path / "out",
               "-p", "int4", "-e", "cpu", "--extra_options", "accuracy_level=0"]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx", providers=["CPUExecutionProvider"])
    ids = tokens(1)
    empty = np.zeros((len(ids), 2, 0, 16), np.float32)
    given = {"input_ids": ids.numpy(), "attention_mask": np.ones(ids.shape, np.int64)}
    past = {i.name: empty for i in session.get_inputs() if i.name.startswith("past_key_values")}
    theirs = torch.from_numpy(session.run(["logits"], {**given, **past})[0])
    ours = logits(model, {"input_ids": ids})
    assert float((theirs - ours).abs().max() / ours.abs().max()) < 1e-5
