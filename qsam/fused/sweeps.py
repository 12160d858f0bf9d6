"""The verbs of an optimizer on all its quantized weights, each weight in one sweep over its memory.

    write      p <- Q(w)
    perturb    p <- Q(w) + c * d            and whether p was Q(w)
    pull back  g <- M * g,  p <- w,  ds     and whether p was Q(w)

Each function takes a list and prepares every call before the first kernel runs, because a sweep evicts the
interpreter's data from the processor's caches. A weight without a grid, or that no kernel fits
(:mod:`qsam.fused.kernels`), is left as it is, and its answer is None.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qsam.functional import Grid
from qsam.fused import kernels


class Weight(NamedTuple):
    """A quantized weight, as kernels see it.

    Attributes:
        w: The latent.
        p: What holds Q(w).
        grid: Of Q; None if the kernels do not know Q.
    """

    w: Tensor
    p: Tensor
    grid: Grid | None


Verdict = Tensor | bool
"""Whether p held Q(w), NaN aside: a bool on a CPU; a tensor elsewhere, so that nothing waits for the device."""


def write_(weights: Sequence[Weight]) -> list[bool]:
    """Write ``p <- Q(w; s)``; return for which weights that was done."""
    done = [found is not None for found in _sweep("write", weights, [(weight.p,) for weight in weights])]
    _note_writes(weight.p for weight, fused in zip(weights, done, strict=True) if fused)
    return done


def pull_back_(
    weights: Sequence[Weight], grads: Sequence[Tensor], *, overwrite: bool
) -> list[tuple[Tensor, Verdict] | None]:
    """Pull gradients back through Q.

    Args:
        weights: The weights.
        grads: dL/dQ of each.
        overwrite: Whether each gradient becomes dw, ``M * grad``, and each p becomes w, the copy to which a failed step
            returns. Otherwise gradients and p stay as they are.

    Returns:
        ds, and the verdict on p as it was.
    """
    rows = [(g, weight.p) for weight, g in zip(weights, grads, strict=True)]
    answers = _sweep("pull_back" if overwrite else "scale_gradient", weights, rows)
    if overwrite:
        _note_writes(t for row, answer in zip(rows, answers, strict=True) if answer is not None for t in row)
    return [
        None if answer is None or weight.grid is None else (kernels.scaled(answer[0], weight.grid), answer[1] == 0)
        for weight, answer in zip(weights, answers, strict=True)
    ]


def perturb_(
    weights: Sequence[Weight], steps: Sequence[Tensor], coefficients: Sequence[Tensor]
) -> list[Verdict | None]:
    """Write ``p <- Q(w; s) + coefficient * step``; return the verdict on each p as it was.

    Args:
        weights: The weights.
        steps: One per weight, of the shape of w.
        coefficients: A scalar per weight.
    """
    rows = [(weight.p, step) for weight, step in zip(weights, steps, strict=True)]
    scalars = [c.to(weight.w.device, weight.w.dtype) for weight, c in zip(weights, coefficients, strict=True)]
    answers = _sweep("perturb", weights, rows, scalars)
    _note_writes(weight.p for weight, answer in zip(weights, answers, strict=True) if answer is not None)
    return [None if answer is None else answer[1] == 0 for answer in answers]


def _sweep(
    name: str,
    weights: Sequence[Weight],
    rows: Sequence[tuple[Tensor, ...]],
    scalars: Sequence[Tensor | None] | None = None,
) -> list[Any]:
    """Run a kernel on w and these tensors of each weight; return what it returns, None if it was not run."""
    # All weights count together: a model of many small ones is worth a compiler.
    entries = sum(weight.w.numel() for weight in weights if weight.grid is not None)
    calls: list[kernels.Call | None] = []
    for weight, tensors, scalar in zip(weights, rows, scalars or [None] * len(weights), strict=True):
        w, grid = weight.w, weight.grid
        fits = grid is not None and kernels.fuses(w, grid, entries)
        calls.append(kernels.bind(name, grid, (w, *tensors), scalar) if fits and grid is not None else None)
    return [None if call is None else call() for call in calls]


def _note_writes(tensors: Iterable[Tensor]) -> None:
    """Count a version of what a kernel wrote, so that autograd refuses to use what it has saved of it."""
    for t in tensors:
        torch.autograd.graph.increment_version(t)
