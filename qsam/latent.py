"""The four verbs on latent weights: write, perturb, pull back, and the guard that nobody else wrote.

    write      p <- Q(w)
    perturb    p <- Q(w) + c * d
    pull back  (dw, ds) = VJP of Q at (w, s) applied to a gradient of the loss with respect to Q(w)

A quantized Parameter p of the model holds Q(w); w, the latent, lives here. A weight is a slot (module, attribute) and
is looked up at each verb, because Accelerate and FSDP replace Parameters.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from qsam import shards
from qsam.attach import quantize_, refuse_overflow
from qsam.coverage import Coverage, coverage_of, leave_latents, left_latents, owner_of, refuse_changed, set_owner
from qsam.functional import wide_dtype
from qsam.fused import sweeps
from qsam.guard import Guard
from qsam.inputs import is_sharded
from qsam.layers import unwrap_model
from qsam.quantizers import Noise, Quantizer
from qsam.slots import Slot, noise_streams, same_values, slot_of

_log = logging.getLogger("qsam")


class Target(NamedTuple):
    """What is perturbed.

    Attributes:
        slot: Its slot, where it is a quantized weight; else None.
        parameter: The Parameter.
        direction: d, of its shape.
        coefficient: c, a scalar tensor.
    """

    slot: Slot | None
    parameter: Tensor
    direction: Tensor
    coefficient: Tensor


class Latents:
    """The latent weights of one model.

    Args:
        model: A quantized model, or None slots for a method without quantizers.
        owner: The optimizer; a model's latents have one owner.
        coverage: The model's coverage; None for a float model, which has no slots.

    Attributes:
        sharded: Whether ``fully_shard`` was called on the model, so that each process holds a part of it.
        guard: Sees what others do to the weights.
        noisy: Whether the gradients in p were taken at a noisy Q(w), with whose draw they are pulled back.
        shifted: Whether p was left at Q(w) + e: the guard has looked before, and the update will write it.

    Raises:
        RuntimeError: another optimizer owns this model's weights.
        ValueError: an fp16 Parameter that cannot hold its quantized values; two quantized weights that are tied.
    """

    def __init__(self, model: nn.Module, owner: Any, coverage: Coverage | None) -> None:
        self.root = unwrap_model(model)
        self.coverage = coverage
        self.slots: list[Slot] = []
        self.sharded = False
        self.noisy = False
        self.shifted = False
        self.noises: list[Noise] = []
        self._input_noises: list[Noise] = []
        self._off_grid: list[Quantizer] = []
        self.guard = Guard(coverage, self.root)
        if coverage is not None:
            refuse_changed(coverage, self.root)
        if coverage is not None and owner_of(coverage) is not None:
            raise RuntimeError(
                "another qsam optimizer owns the weights of this model: call its release() first, which hands the "
                "model over with its scales and latents, or qsam.dequantize_(model, optimizer), which takes the "
                "quantizers off."
            )
        shards.refuse_unknown(self.root)
        if coverage is None:
            self.settle()
            return
        slots = [slot_of(row.name, row.module, row.attr) for row in coverage.quantized]
        _refuse_tied(slots)
        for slot in slots:
            slot.set_scale()
            refuse_overflow(slot.path, slot.parameter, slot.quantizer, slot.latent)
        _take_left(slots, left_latents(coverage))
        self.slots = slots
        self._input_noises = list(noise_streams(coverage.inputs))
        self.noises = [*noise_streams(coverage.quantized), *self._input_noises]
        self.claim(owner)
        self.settle()
        self.write()

    @property
    def input_quantizers(self) -> list[Quantizer]:
        """The quantizers of inputs."""
        rows = self.coverage.inputs if self.coverage is not None else ()
        return [row.quantizer for row in rows if row.quantizer is not None]

    @property
    def quantizers(self) -> list[Quantizer]:
        """All quantizers, weights' first."""
        return [*(slot.quantizer for slot in self.slots), *self.input_quantizers]

    def settle(self, base: Optimizer | None = None) -> None:
        """Follow the model into FSDP2: see that the shards are in place, and shard each latent as its p is.

        Args:
            base: The optimizer whose state and groups go with them, once there is one.

        Raises:
            ValueError: sharded in a way that qsam does not know, or with scales in 16 bits.
            RuntimeError: the optimizer's groups hold Parameters that ``fully_shard`` has replaced.
        """
        if not shards.in_process_group():
            return
        if self.sharded or is_sharded(self.root.modules()):
            shards.reshard_(self.root)
        if self.sharded or not any(shards.is_sharded(p) for p in self.root.parameters()):
            return
        shards.refuse_unknown(self.root)
        inputs = self.coverage.inputs if self.coverage is not None else ()
        shards.refuse_16_bit_scales(
            self.root, [(row.name, row.quantizer) for row in inputs if row.quantizer is not None]
        )
        if base is not None:
            shards.refuse_stale_groups(self.root, base.param_groups)
        for slot in self.slots:
            if shards.is_sharded(slot.parameter) and not shards.is_sharded(slot.latent):
                before = slot.latent
                slot.latent = nn.Parameter(shards.own_part(before.detach(), slot.parameter))
                if base is not None and before in base.state:
                    base.state[slot.latent] = base.state.pop(before)
        self.sharded = True

    def claim(self, owner: Any) -> None:
        """Note ``owner`` as the one optimizer of these weights."""
        if self.coverage is not None and not self.guard.released:
            set_owner(self.coverage, owner)

    def release(self) -> None:
        """Put the latents into the model and give up ownership."""
        self.put_latents()
        if self.coverage is not None:
            set_owner(self.coverage, None)
        self.slots, self.noises, self._input_noises = [], [], []

    def hand_over(self) -> None:
        """Give up ownership and leave the latents for the next optimizer; p goes on holding Q(w)."""
        if self.coverage is not None:
            leave_latents(self.coverage, {slot.path: slot.latent for slot in self.slots})
        self.slots, self.noises, self._input_noises = [], [], []
        self.guard.released = True

    @torch.no_grad()
    def write(self) -> None:
        """Write ``p <- Q(w)``, in place, and remember how p looks now."""
        if self.sharded:  # after an exception in a forward, gathered copies are where the shards belong
            shards.reshard_(self.root)
        for slot, written in zip(self.slots, sweeps.write_(self._weights(self.slots)), strict=True):
            if not written:
                slot.parameter.copy_(slot.quantized())
            slot.parked = False
        self.shifted = False
        self._mark_off_grid(())
        self.guard.remember(self.slots)
        # Autocast caches 16-bit copies of weights by tensor, not by version.
        torch.clear_autocast_cache()
        _close_block(self.root)

    def complete_scales(self) -> None:
        """Set the scales of weights that were zeros before this step; called once per step, after :meth:`write`."""
        lacking = [slot for slot in self.slots if slot.lacks_scale]
        for slot in lacking:
            slot.complete_scale()
        if lacking:
            self.write()

    def leave_shifted(self) -> None:
        """Leave p as a perturbed pass has it, for an update comes next: two sweeps over the weights less.

        Noise and shards want p to be written again.
        """
        if self.noises or self.sharded:
            self.write()
        else:
            self.shifted = True
            self.guard.remember(self.slots)

    def end_shift(self) -> None:
        """Write p where it was left shifted and no update has come."""
        if self.shifted:
            self.write()

    @torch.no_grad()
    def put_latents(self) -> None:
        """Write ``p <- w``, in place."""
        for p, slot in [(slot.parameter, slot) for slot in self.slots]:  # all are looked up before one is written
            p.copy_(slot.latent)
        torch.clear_autocast_cache()

    @torch.no_grad()
    def take_present_weights(self) -> None:
        """Set ``w <- p`` from what the model holds now, and write Q(w)."""
        for p, slot in [(slot.parameter, slot) for slot in self.slots]:
            slot.latent.copy_(p)
        for slot in self.slots:
            slot.set_scale()
        self.guard.forgive()
        self.write()

    @torch.no_grad()
    def take_frozen(self, slot: Slot, saved: Tensor | None) -> None:
        """Set a latent that no group of the checkpoint holds: as saved, else from a p that was loaded since."""
        if saved is not None:
            slot.latent.copy_(saved)
        elif not same_values(slot.parameter, slot.quantized()):
            slot.latent.copy_(slot.parameter)

    def open_block(self, name: str) -> None:
        """Note on the model that p is not Q(w) from here on; the next :meth:`write` takes the note away."""
        _close_block(self.root)
        self.root.register_state_dict_pre_hook(_OpenBlock(name))  # type: ignore[no-untyped-call]
        torch.clear_autocast_cache()  # what is cached is Q(w), and p will not be

    @contextlib.contextmanager
    def noise(self, block: str, look: Callable[[], None]) -> Iterator[None]:
        """Within this context noise quantizers draw: p holds the noisy Q(w), and outside the exact one again.

        Gradients taken inside are pulled back with the same draw. Without noise quantizers nothing happens.

        Args:
            block: What is running, for messages.
            look: Lets all processes of the training :meth:`check`, and raise together: p is about to be overwritten.
        """
        if not self.noises:
            yield
            return
        for slot in self.slots:
            self.guard.note_value(slot, slot.quantized())
        look()
        self.noisy = True
        try:
            with self._drawing():
                self.write()
                self.open_block(block)
                yield
        finally:
            self.write()

    @contextlib.contextmanager
    def _drawing(self) -> Iterator[None]:
        before = [noise.on for noise in self.noises]
        for noise in self.noises:
            noise.on = True
        try:
            yield
        finally:
            for noise, on in zip(self.noises, before, strict=True):
                noise.on = on

    def move_input_noise(self) -> None:
        """Move the state of the inputs' quantizers: the next draw of noise, and ranges by what was seen."""
        for noise in self._input_noises:
            noise.advance()
        for quantizer in self.input_quantizers:
            quantizer.take_observations()

    def check(self, agree: Callable[[bool], bool] | None = None) -> None:
        """Refuse to go on if somebody else wrote p or a scale since the last :meth:`write`; see :class:`Guard`.

        Args:
            agree: Tells whether a flag is set in any process; None where the others may not be asking.
        """
        self.guard.check(self.slots, agree, self._any_process if self.sharded else None)

    def _any_process(self, flag: bool) -> bool:
        return shards.any_process(flag, self.root.parameters())

    @torch.no_grad()
    def compare(self, slots: Sequence[Slot]) -> None:
        """Note whether each p holds Q(w): where it is about to be perturbed, or has no gradient to be pulled back."""
        if self.noisy or self.shifted:
            return  # the guard has looked, and p holds a draw, or what was added to
        for slot, same in zip(slots, sweeps.holds(self._weights(slots)), strict=True):
            if same is None:
                self.guard.note_value(slot, slot.quantized())
            else:
                self.guard.note(slot, same)

    @torch.no_grad()
    def perturb_(self, targets: Sequence[Target]) -> None:
        """Add ``c * d`` to each target, and note whether each p held Q(w), in one sweep where a kernel can."""
        ours = [target for target in targets if target.slot is not None]
        slots = [target.slot for target in ours if target.slot is not None]
        directions, coefficients = [shards.local(t.direction) for t in ours], [t.coefficient for t in ours]
        verdicts = sweeps.perturb_(self._weights(slots), directions, coefficients)
        done = set()
        for slot, same in zip(slots, verdicts, strict=True):
            if same is not None:
                self.guard.note(slot, same)
                done.add(id(slot))
        self.compare([slot for slot in self.slots if id(slot) not in done])
        for target in targets:
            if target.slot is None or id(target.slot) not in done:
                add_(target.parameter, target.direction, target.coefficient)
        self._mark_off_grid([slot.quantizer for slot in slots])

    def _mark_off_grid(self, quantizers: Sequence[Quantizer]) -> None:
        """Mark the quantizers of weights that were perturbed, and no others."""
        for quantizer in self._off_grid:
            vars(quantizer)["off_grid"] = False
        for quantizer in quantizers:
            vars(quantizer)["off_grid"] = True
        self._off_grid = list(quantizers)

    def pull_back_(self, slots: Sequence[Slot]) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """Do what :meth:`pull_back` does to the gradients of these p, in one sweep where a kernel can.

        There the gradient becomes dw, and p is parked. Elsewhere dw is made when it is asked for, so that memory for
        one is enough where the gradient is let go of before the next.
        """
        found = sweeps.pull_back_(self._weights(slots), _gradients(slots))
        for slot, fused in zip(slots, found, strict=True):
            slot.parked = slot.parked or fused is not None
        yield from (self._pulled_back(slot, fused) for slot, fused in zip(slots, found, strict=True))

    def scale_gradients(self, slots: Sequence[Slot]) -> Iterator[dict[str, Tensor]]:
        """Return the second part of :meth:`pull_back_` alone; gradients and p stay as they are."""
        found = sweeps.scale_gradients(self._weights(slots), _gradients(slots))
        yield from (self._pulled_back(slot, fused)[1] for slot, fused in zip(slots, found, strict=True))

    def _pulled_back(self, slot: Slot, fused: tuple[Tensor, sweeps.Verdict] | None) -> tuple[Tensor, dict[str, Tensor]]:
        (grad,) = _gradients([slot])
        if fused is None:
            return self.pull_back(slot, grad)
        if not self.shifted:
            self.guard.note(slot, fused[1])
        return grad, {"scale": fused[0]}

    def _weights(self, slots: Iterable[Slot]) -> list[sweeps.Weight]:
        """Return these weights as kernels see them; without a grid where p is another Q than theirs."""
        return [
            sweeps.Weight(
                slot.latent,
                slot.parameter,
                None if self.noisy or slot.shift is not None else slot.quantizer.grid(slot.latent),
            )
            for slot in slots
        ]

    def pull_back(self, slot: Slot, grad: Tensor, *, compare: bool = True) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the VJP of Q at (w, parameters) applied to ``grad``; at w + e where ``slot.shift`` holds an e.

        Args:
            slot: The weight; p holds Q(w).
            grad: dL/dQ, of the shape of p.
            compare: Whether p should hold Q(w) now, so that the guard may compare the two.

        Returns:
            dw in the latent's dtype, and the gradient of each Parameter of the quantizer by name.

        Raises:
            TypeError: a sparse gradient.
        """
        if grad.is_sparse:
            raise TypeError(
                f"{slot.path!r} has a sparse gradient, which cannot be pulled back: build its module with sparse=False."
            )
        point = slot.latent.detach() if slot.shift is None else slot.shifted_latent()
        out, dw, ds = shards.pull_back(slot.quantizer, point, grad, self._with_graph)
        if compare and slot.shift is None and not self.shifted:
            self.guard.note_value(slot, slot.quantized() if self.noisy else out)
        return dw, ds

    def _with_graph(self, run: Callable[[], Tensor]) -> Tensor:
        with torch.enable_grad(), self._drawing() if self.noisy else contextlib.nullcontext():
            return run()


def open_block(root: nn.Module) -> str | None:
    """Return the name of the block in which the model's p are not Q(w) now, or None."""
    return next((hook.name for hook in root._state_dict_pre_hooks.values() if isinstance(hook, _OpenBlock)), None)


