"""Which parameter gets which quantizer: the layers we know, the default policy, and the user's rules."""

from __future__ import annotations

import dataclasses
import fnmatch
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from qsam.registry import nearest

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
    """What the policy decided for a site: settings, or the reason why it stays float."""

    site: Site
    settings: Settings | None
    reason: str = ""
    input_allowed: bool = True


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


def channel_axis(module: nn.Module, attr: str) -> int | None:
    """Return the output-channel dimension of a weight of a layer we know, or None for every other parameter."""
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):
        return 0 if attr.startswith("weight_") else None
    if isinstance(module, nn.MultiheadAttention):
        return 0 if attr.endswith("proj_weight") else None
    if attr != "weight":
        return None
    if isinstance(module, _ConvTransposeNd) or is_hf_conv1d(module):
        return 1
    return 0 if isinstance(module, nn.Linear | _ConvNd) else None


def find_sites(model: nn.Module) -> list[Site]:
    """Return every parameter of the model once, in registration order, with the places that share it."""
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
        ValueError: a rule that matches nothing.
    """
    checked = [(selector, _checked_overrides(overrides)) for selector, overrides in rules or ()]
    sites = find_sites(model)
    boundary = _boundary_modules(model, sites)
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
    return choices


def _cannot_be_quantized(site: Site) -> str:
    if isinstance(site.parameter, nn.parameter.UninitializedParameter):
        raise ValueError(f"{site.name!r} is not initialized yet: run one forward of the lazy module before quantize_.")
    if site.parameter.dim() < 2:
        return "fewer than two dimensions"
    return "" if site.parameter.is_floating_point() else f"not floating ({site.parameter.dtype})"


def _by_rule(site: Site, call: Settings, overrides: Mapping[str, Any] | None) -> Choice:
    if overrides is None:
        return Choice(site, None, "a rule keeps it float")
    # The hook of an unknown layer would quantize whatever its first input is: only on request.
    known = any(channel_axis(module, attr) is not None for _, module, attr in site.owners())
    return Choice(site, dataclasses.replace(call, **overrides), input_allowed=known or "activations" in overrides)


def _by_default(site: Site, call: Settings, boundary: Mapping[int, str]) -> Choice:
    if any(isinstance(module, nn.Embedding | nn.EmbeddingBag) for _, module, _ in site.owners()):
        return Choice(site, None, "embedding" + (" (tied)" if site.aliases else ""))
    if any(part.startswith("lora_") for part in site.name.split(".")):
        return Choice(site, None, "LoRA factor")
    if channel_axis(site.module, site.attr) is None:
        return Choice(site, None, f"no default for a parameter of {type(site.module).__name__}: name it in `rules`")
    role = boundary.get(id(site.module))
    if role is None:
        return Choice(site, call)
    wide = dataclasses.replace(
        call, bits=max(call.bits, BOUNDARY_BITS), activation_bits=max(call.activation_bits, BOUNDARY_BITS)
    )
    return Choice(site, wide, role)


def _boundary_modules(model: nn.Module, sites: Sequence[Site]) -> dict[int, str]:
    """Return the ids of the modules at the model's two ends, with their role."""
    owners = [site.module for site in sites if _default_owner(site)]
    roles: dict[int, str] = {}
    if owners and isinstance(owners[0], _ConvNd):
        roles[id(owners[0])] = "input layer"
    if (head := _head(model, owners)) is not None:
        roles[id(head)] = "head"
    return roles


def _default_owner(site: Site) -> bool:
    lora = any(part.startswith("lora_") for part in site.name.split("."))
    return site.parameter.dim() >= 2 and channel_axis(site.module, site.attr) is not None and not lora


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
    return owners[-1] if len({id(owner) for owner in owners}) > 1 else None


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


def _checked_overrides(overrides: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    if overrides is None:
        return None
    if not isinstance(overrides, Mapping):
        raise TypeError(f"a rule's overrides must be None (float) or a dict of quantize_'s keywords, got {overrides!r}.")
    known = [field.name for field in dataclasses.fields(Settings)]
    for key in overrides:
        if key not in known:
            raise TypeError(f"a rule cannot override {key!r}.{nearest(key, known) or f' Known: {known}.'}")
    return overrides


def _no_match(selector: Selector, sites: Sequence[Site]) -> str:
    names = [site.name for site in sites if site.parameter.dim() >= 2]
    hint = nearest(selector, names) if isinstance(selector, str) else ""
    return f"the rule {selector!r} matches no parameter of two or more dimensions.{hint or f' There are: {names[:8]} ...'}"
