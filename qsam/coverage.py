"""What was quantized, what was not and why: a table, and the file that rebuilds it."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import os
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor, nn

from qsam.quantizers import QUANTIZERS, Identity, Quantizer

FORMAT = 1
"""Version of the files; a newer one is refused by name."""

SPEC_NAME = "qsam.json"
TENSORS_NAME = "qsam.safetensors"
_DIGEST = "tensors_sha256"


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
        return math.prod(self.shape)

    @property
    def bits(self) -> int:
        """Bits of one entry: 32 where it stays float."""
        return 32 if self.quantizer is None or isinstance(self.quantizer, Identity) else self.quantizer.bits


@dataclasses.dataclass(frozen=True)
class Input:
    """The input of one module: its quantizer, or why it stays float."""

    name: str
    quantizer: Quantizer | None
    reason: str
    module: nn.Module = dataclasses.field(repr=False)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Coverage:
    """Every parameter and every layer input of a model: quantized how, or float why. ``print`` shows the table.

    Attributes:
        weights: One row a parameter.
        inputs: One row a layer that has quantized weights, or was meant to.
        attention: Paths of the modules that are attention, as far as names tell: scores and probabilities, products of
            two activations, are the input of no layer and stay float.
    """

    weights: tuple[Weight, ...]
    inputs: tuple[Input, ...]
    attention: tuple[str, ...] = ()

    @property
    def quantized(self) -> tuple[Weight, ...]:
        """The rows that have a quantizer."""
        return tuple(row for row in self.weights if row.quantizer is not None)

    @property
    def quantizers(self) -> dict[str, Quantizer]:
        """All quantizers by their path in the model: "fc.weight_quantizer", "fc.input_quantizer"."""
        weights = {f"{row.name}_quantizer": row.quantizer for row in self.weights}
        inputs = {f"{row.name}.input_quantizer".lstrip("."): row.quantizer for row in self.inputs}
        return {path: quantizer for path, quantizer in {**weights, **inputs}.items() if quantizer is not None}

    @property
    def share(self) -> float:
        """Share of the model's parameters that are quantized, in [0, 1]."""
        return sum(row.numel for row in self.weights if row.bits < 32) / max(1, sum(row.numel for row in self.weights))

    @property
    def size_bytes(self) -> int:
        """Bytes of all parameters once packed: low-bit codes, fp32 scales (the inputs' too), fp32 for what is float."""
        own = sum(p.numel() for quantizer in self.quantizers.values() for p in quantizer.parameters())
        return -(-sum(row.bits * row.numel for row in self.weights) // 8) + 4 * own

    @property
    def float_bytes(self) -> int:
        """Bytes of all parameters in fp32."""
        return 4 * sum(row.numel for row in self.weights)

    def __str__(self) -> str:
        """Return the table: one line for all layers of a stack that are treated alike."""
        return "\n".join(_table(self))

    __repr__ = __str__

    def to_spec(self) -> dict[str, Any]:
        """Return the plain description that ``qsam.quantize_(model, spec=...)`` rebuilds the quantizers from."""
        return {
            "qsam_format": FORMAT,
            "weights": {row.name: {**_entry(row), "shape": list(row.shape)} for row in self.quantized},
            "inputs": {row.name: _entry(row) for row in self.inputs if row.quantizer is not None},
            "float": {row.name: row.reason for row in self.weights if row.quantizer is None},
            "float_inputs": {row.name: row.reason for row in self.inputs if row.quantizer is None},
        }

    def save(self, directory: str | os.PathLike[str]) -> Path:
        """Write ``qsam.json`` (the quantizers) and ``qsam.safetensors`` (their scales) beside a saved model.

        Each file is written under another name and then renamed, so that an interruption leaves no torn file; the
        first holds a digest of the second, so that an interruption between the two does not pass for a pair.

        Args:
            directory: The folder; made if there is none.

        Returns:
            The path of ``qsam.json``, to be given as ``quantize_(model, spec=path)``.
        """
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {key: value.detach().contiguous().clone() for key, value in self._tensors.items()}
        packed = safetensors.torch.save(tensors, metadata={"qsam_format": str(FORMAT)})
        content = {**self.to_spec(), _DIGEST: hashlib.sha256(packed).hexdigest()}
        _replace(folder / TENSORS_NAME, packed)
        _replace(folder / SPEC_NAME, json.dumps(content, indent=1).encode())
        return folder / SPEC_NAME

    @property
    def _tensors(self) -> dict[str, Tensor]:
        """What the quantizers hold, by its key in the model's state_dict."""
        return {
            f"{path}.{key}": value
            for path, quantizer in self.quantizers.items()
            for key, value in quantizer.state_dict().items()
        }


_OWNERS: weakref.WeakKeyDictionary[Coverage, weakref.ref[Any]] = weakref.WeakKeyDictionary()
"""Which optimizer owns the latents of a coverage's weights. A copied or unpickled coverage has none of its own."""


_LEFT: weakref.WeakKeyDictionary[Coverage, dict[str, nn.Parameter]] = weakref.WeakKeyDictionary()
"""The latents that an optimizer has left for the next one, by the path of the weight."""


def owner_of(coverage: Coverage) -> Any | None:
    """Return the living optimizer that owns the latents of these weights, or None."""
    reference = _OWNERS.get(coverage)
    return None if reference is None else reference()


def set_owner(coverage: Coverage, owner: Any | None) -> None:
    """Note, by a weak reference, which optimizer owns the latents of these weights; what was left for it is dropped."""
    _LEFT.pop(coverage, None)
    if owner is None:
        _OWNERS.pop(coverage, None)
    else:
        _OWNERS[coverage] = weakref.ref(owner)


def leave_latents(coverage: Coverage, latents: dict[str, nn.Parameter]) -> None:
    """Let nobody own these weights, and keep their latents, by path, for the next optimizer."""
    set_owner(coverage, None)
    _LEFT[coverage] = latents


def left_latents(coverage: Coverage) -> Mapping[str, nn.Parameter]:
    """Return the latents that :func:`leave_latents` keeps, by path."""
    return _LEFT.get(coverage, {})


def quantizer_name(quantizer: Quantizer) -> str:
    """Return the registered name of a quantizer's class, or its class name."""
    return QUANTIZERS.name_of(type(quantizer)) or type(quantizer).__qualname__


def read_spec(spec: str | os.PathLike[str] | Mapping[str, Any]) -> tuple[Mapping[str, Any], dict[str, Tensor] | None]:
    """Return a spec and the tensors beside it.

    Args:
        spec: Path of a ``qsam.json`` or of the folder that holds it, or what ``Coverage.to_spec()`` returned.

    Returns:
        The spec, and the quantizers' tensors by name (None for a spec given as a dict).

    Raises:
        TypeError: neither a path nor a dict.
        FileNotFoundError: no such file.
        ValueError: not a qsam spec, one of a newer format, or scales that were not saved with it.
    """
    if isinstance(spec, Mapping):
        return _checked_spec(spec, "the given spec"), None
    if not isinstance(spec, str | os.PathLike):
        raise TypeError(f"`spec` must be a path or what `Coverage.to_spec()` returned, got {spec!r}.")
    path = Path(spec)
    path = path / SPEC_NAME if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"there is no quantizer spec {str(path)!r}: `Coverage.save(folder)` writes one.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is not JSON ({error}): `Coverage.save(folder)` writes a spec.") from error
    return _checked_spec(content, repr(str(path))), _read_tensors(path.with_name(TENSORS_NAME), content)


