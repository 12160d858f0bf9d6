"""Compiling a kernel: once for all sizes, kept on the disk, called without guards, and checked against its formula.

A kernel is a function of tensors: rows ``(n,)`` or ``(R, n)`` first, then their scales ``(1,)`` or ``(R, 1)``, the two
limits, and perhaps a coefficient ``(1,)``; or, where rows are a product, two scales, a shift and a bias ``(n,)``. One
that writes has parameters for that: ``out``; or ``x_out``, which is the very memory that it was given as ``x``. The
compiler is not told that they are one. What it writes is right all the same if each entry is read before it is written,
as in one sweep, and whether that is so is tried out.

On a CPU :mod:`qsam.kernel_build` makes it a C function, :mod:`qsam.kernel_cache` keeps that, and
:class:`qsam.native.Native` calls it. Elsewhere it is ``torch.compile``'s.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import inspect
import logging
import os
import sys
import tempfile
import threading
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qsam import kernel_build, kernel_cache
from qsam.native import Native

_log = logging.getLogger("qsam")

Kernel = Callable[..., Any]
Dtypes = tuple[torch.dtype, ...]
Kind = tuple[Kernel, Dtypes, int]
Companions = Callable[[Kernel, Dtypes, int], Iterable[Kind]]
ERRORS = (RuntimeError, OSError)
"""What a missing or failing compiler raises: torch's own errors of compilation are RuntimeErrors."""

_CPU = torch.device("cpu")
_LOCK = threading.RLock()
_BUILT: dict[str, Native] = {}
"""Kernels that were compiled along with another one, and were not asked for yet."""


@functools.cache
def compiled(
    kernel: Kernel, dtypes: Dtypes, dims: int, device: torch.device, companions: Companions = lambda *_: ()
) -> Kernel:
    """Return a kernel compiled for rows of any size.

    It is compiled here, and run, on examples of its own, so that what goes wrong later is not the compiler.

    Args:
        kernel: A function of tensors; see the module.
        dtypes: Of its rows and of its scale. Limits are fp32.
        dims: 1 for one row, 2 for several.
        device: Of all.
        companions: Returns the kinds that will be asked for next. On a CPU they are compiled at once, in little more
            time than one.

    Raises:
        RuntimeError: it cannot be compiled, or does not compute what its formula does.
        OSError: there is no compiler.
    """
    _refuse_switched_off()
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False), _LOCK:
        if device.type == "cpu":
            return _on_cpu(kernel, dtypes, dims, companions)
        call = torch.compile(kernel, fullgraph=True, dynamic=True)
        _check(kernel, call, _examples(kernel, dtypes, dims, device))
        return call


def _on_cpu(kernel: Kernel, dtypes: Dtypes, dims: int, companions: Companions) -> Kernel:
    """Return a kernel from the disk, or compile it."""
    name = kernel_cache.key(kernel, dtypes, dims)
    kept = kernel_cache.load(name) if name not in _BUILT else None
    if kept is not None:
        try:
            _check(kernel, kept, _examples(kernel, dtypes, dims, _CPU))
            return kept
        except RuntimeError as error:
            _log.warning("qsam compiles %s anew: %s", kernel.__name__.strip("_"), error)
            kernel_cache.remove(name)
    if name not in _BUILT:
        with without_garbage_collection():
            _build([(kernel, dtypes, dims), *companions(kernel, dtypes, dims)])
    call = _BUILT.pop(name, None) or _guarded(kernel)
    try:
        _check(kernel, call, _examples(kernel, dtypes, dims, _CPU))
    except RuntimeError:
        kernel_cache.remove(name)
        raise
    return call


def _build(kinds: Sequence[Kind]) -> None:
    """Compile the first of these kernels, and the others that are not there, and keep them: all that fit."""
    _log.info("qsam compiles %s for %s", kinds[0][0].__name__.strip("_"), kinds[0][1][0])
    drafts = {}
    for i, kind in enumerate(kinds):
        name = kernel_cache.key(*kind)
        if i and (name in drafts or name in _BUILT or kernel_cache.has(name)):
            continue
        try:
            examples = (_examples(*kind, _CPU), _examples(*kind, _CPU, small=True))
            drafts[name] = kernel_build.draft(kind[0], *examples, f"kernel_{i}")
        except (kernel_build.Unfit, AssertionError, AttributeError, ImportError, TypeError) as error:
            _log.warning("qsam cannot call %s directly: %r", kind[0].__name__.strip("_"), error)
    if drafts:
        _keep(drafts)


