"""Gradients that a pass has no use for are left out in step(closure), and nobody can tell."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from torch.utils.checkpoint import checkpoint

import qsam
from qsam.optim import QuantizedOptimizer

ROWS = 6


class Words(nn.Module):
    """An embedding, a norm and two layers, the first of them quantized; the head stays float."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.norm = nn.Embedding(11, 8), nn.LayerNorm(8)
        self.layer, self.head = nn.Linear(8, 8), nn.Linear(8, 3)
        self.reentrant = False

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.embedding(ids))
        y = checkpoint(self.layer, x, use_reentrant=True) if self.reentrant else self.layer(x)
        found: Tensor = self.head(y.relu().mean(1))
        return found


class Training:
    """Words with a method, and what each pass of the closure left in the gradients."""

    def __init__(self, make: Callable[..., Any], run: Callable[[nn.Module, Tensor], Any] | None = None) -> None:
        self.model = Words()
        qsam.quantize_(self.model, bits=4, activation_bits=8, rules=[("layer", {}), ("*", None)])
        self.optimizer = make(self.model)
        self.run = run or self._loss
        self.passes: list[set[str]] = []
        self.ids = torch.arange(ROWS * 4).reshape(ROWS, 4) % 11

    def _loss(self, model: nn.Module, ids: Tensor) -> Tensor:
        loss = nn.functional.cross_entropy(model(ids), ids[:, 0] % 3)
        torch.autograd.backward(loss)
        return loss

    def closure(self) -> Any:
        self.optimizer.zero_grad()
        loss = self.run(self.model, self.ids)
        self.passes.append({name for name, p in self.model.named_parameters() if p.grad is not None})
        return loss

    def step(self) -> list[set[str]]:
        self.passes.clear()
        self.optimizer.step(self.closure)
        return list(self.passes)

    def everything(self) -> dict[str, Tensor]:
        latents = {f"w.{i}": slot.latent for i, slot in enumerate(self.optimizer._latents.slots)}
        return latents | dict(self.model.named_parameters())


def saq(model: nn.Module, **options: Any) -> QuantizedOptimizer:
    return qsam.SAQ(model, SGD, lr=0.1, rho=0.05, **options)


def squat(schedule: str) -> Callable[..., QuantizedOptimizer]:
    return lambda model, **options: qsam.SQuAT(model, SGD, lr=0.1, rho=0.05, schedule=schedule, **options)


WEIGHT, SCALE = {"layer.weight"}, {"layer.input_quantizer.scale"}
ALL = {f"{name}.{kind}" for name in ("norm", "head", "layer") for kind in ("weight", "bias")} | {
    "embedding.weight",
    *SCALE,
}


@pytest.mark.parametrize(
    ("make", "passes"),
    [
        (saq, [WEIGHT, ALL]),
        (squat("same_batch"), [WEIGHT, ALL, WEIGHT | SCALE]),
        (squat("fused"), [WEIGHT | SCALE, ALL]),
        (lambda model: saq(model, perturb="all"), [ALL - SCALE, ALL]),
        (lambda model: saq(model, perturb=lambda name, _: name == "head.bias"), [{"head.bias"}, ALL]),
        (lambda model: qsam.JointSAM(model, AdamW, lr=1e-3), [WEIGHT, ALL]),
    ],
)
def test_a_pass_computes_the_gradients_that_it_is_for_once_the_closure_is_known(
    make: Callable[..., Any], passes: list[set[str]]
) -> None:
    training = Training(make)
    assert training.step()[0] == ALL
    assert training.step() == passes
    assert all(p.requires_grad for name, p in training.model.named_parameters() if "weight_quantizer" not in name)


@pytest.mark.parametrize(
    "make", [saq, squat("same_batch"), squat("next_batch"), squat("fused")], ids=["saq", "same", "next", "fused"]
)
def test_leaving_them_out_changes_no_bit(make: Callable[..., Any]) -> None:
    thrifty, wasteful = Training(make), Training(make)
    wasteful.optimizer.skip_unused_gradients = False
    for _ in range(6):
        thrifty.step()
        assert all(names == ALL for names in wasteful.step())
    expected = wasteful.everything()
    assert all(torch.equal(value, expected[name]) for name, value in thrifty.everything().items())


