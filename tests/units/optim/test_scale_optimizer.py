"""The scales' rates: the rule that balances them, and the optimizer that keeps them positive."""

import copy
import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed import checkpoint
from torch.optim import SGD, Adam, AdamW, RMSprop
from torch.optim.lr_scheduler import CyclicLR, LambdaLR, LinearLR, OneCycleLR
from torch.optim.swa_utils import SWALR

import qsam
from qsam.optim import QAT
from qsam.optim.scale_optimizer import MAX_RELATIVE_STEP, BalancedSGD
from tests.methods import assert_same, everything, latents, scales_of, train
from tests.models import BERT, CONV, MLP


def rates(optimizer):
    return {group["qsam_scales"]: group["lr"] for group in optimizer.param_groups if "qsam_scales" in group}


def rms(model):
    weights = torch.cat(
        [p.detach().flatten() for name, p in model.named_parameters() if p.dim() > 1 and "quantizer" not in name]
    )
    return float(weights.double().square().mean().sqrt())


@pytest.mark.parametrize(("task", "base"), [(MLP, Adam), (CONV, AdamW), (MLP, RMSprop)], ids=str)
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


def test_a_given_rate_may_go_with_another_optimizer_without_decay():
    """Weight decay would shrink the grid."""
    model = MLP.quantized()
    optimizer = QAT(model, SGD, lr=0.0, scale_lr=1e-3, scale_optimizer=AdamW)
    assert [group["weight_decay"] for group in optimizer.scale_base.param_groups] == [0.0, 0.0]
    before = {name: s.clone() for name, s in scales_of(model).items()}
    train(optimizer, model, MLP, 1)
    for name, s in scales_of(model).items():  # Adam's first step is lr, whatever the gradient
        assert abs(abs(float(s - before[name])) - 1e-3) < 1e-5


@pytest.mark.parametrize("granularity", [pytest.param("per_tensor", marks=pytest.mark.long), "per_channel"])
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
    moved_s = torch.cat([(t - s[name]).flatten() for name, t in scales_of(model).items() if name in s])
    size = torch.cat([t.flatten() for t in s.values()])
    steps = moved_s[size > 0] / size[size > 0]  # the row of the padding token is zeros, and has no scale
    relative_s = float(steps.square().mean().sqrt())
    assert 1 / 4 < relative_s / relative_w < 4


@pytest.mark.parametrize(
    ("cls", "base", "options"), [(QAT, AdamW, {"lr": 10.0}), (qsam.SQuAT, SGD, {"lr": 100.0, "momentum": 0.9})]
)
def test_scales_stay_positive_at_an_absurd_rate_of_the_base(cls, base, options):
    model = MLP.quantized()
    optimizer = cls(model, base, **options)
    before = {name: s.clone() for name, s in scales_of(model).items()}
    train(optimizer, model, MLP, 2)
    for name, s in scales_of(model).items():
        assert bool((s > 0).all())
        assert bool(((s / before[name] - 1).abs() <= 2.1 * MAX_RELATIVE_STEP).all())


# --- a balanced rate follows the base -----------------------------------------------------------------------------


def written_by_hand(optimizer):
    """A user's own schedule, as most scripts write it: one number into every group."""
    lrs = iter([1e-4, 0.0, 3e-4, 1e-3, 2e-4, 1e-4, 1e-4, 1e-4])

    def step():
        for group in optimizer.param_groups:
            group["lr"] = next_lr

    next_lr = next(lrs)

    class Schedule:
        def step(self):
            nonlocal next_lr
            next_lr = next(lrs)
            step()

    step()
    return Schedule()


