"""Quantization of a layer's input in the graph: the forward pre-hook, and how it gets its first scale.

The hook is a module-level function, so that a deepcopy or pickle of the model runs its own quantizer. The quantizer's
buffer ``limits`` says whether the input has a scale, and its sign: eager code reads it, and a compiled graph computes
with it, without a graph break.
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
"""Entries of all batches that calibration keeps; if there are more, they are subsampled."""


@dataclasses.dataclass
class _Calibration:
    """Counts the perturbed passes that are running, in any thread: inputs are not calibrated meanwhile."""

    forbidden: int = 0
    lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)

    def forbid(self, count: int) -> None:
        """Add 1 when a pass begins and -1 when it ends."""
        with self.lock:
            self.forbidden += count


_CALIBRATION = _Calibration()


_LOOKS = 128
"""The last forward after calibration in which an unsigned input is checked for negative entries; forwards 1, 2, 4, 8
and so on are checked."""


@dataclasses.dataclass(eq=False)
class Place:
    """The path of an input quantizer, and the state of its hook.

    Attributes:
        path: Path of the module whose input it quantizes; empty for the model itself.
        said: The warnings that have been given; one set for all inputs of a model.
        samples: The samples that calibration has collected so far; None outside calibration.
        looks: How many forwards have come since the input was calibrated, up to :data:`_LOOKS`.
        passed: Whether the layer has been called and its input passed in float, because no scale could be set from it.
    """

    path: str
    said: set[str]
    samples: list[Tensor] | None = None
    looks: int = 0
    passed: bool = False


def attach_input_(module: nn.Module, quantizer: Quantizer, place: Place) -> None:
    """Give ``module`` an input quantizer, as the submodule ``input_quantizer`` and a pre-hook."""
    setattr(quantizer, _PLACE, place)
    module.add_module(NAME, quantizer)
    hook = _quantize_attention_inputs if isinstance(module, nn.MultiheadAttention) else _quantize_first_input
    module.register_forward_pre_hook(hook, with_kwargs=True)


def batch_first_of(root: nn.Module, path: str) -> bool | None:
    """Return ``batch_first`` of the module at ``path`` or of its nearest ancestor that has it; None if none has.

    The attribute may also belong to an ``nn.MultiheadAttention`` that is a direct child of the module.

    Example:
        >>> batch_first_of(nn.TransformerEncoderLayer(8, 2, 16), "linear1"), batch_first_of(nn.Linear(2, 2), "")
        (False, None)
    """
    parts = path.split(".") if path else []
    for count in range(len(parts), -1, -1):
        module = root.get_submodule(".".join(parts[:count]))
        for each in (module, *(child for child in module.children() if isinstance(child, nn.MultiheadAttention))):
            found = getattr(each, "batch_first", None)
            if isinstance(found, bool):
                return found
    return None


def detach_input_(module: nn.Module) -> None:
    """Undo :func:`attach_input_`."""
    ours = (_quantize_attention_inputs, _quantize_first_input)
    for key, hook in list(module._forward_pre_hooks.items()):
        if hook in ours:
            del module._forward_pre_hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)
    delattr(module, NAME)


def shown(path: str) -> str:
    """Return a module's path for a message; the model itself has none."""
    return repr(path) if path else "the model itself"


@contextlib.contextmanager
def frozen() -> Iterator[None]:
    """Within this context no input is calibrated, because its statistics would be those of a perturbed model."""
    _CALIBRATION.forbid(1)
    try:
        yield
    finally:
        _CALIBRATION.forbid(-1)


