r"""Flatness of the loss around the weights that a model is deployed with: sharpness, curvature, slices.

    sharpness    max over ||d||_2 <= rho of  L(Q(w) + d) - L(Q(w)),  by projected gradient ascent
    curvature    the largest eigenvalue of the Hessian of L at Q(w), by power iteration
    slice        L(Q(w) + t * u) over t, for directions u of length 1

All three use the quantized weights (for :class:`qsam.SAM` and for a float model every trainable Parameter) as the model
holds them, the data of the caller's closure, and the model's present mode (train or eval). They restore weights,
gradients, buffers, modes and random generators, also after an exception.
"""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from qsam.measure.hessian import TopEigenvalue, hessian_top_eigenvalue
from qsam.measure.probe import Closure, Probe, Subject, checked_count, checked_number, probing
from qsam.optim import QuantizedOptimizer
from qsam.registry import nearest

__all__ = ["LossSlice", "Sharpness", "TopEigenvalue", "hessian_top_eigenvalue", "loss_slice", "sharpness"]

TRAVEL = 2.5
"""Length of all steps of :func:`sharpness` together, in radii, if each were as long as the first."""


@dataclasses.dataclass(frozen=True)
class Sharpness:
    """The result of :func:`sharpness`, and the settings that it depends on.

    Attributes:
        value: ``loss_end - loss_start`` (``loss_start - loss_end`` for a base optimizer that maximizes).
        loss_start: L(Q(w)).
        loss_end: L(Q(w) + d) after the last step.
        rho: Radius of the ball, in units of the weights.
        steps: T.
        lr: eta, as used.
        data: The data of the loss, in the caller's words.
    """

    value: float
    loss_start: float
    loss_end: float
    rho: float
    steps: int
    lr: float
    data: str | None = None


def sharpness(
    optimizer: Subject,
    closure: Closure,
    rho: float = 0.05,
    steps: int = 20,
    lr: float | None = None,
    *,
    data: str | None = None,
    progress: bool | None = None,
) -> Sharpness:
    r"""Return how much the loss can rise within a ball around the quantized weights, by Algorithm 2 of SQuAT.

    ``W_0 = Q(w)``;  ``W_{t+1} = P(W_t + eta * grad L(W_t))``,  t = 0 .. T-1;  the result is ``L(W_T) - L(W_0)``.
    P projects onto the L2 ball of radius rho around ``W_0``, after each step. There are T + 1 calls of the closure.

    It is a lower bound of the maximum. At a point without gradient, also at a saddle, the ascent does not start and the
    result is 0.

    Args:
        optimizer: A qsam optimizer, or a model that holds the weights already.
        closure: torch's closure, as for ``step``: clears gradients, runs forward and backward, returns the loss.
        rho: Radius, over all perturbed weights together. Finite, > 0. The paper's are .01 and .05.
        steps: T, an integer >= 1.
        lr: eta, in plain gradient ascent. None: ``2.5 * rho / (T * ||grad L(W_0)||)``, so that steps as long as the
            first would cover 2.5 radii, enough to reach the border and to move along it.
        data: A description of the closure's data; kept in the result.
        progress: A progress bar: None on a terminal if tqdm is installed, True always, False never.

    Raises:
        TypeError: An argument has the wrong type, or the closure does not return the loss.
        ValueError: ``rho``, ``steps`` or ``lr`` is out of range.
        RuntimeError: It was called inside a block of the optimizer, or the closure ran no backward.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> model.weight.data = torch.tensor([[3.0, 4.0]])
        >>> def closure():  # L(W) = ||W||^2 / 2: the maximum is rho * ||W|| + rho^2 / 2
        ...     model.zero_grad()
        ...     loss = model.weight.square().sum() / 2
        ...     loss.backward()
        ...     return loss
        >>> round(sharpness(model, closure, rho=0.1).value, 5)
        0.505

    References:
        Wang et al., SQuAT, arXiv 2210.07171, Algorithm 2, Tables 3 and 4.

    Differs from the paper, which gives neither the data, nor eta, nor T, and tests the norm before it has ``W_{t+1}``.
    """
    rho = checked_number(rho, "rho")
    steps = checked_count(steps, "steps", 1)
    eta = None if lr is None else checked_number(lr, "lr")
    sign = optimizer._ascent_sign() if isinstance(optimizer, QuantizedOptimizer) else 1.0
    with probing(optimizer, closure, "sharpness", steps + 1, progress) as probe:
        d = probe.zeros()
        start, gradient = probe.gradient(d)
        eta = _first_rate(gradient, rho, steps) if eta is None else eta
        for _ in range(steps - 1):
            d = _project(d.add_(gradient, alpha=sign * eta), rho)
            gradient = probe.gradient(d)[1]
        d = _project(d.add_(gradient, alpha=sign * eta), rho)
        end = probe.loss(d)
        _warn_if_rounded(probe, d)
    return Sharpness(sign * (end - start), start, end, rho, steps, eta, data)


