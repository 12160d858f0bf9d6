import doctest
import math

import numpy as np
import pytest
import torch
from scipy.stats import rankdata

from recipes import glue_metrics
from recipes.glue_metrics import compute_metrics
from recipes.glue_tasks import TASKS, get_task

CLASSIFICATION = [task for task in TASKS.values() if not task.is_regression]
# Twenty sums of doubles in another order than the library's.
TOLERANCE = 64 * np.finfo(np.float64).eps


def test_the_metrics_of_each_task_are_the_papers() -> None:
    assert {name: task.metrics for name, task in TASKS.items()} == {
        "cola": ("matthews",),
        "sst2": ("accuracy",),
        "mrpc": ("accuracy", "f1"),
        "stsb": ("pearson", "spearman"),
        "qqp": ("accuracy", "f1"),
        "mnli": ("accuracy",),
        "qnli": ("accuracy",),
        "rte": ("accuracy",),
        "movies": ("accuracy",),
    }


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
def test_perfect_predictions_score_one_and_the_main_metric_comes_first(task) -> None:
    labels = [row % max(task.num_labels, 2) for row in range(12)]
    metrics = compute_metrics(task, labels, labels)
    assert metrics == pytest.approx(dict.fromkeys(task.metrics, 1.0), abs=TOLERANCE)
    assert tuple(metrics) == task.metrics
    assert all(type(value) is float for value in metrics.values())


def test_binary_metrics_are_their_closed_forms() -> None:
    # tp 3, fp 2, fn 1, tn 4
    predictions = [1] * 3 + [1] * 2 + [0] * 1 + [0] * 4
    labels = [1] * 3 + [0] * 2 + [1] * 1 + [0] * 4
    matthews = (3 * 4 - 2 * 1) / math.sqrt((3 + 2) * (3 + 1) * (4 + 2) * (4 + 1))
    assert compute_metrics(get_task("cola"), predictions, labels) == pytest.approx({"matthews": matthews})
    assert compute_metrics(get_task("mrpc"), predictions, labels) == pytest.approx({"accuracy": 0.7, "f1": 6 / 9})
    assert compute_metrics(get_task("movies"), predictions, labels) == pytest.approx({"accuracy": 0.7})


def test_three_class_accuracy_is_the_share_of_hits() -> None:
    assert compute_metrics(get_task("mnli"), [0, 1, 2, 0], [0, 1, 2, 2]) == {"accuracy": 0.75}


def test_correlations_are_their_closed_forms() -> None:
    predictions, labels = np.array([1.0, 4.0, 9.0, 16.0, 1.5]), np.array([0.0, 1.0, 5.0, 2.5, 1.0])

    def cosine(x: np.ndarray, y: np.ndarray) -> float:
        x, y = x - x.mean(), y - y.mean()
        return float(x @ y / math.sqrt((x @ x) * (y @ y)))

    metrics = compute_metrics(get_task("stsb"), predictions, labels)
    assert metrics["pearson"] == pytest.approx(cosine(predictions, labels), abs=TOLERANCE)
    assert metrics["spearman"] == pytest.approx(cosine(rankdata(predictions), rankdata(labels)), abs=TOLERANCE)
    assert compute_metrics(get_task("stsb"), -labels, labels) == pytest.approx({"pearson": -1.0, "spearman": -1.0})


@pytest.mark.parametrize("task", CLASSIFICATION, ids=lambda task: task.name)
@pytest.mark.parametrize("labels", [[0, 1, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]])
@pytest.mark.parametrize("answer", [0, 1])
def test_one_answer_to_everything_is_finite_and_warns_of_nothing(task, labels: list[int], answer: int) -> None:
    metrics = compute_metrics(task, [answer] * 4, labels)
    assert metrics.get("matthews", 0.0) == 0.0
    assert metrics.get("accuracy", sum(label == answer for label in labels) / 4) == labels.count(answer) / 4
    if answer == 0:
        assert metrics.get("f1", 0.0) == 0.0


@pytest.mark.parametrize(
    ("predictions", "labels"),
    [([2.5] * 3, [0.0, 1.0, 2.0]), ([0.0, 1.0, 2.0], [2.5] * 3), ([1.0], [2.0])],
)
def test_a_constant_score_correlates_with_nothing(predictions: list[float], labels: list[float]) -> None:
    assert compute_metrics(get_task("stsb"), predictions, labels) == {"pearson": 0.0, "spearman": 0.0}


def test_nearly_constant_scores_are_finite_and_warn_of_nothing() -> None:
    predictions = np.array([1.0, 1.0 + np.finfo(float).eps, 1.0, 1.0])
    assert all(map(math.isfinite, compute_metrics(get_task("stsb"), predictions, [0.0, 1.0, 2.0, 3.0]).values()))


def test_tensors_lists_and_float_labels_give_the_same() -> None:
    task = get_task("rte")
    expected = compute_metrics(task, [1, 0, 1], [1, 1, 1])
    assert compute_metrics(task, torch.tensor([1, 0, 1]), torch.tensor([1.0, 1.0, 1.0])) == expected


@pytest.mark.parametrize(
    ("name", "predictions", "labels", "message"),
    [
        ("rte", [[0.1, 0.9]], [1], r"shape \(rows,\), got \(1, 2\) and \(1,\).*argmax"),
        ("stsb", [[0.1], [0.2]], [1, 2], r"shape \(rows,\), got \(2, 1\) and \(2,\).*squeeze"),
        ("rte", [1, 0], [1], r"got \(2,\) and \(1,\)"),
        ("rte", [], [], "are empty"),
        ("rte", [2], [1], r"`predictions` must be class indices in \[0, 1\] for rte"),
        ("mnli", [1], [3], r"`labels` must be class indices in \[0, 2\] for mnli"),
        ("rte", [0.5], [1], "`predictions` must be class indices"),
        ("rte", [float("nan")], [1], "`predictions` must be class indices"),
        ("stsb", [float("nan"), 1.0], [1, 2], "`predictions` of stsb hold NaN or infinity"),
        ("stsb", [1.0, 2.0], [1, float("inf")], "`labels` of stsb hold NaN or infinity"),
    ],
)
def test_bad_arguments_are_refused(name: str, predictions, labels, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compute_metrics(get_task(name), predictions, labels)


def test_the_docstring_example_runs() -> None:
    result = doctest.testmod(glue_metrics)
    assert (result.failed, result.attempted) == (0, 2)
