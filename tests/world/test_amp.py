"""Stock mixed precision: GradScaler with infinities in either pass, fp16 and bf16 autocast."""

import contextlib

import pytest
import torch
from torch.nn.utils import clip_grad_norm_

from tests.methods import (
    FUSED,
    METHODS,
    QAT,
    SAM,
    SAQ,
    SQUAT,
    assert_on_grid,
    assert_same,
    buffers_of,
    built,
    each_kind,
    everything,
    latents,
    scales_of,
    train_by_hand,
)
from tests.models import CONV, MLP


@pytest.mark.parametrize("method", [SAM, SAQ], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_with_a_scaler_that_is_a_power_of_two_is_autocast(method, dtype):
    """Loss scaling changes no digit of bf16; in fp16 it saves small gradients: there the run only stays close."""
    ends = []
    for enabled in (True, False):
        model, optimizer = built(method, MLP)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4, enabled=enabled)
        losses = []
        for i in range(3):
            for block in optimizer.blocks:
                with getattr(optimizer, block)():
                    with torch.autocast("cpu", dtype=dtype):
                        loss = MLP.loss(model, MLP.batch(i))
                    scaler.scale(loss).backward()
                losses.append(loss.detach())
            scaler.step(optimizer)
            scaler.update()
        if method.quantizes:
            assert_on_grid(optimizer)
        ends.append((everything(optimizer, model), torch.stack(losses)))
    if dtype is torch.bfloat16:
        assert_same(ends[0][0], ends[1][0])
        assert torch.equal(ends[0][1], ends[1][1])
    else:
        # Three steps of Adam move a weight by 3 lr at most: a loss of order 1 by no more than that many percent.
        assert torch.allclose(ends[0][1], ends[1][1], rtol=3e-2)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_grad_scaler_changes_nothing(method):
    """Powers of two cancel without rounding; the scale grows on the way."""
    ends = []
    for scaler in (torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=2), None):
        model, optimizer = built(method, CONV)
        torch.manual_seed(0)
        train_by_hand(method, optimizer, model, CONV, 6, scaler=scaler)
        ends.append(everything(optimizer, model))
    assert_same(*ends)


@pytest.mark.parametrize("method", [QAT, SAQ], ids=str)
def test_a_grad_scaler_may_unscale_before_clipping(method):
    """scaler.unscale_, then stock clip_grad_norm_: it sees dL/dQ of the second pass."""
    ends = []
    for scaler in (torch.amp.GradScaler("cpu", init_scale=2.0**8), None):
        model, optimizer = built(method, MLP)
        with optimizer.first_pass():
            loss = MLP.loss(model, MLP.batch(0))
            (loss if scaler is None else scaler.scale(loss)).backward()
        if method.perturbs:
            with optimizer.perturbed():
                loss = MLP.loss(model, MLP.batch(0))
                (loss if scaler is None else scaler.scale(loss)).backward()
        if scaler is not None:
            scaler.unscale_(optimizer)
        clip_grad_norm_(model.parameters(), 0.05)
        optimizer.step() if scaler is None else scaler.step(optimizer)
        ends.append(everything(optimizer, model))
    assert_same(*ends)


def overflow_by_hand(method, optimizer, model, scaler):
    """Make one iteration whose update gradients overflow, up to the step that the scaler skips."""
    batch = CONV.batch(3)
    with optimizer.first_pass():
        scaler.scale(CONV.loss(model, batch)).backward()
    if method.perturbs:
        with optimizer.perturbed():
            scaler.scale(CONV.loss(model, batch) * float("inf")).backward()
    else:
        for p in model.parameters():
            if p.grad is not None:
                p.grad.fill_(float("inf"))
    scaler.step(optimizer)


@each_kind
def test_a_skipped_step_of_a_grad_scaler_changes_nothing(method):
    """An overflow in one batch: the run goes on as if that batch had not been there."""
    ends = []
    for overflow in (True, False):
        model, optimizer = built(method, CONV)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        torch.manual_seed(0)
        train_by_hand(method, optimizer, model, CONV, 2, scaler=scaler)
        if overflow:
            before = everything(optimizer, model)
            overflow_by_hand(method, optimizer, model, scaler)
            scaler.update(2.0**10)
            assert_on_grid(optimizer)
            with torch.no_grad():  # the skipped batch may move these
                for name, buffer in buffers_of(model).items():
                    buffer.copy_(before[f"model.{name}"])
            assert_same(everything(optimizer, model), before)
        torch.manual_seed(1)
        train_by_hand(method, optimizer, model, CONV, 2, start=2, scaler=scaler)
        ends.append(everything(optimizer, model))
    assert_same(*ends)


def test_the_scales_may_step_after_a_skipped_step_of_the_weights():
    method = SQUAT
    model, optimizer = built(method, CONV)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    w, s = latents(optimizer, model), {name: scale.clone() for name, scale in scales_of(model).items()}
    overflow_by_hand(method, optimizer, model, scaler)
    with optimizer.scale_phase():
        scaler.scale(CONV.loss(model, CONV.batch(3))).backward()
    scaler.step(optimizer.scales)
    assert_same(latents(optimizer, model), w)
    assert all(
        bool(torch.isfinite(scale).all()) and not torch.equal(scale, s[name])
        for name, scale in scales_of(model).items()
    )


def test_an_autocast_context_round_the_step_sees_the_written_weights():
    """Autocast caches 16-bit copies of weights: a stale one would serve the perturbed pass the unperturbed weights."""
    losses = []
    for outside in (torch.autocast("cpu", torch.bfloat16), contextlib.nullcontext()):  # the outermost exit clears
        model, optimizer = built(SAQ, MLP)
        found = []

        def closure(optimizer=optimizer, model=model, found=found):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = MLP.loss(model, MLP.batch(0))
            loss.backward()
            found.append(float(loss.detach()))

        for _ in range(3):
            with outside:
                optimizer.step(closure)
        losses.append(found)
    assert losses[0] == losses[1]


@pytest.mark.parametrize("overflows", [False, True])
def test_an_overflow_in_a_fused_first_pass_skips_the_scales_step_and_perturbs_nothing(overflows):
    """The scaler halves its scale, and the step of the weights, which is sound, is that of rho = 0."""
    ends = []
    for rho in (0.1, 0.0):
        model, optimizer = built(FUSED, CONV, rho=rho)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=100)
        before = {name: s.clone() for name, s in scales_of(model).items() if "weight_quantizer" in name}
        torch.manual_seed(0)
        with optimizer.first_pass():
            scaler.scale(CONV.loss(model, CONV.batch(0)) * (torch.inf if overflows else 1.0)).backward()
        scaler.step(optimizer.scales)
        with optimizer.perturbed():
            scaler.scale(CONV.loss(model, CONV.batch(0))).backward()
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == (2.0**7 if overflows else 2.0**8)
        assert all(torch.equal(scales_of(model)[name], s) == overflows for name, s in before.items())
        assert optimizer.steps == 1
        assert_on_grid(optimizer)
        ends.append(latents(optimizer, model))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0]) == overflows
