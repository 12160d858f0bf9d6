"""ONNX files that hold the integers of a quantized model, as ONNX Runtime and OpenVINO compute with them.

    y = (s_x * Q(x)) @ (s_w * W) + b        Q(x), W integers; s_x, s_w the learned scales

A copy of the model gets layers that speak ONNX, and torch.onnx.export writes it:

* an input is QuantizeLinear and DequantizeLinear, in uint8 always: a signed one has the zero point 128;
* ``weights="int8"``: a weight is DequantizeLinear of its integers. 7 bits and fewer are int8; 8 bits are uint8 with the
  zero point 128, because processors without VNNI add two products in 16 bits, where 2 * 255 * 127 does not fit;
* ``weights="nbits"``: the matrix of a Linear or Conv1D is the operator ``com.microsoft::MatMulNBits``, 2, 4 or 8 bits
  packed (3 are stored as 4, 5 to 7 as 8), and everything else as above. A layer with a float input is stored so too;
* an embedding is ``codes[ids] * scale[ids]``.
"""

from __future__ import annotations

import copy
import hashlib
import importlib
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.onnx.ops import symbolic

from qsam.attach import dequantize_
from qsam.batches import in_eval_mode
from qsam.coverage import require_coverage
from qsam.export import QuantizedInput, QuantizedWeight, export
from qsam.inputs import Place, attach_input_
from qsam.layers import find_sites, is_hf_conv1d, never_called, path_of, unwrap_model
from qsam.plan import input_of, quantizer_name
from qsam.quantizers import Quantizer

FORMS = ("int8", "nbits")
BLOCKS = (128, 64, 32, 16)
"""Columns of a matrix that share a scale in MatMulNBits, where the model does not decide it: the largest that fits."""

Use = tuple[QuantizedWeight, str, str]
"""A weight, the path of a layer that uses it, and its name there."""


