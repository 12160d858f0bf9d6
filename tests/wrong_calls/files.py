"""Files: see book.py."""

import copy
import json

from torch import nn
from torch.optim import SGD, Adam

import qsam
from tests.wrong_calls.book import wrong


@wrong(TypeError, "`state_dict` must be a dict, what optimizer.state_dict() returned, got list.")
def _(optimizer):
    optimizer.load_state_dict([])


@wrong(ValueError, "the checkpoint has no 'state': it is not an optimizer's state_dict.")
def _(optimizer):
    optimizer.load_state_dict({})


@wrong(ValueError, "the checkpoint has no 'param_groups': it is not an optimizer's state_dict.")
def _(optimizer):
    optimizer.load_state_dict({"state": {}})


@wrong(ValueError, "the checkpoint has 0 parameter groups, this optimizer 1: build it as it was built then.")
def _(optimizer):
    optimizer.load_state_dict({"state": {}, "param_groups": []})


@wrong(ValueError, "the checkpoint's 'param_groups' is no list of groups: it is not an optimizer's state_dict.")
def _(optimizer):
    optimizer.load_state_dict({"state": {}, "param_groups": [1, 2, 3]})


@wrong(ValueError, "the checkpoint has qsam_format 2; this qsam reads 1: install a newer qsam.")
def _(optimizer):
    state = optimizer.state_dict()
    state["param_groups"][0]["qsam_format"] = 2
    optimizer.load_state_dict(state)


@wrong(
    ValueError,
    "'4.weight' is LSQ(bits=4, signed, per_tensor) here and LSQ(bits=8, signed, per_tensor) in the "
    "checkpoint: call quantize_ as it was called then, or with `spec`.",
)
def _(optimizer, model):
    optimizer.load_state_dict(qsam.QAT(model, SGD, lr=0.1).state_dict())


@wrong(
    ValueError,
    "'0.weight' is LSQ(bits=4, signed, per_tensor) here and LSQ(bits=2, signed, per_tensor) in the "
    "checkpoint: call quantize_ as it was called then, or with `spec`.",
)
def _(optimizer, model):
    qsam.quantize_(model, bits=2, rules=[("*", {})])
    optimizer.load_state_dict(qsam.QAT(model, SGD, lr=0.1).state_dict())


@wrong(ValueError, "the checkpoint has 1 parameter groups, this optimizer 3: build it as it was built then.")
def _(optimizer):
    optimizer.load_state_dict(qsam.SAM(nn.Linear(2, 2), SGD, lr=0.1).state_dict())


@wrong(ValueError, "the checkpoint is of the base optimizer Adam, this one is SGD: build it as it was built then.")
def _(optimizer, quantized, other):
    optimizer.load_state_dict(qsam.SQuAT(other, Adam, lr=0.1).state_dict())


@wrong(
    ValueError,
    "the checkpoint has no latent of '2.weight': its full-precision weights are lost. Save the "
    "whole optimizer.state_dict().",
)
def _(optimizer):
    state = copy.deepcopy(optimizer.state_dict())
    del state["state"][2]["qsam_latent"]
    optimizer.load_state_dict(state)


@wrong(FileNotFoundError, "there is no quantizer spec 'FOLDER/nowhere': `Coverage.save(folder)` writes one.")
def _(model, folder):
    qsam.quantize_(model, spec=folder / "nowhere")


@wrong(TypeError, "`spec` must be a path or what `Coverage.to_spec()` returned, got 3.")
def _(model, folder):
    qsam.quantize_(model, spec=3)


@wrong(ValueError, "the given spec is not a qsam spec: it lacks 'qsam_format', 'weights' or 'inputs'.")
def _(model):
    qsam.quantize_(model, spec={})


@wrong(ValueError, "the given spec has qsam_format 2; this qsam reads 1: install a newer qsam.")
def _(model):
    qsam.quantize_(model, spec={"qsam_format": 2, "weights": {}, "inputs": {}})


@wrong(ValueError, "the given spec is not a qsam spec: its 'weights' must be a dict, got [].")
def _(model):
    qsam.quantize_(model, spec={"qsam_format": 1, "weights": [], "inputs": {}})


@wrong(ValueError, "the spec names '9', which this model does not have: it belongs to another model.")
def _(model):
    qsam.quantize_(model, spec={"qsam_format": 1, "weights": {}, "inputs": {}, "float_inputs": {"9": ""}})


@wrong(ValueError, "'0.weight': its entry in the spec lacks 'bits'.")
def _(model):
    qsam.quantize_(model, spec={"qsam_format": 1, "weights": {"0.weight": {}}, "inputs": {}})


@wrong(ValueError, "'0.weight': its entry in the spec must be a dict, got 4.")
def _(model):
    qsam.quantize_(model, spec={"qsam_format": 1, "weights": {"0.weight": 4}, "inputs": {}})


@wrong(ValueError, "nothing was quantized: no layer that qsam knows, or every one is kept float. Name some in `rules`.")
def _(model):
    qsam.quantize_(model, spec={"qsam_format": 1, "weights": {}, "inputs": {}})


@wrong(ValueError, "'0.weight': There is no quantizer 'lsk'. Did you mean 'lsq'?")
def _(model, spec):
    spec["weights"]["0.weight"]["quantizer"] = "lsk"
    qsam.quantize_(model, spec=spec)


@wrong(ValueError, "'0.weight': `bits` must be an integer in [2, 8], got 1. To keep a tensor in float, give None.")
def _(model, spec):
    spec["weights"]["0.weight"]["bits"] = 1
    qsam.quantize_(model, spec=spec)


@wrong(ValueError, "'0.weight' has shape [16, 8], the spec's has [3, 3]: it belongs to another model.")
def _(model, spec):
    spec["weights"]["0.weight"]["shape"] = [3, 3]
    qsam.quantize_(model, spec=spec)


@wrong(
    ValueError,
    "'FOLDER/qsam.json' is not JSON (Expecting property name enclosed in double quotes: line 1 "
    "column 2 (char 1)): `Coverage.save(folder)` writes a spec.",
)
def _(model, folder):
    (folder / "qsam.json").write_text("{")
    qsam.quantize_(model, spec=folder)


@wrong(ValueError, "'FOLDER/qsam.json' is not a qsam spec: it lacks 'qsam_format', 'weights' or 'inputs'.")
def _(model, folder):
    (folder / "qsam.json").write_text("[]")
    qsam.quantize_(model, spec=folder)


@wrong(
    FileNotFoundError, "'FOLDER/qsam.safetensors', the scales that belong to qsam.json, is missing: copy both files."
)
def _(model, folder, spec):
    (folder / "qsam.json").write_text(json.dumps(spec))
    qsam.quantize_(model, spec=folder)


@wrong(
    ValueError,
    "'FOLDER/qsam.safetensors' was not saved with the qsam.json beside it: save again, or copy both files.",
)
def _(model, folder, quantized):
    qsam.quantize_(copy.deepcopy(model), bits=3).save(folder)
    (folder / "qsam.safetensors").write_bytes(b"torn")
    qsam.quantize_(model, spec=folder)