@pytest.mark.parametrize("steps_before", [0, 2])
def test_a_perturbation_of_nothing_that_has_a_gradient_leaves_the_backward_something_to_do(steps_before: int) -> None:
    training = Training(saq)
    for _ in range(steps_before):
        training.step()
    training.model.layer.weight.requires_grad_(False)  # as LoRA does, or a layer that is frozen in mid-run
    with pytest.warns(UserWarning, match="nothing is perturbed"):
        training.step()
    assert training.step()[0] == ALL - WEIGHT


def test_a_parameter_with_a_hook_keeps_its_gradient() -> None:
    training, seen = Training(saq), []
    training.model.norm.weight.register_hook(seen.append)
    training.model.head.weight.register_post_accumulate_grad_hook(seen.append)
    training.step()
    assert training.step()[0] == {*WEIGHT, "norm.weight", "head.weight"}
    assert len(seen) == 2 * 2 * 2


def test_a_compiled_model_is_not_compiled_again() -> None:
    compiled: list[Any] = []

    def run(model: nn.Module, ids: Tensor) -> Tensor:
        compiled[:] = compiled or [torch.compile(model, backend="aot_eager", fullgraph=True)]
        return Training._loss(training, compiled[0], ids)

    training = Training(saq, run)
    qsam.calibrate(training.model, [training.ids])
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            assert all(names == ALL for names in training.step())


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_a_reentrant_checkpoint_keeps_its_input_differentiable() -> None:
    training = Training(saq)
    training.model.reentrant = True
    for _ in range(3):
        assert all(names == ALL for names in training.step())


def test_a_closure_that_returns_a_number_is_not_known() -> None:
    training = Training(saq, lambda model, ids: training._loss(model, ids).item())
    for _ in range(3):
        assert all(names == ALL for names in training.step())


def own_gradient(model: nn.Module, ids: Tensor) -> None:
    (gradient,) = torch.autograd.grad(model(ids).sum(), [model.get_parameter("embedding.weight")])
    assert gradient.abs().sum() > 0


def test_a_closure_that_misses_a_gradient_is_told_the_cure_and_then_has_them_all() -> None:
    def run(model: nn.Module, ids: Tensor) -> Tensor:
        loss = training._loss(model, ids)
        if training.optimizer.steps >= 2:
            own_gradient(model, ids)
        return loss

    training = Training(saq, run)
    training.step(), training.step()
    with pytest.raises(RuntimeError, match="does not require grad") as caught:
        training.step()
    assert "skip_unused_gradients=False" in caught.value.__notes__[0]
    assert training.step() == [ALL, ALL]


def test_the_cure_works() -> None:
    def run(model: nn.Module, ids: Tensor) -> Tensor:
        loss = training._loss(model, ids)
        own_gradient(model, ids)
        return loss

    training = Training(lambda model: saq(model, skip_unused_gradients=False), run)
    for _ in range(3):
        assert training.step() == [ALL, ALL]


@pytest.mark.parametrize(
    "error",
    [KeyError("mine"), RuntimeError("mine"), torch.OutOfMemoryError("mine"), KeyboardInterrupt("mine")],
    ids=repr,
)
@pytest.mark.parametrize("call", [0, 1])
def test_an_error_of_the_closure_is_raised_and_nothing_stays_frozen(error: BaseException, call: int) -> None:
    """Whatever its type, in whatever pass: the closure is not called again."""

    def run(model: nn.Module, ids: Tensor) -> Tensor:
        if training.optimizer.steps == 2 and len(training.passes) == call:
            calls.append(1)
            raise error
        return training._loss(model, ids)

    calls: list[int] = []
    training = Training(saq, run)
    training.step(), training.step()
    before = {name: t.clone() for name, t in training.everything().items()}
    with pytest.raises(type(error), match="mine"):
        training.step()
    assert len(calls) == 1
    assert all(torch.equal(t, before[name]) for name, t in training.everything().items())
    assert all(p.requires_grad for name, p in training.model.named_parameters() if "weight_quantizer" not in name)
