"""Options of a step in pairs and more, drawn together, against a slow twin that writes the step out pass by pass.

Method, schedule, ``every``, ``start``, direction, ``reuse``, closure or blocks by hand, micro-batches, and an exception
of any type in any pass: the losses, latents, scales and the optimizer's step number are the twin's, bit for bit.
"""

import dataclasses
import functools

import pytest
import torch
from hypothesis import event, given
from hypothesis import strategies as st
from torch.optim import SGD, AdamW

import qsam
from qsam import coverage_of
from tests.models import MLP
from tests.optim.methods import assert_on_grid, assert_same, latents, scales_of
from tests.reference.any_step import AnyStep, Options
from tests.reference.in_graph import Grid

STEPS = 4
BASES = {AdamW: {"lr": 1e-3, "weight_decay": 0.1}, SGD: {"lr": 0.05, "momentum": 0.9}}
CLASSES = {"qat": qsam.QAT, "saq": qsam.SAQ, "joint": qsam.JointSAM, "squat": qsam.SQuAT}
DIRECTIONS = ["sam", "asam", "grid", "friendly", "random", "previous", "momentum"]
ERRORS = [KeyError, RuntimeError, torch.OutOfMemoryError, ValueError, KeyboardInterrupt]


@dataclasses.dataclass(frozen=True)
class Fault:
    """An exception in one pass of one step."""

    step: int
    call: int
    error: type[BaseException]
    after_backward: bool


@st.composite
def option_sets(draw):
    method = draw(st.sampled_from(["saq", "squat", "squat", "joint", "qat"]))
    if method == "qat":
        return Options(method)
    schedule = draw(st.sampled_from(["same_batch", "next_batch", "fused"])) if method == "squat" else ""
    directions = DIRECTIONS[:5] if schedule == "fused" else DIRECTIONS
    return Options(
        method,
        schedule,
        case=draw(st.sampled_from([1, 3])) if method == "saq" else 3,
        direction=draw(st.sampled_from(directions)),
        every=draw(st.integers(1, 3)),
        start=draw(st.integers(0, 2)),
        reuse=draw(st.booleans()),
        normalize=draw(st.booleans()),
        period=draw(st.integers(1, 2)) if schedule else 1,
    )


@st.composite
def runs(draw):
    """Return options, whether the passes are blocks by hand, the number of micro-batches, the base, and faults."""
    options = draw(option_sets())
    by_hand = draw(st.booleans())
    several = not (by_hand and options.schedule == "fused")  # there the scales step from one micro-batch
    micro_batches = draw(st.integers(1, 3 if several else 1))
    faults = st.builds(Fault, st.integers(0, STEPS - 1), st.integers(1, 3), st.sampled_from(ERRORS), st.booleans())
    return options, by_hand, micro_batches, draw(st.sampled_from(list(BASES))), draw(st.lists(faults, max_size=1))


def build(options, base, **settings):
    """Return the optimizer with its model, and the twin on the same grids."""
    model = MLP.quantized(bits=3)
    coverage = coverage_of(model)
    weights = {row.name: grid_of(row.quantizer) for row in coverage.quantized}
    inputs = {row.name: grid_of(row.quantizer) for row in coverage.inputs}
    twin = AnyStep(MLP.build(), weights, inputs, base, BASES[base], options=options, rho=0.2, **settings)
    given = {} if options.method == "qat" else {
        "rho": 0.2, "direction": options.direction, "every": options.every, "start": options.start,
        "reuse": "perturbation" if options.reuse else None, "normalize_weights": options.normalize,
    }  # fmt: skip
    given |= {"case": options.case} if options.method == "saq" else {}
    given |= {"schedule": options.schedule, "period": options.period} if options.schedule else {}
    return CLASSES[options.method](model, base, **BASES[base], **given, **settings), model, twin


def grid_of(quantizer):
    scale = quantizer.scale.detach().clone().requires_grad_()
    return Grid(quantizer.quant_min, quantizer.quant_max, scale)


