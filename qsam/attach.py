"""Attach quantizers to a model, set their scales, and take them off again.

Only :func:`write_` and, given an optimizer, :func:`dequantize_` change weights.
"""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qsam.batches import fresh_norms_by_batch, in_eval_mode, refuse_empty, require_batches, run_each
from qsam.coverage import (
    Coverage,
    Input,
    Weight,
    attached,
    coverage_of,
    float_matrices_warning,
    owner_of,
    record_,
    refuse_unrecorded,
    require_coverage,
    set_owner,
)
from qsam.distributed import local
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
from qsam.layers import Site, find_attention, find_sites, path_of, unwrap_model
from qsam.plan import Entry, Plan, Rules, Settings, input_of, plan_by_rules, read_spec
from qsam.quantizers import Quantizer, build_quantizer
from qsam.quantizers.base import LIMITS


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

    Graphs that ``torch.compile`` made before are dropped, because they would run without the hooks.
    ``torch.jit.script`` does not accept a model with these hooks; ``torch.export`` does.

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
            meaning the call's own, embeddings and head included. A rule may also give ``axis``, the channel
            dimension, or several: ``("*.experts.*", {"granularity": "per_channel", "axis": (0, 1)})`` gives experts of
            shape (experts, out, in) one scale per expert and output channel.
        spec: A ``qsam.json``, its folder, or ``Coverage.to_spec()``: rebuild exactly these quantizers, scales
            included, and ignore the other arguments.

    Returns:
        What was quantized, what was not and why.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument has a bad value, a rule matches nothing, there is nothing to quantize, or a module
            already has an attribute of the quantizer's name.
        RuntimeError: The model is quantized, sharded or in DistributedDataParallel already.

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
    refuse_unrecorded(root)
    if is_sharded(root.modules()):
        raise RuntimeError("the model is sharded already: call quantize_ before fully_shard.")
    if data_parallel_group(model) is not None:
        raise RuntimeError(
            "the model is in DistributedDataParallel already, which would not know of the new scales: call quantize_ "
            "before wrapping it."
        )
    if spec is not None:
        plan, tensors = read_spec(spec)
        return _attach_(root, _built(root, plan, tensors))
    call = Settings(weights, bits, activations, activation_bits, granularity, group_size, init)
    coverage = _built(root, plan_by_rules(root, call, rules))
    if warning := float_matrices_warning(coverage):
        warnings.warn(warning, UserWarning, stacklevel=2)
    return _attach_(root, coverage)


