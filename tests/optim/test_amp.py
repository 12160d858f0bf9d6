"""Stock mixed precision: GradScaler with infinities in either pass, fp16 and bf16 autocast, 16-bit models."""

import pytest
import torch
from torch.optim import AdamW

from tests.models import CONV, MLP
from tests.optim.methods import METHODS, PERTURBING, assert_on_grid, assert_same, everything, train

each_method = pytest.mark.parametrize("method", METHODS, ids=str)


def scaled_step(method, optimizer, model, scaler, number, bad=(), autocast=None):
    """Take one step by the blocks that are due; the passes whose number is in ``bad`` overflow. Return what they were."""
    made = []

    def backward():
        with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
            loss = CONV.loss(lambda x: model(x).float(), CONV.batch(number))
        scaler.scale(loss * (torch.inf if len(made) in bad else 1.0)).backward()

    optimizer.zero_grad()
    for block in optimizer.blocks:
        if made and optimizer.scales_due:
            scaler.step(optimizer.scales)
        with getattr(optimizer, block)():
            backward()
        made.append(block)
    scaler.step(optimizer)
    if method.schedule == "same_batch" and optimizer.scales_due:
        with optimizer.scale_phase():
            backward()
        made.append("scale_phase")
        scaler.step(optimizer.scales)
    scaler.update()
    return made


def run(method, bad_step=None, bad=(), steps=6, **options):
    model = method.model(CONV)
    optimizer = method(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=100)
    torch.manual_seed(0)
    states, scales = [], []
    for i in range(steps):
        scaled_step(method, optimizer, model, scaler, i, bad if i == bad_step else (), **options)
        states.append(everything(optimizer, model))
        scales.append(scaler.get_scale())
        if method.quantizes:
            assert_on_grid(optimizer)
    return optimizer, states, scales


def weights_and_scales(state):
    """Leave out buffers: BatchNorm has seen the batch of a step that was skipped."""
    return {k: v for k, v in state.items() if k.startswith("latent.") or k.endswith("quantizer.scale")}


@each_method
def test_an_overflow_in_the_pass_of_the_update_skips_the_step_and_training_goes_on(method):
    """The weights stay, the loss scale is halved, the next steps move them again."""
    last = 1 if method.perturbs else 0
    optimizer, states, scales = run(method, bad_step=2, bad=(last,))
    assert scales[1] == 2.0**8 and scales[2] == 2.0**7 == scales[-1]
    before, after = weights_and_scales(states[1]), weights_and_scales(states[2])
    if method.schedule == "fused":  # the scales took their step from the first pass, which was sound
        before, after = ({k: v for k, v in s.items() if k.startswith("latent.")} for s in (before, after))
    assert_same(after, before)
    assert any(not torch.equal(states[3][k], states[2][k]) for k in weights_and_scales(states[3]))
    assert optimizer.steps == (3 if method.schedule == "next_batch" else 5)  # there the scales have two of the six


@pytest.mark.parametrize("method", [m for m in PERTURBING if m.schedule != "fused"], ids=str)
def test_an_overflow_in_the_first_pass_alone_gives_an_unperturbed_step(method):
    """Its norm is not finite, so e is 0; the step itself is sound, and the scaler does not see the first pass."""
    optimizer, states, scales = run(method, bad_step=0, bad=(0,), steps=1)
    model = method.model(CONV)
    expected = method(model, rho=0.0)
    torch.manual_seed(0)
    scaled_step(method, expected, model, torch.amp.GradScaler("cpu", init_scale=2.0**8), 0)
    assert_same(states[0], everything(expected, model))
    assert scales == [2.0**8] and optimizer.steps == 1


def test_an_overflow_in_a_fused_first_pass_skips_the_scales_step():
    (method,) = (m for m in METHODS if m.schedule == "fused")
    optimizer, states, scales = run(method, bad_step=1, bad=(0,), steps=3)
    names = [k for k in states[0] if k.endswith("weight_quantizer.scale")]
    assert names and all(torch.equal(states[1][k], states[0][k]) for k in names)
    assert any(not torch.equal(states[2][k], states[1][k]) for k in names)
    assert scales == [2.0**8, 2.0**7, 2.0**7] and optimizer.steps == 3


@each_method
def test_an_overflow_in_both_passes_leaves_everything_but_the_scale(method):
    _, states, scales = run(method, bad_step=0, bad=(0, 1), steps=1)
    model = method.model(CONV)
    optimizer = method(model)
    assert_same(weights_and_scales(states[0]), weights_and_scales(everything(optimizer, model)))
    assert scales == [2.0**7]


@each_method
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_with_a_scaler_that_is_a_power_of_two_is_autocast(method, dtype):
    """Loss scaling changes no digit of bf16; in fp16 it saves small gradients: there the run only stays close."""
    ends = []
    for enabled in (True, False):
        model = method.model(MLP)
        optimizer = method(model)
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


@each_method
@pytest.mark.filterwarnings("ignore:16-bit parameters round the perturbation away")
def test_a_model_in_bf16_trains_by_blocks_as_by_closure(method):
    ends = []
    for by_hand in (True, False):
        model = method.model(MLP).bfloat16()
        optimizer = method(model, AdamW, rho=1.0) if method.perturbs else method(model, AdamW)

        class Task:
            @staticmethod
            def batch(number):
                return {**MLP.batch(number), "x": MLP.batch(number)["x"].bfloat16()}

            @staticmethod
            def loss(forward, batch):
                return MLP.loss(lambda x: forward(x).float(), batch)

        if by_hand:
            for i in range(3):
                for number, block in enumerate(optimizer.blocks):
                    if number and optimizer.scales_due:
                        optimizer.step_scales()
                    with getattr(optimizer, block)():
                        Task.loss(model, Task.batch(i)).backward()
                optimizer.step()
                if method.schedule == "same_batch":
                    with optimizer.scale_phase():
                        Task.loss(model, Task.batch(i)).backward()
                    optimizer.step()
        else:
            train(optimizer, model, Task, 3)
        ends.append(everything(optimizer, model))
        assert all(p.dtype is torch.bfloat16 for n, p in model.named_parameters() if "quantizer" not in n)
    assert_same(*ends)
