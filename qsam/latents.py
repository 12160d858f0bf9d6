"""The latent weights w of a model, whose quantized Parameters p hold Q(w), and the four verbs on them.

    write      p <- Q(w)
    perturb    p <- Q(w) + c * d
    pull back  (dw, ds) = VJP of Q at (w, s) applied to the gradient of the loss with respect to Q(w)
    update     an optimizer steps w; if it fails, w is what it was before

A weight is a slot (module, attribute) and is looked up by each verb, because Accelerate and FSDP replace Parameters.
Each verb is one sweep over a weight if a kernel fits it (:mod:`qsam.fused.kernels`), and runs eagerly otherwise.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from qsam import distributed
from qsam.attach import dequantize_, quantize_, refuse_overflow, restored_if_refused
from qsam.coverage import (
    Coverage,
    coverage_of,
    keep_released_latents,
    owner_of,
    parameter_at,
    refuse_changed,
    released_latents,
    set_owner,
)
from qsam.functional import SCALE_FLOOR, wide_dtype
from qsam.fused import kernels
from qsam.guard import Guard, block_of, close_block, open_block, same_values
from qsam.layers import unwrap_model
from qsam.quantizers import Noise, Quantizer
from qsam.quantizers.base import LIMITS

_log = logging.getLogger("qsam")


@dataclasses.dataclass(eq=False)
class Slot:
    """One quantized weight: the attribute ``attr`` of ``module``, at ``path`` in the model, and its latent.

    Attributes:
        latent: w, fp32 or the Parameter's dtype if that is wider.
        p_holds: ``"quantized"``: p is Q(w). ``"perturbed"``: Q(w) + e, or Q(w + e), from a perturbation until the next
            write. ``"latent"``: a copy of w, from a fused pull-back until the next write.
        inner_e: The e that was added to w before it was quantized in the last perturbed pass (SAQ, case 2), until the
            update.
        lacks_scale: Whether a row of w, or all of it, has been 0 so far, so that no scale could be set from it.
        is_initial: Whether no step has come since the scale was set from w at construction.
    """

    path: str
    module: nn.Module
    attr: str
    latent: nn.Parameter
    p_holds: Literal["quantized", "perturbed", "latent"] = "latent"
    inner_e: Tensor | None = None
    lacks_scale: bool = False
    is_initial: bool = False

    @property
    def parameter(self) -> nn.Parameter:
        """The model's Parameter p, as it is now."""
        p = self.module._parameters.get(self.attr)
        return parameter_at(self.module, self.attr, self.path) if p is None else p

    @property
    def quantizer(self) -> Quantizer:
        """The quantizer Q."""
        return getattr(self.module, f"{self.attr}_quantizer")  # type: ignore[no-any-return]

    def fake_quantize(self, w: Tensor) -> Tensor:
        """Return Q of any tensor shaped and sharded as the latent."""
        return distributed.quantized(self.quantizer, w)

    @torch.no_grad()
    def quantized(self) -> Tensor:
        """Return Q(w) in the dtype of p."""
        return self.fake_quantize(self.latent).to(self.parameter.dtype)

    def note(self, holds: Literal["quantized", "perturbed", "latent"]) -> None:
        """Note what p holds now, and tell the quantizer whether p is on the grid, for layers of integers."""
        if holds != self.p_holds:
            self.p_holds = holds
            # Q(w + e) is on the grid too.
            self.quantizer.off_grid = holds == "latent" or (holds == "perturbed" and self.inner_e is None)

    def point(self) -> Tensor:
        """Return the point at which Q was evaluated: w or ``w + e``; w in rows that have no scale yet."""
        w = self.latent.detach()
        if self.inner_e is None:
            return w
        if not self.lacks_scale:
            return w + self.inner_e
        step = self.step_size()
        return w if step is None else torch.where(step > SCALE_FLOOR, w + self.inner_e, w)

    def step_size(self) -> Tensor | None:
        """Return the distance of neighbouring grid values, broadcastable against the latent, or None."""
        return distributed.step_size(self.quantizer, self.latent.detach())

    def set_scale(self) -> None:
        """Set the scale from w if no checkpoint brought one, and note whether some entries are still missing."""
        self.is_initial = self.is_initial or not self.quantizer.calibrated
        if self.is_initial:
            self.quantizer.set_sign_(None)
            distributed.apply(self.quantizer, "set_from_weight_", self.latent.detach())
        self.lacks_scale = True
        self.complete_scale()

    def take_loaded_scale(self) -> None:
        """Keep the scale that a checkpoint brought together with w."""
        self.is_initial = False
        self.lacks_scale = True

    def complete_scale(self) -> None:
        """Set the scales of rows of w that were zeros before and are not now."""
        if self.lacks_scale:
            self.lacks_scale = not distributed.apply(self.quantizer, "complete_", self.latent.detach())

    def move_state(self) -> None:
        """Let the quantizer move its state by one step; w is gathered only for a quantizer that has state."""
        self.is_initial = False
        self.quantizer.requires_grad_(False)  # model.requires_grad_(True) sets it, and DDP would wait for a gradient
        w = self.latent.detach()
        self.quantizer.update(distributed.whole(w) if type(self.quantizer).update is not Quantizer.update else w)

    def fingerprint(self) -> tuple[Any, ...]:
        """Return a tuple that changes whenever torch counts a write to p or to a tensor of its quantizer."""
        p, quantizer = self.parameter, self.quantizer
        is_plain = len(quantizer._buffers) == 1 and not quantizer._modules  # only Parameters and `limits`
        own = quantizer._parameters if is_plain else quantizer.state_dict(keep_vars=True)
        # DDP broadcasts buffers in each forward, so the version of `limits` means nothing.
        versions = [distributed.local(t)._version for key, t in own.items() if t is not None and key != LIMITS]
        part = distributed.local(p)
        return (id(p), p._version, part._version, part.data_ptr(), p.dtype, *versions)


