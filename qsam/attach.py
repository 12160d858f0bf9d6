"""Attach quantizers to a model, set their scales, and take them off again.

No weight is touched here but by :func:`write_` and, given an optimizer, :func:`dequantize_`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qsam.attention import find_attention, never_called
from qsam.batches import fresh_norms_by_batch, in_eval_mode, refuse_empty, require_batches, run_each
from qsam.coverage import Coverage, Input, Weight, owner_of, read_spec, set_owner
from qsam.inputs import NAME as INPUT_NAME
from qsam.inputs import (
    Place,
    attach_input_,
    batch_first_of,
    collecting,
    data_parallel_group,
    detach_input_,
    is_sharded,
    shown,
)
from qsam.policy import (
    Choice,
    Rules,
    Settings,
    Site,
    channel_axis,
    choose,
    find_sites,
    refuse_meta,
    tied,
    unwrap_model,
)
from qsam.quantizers import Quantizer, build_quantizer
from qsam.quantizers.base import LIMITS

_MARK = "_qsam_coverage"


def quantize_(
    model: nn.Module,
    *,
    weights: str | None = "lsq",
    bits: int = 4,
    activations: str | None = "lsq",
    activation_bits: int = 8,
    granularity: str = "per_tensor",
    group_size: int | None = None,
    init: str = "mse",
    rules: Rules | None = None,
    spec: str | os.PathLike[str] | Mapping[str, Any] | None = None,
) -> Coverage:
    """Give the model its quantizers and set the weights' scales from the float weights. Changes no weight.

    A weight ``X`` gets the submodule ``X_quantizer`` in its owner; a layer's input gets ``input_quantizer``, whose
    scale is an ordinary trainable Parameter, set by :func:`calibrate` or by the first forward in training mode.

    By default the matrices of Linear, Conv, ConvTranspose, Hugging Face Conv1D, MultiheadAttention and recurrent
    layers are quantized; an input convolution and the head get 8 bits; embeddings, norms, biases, position tables
    and LoRA factors stay float. The result lists every one of them with its reason.

    Graphs that ``torch.compile`` made before are dropped, for they would not see the hooks. ``torch.jit.script`` does
    not take a model with these hooks; ``torch.export`` does.

    Args:
        model: Any module; its Parameters keep identity, address and name.
        weights: A registered quantizer for the weights, or None for float.
        bits: Bits of the weights, in [2, 8].
        activations: A registered quantizer for the inputs of the quantized layers (per tensor), or None for float.
        activation_bits: Bits of these inputs, in [2, 8].
        granularity: ``"per_tensor"``, ``"per_channel"`` or ``"per_group"``: which weights share a scale.
        group_size: For ``"per_group"``: consecutive entries of the flattened non-channel dimensions that share a
            scale; must divide their number.
        init: Rule of the initial scales: ``"mse"``, ``"lsq"``, ``"absmax"`` or ``"percentile"``.
        rules: Ordered ``(selector, overrides)``, tried before the default policy; the first match wins. Selector: a
            glob or ``"re:..."`` on module or parameter names, a module type, or a predicate
            ``(module name, module) -> bool``. Overrides: None (float) or a dict of the keywords above, ``{}``
            meaning the call's own, embeddings and head included.
        spec: A ``qsam.json``, its folder, or ``Coverage.to_spec()``: rebuild exactly these quantizers, scales
            included, and ignore the other arguments.

    Returns:
        What was quantized, what was not and why.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: a bad value, a rule that matches nothing, nothing to quantize, a name that is taken.
        RuntimeError: the model is quantized, sharded or in DistributedDataParallel already.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> coverage = quantize_(model, bits=2)
        >>> [(row.name, row.quantizer.bits) for row in coverage.quantized], round(coverage.share, 3)
        ([('0.weight', 2), ('2.weight', 8)], 0.906)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be a torch.nn.Module, got {type(model).__name__}.")
    root = unwrap_model(model)
    if coverage_of(root) is not None:
        raise RuntimeError("the model is quantized already: call qsam.dequantize_(model, optimizer) first.")
    if is_sharded(root.modules()):
        raise RuntimeError("the model is sharded already: call quantize_ before fully_shard.")
    if data_parallel_group(model) is not None:
        raise RuntimeError(
            "the model is in DistributedDataParallel already, which would not know of the new scales: call quantize_ "
            "before that."
        )
    if spec is not None:
        return _attach_(root, _rebuilt(root, spec))
    call = Settings(weights, bits, activations, activation_bits, granularity, group_size, init)
    return _attach_(root, _plan(root, choose(root, call, rules)))


