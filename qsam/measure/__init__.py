"""Flatness of the loss around the weights that a model is deployed with, and the bits that each weight needs."""

from qsam.measure.bit_allocation import AllocatedWeight, BitAllocation, bit_allocation
from qsam.measure.flatness import LossSlice, Sharpness, loss_slice, sharpness
from qsam.measure.hessian import TopEigenvalue, hessian_top_eigenvalue

__all__ = [
    "AllocatedWeight",
    "BitAllocation",
    "LossSlice",
    "Sharpness",
    "TopEigenvalue",
    "bit_allocation",
    "hessian_top_eigenvalue",
    "loss_slice",
    "sharpness",
]
