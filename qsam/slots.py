"""What the optimizer owns and trains: the quantized weights with their latents, and the parameters of the quantizers.

A weight is a slot (module, attribute) and is looked up each time, because Accelerate and FSDP replace Parameters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qsam import shards
from qsam.coverage import Coverage, Input, Weight, parameter_at
from qsam.functional import SCALE_FLOOR, wide_dtype
from qsam.quantizers import Noise, Quantizer
from qsam.quantizers.base import LIMITS


@dataclasses.dataclass(eq=False)
class Slot:
    """One quantized weight: where it lives, and its latent.

    Attributes:
        path: "encoder.layer.0.query.weight".
        module: The owner of the Parameter.
        attr: Its name there.
        latent: w, fp32 or the Parameter's dtype if that is wider.
        shift: What was added to w before it was quantized in the last perturbed pass (SAQ, case 2), until the update.
        parked: Whether p holds a copy of w, from a fused pull-back until the next write.
        lacks_scale: Whether a row of w, or all of it, has been 0 so far, so that no scale could be set from it.
        is_initial: Whether the scale is the one that w gave when the optimizer was built, and no step has come since.
    """

    path: str
    module: nn.Module
    attr: str
    latent: nn.Parameter
    shift: Tensor | None = None
    parked: bool = False
    lacks_scale: bool = False
    is_initial: bool = False

    @property
    def parameter(self) -> nn.Parameter:
        """The model's Parameter p, as it is now."""
        return parameter_at(self.module, self.attr, self.path)

    @property
    def quantizer(self) -> Quantizer:
        """Q."""
        return getattr(self.module, f"{self.attr}_quantizer")  # type: ignore[no-any-return]

    @torch.no_grad()
    def quantized(self) -> Tensor:
        """Return Q(w) in the dtype of p."""
        return self.fake_quantize(self.latent).to(self.parameter.dtype)

    def shifted_latent(self) -> Tensor:
        """Return ``w + e``; w alone where it has no scale yet, to which any e would be beyond the grid."""
        w = self.latent.detach()
        assert self.shift is not None
        if not self.lacks_scale:
            return w + self.shift
        step = self.step_size()
        return w if step is None else torch.where(step > SCALE_FLOOR, w + self.shift, w)

    def fake_quantize(self, w: Tensor) -> Tensor:
        """Return Q at another place than the latent, sharded as it is."""
        return shards.quantized(self.quantizer, w)

    def step_size(self) -> Tensor | None:
        """Return the distance of neighbouring grid values, broadcastable against the latent; None without a grid."""
        return shards.step_size(self.quantizer, self.latent.detach())

    def set_scale(self) -> None:
        """Set the scale from w, if no checkpoint brought one, and note whether w says enough."""
        self.is_initial = self.is_initial or not self.quantizer.calibrated
        if self.is_initial:
            self.quantizer.set_sign_(None)
            shards.apply(self.quantizer, "settle_", self.latent.detach())
        self.lacks_scale = True
        self.complete_scale()

    def take_loaded_scale(self) -> None:
        """Keep the scale, which a checkpoint brought together with w."""
        self.is_initial = False
        self.lacks_scale = True

    def complete_scale(self) -> None:
        """Set what could not be set from zeros, where w differs from 0 now."""
        if self.lacks_scale:
            self.lacks_scale = not shards.apply(self.quantizer, "complete_", self.latent.detach())

    def move_state(self) -> None:
        """Let the quantizer move its state by one step; one that has none is not asked to look at all shards of w."""
        self.is_initial = False
        self.quantizer.requires_grad_(False)  # model.requires_grad_(True) flips it, and DDP would wait for it
        w = self.latent.detach()
        self.quantizer.update(shards.whole(w) if type(self.quantizer).update is not Quantizer.update else w)

    def fingerprint(self) -> tuple[Any, ...]:
        """Return what changes when somebody writes p or a tensor of its quantizer."""
        p, quantizer = self.parameter, self.quantizer
        own = quantizer._parameters if _is_plain(quantizer) else quantizer.state_dict(keep_vars=True)
        # DDP broadcasts buffers in each forward: `limits` tell nothing here.
        versions = [shards.local(t)._version for key, t in own.items() if t is not None and key != LIMITS]
        part = shards.local(p)
        return (id(p), p._version, part._version, part.data_ptr(), p.dtype, *versions)


def _is_plain(quantizer: Quantizer) -> bool:
    """Whether a quantizer's Parameters, and ``limits``, are all its state."""
    return len(quantizer._buffers) == 1 and not quantizer._modules


