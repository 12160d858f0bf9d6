"""Rows of the GLUE tasks from the hub's `nyu-mll/glue`, by the `datasets` library."""

from __future__ import annotations

from typing import Any

from recipes.glue_tasks import Row, Task, parse_score

HUB_NAME = "nyu-mll/glue"


def hub_rows(task: Task) -> dict[str, list[Row]]:
    """Load a task from the hub, or from what `datasets` keeps of it on this machine.

    Args:
        task: the task.

    Returns:
        The rows of `"train"` and of each of the task's dev splits.

    Raises:
        ConnectionError: if the hub does not give the data.
        ValueError: if the task is not on the hub, or its columns or labels are not the expected ones.
    """
    if not task.hub_texts:
        raise ValueError(f"{task.name} is not on the hub. Leave `hub` out: its rows are the embedded default.")
    dev = {key: "validation" if key == "dev" else f"validation_{key}" for key in task.dev_keys}
    return {key: rows_from_columns(task, _table(task, split)) for key, split in {"train": "train", **dev}.items()}


def _table(task: Task, split: str) -> Any:
    from datasets import load_dataset

    try:
        return load_dataset(HUB_NAME, task.name, split=split)
    except (OSError, ValueError) as error:  # what `datasets` raises offline, without and with other tasks in its cache
        raise ConnectionError(
            f"The hub did not give {HUB_NAME}, {task.name}, {split}: {error}. Without the hub, "
            "give --glue-dir a GLUE download on disk, or use the embedded default, which has stsb and movies."
        ) from error


def rows_from_columns(task: Task, table: Any) -> list[Row]:
    """Turn a table of the hub into rows.

    Args:
        task: the task.
        table: a `datasets.Dataset`, or any mapping of column names to sequences.

    Returns:
        The rows in the order of the table.

    Raises:
        ValueError: if a column is missing, the table's label names are not the task's, or a label is bad.
    """
    names = (*task.hub_texts, "label")
    missing = [name for name in names if name not in getattr(table, "column_names", table)]
    if missing:
        raise ValueError(f"the hub's {task.name} has no column {missing[0]!r}.")
    _check_label_names(task, table)
    columns = [table[name] for name in names]
    return [_row(task, number, *cells) for number, cells in enumerate(zip(*columns, strict=True))]


def _check_label_names(task: Task, table: Any) -> None:
    label = getattr(table, "features", {}).get("label")
    names = getattr(label, "names", None)
    if names is not None and tuple(names) != task.label_names:
        raise ValueError(f"the hub's {task.name} has the labels {names}, expected {list(task.label_names)}.")


def _row(task: Task, number: int, *cells: Any) -> Row:
    *texts, label = cells
    try:
        value = parse_score(label) if task.is_regression else range(task.num_labels).index(label)
    except ValueError:
        raise ValueError(
            f"row {number} of the hub's {task.name} has the label {label!r}, not one of its own."
        ) from None
    return Row(texts[0], texts[1] if len(texts) > 1 else None, value)