@dataclasses.dataclass(frozen=True)
class LossSlice:
    """The loss along straight lines through Q(w).

    Attributes:
        distances: t, fp64, of shape ``(points,)``, ascending, 0 in the middle; in units of the weights, like rho.
        losses: L(Q(w) + t * u), fp64, of shape ``(points,)``, by the name of the direction u.
    """

    distances: Tensor
    losses: Mapping[str, Tensor]

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Write a picture in the format that the suffix of ``path`` names. Needs matplotlib (extra ``glue``)."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(5, 3.5), layout="constrained")
        axes = figure.subplots()
        for name, values in self.losses.items():
            axes.plot(self.distances.tolist(), values.tolist(), label=name)
        axes.set_xlabel("distance from the quantized weights (L2)")
        axes.set_ylabel("loss")
        axes.legend(title="direction")
        figure.savefig(os.fspath(path))


def loss_slice(
    optimizer: Subject,
    closure: Closure,
    directions: str | Sequence[str] | Mapping[str, Sequence[Tensor]] = ("gradient", "random"),
    radius: float = 0.1,
    points: int = 21,
    *,
    seed: int = 0,
    progress: bool | None = None,
) -> LossSlice:
    """Return the loss along straight lines through the quantized weights.

    Args:
        optimizer: A qsam optimizer, or a model that holds the weights already.
        closure: torch's closure, as for ``step``; it needs a backward for the direction ``"gradient"`` only.
        directions: One or more names, out of ``"gradient"`` (of the loss at Q(w)) and ``"random"`` (Gaussian); or a
            mapping from your own names to one tensor per perturbed weight, in the model's order. Each direction is
            scaled to length 1, over all weights together.
        radius: The largest distance. Finite, > 0.
        points: Points per line, an odd integer >= 3, so that Q(w) itself is one of them.
        seed: The seed of the random direction.
        progress: A progress bar: None on a terminal if tqdm is installed, True always, False never.

    Raises:
        TypeError: An argument has the wrong type, or the closure does not return the loss.
        ValueError: An argument is out of range, or a direction is unknown, zero, not finite or of another shape.
        RuntimeError: It was called inside a block of the optimizer.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> model.weight.data.zero_()
        tensor([[0., 0.]])
        >>> line = loss_slice(model, lambda: model.weight.square().sum(), ["random"], radius=2.0, points=5)
        >>> [round(loss, 4) for loss in line.losses["random"].tolist()]
        [4.0, 1.0, 0.0, 1.0, 4.0]
    """
    radius = checked_number(radius, "radius")
    if checked_count(points, "points", 3) % 2 == 0:
        raise ValueError(f"`points` must be odd, so that the quantized weights are among them, got {points}.")
    distances = torch.linspace(-radius, radius, points, dtype=torch.float64)
    directions = [directions] if isinstance(directions, str) else directions
    if not isinstance(directions, Sequence | Mapping):
        raise TypeError(f"`directions` must be names, or a mapping from names to tensors, got {directions!r}.")
    with probing(optimizer, closure, "loss_slice", points * len(directions), progress) as probe:
        units = _units(probe, directions, seed)
        losses = {name: [probe.loss(unit * t) for t in distances.tolist()] for name, unit in units.items()}
    return LossSlice(distances, {name: torch.tensor(line, dtype=torch.float64) for name, line in losses.items()})


def _first_rate(gradient: Tensor, rho: float, steps: int) -> float:
    norm = float(gradient.norm())
    return TRAVEL * rho / (steps * norm) if norm > 0 else 0.0


def _project(d: Tensor, radius: float) -> Tensor:
    norm = d.norm()
    return d if norm <= radius else d.mul_(radius / norm)


def _warn_if_rounded(probe: Probe, d: Tensor) -> None:
    if any(p.dtype in (torch.float16, torch.bfloat16) for p in probe.weights):
        warnings.warn(
            f"16-bit parameters round the perturbation away: {float(d.norm()):.3g} was asked for, "
            f"{probe.realised(d):.3g} realised. Measure in fp32.",
            UserWarning,
            stacklevel=3,
        )


def _units(probe: Probe, directions: Sequence[str] | Mapping[str, Sequence[Tensor]], seed: int) -> dict[str, Tensor]:
    found = {}
    for name in directions:
        if isinstance(directions, Mapping):
            d = _given(probe, name, directions[name])
        elif name == "gradient":
            d = probe.gradient(probe.zeros())[1]
        elif name == "random":
            d = probe.gaussian(seed)
        else:
            known = ["gradient", "random"]
            raise ValueError(
                f"there is no direction {name!r}, only {known}: give your own as a mapping.{nearest(name, known)}"
            )
        norm = float(d.norm())
        if not 0 < norm < float("inf"):
            raise ValueError(f"the direction {name!r} has length {norm}: it must be finite and not zero.")
        found[name] = d / norm
    return found


def _given(probe: Probe, name: str, tensors: Sequence[Tensor]) -> Tensor:
    wanted, got = [tuple(p.shape) for p in probe.weights], [tuple(t.shape) for t in tensors]
    if wanted != got:
        raise ValueError(f"the direction {name!r} must have one tensor per weight, of shapes {wanted}, got {got}.")
    return probe.flat(tensors)
