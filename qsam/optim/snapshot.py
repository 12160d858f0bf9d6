"""Save and restore the buffers and random states that a pass of a step changes.

Only the first pass of a step may change BatchNorm statistics, counters and random number generators. BatchNorm's
``momentum`` is not changed, because that would recompile the model and miss ``num_batches_tracked``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import random
import sys
import types
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

_LONGEST_PATH = 4
_LONGEST_CONTAINER = 64
_FOLLOWED = (types.FunctionType, types.MethodType, functools.partial, list, tuple, dict)
_OPAQUE = (type, types.ModuleType, Tensor, torch.optim.Optimizer)


@dataclasses.dataclass(frozen=True)
class RandomState:
    """The states of Python's, torch's CPU and all CUDA generators, and of NumPy's global one if NumPy is in use."""

    python: Any
    cpu: Tensor
    cuda: list[Tensor]
    numpy: Any

    @staticmethod
    def now() -> RandomState:
        """Return the present states."""
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
        numpy = sys.modules.get("numpy")  # Wav2Vec2 draws the spans that it masks from it
        return RandomState(random.getstate(), torch.get_rng_state(), cuda, numpy and numpy.random.get_state())

    def restore(self) -> None:
        """Set the generators to these states."""
        random.setstate(self.python)
        torch.set_rng_state(self.cpu)
        if self.numpy is not None:
            sys.modules["numpy"].random.set_state(self.numpy)
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)


@contextlib.contextmanager
def same_random_numbers(start: RandomState | None) -> Iterator[None]:
    """Within this context draw the numbers that followed ``start`` again; None: draw new ones."""
    if start is None:
        yield
        return
    after = RandomState.now()
    start.restore()
    try:
        yield
    finally:
        after.restore()


@contextlib.contextmanager
def buffers_kept(*models: nn.Module) -> Iterator[None]:
    """Restore every buffer of the models at the end: its identity, and its values if they may have been written.

    BatchNorm writes its statistics without counting a version, so the version does not suffice; comparing values would
    wait for the device. A buffer made under ``inference_mode`` has no version and can only be written in that mode.
    """
    modules = dict.fromkeys(module for model in models for module in model.modules())
    kept = [
        (module, name, buffer, _version(buffer), buffer.clone())
        for module in modules
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        yield
    finally:
        for module, name, buffer, version, values in kept:
            if _version(buffer) != version or _is_written_unseen(buffer):
                with torch.inference_mode(buffer.is_inference()), torch.no_grad():
                    buffer.copy_(values)
            module._buffers[name] = buffer


def _version(buffer: Tensor) -> int | None:
    return None if buffer.is_inference() else buffer._version


def _is_written_unseen(buffer: Tensor) -> bool:
    """Whether the values may be written without a change of the version."""
    if buffer.layout != torch.strided:  # torch writes no statistics into a sparse tensor
        return buffer.is_inference()
    return (buffer.is_floating_point() and buffer.is_contiguous()) or buffer.is_inference()


def modules_of(function: Any) -> list[nn.Module]:
    """Return the modules that a function refers to: a discriminator, a teacher, a frozen encoder.

    The search follows variables of enclosing functions, globals that the function names, default arguments, bound
    methods, ``functools.partial``, short lists, tuples and dicts, and the attributes of one object, over at most four
    references. A module stands for all its submodules.
    """
    modules: list[nn.Module] = []
    seen: set[int] = set()
    level = [(function, True)]
    for _ in range(_LONGEST_PATH + 1):
        below: list[tuple[Any, bool]] = []
        for value, into_objects in level:
            if id(value) in seen:
                continue
            seen.add(id(value))
            if isinstance(value, nn.Module):
                modules.append(value)
            elif isinstance(value, _FOLLOWED):
                below += [(inner, into_objects) for inner in _references(value)]
            elif into_objects and not isinstance(value, _OPAQUE):
                below += [(inner, False) for inner in vars(value).values()] if hasattr(value, "__dict__") else []
        level = below
    return modules


def _references(value: Any) -> Iterable[Any]:
    if isinstance(value, types.MethodType):
        return value.__func__, value.__self__
    if isinstance(value, functools.partial):
        return value.func, *value.args, *value.keywords.values()
    if isinstance(value, types.FunctionType):
        if str(value.__module__).partition(".")[0] == "torch":
            return ()
        named = (value.__globals__.get(name) for name in value.__code__.co_names)
        return [*_contents(value), *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values(), *named]
    if len(value) > _LONGEST_CONTAINER:
        return ()
    return list(value.values()) if isinstance(value, dict) else list(value)


def _contents(function: types.FunctionType) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # a variable that has no value yet
            yield cell.cell_contents
