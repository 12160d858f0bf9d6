"""SAQ's three cases, case 3 being SAQ proper: w and s step together from a perturbed loss.

case 1   L(Q(w) + e),   e = rho * M*g / ||M*g||
case 2   L(Q(w + e)),   e as in case 1
case 3   L(Q(w) + e),   e = rho * g / ||g||        g = dL/dQ at Q(w), M the clip mask, so M*g = dL/dw
"""

import torch

from tests.reference.in_graph import InGraph, quantized_weight


class SAQ(InGraph):
    """Case 3."""

    def step(self, loss, batch):
        value = self.first(loss, batch)
        e = self.ascent(self.gradient_of_Q(value))
        self.perturbed(loss, batch, e).backward()
        self.step_weights()
        self.step_scales()
        return value.detach()

    def gradient_of_Q(self, value):
        return dict(zip(self.Q, torch.autograd.grad(value, list(self.Q.values())), strict=True))

    def perturbed(self, loss, batch, e):
        return self.again(loss, batch, e)


class Case1(SAQ):
    def gradient_of_Q(self, value):
        w = [self.parameters[name] for name in self.Q]
        return dict(zip(self.Q, torch.autograd.grad(value, w), strict=True))


class Case2(Case1):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.shift = {}

    def perturbed(self, loss, batch, e):
        self.shift = {name: direction * coefficient for name, (direction, coefficient) in e.items()}
        try:
            return self.again(loss, batch)
        finally:
            self.shift = {}

    def quantized(self):
        return {
            name: quantized_weight(self.parameters[name] + self.shift.get(name, 0), grid)
            for name, grid in self.weights.items()
        }


class NormalizedWeights(SAQ):
    """e = rho * u * (u*g) / ||u*g||, u the standard deviation of each tensor: e in units of u has norm rho."""

    def ascent(self, g):
        units = {name: self.parameters[name].detach().std(correction=0) for name in g}
        e = super().ascent({name: t * units[name] for name, t in g.items()})
        return {name: (direction, coefficient * units[name]) for name, (direction, coefficient) in e.items()}