def require(name: str) -> Any:
    """Return an optional package.

    Raises:
        ImportError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"this needs {name}, which is not installed: pip install 'qsam[deploy]'") from error


@torch.no_grad()
def export_onnx(
    model: nn.Module,
    example_inputs: Any,
    path: str | os.PathLike[str],
    weights: str = "int8",
    *,
    dynamic_shapes: Any = None,
    accuracy_level: int = 0,
    block_size: int | None = None,
    opset: int = 21,
) -> Path:
    """Write the model as ONNX, with its integers and scales as they are; prove that the file holds them.

    Args:
        model: A quantized fp32 model whose weights hold Q(w), with calibrated inputs. It is not changed.
        example_inputs: One batch of at least two samples: a dict is given to the model as keywords, a tuple or list as
            arguments, anything else as the only argument.
        path: The file. A model above 2 GB has its tensors beside it, in ``<path>.data``.
        weights: ``"int8"``, the fast form for processors, or ``"nbits"``, the small one, and the one for "per_group".
        dynamic_shapes: As torch.onnx.export takes them. Default: the batch, dimension 0 of every tensor, and the
            length, dimension 1 of tensors of integers or bools; ``{}`` fixes all sizes to those of the example.
        accuracy_level: Of MatMulNBits: 0 computes with the inputs as they are; 4 is faster, and rounds them to 8 bits
            once more, in blocks.
        block_size: Columns of a matrix that share a scale in MatMulNBits, where the model has one scale per tensor or
            channel: 16, 32, 64, 128 or 256; a divisor of the matrix's columns. Default: the largest of 16 to 128.
        opset: At least 21.

    Returns:
        The path.

    Raises:
        ImportError: onnx or onnxscript is missing.
        ValueError: an argument, or a layer whose integers have no exact form here; the message names it and a cure.
        TypeError: a quantizer without integers.
        RuntimeError: as :func:`qsam.export`; or the model did not use a layer's integers.
    """
    require("onnx"), require("onnxscript")
    _check_arguments(weights, block_size, opset)
    root, path = unwrap_model(model), Path(path)
    coverage, exported = require_coverage(root, "export_onnx"), export(root)
    grids = {row.name: row.quantizer for row in coverage.inputs if row.quantizer is not None}
    for given in exported.inputs:
        _refuse_other_grid(given, grids[given.name])
    uses = list(_uses(root, exported.weights))
    twin = copy.deepcopy(root).cpu()
    dequantize_(twin)
    if getattr(getattr(twin, "config", None), "use_cache", False):
        twin.config.use_cache = False  # type: ignore[union-attr]
    by_grid: dict[int, _Input] = {}
    for given in exported.inputs:
        grid = by_grid.setdefault(id(grids[given.name]), _Input(given))
        attach_input_(twin.get_submodule(given.name), grid, Place(given.name, set()))
    off = never_called(twin)
    held = {}
    for record, layer, attr in uses:
        module = twin.get_submodule(layer)
        called = id(module) not in off and attr == "weight"
        # ONNX Runtime would make MatMulNBits of a float input and DequantizeLinear by itself, of the level 4
        form = weights if layer in grids else "nbits"
        held[path_of(layer, attr)] = _lower_(module, attr, record, called, form, accuracy_level, block_size)
    args, kwargs = _arguments(_on_cpu(example_inputs))
    if dynamic_shapes is None:
        dynamic_shapes = _dynamic(kwargs) if kwargs else tuple(_dynamic(list(args)))
    names = _output_names(twin, args, kwargs)
    program = _traced(twin.eval(), args, kwargs, names, dynamic_shapes or None, opset)
    _refuse_lost(program, held)
    _save(program, path)
    return path


# --- what cannot be exported --------------------------------------------------------------------------------------


def _check_arguments(weights: str, block_size: int | None, opset: int) -> None:
    if weights not in FORMS:
        raise ValueError(f"`weights` must be one of {', '.join(FORMS)}, got {weights!r}.")
    if block_size is not None and block_size not in (*BLOCKS, 256):
        raise ValueError(f"`block_size` must be 16, 32, 64, 128 or 256, got {block_size!r}.")
    if opset < 21:
        raise ValueError(f"`opset` must be at least 21: before, ONNX Runtime computes in float; got {opset!r}.")


def _uses(root: nn.Module, records: Sequence[QuantizedWeight]) -> Iterator[Use]:
    """Yield every weight with each layer that uses it: a tied one has several."""
    by_name = {record.name: record for record in records}
    for site in find_sites(root):
        if record := by_name.get(site.name):
            _refuse_form(record)
            for layer, module, attr in site.owners():
                if isinstance(module, nn.RNNBase):
                    raise ValueError(f"{path_of(layer, attr)!r}: ONNX's {type(module).__name__} takes float weights "
                                     f"only: keep it float, with the rule ({layer!r}, None).")  # fmt: skip
                if isinstance(module, nn.EmbeddingBag):
                    raise ValueError(f"{path_of(layer, attr)!r}: an EmbeddingBag has no form in ONNX that keeps its "
                                     f"integers: keep it float, with the rule ({layer!r}, None).")  # fmt: skip
                yield record, layer, attr


def _refuse_form(record: QuantizedWeight) -> None:
    if record.dtype != torch.float32:
        raise ValueError(
            f"{record.name!r} is {record.dtype}: export_onnx takes fp32. Export copy.deepcopy(model).float() after "
            "qsam.write_ on that copy."
        )
    if isinstance(record.axis, tuple):
        raise ValueError(
            f"{record.name!r} has scales along the axes {record.axis}, and ONNX knows one: quantize it with one `axis`."
        )


def _refuse_other_grid(record: QuantizedInput, quantizer: Quantizer) -> None:
    """Refuse an input whose Q is more than ``s * clip(round(x / s))``, by comparing the two at and between levels."""
    low, high, scale = quantizer.quant_min, quantizer.quant_max, record.scale.float()
    x = torch.arange(4 * low - 8, 4 * high + 8, device=scale.device) / 4 * scale
    expected = (x / scale).clamp(low, high).round() * scale
    if record.zero_point is not None or not torch.equal(quantizer(x).float(), expected):
        raise TypeError(
            f"{input_of(record.name)}: the quantizer {quantizer_name(quantizer)!r} is more than a scale and integers "
            "around 0, and ONNX would compute something else: use 'lsq' for `activations`."
        )


def _refuse_lost(program: Any, held: Mapping[str, Tensor]) -> None:
    """Refuse a graph that lacks the integers of a layer: the model computes with a copy of its float weight."""
    found = {_digest(value.const_value.numpy()) for value in program.model.graph.initializers.values()}
    for name, codes in held.items():
        if _digest(codes.numpy()) not in found:
            raise RuntimeError(
                f"the exported graph lacks the integers of {name!r}: the model uses the weight without calling its "
                "layer, or does not use it. Keep it float with a rule, (name, None)."
            )


def _digest(array: Any) -> tuple[Any, ...]:
    return str(array.dtype), array.shape, hashlib.sha256(array.tobytes()).hexdigest()


# --- layers that speak ONNX ---------------------------------------------------------------------------------------


def _lower_(  # noqa: PLR0917
    module: nn.Module, attr: str, record: QuantizedWeight, called: bool, form: str, level: int, block: int | None
) -> Tensor:  # fmt: skip
    """Make one layer of the copy speak ONNX; return the integers as the file will hold them."""
    where, conv1d = path_of(record.name.rpartition(".")[0], attr), is_hf_conv1d(module)
    new: _Matrix | _NBits | _Rows | _Kernel
    if called and type(module) is nn.Embedding:
        new = _Rows(record)
    elif called and (type(module) is nn.Linear or conv1d):
        bias: Any = module.bias
        if record.axis not in (None, out := 1 if conv1d else 0):
            raise ValueError(
                f"{where!r} has scales along axis {record.axis}, and ONNX's products need them along the outputs, axis "
                f"{out}: quantize it without `axis`."
            )
        _refuse_group(record, where, form)
        new = _NBits(record, where, bias, conv1d, level, block) if form == "nbits" else _Matrix(record, bias, conv1d)
    else:
        if record.group_size is not None:
            raise ValueError(
                f"{where!r} of {type(module).__name__} is quantized per group, which ONNX has for the matrices of "
                "Linear and Conv1D and for embeddings only: use granularity 'per_channel' for it in `rules`."
            )
        new = _Kernel(record)
        parametrize.register_parametrization(module, attr, new, unsafe=True)
        return new.codes
    module.add_module("onnx", new)
    module.forward = new.forward
    return new.codes


def _refuse_group(record: QuantizedWeight, where: str, form: str) -> None:
    size = record.group_size
    if size is None:
        return
    if form == "int8":
        raise ValueError(
            f"{where!r} is quantized per group, and ONNX Runtime is silently wrong with grouped int8 weights and "
            "quantized inputs: call export_onnx(..., weights='nbits'), or use granularity 'per_channel'."
        )
    if size not in (*BLOCKS, 256):
        raise ValueError(
            f"{where!r} is quantized in groups of {size}, and MatMulNBits has blocks of 16, 32, 64, 128 or 256: use "
            "such a group_size, or granularity 'per_channel'."
        )


class _Input(Quantizer):
    """QuantizeLinear, Clip for fewer than 8 bits, DequantizeLinear: in the place of an input's quantizer."""

    scale: Tensor
    zero: Tensor
    low: Tensor
    high: Tensor

    def __init__(self, record: QuantizedInput) -> None:
        super().__init__(bits=record.bits, signed=record.signed)
        self.register_buffer("scale", record.scale.cpu().reshape(()))
        zero = 128 if record.signed else 0
        self.register_buffer("zero", torch.tensor(zero, dtype=torch.uint8))
        self.register_buffer("low", torch.tensor(self.quant_min + zero, dtype=torch.uint8))
        self.register_buffer("high", torch.tensor(self.quant_max + zero, dtype=torch.uint8))

    @property
    def calibrated(self) -> bool:
        """It has a scale."""
        return True

    def readable_limits(self) -> None:
        """Return None: the sign is in the zero point."""

    def init_(self, x: Tensor) -> None:
        """Do nothing."""

    def forward(self, x: Tensor) -> Tensor:
        """Return ``s * (codes - zero)``."""
        kind: dict[str, Any] = {"dtype": torch.uint8, "shape": x.shape}
        codes = symbolic("QuantizeLinear", (x, self.scale, self.zero), **kind)
        if self.bits < 8:
            codes = symbolic("Clip", (codes, self.low, self.high), **kind)
        return symbolic("DequantizeLinear", (codes, self.scale, self.zero), dtype=torch.float32, shape=x.shape)


