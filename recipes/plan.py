"""What a command is going to run: one run (folder and configuration) a method and seed."""

from __future__ import annotations

import math
from pathlib import Path

from recipes import ranks
from recipes.methods import parse_method
from recipes.options import SharedOptions
from recipes.runs import Json, Run


def planned_runs(options: SharedOptions, shared: Json, quantized: Json | None = None) -> dict[tuple[str, int], Run]:
    """Return one run a method and seed, the full-precision ones first, and refuse what would lose or mix results.

    Args:
        options: the command line.
        shared: what decides the result of every run and is the recipe's own, `"task"` among it: that is how the
            folders' names begin.
        quantized: the same for the runs that are not full precision.

    Raises:
        ValueError: if a folder holds another run, or this one and there is no `--resume`.
    """
    methods = ["fp32", *(method for method in options.method if method != "fp32")]
    runs = {
        (method, seed): _run(options, shared if method == "fp32" else {**shared, **(quantized or {})}, method, seed)
        for method in methods
        for seed in options.seed
    }
    for (method, _), run in runs.items():
        reused = method == "fp32" and "fp32" not in options.method and run.is_finished
        run.check(options.resume or reused)
    return runs


def training_steps(config: Json, rows: int) -> int:
    """Return the number of steps of a run: its epochs, capped; a method like `lsq3x` has 3 times as many.

    Example:
        >>> training_steps({"method": "lsq1.5x", "epochs": 2, "batch_size": 4, "max_steps": None}, rows=10)
        9
    """
    steps = config["epochs"] * math.ceil(rows / config["batch_size"])
    return math.ceil(parse_method(config["method"]).factor * min(steps, config["max_steps"] or steps))


def _run(options: SharedOptions, shared: Json, method: str, seed: int) -> Run:
    config = _config(options, shared, method, seed)
    tag = f"-{options.tag}" if options.tag and method != "fp32" else ""
    bits = f"-w{config['bits']}a{config['activation_bits']}" if "bits" in config else ""
    name = f"{shared['task']}-{parse_method(method).folder}{bits}{tag}-seed{seed}"
    return Run(Path(options.output_dir) / name, config)


def _config(options: SharedOptions, recipe: Json, method: str, seed: int) -> Json:
    """Return everything that decides the run's result."""
    fp32: Json = {"epochs": options.fp32_epochs, "lr": options.fp32_lr, "max_steps": options.max_steps}
    shared: Json = {**recipe, "method": method, "seed": seed, "model": options.model}
    shared |= {"batch_size": options.batch_size, "precision": options.precision}
    if options.sharpness:
        shared["sharpness"] = options.sharpness
    if ranks.count() > 1:  # each has random numbers of its own: another number of processes is another run
        shared["processes"] = ranks.count()
    if method == "fp32":
        return {**shared, **fp32}
    parsed = parse_method(method)
    settings = parsed.configured(options.method_settings)
    if not parsed.trains:
        return {**shared, **settings, "fp32": fp32}
    own = {"epochs": options.epochs, "lr": options.lr, "max_steps": options.max_steps}
    return {**shared, **own, **settings, "fp32": fp32}
