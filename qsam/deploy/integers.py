"""The integers of a model with the layers that they belong to, and scales that a 16-bit file can hold."""

from __future__ import annotations

import dataclasses
import warnings

import torch
from torch import Tensor, nn

from qsam.coverage import Weight, owner_of, released_latents, require_coverage
from qsam.export import QuantizedInput, QuantizedWeight, export, record_of, weights_of
from qsam.functional import SCALE_FLOOR
from qsam.layers import find_sites, is_hf_conv1d, path_of, unwrap_model
from qsam.quantizers import Quantizer


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Layer(QuantizedWeight):
    """One weight as integers, ``p = codes * scale``, and the layer that uses it.

    Attributes:
        module: The layer.
        attr: The weight's name in it.
        input: The grid of the layer's input, or None where that stays float.
        shares: The name of the weight whose Parameter this is too; empty where it is its own.
    """

    module: nn.Module
    attr: str
    input: QuantizedInput | None = None
    shares: str = ""

    @property
    def path(self) -> str:
        """Path of the layer: "encoder.layer.0.query"."""
        return self.name.rpartition(".")[0]

    @property
    def is_linear(self) -> bool:
        """Whether this is the matrix of a Linear; not of a subclass, which may use its weight without being called."""
        return type(self.module) is nn.Linear and self.attr == "weight"

    def matrix(self) -> tuple[Tensor, Tensor]:
        """Return codes of shape ``(out, in)`` and scales of shape ``(out, groups)`` of a Linear or Conv1D, on the CPU.

        Raises:
            ValueError: a scale belongs to something else than an output, or a run of one output's entries.
        """
        out = 1 if is_hf_conv1d(self.module) else 0
        if self.axis not in (None, out):
            raise ValueError(
                f"{self.name!r} has its scales along axis {self.axis}, and files have one per output or per group of "
                f"one output's entries: quantize it without `axis`, or use deploy.save."
            )
        codes = (self.codes.t() if out else self.codes).cpu().contiguous()
        scale = self.scale.cpu().reshape(1 if self.axis is None else len(codes), -1).expand(len(codes), -1)
        return codes, scale.masked_fill(_is_empty(scale), 0)

    def floats(self) -> Tensor:
        """Return ``codes * scale`` of :meth:`matrix`, ``(out, in)``, in fp32."""
        codes, scale = self.matrix()
        return codes * scale.repeat_interleave(codes.shape[1] // scale.shape[1], 1)


def _is_empty(scale: Tensor) -> Tensor:
    """Return where no scale could be set, because all weights that share it are zero."""
    return scale <= SCALE_FLOOR


def integers(model: nn.Module) -> list[Layer]:
    """Return the integers, the scale and the layer of every quantized weight: ``p == codes * scale`` bit for bit.

    A tied weight comes once for each layer that uses it, because each has an input of its own.

    Args:
        model: A quantized model whose weights hold Q(w); its optimizer may live or be gone.

    Raises:
        RuntimeError: the model is not quantized, is sharded, or a weight does not hold its quantized values, as
            inside an optimizer's blocks.
        TypeError: a quantizer that has no symmetric grid of integers.

    Example:
        >>> import qsam
        >>> model = nn.Linear(2, 1, bias=False)
        >>> with torch.no_grad():
        ...     _ = model.weight.copy_(torch.tensor([[-7.0, 3.6]]))
        >>> _ = qsam.quantize_(model, activations=None, init="absmax"), qsam.write_(model)
        >>> (layer,) = integers(model)
        >>> layer.module is model, layer.attr, layer.codes.tolist(), layer.scale.tolist(), layer.input
        (True, 'weight', [[-7, 4]], [1.0], None)
    """
    root = unwrap_model(model)
    exported = export(root)
    inputs = {found.name: found for found in exported.inputs}
    owners = {site.name: list(site.owners()) for site in find_sites(root)}
    layers = []
    for weight in exported.weights:
        for path, module, attr in owners[weight.name]:
            name = path_of(path, attr)
            own = {"name": name, "module": module, "attr": attr, "input": inputs.get(path)}
            layers.append(Layer(**{**vars(weight), **own}, shares=weight.name if name != weight.name else ""))
    return layers


def warn_of_inputs(layers: list[Layer], where: str) -> None:
    """Tell of inputs that a format for weights only leaves out."""
    if rounded := [layer.path for layer in layers if layer.input is not None]:
        warnings.warn(
            f"{where} holds weights only: the inputs of {len(rounded)} layers ({rounded[0]!r}, ...), which were "
            "quantized in training, run as its runtime likes. Train with activations=None for it.",
            UserWarning,
            stacklevel=4,
        )


SUBNORMAL = {torch.float16: 2.0**-14, torch.bfloat16: 2.0**-126}
"""The smallest scale that a 16-bit dtype holds with all its bits."""


@torch.no_grad()
def round_scales_(model: nn.Module, dtype: torch.dtype) -> None:
    """Round every weight's scale to a 16-bit dtype and write ``p <- codes * half(s)``: the codes stay.

    Files whose scales are fp16 (GGUF) or of the model's dtype (a checkpoint in fp16 or bf16) then hold the model
    exactly. Evaluate after it, or train on with ``scale_lr=0``. The full-precision weights of an optimizer move
    with their grid, ``w <- w * half(s) / s``. Scales of inputs stay.

    Args:
        model: A quantized model whose weights hold Q(w), outside an optimizer's blocks.
        dtype: ``torch.float16`` or ``torch.bfloat16``.

    Raises:
        TypeError: another dtype, or a quantizer whose ``scale`` cannot be written.
        ValueError: a scale that is 0 or infinite in ``dtype``; nothing has been written then.
        RuntimeError: as :func:`integers`, or inside an optimizer's block.
    """
    if dtype not in SUBNORMAL:
        raise TypeError(f"`dtype` must be torch.float16 or torch.bfloat16, got {dtype!r}.")
    root = unwrap_model(model)
    coverage = require_coverage(root, "round_scales_")
    owner = owner_of(coverage)
    if owner is not None:
        owner._refuse_inside_block("round_scales_")
    rows = {row.name: row for row in coverage.quantized}
    records = [record_of(rows[record.name]) for record in weights_of(root, coverage)]  # on their quantizers' own grids
    halves = [_rounded(rows[record.name].quantizer, record, dtype) for record in records]
    latents = (
        {slot.path: slot.latent for slot in owner._latents.slots} if owner is not None else released_latents(coverage)
    )
    for record, half in zip(records, halves, strict=True):
        _move_grid_(rows[record.name], record, half, latents.get(record.name))
    if owner is not None:
        owner._latents.guard.accept_current_weights()
        owner._latents.write()
    _warn_subnormal(records, halves, dtype)


def _rounded(quantizer: Quantizer | None, record: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """Return half(s) in fp32."""
    assert quantizer is not None
    if "scale" not in {**quantizer._parameters, **quantizer._buffers}:
        raise TypeError(
            f"{record.name!r}: the scale of {type(quantizer).__name__} follows from something else and cannot be "
            "rounded: use a quantizer whose `scale` is a Parameter or a buffer, like 'lsq'."
        )
    half = torch.where(_is_empty(record.scale), record.scale, record.scale.to(dtype).float())
    if not bool((half.isfinite() & (half > 0)).all()):
        raise ValueError(
            f"{record.name!r} has scales from {float(record.scale.min()):.3g} to {float(record.scale.max()):.3g}, "
            f"which {dtype} rounds to 0 or infinity: use torch.bfloat16, or a format with fp32 scales."
        )
    return half


def _move_grid_(row: Weight, record: QuantizedWeight, half: Tensor, latent: Tensor | None) -> None:
    """Write half(s) into the quantizer and ``codes * half(s)`` into p; give w the place in its cell that it had."""
    quantizer, p = row.quantizer, row.parameter
    assert quantizer is not None
    if latent is not None:
        ratio = dataclasses.replace(
            record, codes=torch.ones_like(record.codes), scale=half / record.scale, dtype=latent.dtype, offset=0.0
        )
        latent.mul_(ratio.dequantized())
    scale: Tensor = quantizer.scale  # type: ignore[assignment]
    scale.copy_(torch.where(_is_empty(half), scale, half.view_as(scale)))
    written = record_of(row, record.codes)
    p.copy_(written.dequantized())
    if latent is not None:  # a w at the edge of its cell may have been rounded across it
        centre = dataclasses.replace(written, dtype=latent.dtype).dequantized()
        latent.copy_(torch.where(quantizer.codes(latent) == written.codes, latent, centre))


def _warn_subnormal(records: list[QuantizedWeight], halves: list[Tensor], dtype: torch.dtype) -> None:
    small = [
        r.name for r, half in zip(records, halves, strict=True) if ((half < SUBNORMAL[dtype]) & ~_is_empty(half)).any()
    ]
    if small:
        warnings.warn(
            f"{small[0]!r}{f' and {len(small) - 1} more' if len(small) > 1 else ''} has scales below "
            f"{SUBNORMAL[dtype]:.3g}, which {dtype} holds with fewer bits: use fewer bits for this weight, or a format "
            "with fp32 scales.",
            UserWarning,
            stacklevel=3,
        )
