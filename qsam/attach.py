"""Attach quantizers to a model, set their scales, and take them off again.

No weight is touched here but by :func:`write_` and, given an optimizer, :func:`dequantize_`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qsam.coverage import Coverage, Input, Weight, owner_of, read_spec
from qsam.inputs import NAME as INPUT_NAME
from qsam.inputs import attach_input_, collecting, detach_input_
from qsam.policy import Choice, Rules, Settings, Site, channel_axis, choose, find_sites, unwrap_model
from qsam.quantizers import QUANTIZERS, Quantizer

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
        RuntimeError: the model is quantized already.

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
    if spec is not None:
        return _rebuild_(root, spec)
    call = Settings(weights, bits, activations, activation_bits, granularity, group_size, init)
    choices = choose(root, call, rules)
    coverage = _plan(choices)
    if not coverage.quantized and not any(row.quantizer for row in coverage.inputs):
        raise ValueError("nothing was quantized: no layer that qsam knows, or every one is kept float. Name some in `rules`.")
    return _attach_(root, coverage)


@torch.no_grad()
def calibrate(model: nn.Module, batches: Iterable[Any]) -> None:
    """Set the scales (and signs) of the input quantizers from data, in eval mode and without gradient.

    Args:
        model: A model that :func:`quantize_` has been called on.
        batches: Inputs: a dict is called as ``model(**batch)``, a tuple or list as ``model(*batch)``, anything else
            as ``model(batch)``.

    Raises:
        RuntimeError: the model is not quantized, or an input was reached by no batch.
        ValueError: there was no batch, or its data is not finite.
    """
    coverage = _require(unwrap_model(model), "calibrate")
    rows = [row for row in coverage.inputs if row.quantizer is not None]
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    count = 0
    try:
        with collecting([row.quantizer for row in rows if row.quantizer is not None]):
            for batch in batches:
                _call(model, batch)
                count += 1
    finally:
        for module, training in modes:
            module.training = training
    if count == 0:
        raise ValueError("`batches` is empty: calibrate needs at least one batch.")
    missed = [row.name for row in rows if row.quantizer is not None and not row.quantizer.calibrated]
    if missed:
        raise RuntimeError(f"no batch reached the inputs of {missed[:5]}: give batches that use them, or keep them float in `rules`.")


@torch.no_grad()
def write_(model: nn.Module) -> None:
    """Write ``p <- Q(p)`` for every quantized weight: post-training quantization, without an optimizer.

    Raises:
        RuntimeError: the model is not quantized, or an optimizer owns its weights (it writes them itself).
    """
    coverage = _require(unwrap_model(model), "write_")
    if owner_of(coverage) is not None:
        raise RuntimeError("an optimizer owns the weights of this model and writes them itself: write_ is for a model without one.")
    for row in coverage.quantized:
        parameter = getattr(row.module, row.attr)
        assert row.quantizer is not None
        parameter.copy_(row.quantizer(parameter))


def dequantize_(model: nn.Module, optimizer: Any | None = None) -> None:
    """Take every quantizer and hook off the model.

    Args:
        model: The model.
        optimizer: The qsam optimizer that owns its weights: its latents are put back, and it can no longer be used.
            Without it the weights stay as they are (on the grid, once they have been written).

    Raises:
        RuntimeError: the model is not quantized, or another optimizer owns its weights.
    """
    root = unwrap_model(model)
    coverage = _require(root, "dequantize_")
    if optimizer is not None:
        if owner_of(coverage) is not optimizer:
            raise RuntimeError("this optimizer does not own the model's weights: give the one that was built on it.")
        optimizer._release()
    for row in coverage.quantized:
        delattr(row.module, f"{row.attr}_quantizer")
    for entry in coverage.inputs:
        if entry.quantizer is not None:
            detach_input_(entry.module)
    delattr(root, _MARK)


def coverage_of(model: nn.Module) -> Coverage | None:
    """Return the coverage of a quantized model (also one below a wrapper), or None."""
    return next((vars(module)[_MARK] for module in model.modules() if _MARK in vars(module)), None)


def _require(root: nn.Module, caller: str) -> Coverage:
    coverage = coverage_of(root)
    if coverage is None:
        raise RuntimeError(f"{caller} needs a quantized model: call qsam.quantize_(model) first.")
    return coverage


def _call(model: nn.Module, batch: Any) -> None:
    if isinstance(batch, Mapping):
        model(**batch)
    elif isinstance(batch, tuple | list):
        model(*batch)
    else:
        model(batch)


def _plan(choices: list[Choice]) -> Coverage:
    """Build every quantizer before anything is attached, so that an error leaves the model as it was."""
    return Coverage(
        tuple(_plan_weight(choice) for choice in choices),
        tuple(_plan_inputs(choices)),
    )


def _plan_weight(choice: Choice) -> Weight:
    site, settings = choice.site, choice.settings
    quantizer = None
    reason = choice.reason
    if settings is not None and settings.weights is None:
        reason = "weights=None"
    elif settings is not None:
        quantizer = _weight_quantizer(site, settings)
        reason = "; ".join(filter(None, [reason, *(f"tied to {name}" for name, _, _ in site.aliases)]))
    return Weight(site.name, tuple(site.parameter.shape), quantizer, reason, site.module, site.attr)


def _weight_quantizer(site: Site, settings: Settings) -> Quantizer:
    _check_owner(site.module, site.name, f"{site.attr}_quantizer")
    if site.parameter.is_meta:
        raise ValueError(f"{site.name!r} is on the meta device: materialize the model before quantize_.")
    axis = channel_axis(site.module, site.attr)
    quantizer = _build(
        settings.weights, site.name, settings.init, bits=settings.bits, signed=True,
        granularity=settings.granularity, axis=0 if axis is None else axis, group_size=settings.group_size,
    )  # fmt: skip
    try:
        quantizer.to(site.parameter.device).observe_(site.parameter.detach())
    except ValueError as error:
        raise ValueError(f"{site.name!r}: {error}") from error
    # The optimizer alone uses a weight's scale; DDP would wait for its gradient.
    return quantizer.requires_grad_(False)


def _plan_inputs(choices: list[Choice]) -> list[Input]:
    dead = {id(c.site.module.out_proj) for c in choices if isinstance(c.site.module, nn.MultiheadAttention)}
    rows: dict[int, Input] = {}
    for choice in choices:
        site, settings = choice.site, choice.settings
        if settings is None or id(site.module) in rows:
            continue
        quantizer, reason = None, ""
        if settings.activations is None:
            reason = "activations=None"
        elif isinstance(site.module, nn.Embedding | nn.EmbeddingBag):
            reason = "indices"
        elif id(site.module) in dead:
            reason = "weights only: MultiheadAttention never calls its out_proj as a module"
        elif not choice.input_allowed:
            reason = f"the input of {type(site.module).__name__} is quantized on request: set `activations` in the rule"
        else:
            quantizer = _input_quantizer(site, settings)
        rows[id(site.module)] = Input(site.module_name, quantizer, reason, site.module)
    return list(rows.values())


def _input_quantizer(site: Site, settings: Settings) -> Quantizer:
    _check_owner(site.module, site.module_name, INPUT_NAME)
    quantizer = _build(
        settings.activations, f"input of {site.module_name}", settings.init, bits=settings.activation_bits,
        signed=None, granularity="per_tensor", axis=None, group_size=None,
    )  # fmt: skip
    return quantizer.to(site.parameter.device)


def _build(name: str | None, where: str, init: str, **arguments: Any) -> Quantizer:
    if not isinstance(name, str):
        raise TypeError(f"a quantizer is a registered name or None, got {name!r} for {where!r}.")
    cls = QUANTIZERS.get(name)
    try:
        quantizer = cls(**arguments)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{where!r}: {error}") from error
    quantizer.init = init
    return quantizer


def _check_owner(module: nn.Module, where: str, name: str) -> None:
    if isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict):
        raise ValueError(
            f"{where!r} belongs to a {type(module).__name__}, which iterates its children: a quantizer there would join "
            "them. Keep it float in `rules`, or move the parameter to a module of its own."
        )
    if hasattr(module, name):
        raise ValueError(f"{where!r}: its module has an attribute {name!r} already, which qsam needs: rename it.")


def _attach_(root: nn.Module, coverage: Coverage) -> Coverage:
    for row in coverage.quantized:
        row.module.add_module(f"{row.attr}_quantizer", row.quantizer)
    for entry in coverage.inputs:
        if entry.quantizer is not None:
            attach_input_(entry.module, entry.quantizer)
    setattr(root, _MARK, coverage)
    return coverage


def _rebuild_(root: nn.Module, spec: str | os.PathLike[str] | Mapping[str, Any]) -> Coverage:
    content, tensors = read_spec(spec)
    sites = {site.name: site for site in find_sites(root)}
    modules = dict(root.named_modules())
    for name in [*content["weights"], *content["inputs"]]:
        if name not in sites and name not in modules:
            raise ValueError(f"the spec names {name!r}, which this model does not have: it belongs to another model.")
    weights = []
    for name, site in sites.items():
        quantizer = None
        if (entry := content["weights"].get(name)) is not None:
            quantizer = _restore(site.module, f"{site.attr}_quantizer", name, entry, tensors, site.parameter)
            quantizer.requires_grad_(False)
        reason = content.get("float", {}).get(name, "")
        weights.append(Weight(name, tuple(site.parameter.shape), quantizer, reason, site.module, site.attr))
    inputs = []
    for name, entry in content["inputs"].items():
        device = next(modules[name].parameters()).device
        quantizer = _restore(modules[name], INPUT_NAME, name, entry, tensors, None).to(device)
        inputs.append(Input(name, quantizer, "", modules[name]))
    return _attach_(root, Coverage(tuple(weights), tuple(inputs)))


def _restore(
    module: nn.Module, attr: str, where: str, entry: Mapping[str, Any], tensors: Mapping[str, Tensor], weight: Tensor | None
) -> Quantizer:
    _check_owner(module, where, attr)
    entry = dict(entry)
    calibrated = entry.pop("calibrated")
    quantizer = _build(entry.pop("quantizer"), where, entry.pop("init"), **entry)
    if weight is not None:
        quantizer.to(weight.device).observe_(weight.detach())
    prefix = f"{where}_quantizer." if weight is not None else f"{where}.{INPUT_NAME}." if where else f"{INPUT_NAME}."
    own = {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}
    if own:
        try:
            quantizer.load_state_dict(own, strict=True)
        except RuntimeError as error:
            raise ValueError(f"the scales of {where!r} do not fit this model: {error}") from error
    quantizer.calibrated = calibrated and (bool(own) or weight is not None)
    return quantizer
