"""Quantization of a layer's input in the graph: the forward pre-hook, and how it gets its first scale.

The hook is a module-level function, so that a deepcopy or pickle of the model runs its own quantizer. Its flags are
plain Python, so that a compiled graph stays whole.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import threading
import warnings
from collections.abc import Iterable, Iterator
from typing import Any, TypeGuard

import torch
from torch import Tensor, distributed, nn
from torch.nn.utils.rnn import PackedSequence

from qsam.fused import linear
from qsam.private import active_data_parallel, composed_modules
from qsam.quantizers import Quantizer

NAME = "input_quantizer"
_PLACE = "_qsam_place"

_SAMPLE_ENTRIES = 2**16
"""Entries of one batch that calibration keeps, besides its smallest and largest."""

_TOTAL_ENTRIES = 2**20
"""Entries of all batches that calibration keeps; beyond, they are thinned out."""


@dataclasses.dataclass
class _Calibration:
    """Whether inputs may be calibrated now: not during perturbed passes, which threads may run at the same time."""

    forbidden: int = 0
    lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)

    def forbid(self, count: int) -> None:
        """Count a pass that begins (1) or ends (-1)."""
        with self.lock:
            self.forbidden += count


_CALIBRATION = _Calibration()


@dataclasses.dataclass(frozen=True)
class Place:
    """Where an input quantizer sits, for messages.

    Attributes:
        path: Path of the module whose input it quantizes; empty for the model itself.
        said: What has been warned of once; one set for all inputs of a model.
    """

    path: str
    said: set[str]


def attach_input_(module: nn.Module, quantizer: Quantizer, place: Place) -> None:
    """Give ``module`` an input quantizer, as the submodule ``input_quantizer`` and a pre-hook."""
    setattr(quantizer, _PLACE, place)
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


def shown(path: str) -> str:
    """Return a module's path for a message: the model itself has none."""
    return repr(path) if path else "the model itself"


@contextlib.contextmanager
def frozen() -> Iterator[None]:
    """Within this context no input is calibrated: its statistics would be those of a perturbed model."""
    _CALIBRATION.forbid(1)
    try:
        yield
    finally:
        _CALIBRATION.forbid(-1)


@contextlib.contextmanager
def collecting(quantizers: list[Quantizer], group: distributed.ProcessGroup | None = None) -> Iterator[None]:
    """Within this context inputs pass through as float and samples of them are kept; then signs and scales are set.

    An input that was not reached, in one of the processes of ``group``, stays as it was.

    Raises:
        ValueError: at the end, if an input was not finite.
    """
    for quantizer in quantizers:
        quantizer.samples = []
    try:
        yield
        for quantizer in quantizers:
            # An input that was not reached takes part with nothing, on its device: other processes may wait for it.
            nothing = [p.new_zeros(0) for p in quantizer.parameters()] or [torch.zeros(0)]
            _observe(quantizer, torch.cat([*nothing, *(quantizer.samples or ())]), group)
    finally:
        for quantizer in quantizers:
            quantizer.samples = None


def data_parallel_group(model: nn.Module) -> distributed.ProcessGroup | None:
    """Return the processes of a DistributedDataParallel model (compiled or not), or None."""
    model = getattr(model, "_orig_mod", model)
    return model.process_group if isinstance(model, nn.parallel.DistributedDataParallel) else None


def is_sharded(modules: Iterable[nn.Module]) -> bool:
    """Whether ``fully_shard`` (FSDP2) was called on one of these modules."""
    if not _in_process_group():
        return False
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(module, FSDPModule) for module in modules)