class Loop:
    """One step after the other, with a closure over all micro-batches or with the blocks by hand."""

    def __init__(self, optimizer, model, fault):
        self.optimizer, self.model, self.fault, self.calls = optimizer, model, fault, 0

    def run(self, batch):
        """Run forward and backward, and fail in between or after if it is time to."""
        self.calls += 1
        failing = self.fault is not None and self.fault.call == self.calls
        if failing and not self.fault.after_backward:
            raise self.fault.error("mine")
        loss = loss_of(self.model, batch)
        loss.backward()
        if failing:
            raise self.fault.error("mine")
        return loss

    def closure(self, batch):
        self.optimizer.zero_grad()
        return self.run(batch)

    def by_hand(self, batches):
        optimizer = self.optimizer
        optimizer.zero_grad()
        for batch in batches:
            for number, block in enumerate(optimizer.blocks):
                if number and optimizer.scales_due:
                    optimizer.step_scales()
                with getattr(optimizer, block)():
                    self.run(batch)
        optimizer.step()
        if getattr(optimizer, "schedule", "") == "same_batch" and optimizer.scales_due:
            for batch in batches:
                with optimizer.scale_phase():
                    self.run(batch)
            optimizer.step()


def loss_of(forward, batches):
    """Return the loss of one micro-batch, or of several as one batch."""
    losses = [MLP.loss(forward, batch) for batch in (batches if isinstance(batches, list) else [batches])]
    return sum(losses[1:], losses[0])


@given(runs())
def test_a_step_is_its_twin_whatever_its_options_are_together(run):
    options, by_hand, micro_batches, base, faults = run
    options = dataclasses.replace(options, by_hand=by_hand)
    # With micro-batches by hand ds is a sum of sums, which rounds in another order: the scales are held.
    settings = {"scale_lr": 0.0} if by_hand and micro_batches > 1 else {}
    optimizer, model, twin = build(options, base, **settings)
    event(f"{options.method} {'by hand' if by_hand else 'closure'}")
    for step in range(STEPS):
        batches = [MLP.batch(10 * step + i) for i in range(micro_batches)]
        fault = next((f for f in faults if f.step == step), None)
        loop = Loop(optimizer, model, fault)
        calls = 0
        try:
            loop.by_hand(batches) if by_hand else optimizer.step(functools.partial(loop.closure, batches))
        except BaseException as error:
            assert fault is not None and type(error) is fault.error and error.args == ("mine",)
            calls = loop.calls
        fail_at = fault.call if calls else None
        twin.step(loss_of, batches if by_hand else [batches], fail_at)
        assert loop.calls == twin.calls, "as often as the twin, and never again after an exception"
        assert_equal(optimizer, model, twin)


def assert_equal(optimizer, model, twin):
    assert_on_grid(optimizer)
    assert optimizer.steps == twin.steps
    assert all(p.grad is None for p in model.parameters()) or optimizer._set_aside == []
    assert_same(latents(optimizer, model), {name: w.detach() for name, w in twin.parameters.items()})
    scales = {f"{name}_quantizer.scale": grid.scale.detach() for name, grid in twin.weights.items()}
    scales |= {f"{name}.input_quantizer.scale": grid.scale.detach() for name, grid in twin.inputs.items()}
    assert_same(scales_of(model), scales)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_reuse_takes_the_last_perturbation_of_every_direction_again(direction):
    """The pair of ``reuse`` with a direction whose tensors the base, or the memory, goes on to change."""
    options = Options("saq", direction=direction, every=2, reuse=True, start=1, normalize=True)
    optimizer, model, twin = build(options, AdamW)
    for step in range(STEPS):
        batch = [MLP.batch(step)]
        optimizer.step(lambda batch=batch: Loop(optimizer, model, None).closure(batch))
        twin.step(loss_of, [batch])
        assert_equal(optimizer, model, twin)
