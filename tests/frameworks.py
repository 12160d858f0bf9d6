"""What the tests of the frameworks share: data sets in a fixed order, and the loops they are compared with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from qsam.optim import QuantizedOptimizer
from tests.models import Batch, Task


class Rows(Dataset):
    """The rows of a task's batches, in order."""

    def __init__(self, task: Task, batches: int) -> None:
        found = [task.batch(i) for i in range(batches)]
        self.columns = {key: torch.cat([batch[key] for batch in found]) for key in found[0]}

    def __len__(self) -> int:
        return len(self.columns["labels"])

    def __getitem__(self, index: int) -> Batch:
        return {key: column[index] for key, column in self.columns.items()}


def steps_by_hand(
    optimizer: QuantizedOptimizer,
    model: nn.Module,
    task: Task,
    numbers: list[list[int]],
    *,
    scheduler: Any = None,
    divide: bool = True,
    seed: bool = True,
    autocast: torch.dtype | None = None,
) -> list[float]:
    """Take one step of the loop for each list of micro-batches; return each step's loss of the first pass.

    A phase of the scales on the same batch belongs to the step; one on the next batch is a step.
    """
    found = []
    for step, parts in enumerate(numbers):
        if seed:
            torch.manual_seed(step)
        loss_of_step = 0.0

        def backward(part: int, count: int = len(parts)) -> Tensor:
            with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
                loss = task.loss(model, task.batch(part))
            (loss / count if divide else loss).backward()
            return loss.detach()

        for part in parts:
            for number, block in enumerate(optimizer.blocks):
                if number and optimizer.scales_due:
                    optimizer.step_scales()
                with getattr(optimizer, block)():
                    loss = backward(part)
                if number == 0:
                    loss_of_step += float(loss) / len(parts)
        optimizer.step()
        if optimizer.scales_due and getattr(optimizer, "schedule", "") == "same_batch":
            for part in parts:
                with optimizer.scale_phase():
                    backward(part)
            optimizer.step()
        if scheduler is not None:
            scheduler.step()
        found.append(loss_of_step)
    return found
