"""What was quantized, what was not and why: a table, and the file that rebuilds it."""

from __future__ import annotations

import dataclasses
import json
import os
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor, nn

from qsam.quantizers import QUANTIZERS, Quantizer

FORMAT = 1
"""Version of the files; a newer one is refused by name."""

SPEC_NAME = "qsam.json"
TENSORS_NAME = "qsam.safetensors"
_OWNER = "_owner"


@dataclasses.dataclass(frozen=True)
class Weight:
    """One parameter: its path and shape, its quantizer, or why it stays float.

    Attributes:
        name: Path of the parameter.
        shape: Its shape.
        quantizer: The submodule that quantizes it, or None.
        reason: Why it is float, or a remark ("head").
        module: Its owner.
        attr: Its name in the owner.
    """

    name: str
    shape: tuple[int, ...]
    quantizer: Quantizer | None
    reason: str
    module: nn.Module = dataclasses.field(repr=False)
    attr: str

    @property
    def numel(self) -> int:
        """Number of entries."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def size_bits(self) -> int:
        """Bits of storage once packed: the codes and fp32 parameters of the quantizer, or 32 a float entry."""
        if self.quantizer is None or quantizer_name(self.quantizer) == "identity":
            return 32 * self.numel
        own = [*self.quantizer.parameters(), *self.quantizer.buffers()]
        return self.quantizer.bits * self.numel + 32 * sum(t.numel() for t in own)


@dataclasses.dataclass(frozen=True)
class Input:
    """The input of one module: its quantizer, or why it stays float."""

    name: str
    quantizer: Quantizer | None
    reason: str
    module: nn.Module = dataclasses.field(repr=False)


@dataclasses.dataclass(frozen=True)
class Coverage:
    """Every parameter and every layer input of a model: quantized how, or float why. ``print`` shows the table.

    Attributes:
        weights: One row a parameter.
        inputs: One row a layer that has weights.
    """

    weights: tuple[Weight, ...]
    inputs: tuple[Input, ...]

    @property
    def quantized(self) -> tuple[Weight, ...]:
        """The rows that have a quantizer."""
        return tuple(row for row in self.weights if row.quantizer is not None)

    @property
    def share(self) -> float:
        """Share of the model's parameters that are quantized, in [0, 1]."""
        return sum(row.numel for row in self.quantized) / max(1, sum(row.numel for row in self.weights))

    @property
    def size_bytes(self) -> int:
        """Bytes of all parameters once packed: low-bit codes, fp32 scales, fp32 for what is float."""
        return sum(row.size_bits for row in self.weights) // 8

    @property
    def float_bytes(self) -> int:
        """Bytes of all parameters in fp32."""
        return 4 * sum(row.numel for row in self.weights)

    def __str__(self) -> str:
        """Return the table."""
        return "\n".join(_table(self))

    def to_spec(self) -> dict[str, Any]:
        """Return the plain description that ``qsam.quantize_(model, spec=...)`` rebuilds the quantizers from."""
        return {
            "qsam_format": FORMAT,
            "weights": {row.name: quantizer_spec(row.quantizer) for row in self.weights if row.quantizer is not None},
            "inputs": {row.name: quantizer_spec(row.quantizer) for row in self.inputs if row.quantizer is not None},
            "float": {row.name: row.reason for row in self.weights if row.quantizer is None},
        }

    def save(self, directory: str | os.PathLike[str]) -> Path:
        """Write ``qsam.json`` (the quantizers) and ``qsam.safetensors`` (their scales) beside a saved model.

        Each file is written under another name and then renamed, so that an interruption leaves no torn file.

        Args:
            directory: An existing folder.

        Returns:
            The path of ``qsam.json``, to be given as ``quantize_(model, spec=path)``.
        """
        folder = Path(directory)
        tensors = {key: value.detach().contiguous().clone() for key, value in self._tensors()}
        _replace(folder / TENSORS_NAME, safetensors.torch.save(tensors, metadata={"qsam_format": str(FORMAT)}))
        _replace(folder / SPEC_NAME, json.dumps(self.to_spec(), indent=1).encode())
        return folder / SPEC_NAME

    def __getstate__(self) -> dict[str, Any]:
        """Leave the owner out of copies and pickles: a copied model has an optimizer of its own, or none."""
        return {key: value for key, value in vars(self).items() if key != _OWNER}

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        for prefix, row in self._named_quantizers():
            for key, value in row.state_dict().items():
                yield f"{prefix}.{key}", value

    def _named_quantizers(self) -> Iterator[tuple[str, Quantizer]]:
        for row in self.quantized:
            assert row.quantizer is not None
            yield f"{row.name}_quantizer", row.quantizer
        for entry in self.inputs:
            if entry.quantizer is not None:
                yield f"{entry.name}.input_quantizer" if entry.name else "input_quantizer", entry.quantizer


