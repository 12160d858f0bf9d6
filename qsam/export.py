"""The integers and scales of a quantized model, from which export formats are made.

    p = codes * scale                        each weight, exactly as the model holds it
    p = (codes + offset) * scale + shift     on a grid that is not symmetric, if the caller asks for those
    Q(x) = scale * clip(round(x / scale), quant_min, quant_max)      each quantized input

A format is a function of :class:`Export` and of the model's float parameters only.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from qsam.coverage import Coverage, Input, Weight, require_coverage
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
        offset: Added to the codes: 1/2 on a grid without a level at zero; 0 on a symmetric one.
        shift: fp32, of the shape of ``scale``: added to the product. None on a symmetric grid.
    """

    name: str
    codes: Tensor
    scale: Tensor
    axis: Axis | None
    group_size: int | None
    bits: int
    signed: bool
    dtype: torch.dtype
    offset: float = 0.0
    shift: Tensor | None = None

    def dequantized(self) -> Tensor:
        """Return ``(codes + offset) * scale + shift`` in the dtype of the Parameter, whose value it is."""
        wide = wide_dtype(self.dtype)
        levels = self.codes.to(wide) + self.offset
        grouped = self.group_size is not None and self.axis is not None
        if grouped:
            levels = to_groups(levels, self.axis, self.group_size)  # type: ignore[arg-type]
        levels = levels * self.scale.to(wide)
        levels = levels if self.shift is None else levels + self.shift.to(wide)
        return (from_groups(levels, self.codes.shape, self.axis) if grouped else levels).to(self.dtype)  # type: ignore[arg-type]


@dataclasses.dataclass(frozen=True, eq=False)
class QuantizedInput:
    """The grid of the first input of one layer (of query, key and value of a MultiheadAttention).

    Attributes:
        name: Path of the layer.
        scale: fp32, positive, of shape ``(1,)``.
        zero_point: The integer that represents 0; None if it is 0.
        bits: Width of the integers.
        signed: Whether they may be negative.
        quant_min: The lowest integer of the grid; some signed grids end at ``-quant_max``.
        quant_max: The highest.
    """

    name: str
    scale: Tensor
    zero_point: Tensor | None
    bits: int
    signed: bool
    quant_min: int
    quant_max: int


@dataclasses.dataclass(frozen=True, eq=False)
class Export:
    """All quantized weights and inputs of a model; the others stay float."""

    weights: tuple[QuantizedWeight, ...]
    inputs: tuple[QuantizedInput, ...]


@torch.no_grad()
def export(model: nn.Module, *, affine: bool = False) -> Export:
    """Return integers and scales of a quantized model, from which ``codes * scale`` gives its weights bit for bit.

    Args:
        model: A quantized model whose weights hold Q(w): after any step of an optimizer, or after
            :func:`qsam.write_`. The optimizer need not exist any more.
        affine: Whether to return weights of other grids as they are (``stretched``, ``liq``, ``qbert``). Their
            ``offset`` and ``shift`` are then part of the record, and the caller has to use them. Otherwise levels
            half-way between integers (``stretched``) are returned as odd integers of one more bit, with half the scale.

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
    inputs = [row for row in coverage.inputs if not isinstance(row.quantizer, Identity | None)]
    return Export(tuple(weights_of(model, coverage, affine=affine)), tuple(map(_input, inputs)))


@torch.no_grad()
def weights_of(model: nn.Module, coverage: Coverage, *, affine: bool = False) -> list[QuantizedWeight]:
    """Return the records of the weights alone; see :func:`export`."""
    if is_sharded(model.modules()):
        raise RuntimeError(
            "the model is sharded: gather its state_dict, load it into an unsharded copy and call export on that."
        )
    rows = [row for row in coverage.quantized if not isinstance(row.quantizer, Identity)]
    return [_checked(row, record_of(row), affine) for row in rows]


@torch.no_grad()
def record_of(row: Weight, codes: Tensor | None = None) -> QuantizedWeight:
    """Return the record of one weight: of the integers that it holds, or of given ones on its quantizer's grid.

    Raises:
        TypeError: its quantizer has no integers, or no ``scale``.
    """
    quantizer, p, where = row.quantizer, row.parameter.detach(), repr(row.name)
    assert quantizer is not None
    shift = quantizer.shift
    return QuantizedWeight(
        name=row.name,
        codes=_codes(quantizer, p, where) if codes is None else codes,
        scale=_scale(quantizer, where),
        axis=None if quantizer.granularity == "per_tensor" else quantizer.axis,
        group_size=quantizer.group_size,
        bits=quantizer.bits,
        signed=quantizer.quant_min < 0,
        dtype=p.dtype,
        offset=quantizer.offset,
        shift=None if shift is None else shift.detach().to(torch.float32, copy=True),
    )


def _checked(row: Weight, record: QuantizedWeight, affine: bool) -> QuantizedWeight:
    """Return the record, if it is the weight."""
    quantizer, p = row.quantizer, row.parameter.detach()
    assert quantizer is not None
    if not affine and record.offset and record.shift is None and record.bits < 8:
        record = _of_whole_levels(record)
    is_symmetric = record.offset == 0 and record.shift is None and record.signed
    if torch.equal(record.dequantized(), p) and (affine or is_symmetric):
        return record
    if torch.equal(quantizer(p), p):
        raise TypeError(
            f"{row.name!r}: {_name(quantizer)} is not codes * scale, which is all that this can hold. Export a model "
            "that was quantized with 'lsq'; qsam.deploy.save also holds 'qbert', and 'stretched' and 'liq' of 8 bits."
        )
    raise RuntimeError(
        f"{row.name!r} does not hold its quantized values: call qsam.write_(model), or if it has an optimizer, leave "
        "the optimizer's blocks, or after a write of your own call optimizer.sync_latents(), before export."
    )


def _of_whole_levels(record: QuantizedWeight) -> QuantizedWeight:
    """Return the same levels as integers: those half-way between integers are odd multiples of half a step."""
    codes, scale = (2 * record.codes + 1).to(torch.int8), record.scale / 2
    return dataclasses.replace(record, codes=codes, scale=scale, bits=record.bits + 1, offset=0.0)


def _input(row: Input) -> QuantizedInput:
    quantizer, where = row.quantizer, input_of(row.name)
    assert quantizer is not None
    if not quantizer.calibrated or quantizer.signed is None:
        raise RuntimeError(
            f"{where} has no scale yet: call qsam.calibrate(model, batches), or keep it float with activations=None in "
            "`rules`."
        )
    if quantizer.dynamic or quantizer.offset or quantizer.shift is not None:
        found = "follows each batch" if quantizer.dynamic else "has levels between or beside the multiples of its scale"
        raise TypeError(
            f"{where}: {_name(quantizer)} {found}, which export cannot say: quantize inputs with activations='lsq'."
        )
    step = quantizer.step_size(quantizer.limits[:1])  # of an average that began before the first batch, not `scale`
    scale = _scale(quantizer, where) if step is None else step.to(torch.float32, copy=True)
    zero_point, limits = getattr(quantizer, "zero_point", None), (quantizer.quant_min, quantizer.quant_max)
    return QuantizedInput(row.name, scale, zero_point, quantizer.bits, quantizer.signed, *limits)


def _codes(quantizer: Quantizer, p: Tensor, where: str) -> Tensor:
    try:
        return quantizer.codes(p).to(torch.int8 if quantizer.quant_min < 0 else torch.uint8)
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
