"""The perturbation of a step: which tensors it moves, in which steps, and how far; and their restoration.

e = rho * d / norm,    one norm over everything that is perturbed, in fp32
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qsam.distributed import local, owned_copy, whole
from qsam.latents import Latents, Slot, Target, add_, own_parameters
from qsam.optim.directions import Ascent
from qsam.optim.options import SamOptions


class Perturbation:
    """The perturbation of one optimizer: its options, and the tensors that it keeps from step to step.

    Attributes:
        norm: The norm that the last e was divided by; None before the first.
        kept: With ``reuse``, the last d by name.
        kept_norm: The norm of ``kept``.
    """

    def __init__(self, options: SamOptions) -> None:
        self.options = options
        self.direction = options.new_direction()
        self.norm: Tensor | None = None
        self.kept: dict[str, Tensor] = {}
        self.kept_norm: Tensor | None = None
        self._float_copies: list[tuple[nn.Parameter, Tensor]] = []
        self._warned_16_bit = self._warned_empty = False

    def due(self, step: int) -> bool:
        """Whether ``every`` and ``start`` perturb the step of this number."""
        return step >= self.options.start and (step - self.options.start) % self.options.every == 0

    def passes(self, step: int) -> int:
        """Return 2 (first and perturbed pass), 1 (perturbed pass with a known direction) or 0 (plain step)."""
        if self.due(step):
            return self.direction.passes if self.direction.ready(step) else 0
        return 1 if self.options.reuse is not None and self.kept and step >= self.options.start else 0

    def selected(self, latents: Latents) -> set[int]:
        """Return, by id, the Parameters that are perturbed if they have a gradient."""
        slots = {id(slot.parameter): slot for slot in latents.slots}
        named = [(name, p) for name, p in own_parameters(latents.root) if p.requires_grad]
        return {id(p) for name, p in named if self._selects(name, p, slots.get(id(p)))}

    def gather(
        self, latents: Latents, base_state: Mapping[Tensor, Any], given: Mapping[str, Tensor] | None = None
    ) -> list[Ascent]:
        """Return the tensors to perturb, with their gradients, or with those ``given`` by name."""
        slots = {id(slot.parameter): slot for slot in latents.slots}
        ascents = []
        for name, p in own_parameters(latents.root):
            slot = slots.get(id(p))
            gradient = p.grad if given is None else given.get(name)
            if gradient is None or not self._selects(name, p, slot):
                continue
            if gradient.is_sparse:
                raise TypeError(
                    f"{name!r} has a sparse gradient, which cannot be perturbed: build its module with sparse=False."
                )
            if slot is not None and self.options.masked and given is None:
                _, gradient, _ = latents.vjp(slot, gradient)
            key = p if slot is None else slot.latent
            ascents.append(Ascent(name, p, gradient, slot, base_state.get(key, {})))
        return ascents

    def gather_known(self, latents: Latents, base_state: Mapping[Tensor, Any], step: int) -> list[Ascent]:
        """Return the tensors to perturb in a step of one pass, with the direction's memory or the last d to reuse."""
        known = self.direction.memory if self.due(step) else self.kept
        if not known:  # the direction reads the base's state, and no gradient
            known = {name: p.detach() for name, p in own_parameters(latents.root) if p.requires_grad}
        return self.gather(latents, base_state, known)

    @torch.no_grad()
    def apply(
        self,
        latents: Latents,
        ascents: Sequence[Ascent],
        rho_of: Callable[[nn.Parameter], float],
        sign: float,
        step: int,
    ) -> None:
        """Add e to every tensor; e = 0 if the norm is zero or not finite.

        ``rho_of`` gives the radius of a parameter's group; ``sign`` is -1 if the base maximizes.
        """
        if not ascents and not self._warned_empty:
            self._warn_empty()
        units = [_unit(a) if self.options.normalize_weights else None for a in ascents]
        if self.due(step):  # the kept directions are in units of each tensor's deviation already
            ascents = [
                a if u is None else dataclasses.replace(a, gradient=a.gradient * u)
                for a, u in zip(ascents, units, strict=True)
            ]
        directions, self.norm = self._directions(ascents, step)
        directions = _finite(directions, self.norm, in_place=not self.direction.looks_ahead)
        self._float_copies = [(a.parameter, a.parameter.detach().clone()) for a in ascents if a.slot is None]
        usable = torch.isfinite(self.norm) & (self.norm > 0)
        sign = -1.0 if self.direction.looks_ahead else sign
        inverse = torch.where(usable, self.norm, math.inf).reciprocal() * sign
        coefficients = [
            inverse * rho_of(a.parameter) * (1.0 if u is None else u) for a, u in zip(ascents, units, strict=True)
        ]
        if self.options.inside:
            for a, d, c in zip(ascents, directions, coefficients, strict=True):
                if a.slot is None:
                    add_(a.parameter, d, c)
                else:
                    latents.perturb_inside(a.slot, d.to(a.slot.latent.dtype) * c.to(a.slot.latent.dtype))
            return
        targets = [Target(a.slot, a.parameter, d, c) for a, d, c in zip(ascents, directions, coefficients, strict=True)]
        latents.perturb(targets)
        if not self._warned_16_bit and any(t.parameter.dtype in (torch.float16, torch.bfloat16) for t in targets):
            self._warn_16_bit(ascents, targets)

    def _directions(self, ascents: Sequence[Ascent], step: int) -> tuple[list[Tensor], Tensor]:
        """Compute d and its norm, or take the kept ones; keep them for the steps that reuse them."""
        if not self.due(step):
            assert self.kept_norm is not None
            return [ascent.gradient for ascent in ascents], self.kept_norm
        directions, norm = self.direction(ascents, step)
        if self.options.reuse is not None and self.options.every > 1:
            own = torch.clone if self.direction.looks_ahead else owned_copy  # the base goes on to move its moments
            self.kept = {a.name: own(d) for a, d in zip(ascents, directions, strict=True)}
            self.kept_norm = norm
        return directions, norm

    @torch.no_grad()
    def restore_floats(self) -> None:
        """Put the float parameters back, bit for bit; quantized ones are written by the latents."""
        for p, values in self._float_copies:
            p.copy_(values)
        self._float_copies = []

    def _selects(self, name: str, p: nn.Parameter, slot: Slot | None) -> bool:
        perturb = self.options.perturb
        if not isinstance(perturb, str):
            return bool(perturb(name, p))
        return slot is not None or perturb == "all"

    def _warn_empty(self) -> None:
        self._warned_empty = True
        warnings.warn(
            "nothing is perturbed: none of the selected parameters has a gradient. If the quantized weights are frozen "
            "(LoRA), use perturb='all' or a predicate.",
            UserWarning,
            stacklevel=4,
        )

    def _warn_16_bit(self, ascents: Sequence[Ascent], targets: Sequence[Target]) -> None:
        """Say once how much of e survives the rounding of 16-bit parameters."""
        self._warned_16_bit = True
        asked, got = 0.0, 0.0
        before = {id(p): values for p, values in self._float_copies}
        for a, (_, target, d, c) in zip(ascents, targets, strict=True):
            old = a.slot.quantized() if a.slot is not None else before[id(a.parameter)]
            asked += float(whole(d.float() * c.float()).square().sum())
            got += float(whole(target.float() - old.float()).square().sum())
        warnings.warn(
            f"16-bit parameters round the perturbation away: {asked**0.5:.3g} was asked for, {got**0.5:.3g} realised. "
            "Keep the parameters in fp32 and use autocast.",
            UserWarning,
            stacklevel=2,
        )


def _unit(ascent: Ascent) -> Tensor:
    """Return the standard deviation of a tensor's weights, by which SAQ's authors divide before they quantize."""
    std = whole(ascent.weight).float().std(correction=0)
    return torch.where(std > 0, std, 1.0)


def _finite(directions: list[Tensor], norm: Tensor, *, in_place: bool) -> list[Tensor]:
    """Replace non-finite entries by 0 if the norm is not finite, because 0 * inf would be NaN and not e = 0.

    On other devices than the CPU this does not read the norm, because one more sweep is cheaper than to wait for the
    device. A direction that looks ahead returns the base optimizer's moments, which only the base may write.
    """
    if norm.device.type == "cpu" and bool(torch.isfinite(norm)):
        return directions
    if not in_place:
        return [d.nan_to_num(0.0, 0.0, 0.0) for d in directions]
    for d in directions:
        local(d).nan_to_num_(0.0, 0.0, 0.0)
    return directions
