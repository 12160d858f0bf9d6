"""QAT: one pass, w and s step together."""

from tests.reference.in_graph import InGraph


class QAT(InGraph):
    def step(self, loss, batch):
        value = self.first(loss, batch)
        value.backward()
        self.step_weights()
        self.step_scales()
        return value.detach()
