"""Bits for a budget: the optimum of brute force, sensitivities in closed form, and no trace in the model."""

import builtins
import copy
import itertools
import random
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader

import qsam
from qsam.measure.bit_allocation import _knapsack
from tests.methods import assert_same
from tests.models import BERT, CONV, EVERYWHERE, MLP

pytest.importorskip("scipy", reason="the knapsack is solved by scipy: extra `measure`")


def loss_of(task):
    return lambda model, batch: task.loss(model, batch)


def allocate(budget=4.0, sensitivity="loss", model=None, batches=1, **options):
    data = [MLP.batch(i) for i in range(batches)]
    return qsam.bit_allocation(
        MLP.build() if model is None else model, data, budget, sensitivity, loss_fn=loss_of(MLP), **options
    )


# --- the knapsack -------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_knapsack_is_the_optimum_of_brute_force(data):
    costs, sizes = [], []
    for _ in range(data.draw(st.integers(1, 5))):
        numel, count = data.draw(st.integers(1, 10**7)), data.draw(st.integers(1, 4))
        sizes.append([numel * b for b in (2, 3, 4, 8)[:count]])
        costs.append([data.draw(st.floats(-1, 1)) * 10 ** data.draw(st.floats(-6, 3)) for _ in range(count)])
    least, most = sum(map(min, sizes)), sum(map(max, sizes))
    capacity = data.draw(st.integers(least, most))
    picks = _knapsack(costs, sizes, capacity)

    def total(table, choice):
        return sum(row[i] for row, i in zip(table, choice, strict=True))

    allowed = [c for c in itertools.product(*(range(len(row)) for row in costs)) if total(sizes, c) <= capacity]
    assert total(sizes, picks) <= capacity
    # The solver stops 1e-10 of the largest difference before the optimum.
    widest = max(max(row) - min(row) for row in costs)
    assert total(costs, picks) <= min(total(costs, c) for c in allowed) + 1e-9 * widest


def test_more_budget_never_raises_the_expected_rise_and_is_kept():
    found = [allocate(budget, "fisher", rules=EVERYWHERE) for budget in (2, 2.5, 3, 4, 6, 8, 99)]
    assert all(a.expected_rise >= b.expected_rise for a, b in itertools.pairwise(found))
    assert all(each.average_bits <= each.budget for each in found)
    assert {row.bits for row in found[0].weights} == {2}
    assert {row.bits for row in found[-1].weights} == {8}


# --- the sensitivities --------------------------------------------------------------------------------------------


