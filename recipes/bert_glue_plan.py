"""What `recipes.bert_glue` is going to run: the rows, and one run (folder and configuration) a method and seed."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace
from pathlib import Path

from recipes import ranks
from recipes.bert_glue_options import EMBEDDED_MODEL, Options, method_settings
from recipes.glue_data import Splits, Task, fixed_order, get_task, load_task
from recipes.methods import parse_method
from recipes.runs import Json, Run

EMBEDDED_TASKS = ("stsb", "movies")


@dataclass(frozen=True)
class Rows:
    """The rows of a command.

    Attributes:
        task: the task.
        splits: training rows, and the rows that metrics are measured on.
        evaluated_on: which rows the latter are.
    """

    task: Task
    splits: Splits
    evaluated_on: str


def load_rows(options: Options) -> Rows:
    """Load the rows from the source that the options name; with `--holdout`, set a part of the training rows apart.

    Raises:
        ConnectionError: if the hub does not give them.
        FileNotFoundError: if a file is missing.
        ValueError: if a row cannot be read, or the options contradict each other.
    """
    task = get_task(options.task)
    embedded = task.name == "movies" or (task.name in EMBEDDED_TASKS and options.model == EMBEDDED_MODEL)
    hub = options.hub or (options.glue_dir is None and not embedded)
    splits = load_task(task, glue_dir=options.glue_dir, hub=hub, train_rows=options.train_rows)
    if options.holdout is None:
        counts = ", ".join(f"{len(rows):,} {key} rows" for key, rows in splits.dev.items())
        return Rows(task, splits, f"the full dev set ({counts})")
    held = round(options.holdout * len(splits.train))
    if not 0 < held < len(splits.train):
        raise ValueError(
            f"`--holdout` {options.holdout} of {len(splits.train)} training rows leaves nothing on one side."
        )
    order = fixed_order(len(splits.train))
    dev = {"holdout": [splits.train[i] for i in sorted(order[:held])]}
    train = [splits.train[i] for i in sorted(order[held:])]
    what = f"{held:,} training rows that are held out of training (a fixed random part), not the dev set"
    return Rows(task, replace(splits, train=train, dev=dev), what)


def planned_runs(options: Options, rows: Rows) -> dict[tuple[str, int], Run]:
    """Return one run a method and seed, the full-precision ones first, and refuse what would lose or mix results.

    Raises:
        ValueError: if a folder holds another run, or this one and there is no `--resume`.
    """
    methods = ["fp32", *(method for method in options.method if method != "fp32")]
    runs = {(method, seed): _run(options, rows, method, seed) for method in methods for seed in options.seed}
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


def fingerprint(splits: Splits) -> str:
    """Return a hash of all rows, so that a run is never continued with other data."""
    digest = hashlib.sha256()
    for rows in (splits.train, *splits.dev.values()):
        for row in rows:
            digest.update(repr((row.text_a, row.text_b, float(row.label))).encode())
        digest.update(b"|")
    return digest.hexdigest()[:16]


def _run(options: Options, rows: Rows, method: str, seed: int) -> Run:
    config = _config(options, rows, method, seed)
    tag = f"-{options.tag}" if options.tag and method != "fp32" else ""
    bits = f"-w{config['bits']}a{config['activation_bits']}" if "bits" in config else ""
    name = f"{options.task}-{parse_method(method).folder}{bits}{tag}-seed{seed}"
    return Run(Path(options.output_dir) / name, config)


def _config(options: Options, rows: Rows, method: str, seed: int) -> Json:
    """Return everything that decides the run's result."""
    fp32: Json = {"epochs": options.fp32_epochs, "lr": options.fp32_lr, "max_steps": options.max_steps}
    shared: Json = {
        "recipe": "bert_glue",
        "task": options.task,
        "method": method,
        "seed": seed,
        "model": options.model,
        "data": rows.splits.source,
        "data_sha256": fingerprint(rows.splits),
        "evaluated_on": rows.evaluated_on,
        "max_length": options.max_length,
        "batch_size": options.batch_size,
        "precision": options.precision,
    }
    if ranks.count() > 1:  # each has random numbers of its own: another number of processes is another run
        shared["processes"] = ranks.count()
    if method == "fp32":
        return {**shared, **fp32}
    parsed = parse_method(method)
    settings = parsed.configured(method_settings(options))
    if not parsed.trains:
        return {**shared, **settings, "fp32": fp32}
    own = {"epochs": options.epochs, "lr": options.lr, "max_steps": options.max_steps}
    return {**shared, **own, **settings, "fp32": fp32}
