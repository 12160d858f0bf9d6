"""SAM-SGA against its slow twin, its identities, the teacher that nobody touches, resuming, and games that fail."""

import copy
import io
import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD, Adam, AdamW

import qsam
from qsam.generators import ImageGenerator
from qsam.zero_shot import Divergence, Game, Limits, SamSga, distill, output_of, spread
from tests.methods import BY_NAME, assert_same, everything, latents
from tests.models import CONV, MLP, Task
from tests.reference import qat, saq
from tests.reference.in_graph import Grid
from tests.reference.zero_shot import SamSga as Twin

METHODS = {"saq": (qsam.SAQ, saq.SAQ, {"rho": 0.2}), "qat": (qsam.QAT, qat.QAT, {})}


class Vectors(nn.Module):
    """A generator of vectors, with a Tanh that keeps them in range."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.layers = nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 8), nn.Tanh())

    def draw(self, rows, chance):
        return torch.randn(rows, 3, generator=chance)

    def forward(self, z):
        return 2 * self.layers(z)


class Images(ImageGenerator):
    def __init__(self):
        torch.manual_seed(5)
        super().__init__(latent=3, channels=4, size=4, width=4)


GENERATORS = {"mlp": Vectors, "conv": Images}


def players(task: Task = MLP, name="saq", generator_lr=0.05, **settings):
    """Return teacher, student, generator and SamSga, the same at every call."""
    cls, _, options = METHODS[name]
    teacher, student = task.build(), task.quantized(bits=3)
    generator = GENERATORS[task.name]()
    options = {**options, **({"rho": settings.pop("rho")} if "rho" in settings else {})}
    ascent = None if generator_lr is None else SGD(generator.parameters(), lr=generator_lr)
    optimizer = SamSga(cls(student, AdamW, lr=1e-3, **options), ascent, **settings)
    torch.manual_seed(3)
    return teacher, student, generator, optimizer


def run(task=MLP, steps=6, name="saq", generator_lr=0.05, rows=8, **settings):
    teacher, student, generator, optimizer = players(task, name, generator_lr, **settings)
    report = distill(teacher, student, generator, optimizer, steps=steps, rows=rows)
    return report, everything(optimizer.student_optimizer, student), generator, optimizer, student


def grid_of(quantizer):
    scale = quantizer.scale.detach().clone().requires_grad_()
    return Grid(quantizer.quant_min, quantizer.quant_max, scale, quantizer.group_size)


def kl(t, q):
    return F.kl_div(q.log_softmax(-1), t.log_softmax(-1), reduction="none", log_target=True).sum(-1).mean()


# --- the twin ---------------------------------------------------------------------------------------------------------


SETTINGS = [
    *(("saq", MLP, order, sees, (1, 1)) for order, sees in itertools.product(
        ["student_first", "generator_first", "together"], ["theta", "theta+e"])),
    ("saq", CONV, "student_first", "theta+e", (1, 1)),
    ("saq", MLP, "generator_first", "theta+e", (3, 2)),
    ("saq", MLP, "student_first", "theta", (2, 0)),
    ("qat", MLP, "student_first", "theta+e", (1, 1)),
    ("qat", MLP, "together", "theta", (1, 1)),
]  # fmt: skip


@pytest.mark.parametrize(("name", "task", "order", "sees", "inner"), SETTINGS)
def test_an_iteration_equals_its_twin(name, task, order, sees, inner):
    """Students are equal to the bit; so are the losses, and the generators."""
    _, twin_class, options = METHODS[name]
    settings = {"order": order, "generator_sees": sees, "student_steps": inner[0], "generator_steps": inner[1]}
    teacher, student, generator, optimizer = players(task, name, **settings)
    coverage = qsam.coverage_of(student)
    grids = {row.name: grid_of(row.quantizer) for row in coverage.quantized}
    inputs = {row.name: grid_of(row.quantizer) for row in coverage.inputs if row.quantizer is not None}
    reference = twin_class(task.build(), grids, inputs, AdamW, {"lr": 1e-3}, **options)
    other = copy.deepcopy(generator)
    rest = copy.deepcopy(teacher).eval().requires_grad_(False)
    ascent = SGD(other.parameters(), lr=0.05, maximize=True)
    twin = Twin(reference, ascent, lambda chance: other(other.draw(8, chance)),
                lambda forward, x: kl(rest(x), forward(x)), order, sees, steps=inner)  # fmt: skip
    torch.manual_seed(3)
    report = distill(teacher, student, generator, optimizer, steps=5, rows=8)
    torch.manual_seed(3)
    losses = [twin.step() for _ in range(5)]
    assert [entry["divergence"] for entry in report.history] == losses
    assert_same(latents(optimizer.student_optimizer, student), {k: w.detach() for k, w in reference.parameters.items()})
    assert_same(dict(generator.state_dict()), dict(other.state_dict()))