SCHEDULES = {
    "from 0": lambda o: LambdaLR(o, lambda step: step / 4),
    "warm-up": lambda o: LinearLR(o, 0.1, 1.0, 3),
    "one-cycle": lambda o: OneCycleLR(o, max_lr=1e-3, total_steps=8),
    "cyclic": lambda o: CyclicLR(o, base_lr=1e-5, max_lr=1e-3, step_size_up=2, cycle_momentum=False),
    "swa": lambda o: SWALR(o, swa_lr=5e-4, anneal_epochs=3),
    "by hand": written_by_hand,
}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("base", [AdamW, SGD], ids=lambda base: base.__name__)
def test_whatever_writes_the_weights_rate_a_balanced_scale_keeps_pace(name, base):
    """Every step is taken at ``balance * lr``, also where the schedule writes absolute rates into all groups."""
    model = MLP.quantized()
    balance = 1.0 if base is SGD else 1 / rms(model)
    optimizer = QAT(model, base, lr=1e-3)
    schedule = SCHEDULES[name](optimizer)
    seen = set()
    for i in range(5):
        lr, momentum = optimizer.param_groups[0]["lr"], optimizer.param_groups[0].get("momentum", 0.0)
        train(optimizer, model, MLP, 1, start=i)
        expected = min(balance * lr, MAX_RELATIVE_STEP) if base is AdamW else lr / (1 - momentum)
        assert rates(optimizer) == {kind: pytest.approx(expected, rel=1e-5, abs=0) for kind in ("weights", "inputs")}
        assert {group["lr"] for group in optimizer.scale_base.param_groups} == set(rates(optimizer).values())
        seen.add(lr)
        schedule.step()
    assert len(seen) > 2


@pytest.mark.parametrize("base", [AdamW, SGD], ids=lambda base: base.__name__)
def test_a_base_that_was_at_the_start_of_its_warm_up_when_it_was_wrapped(base):
    """A scheduler of the base itself goes on to drive both, and rates of 0 are not for good."""
    model = MLP.quantized()
    own = [p for name, p in model.named_parameters() if "quantizer" not in name]
    inner = base(own, lr=1e-3)
    scheduler = LambdaLR(inner, lambda step: step / 4)
    assert inner.param_groups[0]["lr"] == 0
    initial = 1e-3 * (1.0 if base is SGD else 1 / rms(model))
    optimizer = QAT(model, inner)
    before = {name: s.clone() for name, s in scales_of(model).items()}
    for i in range(5):
        train(optimizer, model, MLP, 1, start=i)
        assert rates(optimizer)["weights"] == pytest.approx(min(initial * i / 4, MAX_RELATIVE_STEP), rel=1e-5)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch: the scheduler does not see the base's step
            scheduler.step()
    assert all(bool((s != before[name]).all()) for name, s in scales_of(model).items())
    # A scheduler that takes over in mid-run reads where every group began.
    assert [group["initial_lr"] for group in optimizer.param_groups] == pytest.approx(
        [1e-3, initial, initial], rel=1e-5
    )
    LambdaLR(optimizer, lambda step: 1.0, last_epoch=4)


@pytest.mark.parametrize("base", [AdamW, SGD], ids=lambda base: base.__name__)
def test_groups_enter_with_their_own_rates_weighted_by_their_entries(base):
    model = MLP.quantized()
    first, second = ({"params": [model[i].weight, model[i].bias], "lr": lr} for i, lr in ((0, 1e-3), (2, 3e-3)))
    third = {"params": [model[4].weight, model[4].bias], "lr": 0.0}
    n, size = [model[i].weight.numel() for i in (0, 2, 4)], rms(model)
    optimizer = QAT(model, base, params=[first, second, third], lr=1.0)

    def expected(lrs):
        if base is SGD:
            return sum(lr * k for lr, k in zip(lrs, n, strict=True)) / sum(n)
        return math.sqrt(sum(lr**2 * k for lr, k in zip(lrs, n, strict=True)) / sum(n)) / size

    for lrs in ([1e-3, 3e-3, 0.0], [1e-5, 2e-4, 1e-4]):
        for group, lr in zip(optimizer.param_groups[:3], lrs, strict=True):
            group["lr"] = lr
        train(optimizer, model, MLP, 1)
        assert rates(optimizer)["inputs"] == pytest.approx(min(expected(lrs), MAX_RELATIVE_STEP), rel=1e-5)


