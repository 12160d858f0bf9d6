"""BatchNorm: see book.py."""

import torch
from torch import nn

import qsam
from tests.wrong_calls.book import wrong


@wrong(TypeError, "`model` must be a torch.nn.Module, got str.")
def _():
    qsam.reestimate_batchnorm("model", [])


@wrong(TypeError, "`batches` must be an iterable of inputs, a DataLoader say, got None.")
def _():
    qsam.reestimate_batchnorm(nn.BatchNorm1d(8), None)


@wrong(ValueError, "the model has no BatchNorm with running statistics: leave reestimate_batchnorm out.")
def _(quantized):
    qsam.reestimate_batchnorm(quantized, [torch.randn(2, 8)])


@wrong(ValueError, "`batches` is empty: reestimate_batchnorm needs at least one batch.")
def _():
    qsam.reestimate_batchnorm(nn.BatchNorm1d(8), [])


@wrong(
    ValueError,
    "every BatchNorm is in eval mode inside a model in training mode, and so frozen: call model.eval() before "
    "reestimate_batchnorm to set them all the same.",
)
def _():
    qsam.reestimate_batchnorm(nn.Sequential(nn.BatchNorm1d(8).eval()), [torch.randn(2, 8)])


@wrong(
    ValueError,
    "the statistics of the BatchNorm the model itself over these batches are not finite, and the old ones are kept: "
    "look for NaN or infinity in the batches and in the layers before it.",
)
def _():
    qsam.reestimate_batchnorm(nn.BatchNorm1d(8), [torch.full((2, 8), float("inf"))])


@wrong(RuntimeError, "reestimate_batchnorm() inside the block first_pass(): leave the block first.")
def _(optimizer, quantized):
    optimizer.step(lambda: qsam.reestimate_batchnorm(quantized, []))
