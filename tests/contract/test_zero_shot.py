"""The zero-shot game keeps its identities, leaves the teacher alone, and resumes as if nothing had stopped."""

import copy
import io

import pytest
import torch
from torch.optim import SGD

from qsam.zero_shot import SamSga, distill
from tests.games import players
from tests.methods import BY_NAME, KINDS, SAQ, assert_on_grid, assert_same, everything
from tests.models import CONV, MLP

each_method = pytest.mark.parametrize("method", KINDS, ids=str)
QAT = BY_NAME["qat"]
ORDERS = ["student_first", "generator_first", "together"]


def end_of(task, method, steps=2, **settings):
    """Return what student and generator are after a few iterations, and the random state."""
    teacher, student, generator, optimizer = players(task, method, **settings)
    report = distill(teacher, student, generator, optimizer, steps=steps, rows=8)
    student_end = everything(optimizer.student_optimizer, student) | {"rng": torch.get_rng_state()}
    return student_end, dict(generator.named_parameters()), [e["divergence"] for e in report.history]


# --- identities -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
def test_rho_zero_is_plain_adversarial_distillation(order):
    """With BatchNorm and dropout: QAT by the student, ascent by the generator."""
    plain, zero = (end_of(CONV, method, order=order, rho=0.0) for method in (QAT, SAQ))
    for ours, theirs in zip(plain[:2], zero[:2], strict=True):
        assert_same(ours, theirs)
    assert plain[2] == zero[2]


@pytest.mark.parametrize(("order", "sees"), list(zip(ORDERS, ["theta", "theta+e", "theta"], strict=True)))
def test_a_generator_rate_of_zero_is_a_frozen_generator(order, sees):
    """The generator's turns leave the student, its buffers and the random numbers alone."""
    settings = {"order": order, "generator_sees": sees}
    still, frozen = (end_of(CONV, SAQ, generator_lr=lr, **settings) for lr in (0.0, None))
    assert_same(still[0], frozen[0])
    assert_same(still[1], frozen[1])


def test_no_generator_steps_is_a_frozen_generator():
    none, frozen = end_of(MLP, SAQ, generator_steps=0), end_of(MLP, SAQ, generator_lr=None)
    assert_same(none[0], frozen[0])


def test_without_a_perturbation_the_generator_sees_theta():
    assert_same(*(end_of(MLP, QAT, generator_sees=sees)[1] for sees in ("theta", "theta+e")))


@each_method
def test_a_frozen_generator_is_training_on_its_samples(method):
    """distill adds nothing to step(closure) of the student's optimizer."""
    teacher, student, generator, optimizer = players(MLP, method, generator_lr=None)
    distill(teacher, student, generator, optimizer, steps=4, rows=8)
    _, other, _, by_hand = players(MLP, method, generator_lr=None)
    inner = by_hand.student_optimizer
    for number in range(4):
        with torch.no_grad():
            x = generator(generator.draw(8, torch.Generator().manual_seed(2 * number)))
            t = teacher(x).log_softmax(-1)

        def closure(x=x, t=t):
            inner.zero_grad()
            q = other(x).log_softmax(-1)
            loss = torch.nn.functional.kl_div(q, t, reduction="none", log_target=True).sum(-1).mean()
            loss.backward()
            return loss

        inner.step(closure)
    assert_same(everything(optimizer.student_optimizer, student), everything(inner, other))


# --- the teacher, and what else stays as it was -----------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
def test_the_teacher_is_never_touched(order):
    """Weights, BatchNorm's statistics, gradients, hooks, and the mode of each module."""
    teacher, student, generator, optimizer = players(CONV, SAQ, order=order, generator_sees="theta+e")
    teacher[3].eval()
    teacher[0].weight.requires_grad_(False)
    modes, grads = [m.training for m in teacher.modules()], [p.requires_grad for p in teacher.parameters()]
    before, hooks = copy.deepcopy(teacher.state_dict()), [len(m._forward_pre_hooks) for m in teacher.modules()]
    distill(teacher, student, generator, optimizer, steps=2, rows=8, batchnorm=0.1)
    assert_same(dict(teacher.state_dict()), dict(before))
    assert modes == [m.training for m in teacher.modules()]
    assert grads == [p.requires_grad for p in teacher.parameters()]
    assert hooks == [len(m._forward_pre_hooks) for m in teacher.modules()]
    assert all(p.grad is None for p in teacher.parameters())


