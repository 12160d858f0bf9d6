"""The perturbation of a step: which tensors, when, how far, and back again.

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

from qsam.latent import Latents, Target, add_
from qsam.optim.directions import DIRECTIONS, Ascent
from qsam.optim.ranks import SCOPES, owned_copy
from qsam.shards import local, whole
from qsam.slots import Slot, own_parameters

Selection = str | Callable[[str, nn.Parameter], bool]


class Perturbation:
    """What SAM adds to a base optimizer.

    Args:
        direction: A registered direction.
        perturb: ``"quantized"`` (the quantized weights), ``"all"`` (these and every other trainable parameter), or a
            predicate ``(name, parameter) -> bool`` over the trainable parameters. Scales are never perturbed.
        every: Perturb each k-th step; the others are plain QAT steps. An integer >= 1.
        start: The first step that may be perturbed, counted from 0. An integer >= 0.
        reuse: ``"perturbation"``: the steps that ``every`` leaves out take the last e again, in one pass; None.
        scope: ``"global"``, one e for all processes; ``"rank"``, each its own.
        masked: Take ``M * g_Q`` in place of g_Q: the gradient as the quantizer's clip mask lets it through.
        inside: Add e to w and quantize the sum, ``p <- Q(w + e)``, in place of ``p <- Q(w) + e``.
        normalize_weights: Take e in units of each tensor's standard deviation, as if its weights had unit variance.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: a bad value.
    """

    def __init__(
        self,
        *,
        direction: str,
        perturb: Selection,
        every: int,
        start: int,
        reuse: str | None,
        scope: str,
        masked: bool = False,
        inside: bool = False,
        normalize_weights: bool = False,
    ) -> None:
        for name, value, least in (("every", every, 1), ("start", start, 0)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"`{name}` must be an integer >= {least}, got {value!r}.")
            if value < least:
                raise ValueError(f"`{name}` must be an integer >= {least}, got {value}.")
        if not callable(perturb) and perturb not in ("quantized", "all"):
            raise ValueError(f"`perturb` must be 'quantized', 'all' or a predicate (name, parameter), got {perturb!r}.")
        if reuse not in (None, "perturbation"):
            raise ValueError(f"`reuse` must be None or 'perturbation', got {reuse!r}.")
        if scope not in SCOPES:
            raise ValueError(f"`perturbation_scope` must be 'global' or 'rank', got {scope!r}.")
        self.direction = DIRECTIONS.get(direction)()
        if scope == "rank" and (reuse is not None or self.direction.averages):
            what = f"reuse={reuse!r}" if reuse is not None else f"direction={direction!r}"
            raise ValueError(
                f"{what} remembers first passes, which differ between ranks with perturbation_scope='rank', and a "
                "checkpoint holds the memory of one: use 'global'."
            )
        self.perturb = perturb
        self.every, self.start, self.reuse, self.scope = every, start, reuse, scope
        self.masked, self.inside, self.normalize_weights = masked, inside, normalize_weights
        self.norm: Tensor | None = None
        self.kept: dict[str, Tensor] = {}
        self.kept_norm: Tensor | None = None
        self._float_copies: list[tuple[nn.Parameter, Tensor]] = []
        self._warned_16_bit = self._warned_empty = False

    def due(self, step: int) -> bool:
        """Whether the step of this number is one that ``every`` and ``start`` perturb."""
        return step >= self.start and (step - self.start) % self.every == 0

    def passes(self, step: int) -> int:
        """Return 2: a first and a perturbed pass; 1: a perturbed pass with a known direction; 0: a plain step."""
        if self.due(step):
            return self.direction.passes if self.direction.ready(step) else 0
        return 1 if self.reuse is not None and self.kept and step >= self.start else 0

    def selected(self, latents: Latents) -> set[int]:
        """Return, by id, the Parameters that are perturbed where they have a gradient."""
        slots = {id(slot.parameter): slot for slot in latents.slots}
        named = [(name, p) for name, p in own_parameters(latents.root) if p.requires_grad]
        return {id(p) for name, p in named if self._selects(name, p, slots.get(id(p)))}

    def gather(
        self, latents: Latents, base_state: Mapping[Tensor, Any], given: Mapping[str, Tensor] | None = None
    ) -> list[Ascent]:
        """Return what is to be perturbed, with its gradients.

        Args:
            latents: The model's latents.
            base_state: The base optimizer's state, by latent or float parameter.
            given: Gradients by name, in place of those in the Parameters.

        Raises:
            TypeError: a sparse gradient.
        """
        slots = {id(slot.parameter): slot for slot in latents.slots}
        found = []
        for name, p in own_parameters(latents.root):
            slot = slots.get(id(p))
            gradient = p.grad if given is None else given.get(name)
            if gradient is None or not self._selects(name, p, slot):
                continue
            if gradient.is_sparse:
                raise TypeError(
                    f"{name!r} has a sparse gradient, which cannot be perturbed: build its module with sparse=False."
                )
            if slot is not None and self.masked and given is None:
                gradient = latents.pull_back(slot, gradient)[0]
            key = p if slot is None else slot.latent
            found.append(Ascent(name, p, gradient, slot, base_state.get(key, {})))
        return found

    def gather_known(self, latents: Latents, base_state: Mapping[Tensor, Any]) -> list[Ascent]:
        """Return what is to be perturbed in a step of one pass, with the kept e or what the direction remembers."""
        known = self.kept or self.direction.memory
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
        """Add ``e`` to every target; the latents note whether each p held Q(w).

        A zero or non-finite norm gives e = 0: the step is then the unperturbed one.

        Args:
            latents: The model's latents.
            ascents: From :meth:`gather`.
            rho_of: The radius of each parameter's group.
            sign: 1, or -1 where the base maximizes.
            step: Number of the step.
        """
        if not ascents and not self._warned_empty:
            self._warn_empty()
        units = [_unit(a) if self.normalize_weights else None for a in ascents]
        ascents = [
            a if u is None else dataclasses.replace(a, gradient=a.gradient * u)
            for a, u in zip(ascents, units, strict=True)
        ]
        directions, self.norm = self._directions(ascents, step)
        _clean_(directions, self.norm)
        self._float_copies = [(a.parameter, a.parameter.detach().clone()) for a in ascents if a.slot is None]
        usable = torch.isfinite(self.norm) & (self.norm > 0)
        inverse = torch.where(usable, self.norm, math.inf).reciprocal() * sign
        coefficients = [
            inverse * rho_of(a.parameter) * (1.0 if u is None else u) for a, u in zip(ascents, units, strict=True)
        ]
        if self.inside:
            latents.compare(latents.slots)
            self._shift(ascents, directions, coefficients)
            return
        targets = [Target(a.slot, a.parameter, d, c) for a, d, c in zip(ascents, directions, coefficients, strict=True)]
        latents.perturb_(targets)
        if not self._warned_16_bit and any(t.parameter.dtype in (torch.float16, torch.bfloat16) for t in targets):
            self._warn_16_bit(ascents, targets)

    def _directions(self, ascents: Sequence[Ascent], step: int) -> tuple[list[Tensor], Tensor]:
        """Ask the direction, or take the kept one again; keep it for the steps that reuse it."""
        if not self.due(step):
            assert self.kept_norm is not None
            return [ascent.gradient for ascent in ascents], self.kept_norm
        directions, norm = self.direction(ascents, step)
        if self.reuse is not None and self.every > 1:
            self.kept = {a.name: owned_copy(d) for a, d in zip(ascents, directions, strict=True)}
            self.kept_norm = norm
        return directions, norm

    @torch.no_grad()
    def restore_floats(self) -> None:
        """Put the float parameters back, bit for bit; quantized ones are written by the latents."""
        for p, values in self._float_copies:
            p.copy_(values)
        self._float_copies = []

    def _shift(self, ascents: Sequence[Ascent], directions: Sequence[Tensor], coefficients: Sequence[Tensor]) -> None:
        """Write ``p <- Q(w + e)`` and keep e, which the pull-back needs; float parameters take e directly."""
        for a, d, c in zip(ascents, directions, coefficients, strict=True):
            if a.slot is None:
                add_(a.parameter, d, c)
            else:
                a.slot.shift = d.to(a.slot.latent.dtype) * c.to(a.slot.latent.dtype)
                a.parameter.copy_(a.slot.fake_quantize(a.slot.latent + a.slot.shift))

    def _selects(self, name: str, p: nn.Parameter, slot: Slot | None) -> bool:
        if callable(self.perturb):
            return bool(self.perturb(name, p))
        return slot is not None or self.perturb == "all"

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


def _unit(ascent: Ascent) -> Tensor:
    """Return the standard deviation of a tensor's weights: the authors divide by it before they quantize."""
    weight = ascent.parameter if ascent.slot is None else ascent.slot.latent
    std = whole(weight.detach()).float().std(correction=0)
    return torch.where(std > 0, std, 1.0)


def _clean_(directions: Sequence[Tensor], norm: Tensor) -> None:
    """Set non-finite entries to 0 in place where the norm is not finite: e = 0 must not be 0 * inf = NaN.

    On a CPU the norm can be read for free; elsewhere that would wait for the device, and one more pass over the
    directions is cheaper.
    """
    if norm.device.type != "cpu" or not bool(torch.isfinite(norm)):
        for d in directions:
            local(d).nan_to_num_(0.0, 0.0, 0.0)
