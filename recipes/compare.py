"""Compare the finished runs of a folder: a table for the terminal and a picture.

    python -m recipes.compare runs/glue --task stsb

Runs whose configurations differ in nothing but the seed are one row. Compute is always printed beside the quality: a
pass is one forward and backward over a batch, and methods take one to three of them a step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Json = dict[str, Any]
RESULTS = "results.json"
ONE_SEED = "one seed: a demonstration, not evidence"
NOT_IN_LABELS = {"sharpness", "seed", "method", "bits", "activation_bits", "task", "recipe", "data", "evaluated_on"}


@dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but the seed.

    Attributes:
        label: method and bits, and the settings that tell the group from others with the same.
        results: what each of them found.
    """

    label: str
    results: list[Json]

    def values(self, *path: str | int) -> list[float]:
        """Return one entry of each run's results."""
        found = []
        for result in self.results:
            value: Any = result
            for key in path:
                value = value[key]
            found.append(float(value))
        return found


def report(folder: Path, task: str) -> list[Path]:
    """Print the table of a task, and draw it; one of each for every set of rows that was measured on.

    Args:
        folder: the folder that holds the runs' folders.
        task: the task.

    Returns:
        The pictures that were written into `folder`.
    """
    found = read_results(folder, task)
    pictures: list[Path] = []
    for evaluated_on in dict.fromkeys(result["config"]["evaluated_on"] for result in found):
        some = [result for result in found if result["config"]["evaluated_on"] == evaluated_on]
        kind = "-holdout" if "holdout" in some[0]["dev"] else ""
        number = f"-{len(pictures) + 1}" if any(path.stem == f"{task}{kind}" for path in pictures) else ""
        groups = grouped(some)
        title = f"{task}, measured on {evaluated_on}"
        print("\n".join(["", title, "", *table(groups), "", *notes(groups)]), flush=True)
        pictures.append(folder / f"{task}{kind}{number}.png")
        draw(groups, title, pictures[-1])
        print(f"picture: {pictures[-1]}", flush=True)
    return pictures


def read_results(folder: Path, task: str) -> list[Json]:
    """Return the results of all finished runs of a task, in the order of their folders' names."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob(f"*/{RESULTS}"))]
    return [result for result in found if result["config"]["task"] == task]


def grouped(results: Iterable[Json]) -> list[Group]:
    """Put the runs that differ in nothing but the seed together, the groups in the order of their methods' names."""
    groups: dict[str, list[Json]] = {}
    for result in results:
        key = json.dumps({name: value for name, value in result["config"].items() if name != "seed"}, sort_keys=True)
        groups.setdefault(key, []).append(result)
    names = {key: _name(found[0]["config"]) for key, found in groups.items()}
    labels = {}
    for key, found in groups.items():
        others = [groups[other][0]["config"] for other, name in names.items() if name == names[key]]
        labels[key] = names[key] + _what_differs(found[0]["config"], others)
    order = sorted(groups, key=lambda key: (_rank(groups[key][0]["config"]), labels[key]))
    return [Group(labels[key], groups[key]) for key in order]


def table(groups: Sequence[Group]) -> list[str]:
    """Return the lines of the table: metrics in percent, mean and standard error over the seeds."""
    first = groups[0].results[0]
    metrics = [(key, name) for key, values in first["dev"].items() for name in values if name != "loss"]
    several = len(first["dev"]) > 1
    header = ["method", *(f"{name} {key}" if several else name for key, name in metrics)]
    radii = [entry["rho"] for entry in first.get("sharpness", ())]
    header += ["dev loss", "train loss", *(f"sharpness {rho:g}" for rho in radii)]
    header += ["epochs", "steps", "passes", "seconds", "seeds"]
    rows = [header]
    for group in groups:
        cells = [group.label, *(mean_and_error([100 * v for v in group.values("dev", *path)], 2) for path in metrics)]
        cells += [mean_and_error(group.values(name), 4) for name in ("dev_loss", "train_loss")]
        cells += [mean_and_error(group.values("sharpness", i, "value"), 4) for i in range(len(radii))]
        cells.append(str(len(group.results[0]["epochs"])))
        cells += [f"{statistics.mean(group.values(name)):.0f}" for name in ("steps", "passes", "seconds")]
        rows.append([*cells, str(len(group.results))])
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    lines = [_line(row, widths) for row in rows]
    return [lines[0], "-" * len(lines[0]), *lines[1:]]


