"""How far a training is: what a checkpoint holds, so that going on equals not having stopped; and the line an epoch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from recipes import ranks
from recipes.runs import Json, Run, restore_rng_, rng_state


@dataclass
class Progress:
    """How far a training is.

    Attributes:
        step: optimizer steps so far.
        passes: forward-backward passes so far.
        seconds: time of the steps so far, without evaluations.
        sums: by name, the sum over steps of the present epoch and their count.
        history: one entry a finished epoch.
    """

    step: int = 0
    passes: int = 0
    seconds: float = 0.0
    sums: dict[str, list[float]] = field(default_factory=dict)
    history: list[Json] = field(default_factory=list)

    def add_step(self, loss: float, seconds: float) -> None:
        """Count a step.

        Args:
            loss: the loss of its first pass.
            seconds: the time it took.

        Raises:
            ValueError: if the loss is not finite.
        """
        if not math.isfinite(loss):
            raise ValueError(
                f"the loss of step {self.step + 1} is {loss}: the training has diverged. Lower --lr, --scale-lr or "
                "--rho; the last checkpoint is kept."
            )
        self.step += 1
        self.seconds += seconds
        self.add({"loss": loss})

    def add(self, values: Mapping[str, float]) -> None:
        """Add values of a step to the means of the present epoch; those that are not finite are left out."""
        for name, value in values.items():
            if math.isfinite(value):
                total, count = self.sums.get(name, [0.0, 0.0])
                self.sums[name] = [total + value, count + 1]

    def end_epoch(self, dev: Mapping[str, Mapping[str, float]]) -> None:
        """Add an entry to the history: the means over the epoch's steps, and the evaluation after it."""
        means = {f"mean_{name}": total / count for name, (total, count) in self.sums.items()}
        counts = {"epoch": len(self.history) + 1, "step": self.step, "passes": self.passes, "seconds": self.seconds}
        self.history.append({**counts, **means, "dev": {key: dict(values) for key, values in dev.items()}})
        self.sums = {}

    def line(self, steps: int) -> str:
        """Describe the last finished epoch.

        Args:
            steps: steps of the whole training.
        """
        last = self.history[-1]
        parts = [f"epoch {last['epoch']}", f"step {self.step}/{steps}", f"loss {last['mean_loss']:.4f}"]
        if "mean_rise" in last:
            parts.append(f"rise {last['mean_rise']:.4f}")
        for key, values in last["dev"].items():
            parts.append(f"{key} " + " ".join(f"{name} {value:.4f}" for name, value in values.items()))
        left = self.seconds / self.step * (steps - self.step)
        return ", ".join([*parts, f"{self.passes} passes", f"{self.seconds:.0f} s, {left:.0f} s left"])


def save_checkpoint(run: Run, progress: Progress, parts: Mapping[str, Any]) -> None:
    """Replace the run's checkpoint; on several processes the first one writes, with the random states of all.

    Args:
        run: the run.
        progress: how far it is.
        parts: the model, the optimizer, the scheduler: whatever has a `state_dict`, by name.
    """
    own, *others = ranks.everyones(rng_state())
    if ranks.is_first():
        states = {name: part.state_dict() for name, part in parts.items()}
        more = {"rng_of_others": others} if others else {}
        run.save_checkpoint({**states, "progress": asdict(progress), "rng": own, **more})


def restore_(run: Run, model: nn.Module, optimizer: Optimizer, scheduler: LRScheduler) -> Progress:
    """Put a training back to where its checkpoint was written; without one, leave everything as it is.

    Returns:
        How far it is.

    Raises:
        ValueError: if the checkpoint is of another training.
    """
    state = run.load_checkpoint()
    if state is None:
        return Progress()
    if missing := {"model", "optimizer", "scheduler", "rng", "progress"} - set(state):
        raise _of_another(run, f"it has no {min(missing)!r}")
    try:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])  # after the model: the full-precision weights are here
    except (RuntimeError, ValueError) as error:
        raise _of_another(run, str(error)) from error
    scheduler.load_state_dict(state["scheduler"])
    restore_rng_([state["rng"], *state.get("rng_of_others", [])][ranks.rank()])
    return Progress(**state["progress"])


def _of_another(run: Run, reason: str) -> ValueError:
    return ValueError(
        f"the checkpoint in {run.folder} is of another training ({' '.join(reason.split())}): delete the folder to "
        "start that run again."
    )
