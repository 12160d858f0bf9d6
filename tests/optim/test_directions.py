"""Each direction against its equation, and the economy options: every, start, reuse, one-pass directions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qsam
from qsam import Direction, register_direction
from qsam.fused.backend import using
from qsam.optim import DIRECTIONS
from qsam.optim.directions import Asam, Friendly

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


def test_sam_is_the_gradient_at_length_rho() -> None:
    g, e = gradient_and_perturbation(*build())
    close(e, [RHO * x / flat(g).norm() for x in g])


def test_asam_is_steepest_ascent_in_units_of_each_weight() -> None:
    model, optimizer = build(direction="asam")
    units = [slot.latent.detach().abs() + 0.01 for slot in optimizer._latents.slots]
    g, e = gradient_and_perturbation(model, optimizer)
    norm = flat([t * x for t, x in zip(units, g, strict=True)]).norm()
    close(e, [RHO * t.square() * x / norm for t, x in zip(units, g, strict=True)])
    in_units = flat([x / t for x, t in zip(e, units, strict=True)]).norm()
    torch.testing.assert_close(in_units, torch.tensor(RHO), rtol=1e-4, atol=0)


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


def test_random_draws_anew_each_step_and_the_same_in_a_rerun() -> None:
    draws = []
    for _ in range(2):
        model, optimizer = build(direction="random", lr=0.0, scale_lr=0.0)
        for _ in range(2):
            draws.append(flat(gradient_and_perturbation(model, optimizer)[1]))
            optimizer.step()
    assert torch.equal(draws[0], draws[2]) and torch.equal(draws[1], draws[3])
    assert not torch.allclose(draws[0], draws[1])


@pytest.mark.parametrize("backend", ["eager", "compiled"])
def test_previous_is_the_gradient_of_the_last_step_in_one_pass(backend: str) -> None:
    """Not what the pull-back made of it: at 2 bits the clip mask stops a part."""
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


CALLS = [
    (qsam.SAQ, {}, 12),
    (qsam.SAQ, {"every": 3}, 6 + 2),
    (qsam.SAQ, {"start": 4}, 6 + 2),
    (qsam.SAQ, {"every": 3, "start": 1}, 6 + 2),
    (qsam.SAQ, {"every": 3, "reuse": "perturbation"}, 6 + 2),
    (qsam.SAQ, {"direction": "previous"}, 6),
    (qsam.SAQ, {"direction": "momentum"}, 6),
    (qsam.SQuAT, {"direction": "previous"}, 1 + 5 * 2),
    (qsam.SQuAT, {"every": 3}, 4 + 2 * 3),
    (qsam.SAM, {}, 12),
]


@pytest.mark.parametrize(("cls", "options", "calls"), CALLS)
def test_closure_calls_in_six_steps(cls: type, options: dict[str, Any], calls: int) -> None:
    assert run(*build(cls, **options), 6) == calls


def test_steps_left_out_by_every_are_qat_steps() -> None:
    model, optimizer = build(every=100, start=50)
    run(model, optimizer, 5)
    torch.manual_seed(1)
    twin = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))
    qsam.quantize_(twin)
    qsam.calibrate(twin, [INPUTS])
    run(twin, qsam.QAT(twin, torch.optim.AdamW, lr=1e-3), 5)
    pairs = zip(model.state_dict().values(), twin.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_reuse_takes_the_last_perturbation_again() -> None:
    model, optimizer = build(every=3, reuse="perturbation")
    _, first = gradient_and_perturbation(model, optimizer)
    optimizer.step()
    with optimizer.perturbed():
        again = [slot.parameter.detach() - slot.quantized() for slot in optimizer._latents.slots]
        loss_of(model).backward()
    close(again, first)


@pytest.mark.parametrize("name", list(DIRECTIONS))
@pytest.mark.parametrize("cls", [qsam.SAM, qsam.SAQ, qsam.JointSAM, qsam.SQuAT])
@pytest.mark.long
def test_every_direction_goes_with_every_method_and_resumes(name: str, cls: type) -> None:
    if name == "grid" and cls is qsam.SAM:
        pytest.skip("grid needs a quantizer's step size")
    model, optimizer = build(cls, direction=name)
    run(model, optimizer, 3)
    saved_model, saved = model.state_dict(), optimizer.state_dict()
    saved_model = {key: value.clone() for key, value in saved_model.items()}
    resumed, resumed_optimizer = build(cls, direction=name)
    resumed.load_state_dict(saved_model)
    resumed_optimizer.load_state_dict(torch.utils._pytree.tree_map(copy_tensor, saved))
    run(model, optimizer, 3)
    run(resumed, resumed_optimizer, 3)
    pairs = zip(model.state_dict().values(), resumed.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def copy_tensor(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def test_fused_squat_refuses_directions_of_one_pass() -> None:
    with pytest.raises(ValueError, match=r"fused.*first pass"):
        build(qsam.SQuAT, schedule="fused", direction="previous")


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"direction": "sgm"}, ValueError, "There is no direction 'sgm'.*'sam'"),
        ({"every": 0}, ValueError, "`every` must be an integer >= 1, got 0"),
        ({"every": 2.0}, TypeError, "`every` must be an integer >= 1, got 2.0"),
        ({"start": -1}, ValueError, "`start` must be an integer >= 0, got -1"),
        ({"reuse": "gradient"}, ValueError, "`reuse` must be None or 'perturbation'"),
        ({"perturb": "weights"}, ValueError, "`perturb` must be 'quantized', 'all' or a predicate"),
        ({"rho": -0.1}, ValueError, "`rho` must be finite and >= 0, got -0.1"),
        ({"rho": float("nan")}, ValueError, "`rho` must be finite and >= 0"),
        ({"rho": "0.1"}, TypeError, "`rho` must be a number >= 0"),
        ({"perturbation_scope": "rank"}, ValueError, "perturbation_scope='rank' must keep DistributedDataParallel"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        build(**options)


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


def perturbed_set(**options: Any) -> set[str]:
    model, optimizer = build(**options)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with optimizer.first_pass():
        loss_of(model).backward()
    with optimizer.perturbed():
        moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        loss_of(model).backward()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    return moved


WEIGHTS = {"0.weight", "2.weight", "4.weight"}
BIASES = {"0.bias", "2.bias", "4.bias"}
SELECTIONS: list[tuple[str | Callable[..., bool], set[str]]] = [
    ("quantized", WEIGHTS),
    ("all", WEIGHTS | BIASES),
    (lambda name, p: p.dim() == 1, BIASES),
]


@pytest.mark.parametrize(("perturb", "expected"), SELECTIONS)
def test_perturb_chooses_the_set_and_never_a_scale(perturb: Any, expected: set[str]) -> None:
    assert perturbed_set(perturb=perturb) == expected


def test_rho_per_group_and_its_schedule() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))
    qsam.quantize_(model)
    qsam.calibrate(model, [INPUTS])
    named = [(name, p) for name, p in model.named_parameters() if "_quantizer." not in name]
    groups = [
        {"params": [p for name, p in named if name.startswith("0.")], "rho": 0.02},
        {"params": [p for name, p in named if not name.startswith("0.")]},
    ]
    optimizer = qsam.SAQ(model, torch.optim.AdamW, params=groups, lr=1e-3, rho=RHO)
    g, e = gradient_and_perturbation(model, optimizer)
    norm = flat(g).norm()
    close(e, [radius * x / norm for radius, x in zip((0.02, RHO, RHO), g, strict=True)])
    optimizer.step()
    for group in optimizer.param_groups:
        group["qsam_rho"] = 0.01
    _, e = gradient_and_perturbation(model, optimizer)
    torch.testing.assert_close(flat(e).norm(), torch.tensor(0.01), rtol=1e-4, atol=0)
