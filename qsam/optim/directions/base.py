"""What an ascent direction is: from the gradients of a pass to d, and the norm that rho refers to.

e = rho * d / norm
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qsam.registry import Registry
from qsam.shards import norms
from qsam.slots import Slot


@dataclasses.dataclass(frozen=True)
class Ascent:
    """One perturbed tensor.

    Attributes:
        name: Its path in the model.
        parameter: The model's Parameter, which holds Q(w) (or the float weight).
        gradient: Its gradient of the first pass; for a direction of one pass what its memory holds (without a memory:
            the parameter itself, of no meaning).
        slot: Its latent and quantizer; None for a float parameter.
        base_state: What the base optimizer keeps for it: moments.
    """

    name: str
    parameter: nn.Parameter
    gradient: Tensor
    slot: Slot | None
    base_state: Mapping[str, Any]


class Direction:
    """Base class of the directions.

    Attributes:
        passes: 2: the direction comes from a first pass at Q(w). 1: it is known before the step, from what ``learn``
            and the base optimizer's state hold.
        averages: Whether ``memory`` is made of first-pass gradients, which differ between ranks that each have their
            own e.
        follows_lr: Whether rho is in units of the learning rate: the radius is then ``rho * lr``.
        memory: One tensor a perturbed parameter, by name, if the direction keeps any; it is saved with the optimizer.
    """

    passes = 2
    averages = False
    follows_lr = False

    def __init__(self) -> None:
        self.memory: dict[str, Tensor] = {}

    def __call__(self, ascents: Sequence[Ascent], step: int) -> tuple[list[Tensor], Tensor]:
        """Return d and the norm.

        Args:
            ascents: What is perturbed. The gradients may be overwritten and returned.
            step: The number of the step, a seed for directions that draw.

        Returns:
            One direction an ascent, of its shape, and a scalar.
        """
        raise NotImplementedError

    def ready(self, step: int) -> bool:
        """Whether there is a direction for the step of this number."""
        return self.passes == 2 or step > 0

    @property
    def learns(self) -> bool:
        """Whether :meth:`learn` does anything."""
        return type(self).learn is not Direction.learn

    def learn(self, ascents: Sequence[Ascent]) -> None:
        """See the gradients that update the weights, before they are consumed."""


def global_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Return the L2 norm of all entries together, in fp32 or wider, without a temporary of their size."""
    if not tensors:
        return torch.zeros(())
    total: Tensor = torch.linalg.vector_norm(norms(tensors))
    return total


def _check(cls: type[Direction]) -> None:
    if not (isinstance(cls, type) and issubclass(cls, Direction)) or cls.__call__ is Direction.__call__:
        raise TypeError(f"a direction must be a subclass of Direction with a `__call__` of its own, got {cls!r}.")


DIRECTIONS: Registry[Direction] = Registry("direction", check=_check)
"""All directions by name."""


def register_direction(name: str) -> Callable[[type[Direction]], type[Direction]]:
    """Return a decorator that registers a :class:`Direction` subclass as ``name``.

    Raises:
        TypeError: not a Direction, or without a ``__call__``.
        ValueError: the name is taken.
    """
    return DIRECTIONS.register(name)
