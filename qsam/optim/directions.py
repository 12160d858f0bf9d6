"""Ascent directions: the direction d of a perturbation, and the norm that rho refers to.

e = rho * d / norm        (a direction that looks ahead: e = -rho * d / norm)

name        d                                   norm       passes per step
sam         g                                   ||g||      2
asam        T^2 g,  T = |w| + eta               ||T g||    2
grid        T^2 g,  T = s                       ||T g||    2
friendly    g - sigma * m,  m an average of g   ||d||      2
random      N(0, 1)                             ||d||      2
previous    the gradient of the last step       ||d||      1
momentum    the base optimizer's first moment   ||d||      1, looks ahead
lookahead   the base optimizer's first moment   ||d|| / sqrt(n), rho in units of lr    1, looks ahead
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qsam.distributed import norms, own_part
from qsam.latents import Slot
from qsam.registry import Registry

MOMENT_KEYS = ("exp_avg", "momentum_buffer")
"""The keys under which torch's optimizers (and most others) keep their first moment."""


@dataclasses.dataclass(frozen=True)
class Ascent:
    """One perturbed tensor.

    Attributes:
        name: Its path in the model.
        parameter: The model's Parameter, which holds Q(w), or the float weight.
        gradient: Its gradient of the first pass. For a direction of one pass, the tensor in the direction's memory;
            without a memory, the parameter itself, whose values then have no meaning.
        slot: Its latent and quantizer; None for a float parameter.
        base_state: The base optimizer's state of this parameter: its moments.
    """

    name: str
    parameter: nn.Parameter
    gradient: Tensor
    slot: Slot | None
    base_state: Mapping[str, Any]

    @property
    def weight(self) -> Tensor:
        """The latent weight w, or the float weight."""
        return (self.parameter if self.slot is None else self.slot.latent).detach()


class Direction:
    """Base class of the directions. A subclass implements ``__call__`` and registers itself under a name.

    Attributes:
        passes: 2: the direction comes from a first pass at Q(w). 1: it is known before the step, from the tensors that
            :meth:`learn` kept or from the base optimizer's state.
        looks_ahead: Whether e points against d, to where the base optimizer takes the weights. This holds whether the
            base minimizes or maximizes, because its moments have that sign already.
        follows_lr: Whether rho is in units of the learning rate: the radius is then ``rho * lr`` of each group.
        averages: Whether ``memory`` is made of first-pass gradients, which differ between ranks if each has its own e.
        memory: One tensor per perturbed parameter, by name, if the direction keeps any. It is saved with the optimizer.
    """

    passes = 2
    looks_ahead = False
    follows_lr = False
    averages = False

    def __init__(self) -> None:
        self.memory: dict[str, Tensor] = {}

    def __call__(self, ascents: Sequence[Ascent], step: int) -> tuple[list[Tensor], Tensor]:
        """Return d and the norm.

        Args:
            ascents: The perturbed tensors. Their gradients may be overwritten and returned.
            step: The number of the step, a seed for directions that draw.

        Returns:
            One direction per ascent, of its shape, and a scalar.
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
        """Read the gradients that will update the weights; they are overwritten afterwards."""


def global_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Return the L2 norm of all entries together, in fp32 or wider, without a temporary of their size."""
    if not tensors:
        return torch.zeros((), dtype=torch.float32)
    total: Tensor = torch.linalg.vector_norm(norms(tensors))
    return total


def _check(cls: type[Direction]) -> None:
    if not (isinstance(cls, type) and issubclass(cls, Direction)) or cls.__call__ is Direction.__call__:
        raise TypeError(f"a direction must be a subclass of Direction that implements `__call__`, got {cls!r}.")


DIRECTIONS: Registry[Direction] = Registry("direction", check=_check)
"""All directions by name."""


def register_direction(name: str) -> Callable[[type[Direction]], type[Direction]]:
    """Return a decorator that registers a :class:`Direction` subclass as ``name``.

    Raises:
        TypeError: The decorated object is not a Direction, or does not implement ``__call__``.
        ValueError: The name is taken.
    """
    return DIRECTIONS.register(name)


