"""Contract 10: micro-batches each take their own e (SAM's m-sharpness); a closure over all of them takes one."""

import copy

import pytest
import torch
from torch.optim import SGD, AdamW

from tests.methods import SAM, SAQ, SQUAT, assert_same, built, each_kind, everything, latents
from tests.models import CONV, MLP

BATCHES = (0, 1, 2)


def backward(model, number):
    (MLP.loss(model, MLP.batch(number)) / len(BATCHES)).backward()


def accumulate(method, optimizer, model):
    """Run the first two passes of each micro-batch."""
    for i in BATCHES:
        with optimizer.first_pass():
            backward(model, i)
        if method.perturbs:
            with optimizer.perturbed():
                backward(model, i)


@pytest.mark.parametrize("method", [SAM, SAQ], ids=str)
def test_a_closure_over_all_micro_batches_takes_one_e(method):
    """It equals one large batch, up to the rounding of the sum over micro-batches."""
    large = {key: torch.cat([MLP.batch(i)[key] for i in BATCHES]) for key in MLP.batch(0)}
    ends = []
    for whole in (True, False):
        model = method.model(MLP).double()
        optimizer = method(model, SGD, lr=0.1)

        def closure(model=model, optimizer=optimizer, whole=whole):
            optimizer.zero_grad()
            parts = [large] if whole else [MLP.batch(i) for i in BATCHES]
            for part in parts:
                loss = MLP.loss(model, {**part, "x": part["x"].double()}) / len(parts)
                loss.backward()
            return loss

        optimizer.step(closure)
        ends.append(latents(optimizer, model))
    # Sums of a few hundred fp64 products, in two orders; the scales' own fp32 plays no part in a single step of w.
    for name in ends[0]:
        assert torch.allclose(ends[0][name], ends[1][name], rtol=0, atol=1e3 * torch.finfo(torch.float64).eps), name


@pytest.mark.parametrize("method", [SAM, SAQ], ids=str)
def test_the_gradient_accumulated_so_far_keeps_its_tensor(method):
    """It is set aside by reference: DDP's gradients are views of its buckets."""
    model, optimizer = built(method, MLP)
    with optimizer.first_pass():
        backward(model, 0)
    with optimizer.perturbed():
        backward(model, 0)
    kept = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    with optimizer.first_pass():
        assert all(p.grad is None for p in model.parameters())
        backward(model, 1)
    with optimizer.perturbed():
        assert all(p.grad is kept[name] for name, p in model.named_parameters() if name in kept)
        backward(model, 1)
    assert all(p.grad is kept[name] for name, p in model.named_parameters() if name in kept)


def test_the_phase_of_the_scales_accumulates_too():
    model, optimizer = built(SQUAT, MLP)
    accumulate(SQUAT, optimizer, model)
    optimizer.step()
    one, its = copy.deepcopy((model, optimizer))
    with its.scale_phase():
        for i in BATCHES:
            backward(one, i)
    its.step_scales()
    for i in BATCHES:
        with optimizer.scale_phase():
            backward(model, i)
    optimizer.step_scales()
    assert_same(everything(optimizer, model), everything(its, one))


@each_kind
def test_batch_norm_moves_once_a_micro_batch(method):
    model, optimizer = built(method, CONV, AdamW)
    for i in range(3):
        for block in (optimizer.first_pass, optimizer.perturbed) if method.perturbs else (optimizer.first_pass,):
            with block():
                CONV.loss(model, CONV.batch(i)).backward()
    optimizer.step()
    assert model[1].num_batches_tracked == 3
