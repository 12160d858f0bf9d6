"""Flatness of the loss around the weights that a model is deployed with: sharpness, curvature, slices."""

from qsam.measure.flatness import LossSlice, Sharpness, loss_slice, sharpness
from qsam.measure.hessian import TopEigenvalue, hessian_top_eigenvalue

__all__ = ["LossSlice", "Sharpness", "TopEigenvalue", "hessian_top_eigenvalue", "loss_slice", "sharpness"]
