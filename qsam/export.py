"""The integers and scales of a quantized model, from which export formats are made.

    p = codes * scale                        each weight, exactly as the model holds it
    Q(x) = scale * clip(round(x / scale), quant_min, quant_max)      each quantized input

A format is a function of :class:`Export` and of the model's float parameters only.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from qsam.coverage import Input, Weight, require_coverage
from qsam.functional import Axis, from_groups, positive, to_groups, wide_dtype
from qsam.inputs import is_sharded
from qsam.plan import input_of, quantizer_name
from qsam.quantizers import Identity, Quantizer


@dataclasses.dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """The integers of one weight.

    Attributes:
        name: Path of the Parameter, "encoder.layer.0.query.weight"; a tied weight has the first of its names.
        codes: int8 (uint8 if unsigned), of the Parameter's shape.
        scale: fp32, positive: of shape ``(1,)`` per tensor; per channel the length of the weight along ``axis`` and
            1 elsewhere; ``(channels, groups, 1)`` per group.
        axis: The channel dimension, or several; None with one scale per tensor.
        group_size: Consecutive entries of the flattened other dimensions that share a scale, or None.
        bits: Width of the integers.
        signed: Whether they may be negative.
        dtype: The Parameter's dtype.
    """

    name: str
    codes: Tensor
    scale: Tensor
    axis: Axis | None
    group_size: int | None
    bits: int
    signed: bool
    dtype: torch.dtype

    def dequantized(self) -> Tensor:
        """Return ``codes * scale`` in the dtype of the Parameter, whose value it is."""
        wide = wide_dtype(self.dtype)
        if self.group_size is None or self.axis is None:
            return (self.codes.to(wide) * self.scale.to(wide)).to(self.dtype)
        groups = to_groups(self.codes.to(wide), self.axis, self.group_size) * self.scale.to(wide)
        return from_groups(groups, self.codes.shape, self.axis).to(self.dtype)


@dataclasses.dataclass(frozen=True, eq=False)
class QuantizedInput:
    """The grid of the first input of one layer (of query, key and value of a MultiheadAttention).

    Attributes:
        name: Path of the layer.
        scale: fp32, positive, of shape ``(1,)``.
        zero_point: The integer that represents 0; None if it is 0.
        bits: Width of the integers.
        signed: Whether they may be negative.
    """

    name: str
    scale: Tensor
    zero_point: Tensor | None
    bits: int
    signed: bool


@dataclasses.dataclass(frozen=True, eq=False)
class Export:
    """All quantized weights and inputs of a model; the others stay float."""

    weights: tuple[QuantizedWeight, ...]
    inputs: tuple[QuantizedInput, ...]


@torch.no_grad()
def export(model: nn.Module) -> Export:
    """Return integers and scales of a quantized model, from which ``codes * scale`` gives its weights bit for bit.

    Args:
        model: A quantized model whose weights hold Q(w): after any step of an optimizer, or after
            :func:`qsam.write_`. The optimizer need not exist any more.

    Returns:
        Copies, on the devices of the model. Weights and inputs with the quantizer ``"identity"`` are float and are
        omitted.

    Raises:
        RuntimeError: The model is not quantized, its weights are not written, an input has no scale yet, or it is
            sharded.
        TypeError: A quantizer has no integers, or more than integers and scales.

    Example:
        >>> import qsam
        >>> model = nn.Linear(2, 1, bias=False)
        >>> with torch.no_grad():
        ...     _ = model.weight.copy_(torch.tensor([[-7.0, 3.6]]))
        >>> _ = qsam.quantize_(model, activations=None, init="absmax"), qsam.write_(model)
        >>> (weight,) = qsam.export(model).weights
        >>> weight.codes.tolist(), weight.scale.tolist(), weight.dequantized().tolist()
        ([[-7, 4]], [1.0], [[-7.0, 4.0]])
    """
    coverage = require_coverage(model, "export")
    if is_sharded(model.modules()):
        raise RuntimeError(
            "the model is sharded: gather its state_dict, load it into an unsharded copy and call export on that."
        )
    weights = [row for row in coverage.quantized if not isinstance(row.quantizer, Identity)]
    inputs = [row for row in coverage.inputs if not isinstance(row.quantizer, Identity | None)]
    return Export(tuple(map(_weight, weights)), tuple(map(_input, inputs)))


def _weight(row: Weight) -> QuantizedWeight:
    quantizer, p = row.quantizer, row.parameter.detach()
    assert quantizer is not None
    codes, scale = _codes(quantizer, p, repr(row.name)), _scale(quantizer, repr(row.name))
    record = QuantizedWeight(
        name=row.name,
        codes=codes,
        scale=scale,
        axis=None if quantizer.granularity == "per_tensor" else quantizer.axis,
        group_size=quantizer.group_size,
        bits=quantizer.bits,
        signed=bool(quantizer.signed),
        dtype=p.dtype,
    )
    if torch.equal(record.dequantized(), p):
        return record
    if torch.equal(quantizer(p), p):
        raise TypeError(f"{row.name!r}: {_name(quantizer)} is not codes * scale, and export knows no other form.")
    raise RuntimeError(
        f"{row.name!r} does not hold its quantized values: call qsam.write_(model), or if it has an optimizer, leave "
        "the optimizer's blocks, or after a write of your own call optimizer.sync_latents(), before export."
    )


def _input(row: Input) -> QuantizedInput:
    quantizer = row.quantizer
    assert quantizer is not None
    if not quantizer.calibrated or quantizer.signed is None:
        raise RuntimeError(
            f"{input_of(row.name)} has no scale yet: call qsam.calibrate(model, batches), or keep it float with "
            "activations=None in `rules`."
        )
    scale, zero_point = _scale(quantizer, input_of(row.name)), getattr(quantizer, "zero_point", None)
    return QuantizedInput(row.name, scale, zero_point, quantizer.bits, quantizer.signed)


def _codes(quantizer: Quantizer, p: Tensor, where: str) -> Tensor:
    try:
        return quantizer.codes(p).to(torch.int8 if quantizer.signed else torch.uint8)
    except TypeError as error:
        raise TypeError(f"{where}: {error} Export a model that was quantized with 'lsq' otherwise.") from error


def _scale(quantizer: Quantizer, where: str) -> Tensor:
    scale = getattr(quantizer, "scale", None)
    if not isinstance(scale, Tensor):
        raise TypeError(
            f"{where}: {_name(quantizer)} has no `scale` to export: name its step size so, or export a model that "
            "was quantized with 'lsq'."
        )
    return positive(scale.detach()).to(torch.float32, copy=True)


def _name(quantizer: Quantizer) -> str:
    return f"the quantizer {quantizer_name(quantizer)!r}"
