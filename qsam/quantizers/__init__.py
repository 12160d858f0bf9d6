"""The quantizers, one file each; importing this package registers them."""

from qsam.quantizers.base import QUANTIZERS, Quantizer, Spec, build_quantizer, list_quantizers, register_quantizer
from qsam.quantizers.diffq import DiffQ
from qsam.quantizers.fixed_step import FixedStep
from qsam.quantizers.gobo import GOBO
from qsam.quantizers.identity import Identity
from qsam.quantizers.liq import LIQ
from qsam.quantizers.lsq import LSQ
from qsam.quantizers.lsq_plus import LSQPlus
from qsam.quantizers.lsq_statistics import LSQStatistics
from qsam.quantizers.minmax_ema import MinMaxEMA
from qsam.quantizers.noise import Noise
from qsam.quantizers.pact import PACT
from qsam.quantizers.per_token import PerToken
from qsam.quantizers.qbert import QBert
from qsam.quantizers.stochastic import Stochastic
from qsam.quantizers.stretched import Stretched

__all__ = [
    "GOBO",
    "LIQ",
    "LSQ",
    "PACT",
    "QUANTIZERS",
    "DiffQ",
    "FixedStep",
    "Identity",
    "LSQPlus",
    "LSQStatistics",
    "MinMaxEMA",
    "Noise",
    "PerToken",
    "QBert",
    "Quantizer",
    "Spec",
    "Stochastic",
    "Stretched",
    "build_quantizer",
    "list_quantizers",
    "register_quantizer",
]
