"""One step of training by each method and by each peer: what ``step.py`` times and ``memory.py`` weighs.

A builder takes a fresh float model and a batch, and returns the calls of one period, each a whole training step.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

import qsam
from benchmarks.bert import Batch, encoder_linears
from benchmarks.formulas import compiled, lsq, quantize_in_graph_
from qsam.presets import squat_bert

RATE: dict[str, Any] = {"lr": 2e-5, "fused": True}
WEIGHT_BITS, ACTIVATION_BITS, GROUP = 4, 8, 32

Call = Callable[[], object]
Builder = Callable[[nn.Module, Batch], Call]


class Missing(Exception):
    """A peer's package is not installed."""


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to train.

    Attributes:
        name: Its key in the JSON.
        build: Returns the step.
        period: Steps until it repeats itself; a whole period is timed, and divided by this.
        backend: qsam's backend in its steps.
        passes: Forward and backward passes a step, on average: what its ratio would be if nothing else cost anything.
        peer: Whether other people's code quantizes or perturbs.
    """

    name: str
    build: Builder
    period: int = 1
    backend: str = "auto"
    passes: float = 1.0
    peer: bool = False

    def ready(self, model: nn.Module, batch: Batch) -> Call:
        """Return a period on this model.

        Raises:
            Missing: the peer's package is not installed.
        """
        try:
            with self._backend():
                step = self.build(model, batch)
        except ModuleNotFoundError as error:
            raise Missing(str(error)) from error

        def run() -> None:
            with self._backend():
                for _ in range(self.period):
                    step()

        return run

    @contextlib.contextmanager
    def _backend(self) -> Iterator[None]:
        if self.backend == "auto":
            yield
            return
        qsam.set_backend(self.backend)
        try:
            yield
        finally:
            qsam.set_backend("auto")


def methods() -> dict[str, Method]:
    """Return all, the reference first."""
    return {method.name: method for method in (Method("fp32", _fp32), *_ours(), *_peers())}


def _ours() -> Iterator[Method]:
    yield Method("QAT", of_qsam(qsam.QAT))
    yield Method("QAT, eager", of_qsam(qsam.QAT), backend="eager")
    yield Method("SAQ", of_qsam(qsam.SAQ), passes=2)
    yield Method("SAQ, momentum", of_qsam(qsam.SAQ, direction="momentum"))
    yield Method("SAQ, previous", of_qsam(qsam.SAQ, direction="previous"))
    yield Method("SAQ, every=5", of_qsam(qsam.SAQ, every=5), period=5, passes=6 / 5)
    yield Method("SQuAT, same_batch", of_qsam(qsam.SQuAT), passes=3)
    yield Method("SQuAT, next_batch", of_qsam(qsam.SQuAT, schedule="next_batch"), period=2, passes=3 / 2)
    yield Method("SQuAT, fused", of_qsam(qsam.SQuAT, schedule="fused"), passes=2)
    yield Method("SQuAT, fused, every=5", of_qsam(qsam.SQuAT, schedule="fused", every=5), period=5, passes=6 / 5)


def _peers() -> Iterator[Method]:
    yield Method("LSQ in the graph, eager", _lsq, peer=True)
    yield Method("LSQ in the graph, torch.compile", _lsq_compiled, peer=True)
    yield Method("torchao QAT", _torchao, peer=True)
    yield Method("brevitas", _brevitas, peer=True)
    yield Method("SAM of pytorch_optimizer, fp32", _sam, passes=2, peer=True)
    yield Method("SAM of pytorch_optimizer, LSQ in the graph", _sam_lsq, passes=2, peer=True)


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    """Run the forward."""
    loss: Tensor = model(**batch).loss
    return loss


def _closure(model: nn.Module, batch: Batch, optimizer: Optimizer) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        torch.autograd.backward(loss)
        return loss

    return closure


# --- qsam -------------------------------------------------------------------------------------------------------------


def of_qsam(
    cls: Callable[..., Optimizer],
    *,
    wrap: Callable[[Callable[[], Tensor]], Callable[[], Any]] | None = None,
    **options: Any,
) -> Builder:
    """Return the builder of one of our methods; ``wrap`` changes the closure that its step is given."""

    def build(model: nn.Module, batch: Batch) -> Call:
        qsam.quantize_(model, bits=WEIGHT_BITS, activation_bits=ACTIVATION_BITS, rules=squat_bert)
        optimizer: Any = cls(model, AdamW, **RATE, **options)
        closure = _closure(model, batch, optimizer)
        given = closure if wrap is None else wrap(closure)
        return lambda: optimizer.step(given)

    return build


# --- the reference and the peers --------------------------------------------------------------------------------------


def _fp32(model: nn.Module, batch: Batch) -> Call:
    optimizer: Any = AdamW(model.parameters(), **RATE)
    closure = _closure(model, batch, optimizer)

    def step() -> None:
        closure()
        optimizer.step()

    return step


def _lsq(model: nn.Module, batch: Batch) -> Call:
    return _fp32(_with_lsq(model, lsq), batch)


def _lsq_compiled(model: nn.Module, batch: Batch) -> Call:
    return _fp32(_with_lsq(model, compiled(lsq)), batch)


def _with_lsq(model: nn.Module, formula: Callable[..., Tensor]) -> nn.Module:
    for linear in encoder_linears(model).values():
        quantize_in_graph_(linear, WEIGHT_BITS, ACTIVATION_BITS, formula)
    return model


def _torchao(model: nn.Module, batch: Batch) -> Call:
    """Dynamic int8 activations, one scale a token; int4 weights in groups of 32: torchao's own scheme of W4A8."""
    from torchao.quantization import quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    wanted = set(encoder_linears(model))
    config = QATConfig(
        activation_config=IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False),
        weight_config=IntxFakeQuantizeConfig(torch.int4, group_size=GROUP, is_symmetric=True),  # type: ignore[attr-defined]
        step="prepare",
    )
    quantize_(model, config, filter_fn=lambda _, name: name in wanted)
    return _fp32(model, batch)


def _brevitas(model: nn.Module, batch: Batch) -> Call:
    """One scale a weight, from its largest entry, and one learned scale an input, after two steps of statistics."""
    from brevitas.nn import QuantLinear
    from brevitas.quant import Int8ActPerTensorFloat, Int8WeightPerTensorFloat

    for name, linear in encoder_linears(model).items():
        quantized = QuantLinear(
            linear.in_features,
            linear.out_features,
            weight_quant=Int8WeightPerTensorFloat,
            weight_bit_width=WEIGHT_BITS,
            input_quant=Int8ActPerTensorFloat,
            input_bit_width=ACTIVATION_BITS,
            input_collect_stats_steps=2,
        )
        quantized.load_state_dict(linear.state_dict(), strict=False)
        model.set_submodule(name, quantized)
    return _fp32(model.train(), batch)


def _sam(model: nn.Module, batch: Batch) -> Call:
    from pytorch_optimizer import SAM

    optimizer: Any = SAM(model.parameters(), AdamW, rho=0.1, **RATE)
    closure = _closure(model, batch, optimizer)

    def step() -> None:
        closure()
        optimizer.step(closure)

    return step


def _sam_lsq(model: nn.Module, batch: Batch) -> Call:
    return _sam(_with_lsq(model, lsq), batch)
