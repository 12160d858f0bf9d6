"""The plan: how each weight and each layer input of a model is quantized, or why it stays float.

The user's rules and the default policy make a :class:`Plan`, ``qsam.json`` holds one, and
:attr:`qsam.Coverage.plan` is that of a quantized model.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor, nn

from qsam.functional import Axis, integer_limits
from qsam.layers import (
    Site,
    boundary_modules,
    channel_axis,
    find_sites,
    is_lora,
    never_called,
    path_of,
    set_aside,
)
from qsam.quantizers import QUANTIZERS, Quantizer
from qsam.registry import nearest
from qsam.scales import INIT_RULES

FORMAT = 1
"""Version of the files; a newer one is refused."""

SPEC_NAME = "qsam.json"
TENSORS_NAME = "qsam.safetensors"
_DIGEST = "tensors_sha256"

Selector = str | type[nn.Module] | Callable[[str, nn.Module], bool]
Rules = Sequence[tuple[Selector, Mapping[str, Any] | None]]

BOUNDARY_BITS = 8
"""Bits of an input convolution and of the head, weights and inputs, unless a rule says otherwise."""


# --- the data structure ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Entry:
    """The settings of one weight or input, from which its quantizer can be built again, without its tensors.

    Attributes:
        quantizer: The registered name.
        bits: Bits of one entry.
        signed: Whether the grid holds negative values; None for an input whose sign is not known yet.
        granularity: ``"per_tensor"``, ``"per_channel"`` or ``"per_group"``.
        axis: The channel dimension of a weight, or several: one scale per index of all of them.
        group_size: Entries per group.
        init: Rule of the initial scales.
        calibrated: Whether the scales have been set from data.
        reason: A remark: "head".
        shape: The weight's shape; None for an input.
    """

    quantizer: str
    bits: int
    signed: bool | None
    granularity: str
    axis: Axis | None
    group_size: int | None
    init: str
    calibrated: bool = False
    reason: str = ""
    shape: tuple[int, ...] | None = None

    @classmethod
    def of(cls, quantizer: Quantizer, reason: str, shape: tuple[int, ...] | None = None) -> Entry:
        """Return the entry that builds a quantizer like this one."""
        own = {field: getattr(quantizer, field) for field in _REQUIRED if field != "quantizer"}
        return cls(quantizer=quantizer_name(quantizer), **own, reason=reason, shape=shape)

    @classmethod
    def read(cls, content: Any, where: str) -> Entry:
        """Return the entry that a spec holds; raise ValueError if it is not a complete dict."""
        if not isinstance(content, Mapping):
            raise ValueError(f"{where}: its entry in the spec must be a dict, got {content!r}.")
        for key in _REQUIRED:
            if key not in content:
                raise ValueError(f"{where}: its entry in the spec lacks {key!r}.")
        known: dict[str, Any] = {}
        for key in cls.__dataclass_fields__:
            if key in content:  # JSON has no tuples
                known[key] = tuple(content[key]) if isinstance(content[key], list) else content[key]
        return cls(**known)

    def to_dict(self) -> dict[str, Any]:
        """Return plain Python, as JSON would."""
        content = {key: list(value) if isinstance(value, tuple) else value for key, value in vars(self).items()}
        if self.shape is None:
            del content["shape"]
        return content

    @property
    def arguments(self) -> dict[str, Any]:
        """The keyword arguments of the quantizer's class."""
        return {key: getattr(self, key) for key in ("bits", "signed", "granularity", "axis", "group_size")}


_REQUIRED = ("bits", "signed", "granularity", "axis", "group_size", "quantizer", "init", "calibrated")


