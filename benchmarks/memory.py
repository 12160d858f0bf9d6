"""The largest memory that a training step holds, by each method and each peer, each in a process of its own.

python -m benchmarks.memory NAME [--quick]    # one method's bytes, as JSON

Every tensor on a CPU comes from torch's allocator, and torch's profiler records each allocation and each release with
the running total, those inside fused kernels and of autograd too. It runs from before the model exists, so the total is
what is held. (The resident memory of the process would add the interpreter, code, and what the C library keeps back.)

The budget of a W4A8 step is the fp32 step's largest total, plus one fp32 copy of the quantized weights (the latents),
plus one saved tensor a quantized input. Scales and random states are some kilobytes: shares are rounded to four digits.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks import bert
from benchmarks.bert import Batch, Size, batch_of, build, encoder_linears
from benchmarks.measure import Json, in_new_process
from benchmarks.training import Method, Missing, loss_of, methods

REFERENCE = "fp32"
WARMUP = 3
"""Periods before: the optimizer's state exists, and kernels are compiled."""
STEP = "measured step"
QUICK = ("QAT", "SAQ", "LSQ in the graph, eager")
"""The methods of a smoke run, where each process does little but import."""


def measure(quick: bool = False, names: Iterable[str] = ()) -> Json:
    """Weigh every method (a few if ``quick``), or the reference and those named, on the largest batch."""
    wanted = set(names) or set(QUICK if quick else methods())
    quickly = ["--quick"] if quick else []
    chosen = [name for name in methods() if name in wanted | {REFERENCE}]
    found = {name: in_new_process("benchmarks.memory", name, *quickly) for name in chosen}
    size = _size(quick)
    limit = budget(size, found[REFERENCE]["peak"])
    for figures in found.values():
        if "peak" in figures:
            figures["of_fp32"] = round(figures["peak"] / found[REFERENCE]["peak"], 4)
            figures["of_budget"] = round(figures["peak"] / limit["budget"], 4)
    sentences, tokens = size.batches[-1]
    return {
        "settings": {"case": f"{sentences}x{tokens}", "reference": REFERENCE, "unit": "bytes"},
        "budget": limit,
        "variants": found,
    }


def budget(size: Size, fp32_peak: int) -> Json:
    """Return the bytes that a W4A8 step may hold, and what they are for."""
    model, batch = build(size), batch_of(size, *size.batches[-1])
    weights = sum(linear.weight.nbytes for linear in encoder_linears(model).values())
    inputs = sum(_input_bytes(model, batch))
    return {"fp32": fp32_peak, "weights": weights, "inputs": inputs, "budget": fp32_peak + weights + inputs}


def _input_bytes(model: nn.Module, batch: Batch) -> list[int]:
    """Return the size of each encoder layer's input."""
    found: list[int] = []

    def note(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        found.append(args[0].nbytes)

    for linear in encoder_linears(model).values():
        linear.register_forward_pre_hook(note)
    with torch.no_grad():
        loss_of(model, batch)
    return found


def weigh(method: Method, size: Size) -> Json:
    """Return the bytes held before a period of steps, and the most held during it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        try:
            run = method.ready(build(size), batch_of(size, *size.batches[-1]))
        except Missing as error:
            return {"missing": str(error)}
        for _ in range(WARMUP):
            run()
        with record_function(STEP):
            run()
    return totals(profiler)


def totals(profiler: profile) -> Json:
    """Read off a profile what was held when the measured step began, and the most during it."""
    recorded: Any = profiler.profiler
    events = list(_flat(recorded.kineto_results.experimental_event_tree()))
    (step,) = (event for event in events if event.name == STEP)
    held = sorted(
        (event.start_time_ns, event.extra_fields.total_allocated)
        for event in events
        if event.tag == _EventType.Allocation and event.extra_fields.device.type == "cpu"
    )
    before = [total for time, total in held if time < step.start_time_ns]
    during = [total for time, total in held if step.start_time_ns <= time <= step.end_time_ns]
    standing = before[-1] if before else 0
    return {"standing": standing, "peak": max([standing, *during])}


def _flat(events: Iterable[Any]) -> Iterator[Any]:
    stack = list(events)
    while stack:
        event = stack.pop()
        yield event
        stack.extend(event.children)


def _size(quick: bool) -> Size:
    return bert.QUICK if quick else bert.FULL


if __name__ == "__main__":
    print(json.dumps(weigh(methods()[sys.argv[1]], _size("--quick" in sys.argv))))