def _read_tensors(path: Path, content: Mapping[str, Any]) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"{str(path)!r}, the scales that belong to {SPEC_NAME}, is missing: copy both files.")
    packed = path.read_bytes()
    if hashlib.sha256(packed).hexdigest() != content.get(_DIGEST):
        raise ValueError(f"{str(path)!r} was not saved with the {SPEC_NAME} beside it: save again, or copy both files.")
    return safetensors.torch.load(packed)


def _checked_spec(content: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(content, Mapping) or not {"qsam_format", "weights", "inputs"} <= set(content):
        raise ValueError(f"{where} is not a qsam spec: it lacks 'qsam_format', 'weights' or 'inputs'.")
    if content["qsam_format"] != FORMAT:
        raise ValueError(
            f"{where} has qsam_format {content['qsam_format']!r}; this qsam reads {FORMAT}: install a newer qsam."
        )
    for key in ("weights", "inputs", "float", "float_inputs"):
        if not isinstance(content.get(key, {}), Mapping):
            raise ValueError(f"{where} is not a qsam spec: its {key!r} must be a dict, got {content[key]!r}.")
    return content


def _entry(row: Weight | Input) -> dict[str, Any]:
    """Return what is needed to build a row's quantizer again."""
    quantizer = row.quantizer
    assert quantizer is not None
    keys = ("bits", "signed", "granularity", "axis", "group_size", "init", "calibrated")
    arguments = {key: getattr(quantizer, key) for key in keys}
    return {"quantizer": quantizer_name(quantizer), **arguments, "reason": row.reason}


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as handle:
            handle.write(content)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _table(coverage: Coverage) -> Iterator[str]:
    lines = [("parameter", "shape", "weight", "input", ""), *_merged(_rows(coverage))]
    note = "attention, by its name: scores and probabilities stay float"
    lines += _merged((name or "the model itself", ("", "", "", note)) for name in coverage.attention)
    small = sum(len(row.shape) < 2 for row in coverage.weights)
    if small:
        lines.append((f"vectors and scalars ({small})", "", "float", "", "biases, norms: fewer than two dimensions"))
    name, shape, weight, given, _ = (max(map(len, column)) for column in zip(*lines, strict=True))
    for line in lines:
        a, b, c, d, note = line
        yield f"{a:<{name}}  {b:>{shape}}  {c:<{weight}}  {d:<{given}}  {note}".rstrip()
    yield from _totals(coverage)


def _rows(coverage: Coverage) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield name and cells of each parameter of two or more dimensions, and of each input that shares its weight."""
    inputs = {id(row.module): row for row in coverage.inputs}
    for row in coverage.weights:
        entry = inputs.get(id(row.module))
        if len(row.shape) >= 2:
            shape = "x".join(map(str, row.shape))
            note = "; ".join(filter(None, [row.reason, entry.reason if entry else ""]))
            yield row.name, (shape, _describe(row.quantizer), _describe_input(entry), note)
    owners = {id(row.module) for row in coverage.weights}
    for entry in coverage.inputs:
        if id(entry.module) not in owners:
            yield entry.name, ("", "", _describe_input(entry), entry.reason)


def _merged(rows: Iterator[tuple[str, tuple[str, ...]]]) -> Iterator[tuple[str, ...]]:
    """Yield one line for the rows that differ in the numbers of their path only: "layer.{0-11}.fc.weight"."""
    alike: dict[tuple[tuple[str, ...], tuple[str, ...]], list[tuple[int, ...]]] = {}
    for name, cells in rows:
        parts = name.split(".")
        pattern = tuple("{}" if part.isdigit() else part.replace("{", "{{").replace("}", "}}") for part in parts)
        alike.setdefault((pattern, cells), []).append(tuple(int(part) for part in parts if part.isdigit()))
    for (pattern, cells), indices in alike.items():
        axes = [sorted(set(axis)) for axis in zip(*indices, strict=True)]
        whole = list(itertools.product(*axes)) == sorted(indices)
        for line in [[_ranges(axis) for axis in axes]] if whole else indices:
            yield ".".join(pattern).format(*line), *cells


def _ranges(numbers: Sequence[int]) -> str:
    """Return "3" or "{0-2,5}" for ascending numbers."""
    runs = [[numbers[0], numbers[0]]]
    for number in numbers[1:]:
        if number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    text = ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
    return text if len(numbers) == 1 else f"{{{text}}}"


def _totals(coverage: Coverage) -> Iterator[str]:
    count = sum(row.numel for row in coverage.weights)
    low = [row for row in coverage.weights if row.bits < 32]
    mean = sum(row.bits * row.numel for row in low) / max(1, sum(row.numel for row in low))
    yield f"{coverage.share:.1%} of {count:,} parameters quantized" + (f", {mean:.2f} bits on average" if low else "")
    yield f"{_size(coverage.float_bytes)} in fp32, {_size(coverage.size_bytes)} packed (scales included)"


def _size(count: int) -> str:
    return f"{count / 1e6:.2f} MB" if count >= 1e6 else f"{count / 1e3:.2f} kB"


def _describe(quantizer: Quantizer | None) -> str:
    if quantizer is None:
        return "float"
    group = f" of {quantizer.group_size}" if quantizer.group_size else ""
    return f"{quantizer_name(quantizer)} {quantizer.bits} bits {quantizer.granularity}{group}"


def _describe_input(entry: Input | None) -> str:
    if entry is None or entry.quantizer is None:
        return "" if entry is None else "float"
    sign = {True: "signed", False: "unsigned", None: "not calibrated"}[entry.quantizer.signed]
    return f"{quantizer_name(entry.quantizer)} {entry.quantizer.bits} bits {sign}"