@dataclasses.dataclass(frozen=True)
class Plan:
    """An entry, or the reason why it stays float, per parameter and per layer with quantized weights, by path."""

    weights: Mapping[str, Entry | str]
    inputs: Mapping[str, Entry | str]

    def to_spec(self) -> dict[str, Any]:
        """Return the plain description that ``qsam.json`` holds."""
        return {
            "qsam_format": FORMAT,
            "weights": {name: row.to_dict() for name, row in self.weights.items() if isinstance(row, Entry)},
            "inputs": {name: row.to_dict() for name, row in self.inputs.items() if isinstance(row, Entry)},
            "float": {name: row for name, row in self.weights.items() if isinstance(row, str)},
            "float_inputs": {name: row for name, row in self.inputs.items() if isinstance(row, str)},
        }

    @classmethod
    def from_spec(cls, content: Any, where: str) -> Plan:
        """Return the plan that :meth:`to_spec` described; raise ValueError for anything else or a newer format."""
        if not isinstance(content, Mapping) or not {"qsam_format", "weights", "inputs"} <= set(content):
            raise ValueError(f"{where} is not a qsam spec: it lacks 'qsam_format', 'weights' or 'inputs'.")
        if content["qsam_format"] != FORMAT:
            raise ValueError(
                f"{where} has qsam_format {content['qsam_format']!r}; this qsam reads {FORMAT}: install a newer qsam."
            )
        for key in ("weights", "inputs", "float", "float_inputs"):
            if not isinstance(content.get(key, {}), Mapping):
                raise ValueError(f"{where} is not a qsam spec: its {key!r} must be a dict, got {content[key]!r}.")
        weights = {name: Entry.read(row, repr(name)) for name, row in content["weights"].items()}
        inputs = {name: Entry.read(row, input_of(name)) for name, row in content["inputs"].items()}
        floats = {name: str(why) for name, why in content.get("float", {}).items()}
        return cls({**floats, **weights}, {**inputs, **content.get("float_inputs", {})})


def quantizer_name(quantizer: Quantizer) -> str:
    """Return the registered name of a quantizer's class, or its class name."""
    return QUANTIZERS.name_of(type(quantizer)) or type(quantizer).__qualname__


def input_of(name: str) -> str:
    """Return "the input of 'fc'", for messages; the model itself has no name."""
    return f"the input of {repr(name) if name else 'the model itself'}"


# --- from rules -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Settings:
    """The keywords of ``quantize_`` for one weight and its module's input, and ``axis``, which only a rule may have."""

    weights: str | None = "lsq"
    bits: int = 4
    activations: str | None = "lsq"
    activation_bits: int = 8
    granularity: str = "per_tensor"
    group_size: int | None = None
    init: str = "mse"
    axis: Axis | None = None

    def __post_init__(self) -> None:
        for name in ("bits", "activation_bits"):
            try:
                integer_limits(getattr(self, name), signed=True)
            except (TypeError, ValueError) as error:
                raise type(error)(str(error).replace("`bits`", f"`{name}`")) from None
        if self.init not in INIT_RULES:
            hint = nearest(str(self.init), list(INIT_RULES))
            raise ValueError(f"`init` must be one of {', '.join(INIT_RULES)}, got {self.init!r}.{hint}")


@dataclasses.dataclass(frozen=True)
class Decision:
    """The decision for one parameter: ``settings``, or None for float, with the reason or a remark.

    Without ``input_requested`` the input of a layer that qsam does not know stays float, because the hook would
    quantize the first input whatever it is.
    """

    site: Site
    settings: Settings | None
    reason: str = ""
    input_requested: bool = False


def plan_by_rules(model: nn.Module, call: Settings, rules: Rules | None) -> Plan:
    """Return the plan that follows from :func:`decisions_by_rules`, whose arguments and errors it shares."""
    choices = decisions_by_rules(model, call, rules)
    weights = {choice.site.name: _plan_weight(choice) for choice in choices}
    return Plan(weights, dict(_plan_inputs(choices, never_called(model))))


def decisions_by_rules(model: nn.Module, call: Settings, rules: Rules | None) -> list[Decision]:
    """Decide for every parameter by the first rule that matches, or else by the default policy."""
    checked = _checked_rules(rules, call)
    sites = find_sites(model)
    boundary, aside = boundary_modules(model), set_aside(model)
    used = [False] * len(checked)
    choices = []
    for site in sites:
        if unquantizable := _cannot_be_quantized(site):
            choices.append(Decision(site, None, unquantizable))
            continue
        hits = [i for i, (selector, _) in enumerate(checked) if _matches(selector, site)]
        for i in hits:
            used[i] = True
        rule = checked[hits[0]] if hits else None
        choices.append(_by_default(site, call, boundary, aside) if rule is None else _by_rule(site, call, rule[1]))
    for (selector, _), was_used in zip(checked, used, strict=True):
        if not was_used:
            raise ValueError(_no_match(selector, sites))
    return choices


def _cannot_be_quantized(site: Site) -> str:
    if site.parameter.dim() < 2:
        return "fewer than two dimensions"
    return "" if site.parameter.is_floating_point() else f"not floating ({site.parameter.dtype})"


def _by_rule(site: Site, call: Settings, overrides: Mapping[str, Any] | None) -> Decision:
    if overrides is None:
        return Decision(site, None, "a rule keeps it float")
    return Decision(site, dataclasses.replace(call, **overrides), input_requested="activations" in overrides)


