"""The largest curvature of the loss at the weights that a model is deployed with.

v <- H v / ||H v||,   H the Hessian of L with respect to Q(w);   the eigenvalue is v.Hv

The products are computed here and not by curvlinops, which needs model, loss and data separately, while a closure holds
all three. Its version 3.0.1 differentiates by ``jvp`` under ``vmap``, which fails on a BatchNorm in training mode and
on quantized inputs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from qsam.measure.probe import Probe, Subject, checked_count, checked_number, probing


@dataclasses.dataclass(frozen=True)
class TopEigenvalue:
    """The result of :func:`hessian_top_eigenvalue`.

    Attributes:
        value: The eigenvalue.
        residual: ``||H v - value * v||``: an eigenvalue lies within this distance of ``value``.
        iterations: Products H v that were computed.
        converged: Whether the last product changed ``value`` by no more than the tolerance.
    """

    value: float
    residual: float
    iterations: int
    converged: bool


def hessian_top_eigenvalue(
    optimizer: Subject,
    loss_fn: Callable[[], Tensor],
    iterations: int = 100,
    tolerance: float = 1e-3,
    *,
    seed: int = 0,
    progress: bool | None = None,
) -> TopEigenvalue:
    r"""Return the largest (most positive) eigenvalue of the Hessian H of the loss with respect to Q(w).

    Power iteration, ``v <- H v / ||H v||``, on exact products ``H v``: one forward, one backward that keeps its graph,
    then one pass through that graph per product. Power iteration finds the eigenvalue of the largest magnitude; if that
    is negative, a second iteration, on ``H - value * I``, finds the largest.

    If inputs are quantized, the loss is a staircase in W, and H is the Hessian of its straight-through surrogate: each
    input quantizer has the value of the rounding and the slope of the clipping. (Differences of gradients, which would
    need no second derivative, grow without bound at the steps as the distance shrinks.)

    Args:
        optimizer: A qsam optimizer, or a model that holds the weights already.
        loss_fn: Runs the forward and returns the loss, WITHOUT backward.
        iterations: The most products of one power iteration, an integer >= 2.
        tolerance: Iteration stops when the eigenvalue, relative to the largest magnitude, changes by no more than this.
            Finite, > 0.
        seed: The seed of the random start.
        progress: A progress bar: None on a terminal if tqdm is installed, True always, False never.

    Raises:
        TypeError: An argument has the wrong type, or ``loss_fn`` does not return a scalar tensor.
        ValueError: An argument is out of range.
        RuntimeError: ``loss_fn`` called backward, the loss does not depend on the weights, or (from torch) an operation
            has no second derivative (in a compiled model; attention runs its plain kernel here, which has one).

    Example:
        >>> model = torch.nn.Linear(3, 1, bias=False)
        >>> curvatures = torch.tensor([-5.0, 1.0, 2.0])
        >>> result = hessian_top_eigenvalue(
        ...     model, lambda: (curvatures * model.weight.square()).sum() / 2, tolerance=1e-7
        ... )
        >>> round(result.value, 4), result.converged
        (2.0, True)
    """
    iterations = checked_count(iterations, "iterations", 2)
    tolerance = checked_number(tolerance, "tolerance")
    with probing(optimizer, loss_fn, "hessian_top_eigenvalue", iterations + 1, progress) as probe:
        product, start = _hessian(probe), probe.gaussian(seed)
        found = _power(product, start, 0.0, iterations, tolerance)
        if not found.value < 0:
            return found
        top = _power(product, start, found.value, iterations, tolerance)
        return dataclasses.replace(top, iterations=found.iterations + top.iterations)


def _hessian(probe: Probe) -> Callable[[Tensor], Tensor]:
    """Return v -> H v, from one graph."""
    gradients = probe.differentiable_gradient()
    curved = [i for i, g in enumerate(gradients) if g.requires_grad]  # the others are constant

    def product(v: Tensor) -> Tensor:
        probe.tick()
        if not curved:
            return torch.zeros_like(v)
        parts = [part.to(p).view_as(p) for part, p in zip(torch.split(v, probe.sizes), probe.weights, strict=True)]
        outputs, vectors = [gradients[i] for i in curved], [parts[i] for i in curved]
        return probe.flat(
            torch.autograd.grad(outputs, probe.weights, vectors, retain_graph=True, materialize_grads=True)
        )

    return product


def _power(product: Callable[[Tensor], Tensor], v: Tensor, shift: float, most: int, tolerance: float) -> TopEigenvalue:
    """Iterate with ``H - shift * I``; return the eigenvalue of H."""
    value, residual = shift, float("inf")
    for count in range(1, most + 1):
        v = v / v.norm()
        image = product(v)
        before, value = value, float(v @ image)
        residual = float((image - value * v).norm())
        v = image - shift * v
        if (count > 1 and abs(value - before) <= tolerance * abs(value - shift)) or not bool(v.any()):
            return TopEigenvalue(value, residual, count, converged=True)
    return TopEigenvalue(value, residual, most, converged=False)
