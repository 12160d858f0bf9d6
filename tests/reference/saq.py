"""SAQ, case 3: e from the gradient with respect to Q(w), w and s step together from the loss at Q(w) + e."""

import torch

from tests.reference.in_graph import InGraph


class SAQ(InGraph):
    def step(self, loss, batch):
        value = self.first(loss, batch)
        e = self.ascent(self.gradient_of_Q(value))
        self.again(loss, batch, e).backward()
        self.step_weights()
        self.step_scales()
        return value.detach()

    def gradient_of_Q(self, value):
        return dict(zip(self.Q, torch.autograd.grad(value, list(self.Q.values())), strict=True))