def _by_default(site: Site, call: Settings, boundary: Mapping[int, str], aside: Mapping[int, str]) -> Decision:
    if any(isinstance(module, nn.Embedding | nn.EmbeddingBag) for _, module, _ in site.owners()):
        return Decision(site, None, ", ".join(["embedding", *site.ties]))
    if is_lora(site.name):
        return Decision(site, None, "LoRA factor")
    if all(id(module) in aside for _, module, _ in site.owners()):
        return Decision(site, None, aside[id(site.module)])
    if channel_axis(site.module, site.attr) is None:
        return Decision(site, None, f"{NO_DEFAULT} of {type(site.module).__name__}: name it in `rules`")
    role = next((boundary[id(module)] for _, module, _ in site.owners() if id(module) in boundary), None)
    if role is None:
        return Decision(site, call)
    wide = dataclasses.replace(
        call, bits=max(call.bits, BOUNDARY_BITS), activation_bits=max(call.activation_bits, BOUNDARY_BITS)
    )
    return Decision(site, wide, role)


NO_DEFAULT = "no default for a parameter"
"""The start of the reason if the policy leaves a matrix in float because it does not know its layer."""


def _plan_weight(choice: Decision) -> Entry | str:
    site, settings = choice.site, choice.settings
    if settings is None:
        return choice.reason
    if settings.weights is None:
        return "weights=None"
    reason = "; ".join([choice.reason, *site.ties] if choice.reason else site.ties)
    shape = tuple(site.parameter.shape)
    return Entry(
        settings.weights, settings.bits, True, settings.granularity, _axis(site, settings), settings.group_size,
        settings.init, reason=reason, shape=shape,
    )  # fmt: skip


def _axis(site: Site, settings: Settings) -> Axis:
    """Return the channel dimensions: the rule's, else the layer's, else the first."""
    given = settings.axis
    if given is None:
        return channel_axis(site.module, site.attr) or 0
    axes = given if isinstance(given, tuple) else (given,)
    if any(isinstance(axis, bool) or not isinstance(axis, int) for axis in axes) or not axes:
        raise TypeError(f"{site.name!r}: `axis` must be an integer or a tuple of integers, got {given!r}.")
    dims = site.parameter.dim()
    found = sorted({axis % dims for axis in axes if -dims <= axis < dims})
    if len(found) != len(axes) or len(found) == dims:
        raise ValueError(
            f"{site.name!r}: `axis` must name different dimensions of the shape {tuple(site.parameter.shape)} and "
            f"leave one over, whose entries share a scale, got {given!r}."
        )
    if settings.granularity == "per_tensor" and settings.weights != "per_channel":
        raise ValueError(
            f"{site.name!r}: `axis` needs granularity 'per_channel' or 'per_group' in the same rule or in the call; "
            "with 'per_tensor' all channels share one scale."
        )
    return found[0] if len(found) == 1 else tuple(found)


def _plan_inputs(choices: Sequence[Decision], dead: Mapping[int, str]) -> Iterator[tuple[str, Entry | str]]:
    """Yield one row per module that uses a quantized weight; a tied weight has several."""
    seen: set[int] = set()
    for choice in choices:
        for name, module, attr in choice.site.owners() if choice.settings is not None else ():
            if id(module) not in seen:
                seen.add(id(module))
                yield name, _plan_input(choice, module, attr, dead)


def _plan_input(choice: Decision, module: nn.Module, attr: str, dead: Mapping[int, str]) -> Entry | str:
    settings = choice.settings
    assert settings is not None
    if settings.activations is None:
        return "activations=None"
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return "its input is indices"
    if id(module) in dead:
        return dead[id(module)]
    if channel_axis(module, attr) is None and not choice.input_requested:
        return f"the input of {type(module).__name__} is quantized on request: set `activations` in the rule"
    reason = "the hidden states stay float" if isinstance(module, nn.RNNBase | nn.RNNCellBase) else ""
    reason = f"shares {choice.site.name}" if module is not choice.site.module else reason
    return Entry(
        settings.activations, settings.activation_bits, None, "per_tensor", None, None, settings.init, reason=reason
    )


def _matches(selector: Selector, site: Site) -> bool:
    for module_name, module, attr in site.owners():
        names = (module_name, path_of(module_name, attr))
        if isinstance(selector, str) and selector.startswith("re:"):
            hit = any(re.search(selector[3:], name) for name in names)
        elif isinstance(selector, str):
            hit = any(fnmatch.fnmatchcase(name, selector) for name in names)
        elif isinstance(selector, type):
            hit = isinstance(module, selector)
        else:
            hit = bool(selector(module_name, module))
        if hit:
            return True
    return False


