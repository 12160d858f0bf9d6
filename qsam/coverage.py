"""The coverage: a plan on a live model, its table, and everything else that qsam knows about that model.

``quantize_`` attaches one :class:`Coverage` to the root module. A copy of the model has a copy of it, without owner.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from qsam.layers import path_of
from qsam.plan import NO_DEFAULT, Entry, Plan, quantizer_name, write_spec
from qsam.quantizers import Identity, Quantizer

_ATTRIBUTE = "_qsam_coverage"
"""Attribute of the root module of a quantized model: its coverage."""


@dataclasses.dataclass(frozen=True)
class Weight:
    """One parameter: its path and shape, its quantizer, or why it stays float.

    Attributes:
        name: Path of the parameter.
        shape: Its shape.
        quantizer: The submodule that quantizes it, or None.
        reason: Why it is float, or a remark ("head").
        module: The module that holds it.
        attr: Its name in that module.
    """

    name: str
    shape: tuple[int, ...]
    quantizer: Quantizer | None
    reason: str
    module: nn.Module = dataclasses.field(repr=False)
    attr: str

    @property
    def parameter(self) -> nn.Parameter:
        """The Parameter, as it is now."""
        return parameter_at(self.module, self.attr, self.name)

    @property
    def numel(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)

    @property
    def bits(self) -> int:
        """Bits of one entry; 32 if it stays float."""
        return 32 if self.quantizer is None or isinstance(self.quantizer, Identity) else self.quantizer.bits


def parameter_at(module: nn.Module, attr: str, path: str) -> nn.Parameter:
    """Return a Parameter of a module; raise if a pruning or a parametrization computes it in each forward."""
    p = module._parameters.get(attr)
    if p is not None:
        return p
    if f"{attr}_orig" in module._parameters:
        undo = f"torch.nn.utils.prune.remove(module, {attr!r}), which makes the pruning permanent"
    else:
        undo = f"torch.nn.utils.parametrize.remove_parametrizations(module, {attr!r})"
    raise RuntimeError(
        f"{path!r} is no Parameter any more: it is computed in each forward, as torch.nn.utils.prune and "
        f"parametrizations do, and qsam cannot write it. Call {undo}; then, if an optimizer owns the weights, "
        "optimizer.sync_latents()."
    )


@dataclasses.dataclass(frozen=True)
class Input:
    """The input of one module: its quantizer, or why it stays float."""

    name: str
    quantizer: Quantizer | None
    reason: str
    module: nn.Module = dataclasses.field(repr=False)


class Status:
    """The facts about a quantized model that change while it is used.

    Attributes:
        owner: Weak reference to the optimizer that owns the latents of the weights; a copy has none.
        released: Latents that an optimizer has released for the next one, by the path of the weight; a copy has none.
        said: Warnings that have been given.
    """

    def __init__(self) -> None:
        self.owner: weakref.ref[Any] | None = None
        self.released: dict[str, nn.Parameter] = {}
        self.said: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        """Keep everything but the owner and the released latents, which belong to the original."""
        return {**vars(self), "owner": None, "released": {}}


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Coverage:
    """Every parameter and every layer input of a model: quantized how, or float why. ``print`` shows the table.

    Attributes:
        weights: One row per parameter.
        inputs: One row per layer whose weights are quantized.
        attention: Paths of the modules that are attention, recognised by their names. Scores and probabilities are
            products of two activations and not the input of a layer, so they stay float.
        status: What changes while the model is used.
    """

    weights: tuple[Weight, ...]
    inputs: tuple[Input, ...]
    attention: tuple[str, ...] = ()
    status: Status = dataclasses.field(default_factory=Status, init=False)

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
    def places(self) -> list[tuple[nn.Module, str, str]]:
        """The module that holds each quantizer, the quantizer's name in it, and its path."""
        weights = [(row.module, f"{row.attr}_quantizer", f"{row.name}_quantizer") for row in self.quantized]
        inputs = [row for row in self.inputs if row.quantizer is not None]
        return weights + [(row.module, "input_quantizer", path_of(row.name, "input_quantizer")) for row in inputs]

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
        """Return the table, with one line for all layers of a stack that are treated alike."""
        return "\n".join(_table(self))

    __repr__ = __str__

    @property
    def plan(self) -> Plan:
        """The plan that rebuilds these quantizers as they are now."""
        weights = {
            row.name: row.reason if row.quantizer is None else Entry.of(row.quantizer, row.reason, row.shape)
            for row in self.weights
        }
        inputs = {
            row.name: row.reason if row.quantizer is None else Entry.of(row.quantizer, row.reason)
            for row in self.inputs
        }
        return Plan(weights, inputs)

    def to_spec(self) -> dict[str, Any]:
        """Return the plain description that ``qsam.quantize_(model, spec=...)`` rebuilds the quantizers from."""
        return self.plan.to_spec()

    def save(self, directory: str | os.PathLike[str]) -> Path:
        """Write ``qsam.json`` (the plan) and ``qsam.safetensors`` (the scales) beside a saved model.

        An interruption leaves no torn file, and no pair of files that do not belong together.

        Args:
            directory: The folder; made if there is none.

        Returns:
            The path of ``qsam.json``, to be given as ``quantize_(model, spec=path)``.
        """
        return write_spec(Path(directory), self.plan, self.tensors)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The state of all quantizers, by its key in the model's state_dict."""
        return {
            f"{path}.{key}": value
            for path, quantizer in self.quantizers.items()
            for key, value in quantizer.state_dict().items()
        }