@torch.no_grad()
def calibrate(model: nn.Module, batches: Iterable[Any]) -> None:
    """Set the scales (and signs) of the input quantizers from data, in eval mode and without gradient.

    Args:
        model: A model that :func:`quantize_` has been called on. Given a DistributedDataParallel model, every process
            calls this with batches of its own, and all get the same scales.
        batches: Inputs: a dict is called as ``model(**batch)``, a tuple or list as ``model(*batch)``, anything else
            as ``model(batch)``.

    Raises:
        TypeError: no module, or batches that cannot be iterated over.
        RuntimeError: the model is not quantized, is sharded already, or no batch reached an input that has no scale.
        ValueError: there was no batch, or an input is not finite.
    """
    coverage = _require(model, "calibrate")
    require_batches(batches)
    if is_sharded(model.modules()):
        raise RuntimeError("the model is sharded already, and its scales with it: call calibrate before fully_shard.")
    quantizers = {row.name: row.quantizer for row in coverage.inputs if row.quantizer is not None}
    with (
        in_eval_mode(model) as plain,
        fresh_norms_by_batch(plain),
        collecting(list(quantizers.values()), data_parallel_group(model)) as reached,
    ):
        count = run_each(plain, batches)
    refuse_empty(count, "calibrate")
    if missed := [shown(name) for name, q in quantizers.items() if not q.calibrated and q not in reached]:
        raise RuntimeError(
            f"no batch reached the input of {', '.join(missed[:5])}{', ...' if len(missed) > 5 else ''}: give batches "
            "that use it (a PackedSequence passes as float), or set activations=None for it in `rules`."
        )


@torch.no_grad()
def write_(model: nn.Module) -> None:
    """Write ``p <- Q(p)`` for every quantized weight: post-training quantization, without an optimizer.

    Raises:
        RuntimeError: the model is not quantized, or an optimizer owns its weights (it writes them itself).
        ValueError: an fp16 Parameter cannot hold its quantized values; nothing has been written then.
    """
    coverage = _require(model, "write_")
    if owner_of(coverage) is not None:
        raise RuntimeError(
            "an optimizer owns the weights of this model and writes them itself: write_ is for a model without one."
        )
    for row in coverage.quantized:
        assert row.quantizer is not None
        row.quantizer.settle_(getattr(row.module, row.attr))
        refuse_overflow(row.name, getattr(row.module, row.attr), row.quantizer)
    for row in coverage.quantized:
        assert row.quantizer is not None
        parameter = getattr(row.module, row.attr)
        parameter.copy_(row.quantizer(parameter))


@torch.no_grad()
def refuse_overflow(name: str, parameter: Tensor, quantizer: Quantizer, weight: Tensor | None = None) -> None:
    """Raise ValueError if a Parameter is fp16 and its quantized values are not: the rounded-up ones are infinity.

    Args:
        name: Its path, for the message.
        parameter: Where Q(w) will be written.
        quantizer: Q.
        weight: w; None where the Parameter holds it.
    """
    if parameter.dtype != torch.float16:
        return
    wide = quantizer(parameter.float() if weight is None else weight)
    if bool((torch.isinf(wide.to(parameter.dtype)) & torch.isfinite(wide)).any()):
        raise ValueError(
            f"{name!r} is fp16, which ends at 65504, and its quantized values reach {float(wide.abs().max()):.4g}: "
            "keep the parameters in fp32 under autocast, or use bf16."
        )