def _checked_rules(rules: Rules | None, call: Settings) -> list[tuple[Selector, Mapping[str, Any] | None]]:
    form = "`rules` must be a sequence of pairs (selector, overrides)"
    if isinstance(rules, str | Mapping) or not isinstance(rules or (), Sequence):
        raise TypeError(f"{form}, got {rules!r}.")
    checked = []
    for rule in rules or ():
        if not isinstance(rule, tuple | list) or len(rule) != 2:
            raise TypeError(f"{form}, got {rule!r} in it.")
        selector, overrides = rule
        _check_selector(selector)
        _check_overrides(overrides)
        try:
            dataclasses.replace(call, **(overrides or {}))
        except (TypeError, ValueError) as error:
            raise type(error)(f"in the rule {_shown(selector)}: {error}") from error
        checked.append((selector, overrides))
    return checked


def _check_selector(selector: Any) -> None:
    is_module_type = isinstance(selector, type) and issubclass(selector, nn.Module)
    is_predicate = callable(selector) and not isinstance(selector, type | nn.Module)
    if not (isinstance(selector, str) or is_module_type or is_predicate):
        raise TypeError(
            "a rule's selector must be a glob, 're:...', a module type or a predicate (name, module) -> bool, "
            f"got {selector!r}."
        )
    if isinstance(selector, str) and selector.startswith("re:"):
        try:
            re.compile(selector[3:])
        except re.error as error:
            raise ValueError(f"the rule {selector!r} is not a regular expression: {error}.") from error


def _check_overrides(overrides: Any) -> None:
    if overrides is None:
        return
    if not isinstance(overrides, Mapping):
        raise TypeError(
            f"a rule's overrides must be None (float) or a dict of quantize_'s keywords, got {overrides!r}."
        )
    known = [field.name for field in dataclasses.fields(Settings)]
    for key in overrides:
        if key not in known:
            raise TypeError(f"a rule cannot override {key!r}.{nearest(str(key), known) or f' Known: {known}.'}")


def _no_match(selector: Selector, sites: Sequence[Site]) -> str:
    names = [site.name for site in sites if site.parameter.dim() >= 2]
    hint = nearest(selector, names) if isinstance(selector, str) else ""
    listed = f" There are: {', '.join(names[:8])}{', ...' if len(names) > 8 else '.'}"
    return f"the rule {_shown(selector)} matches no parameter of two or more dimensions.{hint or listed}"


def _shown(selector: Selector) -> str:
    """Return a selector for a message: a type or a function by its name, without an address."""
    return repr(selector) if isinstance(selector, str) else getattr(selector, "__name__", repr(selector))


# --- files ----------------------------------------------------------------------------------------------------------


def read_spec(spec: str | os.PathLike[str] | Mapping[str, Any]) -> tuple[Plan, dict[str, Tensor] | None]:
    """Return the plan of a file, a folder or a dict, and the quantizers' tensors by name (None for a dict)."""
    if isinstance(spec, Mapping):
        return Plan.from_spec(spec, "the given spec"), None
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
    plan = Plan.from_spec(content, repr(str(path)))
    return plan, _read_tensors(path.with_name(TENSORS_NAME), content)


def _read_tensors(path: Path, content: Mapping[str, Any]) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"{str(path)!r}, the scales that belong to {SPEC_NAME}, is missing: copy both files.")
    packed = path.read_bytes()
    if hashlib.sha256(packed).hexdigest() != content.get(_DIGEST):
        raise ValueError(f"{str(path)!r} was not saved with the {SPEC_NAME} beside it: save again, or copy both files.")
    return safetensors.torch.load(packed)


def write_spec(
    folder: Path,
    plan: Plan,
    tensors: Mapping[str, Tensor],
    more: Callable[[dict[str, Any]], Mapping[str, Any]] = lambda _: {},
) -> Path:
    """Write ``qsam.json`` and ``qsam.safetensors``; return the path of the first.

    ``more`` is given the content of ``qsam.json`` and returns what else it shall hold.

    Each file is written under another name and then renamed, so that an interruption leaves no incomplete file. The
    first holds a digest of the second, so that files of different saves are refused.
    """
    folder.mkdir(parents=True, exist_ok=True)
    own = {key: value.detach().contiguous().clone() for key, value in tensors.items()}
    packed = safetensors.torch.save(own, metadata={"qsam_format": str(FORMAT)})
    content = {**plan.to_spec(), _DIGEST: hashlib.sha256(packed).hexdigest()}
    _replace(folder / TENSORS_NAME, packed)
    _replace(folder / SPEC_NAME, json.dumps({**content, **more(content)}, indent=1).encode())
    return folder / SPEC_NAME


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
