"""A recipe's run becomes a file by one command."""

import re

import pytest

from qsam.deploy.__main__ import main as deploy
from recipes.bert_glue import main
from tests.recipes.tiny_glue import words


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
    pytest.importorskip("compressed_tensors")
    assert deploy([str(run), "--to", "compressed-tensors", "--out", str(tmp_path / "ct")]) == 0
    said = capsys.readouterr().out
    assert "read again: all 12 weights hold the trained integers" in said
    assert "largest difference 0\n" in said
