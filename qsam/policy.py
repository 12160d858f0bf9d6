"""Which parameter gets which quantizer: the layers we know, the default policy, and the user's rules."""

from __future__ import annotations

import dataclasses
import fnmatch
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from qsam.functional import integer_limits
from qsam.registry import nearest
from qsam.scales import INIT_RULES

Selector = str | type[nn.Module] | Callable[[str, nn.Module], bool]
Rules = Sequence[tuple[Selector, Mapping[str, Any] | None]]

BOUNDARY_BITS = 8
"""Bits of an input convolution and of the head, weights and inputs, unless a rule says otherwise."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What one weight and its module's input get: the keywords of ``quantize_``."""

    weights: str | None = "lsq"
    bits: int = 4
    activations: str | None = "lsq"
    activation_bits: int = 8
    granularity: str = "per_tensor"
    group_size: int | None = None
    init: str = "mse"

    def __post_init__(self) -> None:
        """Refuse bad values before any layer is looked at; the rest is checked by the quantizers."""
        _check_bits("bits", self.bits)
        _check_bits("activation_bits", self.activation_bits)
        if self.init not in INIT_RULES:
            hint = nearest(str(self.init), list(INIT_RULES))
            raise ValueError(f"`init` must be one of {', '.join(INIT_RULES)}, got {self.init!r}.{hint}")


@dataclasses.dataclass(frozen=True)
class Site:
    """A parameter of the model, where it lives, and what else points at it.

    Attributes:
        name: The parameter's path, "layer2.0.conv1.weight".
        module_name: Its owner's path.
        module: Its owner.
        attr: Its name in the owner.
        parameter: The parameter.
        aliases: The other places of a tied weight, as (module path, module, attribute).
    """

    name: str
    module_name: str
    module: nn.Module
    attr: str
    parameter: nn.Parameter
    aliases: tuple[tuple[str, nn.Module, str], ...] = ()

    def owners(self) -> Iterator[tuple[str, nn.Module, str]]:
        """Iterate over all places of the weight, its own first."""
        yield self.module_name, self.module, self.attr
        yield from self.aliases


@dataclasses.dataclass(frozen=True)
class Choice:
    """What the policy decided for a site: settings, or the reason why it stays float.

    Attributes:
        site: The parameter.
        settings: What it gets; None for float.
        reason: Why float, or a remark ("head").
        input_requested: Whether a rule names the input's quantizer; the hook of a layer we do not know would quantize
            whatever its first input is, so that is done on request only.
    """

    site: Site
    settings: Settings | None
    reason: str = ""
    input_requested: bool = False


def unwrap_model(model: nn.Module) -> nn.Module:
    """Return the model inside DistributedDataParallel, DataParallel and ``torch.compile`` wrappers."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and type(model).__name__ in {"DistributedDataParallel", "DataParallel"}:
            inner = getattr(model, "module", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def is_hf_conv1d(module: nn.Module) -> bool:
    """Whether this is transformers' ``Conv1D``: a linear layer with the weight as (in, out)."""
    return any(c.__name__ == "Conv1D" and c.__module__.startswith("transformers.") for c in type(module).__mro__)


def is_lora(name: str) -> bool:
    """Whether a path goes through a LoRA factor, as peft names them."""
    return any(part.startswith("lora_") for part in name.split("."))


def tied(site: Site) -> list[str]:
    """Return a remark for each other place of a tied weight: ["tied to lm_head"]."""
    return [f"tied to {name or 'the model itself'}" for name, _, _ in site.aliases]


def channel_axis(module: nn.Module, attr: str) -> int | None:
    """Return the output-channel dimension of a weight of a layer we know, or None for every other parameter."""
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):
        return 0 if attr.startswith("weight_") else None
    if isinstance(module, nn.MultiheadAttention):
        return 0 if attr.endswith("proj_weight") else None
    if attr != "weight":
        return None
    if isinstance(module, _ConvTransposeNd):
        # (in, out / groups, ...): in a depthwise one all outputs of a group come from one row, and dimension 1 is short
        return 0 if 1 < module.groups == module.in_channels else 1
    if is_hf_conv1d(module):
        return 1
    return 0 if isinstance(module, nn.Linear | _ConvNd) else None


def find_sites(model: nn.Module) -> list[Site]:
    """Return every parameter of the model once, in registration order, with the places that share it.

    Raises:
        ValueError: a parameter has no shape yet (lazy modules).
    """
    places: dict[int, list[tuple[str, nn.Module, str]]] = {}
    parameters: dict[int, nn.Parameter] = {}
    for module_name, module in model.named_modules():
        for attr, parameter in module._parameters.items():
            if parameter is not None:
                places.setdefault(id(parameter), []).append((module_name, module, attr))
                parameters[id(parameter)] = parameter
    sites = []
    for key, found in places.items():
        module_name, module, attr = found[0]
        name = f"{module_name}.{attr}" if module_name else attr
        if isinstance(parameters[key], nn.parameter.UninitializedParameter):
            raise ValueError(f"{name!r} is not initialized yet: run one forward of the lazy module before quantize_.")
        sites.append(Site(name, module_name, module, attr, parameters[key], tuple(found[1:])))
    return sites