# --- on the model ---------------------------------------------------------------------------------------------------


def coverage_of(model: nn.Module) -> Coverage | None:
    """Return the coverage of a quantized model (also of one inside it), or None for a float model.

    Raises:
        RuntimeError: Two parts of the model were quantized separately.

    Example:
        >>> import qsam
        >>> model = nn.Linear(8, 4)
        >>> qsam.coverage_of(model) is None, qsam.quantize_(model) is qsam.coverage_of(model)
        (True, True)
    """
    holders = [module for module in model.modules() if _ATTRIBUTE in vars(module)]
    if len(holders) > 1:
        raise RuntimeError(
            f"{len(holders)} parts of the model were quantized separately: call qsam.dequantize_ on each of them, then "
            "qsam.quantize_ on the whole model."
        )
    return vars(holders[0])[_ATTRIBUTE] if holders else None


def record_(model: nn.Module, coverage: Coverage | None) -> None:
    """Attach a coverage to its model, or with None remove the present one."""
    if coverage is not None:
        setattr(model, _ATTRIBUTE, coverage)
        return
    for module in model.modules():
        vars(module).pop(_ATTRIBUTE, None)


def owner_of(coverage: Coverage) -> Any | None:
    """Return the living optimizer that owns the latents of these weights, or None."""
    reference = coverage.status.owner
    return None if reference is None else reference()


def set_owner(coverage: Coverage, owner: Any | None) -> None:
    """Set the optimizer that owns the latents of these weights, by a weak reference; drop the released latents."""
    coverage.status.released.clear()
    coverage.status.owner = None if owner is None else weakref.ref(owner)


def keep_released_latents(coverage: Coverage, latents: dict[str, nn.Parameter]) -> None:
    """Keep the latents that an optimizer has released, by path, for the next one."""
    coverage.status.released.update(latents)


def released_latents(coverage: Coverage) -> Mapping[str, nn.Parameter]:
    """Return the latents that :func:`keep_released_latents` keeps, by path."""
    return coverage.status.released


def attached(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Quantizer]]:
    """Yield the quantizers where ``quantize_`` attaches them: path, module that holds it, name in it, quantizer."""
    for path, module in model.named_modules():
        for name, child in module._modules.items():
            stem = name.removesuffix("_quantizer")
            if isinstance(child, Quantizer) and stem != name and (stem == "input" or hasattr(module, stem)):
                yield path_of(path, name), module, name, child


def quantizer_parameters(root: nn.Module) -> Iterator[nn.Parameter]:
    """Iterate over the parameters of all quantizers in a model, of weights and inputs."""
    for module in root.modules():
        if isinstance(module, Quantizer):
            yield from module.parameters()


