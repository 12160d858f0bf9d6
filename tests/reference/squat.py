"""SQuAT: w steps with the gradient at Q(w) + e, s with the gradient at Q(w); in turns, by three schedules."""

import torch

from tests.reference.saq import SAQ


class SameBatch(SAQ):
    """Algorithm 1 as printed: e, then w, then s at the new w, all on one batch."""

    def step(self, loss, batch):
        value = self.first(loss, batch)
        self.step_w(loss, batch, self.ascent(self.gradient_of_Q(value)))
        self.count += 1
        if self.count % self.period == 0:
            self.again(loss, batch).backward()
            self.step_scales()
        return value.detach()

    def step_w(self, loss, batch, e):
        self.again(loss, batch, e).backward()
        self.step_weights()
        self.forget_gradients()


class NextBatch(SameBatch):
    """w on ``period`` batches, then s on a batch of its own."""

    def step(self, loss, batch):
        value = self.first(loss, batch)
        self.count += 1
        if self.count % (self.period + 1) == 0:
            value.backward()
            self.step_scales()
        else:
            self.step_w(loss, batch, self.ascent(self.gradient_of_Q(value)))
        return value.detach()


class Fused(SameBatch):
    """One unperturbed pass gives both g_Q, for e, and ds; s steps, then w at Q(w, new s) + e."""

    def step(self, loss, batch):
        value = self.first(loss, batch)
        self.count += 1
        g = self.gradient_of_Q_and_s(value)
        if self.count % self.period == 0:
            self.step_scales()
        self.step_w(loss, batch, self.ascent(g))
        return value.detach()

    def gradient_of_Q_and_s(self, value):
        scales = [s for s, _ in self.scale_rules]
        gradients = torch.autograd.grad(value, [*self.Q.values(), *scales])
        for s, gradient in zip(scales, gradients[len(self.Q) :], strict=True):
            s.grad = gradient
        return dict(zip(self.Q, gradients, strict=False))
