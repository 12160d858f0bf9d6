"""The targets of speed and memory, and whether the measurements meet them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.measure import Json

STEP_TARGETS: Mapping[str, float | Mapping[str, float]] = {
    "QAT": {"16x32": 1.08, "32x64": 1.05},
    "SAQ": 2.1,
    "SQuAT, fused": 2.1,
    "SQuAT, same_batch": 3.1,
    "SAQ, every=5": 1.25,
    "SQuAT, fused, every=5": 1.25,
    "SAQ, momentum": 1.1,
    "SAQ, previous": 1.1,
}
COPIES = 1.5
FIRST_USE_SECONDS = {"cold": 5.0, "warm": 0.5}
MEMORY_METHODS = ("QAT", "SAQ", "SQuAT, same_batch", "SQuAT, fused")
RIVALS = {
    "QAT": ("LSQ in the graph, eager", "LSQ in the graph, torch.compile", "torchao QAT", "brevitas"),
    "SAQ": ("SAM of pytorch_optimizer, LSQ in the graph",),
}
"""Peers, each with the method of ours that has as many passes and quantizes too."""

Results = Mapping[str, Json]
"""The JSON of each benchmark by its name, of those that have run."""


@dataclasses.dataclass(frozen=True)
class Target:
    """One promise.

    Attributes:
        what: In words.
        limit: The largest value that keeps it.
        value: As measured, a median where there are several rounds.
        unit: What follows the number.
    """

    what: str
    limit: float
    value: float
    unit: str = "x"

    @property
    def met(self) -> bool:
        """Whether it is kept: by the number in the JSON, not as the table rounds it."""
        return self.value <= self.limit


def targets(results: Results) -> list[Target]:
    """Return every target whose benchmark has run."""
    readers = {"kernels": _kernels, "step": _step, "memory": _memory}
    return [target for name, reader in readers.items() if name in results for target in reader(results[name])]


def _kernels(result: Json) -> Iterator[Target]:
    for case in result["fake_quantize"]:
        value = median(case["variants"]["qsam, compiled"])
        yield Target(f"fake quantization of {case['case']}, against three copies", COPIES, value)
    for state, limit in FIRST_USE_SECONDS.items():
        yield Target(f"first use of the kernels, {state}", limit, result["first_use_seconds"][state], " s")


def _step(result: Json) -> Iterator[Target]:
    for name, limits in STEP_TARGETS.items():
        for case in result["cases"]:
            limit = limits.get(case["case"]) if isinstance(limits, Mapping) else limits
            if limit is not None and name in case["variants"]:
                yield Target(f"{name}, a step at {case['case']}, against fp32", limit, median(case["variants"][name]))


def _memory(result: Json) -> Iterator[Target]:
    for name in MEMORY_METHODS:
        if name in result["variants"]:
            yield Target(f"{name}, memory, against the budget", 1.0, result["variants"][name]["of_budget"])


def median(figures: Mapping[str, Any]) -> float:
    """Return the median ratio of one variant."""
    found: float = figures["ratio"]["median"]
    return found


def ahead(results: Results) -> list[str]:
    """Return a sentence for each place where another way is faster, or smaller, than ours."""
    return [sentence for contest in _contests(results) for sentence in _ahead(*contest)]


def _contests(results: Results) -> Iterator[tuple[str, str, Sequence[str], Mapping[str, float]]]:
    """Yield where, our way, the others, and every way's value."""
    for case in results.get("kernels", {}).get("fake_quantize", ()):
        ways = {name: median(figures) for name, figures in case["variants"].items()}
        rest = [name for name in ways if not name.startswith(("qsam", "three"))]
        yield f"fake quantization of {case['case']}", "qsam, compiled", rest, ways
    for case in results.get("step", {}).get("cases", ()):
        times = {name: median(figures) for name, figures in case["variants"].items() if "ratio" in figures}
        yield from ((f"a step at {case['case']}", ours, others, times) for ours, others in RIVALS.items())
    if "memory" in results:
        peaks = {name: f["of_fp32"] for name, f in results["memory"]["variants"].items() if "of_fp32" in f}
        yield from (("the memory of a step", ours, others, peaks) for ours, others in RIVALS.items())


def _ahead(where: str, ours: str, others: Sequence[str], values: Mapping[str, float]) -> Iterator[str]:
    for other in others:
        if ours in values and other in values and values[other] < values[ours]:
            yield f"{where}: {other} is ahead of {ours}, {values[other]:.3g} against {values[ours]:.3g}."
