"""Contract 1: torch's schedulers drive the base's groups and the scales'."""

import warnings

import pytest
import torch
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    CyclicLR,
    LambdaLR,
    LinearLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
)

from tests.models import MLP
from tests.optim.methods import METHODS, QUANTIZING, assert_same, everything, latents, long_but, scales_of, train

each_method = pytest.mark.parametrize("method", METHODS, ids=str)

RELATIVE = {
    "lambda": lambda o: LambdaLR(o, lambda step: 1 / (1 + step)),
    "cosine": lambda o: CosineAnnealingLR(o, T_max=4),
    "restarts": lambda o: CosineAnnealingWarmRestarts(o, T_0=2),
    "warm-up": lambda o: SequentialLR(o, [LinearLR(o, 0.1, 1.0, 2), CosineAnnealingLR(o, 4)], milestones=[2]),
}
"""They multiply each group's own rate."""

ABSOLUTE = {
    "one-cycle": lambda o: OneCycleLR(o, max_lr=0.01, total_steps=6),
    "cyclic": lambda o: CyclicLR(o, base_lr=1e-4, max_lr=1e-3, step_size_up=2),
}
"""They set each group's rate, and the base's momentum or betas too."""


def rates(scheduler_of, model, optimizer, steps=5):
    """Return the groups' rates after each step."""
    scheduler = scheduler_of(optimizer)
    found = []
    for i in range(steps):
        train(optimizer, model, MLP, 1, start=i)
        scheduler.step()
        found.append([group["lr"] for group in optimizer.param_groups])
    return found


def bare_rates(scheduler_of, base, steps=5):
    """Return what the scheduler gives a bare base optimizer, and its group."""
    model = MLP.build()
    optimizer = base(model.parameters(), lr=1e-3)
    scheduler = scheduler_of(optimizer)
    found = []
    for _ in range(steps):
        optimizer.step()
        scheduler.step()
        found.append(optimizer.param_groups[0]["lr"])
    return found, optimizer.param_groups[0]


@each_method
@pytest.mark.parametrize("name", RELATIVE)
def test_a_relative_scheduler_scales_all_rates_alike(method, name):
    model = method.model(MLP)
    optimizer = method(model)
    first = [group["lr"] for group in optimizer.param_groups]
    found = rates(RELATIVE[name], model, optimizer)
    expected, _ = bare_rates(RELATIVE[name], AdamW)
    assert [row[0] for row in found] == expected
    for row in found:
        for rate, start in zip(row, first, strict=True):
            assert rate == pytest.approx(start * row[0] / first[0], rel=1e-6, abs=1e-12)  # torch rounds in float64


@each_method
@pytest.mark.parametrize("name", ABSOLUTE)
@pytest.mark.parametrize("base", long_but([SGD], [AdamW, SGD]))
def test_an_absolute_scheduler_sets_the_base_s_rate_and_momentum(method, name, base):
    model = method.model(MLP)
    options = {"momentum": 0.9} if base is SGD else {}
    optimizer = method(model, base, **options)
    found = rates(ABSOLUTE[name], model, optimizer)
    expected, group = bare_rates(ABSOLUTE[name], lambda params, lr: base(params, lr=lr, **options))
    assert [row[0] for row in found] == expected
    for key in ("betas", "momentum"):
        assert optimizer.param_groups[0].get(key) == group.get(key)
    assert everything(optimizer, model)


@pytest.mark.parametrize("method", QUANTIZING, ids=str)
def test_one_cycle_takes_a_list_of_rates_with_the_scales_among_them(method):
    model = method.model(MLP)
    optimizer = method(model)
    peaks = [0.01, 0.002, 0.003]
    highest = [
        max(column)
        for column in zip(
            *rates(lambda o: OneCycleLR(o, peaks, total_steps=6, pct_start=0.5), model, optimizer), strict=True
        )
    ]
    assert highest == pytest.approx(peaks)


@each_method
def test_reduce_on_plateau_lowers_every_group(method):
    model = method.model(MLP)
    optimizer = method(model)
    first = [group["lr"] for group in optimizer.param_groups]
    scheduler = ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
    for i in range(3):
        train(optimizer, model, MLP, 1, start=i)
        scheduler.step(1.0)
    assert [group["lr"] for group in optimizer.param_groups] == [rate / 4 for rate in first]


@each_method
def test_a_rate_of_zero_moves_nothing(method):
    """The scales' own optimizer reads the scheduled rate."""
    model = method.model(MLP)
    optimizer = method(model, AdamW, weight_decay=0.0)
    LambdaLR(optimizer, lambda step: 0.0)
    w, s = latents(optimizer, model), {name: t.clone() for name, t in scales_of(model).items()}
    train(optimizer, model, MLP, 4)
    assert_same(latents(optimizer, model), w)
    assert_same(scales_of(model), s)
    assert optimizer.steps == (2 if method.schedule == "next_batch" else 4)


@pytest.mark.parametrize("method", QUANTIZING, ids=str)
def test_the_scales_step_with_the_scheduled_rate(method):
    """Half the rate is half the step, with plain descent on the first step of the scales."""
    moved = []
    for factor in (1.0, 0.5):
        model = method.model(MLP)
        optimizer = method(model, scale_lr=0.125)
        LambdaLR(optimizer, lambda step, factor=factor: factor)
        optimizer.param_groups[0]["lr"] = 0.0  # w stays, so that both see the same gradients
        before = {name: s.clone() for name, s in scales_of(model).items()}
        train(optimizer, model, MLP, 2 if method.schedule == "next_batch" else 1)
        moved.append({name: (s - before[name]).double() for name, s in scales_of(model).items()})
    eps = torch.finfo(torch.float32).eps
    for name in moved[0]:
        assert bool(moved[0][name].any())
        # Each difference of two numbers near 1 is rounded once.
        assert torch.allclose(moved[0][name], 2 * moved[1][name], rtol=0, atol=2 * eps)


@each_method
def test_resuming_with_a_scheduler_is_as_if_nothing_had_stopped(method):
    def build():
        model = method.model(MLP)
        optimizer = method(model)
        return model, optimizer, OneCycleLR(optimizer, max_lr=0.01, total_steps=10)

    def run(model, optimizer, scheduler, steps, start):
        for i in range(start, start + steps):
            train(optimizer, model, MLP, 1, start=i)
            scheduler.step()

    model, optimizer, scheduler = build()
    run(model, optimizer, scheduler, 4, 0)
    saved = model.state_dict(), optimizer.state_dict(), scheduler.state_dict()
    saved = torch.utils._pytree.tree_map(lambda t: t.clone() if isinstance(t, torch.Tensor) else t, saved)
    run(model, optimizer, scheduler, 4, 4)

    other_model, other, other_scheduler = build()
    other_model.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    with warnings.catch_warnings():
        other_scheduler.load_state_dict(saved[2])
    run(other_model, other, other_scheduler, 4, 4)
    assert_same(everything(other, other_model), everything(optimizer, model))
    assert [g["lr"] for g in other.param_groups] == [g["lr"] for g in optimizer.param_groups]