class _Kernel(nn.Module):
    """``s * W`` by DequantizeLinear, in the layout of the layer: also where the layer multiplies by itself."""

    codes: Tensor
    scale: Tensor
    zero: Tensor

    def __init__(self, record: QuantizedWeight, transposed: bool = False) -> None:
        super().__init__()
        codes, wide = record.codes.cpu(), record.bits == 8 and record.signed
        codes = (codes.to(torch.int16) + 128).to(torch.uint8) if wide else codes
        axis: Any = record.axis
        self.attrs: dict[str, Any] = {} if axis is None else {"axis": 1 - axis if transposed else axis}
        scale = record.scale.cpu().reshape(() if axis is None else -1)
        self.register_buffer("codes", (codes.t() if transposed else codes).contiguous())
        self.register_buffer("scale", scale)
        self.register_buffer("zero", torch.full(scale.shape, 128 if wide else 0, dtype=codes.dtype))

    def forward(self, weight: Tensor | None = None) -> Tensor:
        """Return the weight; the float one that a parametrization passes is not looked at."""
        inputs = self.codes, self.scale, self.zero
        return symbolic("DequantizeLinear", inputs, self.attrs, dtype=torch.float32, shape=self.codes.shape)


class _Matrix(_Kernel):
    """``x @ (s * W) + b`` with W as (in, out): no Transpose stands between DequantizeLinear and MatMul."""

    def __init__(self, record: QuantizedWeight, bias: nn.Parameter | None, conv1d: bool) -> None:
        super().__init__(record, transposed=not conv1d)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Return y.

        ONNX Runtime makes a float Gemm of a MatMul and an Add that it may fuse, and only then looks for integers: it
        does not fuse a bias of three dimensions, nor a Sub.
        """
        y = symbolic("MatMul", (x, super().forward()), dtype=torch.float32, shape=(*x.shape[:-1], self.codes.shape[1]))
        if self.bias is None:
            return y
        return y - (-self.bias) if x.dim() <= 2 else y + self.bias.reshape(1, 1, -1)


class _NBits(nn.Module):
    """``x @ (s * W) + b`` by MatMulNBits. Its B, (out, blocks, bytes), holds W + 2^(bits-1), lowest bits first."""

    codes: Tensor
    scale: Tensor

    def __init__(  # noqa: PLR0917
        self, record: QuantizedWeight, where: str, bias: Any, conv1d: bool, level: int, block: int | None
    ) -> None:
        super().__init__()
        codes = (record.codes.t() if conv1d else record.codes).cpu()
        out, columns = codes.shape
        bits = next(width for width in (2, 4, 8) if width >= record.bits)
        block = record.group_size or block or next((b for b in BLOCKS if columns % b == 0), None)
        if block is None or columns % block:
            raise ValueError(
                f"{where!r} has {columns} inputs, of which MatMulNBits takes blocks of {block or 16}: give a "
                "`block_size` that divides them, quantize the layer's input and use weights='int8', or "
                "keep the layer float."
            )
        self.attrs: dict[str, Any] = {
            "K": columns,
            "N": out,
            "bits": bits,
            "block_size": block,
            "accuracy_level": level,
        }
        each = 8 // bits
        parts = (codes.to(torch.int32) + 2 ** (bits - 1)).reshape(out, columns // block, block // each, each)
        packed = sum(parts[..., i] << (bits * i) for i in range(each))
        assert isinstance(packed, Tensor)
        self.register_buffer("codes", packed.to(torch.uint8))
        rows = record.scale.cpu().reshape(1 if record.axis is None else out, -1)
        self.register_buffer("scale", rows.expand(out, columns // block).clone())
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """Return y."""
        inputs = (x, self.codes, self.scale, *(() if self.bias is None else (None, None, self.bias)))
        shape = (*x.shape[:-1], self.attrs["N"])
        name = "com.microsoft::MatMulNBits"
        return symbolic(name, inputs, self.attrs, dtype=torch.float32, shape=shape, version=1)


class _Rows(nn.Module):
    """``codes[ids] * scale[ids]``."""

    codes: Tensor
    scale: Tensor

    def __init__(self, record: QuantizedWeight) -> None:
        super().__init__()
        self.register_buffer("codes", record.codes.cpu())
        self.register_buffer("scale", record.scale.cpu())
        self.groups = record.scale.shape[1:] if record.group_size is not None else None

    def forward(self, ids: Tensor) -> Tensor:
        """Return the rows of the table, in fp32."""
        rows: Tensor = self.codes[ids].to(torch.float32)
        scale = self.scale
        scale = scale[ids] if len(scale) == len(self.codes) else scale[0] if scale.dim() > 1 else scale
        if self.groups is None:
            return rows * scale
        grouped: Tensor = rows.reshape(*rows.shape[:-1], self.groups[0], -1) * scale
        return grouped.flatten(-2)


# --- the graph ----------------------------------------------------------------------------------------------------


def _arguments(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(batch, Mapping):
        return (), dict(batch)
    return (tuple(batch), {}) if isinstance(batch, tuple | list) else ((batch,), {})


def _on_cpu(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, Mapping):
        return {key: _on_cpu(part) for key, part in value.items()}
    return type(value)(map(_on_cpu, value)) if type(value) in (tuple, list) else value


def _dynamic(value: Any, name: str = "example_inputs") -> Any:
    """Return the default dynamic dimensions: of every tensor the batch, of one of integers or bools the length too."""
    if isinstance(value, Mapping):
        return {key: _dynamic(part, f"{name}[{key!r}]") for key, part in value.items()}
    if isinstance(value, tuple | list):
        return [_dynamic(part, f"{name}[{i}]") for i, part in enumerate(value)]
    if not isinstance(value, Tensor) or not value.dim():
        return None
    found = {0: "batch"} if value.is_floating_point() or value.dim() < 2 else {0: "batch", 1: "length"}
    for dim in found:
        if value.shape[dim] < 2:
            raise ValueError(
                f"{name} has the size {value.shape[dim]} along dimension {dim}, which torch.export then fixes: give an "
                "example with at least two samples of at least two tokens, or `dynamic_shapes` ({} for fixed sizes)."
            )
    return found


def _output_names(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str] | None:
    """Return the names of a dict of outputs, as transformers' models return it; None for other outputs."""
    with in_eval_mode(model):
        out = model(*args, **kwargs)
    if isinstance(out, Mapping) and all(isinstance(value, Tensor) for value in out.values()):
        return [str(key) for key in out]
    return ["output"] if isinstance(out, Tensor) else None


