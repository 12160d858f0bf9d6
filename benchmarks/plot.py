"""docs/speed.png: ratios by method and peer, and the update's cost per weight by size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.measure import Json
from benchmarks.targets import Results, median


def plot(results: Results, path: Path) -> bool:
    """Draw both panels; return False, and draw nothing, where one of the benchmarks has not run."""
    if not {"step", "scale"} <= set(results):
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(2, 1))
    _bars(left, results["step"])
    _curve(right, results["scale"])
    figure.savefig(path, dpi=110)
    return True


def _bars(axes: Any, result: Json) -> None:
    """Draw a bar for each method and batch; peers are hatched."""
    cases = result["cases"]
    names = [name for name in result["methods"] if all("ratio" in case["variants"][name] for case in cases)]
    height = 0.8 / len(cases)
    for i, case in enumerate(cases):
        values = [case["variants"][name] for name in names]
        bars = axes.barh(
            [j + i * height for j in range(len(names))],
            [median(figures) for figures in values],
            height,
            xerr=[[median(f) - f["ratio"]["quartiles"][0] for f in values],
                  [f["ratio"]["quartiles"][1] - median(f) for f in values]],
            label=f"{case['case']} tokens",
        )  # fmt: skip
        for name, bar in zip(names, bars, strict=True):
            bar.set_hatch("//" if result["methods"][name]["peer"] else "")
    axes.set_yticks([j + 0.4 - height / 2 for j in range(len(names))], names)
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel("time of a training step / fp32 (hatched: peers)")
    axes.legend()


def _curve(axes: Any, result: Json) -> None:
    """Draw nanoseconds a weight by the number of weights."""
    updates = [u for u in result["updates"] if u["weights"] > 100_000]  # below, the calls are all of it
    weights = [u["weights"] for u in updates]
    extra = [u["extra_nanoseconds_a_weight"] for u in updates]
    axes.plot(weights, [e["median"] for e in extra], marker="o")
    axes.fill_between(weights, *zip(*(e["quartiles"] for e in extra), strict=True), alpha=0.3)
    axes.set_xscale("log")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("quantized weights")
    axes.set_ylabel("update beyond the base's, ns a weight")
