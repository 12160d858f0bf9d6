"""What an ascent direction is: it turns the first pass's gradients into d; the optimizer adds ``e = rho * d / ||d||``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from torch import Tensor, nn

from qsam.latent import Slot
from qsam.registry import Registry


@dataclasses.dataclass(frozen=True)
class Ascent:
    """One perturbed tensor.

    Attributes:
        name: Its path in the model.
        parameter: The model's Parameter, which holds Q(w) (or the float weight).
        gradient: Its gradient of the first pass.
        slot: Its latent and quantizer; None for a float parameter.
    """

    name: str
    parameter: nn.Parameter
    gradient: Tensor
    slot: Slot | None


class Direction:
    """Base class of the directions."""

    def __call__(self, ascents: Sequence[Ascent]) -> list[Tensor]:
        """Return one direction an ascent, of its shape; the gradients may be overwritten and returned."""
        raise NotImplementedError


def _check(cls: type[Direction]) -> None:
    if not (isinstance(cls, type) and issubclass(cls, Direction)) or cls.__call__ is Direction.__call__:
        raise TypeError(f"a direction must be a subclass of Direction with a `__call__` of its own, got {cls!r}.")


DIRECTIONS: Registry[Direction] = Registry("direction", check=_check)
"""All directions by name."""


def register_direction(name: str) -> Callable[[type[Direction]], type[Direction]]:
    """Return a decorator that registers a :class:`Direction` subclass as ``name``."""
    return DIRECTIONS.register(name)