def _traced(  # noqa: PLR0917
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], names: list[str] | None, shapes: Any, opset: int
) -> Any:
    fastpath: Callable[[bool], None] = torch.backends.mha.set_fastpath_enabled
    was = torch.backends.mha.get_fastpath_enabled()
    try:
        fastpath(False)  # it reads the weights of a TransformerEncoderLayer without calling its layers
        with warnings.catch_warnings():
            for category in (DeprecationWarning, FutureWarning):  # torch's exporter about its own calls
                warnings.simplefilter("ignore", category)
            warnings.filterwarnings("ignore", "# The axis name")  # two inputs share a length, as is meant
            program = torch.onnx.export(
                model, args, kwargs=kwargs, dynamo=True, opset_version=opset, optimize=True, verbose=False,
                output_names=names, dynamic_shapes=shapes,
            )  # fmt: skip
    except torch.onnx.errors.OnnxExporterError as error:
        error.add_note(
            "If the model fixes a size, or wants others to vary, give export_onnx `dynamic_shapes`; {} fixes all."
        )
        raise
    finally:
        fastpath(was)
    assert program is not None
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # paths and lines of the code that was traced
    return program


def _save(program: Any, path: Path) -> None:
    """Write under another name, then rename: an interruption leaves no torn file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        program.save(Path(folder) / path.name)
        for written in sorted(Path(folder).iterdir(), reverse=True):  # the tensors first
            os.replace(written, path.with_name(written.name))
