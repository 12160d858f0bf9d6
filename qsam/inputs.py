"""Quantization of a layer's input in the graph: the forward pre-hook, and how it gets its first scale.

The hook is a module-level function, so that a deepcopy or pickle of the model runs its own quantizer. Its flags are
plain Python, so that a compiled graph stays whole.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from qsam.quantizers import Quantizer

NAME = "input_quantizer"

_SAMPLE_ENTRIES = 2**16
"""Entries of one batch that calibration keeps, besides its smallest and largest."""

_frozen = False
"""Whether no input may be calibrated now: during perturbed passes."""


def attach_input_(module: nn.Module, quantizer: Quantizer) -> None:
    """Give ``module`` an input quantizer, as the submodule ``input_quantizer`` and a pre-hook."""
    module.add_module(NAME, quantizer)
    hook = _quantize_attention_inputs if isinstance(module, nn.MultiheadAttention) else _quantize_first_input
    module.register_forward_pre_hook(hook, with_kwargs=True)


def detach_input_(module: nn.Module) -> None:
    """Undo :func:`attach_input_`."""
    ours = (_quantize_attention_inputs, _quantize_first_input)
    for key, hook in list(module._forward_pre_hooks.items()):
        if hook in ours:
            del module._forward_pre_hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)
    delattr(module, NAME)


@contextlib.contextmanager
def frozen() -> Iterator[None]:
    """Within this context no input is calibrated: its statistics would be those of a perturbed model."""
    global _frozen
    before, _frozen = _frozen, True
    try:
        yield
    finally:
        _frozen = before


@contextlib.contextmanager
def collecting(quantizers: list[Quantizer]) -> Iterator[None]:
    """Within this context inputs pass through as float and samples of them are kept; then the scales are set.

    Raises:
        RuntimeError: at the end, if an input was never reached.
    """
    for quantizer in quantizers:
        quantizer.samples = []
    try:
        yield
        for quantizer in quantizers:
            if quantizer.samples:
                quantizer.observe_(torch.cat(quantizer.samples))
    finally:
        for quantizer in quantizers:
            quantizer.samples = None


def _quantize_first_input(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    for i, value in enumerate(args):
        if _is_floating(value):
            return (*args[:i], _quantized(module, value), *args[i + 1 :]), kwargs
    for key, value in kwargs.items():
        if _is_floating(value):
            return args, {**kwargs, key: _quantized(module, value)}
    return None


def _quantize_attention_inputs(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Quantize query, key and value, each distinct tensor once: self-attention must still see one tensor."""
    names = ("query", "key", "value")
    given = dict(zip(names, args, strict=False)) | {name: kwargs[name] for name in names if name in kwargs}
    done: dict[int, Tensor] = {}
    for value in given.values():
        if _is_floating(value) and id(value) not in done:
            done[id(value)] = _quantized(module, value)
    swap = [done.get(id(value), value) for value in args[:3]]
    return (*swap, *args[3:]), {k: done.get(id(v), v) if k in names else v for k, v in kwargs.items()}


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _quantized(module: nn.Module, x: Tensor) -> Tensor:
    quantizer: Quantizer = module.get_submodule(NAME)  # type: ignore[assignment]
    if quantizer.samples is not None:
        quantizer.samples.append(_sample(x))
        return x
    if not quantizer.calibrated:
        if _frozen or not module.training:
            _warn_uncalibrated(module)
            return x
        quantizer.observe_(x.detach())
    return quantizer(x)  # type: ignore[no-any-return]


def _sample(x: Tensor) -> Tensor:
    flat = x.detach().flatten().to(torch.float32)
    kept = flat[:: max(1, flat.numel() // _SAMPLE_ENTRIES)]
    return torch.cat([kept, flat.min()[None], flat.max()[None]]) if flat.numel() else kept


_WARN_UNCALIBRATED = (
    "the input of {} passes through in float: its quantizer has no scale yet. Call qsam.calibrate(model, batches), "
    "or run one forward in training mode."
)


def _warn_uncalibrated(module: nn.Module) -> None:
    warnings.warn(_WARN_UNCALIBRATED.format(type(module).__name__), UserWarning, stacklevel=3)
