"""Measuring: see book.py."""

import torch

import qsam
from tests.wrong_calls.book import wrong


@wrong(TypeError, "sharpness needs a qsam optimizer or a torch.nn.Module, got str.")
def _(closure):
    qsam.sharpness("model", closure)


@wrong(ValueError, "`rho` must be finite and > 0, got 0.")
def _(optimizer, closure):
    qsam.sharpness(optimizer, closure, rho=0, progress=False)


@wrong(TypeError, "`rho` must be a number > 0, got '0.1'.")
def _(optimizer, closure):
    qsam.sharpness(optimizer, closure, rho="0.1", progress=False)


@wrong(ValueError, "`steps` must be an integer >= 1, got 0.")
def _(optimizer, closure):
    qsam.sharpness(optimizer, closure, steps=0, progress=False)


@wrong(TypeError, "`steps` must be an integer >= 1, got 1.0.")
def _(optimizer, closure):
    qsam.sharpness(optimizer, closure, steps=1.0, progress=False)


@wrong(ValueError, "`lr` must be finite and > 0, got -1.0.")
def _(optimizer, closure):
    qsam.sharpness(optimizer, closure, lr=-1.0, progress=False)


@wrong(TypeError, "sharpness needs a function that returns the loss, got 3.")
def _(optimizer):
    qsam.sharpness(optimizer, 3, progress=False)


@wrong(TypeError, "the closure must return the loss, a number or a tensor of one entry, got None.")
def _(optimizer):
    qsam.sharpness(optimizer, lambda: None, progress=False)


@wrong(RuntimeError, "the closure left no gradient in the weights: it must call backward() on the loss.")
def _(optimizer):
    qsam.sharpness(optimizer, lambda: 1.0, progress=False)


@wrong(RuntimeError, "sharpness found no trainable weight: the ones to be perturbed must require gradients.")
def _(optimizer, quantized, closure):
    quantized.requires_grad_(False)
    qsam.sharpness(quantized, closure, progress=False)


@wrong(TypeError, "`loss_fn` must return the loss, a tensor of one entry, got None.")
def _(optimizer):
    qsam.hessian_top_eigenvalue(optimizer, lambda: None, progress=False)


@wrong(RuntimeError, "the loss that `loss_fn` returned does not depend on the weights, or was detached.")
def _(optimizer):
    qsam.hessian_top_eigenvalue(optimizer, lambda: torch.tensor(1.0), progress=False)


@wrong(RuntimeError, "`loss_fn` called backward(), which frees the graph: it must only return the loss.")
def _(optimizer, closure):
    qsam.hessian_top_eigenvalue(optimizer, closure, progress=False)


@wrong(ValueError, "`iterations` must be an integer >= 2, got 1.")
def _(optimizer, closure):
    qsam.hessian_top_eigenvalue(optimizer, closure, iterations=1, progress=False)


@wrong(ValueError, "`tolerance` must be finite and > 0, got 0.")
def _(optimizer, closure):
    qsam.hessian_top_eigenvalue(optimizer, closure, tolerance=0, progress=False)


@wrong(
    ValueError,
    "there is no direction 'gradients', only ['gradient', 'random']: give your own as a mapping. "
    "Did you mean 'gradient'?",
)
def _(optimizer, closure):
    qsam.loss_slice(optimizer, closure, "gradients", progress=False)


@wrong(ValueError, "`points` must be odd, so that the quantized weights are among them, got 4.")
def _(optimizer, closure):
    qsam.loss_slice(optimizer, closure, points=4, progress=False)


@wrong(ValueError, "`points` must be an integer >= 3, got 1.")
def _(optimizer, closure):
    qsam.loss_slice(optimizer, closure, points=1, progress=False)


@wrong(ValueError, "`radius` must be finite and > 0, got inf.")
def _(optimizer, closure):
    qsam.loss_slice(optimizer, closure, radius=float("inf"), progress=False)


@wrong(TypeError, "`directions` must be names, or a mapping from names to tensors, got 3.")
def _(optimizer, closure):
    qsam.loss_slice(optimizer, closure, 3, progress=False)


@wrong(
    ValueError,
    "the direction 'mine' must have one tensor a weight, of shapes [(16, 8), (12, 16), (4, 12)], got [(2,)].",
)
def _(optimizer, closure):
    qsam.loss_slice(optimizer, closure, {"mine": [torch.zeros(2)]}, progress=False)


@wrong(ValueError, "the direction 'mine' has length 0.0: it must be finite and not zero.")
def _(optimizer, quantized, closure):
    qsam.loss_slice(
        optimizer, closure, {"mine": [torch.zeros_like(quantized[i].weight) for i in (0, 2, 4)]}, progress=False
    )
