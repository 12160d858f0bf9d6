"""Each direction with other settings than the twin's (tests/reference/any_step.py), and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qsam
from qsam import Direction, register_direction
from qsam.fused.kernels import using
from qsam.optim import DIRECTIONS
from qsam.optim.directions import Asam, Friendly
from tests.methods import needs_kernels

INPUTS = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
TARGETS = INPUTS[:, :1] * INPUTS[:, 1:2]
RHO = 0.05


def build(
    cls: type = qsam.SAQ, *, bits: int = 4, base: Any = torch.optim.AdamW, **options: Any
) -> tuple[nn.Module, Any]:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))
    if cls is not qsam.SAM:
        qsam.quantize_(model, bits=bits)
        qsam.calibrate(model, [INPUTS])
    return model, cls(model, base, **{"lr": 1e-3, "rho": RHO, **options})


def loss_of(model: nn.Module) -> Tensor:
    return nn.functional.mse_loss(model(INPUTS), TARGETS)


def run(model: nn.Module, optimizer: Any, steps: int) -> int:
    calls = 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)
    return calls


def gradient_and_perturbation(model: nn.Module, optimizer: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Return g_Q of a first pass and the e that the perturbed pass adds, one tensor a slot."""
    slots = optimizer._latents.slots
    with optimizer.first_pass():
        loss_of(model).backward()
    g = [slot.parameter.grad.clone() for slot in slots]
    with optimizer.perturbed():
        e = [slot.parameter.detach() - slot.quantized() for slot in slots]
        loss_of(model).backward()
    return g, e


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.flatten() for t in tensors])


