"""The rows of `recipes.bert_glue`: which source they come from, and what is set apart."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

from recipes.bert_glue_options import EMBEDDED_MODEL, Options
from recipes.glue_data import Splits, Task, get_task, load_task
from recipes.subsets import held_out, held_out_words

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
    train, held = held_out(splits.train, options.holdout)
    return Rows(task, replace(splits, train=train, dev={"holdout": held}), held_out_words(len(held)))


def fingerprint(splits: Splits) -> str:
    """Return a hash of all rows, so that a run is never continued with other data."""
    digest = hashlib.sha256()
    for rows in (splits.train, *splits.dev.values()):
        for row in rows:
            digest.update(repr((row.text_a, row.text_b, float(row.label))).encode())
        digest.update(b"|")
    return digest.hexdigest()[:16]
