"""SAM on a float model: e over every parameter."""

import torch

from tests.reference.in_graph import InGraph, plus


class SAM(InGraph):
    def step(self, loss, batch):
        value = self.first(loss, batch)
        names, tensors = zip(*self.parameters.items(), strict=True)
        g = torch.autograd.grad(value, tensors)
        e = self.ascent(dict(zip(names, g, strict=True)))
        before = {name: w.detach().clone() for name, w in self.parameters.items()}
        self._set({name: plus(w, e[name]) for name, w in before.items()})
        self.again(loss, batch).backward()
        self._set(before)
        self.step_weights()
        return value.detach()

    @torch.no_grad()
    def _set(self, values):
        for name, w in self.parameters.items():
            w.copy_(values[name])
