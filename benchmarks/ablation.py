"""A step with one trick left out at a time, against the same step in fp32: what each trick is worth here."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from torch import Tensor, nn

import qsam
from benchmarks import bert
from benchmarks.bert import Batch
from benchmarks.measure import Json
from benchmarks.step import on_batch
from benchmarks.training import Builder, Call, Method, methods, of_qsam

ROUNDS = 12


def measure(quick: bool = False) -> Json:
    """Time QAT and SAQ with and without each trick on the smaller batch."""
    size = bert.QUICK if quick else bert.FULL
    case = on_batch(size, *size.batches[0], [methods()["fp32"], *variants()], 2 if quick else ROUNDS)
    return {"settings": {"reference": "fp32"}, **case}


def variants() -> Iterator[Method]:
    """Yield a method with everything, and then without one thing each."""
    for name, cls in (("QAT", qsam.QAT), ("SAQ", qsam.SAQ)):
        build = of_qsam(cls)
        yield Method(name, build)
        yield Method(f"{name}, eager", build, backend="eager")
        yield Method(f"{name}, inputs quantized before their Linear layers", _with_hooks(build))
        yield _WithoutIntegers(f"{name}, Linear layers multiply in fp32", build)
        if cls is qsam.SAQ:
            yield Method(f"{name}, all gradients in every pass", of_qsam(cls, wrap=_hides_its_graph))


def _with_hooks(build: Builder) -> Builder:
    """Give each layer a hook that does nothing: where somebody looks, the input is quantized by its own hook."""

    def built(model: nn.Module, batch: Batch) -> Call:
        for linear in bert.encoder_linears(model).values():
            linear.register_forward_hook(lambda *_: None)
        return build(model, batch)

    return built


def _hides_its_graph(closure: Callable[[], Tensor]) -> Callable[[], Any]:
    """Return the closure with a number for a loss: without its graph the optimizer leaves no gradient out."""
    return lambda: closure().item()


@dataclasses.dataclass(frozen=True)
class _WithoutIntegers(Method):
    """There is no public switch for this trick alone."""

    @contextlib.contextmanager
    def _backend(self) -> Iterator[None]:
        with mock.patch("qsam.fused.linear._has_instructions", functools.partial(bool, False)), super()._backend():
            yield
