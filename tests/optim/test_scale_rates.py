"""The scales' rates: the rule that balances them, and the optimizer that keeps them positive."""

import math

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, RMSprop

from qsam.optim import QAT
from qsam.optim.scale_rates import MAX_RELATIVE_STEP, BalancedSGD
from tests.models import BERT, CONV, MLP
from tests.optim.methods import QUANTIZING, scales_of, train

each_method = pytest.mark.parametrize("method", QUANTIZING, ids=str)


def rates(optimizer):
    return {group["qsam_scales"]: group["lr"] for group in optimizer.param_groups if "qsam_scales" in group}


def rms(model):
    weights = torch.cat(
        [p.detach().flatten() for name, p in model.named_parameters() if p.dim() > 1 and "quantizer" not in name]
    )
    return float(weights.double().square().mean().sqrt())


@pytest.mark.parametrize("task", [MLP, CONV], ids=str)
@pytest.mark.parametrize("base", [Adam, AdamW, RMSprop], ids=lambda base: base.__name__)
def test_beside_adam_a_scale_takes_the_relative_step_of_the_weights(task, base):
    model = task.quantized()
    expected = 1e-4 / rms(model)
    found = rates(QAT(model, base, lr=1e-4))
    # fp32 sums of at most a few hundred squares
    assert found["weights"] == pytest.approx(expected, rel=1e-5)
    assert found["inputs"] == found["weights"]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_beside_sgd_a_scale_takes_the_weights_own_rate(momentum):
    found = rates(QAT(MLP.quantized(), SGD, lr=0.02, momentum=momentum))
    assert found == {"weights": pytest.approx(0.02 / (1 - momentum)), "inputs": pytest.approx(0.02 / (1 - momentum))}


def test_a_given_rate_is_taken_as_it_is():
    assert rates(QAT(MLP.quantized(), AdamW, scale_lr=0.25)) == {"weights": 0.25, "inputs": 0.25}
    assert rates(QAT(MLP.quantized(), AdamW, scale_lr=(0.25, 1))) == {"weights": 0.25, "inputs": 1.0}


def test_a_given_rate_may_go_with_another_optimizer_without_decay():
    """Weight decay would shrink the grid."""
    model = MLP.quantized()
    optimizer = QAT(model, SGD, lr=0.0, scale_lr=1e-3, scale_optimizer=AdamW)
    assert [group["weight_decay"] for group in optimizer.scale_base.param_groups] == [0.0, 0.0]
    before = {name: s.clone() for name, s in scales_of(model).items()}
    train(optimizer, model, MLP, 1)
    for name, s in scales_of(model).items():  # Adam's first step is lr, whatever the gradient
        assert abs(abs(float(s - before[name])) - 1e-3) < 1e-5


@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
def test_the_relative_step_of_the_scales_is_that_of_the_weights(granularity):
    """The rule itself, measured in a run, within a factor of 4: Adam's steps get shorter where gradients turn."""
    model = BERT.quantized(granularity=granularity)
    optimizer = QAT(model, AdamW, lr=1e-4, weight_decay=0.0)
    train(optimizer, model, BERT, 6)
    w = {slot.path: slot.latent.detach().clone() for slot in optimizer._latents.slots}
    s = {name: t.clone() for name, t in scales_of(model).items() if "weight_quantizer" in name}
    train(optimizer, model, BERT, 1, start=6)
    moved_w = sum(float((slot.latent.detach() - w[slot.path]).square().sum()) for slot in optimizer._latents.slots)
    relative_w = math.sqrt(moved_w / sum(float(t.square().sum()) for t in w.values()))
    steps = torch.cat([((t - s[name]) / s[name]).flatten() for name, t in scales_of(model).items() if name in s])
    relative_s = float(steps.square().mean().sqrt())
    assert 1 / 4 < relative_s / relative_w < 4


@each_method
def test_scales_stay_positive_at_an_absurd_rate_of_the_base(method):
    for base, options in ((AdamW, {"lr": 10.0}), (SGD, {"lr": 100.0, "momentum": 0.9})):
        model = method.model(MLP)
        optimizer = method(model, base, **options)
        before = {name: s.clone() for name, s in scales_of(model).items()}
        train(optimizer, model, MLP, 2)
        for name, s in scales_of(model).items():
            assert bool((s > 0).all())
            assert bool(((s / before[name] - 1).abs() <= 2.1 * MAX_RELATIVE_STEP).all())


def scale(*values):
    return nn.Parameter(torch.tensor(values))


def test_the_normalized_step_does_not_depend_on_the_size_of_the_gradient():
    moved = []
    for factor in (1.0, 2.0**20, 2.0**-20):
        s = scale(1.0, 8.0)
        optimizer = BalancedSGD([s], lr=0.004)
        for gradient in ([1.0, -2.0], [0.5, 3.0], [-1.0, 0.0]):
            s.grad = torch.tensor(gradient) * factor
            optimizer.step()
        moved.append(s.detach().clone())
    assert torch.equal(moved[0], moved[1])
    assert torch.equal(moved[0], moved[2])


def test_the_first_normalized_step_is_the_rate_times_the_entry():
    s = scale(1.0, 8.0)
    s.grad = torch.tensor([3.0, -1e-3])
    BalancedSGD([s], lr=0.004).step()
    assert torch.allclose(s.detach(), torch.tensor([0.996, 8.032]), rtol=2 * torch.finfo(torch.float32).eps, atol=0)


def test_no_step_is_longer_than_a_hundredth_of_the_entry():
    for normalized in (True, False):
        s = scale(1.0, 2.0)
        s.grad = torch.tensor([1.0, -1.0])
        BalancedSGD([s], lr=1e6, normalized=normalized).step()
        assert torch.allclose(s.detach(), torch.tensor([0.99, 2.02]), rtol=2 * torch.finfo(torch.float32).eps, atol=0)


def test_without_normalization_it_is_plain_descent():
    s = scale(1.0)
    s.grad = torch.tensor([0.125])
    BalancedSGD([s], lr=0.03125, normalized=False).step()
    assert s.item() == 1.0 - 0.03125 * 0.125


def test_an_entry_without_gradient_stays():
    s, t = scale(1.0), scale(2.0)
    t.grad = torch.tensor([0.0])
    optimizer = BalancedSGD([s, t], lr=0.01)
    optimizer.step()
    assert (s.item(), t.item()) == (1.0, 2.0)


@pytest.mark.parametrize("normalized", [True, False])
def test_scales_step_together_as_each_does_alone(normalized):
    """Of any shape and dtype, and where some were without a gradient in some step."""
    starts = [torch.rand(shape) + 0.1 for shape in ((1,), (3, 1), (2, 4, 1), (1,))] + [torch.ones(2).double()]
    together, alone = ([nn.Parameter(t.clone()) for t in starts] for _ in range(2))
    one = BalancedSGD(together, lr=0.004, normalized=normalized)
    many = [BalancedSGD([s], lr=0.004, normalized=normalized) for s in alone]
    for step in range(4):
        for i, (a, b) in enumerate(zip(together, alone, strict=True)):
            a.grad = None if (i, step) in {(0, 1), (2, 0)} else torch.randn_like(a)
            b.grad = None if a.grad is None else a.grad.clone()
        one.step()
        for optimizer in many:
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))
    assert all(not torch.equal(a, start) for a, start in zip(together, starts, strict=True))


def test_a_closure_of_the_balanced_descent_is_called_once():
    s = scale(1.0)
    assert BalancedSGD([s], lr=0.01).step(lambda: 3.0) == 3.0
