"""Quantizing: see book.py."""

import torch
from torch import nn

import qsam
from tests.wrong_calls.book import wrong


@wrong(TypeError, "`model` must be a torch.nn.Module, got list.")
def _(model):
    qsam.quantize_([nn.Linear(2, 2)])


@wrong(ValueError, "`bits` must be an integer in [2, 8], got 1. To keep a tensor in float, give None.")
def _(model):
    qsam.quantize_(model, bits=1)


@wrong(ValueError, "`bits` must be an integer in [2, 8], got 9. To keep a tensor in float, give None.")
def _(model):
    qsam.quantize_(model, bits=9)


@wrong(TypeError, "`bits` must be an integer in [2, 8], got 4.0 of type float.")
def _(model):
    qsam.quantize_(model, bits=4.0)


@wrong(TypeError, "`bits` must be an integer in [2, 8], got True of type bool.")
def _(model):
    qsam.quantize_(model, bits=True)


@wrong(ValueError, "`activation_bits` must be an integer in [2, 8], got 16. To keep a tensor in float, give None.")
def _(model):
    qsam.quantize_(model, activation_bits=16)


@wrong(TypeError, "`activation_bits` must be an integer in [2, 8], got '8' of type str.")
def _(model):
    qsam.quantize_(model, activation_bits="8")


@wrong(ValueError, "'0.weight': There is no quantizer 'lsk'. Did you mean 'lsq'?")
def _(model):
    qsam.quantize_(model, weights="lsk")


@wrong(TypeError, "'0.weight': a quantizer is a registered name or None, got 4.")
def _(model):
    qsam.quantize_(model, weights=4)


@wrong(
    ValueError,
    "the input of '0': There is no quantizer 'none'. Registered: diffq, fixed_step, identity, lsq, "
    "per_channel, stochastic. Inputs are quantized per tensor: name another in `activations`.",
)
def _(model):
    qsam.quantize_(model, activations="none")


@wrong(TypeError, "the input of '0': a quantizer is a registered name or None, got False.")
def _(model):
    qsam.quantize_(model, activations=False)


@wrong(
    ValueError,
    "the input of '0': granularity 'per_channel' needs `axis`, the channel dimension; activations "
    "are per_tensor. Inputs are quantized per tensor: name another in `activations`.",
)
def _(model):
    qsam.quantize_(model, activations="per_channel")


@wrong(ValueError, "'0.weight': `granularity` must be one of per_tensor, per_channel, per_group, got 'channel'.")
def _(model):
    qsam.quantize_(model, granularity="channel")


@wrong(ValueError, "'0.weight': `granularity` must be one of per_tensor, per_channel, per_group, got None.")
def _(model):
    qsam.quantize_(model, granularity=None)


@wrong(
    ValueError,
    "'0.weight': `group_size` belongs to granularity 'per_group' and to no other: got 4 with 'per_tensor'.",
)
def _(model):
    qsam.quantize_(model, group_size=4)


@wrong(
    ValueError,
    "'0.weight': granularity 'per_group' needs `group_size`, the entries that share a scale: give an integer >= 1.",
)
def _(model):
    qsam.quantize_(model, granularity="per_group")


@wrong(ValueError, "'0.weight': `group_size` must be an integer >= 1, got 0.")
def _(model):
    qsam.quantize_(model, granularity="per_group", group_size=0)


@wrong(
    ValueError,
    "'0.weight': `group_size` must divide the 8 entries of each channel of a tensor of shape (16, "
    "8) (channel axis 0), got 5.",
)
def _(model):
    qsam.quantize_(model, granularity="per_group", group_size=5)


@wrong(ValueError, "`init` must be one of mse, lsq, absmax, percentile, got 'max'. Did you mean 'absmax'?")
def _(model):
    qsam.quantize_(model, init="max")


@wrong(ValueError, "nothing was quantized: no layer that qsam knows, or every one is kept float. Name some in `rules`.")
def _(model):
    qsam.quantize_(model, weights=None, activations=None)


@wrong(ValueError, "nothing was quantized: no layer that qsam knows, or every one is kept float. Name some in `rules`.")
def _():
    qsam.quantize_(nn.Sequential(nn.ReLU()))


@wrong(ValueError, "'0.weight' is not initialized yet: run one forward of the lazy module before quantize_.")
def _():
    qsam.quantize_(nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 2)))


@wrong(ValueError, "'weight' is on the meta device: materialize the model before quantize_.")
def _():
    qsam.quantize_(nn.Linear(4, 2, device="meta"))


@wrong(ValueError, "'0.weight': the scale cannot be set from data that holds NaN or infinity.")
def _(model):
    model[0].weight.data[0, 0] = float("nan")
    qsam.quantize_(model)


@wrong(RuntimeError, "the model is quantized already: call qsam.dequantize_(model, optimizer) first.")
def _(quantized):
    qsam.quantize_(quantized)


@wrong(
    RuntimeError,
    "2 parts of the model were quantized apart: call qsam.dequantize_ on each of them, then "
    "qsam.quantize_ on the whole model.",
)
def _(model):
    qsam.quantize_(model[0])
    qsam.quantize_(model[2])
    qsam.write_(model)


@wrong(
    RuntimeError,
    "'weight' is quantized already, as a part of a larger model, or of one that it was taken out of (as peft's "
    "merge_and_unload does): call this on that model, or take the quantizers off this part with qsam.dequantize_(model) "
    "and quantize it again.",
)
def _(quantized):
    qsam.quantize_(quantized[0])


@wrong(RuntimeError, "write_ needs a quantized model: call qsam.quantize_(model) first.")
def _(model):
    qsam.write_(model)


@wrong(TypeError, "`model` must be a torch.nn.Module, got list.")
def _(model):
    qsam.write_([model])


@wrong(
    RuntimeError,
    "an optimizer owns the weights of this model and writes them itself: write_ is for a model without one.",
)
def _(optimizer, quantized):
    qsam.write_(quantized)


@wrong(RuntimeError, "calibrate needs a quantized model: call qsam.quantize_(model) first.")
def _(model):
    qsam.calibrate(model, [])


@wrong(ValueError, "`batches` is empty: calibrate needs at least one batch.")
def _(quantized):
    qsam.calibrate(quantized, [])


@wrong(TypeError, "`batches` must be an iterable of inputs, a DataLoader say, got 3.")
def _(quantized):
    qsam.calibrate(quantized, 3)


@wrong(ValueError, "the input of '0' holds NaN or infinity: its scale cannot be set from it.")
def _(quantized):
    qsam.calibrate(quantized, [torch.full((2, 8), float("inf"))])


@wrong(RuntimeError, "dequantize_ needs a quantized model: call qsam.quantize_(model) first.")
def _(model):
    qsam.dequantize_(model)


@wrong(RuntimeError, "this optimizer does not own the model's weights: give the one that was built on it.")
def _(quantized, qat):
    qsam.dequantize_(quantized, qat)


@wrong(RuntimeError, "this optimizer does not own the model's weights: give the one that was built on it.")
def _(quantized):
    qsam.dequantize_(quantized, "adam")