class TwoQuadratics(nn.Module):
    """The loss of a batch (a, b) is ``sum a * w^2 / 2 + sum b * v^2 / 2 + w_0 v_0``."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.w, self.v = nn.Linear(3, 2, bias=False), nn.Linear(2, 2, bias=False)

    def forward(self, a, b):
        w, v = self.w.weight, self.v.weight
        return SimpleNamespace(loss=(a * w.square()).sum() / 2 + (b * v.square()).sum() / 2 + w[0, 0] * v[0, 0])


def quadratic_batches(count):
    shared = torch.Generator().manual_seed(1)
    batches = []
    for _ in range(count):
        a, b = torch.rand(2, 3, generator=shared), torch.rand(2, 2, generator=shared)
        a[1, 1], b[0, 1] = -4.0 - float(torch.rand(1, generator=shared)), 3.0 + float(torch.rand(1, generator=shared))
        batches.append({"a": a, "b": b})
    return batches


@pytest.mark.parametrize(("count", "subsets"), [(4, 4), (4, 2), (5, 3), (3, 10)])
def test_hessian_is_mean_and_deviation_of_the_largest_eigenvalue_of_each_block(count, subsets):
    batches = quadratic_batches(count)
    found = qsam.bit_allocation(
        TwoQuadratics(), batches, 4, "hessian", rules=EVERYWHERE, subsets=subsets, iterations=100, tolerance=1e-6
    )
    parts = min(subsets, count)
    split = [batches[i * count // parts : (i + 1) * count // parts] for i in range(parts)]
    for row, key, place in zip(found.weights, "ab", [(1, 1), (0, 1)], strict=True):
        tops = torch.stack([torch.stack([batch[key][place] for batch in part]).mean() for part in split]).double()
        expected = tops.mean().abs() + tops.std(correction=0)
        assert row.sensitivity == pytest.approx(float(expected), rel=1e-4)


def test_fisher_is_the_mean_square_of_the_gradient_over_entries_and_batches():
    model, batches = TwoQuadratics(), quadratic_batches(3)
    found = qsam.bit_allocation(model, batches, 4, "fisher", rules=EVERYWHERE)
    w, v, squares = model.w.weight.detach(), model.v.weight.detach(), [[], []]
    for batch in batches:
        for kept, g, other in zip(squares, (batch["a"] * w, batch["b"] * v), (v, w), strict=True):
            g[0, 0] += other[0, 0]
            kept.append(g.square().mean())
    for row, each in zip(found.weights, squares, strict=True):
        assert row.sensitivity == pytest.approx(float(torch.stack(each).mean()), rel=1e-5)


@pytest.mark.parametrize("sensitivity", ["hessian", "fisher"])
def test_the_expected_rise_is_the_sensitivity_times_the_squared_distance(sensitivity):
    model = MLP.build()
    found = allocate(4, sensitivity, model, granularity="per_channel")
    for bits in (2, 4):
        copied = copy.deepcopy(model)
        qsam.quantize_(copied, bits=bits, granularity="per_channel", rules=EVERYWHERE)
        qsam.write_(copied)
        for row in found.weights[:2]:
            w, q = model.get_parameter(row.name), copied.get_parameter(row.name)
            distance = float((w - q).detach().double().square().sum())
            assert row.rises[bits] == pytest.approx(row.sensitivity * distance, rel=1e-9)


def test_loss_is_the_measured_rise_of_one_quantized_weight():
    model, batches = MLP.build(), [MLP.batch(0), MLP.batch(1)]
    found = allocate(4, "loss", model, batches=2)
    base = sum(float(MLP.loss(model, batch).detach()) for batch in batches) / 2
    for row in found.weights:
        assert row.sensitivity is None
        for bits, rise in row.rises.items():
            copied = copy.deepcopy(model)
            qsam.quantize_(copied, activations=None, rules=[(row.name, {"bits": bits}), ("*", None)])
            qsam.write_(copied)
            measured = sum(float(MLP.loss(copied, batch).detach()) for batch in batches) / 2 - base
            assert rise == pytest.approx(measured, abs=1e-6)  # sums of fp32 losses near 1


def test_a_function_that_returns_the_loss_is_one_batch():
    model = MLP.build()
    for sensitivity in ("hessian", "fisher", "loss"):
        one = qsam.bit_allocation(model, lambda: MLP.loss(model, MLP.batch(0)), 4, sensitivity)
        assert str(one) == str(allocate(4, sensitivity, model))


@pytest.mark.parametrize("sensitivity", ["hessian", "loss"])
def test_batches_that_are_dicts_have_the_loss_of_the_model(sensitivity):
    model = BERT.build()
    found = qsam.bit_allocation(
        model, [BERT.batch(0)], "3 bits", sensitivity, rules=qsam.presets.squat_bert, iterations=2
    )
    assert all("layer" in row.name for row in found.weights)
    assert found.average_bits <= 3


# --- what comes out -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "call"),
    [
        (MLP, {}),
        (MLP, {"rules": EVERYWHERE, "weights": "stretched", "granularity": "per_channel", "activations": None}),
        (CONV, {"activation_bits": 4, "init": "absmax", "rules": [("0", {"granularity": "per_group", "group_size": 3})]}),
    ],
)  # fmt: skip
def test_the_rules_give_what_the_call_gives_but_for_the_bits(task, call):
    found = qsam.bit_allocation(task.build(), [task.batch(0)], 5, "loss", loss_fn=loss_of(task), **call)
    ours = qsam.quantize_(task.build(), rules=found.rules)
    theirs = qsam.quantize_(task.build(), **call)
    chosen = {row.name: row.bits for row in found.weights}
    assert {row.name: row.bits for row in ours.quantized} == chosen
    for a, b in zip((*ours.weights, *ours.inputs), (*theirs.weights, *theirs.inputs), strict=True):
        assert type(a.quantizer) is type(b.quantizer)
        if a.quantizer is not None:
            weight = a.name in chosen
            same = ("granularity", "axis", "group_size", "init", *(() if weight else ("bits",)))
            assert [getattr(a.quantizer, n) for n in same] == [getattr(b.quantizer, n) for n in same], a.name
    assert found.size_bytes == ours.size_bytes
    numel = sum(row.numel for row in ours.quantized)
    assert found.average_bits == pytest.approx(sum(row.bits * row.numel for row in ours.quantized) / numel)


@pytest.mark.parametrize("megabytes", [0.0009, 0.001, 0.002])
def test_megabytes_are_those_of_the_whole_model(megabytes):
    found = allocate(f"{megabytes} MB", "fisher", rules=EVERYWHERE)
    coverage = qsam.quantize_(MLP.build(), rules=found.rules)
    assert coverage.size_bytes == found.size_bytes <= megabytes * 1e6
    numel, slack = min(row.numel for row in coverage.quantized), megabytes * 1e6 - coverage.size_bytes
    assert slack < numel or {row.bits for row in found.weights} == {8}, "another weight could have had 8 bits"


def test_bits_that_a_rule_or_a_default_gives_are_kept():
    found = allocate(6, "loss", rules=[("0", {"bits": 5})], bits=(2, 4))
    assert [sorted(row.rises) for row in found.weights] == [[5], [2, 4], [8]]
    assert [row.bits for row in found.weights][::2] == [5, 8]


def test_the_table_and_the_plot_show_every_weight(tmp_path):
    found = allocate(4, "fisher")
    lines = str(found).splitlines()
    assert lines[0].startswith(f"{found.average_bits:.3f} bits on average") and "(budget 4)" in lines[0]
    assert [line.split()[0] for line in lines[2:]] == ["0.weight", "2.weight", "4.weight"]
    assert [int(line.split()[-1]) for line in lines[2:]] == [row.bits for row in found.weights]
    pytest.importorskip("matplotlib")
    found.plot(tmp_path / "bits.png")
    assert (tmp_path / "bits.png").stat().st_size > 1000


def test_progress_is_told_evaluation_by_evaluation():
    told = []
    allocate(4, "loss", batches=2, progress=lambda done, total: told.append((done, total)))
    count = 2 * (1 + 4 + 4 + 1)  # batches, the model as it is, two weights with four choices, and the head
    assert told == [(i, count) for i in range(1, count + 1)]


# --- no trace -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("sensitivity", ["hessian", "fisher", "loss"])
def test_the_model_is_left_as_it_was(sensitivity, mode, fails):
    model = CONV.build().train(mode)
    CONV.loss(model, CONV.batch(5)).backward()
    calls = []

    def loss_fn(model, batch):
        model.train()  # a loss may do that
        calls.append(1)
        if fails and len(calls) == 2:
            raise KeyError("in the loss")
        return CONV.loss(model, batch)

    def traces():
        kept = {name: value.clone() for name, value in model.state_dict().items()}
        kept |= {f"{name}.grad": p.grad.clone() for name, p in model.named_parameters()}
        kept["rng"] = torch.get_rng_state()
        return kept, [(id(p), id(p.grad), p.data_ptr()) for p in model.parameters()], [*model.modules()]

    rows = [CONV.batch(i) for i in range(3)]
    before, modes, numbers = traces(), [m.training for m in model.modules()], random.getstate()
    loader = DataLoader(rows, batch_size=None, shuffle=True)
    try:
        qsam.bit_allocation(model, loader, 4, sensitivity, loss_fn=loss_fn, iterations=3, rules=EVERYWHERE)
        assert not fails
    except KeyError:
        assert fails
    after = traces()
    assert_same(before[0], after[0])
    assert before[1:] == after[1:]
    assert (modes, numbers) == ([m.training for m in model.modules()], random.getstate())
    assert qsam.coverage_of(model) is None


# --- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sensitivity": "hesian"}, ValueError, "must be one of hessian, fisher, loss, got 'hesian'. Did you mean 'hess"),
        ({"budget": "2.5 GB"}, ValueError, r"average \(3\.0 or '3 bits'\) or megabytes .* got '2\.5 GB'"),
        ({"budget": None}, TypeError, "`budget` must be bits of an entry on average .* got None"),
        ({"budget": float("nan")}, ValueError, "`budget` must be finite and > 0, got nan"),
        ({"budget": 1.9}, ValueError, r"1\.9 is below the smallest possible, 2\.783 bits \(1 of 3 weights have bits of"),
        ({"budget": "0.0001 MB"}, ValueError, r"'0\.0001 MB' is below the smallest possible, 0\.0002\d+ MB"),
        ({"bits": ()}, ValueError, r"`bits` must be distinct integers in \[2, 8\], .* got \(\)"),
        ({"bits": (2, 2)}, ValueError, "`bits` must be distinct integers"),
        ({"bits": (1, 4)}, ValueError, r"`bits` must be an integer in \[2, 8\]"),
        ({"subsets": 0}, ValueError, "`subsets` must be an integer >= 1"),
        ({"iterations": 1}, ValueError, "`iterations` must be an integer >= 2"),
        ({"tolerance": 0.0}, ValueError, "`tolerance` must be finite and > 0"),
        ({"granularty": "per_channel"}, TypeError, "no argument 'granularty'. Did you mean 'granularity'"),
        ({"spec": "x"}, TypeError, "no argument 'spec'"),
        ({"rules": [("nowhere", {})]}, ValueError, "matches no parameter"),
        ({"rules": [("*", {"weights": "identity", "activations": None})]}, ValueError, "no bits to allocate"),
        ({"batches": 0}, ValueError, "`batches` is empty: bit_allocation needs at least one batch"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(options, error, message):
    model = MLP.build()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        allocate(**{"model": model, **options})
    assert_same(before, model.state_dict())


def test_sensitivities_that_are_not_finite_name_the_weight():
    model = MLP.build()
    for sensitivity in ("hessian", "fisher", "loss"):
        with pytest.raises(ValueError, match=r"the sensitivity of '0\.weight' is nan: look for NaN"):
            qsam.bit_allocation(model, lambda: MLP.loss(model, MLP.batch(0)) * float("nan"), 4, sensitivity)


def test_weights_without_gradient_are_measured_by_the_loss_alone():
    model = MLP.build()
    model[2].weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"'2\.weight' does not require a gradient.*take sensitivity='loss'"):
        allocate(4, "fisher", model)
    assert len(allocate(4, "loss", model).weights) == 3


def test_losses_that_cannot_be_measured_are_refused():
    model = MLP.build()

    def closure():
        loss = MLP.loss(model, MLP.batch(0))
        loss.backward()
        return loss

    for sensitivity in ("hessian", "fisher"):
        with pytest.raises(RuntimeError, match=r"called backward\(\)"):
            qsam.bit_allocation(model, closure, 4, sensitivity)
    with pytest.raises(ValueError, match="`loss_fn` belongs to batches"):
        qsam.bit_allocation(model, closure, 4, loss_fn=loss_of(MLP))
    with pytest.raises(TypeError, match="`batches` must be an iterable"):
        qsam.bit_allocation(model, 3, 4)
    with pytest.raises(TypeError, match=r"give `loss_fn`, \(model, batch\) -> loss"):
        qsam.bit_allocation(model, [torch.zeros(2, 8)], 4)
    with pytest.raises(TypeError, match=r"model\(\*\*batch\) has no loss"):
        qsam.bit_allocation(model, [{"input": torch.zeros(2, 8)}], 4)


def test_a_model_that_is_quantized_already_is_refused_with_the_cure():
    model = MLP.quantized()
    with pytest.raises(RuntimeError, match=r"call qsam\.dequantize_\(model, optimizer\) first"):
        allocate(model=model)
    qsam.dequantize_(model)
    allocate(model=model)
    with pytest.raises(TypeError, match=r"`model` must be a torch\.nn\.Module, got int"):
        allocate(model=3)


def test_without_scipy_the_extra_is_named(monkeypatch):
    real = builtins.__import__

    def without(name, *rest):
        if name.startswith("scipy"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"bit_allocation needs scipy.*extra measure"):
        allocate()