def dequantize_(model: nn.Module, optimizer: Any | None = None) -> None:
    """Take every quantizer and hook off the model.

    Args:
        model: The model.
        optimizer: The qsam optimizer that owns its weights: its latents are put back, and it can no longer be used.
            Without it the weights stay as they are (on the grid, once they have been written).

    Raises:
        RuntimeError: the model is not quantized, another optimizer owns its weights, or the owner is inside a block.
    """
    coverage = _require(model, "dequantize_")
    owner = owner_of(coverage)
    if owner is not None:
        owner._refuse_inside_block("dequantize_")
    if optimizer is not None:
        if owner is None or owner is not optimizer:
            raise RuntimeError("this optimizer does not own the model's weights: give the one that was built on it.")
        owner._release()
    for row in coverage.quantized:
        delattr(row.module, f"{row.attr}_quantizer")
    for entry in coverage.inputs:
        if entry.quantizer is not None:
            detach_input_(entry.module)
    set_owner(coverage, None)
    for holder in _holders(model):
        delattr(holder, _MARK)
    _forget_compiled()


def coverage_of(model: nn.Module) -> Coverage | None:
    """Return the coverage of a quantized model (also of one inside it), or None.

    Raises:
        RuntimeError: two parts of the model were quantized apart.
    """
    found = [vars(holder)[_MARK] for holder in _holders(model)]
    if len(found) > 1:
        raise RuntimeError(
            f"{len(found)} parts of the model were quantized apart: call qsam.dequantize_ on each of them, then "
            "qsam.quantize_ on the whole model."
        )
    return found[0] if found else None


def _holders(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if _MARK in vars(module)]


def _require(model: nn.Module, caller: str) -> Coverage:
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be a torch.nn.Module, got {type(model).__name__}.")
    coverage = coverage_of(model)
    if coverage is None:
        raise RuntimeError(f"{caller} needs a quantized model: call qsam.quantize_(model) first.")
    return coverage


def _plan(root: nn.Module, choices: list[Choice]) -> Coverage:
    """Build every quantizer before anything is attached, so that an error leaves the model as it was."""
    weights = tuple(_plan_weight(choice) for choice in choices)
    inputs = tuple(_plan_inputs(choices, never_called(root)))
    return _not_empty(Coverage(weights, inputs, find_attention(root)))


def _not_empty(coverage: Coverage) -> Coverage:
    if not coverage.quantizers:
        raise ValueError(
            "nothing was quantized: no layer that qsam knows, or every one is kept float. Name some in `rules`."
        )
    return coverage


def _plan_weight(choice: Choice) -> Weight:
    site, settings = choice.site, choice.settings
    quantizer = None
    reason = choice.reason
    if settings is not None and settings.weights is None:
        reason = "weights=None"
    elif settings is not None:
        quantizer = _weight_quantizer(site, settings)
        reason = "; ".join([reason, *tied(site)] if reason else tied(site))
    return Weight(site.name, tuple(site.parameter.shape), quantizer, reason, site.module, site.attr)


def _weight_quantizer(site: Site, settings: Settings) -> Quantizer:
    _check_owner(site.module, site.name, f"{site.attr}_quantizer")
    axis = channel_axis(site.module, site.attr)
    quantizer = _build(
        settings.weights, repr(site.name), settings.init, bits=settings.bits, signed=True,
        granularity=settings.granularity, axis=0 if axis is None else axis, group_size=settings.group_size,
    )  # fmt: skip
    return _observed(quantizer, site)


