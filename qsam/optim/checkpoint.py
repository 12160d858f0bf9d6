"""Save and load an optimizer's state, and merge it for schedulers and checkpoints.

The format is torch's own: ``state`` by index and ``param_groups``. Beside the base's entries a quantized weight has
``qsam_latent`` and a scale has ``qsam_scale``. Facts about the whole run are entries ``qsam_...`` of the first group.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qsam.coverage import Coverage, Input, Weight
from qsam.distributed import follow_fsdp, local
from qsam.latents import pointed_at_latents
from qsam.optim.scale_optimizer import restore_balance_, take_balance_
from qsam.plan import FORMAT
from qsam.quantizers import Quantizer

if TYPE_CHECKING:
    from qsam.optim.optimizer import QuantizedOptimizer

Group = dict[str, Any]
Pairs = list[tuple[Tensor, Tensor]]
"""Parameters, each with a saved tensor."""


def merged_state(o: QuantizedOptimizer) -> defaultdict[Tensor, Any]:
    """Return the base's and the scale optimizer's state by parameter, latents included; empty before a step."""
    follow_fsdp(o._latents, o.base)
    merged: defaultdict[Tensor, Any] = defaultdict(dict)
    # Plain SGD never has a state.
    if o.base.state or o._state_created or o.param_groups[0]["qsam_step"]:
        entries = _entries(o)
        for group in o.param_groups:
            merged.update({p: entries[id(p)] for p in group["params"] if entries[id(p)]})
    return merged


def packed(o: QuantizedOptimizer) -> dict[str, Any]:
    """Return the optimizer's state_dict."""
    follow_fsdp(o._latents, o.base)
    for hook in o._optimizer_state_dict_pre_hooks.values():
        hook(o)
    first = o.param_groups[0]
    first["qsam_parameters"] = _shapes(o)
    first.update({key: value for key, (get, _) in _facts(o).items() if (value := get()) is not None})
    packed = _pack(o.param_groups, _entries(o))
    with pointed_at_latents(o.base, o._latents):
        own = o.base.state_dict()
    if set(own) != {"state", "param_groups"}:
        packed["qsam_base"] = own
    owned = {id(p) for group in o.param_groups for p in group["params"]}
    frozen = {s.path: s.latent.detach() for s in o._latents.slots if id(s.parameter) not in owned}
    if frozen:
        packed["qsam_frozen"] = frozen
    for post_hook in o._optimizer_state_dict_post_hooks.values():
        packed = post_hook(o, packed) or packed
    return packed


def load(o: QuantizedOptimizer, state_dict: Any) -> None:
    """Load what :func:`packed` returned, or a bare base optimizer's state_dict; change nothing if it does not fit."""
    if not isinstance(state_dict, Mapping):
        raise TypeError(
            f"`state_dict` must be a dict, what optimizer.state_dict() returned, got {type(state_dict).__name__}."
        )
    follow_fsdp(o._latents, o.base)
    state_dict = dict(state_dict)
    for hook in o._optimizer_load_state_dict_pre_hooks.values():
        state_dict = hook(o, state_dict) or state_dict
    if _is_plain(state_dict):
        _load_plain(o, state_dict)
    else:
        _load(o, state_dict)
    o._start_passes()
    for post_hook in o._optimizer_load_state_dict_post_hooks.values():
        post_hook(o)


# --- what is saved ------------------------------------------------------------------------------------------------


