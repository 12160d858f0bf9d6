"""Files for other runtimes that hold the trained integers: nothing is quantized again.

    p = codes * scale          what the model holds, bit for bit, and what every file holds

Each function starts from :func:`integers`, which refuses a weight that is anything else. Packages that a format needs
are imported by the function that writes it.
"""

from qsam.deploy.checkpoints import export_checkpoint
from qsam.deploy.gguf import export_gguf
from qsam.deploy.integers import Layer, integers, round_scales_
from qsam.deploy.packed import load, save
from qsam.deploy.torchao import to_torchao

__all__ = [
    "Layer",
    "export_checkpoint",
    "export_gguf",
    "integers",
    "load",
    "round_scales_",
    "save",
    "to_torchao",
]
