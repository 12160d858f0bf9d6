"""SAM-SGA, written out: min over theta, max over e and omega, of D(T(G(z)), Q_{theta + e}(G(z))).

The student is a twin of its own method: fake quantization in the graph. Teacher and generator are called as they are.
"""

import torch

from tests.reference.qat import QAT


class SamSga:
    """One iteration per call of ``step``.

    Args:
        student: A twin from ``tests/reference``: QAT, or SAQ.
        generator: Its module.
        ascent: An optimizer over the generator, with ``maximize=True``; None: it is frozen.
        sample: ``sample(chance) -> x``.
        D: ``D(forward, x)``, ``forward`` being the student at some weights.
    """

    def __init__(self, student, ascent, sample, D, order="student_first", sees="theta", seed=0, steps=(1, 1)):
        self.student, self.ascent, self.sample, self.D = student, ascent, sample, D
        self.order, self.sees, self.seed, self.steps = order, sees, seed, steps
        self.student_number = self.generator_number = 0
        self.perturbs = not isinstance(student, QAT)

    def step(self):
        if self.order == "together":
            return self.both_step()
        losses = []
        for player in ("student", "generator") if self.order == "student_first" else ("generator", "student"):
            if player == "student":
                losses += [self.student_steps() for _ in range(self.steps[0])]
            elif self.ascent is not None:
                for _ in range(self.steps[1]):
                    self.generator_steps()
        return losses[-1]

    def draw(self, player):
        number = 2 * self.student_number if player == "student" else 2 * self.generator_number + 1
        return self.sample(torch.Generator().manual_seed(16_000_057 * self.seed + number))

    def student_steps(self):
        x = self.draw("student").detach()
        self.student_number += 1
        return float(self.student.step(self.D, x))

    def generator_steps(self):
        x = self.draw("generator")
        self.generator_number += 1
        twin, state = self.student, torch.get_rng_state()
        buffers = {name: b.clone() for name, b in twin.model.named_buffers()}
        if self.sees == "theta+e" and self.perturbs:
            e = twin.ascent(twin.gradient_of_Q(twin.first(self.D, x.detach())))
            self.step_omega(twin.again(self.D, x, e))
        else:
            self.step_omega(twin.first(self.D, x))
        for name, b in twin.model.named_buffers():
            b.copy_(buffers[name])
        torch.set_rng_state(state)

    def both_step(self):
        x, twin = self.draw("student"), self.student
        self.student_number += 1
        fixed = x.detach()
        value = twin.first(self.D, fixed)
        if self.perturbs:
            e = twin.ascent(twin.gradient_of_Q(value))
            last = twin.again(self.D, fixed, e)
            seen = twin.again(self.D, x, e if self.sees == "theta+e" else None)
        else:
            last, seen = value, twin.again(self.D, x)
        omega = self.gradients(seen)
        last.backward()
        twin.step_weights()
        twin.step_scales()
        self.step_omega(None, omega)
        return float(value.detach())

    def gradients(self, value):
        return torch.autograd.grad(value, self.ascent.param_groups[0]["params"], retain_graph=True)

    def step_omega(self, value, gradients=None):
        gradients = self.gradients(value) if gradients is None else gradients
        for p, gradient in zip(self.ascent.param_groups[0]["params"], gradients, strict=True):
            p.grad = gradient
        self.ascent.step()
        self.ascent.zero_grad()
