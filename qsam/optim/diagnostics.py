"""Figures of quantization noise and perturbation (SAQ's two terms), and a warning about inputs that saw no batch."""

from __future__ import annotations

import torch
from torch import Tensor

from qsam.coverage import Coverage
from qsam.distributed import whole
from qsam.inputs import shown, was_passed_as_float
from qsam.latents import Latents, Slot


@torch.no_grad()
def noise_figures(latents: Latents) -> dict[str, float]:
    """Return the norm of the quantization noise Q(w) - w, and the share of weights that the clip mask stops."""
    if not latents.slots:
        return {}
    square, clipped, count = 0.0, 0, 0
    for slot in latents.slots:
        square += float(whole(_noise(slot)).square().sum())
        _, passed, _ = latents.vjp(slot, torch.ones_like(slot.latent))
        clipped += int((whole(passed) == 0).sum())
        count += passed.numel()
    return {"quantization_noise_norm": square**0.5, "clipped_share": clipped / max(count, 1)}


@torch.no_grad()
def perturbation_figures(latents: Latents) -> dict[str, float]:
    """Return the norm of e, the cosine of noise and e, and the share of codes that e flips; inside a perturbed pass.

    ``flipped_share`` is the share of entries of Q(w + e) that differ from Q(w), whether or not the method quantizes the
    sum. If it is near 0, a perturbation inside the quantizer (SAQ's case 2) has little effect.
    """
    dot, noise_square, e_square, flipped, count = 0.0, 0.0, 0.0, 0, 0
    for slot in latents.slots:
        noise, e = whole(_noise(slot)), whole(_perturbation(slot))
        dot += float((noise * e).sum())
        noise_square += float(noise.square().sum())
        e_square += float(e.square().sum())
        moved, rest = slot.fake_quantize(slot.latent + _perturbation(slot)), slot.fake_quantize(slot.latent)
        flipped += int((whole(moved) != whole(rest)).sum())
        count += e.numel()
    product = (noise_square * e_square) ** 0.5
    return {
        "perturbation_norm": e_square**0.5,
        "noise_perturbation_cosine": dot / product if product > 0 else 0.0,
        "flipped_share": flipped / max(count, 1),
    }


def unseen_inputs(coverage: Coverage | None) -> str:
    """Return a warning if a weight has a gradient while its layer's input quantizer has seen no batch, or "".

    This happens if a module uses the weight of a layer without calling the layer, whose pre-hook then never runs.
    """
    rows = [(row, q) for row in (coverage.inputs if coverage is not None else ()) if (q := row.quantizer) is not None]
    if coverage is None or not any(quantizer.calibrated for _, quantizer in rows):
        return ""  # the gradients do not come from a forward
    used = {id(row.module) for row in coverage.quantized if getattr(row.module, row.attr).grad is not None}
    unseen = [(row, q) for row, q in rows if not q.calibrated and id(row.module) in used]
    layers = [shown(row.name) for row, quantizer in unseen if not was_passed_as_float(quantizer)]
    if not layers:
        return ""
    named = ", ".join(layers[:5]) + (", ..." if len(layers) > 5 else "")
    return (
        f"the first step used the weight of {named} without calling the layer (or with a PackedSequence): its input "
        "stays float, and DistributedDataParallel would wait for its scale. Give quantize_ a rule for it, with "
        "{'activations': None}."
    )


def _noise(slot: Slot) -> Tensor:
    return slot.fake_quantize(slot.latent.detach()) - slot.latent.detach()


def _perturbation(slot: Slot) -> Tensor:
    if slot.inner_e is not None:
        return slot.inner_e
    return slot.parameter.detach().to(slot.latent.dtype) - slot.quantized().to(slot.latent.dtype)
