"""Compare the finished runs of a folder: a table for the terminal and a picture.

    python -m recipes.compare runs/glue --task stsb

Runs whose settings differ in nothing but the seed are one row. Compute is always printed beside quality: a pass is one
forward and backward over a batch, and methods take one to three of them per step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Json = dict[str, Any]
RESULTS = "results.json"
ONE_SEED = "one seed: a demonstration, not evidence"
NOT_IN_LABELS = {"sharpness", "seed", "method", "bits", "activation_bits", "task", "recipe", "data", "evaluated_on"}


@dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but the seed: their results, and method, bits and what tells them from others."""

    label: str
    results: list[Json]

    def values(self, *path: str | int) -> list[float]:
        """Return one entry of each run's results."""
        found: list[Any] = self.results
        for key in path:
            found = [value[key] for value in found]
        return [float(value) for value in found]


def report(folder: Path, task: str) -> list[Path]:
    """Print and draw the comparison of a task, one for each set of rows that was measured on; return the pictures."""
    sets: dict[str, list[Json]] = {}
    for result in read_results(folder, task):
        sets.setdefault(result["config"]["evaluated_on"], []).append(result)
    pictures = []
    for number, (evaluated_on, found) in enumerate(sets.items(), 1):
        groups, title = grouped(found), f"{task}, measured on {evaluated_on}"
        pictures.append(folder / f"{task}{f'-{number}' if number > 1 else ''}.png")
        draw(groups, title, pictures[-1])
        print("\n".join(["", title, "", *table(groups), "", *notes(groups), f"picture: {pictures[-1]}"]), flush=True)
    return pictures


def read_results(folder: Path, task: str) -> list[Json]:
    """Return the results of all finished runs of a task, in the order of their folders' names."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob(f"*/{RESULTS}"))]
    return [result for result in found if result["config"]["task"] == task]


def grouped(results: Iterable[Json]) -> list[Group]:
    """Put runs that differ in the seed alone together: full precision first, then rounding, then by bits and name."""
    groups: dict[str, list[Json]] = {}
    for result in results:
        key = json.dumps({name: value for name, value in result["config"].items() if name != "seed"}, sort_keys=True)
        groups.setdefault(key, []).append(result)
    entries = []
    for found in groups.values():
        config = found[0]["config"]
        name = config["method"] + (f" {widths(config)}" if "bits" in config else "")
        rank = ({"fp32": 0, "rtn": 1}.get(config["method"], 2), config.get("bits", 0), name)
        entries.append((rank, flat(config, NOT_IN_LABELS), found))
    named = []
    for rank, settings, found in sorted(entries, key=lambda entry: entry[0]):
        others = [other for other_rank, other, _ in entries if other_rank == rank]
        differing = [f" {key}={value}" for key, value in settings.items() if any(o.get(key) != value for o in others)]
        named.append(Group(rank[2] + "".join(differing), found))
    return named


def widths(config: Mapping[str, Any]) -> str:
    """Return bits of weights and inputs, 32 for float.

    Example:
        >>> widths({"bits": 2, "activation_bits": 8}), widths({"bits": 3, "activation_bits": 8, "activations": None})
        ('W2A8', 'W3A32')
    """
    inputs = config["activation_bits"] if config.get("activations", "lsq") is not None else 32
    return f"W{config['bits']}A{inputs}"


def flat(config: Mapping[str, Any], without: Container[str] = (), prefix: str = "") -> Json:
    """Return settings without nesting.

    Example:
        >>> flat({"lr": 1e-5, "seed": 0, "fp32": {"epochs": 5}}, without={"seed"})
        {'lr': 1e-05, 'fp32.epochs': 5}
    """
    found: Json = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            found |= flat(value, without, f"{prefix}{key}.")
        elif key not in without:
            found[prefix + key] = value
    return found


def table(groups: Sequence[Group]) -> list[str]:
    """Return the lines of the table: metrics in percent, mean and standard error over the seeds."""
    first = groups[0].results[0]
    metrics = [(key, name) for key, values in first["dev"].items() for name in values if name != "loss"]
    radii = [entry["rho"] for entry in first["sharpness"]]
    header = ["method", *(f"{name} {key}" if len(first["dev"]) > 1 else name for key, name in metrics), "dev loss"]
    header += ["train loss", *(f"sharpness {rho:g}" for rho in radii), "epochs", "steps", "passes", "seconds", "seeds"]
    rows = [header]
    for group in groups:
        cells = [group.label, *(mean_and_error([100 * v for v in group.values("dev", *path)], 2) for path in metrics)]
        cells += [mean_and_error(group.values(name), 4) for name in ("dev_loss", "train_loss")]
        cells += [mean_and_error(group.values("sharpness", i, "value"), 4) for i in range(len(radii))]
        cells += [str(len(group.results[0]["epochs"]))]
        cells += [f"{statistics.mean(group.values(name)):.0f}" for name in ("steps", "passes", "seconds")]
        rows.append([*cells, str(len(group.results))])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(f"{cell:{'>' if i else '<'}{width}}" for i, (cell, width) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]
    return [lines[0], "-" * len(lines[0]), *lines[1:]]


def notes(groups: Sequence[Group]) -> list[str]:
    """Return the lines below the table."""
    lines = ["metrics in percent; a pass is one forward and backward over a batch; seconds are of the steps alone"]
    seeds = [len(group.results) for group in groups]
    lines += ["mean ± standard error over the seeds"] if max(seeds) > 1 else []
    lines += [ONE_SEED if max(seeds) == 1 else f"rows with {ONE_SEED}"] if min(seeds) == 1 else []
    return lines


def mean_and_error(values: Sequence[float], digits: int) -> str:
    """Format a mean and its standard error, the latter only if there are two values or more.

    Example:
        >>> mean_and_error([1.0, 3.0], 1), mean_and_error([2.0], 2)
        ('2.0 ± 1.0', '2.00')
    """
    mean = f"{statistics.mean(values):z.{digits}f}"
    return f"{mean} ± {_standard_error(values):.{digits}f}" if len(values) > 1 else mean


def _standard_error(values: Sequence[float]) -> float:
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def draw(groups: Sequence[Group], title: str, path: Path) -> None:
    """Draw the main metric of each group, and its course over the passes, into a PNG file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 1.6 + 0.45 * max(5, len(groups))), layout="constrained")
    figure.suptitle(title + (f" ({ONE_SEED})" if all(len(group.results) == 1 for group in groups) else ""), fontsize=10)
    final, course = figure.subplots(1, 2)
    name, key = groups[0].results[0]["metric_name"], next(iter(groups[0].results[0]["dev"]))
    for row, group in enumerate(groups):
        color, values = f"C{row % 10}", [100 * value for value in group.values("metric")]
        final.errorbar(statistics.mean(values), row, xerr=_standard_error(values), fmt="D", color=color, capsize=4)
        final.plot(values, [row] * len(values), ".", color=color, alpha=0.5)
        for result in group.results:
            if result["config"]["method"] == "fp32" or not result["epochs"]:  # a level to compare with, not a course
                course.axhline(100 * result["metric"], color=color, linestyle="--", linewidth=1)
            else:
                passes = [entry["passes"] for entry in result["epochs"]]
                course.plot(passes, [100 * e["dev"][key][name] for e in result["epochs"]], ".-", color=color)
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


if __name__ == "__main__":
    sys.exit(main())