def test_a_rate_that_was_given_is_taken_as_it_is_and_schedulers_and_users_act_on_it():
    assert rates(QAT(MLP.quantized(), AdamW, scale_lr=0.25)) == {"weights": 0.25, "inputs": 0.25}
    model = MLP.quantized()
    optimizer = QAT(model, AdamW, lr=1e-3, scale_lr=(0.25, 0.5))
    schedule = LambdaLR(optimizer, lambda step: 1 / (1 + step))
    for i in range(3):
        train(optimizer, model, MLP, 1, start=i)
        assert rates(optimizer) == {"weights": 0.25 / (1 + i), "inputs": 0.5 / (1 + i)}
        schedule.step()
    for group in optimizer.param_groups:
        group["lr"] = 0.125
    train(optimizer, model, MLP, 1)
    assert rates(optimizer) == {"weights": 0.125, "inputs": 0.125}
    assert [group["lr"] for group in optimizer.scale_base.param_groups] == [0.125, 0.125]


def test_the_balance_is_taken_again_when_the_latents_are_others():
    model = MLP.quantized()
    optimizer = QAT(model, AdamW, lr=1e-4)
    with torch.no_grad():
        for slot in optimizer._latents.slots:
            slot.parameter.mul_(8)
    optimizer.sync_latents()
    size = torch.cat([slot.latent.detach().double().flatten() for slot in optimizer._latents.slots])
    assert rates(optimizer)["weights"] == pytest.approx(1e-4 / float(size.square().mean().sqrt()), rel=1e-5)


@pytest.mark.parametrize("size", [1e-30, 1e25])
def test_the_size_of_the_weights_may_be_anything(size):
    """rms(w) of 1e-25, whose square fp32 does not have."""
    model = nn.Linear(8, 8, bias=False)
    with torch.no_grad():
        model.weight.copy_(size * torch.randn(8, 8))
    expected = 1 / float(model.weight.detach().double().square().mean().sqrt())
    qsam.quantize_(model, activations=None, rules=[("*", {})])
    optimizer = QAT(model, AdamW, lr=1e-3 * size)
    assert optimizer.param_groups[1]["qsam_balance"] == pytest.approx(expected, rel=1e-5)


# --- weights that begin at zero -----------------------------------------------------------------------------------


def zeros():
    """Return a model whose only quantized weights are zero, as in a probe or a zero-initialised adapter."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    nn.init.zeros_(model[2].weight)
    qsam.quantize_(model, activations=None, rules=[("0.*", None), ("*", {"bits": 8})])
    return model


def test_weights_of_zeros_have_no_rate_yet_and_get_one_when_they_come_alive():
    """Then lr / rms(w), taken again after 1, 2, 4, 8 ... steps, for at first they are as small as one step."""
    model = zeros()
    still = QAT(model, AdamW, lr=0.0)
    train(still, model, MLP, 2)
    assert (still.param_groups[1]["lr"], still.param_groups[1]["qsam_balance"]) == (0.0, 0.0)
    still.release()
    optimizer = QAT(model, AdamW, lr=1e-5, weight_decay=0.0)
    group = optimizer.param_groups[1]
    assert (group["lr"], group["qsam_balance"]) == (0.0, 0.0)
    taken = []
    for i in range(9):
        before = group["qsam_balance"]
        train(optimizer, model, MLP, 1, start=i)
        if group["qsam_balance"] != before:
            taken.append(i)
            w = optimizer._latents.slots[0].latent.detach().double()
            assert group["qsam_balance"] == pytest.approx(1 / float(w.square().mean().sqrt()), rel=1e-5)
        assert group["lr"] == pytest.approx(min(1e-5 * group["qsam_balance"], MAX_RELATIVE_STEP))
    assert taken == [0, 1, 2, 4, 8]


@pytest.mark.parametrize("stop", [0, 3])
def test_resuming_a_run_that_began_at_zero_is_as_if_nothing_had_stopped(stop):
    ends = []
    for stopped in (False, True):
        model = zeros()
        optimizer = QAT(model, AdamW, lr=1e-3)
        train(optimizer, model, MLP, stop)
        if stopped:
            saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
            model = zeros()
            optimizer = QAT(model, AdamW, lr=1e-3)
            model.load_state_dict(saved[0])
            optimizer.load_state_dict(saved[1])
        train(optimizer, model, MLP, 9 - stop, start=stop)
        ends.append(everything(optimizer, model) | {"balance": torch.tensor(optimizer.param_groups[1]["qsam_balance"])})
    assert_same(*ends)


# --- files --------------------------------------------------------------------------------------------------------


def as_written_before(state, normalized):
    """Return an optimizer's state in the form that it had before balance and root were kept."""
    state = copy.deepcopy(state)
    for group in state["param_groups"]:
        for key in ("qsam_balance", "qsam_balance_due", "qsam_scale_class"):
            group.pop(key, None)
    for entry in state["state"].values() if normalized else ():
        for prefix in ("", "qsam_scale_"):
            if f"{prefix}root" in entry:
                entry[f"{prefix}square"] = entry.pop(f"{prefix}root").square() * (1 - 0.999)
    return state


