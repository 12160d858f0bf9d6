"""All private names of torch that qsam uses, each with its reason, and what qsam does without it.

A release of torch may change a private name. The functions here read those that may change; if one fails, it warns once
and qsam continues in the way that the list names. The other names are attributes on which torch's classes and most
packages around them rely: torch documents them, or has had them in every release since 1.0 or 2.0.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import nn

_T = TypeVar("_T")

WITH_FALLBACK = {
    "torch._C._len_torch_dispatch_stack": "Whether a dispatch mode follows the operations: it would not see "
    "a kernel. Without it the eager formulas run.",
    "torch._int_mm": "The product of int8 matrices. Without it Linear layers multiply in fp32.",
    "torch.nn.modules.module._has_any_global_hook": "Whether a hook is called for every module. Without it inputs are "
    "quantized before their Linear layers.",
    "torch.nn.parallel.DistributedDataParallel._get_active_ddp_module": "Whose forward is running, so that all "
    "processes set one scale from the first batch. Without it each sets its own, until the first step.",
    "torch.distributed._composable_state._module_state_mapping": "Which modules fully_shard was called on, seen from "
    "inside of one. Without it no first batch sets a scale in a process group; qsam.calibrate does.",
    "torch.distributed.fsdp.FSDPModule._get_fsdp_state": "The mixed precision of a sharded module, whose 16 bits would "
    "round scales. Without it that is not refused.",
}
"""Name -> why it is used, and what happens without it."""

STABLE = {
    "_apply": "Overridden to keep scales in fp32 through .half(); every move of a module goes through it.",
    "_load_from_state_dict": "Overridden, as torch documents, to see which scales a state_dict brought.",
    "_forward_pre_hooks": "Hooks are found by their function: a copied or pickled model has no handles of them.",
    "_forward_pre_hooks_with_kwargs": "Goes with the hooks that are taken off.",
    "_forward_hooks": "Whether a hook sees a layer's tensors; then its input is quantized before it.",
    "_backward_hooks": "As _forward_hooks, of a module and of a tensor.",
    "_backward_pre_hooks": "As _forward_hooks.",
    "_post_accumulate_grad_hooks": "Whether a hook needs a gradient that a pass could leave out.",
    "_state_dict_pre_hooks": "As _forward_pre_hooks.",
    "_optimizer_state_dict_pre_hooks": "An optimizer that writes its own state_dict runs the hooks as torch's does.",
    "_optimizer_state_dict_post_hooks": "As the former.",
    "_optimizer_load_state_dict_pre_hooks": "As the former.",
    "_optimizer_load_state_dict_post_hooks": "As the former.",
    "_parameters": "What a module itself holds, in its order; its attribute may be a property (parametrize, LoRA).",
    "_modules": "As _parameters.",
    "_buffers": "As _parameters.",
    "_version": "Whether a tensor was written since: the guard's fingerprint. Documented in torch's notes on autograd.",
    "_orig_mod": "The module in what torch.compile returns; documented for state_dict.",
    "_compiled_call_impl": "Whether module.compile() was called, whose graph would be compiled again.",
    "_fsdp_flattened": "Tells FSDP1's Parameters, which are refused; asked for with a default.",
    "_mp_policy": "Goes with FSDPModule._get_fsdp_state.",
    "_NormBase": "As _BatchNorm, with InstanceNorm: whether running statistics have seen a batch.",
    "_BatchNorm": "The base class of all BatchNorms, so that subclasses count.",
    "_ConvNd": "As _BatchNorm, of convolutions.",
    "_ConvTransposeNd": "As _ConvNd.",
    "_result": "Lightning's closure: the losses of its calls.",
}
"""Attributes without a public counterpart, and why each is read or overridden."""

_WARNED: set[str] = set()


def ask(name: str, question: Callable[[], _T], otherwise: _T) -> _T:
    """Return ``question()``, which uses the private ``name`` of torch; if it fails, warn once, return ``otherwise``."""
    try:
        return question()
    except Exception as error:
        if name not in _WARNED:
            _WARNED.add(name)
            warnings.warn(
                f"this release of torch does not offer {name} as qsam knows it ({error!r}). {WITH_FALLBACK[name]} "
                "A newer qsam may know this torch.",
                UserWarning,
                stacklevel=3,
            )
        return otherwise


def dispatch_mode_is_active() -> bool:
    """Whether a dispatch mode is active."""
    return ask("torch._C._len_torch_dispatch_stack", lambda: torch._C._len_torch_dispatch_stack() > 0, True)


def has_global_hook() -> bool:
    """Whether a hook is called for every module."""
    name = "torch.nn.modules.module._has_any_global_hook"
    return ask(name, lambda: bool(nn.modules.module._has_any_global_hook()), True)  # type: ignore[no-untyped-call]


def active_data_parallel() -> nn.parallel.DistributedDataParallel | None:
    """Return the DistributedDataParallel model whose forward is running, or None."""
    name = "torch.nn.parallel.DistributedDataParallel._get_active_ddp_module"

    def active() -> nn.parallel.DistributedDataParallel | None:
        return nn.parallel.DistributedDataParallel._get_active_ddp_module()  # type: ignore[no-untyped-call,no-any-return]

    return ask(name, active, None)


def composed_modules() -> Iterable[nn.Module] | None:
    """Return the modules that ``fully_shard`` and its like were called on; None if torch does not say."""

    def modules() -> Iterable[nn.Module]:
        from torch.distributed._composable_state import _module_state_mapping

        return list(_module_state_mapping)

    return ask("torch.distributed._composable_state._module_state_mapping", modules, None)


def fsdp_param_dtype(module: Any) -> torch.dtype | None:
    """Return the dtype in which a module under ``fully_shard`` gathers its Parameters; None: their own."""
    name = "torch.distributed.fsdp.FSDPModule._get_fsdp_state"
    found: torch.dtype | None = ask(name, lambda: module._get_fsdp_state()._mp_policy.param_dtype, None)
    return found
