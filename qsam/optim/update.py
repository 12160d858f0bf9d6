"""The update: pull the gradients back, step latents and scales, write Q(w)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from qsam.optim.diagnostics import unseen_inputs
from qsam.optim.groups import pointed_at_latents
from qsam.optim.passes import Passes

if TYPE_CHECKING:
    from qsam.slots import ScaleSlot, Slot

Closure = Callable[[], Any]


class Update(Passes):
    """What follows the passes of a step."""

    scale_base: Optimizer | None
    scale_slots: list[ScaleSlot]
    ste: str
    max_grad_norm: float | None
    _state_created: bool

    @torch.no_grad()
    def _update(self, *, weights: bool, scales: bool) -> None:
        """Pull the gradients back; step the latents, or the scales, or both; write Q(w)."""
        latents = self.latents_of
        self._check_guard()
        if weights and self.steps == 0:
            self._say_unseen_inputs()
        try:
            if weights and self.perturbation is not None and self.perturbation.direction.learns:
                self.perturbation.direction.learn(self.perturbation.gather(latents, self.base.state))
            scale_grads = self._pull_back(self._consume if weights else latents.scale_gradients)
            step_scales = functools.partial(self._step_scales, scale_grads) if scales else None
            if weights:
                self._step_base(after=step_scales)
            elif step_scales is not None:
                step_scales()
        finally:
            self._clean_up()
        if weights:
            self._count_step()

    def _say_unseen_inputs(self) -> None:
        coverage = self.latents_of.coverage
        unseen = [] if coverage is None else unseen_inputs(coverage)
        if unseen:
            layers = ", ".join(unseen[:5]) + (", ..." if len(unseen) > 5 else "")
            self._say_once(
                f"the first step used the weight of {layers} without calling the layer (or with a PackedSequence): its "
                "input stays float, and DistributedDataParallel would wait for its scale. Give quantize_ a rule "
                "for it, with {'activations': None}."
            )

    def _clean_up(self) -> None:
        """Let go of all gradients, and leave Q(w) in the model."""
        for slot in self.latents_of.slots:
            slot.latent.grad = slot.shift = slot.parameter.grad = None
        self.latents_of.write()
        self._clear_gradients()

    def _count_step(self) -> None:
        """Move what moves once a step: the quantizers' state, and the step's number."""
        for slot in self.latents_of.slots:
            slot.move_state()
        if any(slot.quantizer.moves_grid for slot in self.latents_of.slots):
            self.latents_of.write()
        self.latents_of.move_input_noise()
        self.param_groups[0]["qsam_step"] += 1
        self._passes_made = 0
        self.ranks.verify(self.latents_of)

    def _pull_back(self, pull: Callable[[Sequence[Slot]], Iterable[dict[str, Tensor]]]) -> dict[int, Tensor]:
        """Return the scales' gradients by the id of the scale.

        Args:
            pull: Takes weights that have gradients, and returns for each the gradients of its quantizer's parameters by
                name.
        """
        grads: dict[int, Tensor] = {}
        owned = {id(p) for p in self._parameters()}
        slots = [slot for slot in self.latents_of.slots if slot.parameter.grad is not None]
        self.latents_of.compare([slot for slot in self.latents_of.slots if slot.parameter.grad is None])
        for slot in slots:
            if id(slot.parameter) not in owned:
                raise RuntimeError(
                    f"the quantized weight {slot.path!r} has a gradient, but its Parameter is in no group: it was "
                    "unfrozen (call add_param_group), or replaced (build the optimizer afterwards)."
                )
        for slot, found in zip(slots, pull(slots), strict=True):
            for name, gradient in found.items():
                grads[id(getattr(slot.quantizer, name))] = gradient
        for scale in self.scale_slots:
            if scale.parameter.grad is not None:
                grads[id(scale.parameter)] = scale.parameter.grad
        return grads

    def _consume(self, slots: Sequence[Slot]) -> Iterator[dict[str, Tensor]]:
        """Put dw on each latent, in the memory of p's gradient if it fits."""
        if self.ste == "clipped":
            for slot, (dw, ds) in zip(slots, self.latents_of.pull_back_(slots), strict=True):
                slot.latent.grad, slot.parameter.grad = dw, None
                yield ds
            return
        for slot, ds in zip(slots, self.latents_of.scale_gradients(slots), strict=True):
            self._take_as_it_is(slot)
            yield ds

    def _differentiate(self, slots: Sequence[Slot]) -> Iterator[dict[str, Tensor]]:
        """Put dw on each latent, and leave p as it is."""
        for slot in slots:
            assert slot.parameter.grad is not None
            dw, ds = self.latents_of.pull_back(slot, slot.parameter.grad)
            if self.ste == "clipped":
                slot.latent.grad, slot.parameter.grad = dw, None
            else:
                self._take_as_it_is(slot)
            yield ds

    def _take_as_it_is(self, slot: Slot) -> None:
        """Put p's gradient on the latent: dw of the identity's straight-through estimator."""
        assert slot.parameter.grad is not None
        slot.latent.grad, slot.parameter.grad = slot.parameter.grad.to(slot.latent.dtype), None

    def _step_base(self, closure: Closure | None = None, after: Callable[[], None] | None = None) -> Any:
        """Step the base optimizer on the latents; after an exception they are what they were before.

        Args:
            closure: For a base that calls it.
            after: What belongs to the same step: where it fails, the latents go back too.
        """
        copies = [self._backup(slot, in_place=closure is None) for slot in self.latents_of.slots]
        with pointed_at_latents(self.base, self.latents_of):
            if closure is None:
                self._clip()
            try:
                found = self.base.step() if closure is None else self.base.step(closure)
                if after is not None:
                    after()
                return found
            except BaseException:
                for slot, copy in zip(self.latents_of.slots, copies, strict=True):
                    slot.latent.copy_(copy)
                raise

    def _clip(self) -> None:
        if self.max_grad_norm is not None:
            owned = [p for group in self.base.param_groups for p in group["params"]]
            torch.nn.utils.clip_grad_norm_(owned, self.max_grad_norm)

    def _backup(self, slot: Slot, in_place: bool) -> Tensor:
        """Return a copy of w. A Parameter of w's dtype serves as its place: it is rewritten after the step anyway."""
        p = slot.parameter
        if in_place and p.dtype == slot.latent.dtype:
            if not slot.parked:
                p.copy_(slot.latent)
            return p.detach()
        return slot.latent.detach().clone()

    def _step_scales(self, grads: Mapping[int, Tensor]) -> None:
        """Step the scales' optimizer with these gradients, at the rates of the public groups."""
        if self.scale_base is None:
            return
        self._sync_scale_groups()
        for scale in self.scale_slots:
            scale.parameter.grad = grads.get(id(scale.parameter))
        sign = -1.0 if self._maximizes() else 1.0
        for group in self.scale_base.param_groups:
            for s in group["params"]:
                if s.grad is not None and sign < 0:
                    s.grad = -s.grad
        self.scale_base.step()
        for scale in self.scale_slots:
            scale.parameter.grad = None

    def _create_state(self) -> None:
        """Create the base's state and nothing else: torch.distributed.checkpoint asks for it with every lr at 0."""
        for slot in self.latents_of.slots:
            slot.latent.grad = torch.zeros_like(slot.latent)
        with pointed_at_latents(self.base, self.latents_of):
            self.base.step()
        self._step_scales({id(s.parameter): torch.zeros_like(s.parameter) for s in self.scale_slots})
        for slot in self.latents_of.slots:
            slot.latent.grad = None
        self._state_created = True

    def _sync_scale_groups(self) -> None:
        """Give the scale optimizer the rates that schedulers wrote into the public groups; nothing else is theirs."""
        assert self.scale_base is not None
        public = [group for group in self.param_groups if "qsam_scales" in group]
        for mine, seen in zip(self.scale_base.param_groups, public, strict=True):
            mine["lr"], mine["params"] = seen["lr"], seen["params"]

    def _maximizes(self) -> bool:
        return bool(self.base.param_groups[0].get("maximize", False))