def scale_tensors(coverage: Coverage | None) -> tuple[list[ScaleSlot], list[ScaleSlot]]:
    """Return the trainable parameters of all quantizers: of the weights', and of the inputs'."""
    if coverage is None:
        return [], []
    weights = list(_scale_slots((row.name + "_quantizer", row.quantizer) for row in coverage.quantized))
    inputs = list(_scale_slots((f"{row.name}.input_quantizer".lstrip("."), row.quantizer) for row in coverage.inputs))
    return weights, inputs


@dataclasses.dataclass(eq=False, frozen=True)
class ScaleSlot:
    """One trainable parameter of a quantizer.

    Attributes:
        path: "encoder.layer.0.query.weight_quantizer.scale".
        quantizer: Its owner.
        attr: Its name there.
    """

    path: str
    quantizer: Quantizer
    attr: str

    @property
    def parameter(self) -> nn.Parameter:
        """The Parameter, as it is now."""
        return getattr(self.quantizer, self.attr)  # type: ignore[no-any-return]


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


def quantizer_parameters(root: nn.Module) -> Iterator[nn.Parameter]:
    """Iterate over the parameters of all quantizers in a model, weights' and inputs'."""
    for module in root.modules():
        if isinstance(module, Quantizer):
            yield from module.parameters()


def signs(coverage: Coverage | None) -> dict[str, bool | None]:
    """Return which weights and inputs have a signed grid (None: not set from data yet), by path."""
    return {name: q.signed if q.calibrated else None for name, q in _by_name(coverage)}


def set_signs(coverage: Coverage | None, found: Mapping[str, bool | None]) -> None:
    """Set what :func:`signs` returned; one whose sign is decided counts as calibrated.

    An older checkpoint says nothing of weights: their scales count as settled.
    """
    for name, quantizer in _by_name(coverage):
        if quantizer.axis is not None:
            quantizer.set_sign_(found.get(name, quantizer.signed))
        elif name in found:
            quantizer.set_sign_(found[name])


def _by_name(coverage: Coverage | None) -> Iterator[tuple[str, Quantizer]]:
    rows: tuple[Weight | Input, ...] = () if coverage is None else (*coverage.inputs, *coverage.quantized)
    for row in rows:
        if row.quantizer is not None:
            yield row.name, row.quantizer


def _scale_slots(named: Iterable[tuple[str, Quantizer | None]]) -> Iterator[ScaleSlot]:
    for path, quantizer in named:
        if quantizer is not None:
            for attr, _ in quantizer.named_parameters():
                yield ScaleSlot(f"{path}.{attr}", quantizer, attr)


def noise_streams(rows: Iterable[Weight | Input]) -> Iterator[Noise]:
    """Yield the streams of noise that the quantizers of these rows hold."""
    for row in rows:
        if row.quantizer is not None:
            yield from (module for module in row.quantizer.modules() if isinstance(module, Noise))


def slot_of(path: str, module: nn.Module, attr: str) -> Slot:
    """Return a slot whose latent is what its Parameter holds now, in fp32 or wider."""
    p = getattr(module, attr)
    return Slot(path, module, attr, nn.Parameter(p.detach().to(wide_dtype(p.dtype), copy=True)))


def refuse_moved(slots: Iterable[Slot]) -> None:
    """Refuse latents that stayed behind when the model was moved.

    Raises:
        RuntimeError: a weight is on another kind of device than its latent.
    """
    for slot in slots:
        here, there = slot.latent.device, slot.parameter.device
        if here.type != there.type:
            raise RuntimeError(
                f"the model was moved from {here} to {there} ({slot.path!r}), and its latents were not: move the model "
                "first, then build the optimizer."
            )


def is_on_grid(slot: Slot) -> bool:
    """Whether quantizing the latent changes next to nothing: it was rounded before."""
    w = shards.whole(slot.latent.detach())
    gap = (shards.whole(slot.fake_quantize(slot.latent.detach())) - w).abs().max()
    return bool(gap <= 1e-3 * w.abs().max())


def same_values(p: Tensor, expected: Tensor) -> bool:
    """Whether two tensors, or this process's parts of them, agree in kind and value; NaN equals NaN."""
    a, b = shards.local(p), shards.local(expected)
    return a.dtype == b.dtype and a.shape == b.shape and bool(((a == b) | (torch.isnan(a) & torch.isnan(b))).all())
