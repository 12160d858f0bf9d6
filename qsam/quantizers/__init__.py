"""The quantizers, one file each; importing this package registers them."""

from qsam.quantizers.base import QUANTIZERS, Quantizer, list_quantizers, register_quantizer
from qsam.quantizers.diffq import DiffQ
from qsam.quantizers.fixed_step import FixedStep
from qsam.quantizers.identity import Identity
from qsam.quantizers.lsq import LSQ, PerChannel
from qsam.quantizers.noise import Noise
from qsam.quantizers.stochastic import Stochastic
from qsam.quantizers.stretched import Stretched

__all__ = [
    "LSQ",
    "QUANTIZERS",
    "DiffQ",
    "FixedStep",
    "Identity",
    "Noise",
    "PerChannel",
    "Quantizer",
    "Stochastic",
    "Stretched",
    "list_quantizers",
    "register_quantizer",
]