def _tensors(o: QuantizedOptimizer) -> dict[str, tuple[Callable[[], Mapping[int, Tensor]], Callable[[Pairs], None]]]:
    """Return two functions per kind of tensor: one reads it by the id of its parameter, one sets what was saved."""
    latents = {id(slot.parameter): slot.latent for slot in o._latents.slots}
    paths = {id(p): path for path, p in o._latents.root.named_parameters()}

    def copy(targets: Mapping[int, Tensor]) -> Callable[[Pairs], None]:
        def put(pairs: Pairs) -> None:
            for p, value in pairs:
                targets[id(p)].copy_(value)

        return put

    def read(memory: dict[str, Tensor]) -> Callable[[], Mapping[int, Tensor]]:
        return lambda: {i: memory[path] for i, path in paths.items() if path in memory}

    def replace(memory: dict[str, Tensor]) -> Callable[[Pairs], None]:
        def put(pairs: Pairs) -> None:
            memory.clear()
            memory.update({paths[id(p)]: value.detach().to(p.device, copy=True) for p, value in pairs})

        return put

    scales = {id(scale.parameter): scale.parameter.detach() for scale in o.scale_slots}
    memories = {}
    if o.perturbation is not None:
        memories = {"qsam_direction": o.perturbation.direction.memory, "qsam_kept": o.perturbation.kept}
    return {
        "qsam_latent": (lambda: {i: w.detach() for i, w in latents.items()}, copy(latents)),
        "qsam_scale": (lambda: scales, copy(scales)),
        **{name: (read(memory), replace(memory)) for name, memory in memories.items()},
    }


def _facts(o: QuantizedOptimizer) -> dict[str, tuple[Callable[[], Any], Callable[[Any], None]]]:
    """Return two functions per fact about the run outside the groups: one reads it (None: absent), one sets it."""
    coverage, perturbation = o._latents.coverage, o.perturbation
    facts: dict[str, tuple[Callable[[], Any], Callable[[Any], None]]] = {
        "qsam_input_signs": (lambda: _signs(coverage), lambda signs: _set_signs(coverage, signs)),
    }
    if perturbation is not None:
        facts["qsam_kept_norm"] = (
            lambda: None if perturbation.kept_norm is None else float(perturbation.kept_norm),
            lambda norm: setattr(perturbation, "kept_norm", torch.tensor(norm, dtype=torch.float32)),
        )
    return facts


def _signs(coverage: Coverage | None) -> dict[str, bool | None]:
    """Return which weights and inputs have a signed grid (None: not set from data yet), by path."""
    return {name: q.signed if q.calibrated else None for name, q in _quantizers(coverage)}


def _set_signs(coverage: Coverage | None, signs: Mapping[str, bool | None]) -> None:
    """Set the signs that :func:`_signs` returned; a quantizer whose sign is known counts as calibrated.

    In an older checkpoint, which has no signs of weights, the weights' scales count as calibrated.
    """
    for name, quantizer in _quantizers(coverage):
        if quantizer.axis is not None:
            quantizer.set_sign_(signs.get(name, quantizer.signed))
        elif name in signs:
            quantizer.set_sign_(signs[name])


def _quantizers(coverage: Coverage | None) -> Iterator[tuple[str, Quantizer]]:
    rows: tuple[Weight | Input, ...] = () if coverage is None else (*coverage.inputs, *coverage.quantized)
    for row in rows:
        if row.quantizer is not None:
            yield row.name, row.quantizer


def _scales_of_weights(o: QuantizedOptimizer) -> Iterator[tuple[nn.Parameter, nn.Parameter, str]]:
    """Yield each weight, a scale of it, and the prefix of the scale's state within the weight's entry.

    The weight's entry holds it because torch.distributed.checkpoint drops the state of a parameter without gradient.
    """
    for slot in o._latents.slots:
        for name, scale in slot.quantizer.named_parameters():
            yield slot.parameter, scale, f"qsam_{name}_"


def _entries(o: QuantizedOptimizer) -> dict[int, dict[str, Any]]:
    """Return every parameter's state by its id: the base's, the scales', and what qsam adds to them."""
    keys = {id(slot.parameter): slot.latent for slot in o._latents.slots}
    found = {id(p): dict(o.base.state.get(keys.get(id(p), p), {})) for group in o.param_groups for p in group["params"]}
    states = {} if o.scale_base is None else o.scale_base.state
    for scale in o.scale_slots:
        found[id(scale.parameter)] = dict(states.get(scale.parameter, {}))
    for weight, s, prefix in _scales_of_weights(o):
        found.setdefault(id(weight), {}).update({f"{prefix}{k}": v for k, v in found[id(s)].items()})
        found[id(s)] = {}
    for name, (get, _) in _tensors(o).items():
        for i, tensor in get().items():
            if i in found:
                found[i][name] = tensor
    for entry in found.values():
        # torch.distributed.checkpoint needs an entry for each parameter with a gradient, and plain SGD has none.
        if not entry:
            entry["qsam_stateless"] = torch.zeros((), dtype=torch.float32)
    return found