class Target(NamedTuple):
    """A tensor to perturb by ``c * d``: d has its shape, c is a scalar tensor, and float parameters have no slot."""

    slot: Slot | None
    parameter: Tensor
    direction: Tensor
    coefficient: Tensor


class Latents:
    """The latent weights of one model, whose owner is one optimizer; without coverage there are no slots.

    Attributes:
        root: The model without wrappers.
        slots: The quantized weights.
        sharded: Whether ``fully_shard`` was called on the model, so that each process holds a part of it.
        guard: Detects writes by other code.
        noises: The streams of noise that the quantizers of weights and inputs draw from.
        noisy: Whether the gradients in p were computed at a noisy Q(w); they are pulled back with the same draw.
    """

    def __init__(self, model: nn.Module, owner: Any, coverage: Coverage | None) -> None:
        self.root = unwrap_model(model)
        self.coverage = coverage
        self.slots: list[Slot] = []
        self.sharded = False
        self.noisy = False
        self.noises: list[Noise] = []
        self._input_noises: list[Noise] = []
        if coverage is not None:
            _refuse_taken(coverage, self.root)
        self.guard = Guard(coverage, self.root)
        distributed.refuse_unknown(self.root)
        if coverage is not None:
            self.slots = _new_slots(coverage)
            self._input_noises = _noises(row.quantizer for row in coverage.inputs)
            self.noises = _noises(slot.quantizer for slot in self.slots) + self._input_noises
            self.set_owner(owner)
        distributed.follow_fsdp(self)
        if coverage is not None:
            self.write()

    # --- write ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def write(self) -> None:
        """Write ``p <- Q(w)``, in place, and remember the fingerprint of p."""
        if self.sharded:  # after an exception in a forward, the model holds gathered copies instead of shards
            distributed.reshard_(self.root)
        for slot, written in zip(self.slots, kernels.write_(self._weights(self.slots)), strict=True):
            if not written:
                slot.parameter.copy_(slot.quantized())
            slot.note("quantized")
        self.guard.remember(self.slots)
        # Autocast caches 16-bit copies of weights by tensor, not by version.
        torch.clear_autocast_cache()
        close_block(self.root)

    @torch.no_grad()
    def write_latents(self) -> None:
        """Write ``p <- w``, in place."""
        for p, slot in [(slot.parameter, slot) for slot in self.slots]:  # the lookup may raise, so it comes first
            p.copy_(slot.latent)
            slot.note("latent")
        torch.clear_autocast_cache()

    def open_block(self, name: str) -> None:
        """Mark the model until the next :meth:`write`, because its p are not Q(w)."""
        open_block(self.root, name)
        torch.clear_autocast_cache()  # the cache holds Q(w), and p will not

    @contextlib.contextmanager
    def noise(self, block: str, check: Callable[[], None]) -> Iterator[None]:
        """Within this context noise quantizers draw, and p holds the noisy Q(w); afterwards it holds the exact one.

        Gradients computed inside are pulled back with the same draw. Without noise quantizers nothing happens.
        ``check`` lets all processes raise together before p is overwritten.
        """
        if not self.noises:
            yield
            return
        for slot in self.slots:
            self._compare(slot)
        check()
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

    # --- perturb --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def perturb(self, targets: Sequence[Target]) -> None:
        """Write ``p <- Q(w) + c * d``, and add ``c * d`` to float parameters, in place."""
        ours = [(t, t.slot) for t in targets if t.slot is not None]
        weights = self._weights([slot for _, slot in ours])
        directions = [distributed.local(t.direction) for t, _ in ours]
        answers = kernels.perturb_(weights, directions, [t.coefficient for t, _ in ours])
        for (target, slot), same in zip(ours, answers, strict=True):
            if same is not None:
                self.guard.report(slot, same)
            else:
                if not self.noisy:
                    self._compare(slot)
                add_(target.parameter, target.direction, target.coefficient)
            slot.note("perturbed")
        for target in targets:
            if target.slot is None:
                add_(target.parameter, target.direction, target.coefficient)

    @torch.no_grad()
    def perturb_inside(self, slot: Slot, e: Tensor) -> None:
        """Write ``p <- Q(w + e)``, and keep e, which the pull-back needs."""
        if not self.noisy:
            self._compare(slot)
        slot.inner_e = e
        slot.parameter.copy_(slot.fake_quantize(slot.latent + e))
        slot.note("perturbed")

    def keep_perturbed(self) -> None:
        """Leave p perturbed for the update that follows, which saves two sweeps; with noise or shards, write Q(w)."""
        if self.noises or self.sharded:
            self.write()
        else:
            self.guard.remember(self.slots)

    def end_perturbation(self) -> None:
        """Write p if :meth:`keep_perturbed` left it perturbed and no update came."""
        if block_of(self.root) is not None:
            self.write()

    # --- pull back ------------------------------------------------------------------------------------------------

    def pull_back(self, *, masked: bool) -> Iterator[tuple[Slot, Tensor, dict[str, Tensor]]]:
        """Pull back the gradient of each p that has one; yield its slot, dw, and ds of each parameter of Q by name.

        Each dw is computed when the iterator reaches it, so memory for one suffices if the caller frees each gradient.
        Kernels write dw over p's gradient.

        Args:
            masked: True: dw carries Q's mask, and p may hold w afterwards, until the next :meth:`write`. False:
                dw = dL/dQ, and p stays as it is.
        """
        slots = [slot for slot in self.slots if slot.parameter.grad is not None]
        held = {id(slot) for slot in self.slots if slot.p_holds == "quantized" and slot.inner_e is None}
        for slot in self.slots:
            if slot.parameter.grad is None and id(slot) in held and not self.noisy:
                self._compare(slot)
        grads = (slot.parameter.grad for slot in slots)
        answers = kernels.pull_back_(self._weights(slots), [g for g in grads if g is not None], overwrite=masked)
        for slot, answer in zip(slots, answers, strict=True):
            if masked and answer is not None:
                slot.note("latent")
        for slot, answer in zip(slots, answers, strict=True):
            yield slot, *self._pulled_back(slot, answer, masked, id(slot) in held)

    def _pulled_back(
        self, slot: Slot, answer: tuple[Tensor, kernels.Verdict] | None, masked: bool, held_q: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return dw and ds of one weight, from a kernel's answer if there is one; let the guard check what p held."""
        grad = slot.parameter.grad
        assert grad is not None
        if answer is not None:
            dw, ds = grad, {"scale": answer[0]}
            if held_q:
                self.guard.report(slot, answer[1])
        else:
            q, dw, ds = self.vjp(slot, grad)
            if held_q:
                self.guard.compare(slot, slot.quantized() if self.noisy else q)
        return dw if masked else grad.to(slot.latent.dtype), ds

    def vjp(self, slot: Slot, grad: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return Q, dw and the gradients of Q's Parameters by name, at w, or at w + e if ``slot.inner_e`` holds an e.

        ``grad`` is dL/dQ, of the shape of p; Q and dw have the latent's dtype.
        """
        if grad.is_sparse:
            raise TypeError(
                f"{slot.path!r} has a sparse gradient, which cannot be pulled back: build its module with sparse=False."
            )

        def run(quantize: Callable[[], Tensor]) -> Tensor:
            with torch.enable_grad(), self._drawing() if self.noisy else contextlib.nullcontext():
                return quantize()

        return distributed.vjp(slot.quantizer, slot.point(), grad, run)

    def _weights(self, slots: Iterable[Slot]) -> list[kernels.Weight]:
        """Return these weights for the kernels; without a grid if p holds something else than Q(w)."""
        return [
            kernels.Weight(
                slot.latent,
                slot.parameter,
                None if self.noisy or slot.inner_e is not None else slot.quantizer.grid(slot.latent),
            )
            for slot in slots
        ]

    # --- update ---------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def update(self, *, copies_in_p: bool) -> Iterator[None]:
        """Within this context an optimizer steps the latents; if it raises, they are what they were before.

        Args:
            copies_in_p: Whether to keep the copies in p, which is written after the step anyway. A base that runs
                forward passes in its step needs p itself.
        """
        copies = [self._copy(slot, copies_in_p) for slot in self.slots]
        try:
            yield
        except BaseException:
            with torch.no_grad():
                for slot, copy in zip(self.slots, copies, strict=True):
                    slot.latent.copy_(copy)
            raise

    @torch.no_grad()
    def _copy(self, slot: Slot, in_p: bool) -> Tensor:
        p = slot.parameter
        if not in_p or p.dtype != slot.latent.dtype:
            return slot.latent.detach().clone()
        if slot.p_holds != "latent":
            p.copy_(slot.latent)
            slot.note("latent")
        return p.detach()

    def complete_scales(self) -> None:
        """Set the scales of weights that were zeros before this step; called once per step after :meth:`write`."""
        lacking = [slot for slot in self.slots if slot.lacks_scale]
        for slot in lacking:
            slot.complete_scale()
        if lacking:
            self.write()

    def move_input_noise(self, share: Callable[[list[Tensor]], None]) -> None:
        """Move the state of the inputs' quantizers: go on to the next draw of noise, and move observed ranges.

        Args:
            share: Writes the largest values of all processes into some tensors.
        """
        rows = self.coverage.inputs if self.coverage is not None else ()
        quantizers = [row.quantizer for row in rows if row.quantizer is not None]
        share([seen for quantizer in quantizers if (seen := quantizer.observations()) is not None])
        for noise in self._input_noises:
            noise.advance()
        for quantizer in quantizers:
            quantizer.take_observations()

    # --- other writers and owners ---------------------------------------------------------------------------------

    def check(self, agree: Callable[[bool], bool] | None = None) -> None:
        """Raise if other code wrote p or a scale since the last :meth:`write`; see :meth:`Guard.check`."""
        among = (
            functools.partial(distributed.any_process, tensors=list(self.root.parameters())) if self.sharded else None
        )
        self.guard.check(self.slots, agree, among)

    def _compare(self, slot: Slot) -> None:
        self.guard.compare(slot, slot.quantized())

    @torch.no_grad()
    def take_present_weights(self) -> None:
        """Set ``w <- p`` from the weights that the model holds now, and write Q(w)."""
        for p, slot in [(slot.parameter, slot) for slot in self.slots]:
            slot.latent.copy_(p)
        for slot in self.slots:
            slot.set_scale()
        self.guard.accept_current_weights()
        self.write()

    @torch.no_grad()
    def load_frozen(self, slot: Slot, saved: Tensor | None) -> None:
        """Set a latent that no group of the checkpoint holds: as saved, or from p if the model was loaded since."""
        if saved is not None:
            slot.latent.copy_(saved)
        elif not same_values(slot.parameter, slot.quantized()):
            slot.latent.copy_(slot.parameter)

    def set_owner(self, owner: Any) -> None:
        """Make ``owner`` the only optimizer of these weights."""
        if self.coverage is not None and not self.guard.released:
            set_owner(self.coverage, owner)

    def release(self, *, into_model: bool) -> None:
        """Give up ownership: write the latents into the model, or keep them beside it for the next optimizer."""
        if into_model:
            self.write_latents()
        else:
            self.guard.released = True
        if self.coverage is not None:
            set_owner(self.coverage, None)
            if not into_model:
                keep_released_latents(self.coverage, {slot.path: slot.latent for slot in self.slots})
        self.slots, self.noises, self._input_noises = [], [], []


def coverage_for(model: nn.Module, wanted: bool) -> Coverage | None:
    """Return the model's coverage; if ``wanted`` by the method, quantize a plain model with the defaults."""
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


def add_(target: Tensor, direction: Tensor, coefficient: Tensor) -> None:
    """Add ``c * d`` in place, without a temporary; a 16-bit target is added to in fp32 and then rounded."""
    target, direction = distributed.local(target), distributed.local(direction)
    wide = wide_dtype(target.dtype)
    if wide == target.dtype:
        target.addcmul_(direction.to(wide), coefficient.to(wide))
    else:
        target.copy_(target.to(wide).addcmul_(direction.to(wide), coefficient.to(wide)))


# --- slots --------------------------------------------------------------------------------------------------------


def _refuse_taken(coverage: Coverage, root: nn.Module) -> None:
    """Refuse a model that another optimizer owns, or that has lost quantized modules."""
    refuse_changed(coverage, root)
    if owner_of(coverage) is not None:
        raise RuntimeError(
            "another qsam optimizer owns the weights of this model: call its release() first, which hands the "
            "model over with its scales and latents, or qsam.dequantize_(model, optimizer), which takes the "
            "quantizers off."
        )


def _new_slots(coverage: Coverage) -> list[Slot]:
    slots = [slot_of(row.name, row.module, row.attr) for row in coverage.quantized]
    _refuse_tied(slots)
    for slot in slots:
        slot.set_scale()
        refuse_overflow(slot.path, slot.parameter, slot.quantizer, slot.latent)
    _take_released(slots, released_latents(coverage))
    return slots


def slot_of(path: str, module: nn.Module, attr: str) -> Slot:
    """Return a slot whose latent is a copy of its Parameter, in fp32 or wider."""
    p = getattr(module, attr)
    return Slot(path, module, attr, nn.Parameter(p.detach().to(wide_dtype(p.dtype), copy=True)))


def _refuse_tied(slots: Sequence[Slot]) -> None:
    """Refuse two weights that are one Parameter, which cannot hold two Q(w)."""
    first: dict[int, str] = {}
    for slot in slots:
        other = first.setdefault(id(slot.parameter), slot.path)
        if other != slot.path:
            raise ValueError(
                f"{other!r} and {slot.path!r} are one Parameter, tied after quantize_, and have a quantizer each: call "
                "qsam.dequantize_(model), tie them, and quantize_ again."
            )


@torch.no_grad()
def _take_released(slots: Sequence[Slot], released: Mapping[str, nn.Parameter]) -> None:
    """Take the latents that the last optimizer released, for each weight that still holds Q of them."""
    for slot in slots:
        latent = released.get(slot.path)
        if latent is None or latent.device != slot.latent.device or latent.shape != slot.latent.shape:
            continue
        if distributed.is_sharded(slot.parameter) and not distributed.is_sharded(latent):
            latent = nn.Parameter(distributed.own_part(latent.detach(), slot.parameter))
        present, slot.latent = slot.latent, latent
        if not same_values(slot.parameter, slot.quantized()):
            slot.latent = present


def _noises(quantizers: Iterable[Quantizer | None]) -> list[Noise]:
    return [m for q in quantizers if q is not None for m in q.modules() if isinstance(m, Noise)]


@contextlib.contextmanager
def undone_if_refused(model: nn.Module) -> Iterator[None]:
    """If the construction of an optimizer fails, leave a plain model plain, and a quantized one with its scales."""
    root = unwrap_model(model)
    coverage = coverage_of(root)
    rows = coverage.quantized if coverage is not None else ()
    try:
        with restored_if_refused([row.quantizer for row in rows if row.quantizer is not None]):
            yield
    except BaseException:
        if coverage is None and (own := coverage_of(root)) is not None:
            set_owner(own, None)
            dequantize_(root)
        raise


def own_parameters(root: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Iterate over ``root.named_parameters()`` without those of quantizers."""
    seen: set[int] = set()
    left = [("", root)]
    while left:
        path, module = left.pop()
        if id(module) in seen or isinstance(module, Quantizer):
            continue
        seen.add(id(module))
        for name, p in module._parameters.items():
            if p is not None and id(p) not in seen:
                seen.add(id(p))
                yield path + name, p
        left += [(f"{path}{name}.", child) for name, child in reversed(module._modules.items()) if child is not None]


# --- the base optimizer and the latents ---------------------------------------------------------------------------


@contextlib.contextmanager
def pointed_at_latents(base: Optimizer, latents: Latents) -> Iterator[None]:
    """Within this context the base's groups hold the latents instead of their Parameters.

    The base's state is always keyed by the latents, because it is only used inside this context.
    """
    forth = {id(slot.parameter): slot.latent for slot in latents.slots}
    back = {id(slot.latent): slot.parameter for slot in latents.slots}
    _exchange(base, forth)
    try:
        yield
    finally:
        _exchange(base, back)


@contextlib.contextmanager
def pointed_at_model(base: Optimizer, latents: Latents) -> Iterator[None]:
    """Within :func:`pointed_at_latents`, let the base's groups hold the model's Parameters again."""
    _exchange(base, {id(slot.latent): slot.parameter for slot in latents.slots})
    try:
        yield
    finally:
        _exchange(base, {id(slot.parameter): slot.latent for slot in latents.slots})


def _exchange(base: Optimizer, table: dict[int, nn.Parameter]) -> None:
    for group in base.param_groups:
        group["params"][:] = [table.get(id(p), p) for p in group["params"]]