def _observed(quantizer: Quantizer, site: Site) -> Quantizer:
    try:
        quantizer.to(site.parameter.device).init_weight_(site.parameter.detach())
    except ValueError as error:
        raise ValueError(f"{site.name!r}: {error}") from error
    # The optimizer alone uses a weight's scale; DDP would wait for its gradient.
    return quantizer.requires_grad_(False)


def _plan_inputs(choices: list[Choice], dead: Mapping[int, str]) -> Iterator[Input]:
    """Yield one row for each module that uses a chosen weight: a tied one has several."""
    seen: set[int] = set()
    for choice in (choice for choice in choices if choice.settings is not None):
        for name, module, attr in choice.site.owners():
            if id(module) not in seen:
                seen.add(id(module))
                reason = _input_reason(choice, module, attr, dead)
                quantizer = None if reason else _input_quantizer(choice, name, module)
                yield Input(name, quantizer, reason or _input_remark(choice, module), module)


def _input_reason(choice: Choice, module: nn.Module, attr: str, dead: Mapping[int, str]) -> str:
    """Return why a module's input stays float, or an empty string."""
    assert choice.settings is not None
    if choice.settings.activations is None:
        return "activations=None"
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return "its input is indices"
    if id(module) in dead:
        return dead[id(module)]
    if channel_axis(module, attr) is None and not choice.input_requested:
        return f"the input of {type(module).__name__} is quantized on request: set `activations` in the rule"
    return ""


def _input_remark(choice: Choice, module: nn.Module) -> str:
    if module is not choice.site.module:
        return f"shares {choice.site.name}"
    return "the hidden states stay float" if isinstance(module, nn.RNNBase | nn.RNNCellBase) else ""


def _input_quantizer(choice: Choice, name: str, module: nn.Module) -> Quantizer:
    settings = choice.settings
    assert settings is not None
    where = f"the input of {shown(name)}"
    _check_owner(module, name, INPUT_NAME)
    quantizer = _build(
        settings.activations, where, settings.init, " Inputs are quantized per tensor: name another in `activations`.",
        bits=settings.activation_bits, signed=None, granularity="per_tensor", axis=None, group_size=None,
    )  # fmt: skip
    return quantizer.to(choice.site.parameter.device)


def _build(name: str | None, where: str, init: str, cure: str = "", **arguments: Any) -> Quantizer:
    if not isinstance(name, str):
        raise TypeError(f"{where}: a quantizer is a registered name or None, got {name!r}.")
    try:
        quantizer = build_quantizer(name, **arguments)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{where}: {error}{cure}") from error
    quantizer.init = init
    return quantizer


def _check_owner(module: nn.Module, where: str, name: str) -> None:
    if isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict):
        raise ValueError(
            f"{where!r} belongs to a {type(module).__name__}, which iterates its children: a quantizer there would "
            "join them. Keep it float in `rules`, or move the parameter to a module of its own."
        )
    if isinstance(getattr(module, name, None), Quantizer):
        raise RuntimeError(
            f"{where!r} is quantized already, as a part of a larger model: call qsam.dequantize_ on that."
        )
    if hasattr(module, name):
        raise ValueError(f"{where!r}: its module has an attribute {name!r} already, which qsam needs: rename it.")


def _attach_(root: nn.Module, coverage: Coverage) -> Coverage:
    for row in coverage.quantized:
        row.module.add_module(f"{row.attr}_quantizer", row.quantizer)
    said: set[str] = set()
    for entry in coverage.inputs:
        if entry.quantizer is not None:
            entry.quantizer.batch_first = batch_first_of(root, entry.name)
            attach_input_(entry.module, entry.quantizer, Place(entry.name, said))
    setattr(root, _MARK, coverage)
    _forget_compiled()
    return coverage


