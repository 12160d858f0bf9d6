"""qsam: a quantization-aware optimizer plug-in for any PyTorch model.

    optimizer = qsam.SQuAT(model, AdamW, lr=2e-5, rho=0.1)
    loss = optimizer.step(closure)

The optimizer owns the full-precision weights, and the model always holds the weights that will be deployed.
"""

from qsam import presets
from qsam.attach import calibrate, dequantize_, quantize_, write_
from qsam.batchnorm import reestimate_batchnorm
from qsam.coverage import Coverage, coverage_of
from qsam.export import export
from qsam.fused.kernels import set_backend
from qsam.measure import bit_allocation, hessian_top_eigenvalue, loss_slice, sharpness
from qsam.optim import QAT, SAM, SAQ, Direction, JointSAM, SQuAT, register_direction, unwrap
from qsam.quantizers import Quantizer, list_quantizers, register_quantizer
from qsam.recommendation import recommended, travel_lr

__version__ = "0.1.0"

__all__ = [
    "QAT",
    "SAM",
    "SAQ",
    "Coverage",
    "Direction",
    "JointSAM",
    "Quantizer",
    "SQuAT",
    "bit_allocation",
    "calibrate",
    "coverage_of",
    "dequantize_",
    "export",
    "hessian_top_eigenvalue",
    "list_quantizers",
    "loss_slice",
    "presets",
    "quantize_",
    "recommended",
    "reestimate_batchnorm",
    "register_direction",
    "register_quantizer",
    "set_backend",
    "sharpness",
    "travel_lr",
    "unwrap",
    "write_",
]
