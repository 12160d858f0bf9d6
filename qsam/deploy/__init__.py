"""Files for other runtimes that hold the trained integers: nothing is quantized again.

    p = codes * scale          what the model holds, bit for bit, and what every file holds

Each function starts from :func:`integers`, which refuses a weight that is anything else. Packages that a format needs
are imported by the function that writes it.
"""

from qsam.deploy.check import check, onnx_runtime
from qsam.deploy.checkpoints import export_checkpoint
from qsam.deploy.gguf import export_gguf
from qsam.deploy.integers import Layer, integers, round_scales_
from qsam.deploy.onnx import export_onnx
from qsam.deploy.packed import load, save
from qsam.deploy.torchao import to_torchao

__all__ = [
    "Layer",
    "check",
    "export_checkpoint",
    "export_gguf",
    "export_onnx",
    "integers",
    "load",
    "onnx_runtime",
    "round_scales_",
    "save",
    "to_torchao",
]