def require_coverage(model: nn.Module, caller: str) -> Coverage:
    """Return the coverage of a quantized model, or raise if it is not quantized or has changed since."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be a torch.nn.Module, got {type(model).__name__}.")
    coverage = coverage_of(model)
    if coverage is None:
        refuse_unrecorded(model)
        raise RuntimeError(f"{caller} needs a quantized model: call qsam.quantize_(model) first.")
    refuse_changed(coverage, model)
    return coverage


def refuse_unrecorded(model: nn.Module) -> None:
    """Refuse quantizers without a coverage, in a part of a quantized model or in what a merge has left of it."""
    for path, _, name, _ in attached(model):
        weight = path.removesuffix("_quantizer") if name != "input_quantizer" else path
        raise RuntimeError(
            f"{weight!r} is quantized already, as a part of a larger model, or of one that it was taken out of (as "
            "peft's merge_and_unload does): call this on that model, or take the quantizers off this part with "
            "qsam.dequantize_(model) and quantize it again."
        )


def refuse_changed(coverage: Coverage, root: nn.Module) -> None:
    """Refuse a model whose modules are no longer those that were quantized.

    A quantized module may have left the tree (a head that was replaced), its quantizer may have been taken off, or a
    copy of it may have been added that would be trained in float (peft's ``modules_to_save``).
    """
    present = {id(module) for module in root.modules()}
    cure = (
        f"Call qsam.dequantize_(model{'' if owner_of(coverage) is None else ', optimizer'}) and then "
        "qsam.quantize_(model) on the model as it is now."
    )
    rows: tuple[Weight | Input, ...] = (*coverage.weights, *coverage.inputs)
    for row in rows:
        if row.quantizer is not None and id(row.module) not in present:
            raise RuntimeError(
                f"the coverage has {row.name or 'the model itself'!r}, whose module has left the model since "
                f"quantize_: it was replaced or taken out. {cure}"
            )
    quantizers = coverage.quantizers
    for module, name, path in coverage.places:
        if module._modules.get(name) is not quantizers[path]:
            raise RuntimeError(f"the quantizer {path!r} has been taken off or replaced since quantize_. {cure}")
    known = set(map(id, quantizers.values()))
    for path, module, name, quantizer in attached(root):
        parameter = module._parameters.get(name.removesuffix("_quantizer"))
        if id(quantizer) not in known and parameter is not None and parameter.requires_grad:
            raise RuntimeError(
                f"{path.removesuffix('_quantizer')!r} is a copy of a quantized weight, made since quantize_, and "
                f"would be trained in float (peft's modules_to_save makes such copies). {cure}"
            )


def float_matrices_warning(coverage: Coverage) -> str:
    """Return a warning if most entries of matrices stay float because their layers are unknown, or "".

    Embeddings and parameters that a rule keeps float do not count.
    """
    unknown = [row for row in coverage.weights if row.quantizer is None and row.reason.startswith(NO_DEFAULT)]
    lost, kept = sum(row.numel for row in unknown), sum(row.numel for row in coverage.quantized)
    if lost <= kept:
        return ""
    largest = max(unknown, key=lambda row: row.numel)
    axis = ", 'axis': (0, 1)" if len(largest.shape) == 3 else ""
    more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
    return (
        f"only {kept / (kept + lost):.0%} of the matrices' entries are quantized: {largest.name!r} of shape "
        f"{largest.shape}{more} stay float, because qsam has no default for a parameter of "
        f"{type(largest.module).__name__}. Name them in `rules`, as in "
        f"rules=[('*.{largest.attr}', {{'granularity': 'per_channel'{axis}}})], or with None to keep them float."
    )


# --- the table ------------------------------------------------------------------------------------------------------


def _table(coverage: Coverage) -> Iterator[str]:
    lines = [("parameter", "shape", "weight", "input", ""), *merged(_rows(coverage))]
    note = "attention, by its name: scores and probabilities stay float"
    lines += merged((name or "the model itself", ("", "", "", note)) for name in coverage.attention)
    small = sum(len(row.shape) < 2 for row in coverage.weights)
    if small:
        lines.append((f"vectors and scalars ({small})", "", "float", "", "biases, norms: fewer than two dimensions"))
    name, shape, weight, given, _ = (max(map(len, column)) for column in zip(*lines, strict=True))
    for line in lines:
        a, b, c, d, note = line
        yield f"{a:<{name}}  {b:>{shape}}  {c:<{weight}}  {d:<{given}}  {note}".rstrip()
    yield from _totals(coverage)


def _rows(coverage: Coverage) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield the name and cells of each parameter of two or more dimensions, and of each layer with a shared weight."""
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


def merged(rows: Iterator[tuple[str, tuple[str, ...]]]) -> Iterator[tuple[str, ...]]:
    """Yield one line for the rows that differ only in the numbers of their path: "layer.{0-11}.fc.weight"."""
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
    axes = f" {quantizer.axis}" if isinstance(quantizer.axis, tuple) else ""
    group = f" of {quantizer.group_size}" if quantizer.group_size else ""
    return f"{quantizer_name(quantizer)} {quantizer.bits} bits {quantizer.granularity}{axes}{group}"


def _describe_input(entry: Input | None) -> str:
    if entry is None or entry.quantizer is None:
        return "" if entry is None else "float"
    sign = {True: "signed", False: "unsigned", None: "not calibrated"}[entry.quantizer.signed]
    return f"{quantizer_name(entry.quantizer)} {entry.quantizer.bits} bits {sign}"
