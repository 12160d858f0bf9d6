"""An optimizer's state as plain tensors and Python types: packed for a checkpoint, checked and unpacked again.

The format is torch's own (``state`` by index, ``param_groups``). Beside the base's entries a quantized weight has
``qsam_latent`` and a scale has ``qsam_scale``; what belongs to the whole run rides in the first group as ``qsam_...``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qsam.coverage import FORMAT
from qsam.shards import local

Group = dict[str, Any]


def pack(groups: Sequence[Group], entries: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """Return ``{"state": ..., "param_groups": ...}`` with parameters replaced by indices in order.

    Args:
        groups: Live groups.
        entries: Each parameter's state, by its id.
    """
    state: dict[int, Mapping[str, Any]] = {}
    packed = []
    index = 0
    for group in groups:
        indices = list(range(index, index + len(group["params"])))
        packed.append({**{k: v for k, v in group.items() if k != "params"}, "params": indices})
        for i, p in zip(indices, group["params"], strict=True):
            if found := entries[id(p)]:
                state[i] = found
        index += len(indices)
    return {"state": state, "param_groups": packed}


def is_plain(state_dict: Mapping[str, Any]) -> bool:
    """Whether this is a checkpoint of a bare base optimizer, not one of qsam's."""
    groups = state_dict.get("param_groups")
    first = groups[0] if isinstance(groups, Sequence) and groups else {}
    return not isinstance(first, Mapping) or "qsam_step" not in first


def check(state_dict: Mapping[str, Any], groups: Sequence[Group]) -> None:
    """Refuse a checkpoint that does not fit, before anything is changed.

    Raises:
        ValueError: not a state_dict; one of a newer qsam; other groups, parameters, quantizers or another base
            optimizer; names the first that differs.
    """
    for key in ("state", "param_groups"):
        if key not in state_dict:
            raise ValueError(f"the checkpoint has no {key!r}: it is not an optimizer's state_dict.")
    saved = state_dict["param_groups"]
    if not isinstance(saved, Sequence) or not all(isinstance(g, Mapping) and "params" in g for g in saved):
        raise ValueError("the checkpoint's 'param_groups' is no list of groups: it is not an optimizer's state_dict.")
    if saved:
        _check_format(saved[0])
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
    if not is_plain(state_dict):
        _check_quantizers(saved[0].get("qsam_quantizers", {}), groups[0].get("qsam_quantizers", {}))
        _check_parameters(saved[0].get("qsam_parameters", {}), groups[0].get("qsam_parameters", {}))
        _check_base(saved[0].get("qsam_base_class"), groups[0].get("qsam_base_class"))


def check_latents(groups: Sequence[Group], found: Sequence[tuple[Tensor, Tensor]], paths: Mapping[int, str]) -> None:
    """Refuse a checkpoint that lacks the latent of a trainable quantized weight.

    Args:
        groups: Live groups.
        found: The latents that it has, by their Parameter.
        paths: The path of every quantized weight, by the id of its Parameter.

    Raises:
        ValueError: names the weight.
    """
    there = {id(p) for p, _ in found}
    for p in (p for group in groups for p in group["params"] if p.requires_grad):
        if id(p) in paths and id(p) not in there:
            raise ValueError(
                f"the checkpoint has no latent of {paths[id(p)]!r}: its full-precision weights are lost. Save the "
                "whole optimizer.state_dict()."
            )


def parameter_shapes(groups: Sequence[Group], root: nn.Module) -> dict[str, str]:
    """Return the shape of each Parameter of the base's groups by its path, in order, as "16x8"."""
    paths = {id(p): path.replace("_orig_mod.", "") for path, p in root.named_parameters()}
    own = (p for group in groups if "qsam_scales" not in group for p in group["params"])
    return {paths[id(p)]: "x".join(map(str, p.shape)) for p in own if id(p) in paths}


def _check_format(first: Group) -> None:
    found = first.get("qsam_format", FORMAT)
    if found != FORMAT:
        raise ValueError(f"the checkpoint has qsam_format {found!r}; this qsam reads {FORMAT}: install a newer qsam.")


def _check_parameters(theirs: Mapping[str, str], ours: Mapping[str, str]) -> None:
    """Compare the parameters one by one: state goes by position, and must not land in another parameter."""
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


def _check_base(theirs: str | None, ours: str | None) -> None:
    if theirs is not None and theirs != ours:
        raise ValueError(
            f"the checkpoint is of the base optimizer {theirs}, this one is {ours}: build it as it was built then."
        )


def _check_quantizers(theirs: Mapping[str, str], ours: Mapping[str, str]) -> None:
    theirs = {path: text.replace("PerChannel(", "LSQ(") for path, text in theirs.items()}  # a class of older files
    for path in [*ours, *theirs]:
        if theirs.get(path) != ours.get(path):
            raise ValueError(
                f"{path!r} is {ours.get(path, 'float')} here and {theirs.get(path, 'float')} in the checkpoint: call "
                "quantize_ as it was called then, or with `spec`."
            )


def entries(state_dict: Mapping[str, Any], groups: Sequence[Group], name: str) -> list[tuple[Tensor, Tensor]]:
    """Return ``(parameter, saved tensor)`` for every parameter whose state holds ``name``.

    Raises:
        ValueError: a tensor of another shape.
    """
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


def part(state_dict: Mapping[str, Any], picked: Sequence[int]) -> dict[str, Any]:
    """Return the state_dict of one underlying optimizer: some of the groups, without qsam's own entries.

    A parameter that its optimizer has not stepped yet has no entry there (Adam refuses an empty one).
    """
    groups = [state_dict["param_groups"][i] for i in picked]
    indices = {i for group in groups for i in group["params"]}
    state = {}
    for i, entry in state_dict["state"].items():
        own = {k: v for k, v in entry.items() if not str(k).startswith("qsam_")}
        if i in indices and own:
            state[i] = own
    return {"state": state, "param_groups": groups}


def all_lr_zero(groups: Sequence[Group]) -> bool:
    """Whether every group's learning rate is 0: how torch.distributed.checkpoint creates an optimizer's state."""
    return all("lr" in group and float(group["lr"]) == 0.0 for group in groups)


def no_gradient_but_zeros(groups: Sequence[Group]) -> bool:
    """Whether the gradients are all exactly zero (and there are some)."""
    grads = [p.grad for group in groups for p in group["params"] if p.grad is not None]
    return bool(grads) and not any(bool(torch.count_nonzero(local(g))) for g in grads)
