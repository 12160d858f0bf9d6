"""Every method with the options that change a step: which passes it has, which way e points, and when a pass fails.

A step is written out pass by pass. ``fail_at`` breaks it off in a pass: what has been updated by then stays, and the
gradients are forgotten.
"""

from __future__ import annotations

import dataclasses

import torch

from tests.reference.in_graph import InGraph


class Failure(Exception):
    """A pass was broken off."""


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of a step, by the names that qsam gives them."""

    method: str
    schedule: str = ""
    case: int = 3
    ste: str = "clipped"
    everywhere: bool = False
    direction: str = "sam"
    every: int = 1
    start: int = 0
    reuse: bool = False
    normalize: bool = False
    period: int = 1
    by_hand: bool = False


class AnyStep(InGraph):
    def __init__(self, *args, options: Options, **settings):
        self.options, self.masked = options, options.ste == "clipped"
        super().__init__(*args, period=options.period, **settings)
        self.steps, self.phase = 0, int(options.schedule == "fused")
        self.m, self.h, self.kept = {}, {}, {}

    def quantized(self):
        """Return Q(w) by name, and w itself where a float parameter is perturbed too."""
        q = super().quantized()
        if not self.options.everywhere:
            return q
        return {name: q[name] if name in q else w.view_as(w) for name, w in self.parameters.items()}

    # --- which passes ---------------------------------------------------------------------------------------------

    @property
    def due(self):
        late = self.steps - self.options.start
        return self.options.method != "qat" and late >= 0 and late % self.options.every == 0

    @property
    def passes(self):
        if self.due:
            if self.options.direction in ("previous", "momentum"):
                return int(self.steps > 0)
            return 2
        return int(bool(self.kept) and self.steps >= self.options.start)

    def step(self, loss, batches, fail_at=None):
        """Take one step; each batch is a micro-batch with an e of its own."""
        self.fail_at, self.calls = fail_at, 0
        try:
            self._step(loss, batches)
        except Failure:
            self.forget_gradients()

    def call(self, loss, batch, e=None):
        """Return L(Q(w) + e), for every pass that is not broken off."""
        self.calls += 1
        if self.calls == self.fail_at:
            raise Failure
        self.buffers = {}
        value = self.loss(loss, batch, e)
        for q in self.Q.values():
            q.retain_grad()
        return value

    def backward(self, value):
        """Accumulate the gradients of w and s, and h."""
        value.backward()
        for name, q in self.Q.items():
            self.total[name] = self.total[name] + q.grad if name in self.total else q.grad

    def _step(self, loss, batches):
        self.total = {}
        schedule = self.options.schedule
        # By hand a phase of the scales that was broken off is made up for, on the next batch.
        own_batch = schedule == "next_batch" or (schedule == "same_batch" and self.options.by_hand)
        if own_batch and self.phase >= self.period:
            for batch in batches:
                self.call(loss, batch).backward()
            return self.step_s()
        passes = self.passes
        for batch in batches:
            if passes == 0:
                self.backward(self.call(loss, batch))
            else:
                e = self.first(loss, batch) if passes == 2 else self.known()
                self.backward(self.call(loss, batch, e))
        self.learn()
        self.step_weights()
        self.steps += 1
        if passes == 0 or not schedule:
            return self.step_scales()
        self.forget_gradients()
        self.phase += 1
        if schedule == "same_batch" and self.phase >= self.period:
            for batch in batches:
                self.call(loss, batch).backward()
            self.step_s()

    def step_s(self):
        self.step_scales()
        self.phase = 0

    # --- which way ------------------------------------------------------------------------------------------------

    def first(self, loss, batch):
        """Return e from a first pass; a fused step moves the scales by the way."""
        value = self.call(loss, batch)
        before = [(p, p.grad) for p in self.parameters.values()], [(s, s.grad) for s, _ in self.scale_rules]
        points = self.Q if self.options.case == 3 else {name: self.parameters[name] for name in self.Q}
        scales = (
            [s for s, _ in self.scale_rules] if self.options.schedule == "fused" and self.phase >= self.period else []
        )
        gradients = torch.autograd.grad(value, [*points.values(), *scales])
        if scales:
            for s, gradient in zip(scales, gradients[len(points) :], strict=True):
                s.grad = gradient
            self.step_s()
        for tensor, gradient in (*before[0], *(() if scales else before[1])):
            tensor.grad = gradient
        return self.perturbation(dict(zip(points, gradients, strict=False)))

    def known(self):
        """Return e without a first pass."""
        if not self.due:
            return self.scaled(*self.kept["e"])
        return self.perturbation(self.h)

    def perturbation(self, g):
        """Return e = rho * d / norm, and keep it for the steps that reuse it."""
        if self.options.normalize:
            g = {name: t * self.unit(name) for name, t in g.items()}
        d, norm = self.direction(g)
        if self.options.reuse and self.options.every > 1:
            self.kept["e"] = {name: t.clone() for name, t in d.items()}, norm
        return self.scaled(d, norm)

    def scaled(self, d, norm):
        sign = -1.0 if self.options.direction == "momentum" else 1.0
        coefficient = 1 / norm * sign * self.rho
        return {
            name: (t, coefficient * self.unit(name) if self.options.normalize else coefficient) for name, t in d.items()
        }

    def unit(self, name):
        return self.parameters[name].detach().std(correction=0)

    def direction(self, g):
        kind = self.options.direction
        if kind in ("asam", "grid"):
            units = {name: self.length(name, kind) for name in g}
            scaled = {name: t * units[name] for name, t in g.items()}
            return {name: t * units[name] for name, t in scaled.items()}, norm_of(scaled)
        if kind == "friendly":
            d = {name: t - self.m[name] if self.m else t for name, t in g.items()}
            self.m = {name: self.m[name].lerp(t, 1 - 0.9) if self.m else t.clone() for name, t in g.items()}
        elif kind == "random":
            generator = torch.Generator().manual_seed(self.steps)
            d = {name: torch.randn(t.shape, generator=generator) for name, t in g.items()}
        elif kind == "momentum":
            states = {name: self.base.state[self.parameters[name]] for name in g}
            d = {name: state.get("exp_avg", state.get("momentum_buffer")).clone() for name, state in states.items()}
        else:
            d = g
        return d, norm_of(d)

    def length(self, name, kind):
        return self.parameters[name].detach().abs() + 0.01 if kind == "asam" else self.weights[name].scale.detach()

    def learn(self):
        """Keep h, as SAQ's first two cases see it through the mask."""
        self.h = {name: t.clone() for name, t in self.total.items()}
        if self.options.case != 3:
            self.h = {name: self.parameters[name].grad.clone() for name in self.h}


def norm_of(tensors):
    return torch.stack([t.norm() for t in tensors.values()]).norm()
