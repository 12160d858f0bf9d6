"""`qsam.json` and `qsam.safetensors` on full disks, cut and flipped: refused by name, and the model is as it was."""

import random
import resource

import pytest

import qsam
from tests.methods import assert_same
from tests.models import MLP


def load(model, folder):
    return qsam.quantize_(model, spec=folder)


def test_spoiled_scales_are_refused_and_the_model_is_as_it_was(tmp_path):
    qsam.quantize_(MLP.build(), bits=3).save(tmp_path)
    path, chance = tmp_path / "qsam.safetensors", random.Random(0)
    content = path.read_bytes()
    model = MLP.build()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for spoiled in [content[:-1], b"", *(flipped(content, chance) for _ in range(20))]:
        path.write_bytes(spoiled)
        with pytest.raises(ValueError, match=r"qsam\.safetensors' was not saved with the qsam\.json beside it"):
            load(model, tmp_path)
        assert_same(model.state_dict(), before)
    path.write_bytes(content)
    assert load(model, tmp_path).quantized[0].bits == 3


def flipped(content, chance):
    spoiled = bytearray(content)
    spoiled[chance.randrange(len(spoiled))] ^= 1 << chance.randrange(8)
    return bytes(spoiled)


def test_a_spec_that_is_cut_is_refused_and_the_model_is_as_it_was(tmp_path):
    path = qsam.quantize_(MLP.build(), bits=3).save(tmp_path)
    content = path.read_bytes()
    model = MLP.build()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for length in range(0, len(content) - 1, 97):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"qsam\.json' is not JSON"):
            load(model, tmp_path)
        assert_same(model.state_dict(), before)


def test_a_full_disk_keeps_the_old_pair_of_files(tmp_path):
    qsam.quantize_(MLP.build(), bits=3).save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    other = qsam.quantize_(MLP.build(), bits=5)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            other.save(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert load(MLP.build(), tmp_path).quantized[0].bits == 3
