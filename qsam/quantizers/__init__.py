"""The quantizers, one file each; importing this package registers them."""

from qsam.quantizers.base import QUANTIZERS, Quantizer, Spec, build_quantizer, list_quantizers, register_quantizer
from qsam.quantizers.diffq import DiffQ
from qsam.quantizers.fixed_step import FixedStep
from qsam.quantizers.identity import Identity
from qsam.quantizers.lsq import LSQ
from qsam.quantizers.noise import Noise
from qsam.quantizers.stochastic import Stochastic

__all__ = [
    "LSQ",
    "QUANTIZERS",
    "DiffQ",
    "FixedStep",
    "Identity",
    "Noise",
    "Quantizer",
    "Spec",
    "Stochastic",
    "build_quantizer",
    "list_quantizers",
    "register_quantizer",
]
