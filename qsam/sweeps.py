"""What an optimizer does to all its quantized weights, one sweep over the memory of each.

    write      p <- Q(w)                      pull back       g <- M * g,  p <- w,  ds, and whether p was Q(w)
    perturb    p <- Q(w) + c * d              scale gradient  ds, and whether p is Q(w)
    holds      whether p is Q(w)

Each takes a list: all weights are looked at first, and then the kernels follow each other. A sweep drives everything
else out of a processor's caches, and what Python would read between two of them comes from memory.

A weight is answered with None, and left as it is, where it has no grid or cannot be fused (:mod:`qsam.kernels`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qsam import formulas, kernels


class Weight(NamedTuple):
    """A quantized weight, as kernels see it.

    Attributes:
        w: The latent.
        p: What holds Q(w).
        grid: Of Q; None: not one that the kernels know.
    """

    w: Tensor
    p: Tensor
    grid: kernels.Grid | None


Verdict = Tensor | bool
"""Whether p holds Q(w), or a NaN somewhere: on a CPU it is known, elsewhere to ask would wait for the device."""


def write_(weights: Sequence[Weight]) -> list[bool]:
    """Write ``p <- Q(w; s)``; return for which weights that was done."""
    entries = _entries(weights)
    calls = [
        kernels.bound(formulas.write, grid, (w, p))
        if grid is not None and kernels.fit(grid, w, entries=entries) and kernels.is_alike(p, w)
        else None
        for w, p, grid in weights
    ]
    _run(calls)
    done = [call is not None for call in calls]
    _note_writes(weight.p for weight, fused in zip(weights, done, strict=True) if fused)
    return done


def pull_back_(weights: Sequence[Weight], grads: Sequence[Tensor]) -> list[tuple[Tensor, Verdict] | None]:
    """Pull gradients back in place, and park w in p: all that an update does to a weight before the base's step.

    Args:
        weights: The weights, whose p become w: the copies to which a failed step returns.
        grads: dL/dQ of each; become dw, ``M * grad``.

    Returns:
        ds, and the verdict on p as it was.
    """
    found = _sweep(formulas.pull_back, weights, [(g, w.p, g, w.p) for w, g in zip(weights, grads, strict=True)])
    written = [(g, w.p) for w, g, each in zip(weights, grads, found, strict=True) if each is not None]
    _note_writes(t for pair in written for t in pair)
    return _with_verdicts(weights, found)


def scale_gradients(weights: Sequence[Weight], grads: Sequence[Tensor]) -> list[tuple[Tensor, Verdict] | None]:
    """Return what :func:`pull_back_` returns, and leave everything as it is."""
    rows = [(g, w.p) for w, g in zip(weights, grads, strict=True)]
    return _with_verdicts(weights, _sweep(formulas.scale_gradient, weights, rows))


def holds(weights: Sequence[Weight]) -> list[Verdict | None]:
    """Return the verdict on each p."""
    found = _sweep(formulas.distance, weights, [(weight.p,) for weight in weights])
    return [None if far is None else _near(far) for far in found]


def perturb_(
    weights: Sequence[Weight], steps: Sequence[Tensor], coefficients: Sequence[Tensor]
) -> list[Verdict | None]:
    """Write ``p <- Q(w; s) + coefficient * step``; return the verdict on each p as it was.

    Args:
        weights: The weights.
        steps: One of the shape of w for each.
        coefficients: A scalar for each.
    """
    rows = [(weight.p, step, weight.p) for weight, step in zip(weights, steps, strict=True)]
    others = [(c.to(weight.w.device, weight.w.dtype),) for weight, c in zip(weights, coefficients, strict=True)]
    found = _sweep(formulas.perturb, weights, rows, others)
    _note_writes(weight.p for weight, far in zip(weights, found, strict=True) if far is not None)
    return [None if far is None else _near(far) for far in found]


def _sweep(
    kernel: Callable[..., Any],
    weights: Sequence[Weight],
    rows: Sequence[tuple[Tensor, ...]],
    others: Sequence[tuple[Tensor, ...]] | None = None,
) -> list[Any]:
    """Run a kernel on w and these rows of each weight; return what it returns, None where it was not run."""
    calls: list[Callable[[], Any] | None] = []
    entries = _entries(weights)
    for i, ((w, _, grid), tensors) in enumerate(zip(weights, rows, strict=True)):
        call = None
        if grid is not None and kernels.fit(grid, w, *tensors, entries=entries):
            call = kernels.bound(kernel, grid, (w, *tensors), others[i] if others else ())
        calls.append(call)
    return _run(calls)


def _entries(weights: Sequence[Weight]) -> int:
    """Return how many entries the weights with a grid have together: a model of many small ones is worth compiling."""
    return sum(weight.w.numel() for weight in weights if weight.grid is not None)


def _run(calls: Sequence[Callable[[], Any] | None]) -> list[Any]:
    return [None if call is None else call() for call in calls]


def _with_verdicts(weights: Sequence[Weight], found: Sequence[Any]) -> list[tuple[Tensor, Verdict] | None]:
    answers: list[tuple[Tensor, Verdict] | None] = []
    for (_, _, grid), each in zip(weights, found, strict=True):
        answers.append(None if each is None or grid is None else (kernels.scaled(each[0], grid), _near(each[1])))
    return answers


def _near(far: Tensor) -> Verdict:
    """Whether no distance is above 0; also where a NaN is among them, which others report."""
    largest = far if far.numel() == 1 else far.amax()
    return not largest.item() > 0 if far.device.type == "cpu" else ~(largest.view(()) > 0)


def _note_writes(tensors: Iterable[Tensor]) -> None:
    """Count a version of what a kernel wrote, so that autograd refuses to use what it has saved of it."""
    for t in tensors:
        torch.autograd.graph.increment_version(t)
