"""Build a base optimizer, and take the scales out of its parameter groups."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer, SparseAdam

from qsam.coverage import quantizer_parameters
from qsam.latents import Latents, own_parameters
from qsam.registry import nearest

Base = Optimizer | Callable[..., Optimizer]


def build_base(
    method: str,
    base: Base,
    latents: Latents,
    *,
    params: Iterable[Any] | None,
    arguments: dict[str, Any],
    ours: set[str],
) -> Optimizer:
    """Return the base optimizer, its groups holding the model's Parameters without any scale.

    ``base`` is an optimizer class, a factory ``(params, **arguments)``, or an instance. ``method`` and ``ours``, the
    names of the method's keywords, are for messages.
    """
    scales = {id(p) for p in quantizer_parameters(latents.root)}
    if isinstance(base, Optimizer):
        if arguments or params is not None:
            given = sorted(arguments) + (["params"] if params is not None else [])
            raise TypeError(
                f"{method} was given an optimizer instance, which has its own groups and settings: drop {given}."
            )
        _strip_scales(base, scales)
    else:
        _check_arguments(method, base, arguments, ours)
        if params is not None and not isinstance(params, Iterable):
            raise TypeError(f"`params` must be parameters or groups of them, got {params!r}.")
        if params is None:
            params = [p for _, p in own_parameters(latents.root) if p.requires_grad]
        base = base(params, **arguments)
        if not isinstance(base, Optimizer):
            raise TypeError(f"`base` must build a torch Optimizer, got {type(base).__name__}.")
        _strip_scales(base, scales)
    _refuse_unusable(method, base)
    _check_owned(base, latents, scales)
    _key_by_latents(base, latents)
    return base


def needs_closure(base: Optimizer) -> bool:
    """Whether ``base.step`` requires a closure, as LBFGS does."""
    closure = inspect.signature(type(base).step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty


def _refuse_unusable(method: str, base: Optimizer) -> None:
    """Refuse base optimizers that cannot step with pulled-back gradients."""
    name = type(base).__name__
    if isinstance(base, SparseAdam):
        raise TypeError(
            "SparseAdam steps on sparse gradients only, and the gradient of a quantized weight is dense: use Adam."
        )
    if hasattr(base, "get_trace") or name.lower().startswith(("adahessian", "sophiah")):
        raise TypeError(
            f"{name} differentiates the gradients once more (create_graph=True), and a pulled-back "
            "gradient has no graph: use "
            "a first-order optimizer."
        )
    if needs_closure(base) and method != "QAT":
        raise TypeError(
            f"{name} calls its closure itself, as often as it needs, so {method} cannot order its passes: use QAT."
        )


def _key_by_latents(base: Optimizer, latents: Latents) -> None:
    """Move the state that some optimizers (Adagrad) create at construction from the Parameters to the latents."""
    if "_optimizer_state_dict_pre_hooks" not in vars(base):  # a wrapper that never called Optimizer.__init__
        Optimizer.__setstate__(base, {"defaults": getattr(base, "defaults", {})})
    for slot in latents.slots:
        if slot.parameter in base.state:
            base.state[slot.latent] = base.state.pop(slot.parameter)


def without_scales(param_group: dict[str, Any], latents: Latents) -> dict[str, Any]:
    """Return a copy of a group without the scales among its parameters, and warn how many were left out.

    As in torch, ``"params"`` is a Parameter, or an iterable of Parameters or of pairs (name, Parameter).
    """
    group = dict(param_group)
    if isinstance(group["params"], Iterable) and not isinstance(group["params"], set):
        scales = {id(p) for p in quantizer_parameters(latents.root)}
        given = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
        kept = [p for p in given if id(p[1] if isinstance(p, tuple) else p) not in scales]
        group["params"] = kept
        _say_moved(len(given) - len(kept), stacklevel=4)
    return group


def _strip_scales(base: Optimizer, scales: set[int]) -> None:
    found = 0
    for group in base.param_groups:
        kept = [i for i, p in enumerate(group["params"]) if id(p) not in scales]
        found += len(group["params"]) - len(kept)
        for key in ("params", "param_names"):
            if key in group:
                group[key][:] = [group[key][i] for i in kept]  # in place: LBFGS and wrappers hold on to the list
    _say_moved(found, stacklevel=6)


def _say_moved(count: int, stacklevel: int) -> None:
    if count:
        warnings.warn(
            f"{count} scales were in the base optimizer's groups and are moved to the scale optimizer: they step with "
            "`scale_lr`.",
            UserWarning,
            stacklevel=stacklevel,
        )


def _check_owned(base: Optimizer, latents: Latents, scales: set[int]) -> None:
    owned = {id(p) for group in base.param_groups for p in group["params"]}
    for slot in latents.slots:
        if slot.parameter.requires_grad and id(slot.parameter) not in owned:
            raise RuntimeError(
                f"the quantized weight {slot.path!r} is in no parameter group of the base optimizer: "
                "add it, or freeze it "
                "with requires_grad_(False)."
            )
    missing = [
        name
        for name, p in latents.root.named_parameters()
        if p.requires_grad and id(p) not in owned and id(p) not in scales
    ]
    if missing:
        warnings.warn(
            f"{len(missing)} trainable parameters are in no group of the base optimizer and will not "
            f"move: {missing[:8]}.",
            UserWarning,
            stacklevel=5,
        )


def _check_arguments(method: str, base: Callable[..., Optimizer], arguments: dict[str, Any], ours: set[str]) -> None:
    if not callable(base):
        raise TypeError(f"`base` must be an optimizer class or instance, got {base!r}.")
    try:
        parameters = inspect.signature(base).parameters
    except ValueError:  # a built-in type
        raise TypeError(f"`base` must be an optimizer class or instance, got {base!r}.") from None
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return
    for name in arguments:
        if name not in parameters:
            known = sorted(ours | set(parameters) - {"params", "self"})
            base_name = getattr(base, "__name__", repr(base))
            raise TypeError(f"neither {method} nor {base_name} has an argument {name!r}.{nearest(name, known)}")
