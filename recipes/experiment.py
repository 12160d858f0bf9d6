"""What a recipe brings to the training loop that all recipes share: its data, its model, its loss and its metrics."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import qsam
from recipes.runs import Json

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TRAIN_LOSS_ROWS = 1_000
"""Rows of the fixed part of the training set that the training loss, and sharpness, are measured on at the end."""

Metrics = dict[str, float]
Batch = tuple[Any, Tensor]
"""What the model's forward takes, and the labels."""


class Experiment(ABC):
    """One data set and one kind of model.

    Attributes:
        metric: name of the main metric, an entry of what `evaluate` returns.
        rows: number of training rows.
        rules: of `qsam.quantize_`.
    """

    metric: str
    rows: int
    rules: Any = None

    @abstractmethod
    def order(self, config: Json, epoch: int) -> list[list[int]]:
        """Return the batches of an epoch, as row numbers; a function of the configuration and the epoch alone."""

    @abstractmethod
    def loaded(self, batches: Iterable[Sequence[int]], config: Json, epoch: int) -> Iterator[Batch]:
        """Yield these batches, each the same whether or not others were loaded before it: a run may be resumed."""

    @abstractmethod
    def part_batches(self) -> Iterator[Batch]:
        """Yield a fixed part of the training rows, as they are evaluated: in order, not augmented."""

    @abstractmethod
    def new_model(self, config: Json) -> nn.Module:
        """Return the model that full-precision training starts from."""

    @abstractmethod
    def load_model(self, folder: Path) -> nn.Module:
        """Return the full-precision model that `save_model` wrote."""

    @abstractmethod
    def save_model(self, folder: Path, model: nn.Module, coverage: qsam.Coverage | None) -> None:
        """Write an ordinary checkpoint, its weights on the grid, and beside it what rebuilds the quantizers."""

    @abstractmethod
    def base(self, model: nn.Module, config: Json) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
        """Return the base optimizer's class and its keywords, `"params"` among them if it has groups."""

    @abstractmethod
    def loss(self, model: nn.Module, inputs: Any, labels: Tensor, config: Json) -> Tensor:
        """Return the training loss, a mean over the rows."""

    @abstractmethod
    def evaluate(self, model: nn.Module, precision: str) -> dict[str, Metrics]:
        """Return loss and metrics, by the name of the rows that they were measured on, the main rows first."""

    @abstractmethod
    def evaluate_training(self, model: nn.Module) -> tuple[Metrics, int]:
        """Return the same over the fixed part of the training rows, and the number of its rows."""

    def warmup(self, config: Json) -> int:
        """Return the number of steps over which the rates rise to their full size."""
        return 0

    def after_training_(self, model: nn.Module, config: Json) -> None:  # noqa: B027  (most do nothing)
        """Do what comes between the last step and the measurements."""


def floats_only(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a model's state without its quantizers': what any tool loads."""
    return {name: value for name, value in state.items() if "_quantizer." not in name}