def coverage_for(model: nn.Module, wanted: bool) -> Coverage | None:
    """Return the model's coverage, quantizing a plain model with the defaults if a method wants it.

    Args:
        model: The model.
        wanted: Whether the method uses quantizers.

    Raises:
        RuntimeError: a method without quantizers was given a quantized model.
    """
    coverage = coverage_of(unwrap_model(model))
    if not wanted:
        if coverage is not None:
            raise RuntimeError(
                "SAM trains a float model, and this one is quantized: use JointSAM or SAQ, or dequantize_ it."
            )
        return None
    if coverage is None:
        coverage = quantize_(model)
        _log.info("qsam quantized the model with its defaults:\n%s", coverage)
    return coverage


@torch.no_grad()
def add_(target: Tensor, direction: Tensor, coefficient: Tensor) -> None:
    """Add ``c * d`` in place, without a temporary: c is a scalar tensor.

    A 16-bit target is added to in fp32 and then rounded.
    """
    target, direction = shards.local(target), shards.local(direction)
    if wide_dtype(target.dtype) == target.dtype:
        target.addcmul_(direction.to(target.dtype), coefficient.to(target.dtype))
    else:
        wide = wide_dtype(target.dtype)
        target.copy_(target.to(wide).addcmul_(direction.to(wide), coefficient.to(wide)))


