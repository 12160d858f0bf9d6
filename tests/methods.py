"""Every registered method, SQuAT once per schedule, and the loops that drive them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW

from qsam import Quantizer
from qsam.fused import native
from qsam.optim import OPTIMIZERS, QuantizedOptimizer
from qsam.optim.squat import SCHEDULES
from tests.models import Batch, Task


def needs_kernels() -> None:
    """Skip the test where there is no compiler for the kernels."""
    try:
        native.library()
    except OSError as error:
        pytest.skip(f"no kernels here: {error}")


@dataclasses.dataclass(frozen=True)
class Method:
    """A registered method with the options that make it one more method: a schedule."""

    name: str
    cls: type[QuantizedOptimizer]
    schedule: str | None = None

    def __str__(self) -> str:
        return self.name if self.schedule is None else f"{self.name}-{self.schedule}"

    def __call__(self, model: nn.Module, base: Any = AdamW, **options: Any) -> QuantizedOptimizer:
        if not isinstance(base, torch.optim.Optimizer):
            options.setdefault("lr", 1e-3)
        if self.schedule is not None:
            options.setdefault("schedule", self.schedule)
        return self.cls(model, base, **options)

    def model(self, task: Task, **options: Any) -> nn.Module:
        """Return the model this method trains: quantized, or float for SAM."""
        return task.quantized(**options) if self.quantizes else task.build()

    @property
    def quantizes(self) -> bool:
        return self.cls.quantizes

    @property
    def perturbs(self) -> bool:
        return self.cls.perturbs

    @property
    def alternates(self) -> bool:
        return self.schedule is not None


def _methods() -> Iterator[Method]:
    for name in OPTIMIZERS:
        cls = OPTIMIZERS.get(name)
        for schedule in SCHEDULES if name == "squat" else (None,):
            yield Method(name, cls, schedule)


METHODS = list(_methods())
ALTERNATING = [method for method in METHODS if method.alternates]
KINDS = [method for method in METHODS if str(method) in {"qat", "sam", "saq", "squat-same_batch"}]
"""One method of each kind: one pass, no quantizer, two passes, weights and scales in turn. The others share their code."""
QUANTIZING = [method for method in KINDS if method.quantizes]
PERTURBING = [method for method in KINDS if method.perturbs]
BY_NAME = {str(method): method for method in METHODS}
QAT, SAM, SAQ = BY_NAME["qat"], BY_NAME["sam"], BY_NAME["saq"]
SQUAT, FUSED = BY_NAME["squat-same_batch"], BY_NAME["squat-fused"]

each_kind = pytest.mark.parametrize("method", KINDS, ids=str)
each_quantizing = pytest.mark.parametrize("method", QUANTIZING, ids=str)
each_perturbing = pytest.mark.parametrize("method", PERTURBING, ids=str)
each_alternating = pytest.mark.parametrize("method", ALTERNATING, ids=str)


def built(method: Method, task: Task, *args: Any, **options: Any) -> tuple[nn.Module, QuantizedOptimizer]:
    """Return the model of a task that the method trains, and the optimizer on it."""
    model = method.model(task)
    return model, method(model, *args, **options)


def closure_of(optimizer: QuantizedOptimizer, model: nn.Module, task: Task, batch: Batch) -> Callable[[], Tensor]:
    """Return torch's closure."""

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = task.loss(model, batch)
        loss.backward()
        return loss

    return closure


def train(optimizer: QuantizedOptimizer, model: nn.Module, task: Task, steps: int, start: int = 0) -> list[float]:
    """Take ``steps`` steps with a closure, each on a batch of its own; return the losses."""
    closures = (closure_of(optimizer, model, task, task.batch(i)) for i in range(start, start + steps))
    return [float(optimizer.step(closure).detach()) for closure in closures]


def train_by_hand(
    method: Method,
    optimizer: QuantizedOptimizer,
    model: nn.Module,
    task: Task,
    steps: int,
    start: int = 0,
    scaler: torch.amp.GradScaler | None = None,
) -> None:
    """Do what :func:`train` does with the blocks instead of a closure, with a GradScaler if one is given."""

    def run(number: int) -> None:
        loss = task.loss(model, task.batch(number))
        (loss if scaler is None else scaler.scale(loss)).backward()

    def step(stepper: Any) -> None:
        stepper.step() if scaler is None else scaler.step(stepper)

    def scale_phase(number: int) -> None:
        with optimizer.scale_phase():
            run(number)
        step(optimizer.scales)

    for i in range(start, start + steps):
        optimizer.zero_grad()
        if method.schedule == "next_batch" and (i - start) % 2:
            scale_phase(i)
        else:
            with optimizer.first_pass():
                run(i)
            if method.schedule == "fused":
                step(optimizer.scales)
            if method.perturbs:
                with optimizer.perturbed():
                    run(i)
            step(optimizer)
            if method.schedule == "same_batch":
                scale_phase(i)
        if scaler is not None:
            scaler.update()


def long_but(kept: Iterable[Any], everything: Iterable[Any]) -> list[Any]:
    """Return all values for ``parametrize``, those that are not among ``kept`` marked long."""
    kept = list(kept)
    return [value if value in kept else pytest.param(value, marks=pytest.mark.long) for value in everything]


# --- what a run leaves behind -------------------------------------------------------------------------------------


def latents(optimizer: QuantizedOptimizer, model: nn.Module) -> dict[str, Tensor]:
    """Return w and the float parameters by name, without the scales."""
    scales = scales_of(model)
    with optimizer.latents():
        return {name: p.detach().clone() for name, p in model.named_parameters() if name not in scales}


def scales_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters of all quantizers by name."""
    owners = [(name, module) for name, module in model.named_modules() if isinstance(module, Quantizer)]
    return {f"{name}.{key}": p.detach() for name, module in owners for key, p in module.named_parameters()}


def buffers_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the buffers that a twin has too: not those of quantizers, which say how they were set."""
    return {name: b for name, b in model.named_buffers() if not name.endswith("_quantizer.limits")}


def everything(optimizer: QuantizedOptimizer, model: nn.Module) -> dict[str, Tensor]:
    """Return the model's tensors, w, and the state of both optimizers, copied."""
    kept = {f"model.{name}": tensor.clone() for name, tensor in model.state_dict().items()}
    kept |= {f"latent.{name}": tensor for name, tensor in latents(optimizer, model).items()}
    for i, entry in optimizer.state_dict()["state"].items():
        kept |= {f"state.{i}.{k}": v.clone() for k, v in entry.items() if isinstance(v, Tensor)}
    return kept


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """Assert the same names, and each tensor equal bit for bit (NaN equals NaN)."""
    assert ours.keys() == theirs.keys()
    differing = {
        name: float((ours[name].double() - theirs[name].double()).abs().max())
        for name in ours
        if not torch.equal(ours[name].nan_to_num(7e7), theirs[name].nan_to_num(7e7))
    }
    assert not differing


def assert_on_grid(optimizer: QuantizedOptimizer) -> None:
    """Assert that each p is exactly Q(w)."""
    for slot in optimizer._latents.slots:
        q = slot.quantizer(slot.latent.detach()).to(slot.parameter.dtype)
        assert torch.equal(slot.parameter.detach().nan_to_num(7e7), q.nan_to_num(7e7)), slot.path
