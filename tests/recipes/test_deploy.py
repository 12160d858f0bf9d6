"""A recipe's run becomes a file by one command."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from qsam.deploy.__main__ import main as deploy
from qsam.deploy.__main__ import read_model
from recipes.bert_glue import main
from tests.recipes.tiny_glue import words

SERVE = """
import sys
sys.path.insert(0, sys.argv[1])
from serve_onnx import Encoder
print(*Encoder(*sys.argv[2:])([["a film", "the cat"], ["a"]]).ravel())
assert not {"torch", "qsam", "transformers"} & set(sys.modules)
"""


def assert_serves(run, file):
    """The example answers as the model does, without torch."""
    examples = Path(__file__).parents[2] / "examples"
    command = [sys.executable, "-c", SERVE, str(examples), str(file), str(run / "model" / "tokenizer.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    model, _ = read_model(run)
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    expected = []
    for texts in (("a film", "the cat"), ("a",)):
        with torch.no_grad():
            expected += model.eval()(**tokenizer(*texts, return_tensors="pt")).logits.flatten().tolist()
    # a rounding error may move an input by one of its 255 steps
    assert [float(word) for word in done.stdout.split()] == pytest.approx(expected, abs=2e-2)


def test_a_run_becomes_a_packed_folder_and_a_compressed_tensors_folder(glue, tiny, tmp_path, capsys):
    assert main(words(glue, tiny, tmp_path / "runs", "--method", "squat", steps=2)) == 0
    run = tmp_path / "runs" / "cola-squat-w2a8-seed0"
    capsys.readouterr()
    assert deploy([str(run), "--to", "packed", "--out", str(tmp_path / "packed")]) == 0
    said = capsys.readouterr().out
    assert "read again: all 12 weights hold the trained integers" in said
    assert "largest difference 0\n" in said
    assert (tmp_path / "packed" / "tokenizer.json").is_file()
    pytest.importorskip("onnxruntime")
    assert deploy([str(run), "--to", "onnx", "--out", str(tmp_path / "model.onnx")]) == 0
    said = capsys.readouterr().out
    assert "read again: the graph holds the trained integers." in said
    assert re.search(r"verdict +passed", said)
    assert "12 MatMulIntegerToFloat" in said
    assert_serves(run, tmp_path / "model.onnx")
    pytest.importorskip("compressed_tensors")
    assert deploy([str(run), "--to", "compressed-tensors", "--out", str(tmp_path / "ct")]) == 0
    said = capsys.readouterr().out
    assert "read again: all 12 weights hold the trained integers" in said
    assert "largest difference 0\n" in said
