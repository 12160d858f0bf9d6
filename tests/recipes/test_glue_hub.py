import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from recipes.glue_hub import hub_rows, rows_from_columns
from recipes.glue_tasks import TASKS, Row, get_task

HUB_TASKS = [task for task in TASKS.values() if task.hub_texts]

# Columns of the hub's `nyu-mll/glue`, besides idx.
COLUMNS = {
    "cola": ("sentence",),
    "sst2": ("sentence",),
    "mrpc": ("sentence1", "sentence2"),
    "stsb": ("sentence1", "sentence2"),
    "qqp": ("question1", "question2"),
    "mnli": ("premise", "hypothesis"),
    "qnli": ("question", "sentence"),
    "rte": ("sentence1", "sentence2"),
}


def columns(name: str, labels: list[Any]) -> dict[str, list[Any]]:
    texts = {column: [f"{column} {row}" for row in range(len(labels))] for column in COLUMNS[name]}
    return {**texts, "label": labels, "idx": list(range(len(labels)))}


def expected(name: str, labels: list[Any]) -> list[Row]:
    first, *second = COLUMNS[name]
    return [Row(f"{first} {row}", f"{second[0]} {row}" if second else None, label) for row, label in enumerate(labels)]


@pytest.mark.parametrize("task", HUB_TASKS, ids=lambda task: task.name)
def test_hub_columns_become_rows(task: Any) -> None:
    from datasets import ClassLabel, Dataset, Features, Value

    labels = [2.5, 0.0] if task.is_regression else list(range(task.num_labels))
    table = columns(task.name, labels)
    label = Value("float32") if task.is_regression else ClassLabel(names=list(task.label_names))
    texts = {column: Value("string") for column in COLUMNS[task.name]}
    dataset = Dataset.from_dict(table, features=Features({**texts, "label": label, "idx": Value("int32")}))
    assert rows_from_columns(task, table) == expected(task.name, labels)
    assert rows_from_columns(task, dataset) == expected(task.name, labels)


def test_label_names_of_the_hub_must_be_the_tasks() -> None:
    from datasets import ClassLabel, Dataset, Features, Value

    label = ClassLabel(names=["not_entailment", "entailment"])
    text = Value("string")
    features = Features({"sentence1": text, "sentence2": text, "label": label, "idx": Value("int32")})
    dataset = Dataset.from_dict(columns("rte", [0]), features=features)
    with pytest.raises(ValueError, match=r"rte has the labels \['not_entailment', 'entailment'\], expected \['ent"):
        rows_from_columns(get_task("rte"), dataset)


@pytest.mark.parametrize("label", [-1, 2, None, "entailment", 0.5])
def test_a_label_that_is_no_class_names_its_row(label: Any) -> None:
    with pytest.raises(ValueError, match=f"row 1 of the hub's rte has the label {label!r}"):
        rows_from_columns(get_task("rte"), columns("rte", [0, label]))


@pytest.mark.parametrize("label", [-1.0, 5.5, float("nan"), None])
def test_a_score_out_of_range_names_its_row(label: Any) -> None:
    with pytest.raises(ValueError, match=f"row 0 of the hub's stsb has the label {label!r}"):
        rows_from_columns(get_task("stsb"), columns("stsb", [label]))


@pytest.mark.parametrize("missing", ["sentence2", "label"])
def test_a_missing_hub_column_is_named(missing: str) -> None:
    table = columns("mrpc", [0])
    del table[missing]
    with pytest.raises(ValueError, match=f"the hub's mrpc has no column '{missing}'"):
        rows_from_columns(get_task("mrpc"), table)


def test_movies_are_not_on_the_hub() -> None:
    with pytest.raises(ValueError, match=r"movies is not on the hub\. Leave `hub` out"):
        hub_rows(get_task("movies"))


def test_a_hub_that_is_not_reached_is_a_clear_error(tmp_path: Path) -> None:
    # A process of its own: the hub's client reads these variables when it is imported.
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    program = "from recipes.glue_data import *; load_task(get_task('stsb'), hub=True)"
    root = Path(__file__).parents[2]
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=root, env=environment, capture_output=True, text=True, check=False
    )
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ConnectionError: The hub did not give nyu-mll/glue, stsb, train: ")
    assert "give --glue-dir" in last
    assert "embedded default, which has stsb and movies" in last
