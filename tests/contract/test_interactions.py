"""Options of a step in pairs and more, drawn together, against a slow twin that writes the step out pass by pass.

Method, schedule, ``every``, ``start``, direction, ``reuse``, ``perturb``, ``ste``, ``max_grad_norm``, closure or blocks by
hand, micro-batches, an exception of any type in any pass, and a new start from a checkpoint or a copy: the latents, scales
and the optimizer's step number are the twin's, bit for bit.
"""

import copy
import dataclasses
import functools
import io
import pickle

import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st
from torch.optim import SGD, AdamW

import qsam
from qsam import coverage_of
from tests.methods import assert_on_grid, assert_same, latents, scales_of
from tests.models import MLP
from tests.reference.any_step import AnyStep, Options
from tests.reference.in_graph import Grid

STEPS = 4
BASES = {AdamW: {"lr": 1e-3, "weight_decay": 0.1}, SGD: {"lr": 0.05, "momentum": 0.9}}
CLASSES = {"qat": qsam.QAT, "sam": qsam.SAM, "saq": qsam.SAQ, "joint": qsam.JointSAM, "squat": qsam.SQuAT}
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
    method = draw(st.sampled_from(["saq", "squat", "squat", "sam", "joint", "qat"]))
    ste = draw(st.sampled_from(["clipped", "identity"]))
    if method == "qat":
        return Options(method, ste=ste)
    schedule = draw(st.sampled_from(["same_batch", "next_batch", "fused"])) if method == "squat" else ""
    everywhere = method == "sam" or draw(st.booleans())
    directions = [d for d in DIRECTIONS if not (everywhere and d == "grid")]  # a float parameter has no step size
    if schedule == "fused":
        directions = [d for d in directions if d not in ("previous", "momentum")]
    return Options(
        method,
        schedule,
        case=draw(st.sampled_from([1, 3])) if method == "saq" and ste == "clipped" else 3,
        ste=ste,
        everywhere=everywhere,
        direction=draw(st.sampled_from(directions)),
        every=draw(st.integers(1, 3)),
        start=draw(st.integers(0, 2)),
        reuse=draw(st.booleans()),
        normalize=draw(st.booleans()),
        period=draw(st.integers(1, 2)) if schedule else 1,
    )


@st.composite
def runs(draw):
    """Return options, whether the passes are blocks by hand, the number of micro-batches, the base, and what happens.

    What happens: at most one fault, a norm to clip to, and a step before which another process goes on.
    """
    options = draw(option_sets())
    by_hand = draw(st.booleans())
    several = not (by_hand and options.schedule == "fused")  # there the scales step from one micro-batch
    micro_batches = draw(st.integers(1, 3 if several else 1))
    faults = st.builds(Fault, st.integers(0, STEPS - 1), st.integers(1, 3), st.sampled_from(ERRORS), st.booleans())
    base = draw(st.sampled_from(list(BASES)))
    new_start = st.none() | st.tuples(st.integers(0, STEPS - 1), st.sampled_from([from_file, from_copy, from_pickle]))
    happens = draw(st.lists(faults, max_size=1)), draw(st.sampled_from([None, 0.1])), draw(new_start)
    return options, by_hand, micro_batches, base, *happens


def build(options, base, **settings):
    """Return the optimizer with its model, and the twin on the same grids."""
    optimizer, model = build_ours(options, base, **settings)
    coverage = coverage_of(model)
    weights = {row.name: grid_of(row.quantizer) for row in coverage.quantized} if coverage else {}
    inputs = {row.name: grid_of(row.quantizer) for row in coverage.inputs} if coverage else {}
    twin = AnyStep(MLP.build(), weights, inputs, base, BASES[base], options=options, rho=0.2, **settings)
    return optimizer, model, twin


def build_ours(options, base, **settings):
    model = MLP.build() if options.method == "sam" else MLP.quantized(bits=3)
    given = {} if options.method == "qat" else {
        "rho": 0.2, "direction": options.direction, "every": options.every, "start": options.start,
        "reuse": "perturbation" if options.reuse else None, "normalize_weights": options.normalize,
    }  # fmt: skip
    given |= {"case": options.case} if options.method == "saq" else {}
    given |= {"schedule": options.schedule, "period": options.period} if options.schedule else {}
    given |= {"perturb": "all"} if options.everywhere and options.method != "sam" else {}
    return CLASSES[options.method](model, base, ste=options.ste, **BASES[base], **given, **settings), model


def from_file(optimizer, model, build):
    """Go on with a new model and optimizer from a file that ``weights_only=True`` reads: model first."""
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    states = torch.load(file, weights_only=True)
    new, new_model = build()
    new_model.load_state_dict(states[0])
    new.load_state_dict(states[1])
    return new, new_model


def from_copy(optimizer, model, build):
    return copy.deepcopy((optimizer, model))


def from_pickle(optimizer, model, build):
    return pickle.loads(pickle.dumps((optimizer, model)))


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


@settings(max_examples=2 * settings().max_examples)  # they have many options
@given(runs())
def test_a_step_is_its_twin_whatever_its_options_are_together(run):
    options, by_hand, micro_batches, base, faults, max_grad_norm, new_start = run
    options = dataclasses.replace(options, by_hand=by_hand)
    # With micro-batches by hand ds is a sum of sums, which rounds in another order: the scales are held.
    fixed = {"scale_lr": 0.0} if by_hand and micro_batches > 1 else {}
    fixed["max_grad_norm"] = max_grad_norm
    optimizer, model, twin = build(options, base, **fixed)
    event(f"{options.method} {'by hand' if by_hand else 'closure'}")
    for step in range(STEPS):
        if new_start is not None and step == new_start[0]:
            event(new_start[1].__name__)
            optimizer, model = new_start[1](optimizer, model, lambda: build_ours(options, base, **fixed))
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