def _quantize_first_input(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    for i, value in enumerate(args):
        if isinstance(value, PackedSequence):
            return None
        if _is_floating(value):
            return (*args[:i], _quantized(module, value), *args[i + 1 :]), kwargs
    for key in ("input", *kwargs):  # `gru(hx=h, input=x)`: what torch calls the input is the input
        value = kwargs.get(key)
        if isinstance(value, PackedSequence):
            return None
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


def _is_floating(value: Any) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and value.is_floating_point()


def _quantized(module: nn.Module, x: Tensor) -> Tensor:
    quantizer: Quantizer = module._modules[NAME]  # type: ignore[assignment]
    if quantizer.samples is not None:
        _keep_sample(quantizer.samples, x)
        return x
    if not quantizer.calibrated:
        if not x.numel():
            return x
        if not module.training or _CALIBRATION.forbidden:
            _warn_uncalibrated(quantizer)
            return x
        _observe_first_batch(quantizer, x)
    if quantizer.signed is None:
        _refuse_unknown_sign(quantizer)
    if x.is_nested:
        return torch.nested.as_nested_tensor([quantizer(part) for part in x.unbind()], layout=x.layout)
    found = linear.pending(module, quantizer, x)  # to its layer as good as a tensor
    return quantizer(x) if found is None else found  # type: ignore[return-value]


def _observe_first_batch(quantizer: Quantizer, x: Tensor) -> None:
    if _is_sharded_within(quantizer):
        raise RuntimeError(
            f"the input of {shown(_place(quantizer).path)} has no scale yet, and under FSDP2 a forward cannot set it: "
            "call qsam.calibrate(model, batches) before fully_shard."
        )
    _observe(quantizer, _sample(_flat(x)), _active_data_parallel_group())


@torch.no_grad()
def _observe(quantizer: Quantizer, x: Tensor, group: distributed.ProcessGroup | None = None) -> None:
    """Set sign and parameters from data: a negative entry in any process makes it signed; parameters are averaged."""
    empty = torch.tensor(x.numel() == 0, device=x.device)
    facts = torch.stack([(x < 0).any(), ~x.isfinite().all(), empty]).to(torch.int32)
    if group is not None:
        distributed.all_reduce(facts, distributed.ReduceOp.MAX, group)
    negative, broken, unreached = facts.tolist()
    if unreached:
        return
    if broken:
        raise ValueError(
            f"the input of {shown(_place(quantizer).path)} holds NaN or infinity: its scale cannot be set from it."
        )
    quantizer.signed = bool(negative)
    quantizer.observe_(x)
    if group is not None:
        for tensor in filter(Tensor.is_floating_point, quantizer.state_dict().values()):
            distributed.all_reduce(tensor, distributed.ReduceOp.SUM, group)
            tensor.div_(group.size())


def _in_process_group() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def _active_data_parallel_group() -> distributed.ProcessGroup | None:
    """Return the processes of the DistributedDataParallel model whose forward is running, if one is."""
    if not _in_process_group():
        return None
    active = active_data_parallel()
    return None if active is None else active.process_group


def _is_sharded_within(quantizer: Quantizer) -> bool:
    """Whether a module above ``quantizer`` is sharded: its parameters are gathered copies now, and writes are lost."""
    if not _in_process_group():
        return False
    modules = composed_modules()
    if modules is None:
        return True
    return any(is_sharded([m]) and any(quantizer is below for below in m.modules()) for m in modules)


def _flat(x: Tensor) -> Tensor:
    """Return all entries of a tensor in one dimension; of a nested one too."""
    x = x.detach()
    return torch.cat([part.flatten() for part in x.unbind()]) if x.is_nested else x.flatten()


def _keep_sample(samples: list[Tensor], x: Tensor) -> None:
    if not x.numel():
        return
    samples.append(_sample(_flat(x)))
    if sum(map(len, samples)) > _TOTAL_ENTRIES:
        samples[:] = [_sample(torch.cat(samples), _TOTAL_ENTRIES // 2)]


def _sample(flat: Tensor, entries: int = _SAMPLE_ENTRIES) -> Tensor:
    """Return about so many evenly spread entries, and the extremes; everything, if it is little.

    The stride has no factor in common with the number of entries, thus with no dimension of the tensor: otherwise it
    would visit the same few channels in each row.
    """
    stride = max(1, flat.numel() // entries)
    while math.gcd(stride, flat.numel()) > 1:
        stride += 1
    return flat if stride == 1 else torch.cat([flat[::stride], flat.min()[None], flat.max()[None]])


def _place(quantizer: Quantizer) -> Place:
    place: Place = vars(quantizer)[_PLACE]
    return place


def was_passed_as_float(quantizer: Quantizer) -> bool:
    """Whether a warning has told already that inputs pass through in float, this one or others of its model."""
    return "uncalibrated" in _place(quantizer).said


def _warn_uncalibrated(quantizer: Quantizer) -> None:
    place = _place(quantizer)
    if "uncalibrated" in place.said:
        return
    place.said.add("uncalibrated")
    warnings.warn(
        f"the input of {shown(place.path)}, and of every other layer whose input quantizer has no scale yet, passes "
        "through in float. Call qsam.calibrate(model, batches), or run one forward in training mode.",
        UserWarning,
        stacklevel=3,
    )


def _refuse_unknown_sign(quantizer: Quantizer) -> None:
    raise RuntimeError(
        f"the scale of the input of {shown(_place(quantizer).path)} was loaded, but a state_dict does not say whether "
        "the input is signed. Rebuild the quantizers with qsam.quantize_(model, spec=...), load the optimizer's "
        "state_dict too, or call qsam.calibrate(model, batches)."
    )