def choose(model: nn.Module, call: Settings, rules: Rules | None) -> list[Choice]:
    """Decide for every parameter: the first rule that matches, else the default policy.

    Args:
        model: The model, unwrapped.
        call: The keywords of the call.
        rules: The user's ``(selector, overrides)``, in order.

    Returns:
        One choice a parameter, in registration order.

    Raises:
        TypeError: a selector or override of the wrong kind.
        ValueError: a bad value in a rule, a rule that matches nothing, a chosen parameter without data.
    """
    checked = _checked_rules(rules, call)
    sites = find_sites(model)
    boundary = _boundary_modules(model)
    used = [False] * len(checked)
    choices = []
    for site in sites:
        if unquantizable := _cannot_be_quantized(site):
            choices.append(Choice(site, None, unquantizable))
            continue
        hits = [i for i, (selector, _) in enumerate(checked) if _matches(selector, site)]
        for i in hits:
            used[i] = True
        choices.append(_by_rule(site, call, checked[hits[0]][1]) if hits else _by_default(site, call, boundary))
    for (selector, _), was_used in zip(checked, used, strict=True):
        if not was_used:
            raise ValueError(_no_match(selector, sites))
    for choice in choices:
        if choice.settings is not None:
            refuse_meta(choice.site)
    return choices


def refuse_meta(site: Site) -> None:
    """Raise ValueError if a parameter has no data to set scales from."""
    if site.parameter.is_meta:
        raise ValueError(f"{site.name!r} is on the meta device: materialize the model before quantize_.")


def _cannot_be_quantized(site: Site) -> str:
    if site.parameter.dim() < 2:
        return "fewer than two dimensions"
    return "" if site.parameter.is_floating_point() else f"not floating ({site.parameter.dtype})"


def _by_rule(site: Site, call: Settings, overrides: Mapping[str, Any] | None) -> Choice:
    if overrides is None:
        return Choice(site, None, "a rule keeps it float")
    return Choice(site, dataclasses.replace(call, **overrides), input_requested="activations" in overrides)


def _by_default(site: Site, call: Settings, boundary: Mapping[int, str]) -> Choice:
    if any(isinstance(module, nn.Embedding | nn.EmbeddingBag) for _, module, _ in site.owners()):
        return Choice(site, None, ", ".join(["embedding", *tied(site)]))
    if is_lora(site.name):
        return Choice(site, None, "LoRA factor")
    if channel_axis(site.module, site.attr) is None:
        return Choice(site, None, f"no default for a parameter of {type(site.module).__name__}: name it in `rules`")
    role = next((boundary[id(module)] for _, module, _ in site.owners() if id(module) in boundary), None)
    if role is None:
        return Choice(site, call)
    wide = dataclasses.replace(
        call, bits=max(call.bits, BOUNDARY_BITS), activation_bits=max(call.activation_bits, BOUNDARY_BITS)
    )
    return Choice(site, wide, role)


def _boundary_modules(model: nn.Module) -> dict[int, str]:
    """Return the ids of the modules at the model's two ends, with their role."""
    owners = list(_default_owners(model))
    roles: dict[int, str] = {}
    if owners and isinstance(owners[0], _ConvNd):
        roles[id(owners[0])] = "input layer"
    if (head := _head(model, owners)) is not None:
        roles[id(head)] = "head"
    return roles


def _default_owners(model: nn.Module) -> Iterator[nn.Module]:
    """Iterate over the modules whose matrices are quantized by default, those that share another's included."""
    for name, module in model.named_modules():
        matrices = (attr for attr, p in module._parameters.items() if p is not None and p.dim() >= 2)
        if not is_lora(name) and any(channel_axis(module, attr) is not None for attr in matrices):
            yield module


def _head(model: nn.Module, owners: Sequence[nn.Module]) -> nn.Module | None:
    for getter in ("get_output_embeddings", "get_classifier"):
        try:
            found = getattr(model, getter)()
        except (AttributeError, NotImplementedError, TypeError):
            continue
        if isinstance(found, nn.Module):
            inside = {id(module) for module in found.modules()}
            return next((owner for owner in reversed(owners) if id(owner) in inside), None)
    # A model with a single layer has no head: the bits that were asked for are meant for that layer.
    return owners[-1] if len(owners) > 1 else None


def _matches(selector: Selector, site: Site) -> bool:
    for module_name, module, attr in site.owners():
        name = f"{module_name}.{attr}" if module_name else attr
        if isinstance(selector, str):
            if selector.startswith("re:"):
                hit = any(re.search(selector[3:], candidate) for candidate in (module_name, name))
            else:
                hit = any(fnmatch.fnmatchcase(candidate, selector) for candidate in (module_name, name))
        elif isinstance(selector, type):
            hit = isinstance(module, selector)
        else:
            hit = bool(selector(module_name, module))
        if hit:
            return True
    return False


def _check_bits(name: str, value: int) -> None:
    try:
        integer_limits(value, signed=True)
    except (TypeError, ValueError) as error:
        raise type(error)(str(error).replace("`bits`", f"`{name}`")) from None


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
    """Return a selector as it may stand in a message: a type or a function by its name, without an address."""
    return repr(selector) if isinstance(selector, str) else getattr(selector, "__name__", repr(selector))
