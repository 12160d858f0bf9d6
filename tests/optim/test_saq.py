"""SAQ's three cases: perturbation and update gradients as the equations print them, and the identities between them."""

from __future__ import annotations

from typing import Any

import pytest
import pytorch_optimizer
import torch
from torch import Tensor, nn
from torch.func import functional_call

import qsam
from qsam.functional import fake_quantize, lsq_grad_scale

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


def loss_at(model: nn.Module, weights: dict[str, Tensor]) -> Tensor:
    output = functional_call(model, weights, (INPUTS,))
    return nn.functional.mse_loss(output, TARGETS)


def expected_step(model: nn.Module, optimizer: Any, case: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the latents and scales after one step of plain descent, by autograd of the printed equations."""
    slots = {slot.path: slot for slot in optimizer._latents.slots}
    w = {path: slot.latent.detach().clone().requires_grad_() for path, slot in slots.items()}
    s = {path: slot.quantizer.scale.detach().clone().requires_grad_() for path, slot in slots.items()}

    def quantized(path: str, x: Tensor) -> Tensor:
        q = slots[path].quantizer
        return fake_quantize(x, s[path], q.quant_min, q.quant_max, lsq_grad_scale(x.numel(), q.quant_max))

    leaves = {path: quantized(path, w[path]).detach().requires_grad_() for path in w}
    g = dict(zip(w, torch.autograd.grad(loss_at(model, leaves), list(leaves.values())), strict=True))
    if case in (1, 2):  # behind the clip mask
        inside = {path: (w[path] / s[path]).detach() for path in w}
        for path, slot in slots.items():
            q = slot.quantizer
            g[path] = g[path] * ((inside[path] > q.quant_min) & (inside[path] < q.quant_max))
    norm = torch.cat([x.flatten() for x in g.values()]).norm()
    e = {path: RHO * x / norm for path, x in g.items()}
    if case == 2:
        perturbed = {path: quantized(path, w[path] + e[path]) for path in w}
    else:
        perturbed = {path: quantized(path, w[path]) + e[path] for path in w}
    loss_at(model, perturbed).backward()
    model.zero_grad()
    return {k: x.detach() - 0.1 * x.grad for k, x in w.items()}, {k: x.detach() - 0.1 * x.grad for k, x in s.items()}


@pytest.mark.parametrize("shrink", [1.0, 0.4])
@pytest.mark.parametrize("case", [1, 2, 3])
def test_a_step_is_autograd_of_the_equations(case: int, shrink: float) -> None:
    model, optimizer = build(case, shrink=shrink)
    latents, scales = expected_step(model, optimizer, case)
    step(model, optimizer)
    for slot in optimizer._latents.slots:
        # One step of 0.1 * gradient in fp32: the orders of summation differ by a few units in the last place.
        torch.testing.assert_close(slot.latent.detach(), latents[slot.path], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(slot.quantizer.scale.detach(), scales[slot.path], rtol=1e-5, atol=1e-6)


def state_after(case: int, steps: int, **options: Any) -> list[Tensor]:
    model, optimizer = build(case, **options)
    step(model, optimizer, steps)
    return [*model.state_dict().values(), *(slot.latent.detach() for slot in optimizer._latents.slots)]


def equal(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_cases_1_and_3_agree_where_no_weight_is_clipped() -> None:
    assert equal(state_after(1, 3, bits=8, shrink=2.0), state_after(3, 3, bits=8, shrink=2.0))


def test_cases_1_and_3_differ_where_weights_are_clipped() -> None:
    assert not equal(state_after(1, 1, shrink=0.4), state_after(3, 1, shrink=0.4))


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


@pytest.mark.parametrize("case", [1, 2, 3])
def test_rho_zero_is_qat(case: int) -> None:
    assert equal(state_after(case, 4, rho=0.0), qat_after(4))


def qat_after(steps: int) -> list[Tensor]:
    model = build_plain()
    qsam.quantize_(model, bits=3, activations=None, rules=[("*", {})])
    optimizer = qsam.QAT(model, torch.optim.SGD, lr=0.1, scale_lr=0.1)
    step(model, optimizer, steps)
    return [*model.state_dict().values(), *(slot.latent.detach() for slot in optimizer._latents.slots)]


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


@pytest.mark.parametrize("case", [0, 4, "3", True])
def test_other_cases_are_refused(case: Any) -> None:
    with pytest.raises(ValueError, match="`case` must be 1, 2 or 3"):
        qsam.SAQ(build_plain(), torch.optim.SGD, lr=0.1, case=case)


def test_normalized_weights_put_rho_in_units_of_the_standard_deviation() -> None:
    """e = rho * sigma^2 g / ||sigma g||: the SAM step of v = w / sigma, carried back to w."""
    model, optimizer = build(3, normalize_weights=True)
    slots = optimizer._latents.slots
    sigma = [slot.latent.detach().std(correction=0) for slot in slots]
    with optimizer.first_pass():
        loss_of(model).backward()
    g = [slot.parameter.grad.clone() for slot in slots]
    with optimizer.perturbed():
        e = [slot.parameter.detach() - slot.quantized() for slot in slots]
    norm = torch.cat([(a * b).flatten() for a, b in zip(sigma, g, strict=True)]).norm()
    for one, a, b in zip(e, sigma, g, strict=True):
        torch.testing.assert_close(one, RHO * a.square() * b / norm, rtol=1e-5, atol=2e-7)
    in_units = torch.cat([(one / a).flatten() for one, a in zip(e, sigma, strict=True)]).norm()
    torch.testing.assert_close(in_units, torch.tensor(RHO), rtol=1e-5, atol=0)


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
