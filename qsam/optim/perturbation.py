"""The perturbation of a step: which tensors, when, how far, and back again.

    e = rho * d / ||d||_2,    one norm over everything that is perturbed, in fp32
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qsam.latent import Latents, Slot, perturb_
from qsam.optim.directions import DIRECTIONS, Ascent

Selection = str | Callable[[str, nn.Parameter], bool]


class Perturbation:
    """What SAM adds to a base optimizer.

    Args:
        direction: A registered direction.
        perturb: ``"quantized"`` (the quantized weights), ``"all"`` (these and every other trainable parameter), or a
            predicate ``(name, parameter) -> bool`` over the trainable parameters.
        every: Perturb each k-th step; the others are plain QAT steps. An integer >= 1.
        start: The first step that may be perturbed, counted from 0. An integer >= 0.
        scope: ``"global"``, one e for all processes.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: a bad value.
    """

    def __init__(self, *, direction: str, perturb: Selection, every: int, start: int, scope: str) -> None:
        for name, value, least in (("every", every, 1), ("start", start, 0)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"`{name}` must be an integer >= {least}, got {value!r}.")
            if value < least:
                raise ValueError(f"`{name}` must be an integer >= {least}, got {value}.")
        if not callable(perturb) and perturb not in ("quantized", "all"):
            raise ValueError(f"`perturb` must be 'quantized', 'all' or a predicate (name, parameter), got {perturb!r}.")
        if scope != "global":
            raise ValueError(f"`perturbation_scope` must be 'global', got {scope!r}.")
        self.direction = DIRECTIONS.get(direction)()
        self.perturb = perturb
        self.every = every
        self.start = start
        self.norm: Tensor | None = None
        self.realised: float | None = None
        self._float_copies: list[tuple[nn.Parameter, Tensor]] = []
        self._warned_16_bit = False

    def due(self, step: int) -> bool:
        """Whether the step of this number is perturbed."""
        return step >= self.start and (step - self.start) % self.every == 0

    def gather(self, latents: Latents) -> list[Ascent]:
        """Return what is to be perturbed, with the gradients of the first pass.

        Raises:
            TypeError: a sparse gradient.
        """
        slots = {id(slot.parameter): slot for slot in latents.slots}
        found = []
        for name, p in latents.root.named_parameters():
            if p.grad is None or not self._selects(name, p, slots.get(id(p))):
                continue
            if p.grad.is_sparse:
                raise TypeError(f"{name!r} has a sparse gradient, which cannot be perturbed: build its module with sparse=False.")
            found.append(Ascent(name, p, p.grad, slots.get(id(p))))
        return found

    @torch.no_grad()
    def apply(self, ascents: Sequence[Ascent], rho_of: Callable[[nn.Parameter], float], sign: float) -> None:
        """Add ``e`` to every target.

        A zero or non-finite norm gives e = 0: the step is then the unperturbed one.

        Args:
            ascents: From :meth:`gather`.
            rho_of: The radius of each parameter's group.
            sign: 1, or -1 where the base maximizes.
        """
        directions = self.direction(ascents)
        self.norm = _clean_norm_(directions)
        self._float_copies = [(a.parameter, a.parameter.detach().clone()) for a in ascents if a.slot is None]
        usable = torch.isfinite(self.norm) & (self.norm > 0)
        inverse = torch.where(usable, self.norm, math.inf).reciprocal()
        targets = [
            (a.parameter, d, inverse * (sign * rho_of(a.parameter)))
            for a, d in zip(ascents, directions, strict=True)
        ]
        perturb_(targets)
        if not self._warned_16_bit and any(t.dtype in (torch.float16, torch.bfloat16) for t, _, _ in targets):
            self._warn_16_bit(ascents, targets)

    @torch.no_grad()
    def restore_floats(self) -> None:
        """Put the float parameters back, bit for bit; quantized ones are written by the latents."""
        for p, values in self._float_copies:
            p.copy_(values)
        self._float_copies = []

    def _selects(self, name: str, p: nn.Parameter, slot: Slot | None) -> bool:
        if callable(self.perturb):
            return bool(self.perturb(name, p))
        if slot is not None:
            return True
        return self.perturb == "all" and "_quantizer." not in name

    def _warn_16_bit(self, ascents: Sequence[Ascent], targets: Sequence[tuple[Tensor, Tensor, Tensor]]) -> None:
        """Say once how much of e survives the rounding of 16-bit parameters."""
        self._warned_16_bit = True
        asked, got = 0.0, 0.0
        before = {id(p): values for p, values in self._float_copies}
        for a, (target, d, c) in zip(ascents, targets, strict=True):
            old = a.slot.quantized() if a.slot is not None else before[id(a.parameter)]
            asked += float((d.float() * c.float()).square().sum())
            got += float((target.float() - old.float()).square().sum())
        self.realised = got**0.5
        warnings.warn(
            f"16-bit parameters round the perturbation away: {asked**0.5:.3g} was asked for, {self.realised:.3g} realised. "
            "Keep the parameters in fp32 and use autocast.",
            UserWarning,
            stacklevel=2,
        )


def checked_rho(rho: Any) -> float:
    """Return ``rho`` as a float.

    Raises:
        TypeError: not a number.
        ValueError: negative or not finite.
    """
    if isinstance(rho, bool) or not isinstance(rho, int | float):
        raise TypeError(f"`rho` must be a number >= 0, got {rho!r}.")
    if not 0 <= rho < math.inf:
        raise ValueError(f"`rho` must be finite and >= 0, got {rho}.")
    return float(rho)


def _clean_norm_(directions: Sequence[Tensor]) -> Tensor:
    """Return the global norm, and set non-finite entries to 0 in place where the norm is not finite."""
    if not directions:
        return torch.zeros(())
    norms = [torch.linalg.vector_norm(d, dtype=torch.promote_types(d.dtype, torch.float32)) for d in directions]
    norm = torch.linalg.vector_norm(torch.stack([n.to(norms[0].device) for n in norms]))
    # 0 * inf is NaN, so e = 0 needs clean directions. On a CPU the norm can be read for free; elsewhere that would
    # wait for the device, and one more pass over the directions is cheaper.
    if norm.device.type != "cpu" or not bool(torch.isfinite(norm)):
        for d in directions:
            d.nan_to_num_(0.0, 0.0, 0.0)
    return norm
