"""The options of the methods, and the errors for invalid values."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from qsam.distributed import SCOPES
from qsam.optim.directions import DIRECTIONS, Direction

PERTURBATION_KEYWORDS = (
    "rho", "direction", "perturb", "every", "start", "reuse", "normalize_weights", "perturbation_scope",
)  # fmt: skip
"""The keywords of a method that concern its perturbation."""

Selection = str | Callable[[str, nn.Parameter], bool]


@dataclasses.dataclass(frozen=True)
class SamOptions:
    """The options of a perturbation, checked; see :class:`~qsam.optim.optimizer.QuantizedOptimizer`.

    Attributes:
        masked: Take ``M * g_Q`` instead of g_Q: the gradient as the quantizer's clip mask lets it through.
        inside: Add e to w and quantize the sum, ``p <- Q(w + e)``, instead of ``p <- Q(w) + e``.
    """

    rho: float = 0.1
    direction: str | Direction = "sam"
    perturb: Selection = "quantized"
    every: int = 1
    start: int = 0
    reuse: str | None = None
    normalize_weights: bool = False
    scope: str = "global"
    masked: bool = False
    inside: bool = False

    def __post_init__(self) -> None:
        checked_rho(self.rho)
        for name, value, least in (("every", self.every, 1), ("start", self.start, 0)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"`{name}` must be an integer >= {least}, got {value!r}.")
            if value < least:
                raise ValueError(f"`{name}` must be an integer >= {least}, got {value}.")
        if not callable(self.perturb) and self.perturb not in ("quantized", "all"):
            raise ValueError(
                f"`perturb` must be 'quantized', 'all' or a predicate (name, parameter), got {self.perturb!r}."
            )
        if self.reuse not in (None, "perturbation"):
            raise ValueError(f"`reuse` must be None or 'perturbation', got {self.reuse!r}.")
        if self.scope not in SCOPES:
            raise ValueError(f"`perturbation_scope` must be 'global' or 'rank', got {self.scope!r}.")
        remembers = self.reuse is not None or self.new_direction().averages
        if self.scope == "rank" and remembers:
            option = f"reuse={self.reuse!r}" if self.reuse is not None else f"direction={self.direction!r}"
            raise ValueError(
                f"{option} remembers first passes, which differ between ranks with perturbation_scope='rank', and a "
                "checkpoint holds the memory of one: use 'global'."
            )

    def new_direction(self) -> Direction:
        """Return a direction without memory; an instance given by the user is copied, settings included."""
        if not isinstance(self.direction, Direction):
            return DIRECTIONS.get(self.direction)()
        direction = copy.deepcopy(self.direction)
        direction.memory = {}
        return direction


def checked_rho(rho: Any) -> float:
    """Return ``rho`` as a float; raise if it is not a finite number >= 0."""
    if isinstance(rho, bool) or not isinstance(rho, int | float):
        raise TypeError(f"`rho` must be a number >= 0, got {rho!r}.")
    if not 0 <= rho < math.inf:
        raise ValueError(f"`rho` must be finite and >= 0, got {rho}.")
    return float(rho)


def checked_modules(modules: Any) -> list[nn.Module]:
    """Return one or several modules as a list; raise TypeError for anything else."""
    several = isinstance(modules, Iterable) and not isinstance(modules, nn.Module)
    found = list(modules) if several else [modules]
    for module in found:
        if not isinstance(module, nn.Module):
            raise TypeError(f"`modules` must be torch.nn.Modules, got {type(module).__name__}.")
    return found


def check_options(model: Any, ste: str, rng: str, max_grad_norm: float | None) -> None:
    """Refuse an invalid model, and invalid values of the options that every method has."""
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"`model` must be a torch.nn.Module, got {type(model).__name__}: the model comes first, then the optimizer."
        )
    if ste not in ("clipped", "identity"):
        raise ValueError(f"`ste` must be 'clipped' or 'identity', got {ste!r}.")
    if rng not in ("shared", "independent"):
        raise ValueError(f"`rng` must be 'shared' or 'independent', got {rng!r}.")
    if max_grad_norm is not None and (isinstance(max_grad_norm, bool) or not isinstance(max_grad_norm, int | float)):
        raise TypeError(f"`max_grad_norm` must be None or a number > 0, got {max_grad_norm!r}.")
    if max_grad_norm is not None and not max_grad_norm > 0:
        raise ValueError(f"`max_grad_norm` must be > 0, got {max_grad_norm}.")
