"""16-bit models keep fp32 latents, double stays double, and gradients are clipped as they are pulled back."""

import pytest
import torch
from torch.optim import SGD, AdamW

from tests.methods import (
    QAT,
    SAM,
    SAQ,
    SQUAT,
    assert_on_grid,
    assert_same,
    built,
    latents,
    train,
)
from tests.models import MLP

ROUNDED = r"16-bit parameters round the perturbation away: 0\.1 was asked for, [\d.e-]+ realised\. Keep the parameters in fp32"


quiet = pytest.mark.filterwarnings("ignore:16-bit parameters round the perturbation away")


def halved(batch, dtype):
    return {**batch, "x": batch["x"].to(dtype)}


class Cast:
    """A task in another dtype."""

    def __init__(self, task, dtype):
        self.task, self.dtype = task, dtype

    def batch(self, number):
        batch = self.task.batch(number)
        return {**batch, "x": batch["x"].to(self.dtype)}

    def loss(self, forward, batch):
        return self.task.loss(lambda x: forward(x).float(), batch)


@pytest.mark.parametrize("method", [QAT, SQUAT], ids=str)
@quiet
@pytest.mark.parametrize("base", [AdamW, SGD], ids=lambda base: base.__name__)
def test_a_bf16_model_trains_fp32_latents(method, base):
    """A thousandth of a step of bf16 is not lost: the latents keep it."""
    model = method.model(MLP).bfloat16()
    options = {"lr": 1e-6, "weight_decay": 0.0} if base is AdamW else {"lr": 1e-5, "momentum": 0.9}
    optimizer = method(model, base, **options, scale_lr=0.0)
    assert all(slot.latent.dtype is torch.float32 for slot in optimizer._latents.slots)
    before = {slot.path: slot.latent.detach().clone() for slot in optimizer._latents.slots}
    train(optimizer, model, Cast(MLP, torch.bfloat16), 4)
    for slot in optimizer._latents.slots:
        moved = slot.latent.detach() - before[slot.path]
        assert (moved != 0).float().mean() > 0.3
        assert moved.abs().max() < 1e-4
        assert all(value.dtype is torch.float32 for value in optimizer.base.state[slot.latent].values())
    assert_on_grid(optimizer)


@pytest.mark.parametrize("method", [SAM, SAQ], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_perturbed_pass_on_16_bit_parameters_warns_once_with_the_realised_norm(method, dtype):
    model = method.model(MLP).to(dtype)
    optimizer = method(model)
    task = Cast(MLP, dtype)
    with pytest.warns(UserWarning, match=ROUNDED) as caught:
        train(optimizer, model, task, 3)
    assert len(caught) == 1
    realised = float(str(caught[0].message).split("for, ")[1].split(" ")[0])
    assert 0 < realised < 1


def test_the_realised_norm_is_measured():
    model = SAQ.model(MLP).bfloat16()
    optimizer = SAQ(model, rho=3.0)
    batch = halved(MLP.batch(0), torch.bfloat16)
    with optimizer.first_pass():
        Cast(MLP, torch.bfloat16).loss(model, batch).backward()
    before = [slot.parameter.detach().double() for slot in optimizer._latents.slots]
    with pytest.warns(UserWarning, match="realised") as caught, optimizer.perturbed():
        after = [slot.parameter.detach().double() for slot in optimizer._latents.slots]
    norm = torch.cat([(a - b).flatten() for a, b in zip(after, before, strict=True)]).norm()
    assert float(str(caught[0].message).split("for, ")[1].split(" ")[0]) == pytest.approx(
        float(norm), rel=5e-3
    )  # 3 digits


@pytest.mark.parametrize("method", [SAM, SAQ], ids=str)
def test_a_double_model_keeps_its_digits(method):
    model = method.model(MLP).double()
    optimizer = method(model)
    task = Cast(MLP, torch.float64)
    task.loss = MLP.loss
    train(optimizer, model, task, 2)
    assert all(slot.latent.dtype is torch.float64 for slot in optimizer._latents.slots)
    assert all(
        t.float().double().ne(t).any() for name, t in latents(optimizer, model).items() if name.endswith("weight")
    )
    assert_on_grid(optimizer)


@pytest.mark.parametrize("method", [SAM, SAQ], ids=str)
@pytest.mark.parametrize("max_norm", [1e-3, 1e9])
def test_max_grad_norm_is_the_norm_of_the_update_gradient(method, max_norm):
    model, optimizer = built(method, MLP, SGD, lr=1.0, max_grad_norm=max_norm)
    before = latents(optimizer, model)
    train(optimizer, model, MLP, 1)
    after = latents(optimizer, model)
    moved = torch.cat([(after[name] - before[name]).flatten().double() for name in after]).norm()
    rounding = torch.finfo(torch.float32).eps * float(torch.cat([t.flatten() for t in after.values()]).norm())
    if max_norm < 1:  # torch adds 1e-6 to the norm it divides by
        assert abs(float(moved) - max_norm) <= max_norm * 1e-3 + rounding
    else:
        free_model = method.model(MLP)
        free = method(free_model, SGD, lr=1.0)
        train(free, free_model, MLP, 1)
        assert_same(latents(free, free_model), after)