@torch.no_grad()
def calibrate(model: nn.Module, batches: Iterable[Any]) -> None:
    """Set the scales (and signs) of the input quantizers from data, in eval mode and without gradient.

    Args:
        model: A model that :func:`quantize_` has been called on. For a DistributedDataParallel model, every process
            calls this with its own batches, and all get the same scales.
        batches: Inputs: a dict is called as ``model(**batch)``, a tuple or list as ``model(*batch)``, anything else
            as ``model(batch)``.

    Raises:
        TypeError: ``model`` is not a module, or ``batches`` cannot be iterated over.
        RuntimeError: The model is not quantized, is sharded already, or no batch reached an input that has no scale.
        ValueError: There was no batch, or an input is not finite.
    """
    coverage = require_coverage(model, "calibrate")
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
        RuntimeError: The model is not quantized, or an optimizer owns its weights (it writes them itself).
        ValueError: An fp16 Parameter cannot hold its quantized values; no weight has been written then.
    """
    coverage = require_coverage(model, "write_")
    if owner_of(coverage) is not None:
        raise RuntimeError(
            "an optimizer owns the weights of this model and writes them itself: write_ is for a model without one."
        )
    with restored_if_refused([row.quantizer for row in coverage.quantized if row.quantizer is not None]):
        for row in coverage.quantized:
            assert row.quantizer is not None
            row.quantizer.set_from_weight_(row.parameter)
            refuse_overflow(row.name, row.parameter, row.quantizer)
    for row in coverage.quantized:
        assert row.quantizer is not None
        row.parameter.copy_(row.quantizer(row.parameter))


@contextlib.contextmanager
def restored_if_refused(quantizers: Sequence[Quantizer]) -> Iterator[None]:
    """Restore the tensors of quantizers if an exception leaves this context; unchanged ones are not written."""
    tensors = [local(t) for q in quantizers for t in q.state_dict(keep_vars=True).values()]
    before, set_from = [t.detach().clone() for t in tensors], [q._set_from for q in quantizers]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for t, values in zip(tensors, before, strict=True):
                if not torch.equal(t, values):
                    t.copy_(values)
        for quantizer, digest in zip(quantizers, set_from, strict=True):
            quantizer._set_from = digest
        raise


@torch.no_grad()
def refuse_overflow(name: str, parameter: Tensor, quantizer: Quantizer, weight: Tensor | None = None) -> None:
    """Raise ValueError if an fp16 Parameter cannot hold Q(w); ``weight`` is w, None if the Parameter holds it."""
    if parameter.dtype != torch.float16:
        return
    wide = quantizer(parameter.float() if weight is None else weight)
    if bool((torch.isinf(wide.to(parameter.dtype)) & torch.isfinite(wide)).any()):
        raise ValueError(
            f"{name!r} is fp16, which ends at 65504, and its quantized values reach {float(wide.abs().max()):.4g}: "
            "keep the parameters in fp32 under autocast, or use bf16."
        )


def dequantize_(model: nn.Module, optimizer: Any | None = None) -> None:
    """Take every quantizer and hook off the model, including those of copied, replaced or merged modules.

    Args:
        model: The model, or what is left of a quantized one (after peft's ``merge_and_unload``).
        optimizer: The qsam optimizer that owns its weights: its latents are put back, and it can no longer be used.
            Without it the weights stay as they are (on the grid, once they have been written).

    Raises:
        RuntimeError: The model is not quantized, another optimizer owns its weights, or the owner is inside a block.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be a torch.nn.Module, got {type(model).__name__}.")
    coverage = coverage_of(model)
    places = {(id(module), name): (module, name) for _, module, name, _ in attached(model)}
    if coverage is None and not places:
        raise RuntimeError("dequantize_ needs a quantized model: call qsam.quantize_(model) first.")
    owner = None if coverage is None else owner_of(coverage)
    if owner is not None:
        owner._refuse_inside_block("dequantize_")
    if optimizer is not None:
        if owner is None or owner is not optimizer:
            raise RuntimeError("this optimizer does not own the model's weights: give the one that was built on it.")
        owner._release()
    if coverage is not None:
        places |= {(id(module), name): (module, name) for module, name, _ in coverage.places}
    for module, name in places.values():
        if name not in module._modules:
            continue
        if name == INPUT_NAME:
            detach_input_(module)
        else:
            delattr(module, name)
    if coverage is not None:
        set_owner(coverage, None)
    record_(model, None)
    _forget_compiled()


def _built(root: nn.Module, plan: Plan, tensors: Mapping[str, Tensor] | None = None) -> Coverage:
    """Build every quantizer of a plan before anything is attached, so that an error leaves the model as it was.

    ``tensors`` is the state of the quantizers by its key in the model's state_dict. Without it the weights' scales are
    set from the weights, and the inputs have no scales yet.
    """
    sites, modules = find_sites(root), dict(root.named_modules())
    _refuse_other_model(plan, sites, modules)
    weights, inputs = [], []
    for site in sites:
        row, shape = plan.weights.get(site.name, "not in the spec"), tuple(site.parameter.shape)
        quantizer, reason = None, row
        if isinstance(row, Entry):
            path = path_of(site.module_name, f"{site.attr}_quantizer")
            quantizer, reason = _build(row, site.module, site.attr, path, tensors), row.reason
        weights.append(Weight(site.name, shape, quantizer, str(reason), site.module, site.attr))
    for name, row in plan.inputs.items():
        quantizer, reason = None, row
        if isinstance(row, Entry):
            quantizer, reason = _build(row, modules[name], None, path_of(name, INPUT_NAME), tensors), row.reason
        inputs.append(Input(name, quantizer, str(reason), modules[name]))
    coverage = Coverage(tuple(weights), tuple(inputs), find_attention(root))
    if not coverage.quantizers:
        raise ValueError(
            "nothing was quantized: no layer that qsam knows, or every one is kept float. Name some in `rules`."
        )
    return coverage


def _refuse_other_model(plan: Plan, sites: list[Site], modules: Mapping[str, nn.Module]) -> None:
    shapes = {site.name: tuple(site.parameter.shape) for site in sites}
    rows = {name: row for name, row in plan.weights.items() if isinstance(row, Entry)}
    unknown = [name for name in rows if name not in shapes] + [name for name in plan.inputs if name not in modules]
    if unknown:
        raise ValueError(f"the spec names {unknown[0]!r}, which this model does not have: it belongs to another model.")
    for name, row in rows.items():
        if row.shape not in (None, shapes[name]):
            raise ValueError(
                f"{name!r} has shape {list(shapes[name])}, the spec's has {list(row.shape or ())}: it belongs to "
                "another model."
            )


def _build(
    entry: Entry, module: nn.Module, attr: str | None, path: str, tensors: Mapping[str, Tensor] | None
) -> Quantizer:
    """Build one quantizer and set its state: a weight's from the weight, then from ``tensors`` if they are given.

    ``attr`` is the weight's name in its module, None for an input; ``path`` is that of the quantizer.
    """
    name = path.removesuffix("_quantizer") if attr is not None else path.removesuffix(INPUT_NAME).removesuffix(".")
    where = repr(name) if attr is not None else input_of(name)
    own, parameter = next((n, p) for n, p in module.named_parameters() if attr in (None, n))
    if parameter.is_meta:
        raise ValueError(
            f"{path_of(path.rpartition('.')[0], own)!r} is on the meta device: materialize the model before quantize_."
        )
    _refuse_owner(module, name, path.rpartition(".")[2])
    if not isinstance(entry.quantizer, str):
        raise TypeError(f"{where}: a quantizer is a registered name or None, got {entry.quantizer!r}.")
    try:
        quantizer = build_quantizer(entry.quantizer, **entry.arguments)
        quantizer.init = entry.init if tensors is None else "absmax"  # only the shapes matter: the values are loaded
        quantizer.to(parameter.device)
        if attr is not None:
            quantizer.init_weight_(parameter.detach())
            quantizer.requires_grad_(False)  # the optimizer alone uses it; DDP would wait for its gradient
        quantizer.init = entry.init
    except (TypeError, ValueError) as error:
        cure = "" if attr is not None else " Inputs are quantized per tensor: name another in `activations`."
        raise type(error)(f"{where}: {error}{cure}") from error
    if tensors is not None:
        _load(quantizer, path, tensors)
    # A spec given as a dict holds no scales; the state_dict that is loaded next does. Old files lack `limits`.
    if attr is None and (tensors is not None or set(quantizer.state_dict()) == {LIMITS}):
        if f"{path}.{LIMITS}" not in (tensors or {}):
            quantizer.set_sign_(entry.signed if entry.calibrated else None)
    return quantizer


def _load(quantizer: Quantizer, path: str, tensors: Mapping[str, Tensor]) -> None:
    own = {key.removeprefix(f"{path}."): value for key, value in tensors.items() if key.startswith(f"{path}.")}
    try:
        quantizer.load_state_dict(own)
    except RuntimeError as error:
        raise ValueError(f"the scales of {path!r} do not fit this model: {error}") from error


def _refuse_owner(module: nn.Module, where: str, name: str) -> None:
    """Refuse a module that cannot hold one more child under this name."""
    if isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict):
        raise ValueError(
            f"{where!r} belongs to a {type(module).__name__}, which iterates its children: a quantizer there would "
            "join them. Keep it float in `rules`, or move the parameter to a separate module."
        )
    if hasattr(module, name):
        raise ValueError(f"{where!r}: its module has an attribute {name!r} already, which qsam needs: rename it.")


def _attach_(root: nn.Module, coverage: Coverage) -> Coverage:
    for row in coverage.quantized:
        row.module.add_module(f"{row.attr}_quantizer", row.quantizer)
    for entry in coverage.inputs:
        if entry.quantizer is not None:
            entry.quantizer.batch_first = batch_first_of(root, entry.name)
            attach_input_(entry.module, entry.quantizer, Place(entry.name, coverage.status.said))
    record_(root, coverage)
    _forget_compiled()
    return coverage


def _forget_compiled() -> None:
    """Drop compiled graphs, because torch does not guard hooks and would run the old graphs without them."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