def notes(groups: Sequence[Group]) -> list[str]:
    """Return what a reader of the table must know."""
    lines = ["metrics in percent; a pass is one forward and backward over a batch; seconds are of the steps alone"]
    seeds = [len(group.results) for group in groups]
    if max(seeds) > 1:
        lines.append("mean ± standard error over the seeds")
    if min(seeds) == 1:
        lines.append(ONE_SEED if max(seeds) == 1 else f"rows with {ONE_SEED}")
    return lines


def mean_and_error(values: Sequence[float], digits: int) -> str:
    """Format a mean and its standard error, the latter only if there are two values or more.

    Example:
        >>> mean_and_error([1.0, 3.0], 1), mean_and_error([2.0], 2)
        ('2.0 ± 1.0', '2.00')
    """
    mean = f"{statistics.mean(values):z.{digits}f}"
    return f"{mean} ± {_standard_error(values):.{digits}f}" if len(values) > 1 else mean


def draw(groups: Sequence[Group], title: str, path: Path) -> None:
    """Draw the main metric of each group, and its course over the passes.

    Args:
        groups: what to compare.
        title: of the picture.
        path: the PNG file; replaced as a whole.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 1.6 + 0.45 * max(5, len(groups))), layout="constrained")
    figure.suptitle(title + (f" ({ONE_SEED})" if all(len(group.results) == 1 for group in groups) else ""), fontsize=10)
    final, course = figure.subplots(1, 2)
    name = groups[0].results[0]["metric_name"]
    for row, group in enumerate(groups):
        color = f"C{row % 10}"
        values = [100 * value for value in group.values("metric")]
        final.errorbar(statistics.mean(values), row, xerr=_standard_error(values), fmt="D", color=color, capsize=4)
        final.plot(values, [row] * len(values), ".", color=color, alpha=0.5)
        _draw_course(course, group, color)
    final.set(yticks=range(len(groups)), yticklabels=[group.label for group in groups], xlabel=f"{name}, percent")
    final.invert_yaxis()
    final.grid(axis="x", alpha=0.3)
    course.set(xlabel="forward-backward passes", ylabel=f"{name}, percent")
    course.grid(alpha=0.3)
    figure.savefig(path.with_suffix(".partial"), format="png", dpi=120)
    path.with_suffix(".partial").replace(path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(prog="compare", description="Compare the finished runs of a folder.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--task", required=True)
    options = parser.parse_args(arguments)
    if not report(options.folder, options.task):
        print(f"compare: {options.folder} holds no finished run of {options.task}.", file=sys.stderr)
        return 2
    return 0


def _draw_course(axes, group: Group, color: str) -> None:
    for result in group.results:
        metric, key = result["metric_name"], next(iter(result["dev"]))
        if result["config"]["method"] in {"fp32", "rtn"}:  # a level to compare with, not a course
            axes.axhline(100 * result["metric"], color=color, linestyle="--", linewidth=1)
        else:
            passes = [entry["passes"] for entry in result["epochs"]]
            axes.plot(passes, [100 * entry["dev"][key][metric] for entry in result["epochs"]], ".-", color=color)


def _standard_error(values: Sequence[float]) -> float:
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def _name(config: Mapping) -> str:
    bits = f" W{config['bits']}A{config['activation_bits']}" if "bits" in config else ""
    return f"{config['method']}{bits}"


def _rank(config: Mapping) -> tuple[int, int, str]:
    """Full precision, then rounding, then by bits and name."""
    first = {"fp32": 0, "rtn": 1}.get(config["method"], 2)
    return first, config.get("bits", 0), config["method"]


def _what_differs(config: Mapping, others: Sequence[Mapping]) -> str:
    """Name the settings in which a configuration differs from others of the same method and bits."""
    flat, *rest = [_flat(config) for config in (config, *others)]
    differing = [key for key in flat if any(other.get(key) != flat[key] for other in rest)]
    return "".join(f" {key}={flat[key]}" for key in differing)


def _flat(config: Mapping, prefix: str = "") -> Json:
    flat: Json = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{key}."))
        elif key not in NOT_IN_LABELS:
            flat[prefix + key] = value
    return flat


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    """Align the first cell to the left and numbers to the right."""
    numbers = (f"{cell:>{width}}" for cell, width in zip(cells[1:], widths[1:], strict=True))
    return "  ".join([f"{cells[0]:<{widths[0]}}", *numbers])


if __name__ == "__main__":
    sys.exit(main())