def _pack(groups: Sequence[Group], entries: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """Return ``{"state": ..., "param_groups": ...}`` with parameters replaced by indices in order."""
    state: dict[int, Mapping[str, Any]] = {}
    packed = []
    index = 0
    for group in groups:
        indices = list(range(index, index + len(group["params"])))
        packed.append({**{k: v for k, v in group.items() if k != "params"}, "params": indices})
        state.update({i: entries[id(p)] for i, p in zip(indices, group["params"], strict=True) if entries[id(p)]})
        index += len(indices)
    return {"state": state, "param_groups": packed}


def _shapes(o: QuantizedOptimizer) -> dict[str, str]:
    """Return the shape of each Parameter of the base's groups by its path, in order, as "16x8"."""
    paths = {id(p): path.replace("_orig_mod.", "") for path, p in o._latents.root.named_parameters()}
    own = (p for group in o.param_groups if "qsam_scales" not in group for p in group["params"])
    return {paths[id(p)]: "x".join(map(str, p.shape)) for p in own if id(p) in paths}


# --- loading ------------------------------------------------------------------------------------------------------


def _load(o: QuantizedOptimizer, state_dict: dict[str, Any]) -> None:
    o.param_groups[0]["qsam_parameters"] = _shapes(o)
    _check(state_dict, o.param_groups)
    saved = {name: _saved(state_dict, o.param_groups, name) for name in _tensors(o)}
    _check_latents(o, saved["qsam_latent"])
    groups: list[Group] = state_dict["param_groups"]
    ours = [i for i, group in enumerate(o.param_groups) if "qsam_scales" not in group]
    theirs = [i for i, group in enumerate(o.param_groups) if "qsam_scales" in group]
    _load_base(o, state_dict.get("qsam_base") or _part(state_dict, ours), ours)
    if o.scale_base is not None:
        o.scale_base.load_state_dict(_scale_state(o, state_dict, theirs))
        for i, group in zip(theirs, o.scale_base.param_groups, strict=True):
            o.param_groups[i].update({k: v for k, v in groups[i].items() if k != "params"})
            group["params"] = o.param_groups[i]["params"]
    for name, (_, put) in _tensors(o).items():
        put(saved[name])
    loaded = {id(p) for p, _ in saved["qsam_latent"]}
    for slot in o._latents.slots:
        if id(slot.parameter) not in loaded:
            o._latents.load_frozen(slot, state_dict.get("qsam_frozen", {}).get(slot.path))
    for key, (_, put_fact) in _facts(o).items():
        if key in o.param_groups[0]:
            put_fact(o.param_groups[0][key])
    for slot in o._latents.slots:
        slot.take_loaded_scale()
    older = [
        o.param_groups[i] for i in theirs if "qsam_balance" in o.param_groups[i] and "qsam_balance" not in groups[i]
    ]
    restore_balance_(older, o.base, o._latents.slots)
    o._latents.write()


def _load_plain(o: QuantizedOptimizer, state_dict: dict[str, Any]) -> None:
    ours = [i for i, group in enumerate(o.param_groups) if "qsam_scales" not in group]
    first = {k: v for k, v in o.param_groups[0].items() if k.startswith("qsam_")}
    _check(state_dict, [o.param_groups[i] for i in ours])
    _load_base(o, state_dict, ours)
    for i in ours:
        o.param_groups[i].setdefault("qsam_rho", first["qsam_rho"])
    o.param_groups[0].update(first)
    for slot in o._latents.slots:
        o._latents.load_frozen(slot, None)
    balance_present_weights(o)
    o._latents.write()
    warnings.warn(
        "this is a checkpoint of the bare base optimizer: the latents start from the model's present weights.",
        UserWarning,
        stacklevel=4,
    )


def balance_present_weights(o: QuantizedOptimizer) -> None:
    """Compute the balance of the scales' rates again, because the latents are new."""
    take_balance_([group for group in o.param_groups if "qsam_balance" in group], o.base, o._latents.slots)


def _load_base(o: QuantizedOptimizer, state_dict: dict[str, Any], positions: list[int]) -> None:
    with pointed_at_latents(o.base, o._latents):
        o.base.load_state_dict(state_dict)
    for i, group in zip(positions, o.base.param_groups, strict=True):
        o.param_groups[i] = group


def _scale_state(o: QuantizedOptimizer, state_dict: dict[str, Any], positions: list[int]) -> dict[str, Any]:
    """Return the scale optimizer's state_dict, with the state that :func:`_scales_of_weights` names."""
    found = _part(state_dict, positions)
    pairs = zip(o.param_groups, state_dict["param_groups"], strict=True)
    index = {id(p): i for ours, saved in pairs for p, i in zip(ours["params"], saved["params"], strict=True)}
    for weight, s, prefix in _scales_of_weights(o):
        entry = state_dict["state"].get(index.get(id(weight)), {})
        if own := {k.removeprefix(prefix): v for k, v in entry.items() if str(k).startswith(prefix)}:
            found["state"][index[id(s)]] = own
    return found


def _part(state_dict: Mapping[str, Any], picked: Sequence[int]) -> dict[str, Any]:
    """Return the state_dict of one underlying optimizer: some groups, without qsam's entries and without empty ones.

    Adam refuses an empty entry of a parameter that it has not stepped yet.
    """
    groups = [state_dict["param_groups"][i] for i in picked]
    indices = {i for group in groups for i in group["params"]}
    state = {}
    for i, entry in state_dict["state"].items():
        own = {k: v for k, v in entry.items() if not str(k).startswith("qsam_")}
        if i in indices and own:
            state[i] = own
    return {"state": state, "param_groups": groups}


def _saved(state_dict: Mapping[str, Any], groups: Sequence[Group], name: str) -> Pairs:
    """Return every parameter whose saved state holds ``name``, with the saved tensor."""
    found = []
    for group, saved in zip(groups, state_dict["param_groups"], strict=True):
        for p, i in zip(group["params"], saved["params"], strict=True):
            value = state_dict["state"].get(i, {}).get(name)
            if value is not None:
                if value.shape != p.shape:
                    raise ValueError(
                        f"a saved {name} has shape {tuple(value.shape)}, its parameter {tuple(p.shape)}: another model."
                    )
                found.append((p, value))
    return found


# --- what does not fit --------------------------------------------------------------------------------------------


def _is_plain(state_dict: Mapping[str, Any]) -> bool:
    """Whether this is a checkpoint of a bare base optimizer, not one of qsam's."""
    groups = state_dict.get("param_groups")
    first = groups[0] if isinstance(groups, Sequence) and groups else {}
    return not isinstance(first, Mapping) or "qsam_step" not in first


def _check(state_dict: Mapping[str, Any], groups: Sequence[Group]) -> None:
    """Refuse a checkpoint that does not fit, before anything is changed: name the first difference."""
    for key in ("state", "param_groups"):
        if key not in state_dict:
            raise ValueError(f"the checkpoint has no {key!r}: it is not an optimizer's state_dict.")
    saved = state_dict["param_groups"]
    if not isinstance(saved, Sequence) or not all(isinstance(g, Mapping) and "params" in g for g in saved):
        raise ValueError("the checkpoint's 'param_groups' is no list of groups: it is not an optimizer's state_dict.")
    if saved and (number := saved[0].get("qsam_format", FORMAT)) != FORMAT:
        raise ValueError(f"the checkpoint has qsam_format {number!r}; this qsam reads {FORMAT}: install a newer qsam.")
    if len(saved) != len(groups):
        raise ValueError(
            f"the checkpoint has {len(saved)} parameter groups, this optimizer {len(groups)}: build "
            "it as it was built then."
        )
    for i, (ours, theirs) in enumerate(zip(groups, saved, strict=True)):
        if len(ours["params"]) != len(theirs["params"]):
            raise ValueError(
                f"group {i} has {len(theirs['params'])} parameters in the checkpoint and "
                f"{len(ours['params'])} here: it is "
                "of another model, or other parameters are trainable."
            )
    if not _is_plain(state_dict):
        _check_quantizers(saved[0].get("qsam_quantizers", {}), groups[0].get("qsam_quantizers", {}))
        _check_parameters(saved[0].get("qsam_parameters", {}), groups[0].get("qsam_parameters", {}))
        _check_optimizers(saved, groups)


def _check_quantizers(theirs: Mapping[str, str], ours: Mapping[str, str]) -> None:
    for path in [*ours, *theirs]:
        if theirs.get(path) != ours.get(path):
            raise ValueError(
                f"{path!r} is {ours.get(path, 'float')} here and {theirs.get(path, 'float')} in the checkpoint: call "
                "quantize_ as it was called then, or with `spec`."
            )


def _check_parameters(theirs: Mapping[str, str], ours: Mapping[str, str]) -> None:
    """Compare the parameters one by one, because state is assigned by position."""
    if not (theirs and ours):
        return
    for (path, shape), (their_path, their_shape) in zip(ours.items(), theirs.items(), strict=True):
        if path != their_path:
            raise ValueError(
                f"{path!r} here has the place of {their_path!r} in the checkpoint: it is of another model, or its "
                "parameters were given in another order."
            )
        if shape != their_shape:
            raise ValueError(f"{path!r} has shape {shape} here and {their_shape} in the checkpoint: another model.")


def _check_optimizers(saved: Sequence[Group], groups: Sequence[Group]) -> None:
    theirs, ours = saved[0].get("qsam_base_class"), groups[0].get("qsam_base_class")
    if theirs is not None and theirs != ours:
        raise ValueError(
            f"the checkpoint is of the base optimizer {theirs}, this one is {ours}: build it as it was built then."
        )
    for group, other in zip(groups, saved, strict=True):
        if "qsam_scales" in group:
            ours = group["qsam_scale_class"]
            # A file written before the class was noted shows balanced rates by the setting `normalized`.
            theirs = other.get("qsam_scale_class", "BalancedSGD" if "normalized" in other else None)
            if theirs != ours and (theirs is not None or ours == "BalancedSGD"):
                raise ValueError(
                    f"the checkpoint's scales were stepped by {theirs or 'another optimizer'}, and are by {ours} here: "
                    "give `scale_lr` and `scale_optimizer` as they were given then (scale_lr=None is BalancedSGD)."
                )


def _check_latents(o: QuantizedOptimizer, saved: Pairs) -> None:
    """Refuse a checkpoint without the latent of a trainable quantized weight."""
    there = {id(p) for p, _ in saved}
    owned = {id(p) for group in o.param_groups for p in group["params"]}
    for slot in o._latents.slots:
        p = slot.parameter
        if p.requires_grad and id(p) in owned and id(p) not in there:
            raise ValueError(
                f"the checkpoint has no latent of {slot.path!r}: its full-precision weights are lost. Save the "
                "whole optimizer.state_dict()."
            )


# --- how torch.distributed.checkpoint creates a state -------------------------------------------------------------


def all_lr_zero(groups: Sequence[Group]) -> bool:
    """Whether every learning rate is 0, as when torch.distributed.checkpoint creates an optimizer's state."""
    return all("lr" in group and float(group["lr"]) == 0.0 for group in groups)


def no_gradient_but_zeros(groups: Sequence[Group]) -> bool:
    """Whether the gradients are all exactly zero (and there are some)."""
    grads = [p.grad for group in groups for p in group["params"] if p.grad is not None]
    return bool(grads) and not any(bool(torch.count_nonzero(local(g))) for g in grads)
