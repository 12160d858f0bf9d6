"""The metrics of the GLUE tasks, as fractions, computed by scikit-learn and scipy.

Where a correlation or F1 is 0/0 (a model that gives one answer to everything) it is 0, as GLUE's tables print it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from recipes.glue_tasks import Task

Array = NDArray[Any]


def compute_metrics(task: Task, predictions: ArrayLike, labels: ArrayLike) -> dict[str, float]:
    """Compute all metrics of a task over one dev split.

    Args:
        task: the task.
        predictions: shape `(rows,)`, on the CPU: predicted class indices, or for `stsb` predicted scores.
        labels: shape `(rows,)`: the rows' labels.

    Returns:
        Metric name to value, in fractions (not percent), the main metric first. Always finite.

    Raises:
        ValueError: if the shapes differ or are not `(rows,)`, if there are no rows, if a class index is not one of the
            task's, or if a score is NaN or infinite.

    >>> from recipes.glue_tasks import get_task
    >>> compute_metrics(get_task("mrpc"), [1, 1, 1, 0], [1, 1, 0, 0])  # f1 = 2*2 / (2*2 + 1 + 0)
    {'accuracy': 0.75, 'f1': 0.8}
    """
    predicted, true = np.asarray(predictions), np.asarray(labels)
    _check_shapes(predicted, true)
    read = _scores if task.is_regression else _classes
    predicted, true = read(task, "predictions", predicted), read(task, "labels", true)
    return {name: _METRICS[name](true, predicted) for name in task.metrics}


def _check_shapes(predicted: Array, true: Array) -> None:
    if predicted.ndim != 1 or predicted.shape != true.shape:
        raise ValueError(
            "`predictions` and `labels` must both have shape (rows,), "
            f"got {predicted.shape} and {true.shape}. Logits need `.argmax(-1)`, or `.squeeze(-1)` for a regression."
        )
    if predicted.size == 0:
        raise ValueError("`predictions` and `labels` are empty: a metric needs at least one row.")


def _classes(task: Task, name: str, values: Array) -> Array:
    if not np.isin(values, np.arange(task.num_labels)).all():
        raise ValueError(f"`{name}` must be class indices in [0, {task.num_labels - 1}] for {task.name}.")
    return values.astype(np.int64)


def _scores(task: Task, name: str, values: Array) -> Array:
    scores = values.astype(np.float64)
    if not np.isfinite(scores).all():
        raise ValueError(f"`{name}` of {task.name} hold NaN or infinity: the training has diverged.")
    return scores


def _accuracy(true: Array, predicted: Array) -> float:
    from sklearn.metrics import accuracy_score

    return float(accuracy_score(true, predicted))


def _f1(true: Array, predicted: Array) -> float:
    from sklearn.metrics import f1_score

    return float(f1_score(true, predicted, zero_division=0.0))


def _matthews(true: Array, predicted: Array) -> float:
    from sklearn.metrics import matthews_corrcoef

    if np.ptp(true) == 0 or np.ptp(predicted) == 0:  # scikit-learn warns of a single label
        return 0.0
    return float(matthews_corrcoef(true, predicted))


def _pearson(true: Array, predicted: Array) -> float:
    from scipy.stats import pearsonr

    return _correlation(pearsonr, true, predicted)


def _spearman(true: Array, predicted: Array) -> float:
    from scipy.stats import spearmanr

    return _correlation(spearmanr, true, predicted)


def _correlation(function: Callable[..., Any], true: Array, predicted: Array) -> float:
    if np.ptp(true) == 0 or np.ptp(predicted) == 0:  # this covers a single row, which scipy refuses
        return 0.0
    from scipy.stats import NearConstantInputWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NearConstantInputWarning)
        value = float(function(true, predicted).statistic)
    return value if np.isfinite(value) else 0.0


_METRICS: Mapping[str, Callable[[Array, Array], float]] = {
    "accuracy": _accuracy,
    "f1": _f1,
    "matthews": _matthews,
    "pearson": _pearson,
    "spearman": _spearman,
}
