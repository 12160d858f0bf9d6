"""The layers that qsam knows: a model's parameters, their channel dimensions, and its attention modules.

Two facts are recognised by names, because nothing else in a module shows them: that it multiplies two activations
(attention), and that another module uses its weight without calling it.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence

from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

_ATTENTION_CLASS = re.compile("Attention|Attn")
_ATTENTION_NAME = re.compile(r"(^|_)(attn|attention)\d*$")


@dataclasses.dataclass(frozen=True)
class Site:
    """A parameter of the model at the path ``name``, the module that holds it, and the other holders of a tied weight.

    Attributes:
        name: The parameter's path, "layer2.0.conv1.weight".
        module_name: Path of the module that holds it.
        attr: Its name in that module.
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

    @property
    def ties(self) -> list[str]:
        """A remark for each other place of a tied weight: ["tied to lm_head"]."""
        return [f"tied to {name or 'the model itself'}" for name, _, _ in self.aliases]


def unwrap_model(model: nn.Module) -> nn.Module:
    """Return the model inside DistributedDataParallel, DataParallel and ``torch.compile`` wrappers."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and type(model).__name__ in {"DistributedDataParallel", "DataParallel"}:
            inner = getattr(model, "module", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


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
    for key, owners in places.items():
        module_name, module, attr = owners[0]
        name = path_of(module_name, attr)
        if isinstance(parameters[key], nn.parameter.UninitializedParameter):
            raise ValueError(f"{name!r} is not initialized yet: run one forward of the lazy module before quantize_.")
        sites.append(Site(name, module_name, module, attr, parameters[key], tuple(owners[1:])))
    return sites


def path_of(module_name: str, attr: str) -> str:
    """Return the path of an attribute of a module; the path of the model itself is ""."""
    return f"{module_name}.{attr}" if module_name else attr


def is_hf_conv1d(module: nn.Module) -> bool:
    """Whether this is transformers' ``Conv1D``: a linear layer with the weight as (in, out)."""
    return any(c.__name__ == "Conv1D" and c.__module__.startswith("transformers.") for c in type(module).__mro__)


def is_lora(name: str) -> bool:
    """Whether a path goes through a LoRA factor, as peft names them."""
    return any(part.startswith("lora_") for part in name.split("."))


def channel_axis(module: nn.Module, attr: str) -> int | None:
    """Return the output-channel dimension of a weight of a known layer, or None for every other parameter."""
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):
        return 0 if attr.startswith("weight_") else None
    if isinstance(module, nn.MultiheadAttention):
        return 0 if attr.endswith("proj_weight") else None
    if attr != "weight":
        return None
    if isinstance(module, _ConvTransposeNd):
        # (in, out / groups, ...): in a depthwise layer each group's outputs come from one row; dimension 1 is short
        return 0 if 1 < module.groups == module.in_channels else 1
    if is_hf_conv1d(module):
        return 1
    return 0 if isinstance(module, nn.Linear | _ConvNd) else None


def boundary_modules(model: nn.Module) -> dict[int, str]:
    """Return the ids of the modules at the model's two ends, with their role: "input layer" or "head"."""
    owners = list(_default_owners(model))
    roles: dict[int, str] = {}
    if owners and isinstance(owners[0], _ConvNd):
        roles[id(owners[0])] = "input layer"
    if (head := _head(model, owners)) is not None:
        roles[id(head)] = "head"
    return roles


def _default_owners(model: nn.Module) -> Iterator[nn.Module]:
    """Iterate over the modules whose matrices are quantized by default, including those that share a weight."""
    for name, module in model.named_modules():
        matrices = (attr for attr, p in module._parameters.items() if p is not None and p.dim() >= 2)
        if not is_lora(name) and any(channel_axis(module, attr) is not None for attr in matrices):
            yield module


def _head(model: nn.Module, owners: Sequence[nn.Module]) -> nn.Module | None:
    for getter in ("get_output_embeddings", "get_classifier"):
        try:
            head = getattr(model, getter)()
        except (AttributeError, NotImplementedError, TypeError):
            continue
        if isinstance(head, nn.Module):
            inside = {id(module) for module in head.modules()}
            return next((owner for owner in reversed(owners) if id(owner) in inside), None)
    # In a model with a single layer that layer is not the head, because the given bits are meant for it.
    return owners[-1] if len(owners) > 1 else None


def find_attention(model: nn.Module) -> tuple[str, ...]:
    """Return the paths of the modules that are attention by the name of their class or their own, innermost only.

    A module without Parameters (an attention dropout) does not count.

    Example:
        >>> find_attention(nn.TransformerEncoderLayer(8, 2, 16))
        ('self_attn',)
    """
    names = [name for name, module in model.named_modules() if _is_attention(name, module)]
    outer = {name[: match.start()] for name in names for match in re.finditer(r"\.", name)}
    return tuple(name for name in names if name not in outer and (name or len(names) == 1))


def _is_attention(name: str, module: nn.Module) -> bool:
    named = _ATTENTION_CLASS.search(type(module).__name__) or _ATTENTION_NAME.search(name.rpartition(".")[2])
    is_one = isinstance(module, nn.MultiheadAttention) or named is not None
    return is_one and not isinstance(module, nn.ModuleList) and next(module.parameters(), None) is not None


def never_called(model: nn.Module) -> dict[int, str]:
    """Return the ids of the layers that are not called in a forward, with the reason.

    A pre-hook on them never runs, so an input quantizer would never see a batch, and DistributedDataParallel would wait
    for its gradient.
    """
    reasons = set_aside(model)
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            reasons[id(module.out_proj)] = "weights only: MultiheadAttention never calls its out_proj"
        # timm's BEiT, EVA and Swin V2, with q_bias and v_bias: F.linear(x, self.qkv.weight, bias)
        elif getattr(module, "qkv_bias_separate", None) is False and getattr(module, "q_bias", None) is not None:
            reason = "weights only: timm uses the weight without calling the layer"
            reasons[id(module.qkv)] = f"{reason} (set `qkv_bias_separate = True` on its attention before quantize_)"
    return reasons


def set_aside(model: nn.Module) -> dict[int, str]:
    """Return the ids of the modules that peft keeps beside the copies of them that it trains (``modules_to_save``)."""
    reasons = {}
    for module in model.modules():
        if any(c.__name__ == "AuxiliaryTrainingWrapper" for c in type(module).__mro__):
            original = getattr(module, "original_module", None)
            inside = original.modules() if isinstance(original, nn.Module) else ()
            reasons.update({id(part): "set aside: peft uses its trained copy" for part in inside})
    return reasons