def close(actual: list[Tensor], expected: list[Tensor]) -> None:
    # e is read back as (Q + e) - Q: rounded at the size of Q, here below 1.
    torch.testing.assert_close(flat(actual), flat(expected), rtol=1e-5, atol=2 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel", "per_group"])
def test_grid_is_steepest_ascent_in_units_of_the_step_size(granularity: str) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    group_size = 4 if granularity == "per_group" else None
    qsam.quantize_(model, granularity=granularity, group_size=group_size, activations=None)
    optimizer = qsam.SAQ(model, torch.optim.AdamW, rho=RHO, direction="grid")
    slots = optimizer._latents.slots
    with optimizer.first_pass():
        model(torch.ones(2, 8)).square().sum().backward()
    units = [slot.quantizer.dequantize(torch.ones_like(slot.latent)) for slot in slots]
    g = [slot.parameter.grad.clone() for slot in slots]
    with optimizer.perturbed():
        e = [slot.parameter.detach() - slot.quantized() for slot in slots]
    norm = flat([t * x for t, x in zip(units, g, strict=True)]).norm()
    close(e, [RHO * t.square() * x / norm for t, x in zip(units, g, strict=True)])


def test_grid_needs_a_step_size() -> None:
    model, optimizer = build(direction="grid", perturb="all")
    with pytest.raises(ValueError, match=r"direction 'grid' needs a step size, and '0\.bias' has none"):
        gradient_and_perturbation(model, optimizer)
    for slot in optimizer._latents.slots:
        assert torch.equal(slot.parameter, slot.quantized())


@pytest.mark.parametrize(
    ("direction", "sigma", "lam"), [("friendly", 1.0, 0.9), (Friendly(sigma=0.5, lam=0.6), 0.5, 0.6)]
)
def test_friendly_subtracts_the_average_that_it_moves_afterwards(direction: Any, sigma: float, lam: float) -> None:
    """m starts at the first gradient, undamped."""
    model, optimizer = build(direction=direction, lr=0.05, scale_lr=0.0)
    m: list[Tensor] = []
    for _ in range(3):
        g, e = gradient_and_perturbation(model, optimizer)
        d = [a - sigma * b for a, b in zip(g, m, strict=True)] if m else g
        close(e, [RHO * x / flat(d).norm() for x in d])
        m = [lam * b + (1 - lam) * a for a, b in zip(g, m, strict=True)] if m else g
        optimizer.step()


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: Friendly(lam=1.0), ValueError, r"`lam` must be in \[0, 1\), got 1\.0"),
        (lambda: Friendly(sigma=-1), ValueError, "`sigma` must be finite and >= 0, got -1"),
        (lambda: Friendly(sigma="1"), TypeError, "`sigma` must be a number >= 0, got '1'"),
        (lambda: Asam(eta=float("inf")), ValueError, "`eta` must be finite and >= 0, got inf"),
    ],
)
def test_a_bad_setting_of_a_direction_is_refused(
    make: Callable[[], Direction], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        make()


def test_two_optimizers_given_one_direction_do_not_share_its_memory() -> None:
    direction = Friendly(sigma=0.5)
    pairs = [build(direction=direction) for _ in range(2)]
    run(*pairs[0], 1)
    assert pairs[0][1].perturbation.direction.memory
    assert not direction.memory and not pairs[1][1].perturbation.direction.memory


def test_random_ignores_the_gradient_has_length_rho_and_moves_no_generator() -> None:
    model, optimizer = build(direction="random")
    state = torch.get_rng_state()
    g, e = gradient_and_perturbation(model, optimizer)
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(flat(e).norm(), torch.tensor(RHO), rtol=1e-4, atol=0)
    cosine = torch.nn.functional.cosine_similarity(flat(e), flat(g), dim=0)
    assert cosine.abs() < 4 / flat(e).numel() ** 0.5  # four standard deviations of independent directions


@pytest.mark.parametrize("backend", ["eager", "compiled"])
def test_previous_is_the_gradient_of_the_last_step_in_one_pass(backend: str) -> None:
    """Not what the pull-back made of it: at 2 bits the clip mask stops a part."""
    if backend == "compiled":
        needs_kernels()
    with using(backend):
        model, optimizer = build(direction="previous", bits=2)
        loss_of(model).backward()
        h = [slot.parameter.grad.clone() for slot in optimizer._latents.slots]
        optimizer.step()
        with optimizer.perturbed():
            e = [slot.parameter.detach() - slot.quantized() for slot in optimizer._latents.slots]
            loss_of(model).backward()
        optimizer.step()
    close(e, [RHO * x / flat(h).norm() for x in h])


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize(("base", "key"), [(torch.optim.AdamW, "exp_avg"), (torch.optim.SGD, "momentum_buffer")])
def test_momentum_looks_ahead_to_where_the_base_is_going(base: Any, key: str, maximize: bool) -> None:
    """e = -rho * m / ||m||: a step of the base along m alone would be along e, whether it minimizes or maximizes."""
    settings = {"momentum": 0.9} if base is torch.optim.SGD else {}
    model, optimizer = build(direction="momentum", base=base, maximize=maximize, **settings)
    run(model, optimizer, 2)
    moments = [optimizer.base.state[slot.latent][key].clone() for slot in optimizer._latents.slots]
    with optimizer.perturbed():
        e = [slot.parameter.detach() - slot.quantized() for slot in optimizer._latents.slots]
        loss_of(model).backward()
    close(e, [-RHO * x / flat(moments).norm() for x in moments])
    after = [optimizer.base.state[slot.latent][key] for slot in optimizer._latents.slots]
    assert all(torch.equal(a, b) for a, b in zip(moments, after, strict=True))


def test_momentum_never_writes_the_moments_of_the_base_even_if_they_are_not_finite() -> None:
    model, optimizer = build(direction="momentum")
    run(model, optimizer, 1)
    moment = optimizer.base.state[optimizer._latents.slots[0].latent]["exp_avg"]
    moment[0, 0] = float("nan")
    with optimizer.perturbed():
        assert all(torch.equal(slot.parameter, slot.quantized()) for slot in optimizer._latents.slots)
        loss_of(model).backward()
    assert moment.isnan().sum() == 1


def test_momentum_needs_a_base_that_keeps_one() -> None:
    model, optimizer = build(direction="momentum", base=torch.optim.SGD)
    run(model, optimizer, 1)
    with pytest.raises(ValueError, match="direction 'momentum' needs a first moment"):
        run(model, optimizer, 1)


def test_a_direction_of_ones_own_is_used_by_name() -> None:
    @register_direction("test_signs")
    class Signs(Direction):
        def __call__(self, ascents: Any, step: int) -> tuple[list[Tensor], Tensor]:
            directions = [ascent.gradient.sign() for ascent in ascents]
            return directions, torch.tensor(1.0)

    try:
        g, e = gradient_and_perturbation(*build(direction="test_signs"))
        close(e, [RHO * x.sign() for x in g])
    finally:
        del DIRECTIONS._classes["test_signs"]


def test_a_direction_without_a_call_is_refused() -> None:
    with pytest.raises(TypeError, match="must be a subclass of Direction"):
        register_direction("test_nothing")(type("Nothing", (Direction,), {}))