def _gradients(slots: Sequence[Slot]) -> list[Tensor]:
    """Return the gradients of these p, of which each has one."""
    return [grad for slot in slots if (grad := slot.parameter.grad) is not None]


@torch.no_grad()
def _take_left(slots: Sequence[Slot], left: Mapping[str, nn.Parameter]) -> None:
    """Take the latents that the last optimizer left, for each weight that still holds Q of them."""
    for slot in slots:
        latent = left.get(slot.path)
        if latent is None or latent.device != slot.latent.device or latent.shape != slot.latent.shape:
            continue
        if shards.is_sharded(slot.parameter) and not shards.is_sharded(latent):
            latent = nn.Parameter(shards.own_part(latent.detach(), slot.parameter))
        present, slot.latent = slot.latent, latent
        if not same_values(slot.parameter, slot.quantized()):
            slot.latent = present


def _refuse_tied(slots: Sequence[Slot]) -> None:
    """Refuse two weights that are one Parameter: it cannot hold two Q(w)."""
    first: dict[int, str] = {}
    for slot in slots:
        other = first.setdefault(id(slot.parameter), slot.path)
        if other != slot.path:
            raise ValueError(
                f"{other!r} and {slot.path!r} are one Parameter, tied after quantize_, and have a quantizer each: call "
                "qsam.dequantize_(model), tie them, and quantize_ again."
            )


@dataclasses.dataclass(frozen=True)
class _OpenBlock:
    """Hook on the root module that refuses its state_dict while p is not Q(w), and by being there says so.

    It stays no longer than the block: the optimizer may be thrown away.
    """

    name: str

    def __call__(self, module: nn.Module, *_: Any) -> None:
        raise RuntimeError(
            f"model.state_dict() inside {self.name}() would save weights that are not Q(w): save outside the block."
        )


def _close_block(root: nn.Module) -> None:
    for key, hook in list(root._state_dict_pre_hooks.items()):
        if isinstance(hook, _OpenBlock):
            del root._state_dict_pre_hooks[key]