def _keep(drafts: dict[str, kernel_build.Draft]) -> None:
    """Compile drafts, by their keys, and keep what comes of it.

    Raises:
        RuntimeError: the C++ compiler fails, or the system does not load what it has made.
    """
    with tempfile.TemporaryDirectory(prefix="qsam-", ignore_cleanup_errors=True) as place:
        places = [kernel_build.library(list(drafts.values()), Path(place))]
        try:
            places.insert(0, kernel_cache.store({name: each.plan for name, each in drafts.items()}, places[0]))
        except OSError as error:
            _log.warning("qsam cannot keep its kernels for the next process: %s", error)
        for library in places:
            try:
                _BUILT.update({name: Native(each.plan, library) for name, each in drafts.items()})
                return
            except (ImportError, AttributeError) as error:
                _log.warning("qsam cannot load its kernels from %s: %s", library, error)
        raise RuntimeError(f"compiled kernels cannot be loaded from {places[-1].parent}")


@contextlib.contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Importing the compiler makes a million objects that stay; to look through them time and again takes a second."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _guarded(kernel: Kernel) -> Kernel:
    """Return a kernel as torch.compile calls it, which takes longer than a small kernel.

    Each kind compiles code of its own: torch.compile counts how often it has compiled one, and gives up at eight.
    """
    fresh = types.FunctionType(kernel.__code__.replace(), kernel.__globals__, kernel.__name__)
    return torch.compile(fresh, fullgraph=True, dynamic=True)


def _refuse_switched_off() -> None:
    """Raise a RuntimeError where the user wants nothing compiled; without its import nobody said so."""
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    stance = getattr(getattr(dynamo, "_stance", None), "stance", "default")
    names = ("TORCHDYNAMO_DISABLE", "TORCH_COMPILE_DISABLE")
    if stance == "force_eager" or any(os.environ.get(name, "0") == "1" for name in names):
        raise RuntimeError("torch.compile is switched off")


def _examples(kernel: Kernel, dtypes: Dtypes, dims: int, device: torch.device, *, small: bool = False) -> list[Tensor]:
    """Return arguments that clip and that do not, with sizes that are all different."""
    rows, columns = (5, 13) if small else (67, 4099 if dims == 2 else 2**17 + 3)
    rows = rows if dims == 2 else 0
    line = functools.partial(torch.linspace, device=device, dtype=torch.float32)
    found = []
    for i, dtype in enumerate(dtypes[:-1]):
        values = line(i - 3, 3 - i / 2, columns) * (1 if dtype.is_floating_point else 30)
        found.append((values.repeat(rows, 1) if rows else values).to(dtype))
    names = inspect.signature(kernel).parameters
    if "limits" in names:
        scale = line(0.2, 0.3, rows or 1).view(-1, *[1] * bool(rows))
        limits = torch.tensor([-2.0, 1.0], device=device, dtype=torch.float32)
        after = [line(0.7, 0.8, 1).to(dtypes[0])] if "coefficient" in names else []
        return [*found, scale.to(dtypes[-1]), limits, *after]
    scales = [line(0.2, 0.3, 1), line(0.3, 0.4, columns if "column_scale" in names else 1)]
    return [*found, *scales, line(-9, 9, columns).int(), line(-1.0, 1.0, columns)]


def _check(kernel: Kernel, call: Kernel, examples: list[Tensor]) -> None:
    """See that a compiled kernel does what its formula does, also where it writes over what it reads."""
    names = list(inspect.signature(kernel).parameters)
    apart, shared = ([t.clone() for t in examples] for _ in range(2))
    overwritten = {}
    for i, name in enumerate(names):
        source = name.removesuffix("_out")
        if source != name and source in names:
            overwritten[names.index(source)] = i
            shared[i] = shared[names.index(source)].view(shared[i].dtype)
    expected, found = kernel(*apart), call(*shared)
    for place, out in overwritten.items():
        apart[place] = apart[out].view(apart[place].dtype)
    same = all(torch.equal(a, b) for a, b in zip(apart, shared, strict=True))
    if not same or not _agree(expected, found):
        raise RuntimeError(f"the compiled kernel {kernel.__name__.strip('_')!r} does not compute what its formula does")


def _agree(expected: Any, found: Any) -> bool:
    """Whether results are equal, those that are sums to rounding."""
    if isinstance(expected, tuple):
        return all(_agree(e, f) for e, f in zip(expected, found, strict=True))
    if expected is None:
        return found is None
    if expected.numel() > 2**10:
        return torch.equal(expected, found)
    return torch.allclose(expected, found, rtol=1e-3, atol=0.0)
