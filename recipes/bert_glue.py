"""BERT on GLUE: fine-tune in full precision, then train with quantized weights, and compare methods.

    python -m recipes.bert_glue --task cola --method lsq squat --glue-dir DIR --seed 0 1 2
    torchrun --nproc_per_node=2 -m recipes.bert_glue ...

With `torchrun` each process trains on its part of every batch (`--batch-size` stays that of all together), each
evaluates everything, and the first one writes; see docs/distributed.md. The loop, with the lines that qsam needs, is in
`recipes/training.py`. Each run is a folder, `OUTPUT_DIR/<task>-<method>-w<bits>a<bits>-seed<seed>/`; `recipes/runs.py`
says what is in it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

if not __package__:  # python recipes/bert_glue.py
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

import qsam
from recipes import ranks
from recipes.bert_glue_model import Data, evaluate, load_data, load_model, logits_of, loss_of, save_model
from recipes.bert_glue_options import Options, parse_options
from recipes.bert_glue_rows import Rows, fingerprint, load_rows
from recipes.experiment import DEVICE, Batch, Experiment, Metrics
from recipes.plan import planned_runs
from recipes.report import report
from recipes.runs import Json
from recipes.text_batches import epoch_batches
from recipes.training import command, run_planned

PART_ROWS = 64


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    return command("bert_glue", partial(run_all, arguments))


def run_all(arguments: Sequence[str] | None) -> None:
    """Run every method with every seed, then print and draw the comparison."""
    options = parse_options(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    with ranks.first_goes_first():
        rows = load_rows(options)
        data = load_data(rows, options.model, options.max_length)
    ranks.say(f"{rows.splits.source}\nMetrics are measured on {rows.evaluated_on}.")
    run_planned(planned_runs(options, what_decides(options, rows)), BertOnGlue(data), options.save_every)
    if ranks.is_first():
        report(options.output_dir, options.task)


def what_decides(options: Options, rows: Rows) -> Json:
    """Return the recipe's own part of a run's configuration."""
    return {
        "recipe": "bert_glue",
        "task": options.task,
        "data": rows.splits.source,
        "data_sha256": fingerprint(rows.splits),
        "evaluated_on": rows.evaluated_on,
        "max_length": options.max_length,
    }


class BertOnGlue(Experiment):
    """A BERT with a head for the task; SQuAT's quantizers; Adam."""

    rules = qsam.presets.squat_bert

    def __init__(self, data: Data) -> None:
        self.data = data
        self.rows = len(data.train.labels)
        self.metric = data.task.main_metric

    def order(self, config: Json, epoch: int) -> list[list[int]]:
        """Return shuffled batches of rows of like length."""
        return epoch_batches(self.data.train.lengths, config["batch_size"], seed=config["seed"], epoch=epoch)

    def loaded(self, batches: Iterable[Sequence[int]], config: Json, epoch: int) -> Iterator[Batch]:
        """Yield padded batches."""
        return (self.data.train.batch(batch, DEVICE) for batch in batches)

    def part_batches(self) -> Iterator[Batch]:
        """Yield the fixed part of the training rows."""
        rows = range(len(self.data.train_part.labels))
        return (self.data.train_part.batch(rows[i : i + PART_ROWS], DEVICE) for i in rows[::PART_ROWS])

    def new_model(self, config: Json) -> nn.Module:
        """Return the pretrained model with a new head."""
        return load_model(config["model"], self.data.task)

    def load_model(self, folder: Path) -> nn.Module:
        """Return the fine-tuned model."""
        return load_model(str(folder), self.data.task)

    def save_model(self, folder: Path, model: nn.Module, coverage: qsam.Coverage | None) -> None:
        """Write what `from_pretrained` reads, the tokenizer and the quantizers."""
        save_model(folder, model, self.data.tokenizer, coverage)

    def base(self, model: nn.Module, config: Json) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
        """Return the paper's Adam."""
        return torch.optim.Adam, {"fused": True, "lr": config["lr"]}

    def loss(self, model: nn.Module, inputs: Any, labels: Tensor, config: Json) -> Tensor:
        """Return squared error or cross entropy."""
        return loss_of(self.data.task, logits_of(model, inputs, config["precision"]), labels)

    def evaluate(self, model: nn.Module, precision: str) -> dict[str, Metrics]:
        """Return the task's metrics on its dev sets."""
        return {name: evaluate(model, self.data.task, rows, precision) for name, rows in self.data.dev.items()}

    def evaluate_training(self, model: nn.Module) -> tuple[Metrics, int]:
        """Return the same on the fixed part of the training rows."""
        part = self.data.train_part
        return evaluate(model, self.data.task, part, "fp32"), len(part.labels)


if __name__ == "__main__":
    sys.exit(main())