def _forget_compiled() -> None:
    """Drop compiled graphs: torch does not guard hooks, and would run the old graph of this code without them."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def _rebuilt(root: nn.Module, spec: str | os.PathLike[str] | Mapping[str, Any]) -> Coverage:
    """Build the quantizers of a spec; without its scales, those of the weights are set from the weights."""
    content, tensors = read_spec(spec)
    sites = {site.name: site for site in find_sites(root)}
    modules = dict(root.named_modules())
    _check_names(content, sites, modules)
    floats = {**dict.fromkeys(sites, "not in the spec"), **content.get("float", {})}
    weights = [_rebuilt_weight(site, content["weights"].get(name), floats) for name, site in sites.items()]
    inputs = [_rebuilt_input(name, modules[name], entry) for name, entry in content["inputs"].items()]
    inputs += [Input(name, None, why, modules[name]) for name, why in content.get("float_inputs", {}).items()]
    coverage = _not_empty(Coverage(tuple(weights), tuple(inputs), find_attention(root)))
    for path, quantizer in coverage.quantizers.items():
        if tensors is not None:
            _load_scales(quantizer, path, tensors)
    for row in inputs:
        # A dict holds no scales: a state_dict that is loaded next does. A file holds `limits`, if it is not an old one.
        if row.quantizer is not None and (tensors is not None or set(row.quantizer.state_dict()) == {LIMITS}):
            entry = content["inputs"][row.name]
            if f"{row.name}.{INPUT_NAME}.{LIMITS}".lstrip(".") not in (tensors or {}):
                row.quantizer.set_sign_(entry["signed"] if entry["calibrated"] else None)
    return coverage


def _check_names(content: Mapping[str, Any], sites: Mapping[str, Site], modules: Mapping[str, nn.Module]) -> None:
    unknown = [name for name in content["weights"] if name not in sites]
    unknown += [name for name in (*content["inputs"], *content.get("float_inputs", {})) if name not in modules]
    if unknown:
        raise ValueError(f"the spec names {unknown[0]!r}, which this model does not have: it belongs to another model.")
    for name, entry in content["weights"].items():
        shape = list(sites[name].parameter.shape)
        if isinstance(entry, Mapping) and entry.get("shape", shape) != shape:
            raise ValueError(
                f"{name!r} has shape {shape}, the spec's has {entry['shape']}: it belongs to another model."
            )


def _rebuilt_weight(site: Site, entry: Mapping[str, Any] | None, floats: Mapping[str, str]) -> Weight:
    quantizer, reason = None, floats[site.name]
    if entry is not None:
        refuse_meta(site)
        _check_owner(site.module, site.name, f"{site.attr}_quantizer")
        quantizer, reason = _observed(_from_entry(entry, repr(site.name)), site), entry.get("reason", "")
    return Weight(site.name, tuple(site.parameter.shape), quantizer, reason, site.module, site.attr)


def _rebuilt_input(name: str, module: nn.Module, entry: Mapping[str, Any]) -> Input:
    _check_owner(module, name, INPUT_NAME)
    quantizer = _from_entry(entry, f"the input of {shown(name)}").to(next(module.parameters()).device)
    return Input(name, quantizer, entry.get("reason", ""), module)


def _from_entry(entry: Mapping[str, Any], where: str) -> Quantizer:
    arguments = ("bits", "signed", "granularity", "axis", "group_size")
    if not isinstance(entry, Mapping):
        raise ValueError(f"{where}: its entry in the spec must be a dict, got {entry!r}.")
    for key in (*arguments, "quantizer", "init", "calibrated"):
        if key not in entry:
            raise ValueError(f"{where}: its entry in the spec lacks {key!r}.")
    return _build(entry["quantizer"], where, entry["init"], **{key: entry[key] for key in arguments})


def _load_scales(quantizer: Quantizer, path: str, tensors: Mapping[str, Tensor]) -> None:
    own = {key.removeprefix(f"{path}."): value for key, value in tensors.items() if key.startswith(f"{path}.")}
    try:
        quantizer.load_state_dict(own)
    except RuntimeError as error:
        raise ValueError(f"the scales of {path!r} do not fit this model: {error}") from error
