"""The model of `recipes.bert_glue`: loading and saving it, its tokens, its loss and its metrics."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import qsam
from recipes.bert_glue_options import EMBEDDED_MODEL
from recipes.bert_glue_rows import Rows
from recipes.experiment import DEVICE, TRAIN_LOSS_ROWS, Metrics, floats_only
from recipes.glue_data import Task, compute_metrics, embedded_model_dir
from recipes.subsets import part_of
from recipes.text_batches import Encoded, encode, sorted_batches

EVALUATION_ROWS = 64


@dataclass(frozen=True)
class Data:
    """Tokenized rows.

    Attributes:
        task: the task.
        train: the rows to train on.
        train_part: a fixed random part of them (1,000, or all if there are fewer), for the training loss at the end.
        dev: by name, the rows that metrics are measured on; the first of them gives the run's metric.
        tokenizer: what made the tokens.
    """

    task: Task
    train: Encoded
    train_part: Encoded
    dev: dict[str, Encoded]
    tokenizer: Any


def load_data(rows: Rows, model: str, max_length: int) -> Data:
    """Tokenize the rows as the model wants them.

    Args:
        rows: the rows.
        model: folder or hub name of the model, or `EMBEDDED_MODEL`.
        max_length: tokens after which a row is cut.

    Raises:
        OSError: if there is no such tokenizer, or the hub cannot be reached.
    """
    tokenizer = _from_pretrained(AutoTokenizer, model)
    limit = min(max_length, tokenizer.model_max_length)
    train = rows.splits.train
    part = part_of(train, TRAIN_LOSS_ROWS)
    dev = {name: encode(tokenizer, some, limit, rows.task) for name, some in rows.splits.dev.items()}
    return Data(
        rows.task, encode(tokenizer, train, limit, rows.task), encode(tokenizer, part, limit, rows.task), dev, tokenizer
    )


def load_model(model: str, task: Task) -> nn.Module:
    """Load a model with a head for the task, in fp32.

    Args:
        model: folder or hub name, or `EMBEDDED_MODEL`.
        task: the task.

    Raises:
        OSError: if there is no such model, or the hub cannot be reached: no other model takes its place.
    """
    labels: dict[str, Any] = {"num_labels": 1, "problem_type": "regression"}
    if not task.is_regression:
        labels = {
            "id2label": dict(enumerate(task.label_names)),
            "label2id": {n: i for i, n in enumerate(task.label_names)},
        }
    labels |= {"ignore_mismatched_sizes": True}  # a head of another task is drawn anew, like one that is missing
    loaded: nn.Module = _from_pretrained(AutoModelForSequenceClassification, model, dtype=torch.float32, **labels)
    return loaded.to(DEVICE)


def save_model(folder: Path, model: Any, tokenizer: Any, coverage: qsam.Coverage | None) -> None:
    """Write an ordinary checkpoint, its weights on the grid, and beside it what rebuilds the quantizers."""
    model.save_pretrained(folder, state_dict=floats_only(model.state_dict()))
    tokenizer.save_pretrained(folder)
    if coverage is not None:
        coverage.save(folder)  # qsam


def logits_of(model: nn.Module, inputs: dict[str, Tensor], precision: str) -> Tensor:
    """Run the model; bf16 is autocast over fp32 weights. The logits are fp32, one score a row for a regression."""
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
        logits: Tensor = model(**inputs).logits
    return logits.float()


def loss_of(task: Task, logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean over the rows: squared error of the score, or cross entropy of the class."""
    if task.is_regression:
        return functional.mse_loss(logits.squeeze(-1), labels)
    return functional.cross_entropy(logits, labels)


@torch.no_grad()
def evaluate(model: nn.Module, task: Task, rows: Encoded, precision: str) -> Metrics:
    """Return the loss and the task's metrics over all the rows.

    Raises:
        ValueError: if the model gives NaN or infinity.
    """
    model.eval()
    outputs = torch.empty(len(rows.labels), task.num_labels)
    for batch in sorted_batches(rows.lengths, EVALUATION_ROWS):
        inputs, _ = rows.batch(batch, DEVICE)
        outputs[batch] = logits_of(model, inputs, precision).cpu()
    if not bool(outputs.isfinite().all()):
        raise ValueError("the model's outputs hold NaN or infinity: the training has diverged. Lower --lr.")
    predictions = outputs.squeeze(-1) if task.is_regression else outputs.argmax(-1)
    loss = float(loss_of(task, outputs, rows.labels))
    return {"loss": loss, **compute_metrics(task, predictions.numpy(), rows.labels.numpy())}


def _from_pretrained(auto_class: Any, model: str, **arguments: Any) -> Any:
    if model == EMBEDDED_MODEL:
        return auto_class.from_pretrained(embedded_model_dir(), **arguments)
    if not Path(model).is_dir() and (Path(model).is_absolute() or model.startswith(".") or model.count("/") > 1):
        raise FileNotFoundError(f"the model {model!r} is not a folder, and no name on the hub either.")
    try:
        return auto_class.from_pretrained(model, **arguments)
    except OSError as error:
        raise OSError(f"the model {model!r} cannot be loaded; no other takes its place. {error}") from error
