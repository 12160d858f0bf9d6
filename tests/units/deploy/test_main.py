"""The command line: a recipe's folder becomes a file that is read again, or an error says what to do."""

import json

import pytest
import torch

import qsam
from qsam import deploy
from qsam.deploy.__main__ import examples, main
from tests.models import BERT

pytest.importorskip("transformers")


@pytest.fixture
def run_folder(tmp_path):
    """Return the folder of a run, as recipes/training.py leaves it."""
    rules = [("*embeddings*", None), ("classifier", None), ("*", {})]
    model = BERT.quantized(bits=3, granularity="per_channel", rules=rules)
    qsam.write_(model)
    folder = tmp_path / "run" / "model"
    weights = {name: value for name, value in model.state_dict().items() if "_quantizer." not in name}
    model.save_pretrained(folder, state_dict=weights)
    (folder / "tokenizer.json").write_text("{}")
    qsam.coverage_of(model).save(folder)
    return tmp_path / "run"


def test_packed_holds_what_from_pretrained_needs_and_can_be_the_source_of_the_next(run_folder, tmp_path, capsys):
    assert main([str(run_folder), "--to", "packed", "--out", str(tmp_path / "packed"), "--rows", "2"]) == 0
    said = capsys.readouterr().out
    assert "read again: all 13 weights hold the trained integers" in said
    assert "outputs of 2 random examples: largest difference 0\n" in said
    line = next(
        line for line in said.splitlines() if line.startswith("bert.encoder.layer.{0-1}.intermediate.dense.weight")
    )
    assert line.split()[1:] == ["3", "bits", str(32 * 16 * 3 // 8 + 4 * 32), f"{4 * 32 * 16:,}"]
    assert "bert.embeddings.word_embeddings.weight" in said and "a rule keeps it float" in said
    assert sorted(p.name for p in (tmp_path / "packed").iterdir()) == [
        "config.json", "qsam.json", "qsam.safetensors", "tokenizer.json"]  # fmt: skip
    out = tmp_path / "ct"
    assert main([str(tmp_path / "packed"), "--to", "compressed-tensors", "--out", str(out), "--scales", "bf16"]) == 0
    assert json.loads((out / "config.json").read_text())["quantization_config"]["quant_method"] == "compressed-tensors"
    assert (out / "tokenizer.json").is_file()
    assert "largest difference 0" in capsys.readouterr().out or not _has("compressed_tensors")


def _has(name):
    import importlib.util

    return importlib.util.find_spec(name) is not None


def test_scales_are_rounded_on_request(run_folder, tmp_path):
    assert main([str(run_folder), "--to", "packed", "--out", str(tmp_path / "p"), "--scales", "fp16"]) == 0
    fresh = BERT.build()
    deploy.load(fresh, tmp_path / "p")
    assert all(torch.equal(layer.scale.half().float(), layer.scale) for layer in deploy.integers(fresh))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to", "gguf"], "--to gguf needs --float-gguf, a file of llama.cpp's convert_hf_to_gguf.py"),
        (["--to", "packed", "--rows", "0"], "--rows must be at least 1, got 0."),
        (["--to", "mlx"], "has a scale per 16, and the layout 'mlx' has groups of 128, 64, 32"),
    ],
)
def test_what_cannot_be_written_is_said_in_a_line(arguments, message, run_folder, tmp_path, capsys):
    assert main([str(run_folder), "--out", str(tmp_path / "out"), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("qsam.deploy: ") and message in error
    assert not (tmp_path / "out").exists()


def test_a_folder_without_a_spec_config_or_architecture_is_refused(run_folder, tmp_path, capsys):
    call = ["--to", "packed", "--out", str(tmp_path / "out")]
    assert main([str(tmp_path), *call]) == 2
    assert "there is no qsam.json in" in capsys.readouterr().err
    assert main([str(run_folder), "--to", "packed", "--out", str(run_folder / "model")]) == 2
    assert "--out is the model's own folder" in capsys.readouterr().err
    path = run_folder / "model" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "architectures": ["Nonesuch"]}))
    assert main([str(run_folder), *call]) == 2
    assert "transformers has no architecture ['Nonesuch'] to build" in capsys.readouterr().err
    path.unlink()
    assert main([str(run_folder), *call]) == 2
    assert "has no config.json of a transformers model: build your model" in capsys.readouterr().err


def test_examples_are_what_the_model_takes():
    from transformers import ViTConfig, ViTForImageClassification, WhisperConfig, WhisperForConditionalGeneration

    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    vit = ViTForImageClassification(ViTConfig(**size, image_size=16, patch_size=8))
    inputs = examples(vit, 3)
    assert vit(**inputs).logits.shape[0] == 3
    assert torch.equal(examples(vit, 3)["pixel_values"], inputs["pixel_values"])
    bert = BERT.build()
    assert bert(**examples(bert, 2)).logits.shape[0] == 2
    small = WhisperConfig(vocab_size=20, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
                          decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, num_mel_bins=8,
                          max_source_positions=8, max_target_positions=8, pad_token_id=0, bos_token_id=0,
                          eos_token_id=0, decoder_start_token_id=0, suppress_tokens=None, begin_suppress_tokens=None)  # fmt: skip
    with pytest.raises(ValueError, match=r"there are no examples for a model of 'input_features': call the functions"):
        examples(WhisperForConditionalGeneration(small), 1)