def owner_of(coverage: Coverage) -> Any | None:
    """Return the living optimizer that owns the latents of these weights, or None."""
    reference = vars(coverage).get(_OWNER)
    return reference() if reference is not None else None


def set_owner(coverage: Coverage, owner: Any | None) -> None:
    """Note, by a weak reference, which optimizer owns the latents of these weights."""
    vars(coverage)[_OWNER] = None if owner is None else weakref.ref(owner)


def quantizer_name(quantizer: Quantizer) -> str:
    """Return the registered name of a quantizer's class, or its class name."""
    return QUANTIZERS.name_of(type(quantizer)) or type(quantizer).__qualname__


def quantizer_spec(quantizer: Quantizer | None) -> dict[str, Any]:
    """Return what is needed to build the quantizer again."""
    assert quantizer is not None
    keys = ("bits", "signed", "granularity", "axis", "group_size", "init", "calibrated")
    return {"quantizer": quantizer_name(quantizer), **{key: getattr(quantizer, key) for key in keys}}


def read_spec(spec: str | os.PathLike[str] | Mapping[str, Any]) -> tuple[Mapping[str, Any], dict[str, Tensor]]:
    """Return a spec and the tensors beside it.

    Args:
        spec: Path of a ``qsam.json`` or of the folder that holds it, or what ``Coverage.to_spec()`` returned.

    Returns:
        The spec, and the quantizers' tensors by name (empty for a spec given as a dict).

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a qsam spec, or one of a newer format.
    """
    if isinstance(spec, Mapping):
        return _checked_spec(spec, "the given spec"), {}
    path = Path(spec)
    path = path / SPEC_NAME if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"there is no quantizer spec {str(path)!r}: `Coverage.save(folder)` writes one.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is not JSON ({error}): `Coverage.save(folder)` writes a spec.") from error
    tensors = path.with_name(TENSORS_NAME)
    if not tensors.is_file():
        raise FileNotFoundError(f"{str(tensors)!r}, the scales that belong to {path.name}, is missing: copy both files.")
    return _checked_spec(content, str(path)), safetensors.torch.load_file(tensors)


def _checked_spec(content: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(content, Mapping) or not {"qsam_format", "weights", "inputs"} <= set(content):
        raise ValueError(f"{where} is not a qsam spec: it lacks 'qsam_format', 'weights' or 'inputs'.")
    if content["qsam_format"] != FORMAT:
        raise ValueError(
            f"{where} has qsam_format {content['qsam_format']!r}; this qsam reads {FORMAT}: install a newer qsam."
        )
    return content


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _table(coverage: Coverage) -> Iterator[str]:
    inputs = {id(row.module): row for row in coverage.inputs}
    shown = [row for row in coverage.weights if len(row.shape) >= 2]
    width = max([len("parameter"), *(len(row.name) for row in shown)])
    yield f"{'parameter':<{width}}  {'shape':>14}  {'weight':<28}  input"
    for row in shown:
        entry = inputs.get(id(row.module)) if row.quantizer is not None else None
        weight = "float: " + row.reason if row.quantizer is None else _describe(row.quantizer)
        remark = f"  ({row.reason})" if row.reason and row.quantizer is not None else ""
        shape = "x".join(map(str, row.shape))
        yield f"{row.name:<{width}}  {shape:>14}  {weight:<28}  {_describe_input(entry)}{remark}".rstrip()
    small = [row for row in coverage.weights if len(row.shape) < 2]
    if small:
        yield f"{len(small)} parameters of fewer than two dimensions (biases, norms) stay float"
    yield (
        f"{coverage.share:.1%} of {sum(row.numel for row in coverage.weights):,} parameters quantized; "
        f"{coverage.float_bytes / 1e6:.2f} MB in fp32, {coverage.size_bytes / 1e6:.2f} MB packed"
    )


def _describe(quantizer: Quantizer) -> str:
    group = f" of {quantizer.group_size}" if quantizer.group_size else ""
    return f"{quantizer_name(quantizer)} {quantizer.bits} bits {quantizer.granularity}{group}"


def _describe_input(entry: Input | None) -> str:
    if entry is None:
        return ""
    if entry.quantizer is None:
        return "float: " + entry.reason
    sign = {True: "signed", False: "unsigned", None: "sign open"}[entry.quantizer.signed]
    return f"{quantizer_name(entry.quantizer)} {entry.quantizer.bits} bits {sign}"