def _in_units(ascents: Sequence[Ascent], units: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """Return ``T^2 g`` and ``||T g||``; the gradients are overwritten."""
    scaled = [ascent.gradient.mul_(unit) for ascent, unit in zip(ascents, units, strict=True)]
    norm = global_norm(scaled)
    return [d.mul_(unit) for d, unit in zip(scaled, units, strict=True)], norm


@register_direction("sam")
class Sam(Direction):
    """``d = g``: the steepest ascent within an L2 ball.

    References:
        Foret et al., Sharpness-Aware Minimization, ICLR 2021, Eq 2.
    """

    def __call__(self, ascents: Sequence[Ascent], step: int) -> tuple[list[Tensor], Tensor]:
        """Return g."""
        gradients = [ascent.gradient for ascent in ascents]
        return gradients, global_norm(gradients)


@register_direction("asam")
class Asam(Direction):
    """``d = T^2 g`` with ``T = |w| + eta``: the steepest ascent in units of each weight, ``||e / T|| = rho``.

    Rescaling one layer and undoing it in the next changes nothing. w is the latent, or the float weight.

    Args:
        eta: Added to ``|w|``, so that weights at 0 are perturbed too. The paper's value is 0.01.

    References:
        Kwon et al., ASAM: Adaptive Sharpness-Aware Minimization, ICML 2021, Algorithm 1.

    Differs from the authors' code: it takes T = 1 for every parameter whose name lacks "weight" (biases); here T is
    ``|w| + eta`` for all that is perturbed. With ``perturb="quantized"`` there is no difference.
    """

    def __init__(self, eta: float = 0.01) -> None:
        super().__init__()
        self.eta = _number("eta", eta)

    def __call__(self, ascents: Sequence[Ascent], step: int) -> tuple[list[Tensor], Tensor]:
        """Return ``T^2 g`` and ``||T g||``."""
        return _in_units(ascents, [a.weight.abs().add_(self.eta).to(a.gradient.dtype) for a in ascents])


@register_direction("grid")
class Grid(Direction):
    """``d = s^2 g``, s the step size of the grid: ``||e / s|| = rho``, at every scale and bit width. Derived from ASAM.

    With ``rho = sqrt(number of weights) / 2`` an evenly spread e moves each weight by half a step.
    """

    def __call__(self, ascents: Sequence[Ascent], step: int) -> tuple[list[Tensor], Tensor]:
        """Return ``s^2 g`` and ``||s g||``."""
        return _in_units(ascents, [_step_size(ascent) for ascent in ascents])


def _step_size(ascent: Ascent) -> Tensor:
    step_size = None if ascent.slot is None else ascent.slot.step_size()
    if step_size is None:
        raise ValueError(
            f"direction 'grid' needs a step size, and {ascent.name!r} has none: perturb the uniformly quantized "
            "weights only (perturb='quantized'), or use direction 'asam'."
        )
    return step_size.to(ascent.gradient.dtype)


@register_direction("friendly")
class Friendly(Direction):
    """``d = g - sigma * m``, then ``m <- lam * m + (1 - lam) * g``: the part of g that only this batch has.

    m starts at the first gradient, as in the authors' code, where d is g itself. Keeps one copy of the weights.

    Args:
        sigma: The share of m that is taken off, >= 0. The authors' value is 1.
        lam: The decay of m, in [0, 1). The authors' class has 0.9, their scripts 0.95 and 0.6.

    References:
        Li et al., Friendly Sharpness-Aware Minimization, CVPR 2024, Algorithm 1, and the authors' public code.
    """

    averages = True

    def __init__(self, sigma: float = 1.0, lam: float = 0.9) -> None:
        super().__init__()
        self.sigma, self.lam = _number("sigma", sigma), _number("lam", lam)
        if not self.lam < 1:
            raise ValueError(f"`lam` must be in [0, 1), got {lam}.")

    def __call__(self, ascents: Sequence[Ascent], step: int) -> tuple[list[Tensor], Tensor]:
        """Return ``g - sigma * m``, and move m."""
        directions = [self._one(ascent) for ascent in ascents]
        return directions, global_norm(directions)

    def _one(self, ascent: Ascent) -> Tensor:
        g, m = ascent.gradient, self.memory.get(ascent.name)
        finite = g.nan_to_num(0.0, 0.0, 0.0)  # as the perturbation does, m ignores what is not finite
        if m is None:
            self.memory[ascent.name] = finite
            return g
        d = g - self.sigma * m
        m.lerp_(finite, 1 - self.lam)
        return d


@register_direction("random")
class Random(Direction):
    """``d ~ N(0, 1)``: a control, to compare the other directions with a random one of the same length.

    The step's number is the seed, so that a resumed run draws the same d and no global generator is used.
    """

    def __call__(self, ascents: Sequence[Ascent], step: int) -> tuple[list[Tensor], Tensor]:
        """Return Gaussian tensors."""
        generator = torch.Generator().manual_seed(step)
        gradients = [ascent.gradient for ascent in ascents]
        drawn = (torch.randn(g.shape, generator=generator).to(g.device, g.dtype) for g in gradients)
        directions = [own_part(d, g) for d, g in zip(drawn, gradients, strict=True)]
        return directions, global_norm(directions)


@register_direction("previous")
class Previous(Direction):
    """``d = h_{t-1}``: the gradient that updated the weights last, so that no first pass is needed.

    The first step is a plain one. Keeps one copy of the weights.

    References:
        AsyncSAM, arXiv 2503.11147, with a delay of one step.
    """

    passes = 1

    def __call__(self, ascents: Sequence[Ascent], step: int) -> tuple[list[Tensor], Tensor]:
        """Return the last step's gradients."""
        directions = [ascent.gradient for ascent in ascents]
        return directions, global_norm(directions)

    def ready(self, step: int) -> bool:
        """Whether a step has been taken."""
        return bool(self.memory)

    def learn(self, ascents: Sequence[Ascent]) -> None:
        """Keep copies of the gradients, which are pulled back in place."""
        self.memory = {ascent.name: ascent.gradient.clone() for ascent in ascents}


@register_direction("momentum")
class Momentum(Direction):
    """``d = m``, the base optimizer's first moment, and ``e = -rho * m / ||m||``: the gradient at the point ahead.

    The first step is a plain one. Costs neither a pass nor memory.

    References:
        Becker, Altrock, Risse, Momentum-SAM, arXiv 2401.12033: the gradient is taken at ``w - rho * m / ||m||``, where
        the weights are going.

    Differs from the paper: m is the moment of the latents, made of masked gradients, as the base optimizer averages it.
    """

    passes = 1
    looks_ahead = True

    def __call__(self, ascents: Sequence[Ascent], step: int) -> tuple[list[Tensor], Tensor]:
        """Return the first moments; raise ValueError if the base optimizer keeps none."""
        moments = [_moment(ascent) for ascent in ascents]
        if all(m is None for m in moments):
            raise ValueError(
                f"direction {DIRECTIONS.name_of(type(self))!r} needs a first moment ({' or '.join(MOMENT_KEYS)}), and "
                "the base optimizer keeps none: use Adam or SGD(momentum=...), or direction 'previous'."
            )
        directions = [torch.zeros_like(a.gradient) if m is None else m for a, m in zip(ascents, moments, strict=True)]
        return directions, global_norm(directions)


@register_direction("lookahead")
class Lookahead(Momentum):
    """``e = -rho * lr * sqrt(n) * m / ||m||``: the gradient at a point that is rho full steps of Adam ahead.

    n is the number of perturbed entries and ``lr * sqrt(n)`` the length of a step in which Adam moves every entry by
    lr. Therefore rho means the same for models of every size, and e shrinks with the schedule of lr. ``rho=0.75`` is a
    good first guess. The first step is a plain one. It costs neither a pass nor memory.

    References:
        Becker, Altrock, Risse, Momentum-SAM, arXiv 2401.12033.

    Differs from the paper: the length is rho itself there.
    """

    follows_lr = True

    def __call__(self, ascents: Sequence[Ascent], step: int) -> tuple[list[Tensor], Tensor]:
        """Return the first moments, and their norm over sqrt(n)."""
        moments, norm = super().__call__(ascents, step)
        return moments, norm / max(sum(m.numel() for m in moments), 1) ** 0.5


def _moment(ascent: Ascent) -> Tensor | None:
    return next((m for key in MOMENT_KEYS if isinstance(m := ascent.base_state.get(key), Tensor)), None)


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"`{name}` must be a number >= 0, got {value!r}.")
    if not 0 <= value < math.inf:
        raise ValueError(f"`{name}` must be finite and >= 0, got {value}.")
    return float(value)