@pytest.mark.parametrize("base", [AdamW], ids=lambda base: base.__name__)
def test_a_file_from_before_the_balance_was_kept_goes_on_at_its_own_rates(base):
    model = MLP.quantized()
    optimizer = QAT(model, base, lr=1e-3)
    scheduler = LambdaLR(optimizer, lambda step: 1 / (1 + step))
    for i in range(3):
        train(optimizer, model, MLP, 1, start=i)
        scheduler.step()
    older = as_written_before(optimizer.state_dict(), normalized=base is AdamW)
    model_state = copy.deepcopy(model.state_dict())
    other = MLP.quantized()
    with torch.no_grad():
        other[0].weight.mul_(4)  # the weights of this construction are not those of the file
    resumed = QAT(other, base, lr=1e-3)
    other.load_state_dict(model_state)
    resumed.load_state_dict(older)
    for i in range(3, 5):
        for o, m in ((optimizer, model), (resumed, other)):
            train(o, m, MLP, 1, start=i)
        assert rates(resumed) == pytest.approx(rates(optimizer), rel=1e-6)
    found, expected = latents(resumed, other), latents(optimizer, model)
    assert all(torch.allclose(found[name], expected[name], rtol=1e-4, atol=1e-6) for name in found)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_distributed_checkpoint_from_before_loads_with_a_planner_that_allows_missing_entries(tmp_path):
    """Its latents and moments come, and what it lacks stays as it was made here."""
    model, other = MLP.quantized(), MLP.quantized()
    optimizer, resumed = QAT(model, AdamW, lr=1e-3), QAT(other, AdamW, lr=1e-3)
    train(optimizer, model, MLP, 3)
    train(resumed, other, MLP, 1)
    balance = resumed.param_groups[1]["qsam_balance"]
    checkpoint.save(as_written_before(optimizer.state_dict(), normalized=True), checkpoint_id=tmp_path, no_dist=True)
    state = resumed.state_dict()
    planner = checkpoint.DefaultLoadPlanner(allow_partial_load=True)
    checkpoint.load(state, checkpoint_id=tmp_path, planner=planner, no_dist=True)
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(state)
    assert_same(latents(resumed, other), latents(optimizer, model))
    assert (resumed.steps, resumed.param_groups[1]["qsam_balance"]) == (3, balance)
    train(resumed, other, MLP, 2)


@pytest.mark.parametrize(
    ("saving", "loading", "older"), [({}, {"scale_lr": 0.1}, False), ({"scale_lr": 0.1}, {}, True)]
)
def test_a_file_of_another_rule_of_the_scales_is_refused_and_changes_nothing(saving, loading, older):
    """Its scales' state and settings are those of another optimizer."""
    model = MLP.quantized()
    optimizer = QAT(model, AdamW, lr=1e-3, **saving)
    train(optimizer, model, MLP, 2)
    state = optimizer.state_dict()
    if older:
        state = as_written_before(state, normalized=True)
    other = MLP.quantized()
    refusing = QAT(other, AdamW, lr=1e-3, **loading)
    before = everything(refusing, other)
    message = r"scales were stepped by (\w+|another optimizer), and are by (SGD|BalancedSGD) here: give `scale_lr`"
    with pytest.raises(ValueError, match=message):
        refusing.load_state_dict(state)
    assert_same(everything(refusing, other), before)


