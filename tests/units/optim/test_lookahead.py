"""The direction `lookahead`: against the first moment, a given number of Adam steps long, at the price of one pass."""

import math

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import LambdaLR

import qsam


def setting(base=AdamW, rho=0.75, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    qsam.quantize_(model, bits=4, activations=None, rules=[("*", {})])
    optimizer = qsam.SAQ(model, base, lr=1e-2, rho=rho, direction="lookahead", **options)
    x, seen = torch.randn(16, 6), []

    def closure():
        seen.append([row.module.weight.detach().clone() for row in optimizer.coverage.quantized])
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss

    return optimizer, closure, seen


def perturbations(optimizer, closure, seen):
    """Step once; return e of each weight, and the first moment before the step."""
    slots = optimizer._latents.slots
    before = [slot.quantized() for slot in slots]
    moments = [optimizer.base.state.get(slot.latent, {}).get("exp_avg") for slot in slots]
    moments = [None if m is None else m.clone() for m in moments]
    seen.clear()
    optimizer.step(closure)
    assert len(seen) == 1, "one pass"
    return [at - q for at, q in zip(seen[0], before, strict=True)], moments


def test_the_first_step_is_plain_and_each_later_one_lies_against_the_moment():
    optimizer, closure, seen = setting()
    e, _ = perturbations(optimizer, closure, seen)
    assert not any(bool(part.any()) for part in e)
    for _ in range(3):
        e, moments = perturbations(optimizer, closure, seen)
        flat, m = (torch.cat([t.flatten() for t in parts]) for parts in (e, moments))
        cosine = float(torch.nn.functional.cosine_similarity(flat, m, dim=0))
        assert cosine == pytest.approx(-1, abs=1e-4)  # e is a difference of sums of fp32


def test_its_length_is_rho_steps_of_adam_and_follows_the_schedule():
    optimizer, closure, seen = setting(rho=0.75)
    scheduler = LambdaLR(optimizer, lambda step: 1 / (1 + step))
    count = sum(slot.latent.numel() for slot in optimizer._latents.slots)
    for step in range(4):
        e, _ = perturbations(optimizer, closure, seen)
        length = math.sqrt(sum(float(part.double().square().sum()) for part in e))
        expected = 0.75 * (1e-2 / (1 + step)) * math.sqrt(count) if step else 0.0
        assert length == pytest.approx(expected, rel=1e-3, abs=1e-9)
        scheduler.step()


def test_without_length_it_is_plain_quantization_aware_training():
    optimizer, closure, _ = setting(rho=0.0)
    losses = [optimizer.step(closure).item() for _ in range(4)]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    qsam.quantize_(model, bits=4, activations=None, rules=[("*", {})])
    plain = qsam.QAT(model, AdamW, lr=1e-2)
    x = torch.randn(16, 6)

    def again():
        plain.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss

    assert [plain.step(again).item() for _ in range(4)] == losses


def test_a_base_without_a_moment_is_refused():
    optimizer, closure, _ = setting(base=SGD)
    optimizer.step(closure)
    with pytest.raises(ValueError, match="needs a first moment"):
        optimizer.step(closure)
