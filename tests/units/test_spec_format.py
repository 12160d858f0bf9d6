"""Files of ``qsam_format`` 1 that qsam 0.1.0 wrote (in ``tests/data/format_1``) are read by every later qsam.

``tests/data/format_1`` was written with commit 8706e5b, before the plan became one data structure.
"""

import json
from pathlib import Path

import safetensors.torch
import torch
from torch import nn

import qsam

FOLDER = Path(__file__).parents[1] / "data" / "format_1"


def as_written_now() -> dict:
    """Return what the file says. Its ``per_channel`` is a name of lsq now, which says so by its granularity."""
    content = json.loads((FOLDER / "qsam.json").read_text())
    (named,) = (entry for entry in content["weights"].values() if entry["quantizer"] == "per_channel")
    assert named["granularity"] == "per_channel"
    named["quantizer"] = "lsq"
    return content


def not_kept_yet(weights: dict) -> dict:
    """Return the rows without the mark that their scales are kept: no file, optimizer or `write_` has set them."""
    return {name: {**row, "calibrated": False} for name, row in weights.items()}


class Zoo(nn.Module):
    """Layers of every kind, with weights that need no random numbers."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)
        self.up = nn.ConvTranspose1d(4, 6, 3)
        self.rnn = nn.LSTM(6, 4)
        self.attention = nn.MultiheadAttention(4, 2)
        self.table = nn.Embedding(5, 4)
        self.groups, self.named, self.fixed = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.noisy, self.input_only, self.float = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.tied, self.head = nn.Linear(4, 4, bias=False), nn.Linear(4, 3)
        self.tied.weight = self.noisy.weight
        with torch.no_grad():
            for i, p in enumerate(self.parameters()):
                p.copy_((torch.arange(p.numel()) * (0.7 + 0.1 * i)).sin().reshape(p.shape))


RULES = [
    ("table", {"bits": 3, "granularity": "per_channel"}),
    ("up", {"granularity": "per_channel", "init": "absmax"}),
    ("rnn.*", {"granularity": "per_channel", "bits": 5}),
    ("groups", {"granularity": "per_group", "group_size": 2, "init": "lsq"}),
    ("named", {"weights": "per_channel", "activations": "identity"}),
    ("fixed", {"weights": "fixed_step", "activations": "fixed_step", "activation_bits": 4}),
    ("noisy", {"weights": "diffq"}),
    ("input_only", {"weights": None}),
    ("float", None),
]


def write() -> None:
    """Write the files (once, with the code that they stand for)."""
    model = Zoo()
    coverage = qsam.quantize_(model, rules=RULES)
    for name, sign in (("groups", 1.0), ("fixed", -1.0), ("conv", 1.0)):
        quantizer = model.get_submodule(name).input_quantizer
        quantizer.observe_(sign * torch.linspace(0, 2, 33))
    coverage.save(FOLDER)


def test_a_file_of_format_1_is_rebuilt_as_it_was_written():
    model = Zoo()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    coverage = qsam.quantize_(model, spec=FOLDER)
    content = as_written_now()
    del content["tensors_sha256"]
    assert json.loads(json.dumps(coverage.to_spec())) == content
    tensors = safetensors.torch.load_file(FOLDER / "qsam.safetensors")
    state = model.state_dict()
    assert len(tensors) > 20
    assert all(torch.equal(state[key], value) for key, value in tensors.items())
    assert all(torch.equal(state[name], value) for name, value in before.items())


def test_a_dict_of_format_1_is_rebuilt_too():
    content = json.loads((FOLDER / "qsam.json").read_text())
    rebuilt, expected = qsam.quantize_(Zoo(), spec=content).to_spec(), as_written_now()
    assert rebuilt["weights"] == not_kept_yet(expected["weights"])
    assert rebuilt["float"] == expected["float"]
    assert rebuilt["inputs"].keys() == expected["inputs"].keys()


def test_todays_rules_still_write_what_the_file_says():
    content = as_written_now()
    spec = json.loads(json.dumps(qsam.quantize_(Zoo(), rules=RULES).to_spec()))
    assert spec["weights"] == not_kept_yet(content["weights"])
    assert (spec["float"], spec["float_inputs"]) == (content["float"], content["float_inputs"])
