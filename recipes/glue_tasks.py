"""What a task is: its labels, its metrics, and its columns in the two places GLUE comes from.

`cola sst2 mrpc stsb qqp mnli qnli rte` are the eight GLUE tasks of SQuAT's tables, with the labels of the hub's
`nyu-mll/glue`. `movies` is sentiment in the style of SST-2, for a machine without GLUE.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

MAX_SCORE = 5.0


@dataclass(frozen=True)
class Row:
    """One example.

    Attributes:
        text_a: the sentence, or the first of a pair.
        text_b: the second sentence of a pair, else None.
        label: the class index (an int), or for `stsb` the similarity in [0, 5].
    """

    text_a: str
    text_b: str | None
    label: float


@dataclass(frozen=True)
class FileLayout:
    """Where a task lies in the standard GLUE download: tab-separated, no quoting.

    Attributes:
        folder: its folder.
        texts: its one or two text columns.
        label: its label column.
        label_words: the labels as the file spells them, in the order of the class index; empty for a score.
        columns: the columns of files that have no header line, else empty.
        max_short_rows: how many rows with missing columns the official files are allowed to have.
    """

    folder: str
    texts: tuple[str, ...]
    label: str
    label_words: tuple[str, ...] = ("0", "1")
    columns: tuple[str, ...] = ()
    max_short_rows: int = 0


@dataclass(frozen=True)
class Task:
    """A classification task, or with no label names a regression.

    Attributes:
        name: its name here and on the hub.
        label_names: the name of each class index; empty for a regression.
        main_metric: the metric of SQuAT's Table 1.
        auxiliary_metrics: those of its Table 2, without MNLI's mismatched accuracy, which is a dev split of its own.
        official_train_rows: training rows of `nyu-mll/glue`; None for a task that is not in GLUE.
        dev_keys: the names of its dev splits.
        hub_texts: its one or two text columns on the hub; empty if it is not there.
        files: its place in the GLUE download; None if it is not there.
    """

    name: str
    label_names: tuple[str, ...]
    main_metric: str
    auxiliary_metrics: tuple[str, ...] = ()
    official_train_rows: int | None = None
    dev_keys: tuple[str, ...] = ("dev",)
    hub_texts: tuple[str, ...] = ()
    files: FileLayout | None = None

    @property
    def num_labels(self) -> int:
        """Width of the model's head: the number of classes, 1 for a regression."""
        return len(self.label_names) or 1

    @property
    def is_regression(self) -> bool:
        """Whether the label is a score and not a class."""
        return not self.label_names

    @property
    def metrics(self) -> tuple[str, ...]:
        """All metrics, the main one first."""
        return (self.main_metric, *self.auxiliary_metrics)


_PAIR = ("sentence1", "sentence2")
_ENTAILMENT = ("entailment", "not_entailment")
_MNLI = ("entailment", "neutral", "contradiction")

_ALL = (
    Task(
        name="cola",
        label_names=("unacceptable", "acceptable"),
        main_metric="matthews",
        official_train_rows=8_551,
        hub_texts=("sentence",),
        files=FileLayout("CoLA", ("sentence",), "label", columns=("source", "label", "star", "sentence")),
    ),
    Task(
        name="sst2",
        label_names=("negative", "positive"),
        main_metric="accuracy",
        official_train_rows=67_349,
        hub_texts=("sentence",),
        files=FileLayout("SST-2", ("sentence",), "label"),
    ),
    Task(
        name="mrpc",
        label_names=("not_equivalent", "equivalent"),
        main_metric="accuracy",
        auxiliary_metrics=("f1",),
        official_train_rows=3_668,
        hub_texts=_PAIR,
        files=FileLayout("MRPC", ("#1 String", "#2 String"), "Quality"),
    ),
    Task(
        name="stsb",
        label_names=(),
        main_metric="pearson",
        auxiliary_metrics=("spearman",),
        official_train_rows=5_749,
        hub_texts=_PAIR,
        files=FileLayout("STS-B", _PAIR, "score", label_words=()),
    ),
    Task(
        name="qqp",
        label_names=("not_duplicate", "duplicate"),
        main_metric="accuracy",
        auxiliary_metrics=("f1",),
        official_train_rows=363_846,
        hub_texts=("question1", "question2"),
        # A few questions hold a line break or lack a column; the hub leaves those rows out too.
        files=FileLayout("QQP", ("question1", "question2"), "is_duplicate", max_short_rows=10),
    ),
    Task(
        name="mnli",
        label_names=_MNLI,
        main_metric="accuracy",
        official_train_rows=392_702,
        dev_keys=("matched", "mismatched"),
        hub_texts=("premise", "hypothesis"),
        files=FileLayout("MNLI", _PAIR, "gold_label", label_words=_MNLI),
    ),
    Task(
        name="qnli",
        label_names=_ENTAILMENT,
        main_metric="accuracy",
        official_train_rows=104_743,
        hub_texts=("question", "sentence"),
        files=FileLayout("QNLI", ("question", "sentence"), "label", label_words=_ENTAILMENT),
    ),
    Task(
        name="rte",
        label_names=_ENTAILMENT,
        main_metric="accuracy",
        official_train_rows=2_490,
        hub_texts=_PAIR,
        files=FileLayout("RTE", _PAIR, "label", label_words=_ENTAILMENT),
    ),
    Task(name="movies", label_names=("negative", "positive"), main_metric="accuracy"),
)

TASKS: Mapping[str, Task] = MappingProxyType({task.name: task for task in _ALL})


def get_task(name: str) -> Task:
    """Look a task up by name.

    Args:
        name: one of the keys of `TASKS`.

    Returns:
        The task.

    Raises:
        ValueError: if there is no such task; the message gives the nearest names.
    """
    if name in TASKS:
        return TASKS[name]
    near = difflib.get_close_matches(name.lower().replace("-", ""), TASKS, n=2)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    raise ValueError(f"`task` must be one of {', '.join(TASKS)}, got {name!r}.{hint}")


def parse_score(value: str | float) -> float:
    """Read a similarity score.

    Args:
        value: a number, or how a file spells it.

    Returns:
        The score, in [0, 5].

    Raises:
        ValueError: if it is not a number in [0, 5] (NaN is not).
    """
    try:
        score = float(value)
    except (TypeError, ValueError):
        score = float("nan")
    if not 0.0 <= score <= MAX_SCORE:
        raise ValueError(f"the score must be a number in [0, {MAX_SCORE:g}], got {value!r}")
    return score
