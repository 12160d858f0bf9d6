"""Players of the zero-shot game: teacher, student, generator and SamSga, the same at every call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from qsam.generators import ImageGenerator
from qsam.zero_shot import SamSga
from tests.methods import SAQ, Method
from tests.models import MLP, Task


class Vectors(nn.Module):
    """A generator of vectors, with a Tanh that keeps them in range."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 8), nn.Tanh())

    def draw(self, rows: int, chance: torch.Generator) -> Tensor:
        return torch.randn(rows, 3, generator=chance)

    def forward(self, z: Tensor) -> Tensor:
        return 2 * self.layers(z)


def generator_of(task: Task) -> Any:
    torch.manual_seed(5)
    return Vectors() if task.name == "mlp" else ImageGenerator(latent=3, channels=4, size=4, width=4)


def players(
    task: Task = MLP, method: Method | None = SAQ, generator_lr: float | None = 0.05, rho: float = 0.2, **settings: Any
) -> tuple[nn.Module, nn.Module, Any, Any]:
    """Without a method there is no SamSga; without a rate the generator is frozen."""
    teacher, student, generator = task.build(), task.quantized(bits=3), generator_of(task)
    optimizer = None
    if method is not None:
        student = method.model(task, bits=3) if method.quantizes else task.build()
        ascent = None if generator_lr is None else SGD(generator.parameters(), lr=generator_lr)
        inner = method(student, AdamW, lr=1e-3, **({"rho": rho} if method.perturbs else {}))
        optimizer = SamSga(inner, ascent, **settings)
    torch.manual_seed(3)
    return teacher, student, generator, optimizer
