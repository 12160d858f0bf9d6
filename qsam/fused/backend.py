"""Which back end computes, and who must not be given a kernel: a choice for the whole process.

Kernels see memory, and nobody sees a kernel. So the eager formulas run for a tensor whose memory is not what the tensor
says, and while a compiler, a tracer or a dispatch mode follows the operations one by one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor

from qsam.private import dispatch_mode_is_active
from qsam.registry import nearest

BACKENDS = ("auto", "eager", "compiled")

SMALLEST = 2**16
"""Entries from which ``"auto"`` uses kernels, in one input, or in all weights of a model together: a small model gains
little and need not wait for a compiler."""


@dataclasses.dataclass
class _Choice:
    """The back end that was chosen, and why there are no kernels, once that is known."""

    backend: str = "auto"
    failure: str | None = None


_CHOICE = _Choice()


def set_backend(backend: str) -> None:
    """Choose how fake quantization, write and pull-back are computed, for the whole process.

    Args:
        backend: ``"eager"``: one torch operation after the other. ``"compiled"``: fused kernels for every size, and an
            error if they cannot be compiled. ``"auto"`` (the default): fused kernels for inputs of 65,536 entries or
            more and for models with as many quantized weights; eager for smaller ones, and if the kernels cannot be
            compiled, which is said once.

    The kernels for a CPU are compiled by the system's C compiler (``$CC``, or cc, gcc or clang) when the first one is
    needed, which takes around a second, and are kept in ``~/.cache/qsam`` for later processes. On Windows there are
    none. On a GPU the kernels are ``torch.compile``'s.

    On a CPU a Linear layer is fused with the quantization of its input. If the processor has instructions for int8
    (VNNI), the input has 128 rows or more, and the weight is on its grid, the layer multiplies integers. That is
    rounded less often than a product in fp32: codes and written weights are the same bit for bit with each back end,
    outputs of such a layer to the rounding of fp32.

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


def note_failure(error: BaseException) -> None:
    """Go on eagerly because there are no kernels, and say so once; where ``"compiled"`` was asked for, raise."""
    if _CHOICE.backend == "compiled":
        raise error
    reason = [*str(error).strip().splitlines(), ""][0]
    _CHOICE.failure = f"{type(error).__name__}: {reason}"
    warnings.warn(
        f"qsam's fused kernels cannot be compiled here, and the eager formulas, which are slower, run instead "
        f"({_CHOICE.failure}). Install a C compiler or name one in the environment variable CC; "
        'qsam.set_backend("eager") chooses the eager formulas without this warning.',
        UserWarning,
        stacklevel=4,
    )


def is_watched() -> bool:
    """Whether somebody follows the operations one by one: a compiler, a tracer, or a dispatch mode."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined,no-untyped-call]
        return True
    return dispatch_mode_is_active()


def is_plain(t: Tensor) -> bool:
    """Whether the memory holds what the tensor says: no subclass, no tensor within vmap, no lazy negation."""
    if type(t) not in (Tensor, torch.nn.Parameter) or t.layout is not torch.strided or t.is_neg():
        return False
    try:
        t.data_ptr()
    except RuntimeError:  # a tensor within vmap has no memory of its own
        return False
    return True
