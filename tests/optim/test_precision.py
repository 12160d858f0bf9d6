"""16-bit models keep fp32 latents; GradScaler and autocast see an ordinary optimizer; double stays double."""

import pytest
import torch
from torch.nn.utils import clip_grad_norm_
from torch.optim import SGD, AdamW

from tests.models import CONV, MLP
from tests.optim.methods import (
    METHODS,
    PERTURBING,
    QUANTIZING,
    assert_on_grid,
    assert_same,
    closure_of,
    everything,
    latents,
    long_but,
    train,
    train_by_hand,
)

each_method = pytest.mark.parametrize("method", METHODS, ids=str)
each_quantizing = pytest.mark.parametrize("method", QUANTIZING, ids=str)
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


@each_quantizing
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


@each_quantizing
@quiet
def test_a_bf16_model_resumes_bit_by_bit(method):
    task = Cast(MLP, torch.bfloat16)
    model = method.model(MLP).bfloat16()
    optimizer = method(model)
    train(optimizer, model, task, 3)
    kept = (
        {k: v.clone() for k, v in model.state_dict().items()},
        torch.utils._pytree.tree_map(lambda t: t.clone() if isinstance(t, torch.Tensor) else t, optimizer.state_dict()),
    )
    train(optimizer, model, task, 3, start=3)
    other = method.model(MLP).bfloat16()
    resumed = method(other)
    other.load_state_dict(kept[0])
    resumed.load_state_dict(kept[1])
    train(resumed, other, task, 3, start=3)
    assert_same(everything(resumed, other), everything(optimizer, model))


@pytest.mark.parametrize("method", PERTURBING, ids=str)
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


@each_quantizing
def test_the_realised_norm_is_measured(method):
    if not method.perturbs:
        pytest.skip("nothing is perturbed")
    model = method.model(MLP).bfloat16()
    optimizer = method(model, rho=3.0)
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


@each_method
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


@each_method
@pytest.mark.parametrize("perturb", long_but([None], [None, "all"]))
def test_a_grad_scaler_changes_nothing(method, perturb):
    """Powers of two cancel without rounding; the scale grows on the way."""
    options = {"perturb": perturb} if perturb and method.perturbs else {}
    ends = []
    for scaler in (torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=2), None):
        model = method.model(CONV)
        optimizer = method(model, **options)
        torch.manual_seed(0)
        train_by_hand(method, optimizer, model, CONV, 6, scaler=scaler)
        ends.append(everything(optimizer, model))
    assert_same(*ends)


@each_method
def test_a_grad_scaler_may_unscale_before_clipping(method):
    """scaler.unscale_, then stock clip_grad_norm_: it sees dL/dQ of the second pass."""
    ends = []
    for scaler in (torch.amp.GradScaler("cpu", init_scale=2.0**8), None):
        model = method.model(MLP)
        optimizer = method(model)
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


@each_method
def test_stock_clipping_in_a_closure_is_that_of_plain_sgd(method):
    """The update is lr times the clipped gradient: no longer than lr * max_norm."""
    model = method.model(MLP)
    optimizer = method(model, SGD, lr=1.0)
    closure = closure_of(optimizer, model, MLP, MLP.batch(0))

    def clipped():
        loss = closure()
        clip_grad_norm_(model.parameters(), 0.01)
        return loss

    before = latents(optimizer, model)
    optimizer.step(clipped)
    after = latents(optimizer, model)
    moved = torch.cat([(after[name] - before[name]).flatten() for name in after])
    # The clip mask may only shorten it; each entry of w is rounded once.
    assert (
        0
        < moved.norm()
        <= 0.01 + torch.finfo(torch.float32).eps * torch.cat([t.flatten() for t in after.values()]).norm()
    )


@each_method
@pytest.mark.parametrize("max_norm", [1e-3, 1e9])
def test_max_grad_norm_is_the_norm_of_the_update_gradient(method, max_norm):
    model = method.model(MLP)
    optimizer = method(model, SGD, lr=1.0, max_grad_norm=max_norm)
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
