"""What is particular to SAQ's case 2, what the diagnostics measure, and SAM beside another package's.

The equations of the three cases are in tests/reference/saq.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import pytorch_optimizer
import torch
from torch import Tensor, nn

import qsam

INPUTS = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
TARGETS = INPUTS[:, :1] * INPUTS[:, 1:2]
RHO = 0.3


def build_plain() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1))


def build(case: int, *, bits: int = 3, shrink: float = 1.0, **options: Any) -> tuple[nn.Module, Any]:
    """Build a model with weight quantizers only; ``shrink`` below 1 narrows the grid, so that weights are clipped."""
    model = build_plain()
    qsam.quantize_(model, bits=bits, activations=None, rules=[("*", {})])
    for module in model.modules():
        if isinstance(module, qsam.Quantizer):
            module.scale.mul_(shrink)
    return model, qsam.SAQ(model, torch.optim.SGD, case=case, **{"lr": 0.1, "rho": RHO, "scale_lr": 0.1, **options})


def loss_of(model: nn.Module) -> Tensor:
    return nn.functional.mse_loss(model(INPUTS), TARGETS)


def step(model: nn.Module, optimizer: Any, steps: int = 1) -> None:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)


def test_case_2_sees_the_plain_loss_where_no_code_flips() -> None:
    model, optimizer = build(2, bits=2, rho=1e-6)
    step(model, optimizer)
    step(model, optimizer)
    found = optimizer.diagnostics()
    assert found["rise"] == 0.0


def test_case_2_sees_another_loss_where_codes_flip() -> None:
    model, optimizer = build(2, bits=8, rho=1.0)
    optimizer.diagnostics()
    step(model, optimizer)
    found = optimizer.diagnostics()
    assert found["flipped_share"] > 0.5
    assert found["rise"] != 0.0


def test_case_2_refuses_several_micro_batches() -> None:
    model, optimizer = build(2)
    with optimizer.first_pass():
        loss_of(model).backward()
    with optimizer.perturbed():
        loss_of(model).backward()
    with pytest.raises(RuntimeError, match=r"case 2 pulls back at w \+ e"), optimizer.first_pass():
        pass
    optimizer.step()  # the first micro-batch is still there
    step(model, optimizer)


def test_case_2_goes_on_after_a_step_that_was_skipped() -> None:
    model, optimizer = build(2)
    for _ in range(2):  # as GradScaler does it: no step(), then zero_grad()
        with optimizer.first_pass():
            loss_of(model).backward()
        with optimizer.perturbed():
            loss_of(model).backward()
        optimizer.zero_grad()
    step(model, optimizer)
    assert optimizer.steps == 1


def test_diagnostics_are_what_they_say() -> None:
    model, optimizer = build(3, shrink=0.5)
    optimizer.diagnostics()  # asks the next perturbed pass to measure
    slots = optimizer._latents.slots
    w = [slot.latent.detach().clone() for slot in slots]
    q = [slot.quantized() for slot in slots]
    with optimizer.first_pass():
        loss_of(model).backward()
    with optimizer.perturbed():
        e = [slot.parameter.detach() - old for slot, old in zip(slots, q, strict=True)]
        loss_of(model).backward()
    found = optimizer.diagnostics()
    noise = torch.cat([(a - b).flatten() for a, b in zip(q, w, strict=True)])
    flat_e = torch.cat([x.flatten() for x in e])
    flips = [slot.quantizer(a + b) != old for slot, a, b, old in zip(slots, w, e, q, strict=True)]
    clipped = [
        ((a / slot.quantizer.scale) <= slot.quantizer.quant_min)
        | ((a / slot.quantizer.scale) >= slot.quantizer.quant_max)
        for slot, a in zip(slots, w, strict=True)
    ]
    assert found["quantization_noise_norm"] == pytest.approx(float(noise.norm()), rel=1e-5)
    assert found["perturbation_norm"] == pytest.approx(RHO, rel=1e-5)
    cosine = float(torch.nn.functional.cosine_similarity(noise, flat_e, dim=0))
    assert found["noise_perturbation_cosine"] == pytest.approx(cosine, abs=1e-5)
    assert found["flipped_share"] == sum(int(x.sum()) for x in flips) / len(noise)
    assert found["clipped_share"] == sum(int(x.sum()) for x in clipped) / len(noise)
    assert 0 < found["clipped_share"] < 1


def test_sam_is_pytorch_optimizer_s_sam() -> None:
    """One whole-model group, no BatchNorm, no closure tricks: there the other package is right."""
    ours, theirs = build_plain(), build_plain()
    step(ours, qsam.SAM(ours, torch.optim.AdamW, lr=1e-2, rho=0.05), 10)
    other = pytorch_optimizer.SAM(list(theirs.parameters()), torch.optim.AdamW, rho=0.05, lr=1e-2)
    for _ in range(10):
        loss_of(theirs).backward()
        other.first_step(zero_grad=True)
        loss_of(theirs).backward()
        other.second_step(zero_grad=True)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        # They divide by norm + 1e-12 and add rho * g; ten AdamW steps carry the last places on.
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