def test_the_teacher_answers_in_eval_mode_and_goes_back_after_an_exception():
    teacher, student, generator, optimizer = players(CONV, SAQ)
    seen = []
    teacher[9].register_forward_hook(lambda module, x, y: seen.append(module.training))
    with pytest.raises(ZeroDivisionError):
        distill(
            teacher, student, generator, optimizer, steps=3, rows=8, after_step=lambda game: 1 // (game.iterations - 2)
        )
    assert set(seen) == {False}
    assert all(module.training for module in teacher.modules())


@pytest.mark.parametrize(("method", "order"), [*((m, "student_first") for m in KINDS), (SAQ, "together")], ids=str)
def test_between_iterations_the_model_holds_q_of_w_and_nobody_holds_gradients(method, order):
    teacher, student, generator, optimizer = players(CONV, method, order=order, generator_sees="theta+e")

    def after(game):
        if method.quantizes:
            assert_on_grid(game.student_optimizer)
        assert all(p.grad is None for model in (teacher, student, generator) for p in model.parameters())

    distill(teacher, student, generator, optimizer, steps=2, rows=8, after_step=after)


# --- resuming ---------------------------------------------------------------------------------------------------------


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize(("method", "order"), [*((m, "student_first") for m in KINDS), (SAQ, "together")], ids=str)
def test_resuming_is_as_if_nothing_had_stopped(method, order):
    """Models, SamSga and torch's random state are saved; the student has BatchNorm and dropout."""
    settings = {"order": order, "generator_sees": "theta+e", "generator_lr": 0.05}
    saved = []

    def save(game):
        if game.iterations == 2:
            models = [model.state_dict() for model in (student, generator, game)]
            saved.append(through_a_file((models, torch.get_rng_state())))

    teacher, student, generator, optimizer = players(CONV, method, **settings)
    whole = distill(teacher, student, generator, optimizer, steps=4, rows=8, after_step=save)
    ends = [everything(optimizer.student_optimizer, student) | dict(generator.state_dict())]
    teacher, student, generator, optimizer = players(CONV, method, **settings)
    (models, state), *_ = saved
    for one, loaded in zip((student, generator, optimizer), models, strict=True):
        one.load_state_dict(loaded)
    torch.set_rng_state(state)
    resumed = distill(teacher, student, generator, optimizer, steps=4, rows=8)
    ends += [everything(optimizer.student_optimizer, student) | dict(generator.state_dict())]
    assert_same(*ends)
    assert resumed.history == whole.history
    assert resumed.student_passes == whole.student_passes
    assert resumed.generator_passes == whole.generator_passes


def rates_of(game):
    return [group["lr"] for one in (game.student_optimizer, game.generator_optimizer) if one is not None
            for group in one.param_groups]  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"order": "generator_first"}, r"another game: order is 'student_first' there and 'generator_first' here\."),
        ({"seed": 7}, r"another game: seed is 0 there and 7 here\. Build SamSga with the same settings\."),
        ({"generator_lr": None}, r"the generator is frozen here only: build SamSga with the same `generator_opt"),
        ({"newer": True}, r"the checkpoint has qsam_format 99"),
    ],
)
def test_a_state_of_another_game_is_refused_and_changes_nothing(settings, message):
    teacher, student, generator, optimizer = players(MLP, SAQ)
    distill(teacher, student, generator, optimizer, steps=2, rows=8)
    state = through_a_file(optimizer.state_dict())
    if "newer" in settings:
        state["student"]["param_groups"][0]["qsam_format"] = 99
        state["generator"]["param_groups"][0]["lr"] = 7.0
        settings = {}
    _, student, _, other = players(MLP, SAQ, **settings)
    before, rates = everything(other.student_optimizer, student), rates_of(other)
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(state)
    assert_same(everything(other.student_optimizer, student), before)
    assert rates_of(other) == rates
    assert (other.iterations, other.history) == (0, [])


def test_what_is_no_state_is_refused():
    *_, optimizer = players()
    with pytest.raises(TypeError, match=r"must be what SamSga\.state_dict\(\) returned, got list\."):
        optimizer.load_state_dict([])
    with pytest.raises(ValueError, match=r"the checkpoint has no 'counts': it is not a state_dict of SamSga\."):
        optimizer.load_state_dict({"student": {}, "generator": {}})


def test_two_games_with_other_seeds_see_other_z():
    first, second = (end_of(MLP, SAQ, seed=seed)[2] for seed in (0, 1))
    assert first != second


def test_a_frozen_game_needs_no_generator_optimizer_to_resume():
    _, _, generator, optimizer = players(MLP, SAQ, generator_lr=None)
    other = SamSga(optimizer.student_optimizer, None)
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    with pytest.raises(ValueError, match=r"the generator is frozen there only"):
        SamSga(optimizer.student_optimizer, SGD(generator.parameters())).load_state_dict(optimizer.state_dict())
