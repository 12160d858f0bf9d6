"""The quantizers, one file each; importing this package registers them."""

from qsam.quantizers.base import QUANTIZERS, Quantizer, list_quantizers, register_quantizer
from qsam.quantizers.fixed_step import FixedStep
from qsam.quantizers.identity import Identity
from qsam.quantizers.lsq import LSQ, PerChannel

__all__ = [
    "LSQ",
    "QUANTIZERS",
    "FixedStep",
    "Identity",
    "PerChannel",
    "Quantizer",
    "list_quantizers",
    "register_quantizer",
]