@contextlib.contextmanager
def collecting(quantizers: list[Quantizer], group: distributed.ProcessGroup | None = None) -> Iterator[set[Quantizer]]:
    """Within this context inputs pass through as float and samples of them are kept; then signs and scales are set.

    An input that was not reached in one of the processes of ``group`` stays as it was. So does an input that held only
    zeros, with a warning. An input that is not finite raises ValueError at the end.

    Yields:
        A set that holds, after this context, the quantizers whose inputs were reached.
    """
    places = [_place(quantizer) for quantizer in quantizers]
    for place in places:
        place.samples = []
    try:
        reached: set[Quantizer] = set()
        yield reached
        reached |= {quantizer for quantizer, place in zip(quantizers, places, strict=True) if place.samples}
        for quantizer, place in zip(quantizers, places, strict=True):
            # An input that was not reached takes part with no entries, because other processes may wait for it.
            _observe(quantizer, torch.cat([quantizer.limits.new_zeros(0), *(place.samples or ())]), group)
        _warn_zeros(
            [_place(quantizer).path for quantizer in quantizers if quantizer in reached and not quantizer.calibrated]
        )
    finally:
        for place in places:
            place.samples = None


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
    for key in ("input", *kwargs):  # `gru(hx=h, input=x)`: torch's layers name their input so
        value = kwargs.get(key)
        if isinstance(value, PackedSequence):
            return None
        if _is_floating(value):
            return args, {**kwargs, key: _quantized(module, value)}
    return None


