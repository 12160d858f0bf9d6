"""Which back end computes, and what may be given to a kernel: a choice for the whole process.

Kernels see memory, and nobody sees a kernel. So a tensor whose memory is not what it says, and whoever follows the
operations one by one, has the formulas run as they stand.
"""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor

from qsam.registry import nearest

BACKENDS = ("auto", "eager", "compiled")

SMALLEST = 2**16
"""Entries from which ``"auto"`` compiles, of one input, or of all weights of a model together: a small model gains
little and need not wait for a compiler."""


@dataclasses.dataclass
class _Choice:
    """What was chosen, and why kernels cannot be compiled, once that is known."""

    backend: str = "auto"
    failure: str | None = None


_CHOICE = _Choice()


def set_backend(backend: str) -> None:
    """Choose how fake quantization, write and pull-back are computed, for the whole process.

    Args:
        backend: ``"eager"``: one torch operation after the other. ``"compiled"``: fused by torch's compiler, an error
            where that fails. ``"auto"`` (the beginning): fused for inputs of 65,536 entries or more and for models with
            as many quantized weights, eager for smaller ones and where compiling fails, which is said once.

    On a CPU a Linear layer is fused with the quantization of its input. Where the processor has instructions for int8
    (VNNI), the input 128 rows or more, and the weight is on its grid, it multiplies integers. That is rounded less
    often than a product in fp32: codes and written weights are the same bit for bit with each backend, outputs of such
    a layer to the rounding of fp32.

    Raises:
        ValueError: another name.

    Example:
        >>> set_backend("auto")
    """
    if backend not in BACKENDS:
        hint = nearest(str(backend), list(BACKENDS))
        raise ValueError(f"`backend` must be one of {', '.join(BACKENDS)}, got {backend!r}.{hint}")
    _CHOICE.backend, _CHOICE.failure = backend, None


@contextlib.contextmanager
def using(backend: str) -> Iterator[None]:
    """Within this context the backend is another one."""
    before = _CHOICE.backend
    set_backend(backend)
    try:
        yield
    finally:
        set_backend(before)


def wants(entries: int) -> bool:
    """Whether a tensor of so many entries is to be given to a kernel."""
    if _CHOICE.backend == "eager" or (_CHOICE.backend == "auto" and entries < SMALLEST):
        return False
    return _CHOICE.failure is None


def has_failed() -> bool:
    """Whether nothing can be compiled here, as has been said."""
    return _CHOICE.failure is not None


def note_failure(error: BaseException) -> None:
    """Go on eagerly after a kernel could not be compiled, and say so; where compiled ones were asked for, raise."""
    if _CHOICE.backend == "compiled":
        raise error
    reason = [*str(error).strip().splitlines(), ""][0]
    _CHOICE.failure = f"{type(error).__name__}: {reason}"
    warnings.warn(
        f"qsam's kernels cannot be compiled here and run eagerly, which is slower ({_CHOICE.failure}). Install a C++ "
        'compiler, or say qsam.set_backend("eager").',
        UserWarning,
        stacklevel=4,
    )


def is_watched() -> bool:
    """Whether somebody follows the operations: a compiler, a tracer, a dispatch mode, forward-mode differentiation."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return True
    return torch._C._len_torch_dispatch_stack() > 0 or torch.autograd.forward_ad._current_level >= 0


def is_plain(t: Tensor) -> bool:
    """Whether what is in memory is what the tensor says: no subclass, no tensor within vmap, no lazy negation."""
    if type(t) not in (Tensor, torch.nn.Parameter) or t.is_neg() or not torch._C._has_storage(t):
        return False
    return not torch._C._functorch.is_functorch_wrapped_tensor(t)