# --- BalancedSGD alone --------------------------------------------------------------------------------------------


def scale(*values):
    return nn.Parameter(torch.tensor(values))


@pytest.mark.parametrize("size", [1e-45, 1e-38, 1e-22, 1.0, 1e18, 1e36])
def test_the_first_normalized_step_is_the_rate_times_the_entry_for_any_gradient(size):
    """From the smallest number that fp32 has: no square of a gradient is taken outside of [0, 1]."""
    s = scale(1.0, 8.0)
    s.grad = torch.tensor([size, -size])
    BalancedSGD([s], lr=0.004).step()
    assert torch.allclose(s.detach(), torch.tensor([0.996, 8.032]), rtol=2 * torch.finfo(torch.float32).eps, atol=0)


@settings(max_examples=60)
@given(st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=8), st.integers(-120, 60))
def test_the_average_of_squares_is_that_of_double_precision(gradients, exponent):
    """v = (1 - b) sum_i b^(t - i) ds_i^2, here in fp64 where nothing underflows."""
    gradients = [math.ldexp(g, exponent) if abs(g) > 1e-2 else 0.0 for g in gradients]
    s, v = scale(1.0), 0.0
    optimizer = BalancedSGD([s], lr=1e-3)
    for t, g in enumerate(gradients, start=1):
        s.grad = torch.tensor([g])
        before = s.detach().double().clone()
        optimizer.step()
        v = 0.999 * v + 0.001 * g * g
        expected = 1e-3 * g / math.sqrt(v / (1 - 0.999**t)) if v else 0.0
        expected = max(min(expected, MAX_RELATIVE_STEP), -MAX_RELATIVE_STEP)
        eps = torch.finfo(torch.float32).eps  # one rounding of s, and a few of the step
        assert float((before - s.detach().double()) / before) == pytest.approx(expected, rel=8 * t * eps, abs=2 * eps)


def test_a_state_of_squares_from_an_older_file_goes_on_as_its_root():
    s, t = scale(1.0, 8.0), scale(1.0, 8.0)
    older, newer = BalancedSGD([s], lr=0.004), BalancedSGD([t], lr=0.004)
    for gradient in ([1.0, -2.0], [0.5, 3.0]):
        t.grad = torch.tensor(gradient)
        newer.step()
    state = newer.state_dict()
    root = state["state"][0].pop("root")
    state["state"][0]["square"] = root.square() * (1 - 0.999)
    older.load_state_dict(state)
    assert torch.allclose(older.state[s]["root"], root, rtol=4 * torch.finfo(torch.float32).eps, atol=0)
    assert set(older.state[s]) == {"step", "root"}


def test_no_step_is_longer_than_a_hundredth_of_the_entry():
    for normalized in (True, False):
        s = scale(1.0, 2.0)
        s.grad = torch.tensor([1.0, -1.0])
        BalancedSGD([s], lr=1e6, normalized=normalized).step()
        assert torch.allclose(s.detach(), torch.tensor([0.99, 2.02]), rtol=2 * torch.finfo(torch.float32).eps, atol=0)


def test_without_normalization_it_is_plain_descent_and_an_entry_without_gradient_stays():
    s, t, u = scale(1.0), scale(1.0), scale(2.0)
    s.grad, u.grad = torch.tensor([0.125]), torch.tensor([0.0])
    assert BalancedSGD([s, t, u], lr=0.03125, normalized=False).step(lambda: 3.0) == 3.0
    assert (s.item(), t.item(), u.item()) == (1.0 - 0.03125 * 0.125, 1.0, 2.0)
    u.grad = torch.tensor([0.0])
    BalancedSGD([u], lr=0.01).step()
    assert u.item() == 2.0


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