def _quantize_attention_inputs(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Quantize query, key and value, each distinct tensor once, because self-attention must still get one tensor."""
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
    if torch.compiler.is_compiling():
        if not quantizer.calibrated:
            return _quantized_outside(module, x)
    elif not _is_ready(module, quantizer, x):
        return x
    if x.is_nested:
        return torch.nested.as_nested_tensor([quantizer(part) for part in x.unbind()], layout=x.layout)
    found = linear.deferred(module, quantizer, x)  # a stand-in that only nn.Linear will use
    return quantizer(x) if found is None else found  # type: ignore[return-value]


def _quantized_outside(module: nn.Module, x: Tensor) -> Tensor:
    """Leave the graph that is being compiled, because the input has no scale yet."""
    if torch.compiler.is_exporting():
        raise RuntimeError(
            f"the input of {shown(_place(module._modules[NAME]).path)} has no scale yet, as far as torch.export can "  # type: ignore[arg-type]
            "see: call qsam.calibrate(model, batches), or run the model once, before exporting it."
        )
    out: Tensor = _quantized_eagerly(module, x)
    return out


@torch.compiler.disable(  # type: ignore[no-untyped-call, untyped-decorator]
    reason="an input has no scale yet: call qsam.calibrate(model, batches) before compiling"
)
def _quantized_eagerly(module: nn.Module, x: Tensor) -> Tensor:
    return _quantized(module, x)


def _is_ready(module: nn.Module, quantizer: Quantizer, x: Tensor) -> bool:
    """Whether to quantize the input now; calibrate it if it has no scale and may be calibrated."""
    place = _place(quantizer)
    if place.samples is not None:
        _keep_sample(place.samples, x)
        return False
    limits = quantizer.readable_limits()
    if limits is None:  # the quantizer computes with the tensor
        return True
    quantizer.note_limits(limits)
    low, high = limits
    if high > low:
        if low >= 0 and place.looks < _LOOKS:
            _watch_sign(place, x)
        return True
    if math.isnan(low):
        _refuse_unknown_sign(quantizer)
    if not x.numel():
        return False
    place.passed = True
    if not module.training or _CALIBRATION.forbidden:
        if not _is_zero(x):
            _warn_uncalibrated(quantizer)
        return False
    _observe_first_batch(quantizer, x)
    return quantizer.calibrated


def _is_zero(x: Tensor) -> bool:
    """Whether x is known to hold nothing but zeros, which every grid leaves as they are."""
    try:
        return not bool((_flat(x) != 0).any())
    except RuntimeError:  # under vmap, or a tensor without values
        return False


def _watch_sign(place: Place, x: Tensor) -> None:
    """Warn once of negative entries at an unsigned input; check rarely, because a check waits for the device."""
    place.looks += 1
    if place.looks & (place.looks - 1):
        return
    try:
        negative = bool((_flat(x) < 0).any())
    except RuntimeError:  # under vmap, or a tensor without values
        return
    if negative and "negative" not in place.said:
        place.said.add("negative")
        warnings.warn(
            f"the input of {shown(place.path)} held no negative entry in the data that its scale was set from, and is "
            "unsigned; now it holds negative entries, which become 0. Call qsam.calibrate(model, batches) with typical "
            "batches, which sets the sign of every input again.",
            UserWarning,
            stacklevel=3,
        )


def _observe_first_batch(quantizer: Quantizer, x: Tensor) -> None:
    if _is_sharded_within(quantizer):
        raise RuntimeError(
            f"the input of {shown(_place(quantizer).path)} has no scale yet, and under FSDP2 a forward cannot set it: "
            "call qsam.calibrate(model, batches) before fully_shard."
        )
    _observe(quantizer, _sample(_flat(x)), _active_data_parallel_group())


@torch.no_grad()
def _observe(quantizer: Quantizer, x: Tensor, group: distributed.ProcessGroup | None = None) -> None:
    """Set sign and parameters from data: a negative entry in any process makes it signed; parameters are averaged.

    If a process has no entry or only zeros, the input stays as it was.
    """
    facts = torch.stack([(x < 0).any(), ~x.isfinite().all(), ~(x != 0).any()]).to(torch.int32)
    if group is not None:
        distributed.all_reduce(facts, distributed.ReduceOp.MAX, group)
    negative, broken, nothing = facts.tolist()
    if nothing:
        return
    if broken:
        raise ValueError(
            f"the input of {shown(_place(quantizer).path)} holds NaN or infinity: its scale cannot be set from it."
        )
    quantizer.observe_(x, signed=bool(negative))
    _place(quantizer).looks = 0
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
    """Whether a module above ``quantizer`` is sharded, so that writes to gathered parameters would be lost."""
    if not _in_process_group():
        return False
    modules = composed_modules()
    if modules is None:
        return True
    return any(is_sharded([m]) and any(quantizer is below for below in m.modules()) for m in modules)


def _flat(x: Tensor) -> Tensor:
    """Return all entries of a tensor, nested or not, in one dimension."""
    x = x.detach()
    return torch.cat([part.flatten() for part in x.unbind()]) if x.is_nested else x.flatten()


def _keep_sample(samples: list[Tensor], x: Tensor) -> None:
    if not x.numel():
        return
    samples.append(_sample(_flat(x)))
    if sum(map(len, samples)) > _TOTAL_ENTRIES:
        samples[:] = [_sample(torch.cat(samples), _TOTAL_ENTRIES // 2)]


def _sample(flat: Tensor, entries: int = _SAMPLE_ENTRIES) -> Tensor:
    """Return about ``entries`` evenly spread entries and the extremes, or everything if there are fewer.

    The stride has no factor in common with the number of entries, and so with no dimension of the tensor. Otherwise it
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
    """Whether the layer has been called with an input that could set no scale: zeros, or not in training mode."""
    return _place(quantizer).passed


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


def _warn_zeros(paths: list[str]) -> None:
    if paths:
        more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
        warnings.warn(
            f"the input of {shown(paths[0])}{more} held zeros only, which say nothing about its scale: it passes in "
            "float until a batch in training mode, or another qsam.calibrate, has other entries.",
            UserWarning,
            stacklevel=5,
        )


def _refuse_unknown_sign(quantizer: Quantizer) -> None:
    raise RuntimeError(
        f"the scale of the input of {shown(_place(quantizer).path)} was loaded from a file of an older qsam, which "
        "does not say whether the input is signed. Rebuild the quantizers with qsam.quantize_(model, spec=...), load "
        "the optimizer's state_dict too, or call qsam.calibrate(model, batches)."
    )
