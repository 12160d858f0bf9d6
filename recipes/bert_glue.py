"""BERT on GLUE: fine-tune in full precision, then train with quantized weights, and compare methods.

    python -m recipes.bert_glue --task cola --method lsq squat saq:case=1 --glue-dir GLUE --seed 0 1 2
    torchrun --nproc_per_node=2 -m recipes.bert_glue ...

From top to bottom: the tasks, their rows, and then the model, the method and the metrics. The Trainer, run folders and
results are in `recipes/training.py`. Without --glue-dir and --hub rows and model are those of `recipes/offline.py`.
All methods of a seed start from one full-precision model. The lines that qsam needs are marked.
"""

from __future__ import annotations

if __name__ == "__main__":
    from recipes.voice import voice

    voice.begin("bert_glue: importing torch and transformers.")

import contextlib
import difflib
import hashlib
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

import qsam
from recipes import offline, training
from recipes.methods import parse_method
from recipes.training import Json, Options, option
from recipes.voice import voice

EMBEDDED_MODEL = "embedded-minilm-l6"
Rows = list[list[Any]]
"""Rows of a task: text, second text or None, label."""

Metrics = dict[str, Callable[[Any, Any], float]]


@dataclass(frozen=True)
class Task:
    """The location of a task's rows, in the GLUE download and on the hub, and its metrics."""

    folder: str  # in the download
    texts: tuple[str, ...]  # columns there
    label: str  # column there
    words: tuple[str, ...]  # labels as the file spells them, in the order of the class index; none: a score in [0, 5]
    metrics: Metrics  # the main one first
    hub_texts: tuple[str, ...] = ()  # columns on the hub, if their names differ
    short_rows: int = 0  # rows with missing columns that the official files have


ACCURACY: Metrics = {"accuracy": accuracy_score}
WITH_F1: Metrics = {**ACCURACY, "f1": partial(f1_score, zero_division=0.0)}
CORRELATIONS: Metrics = {
    "pearson": lambda y, p: pearsonr(y, p).statistic,
    "spearman": lambda y, p: spearmanr(y, p).statistic,
}
PAIR, BINARY, ENTAILMENT = ("sentence1", "sentence2"), ("0", "1"), ("entailment", "not_entailment")
STRINGS, QUESTIONS = ("#1 String", "#2 String"), ("question1", "question2")
MNLI = ("entailment", "neutral", "contradiction")
TASKS = {
    "cola": Task("CoLA", ("sentence",), "label", BINARY, {"matthews": matthews_corrcoef}),
    "sst2": Task("SST-2", ("sentence",), "label", BINARY, ACCURACY),
    "mrpc": Task("MRPC", STRINGS, "Quality", BINARY, WITH_F1, hub_texts=PAIR),
    "stsb": Task("STS-B", PAIR, "score", (), CORRELATIONS),
    "qqp": Task("QQP", QUESTIONS, "is_duplicate", BINARY, WITH_F1, short_rows=10),
    "mnli": Task("MNLI", PAIR, "gold_label", MNLI, ACCURACY, hub_texts=("premise", "hypothesis")),
    "qnli": Task("QNLI", ("question", "sentence"), "label", ENTAILMENT, ACCURACY),
    "rte": Task("RTE", PAIR, "label", ENTAILMENT, ACCURACY),
    "movies": Task("", ("text",), "", ("negative", "positive"), ACCURACY),
}
COLA_COLUMNS = ["source", "label", "star", "sentence"]
EMBEDDED: dict[str, Callable[[], dict[str, Rows]]] = {"stsb": offline.stsb, "movies": offline.movies}

DEMO: Json = {"train_rows": 2500, "fp32_epochs": 2.0, "fp32_lr": 1e-4, "epochs": 1.0, "lr": 1e-4, "rho": 0.005,
              "schedule": "fused", "output_dir": Path("runs/glue-demo")}  # fmt: skip
"""Settings of `--demo`; what the command line says goes before them.

Rate and rho were chosen on 15 % of STS-B's training rows, held out, with the others for training (one seed; LSQ:
Pearson .731 at lr 5e-5, .753 at 1e-4; SQuAT at 1e-4: .749 at rho .005, .711 at .02).
"""


@dataclass
class GlueOptions(Options):
    """The options; the defaults are the paper's, as far as it prints them."""

    task: str = option("stsb", f"one of {', '.join(TASKS)}")
    model: str = option(EMBEDDED_MODEL, "folder or hub name; the paper's is bert-base-uncased")
    max_length: int = option(128, "tokens after which a row is cut")
    glue_dir: Path | None = option(None, "read the rows from this folder, the standard GLUE download")
    hub: bool = option(False, "read the rows from the hub's nyu-mll/glue")
    output_dir: Path = option(Path("runs/glue"), "folder of the runs")


# --- rows -------------------------------------------------------------------------------------------------------------


def load_rows(options: GlueOptions) -> tuple[dict[str, Rows], str]:
    """Return the rows by split, and where they came from: no source stands in for another.

    The splits are "train" and "dev", or "matched" and "mismatched".
    """
    name, task, short = options.task, TASKS[options.task], 0
    if options.hub and options.glue_dir is not None:
        raise ValueError("`--hub` and `--glue-dir` are two sources of the same rows: give one of them.")
    if name == "movies" and (options.hub or options.glue_dir is not None):
        raise ValueError("movies is not in GLUE: leave `--hub` and `--glue-dir` out.")
    if options.glue_dir is not None:
        files = {"dev": "dev"} if name != "mnli" else {"matched": "dev_matched", "mismatched": "dev_mismatched"}
        rows = {}
        for split, file in {"train": "train", **files}.items():
            rows[split], skipped = read_tsv(task, options.glue_dir / task.folder / f"{file}.tsv")
            short += skipped
        source = f"{name} from the {task.folder} folder of a GLUE download"
    elif name in EMBEDDED and (name == "movies" or (options.model == EMBEDDED_MODEL and not options.hub)):
        rows, source = EMBEDDED[name](), f"{name} from a package archive (recipes/offline.py)"
    else:
        rows, source = hub_rows(name), f"{name} from the hub's nyu-mll/glue"
    counts = ", ".join(f"{len(part):,} {split} rows" for split, part in rows.items())
    return rows, f"{source}: {counts}; {short or 'none'} skipped because columns are missing."


def read_tsv(task: Task, path: Path) -> tuple[Rows, int]:
    """Read a file of the GLUE download: tab-separated, without quoting; only a line feed ends a row.

    Returns:
        The rows, and how many were skipped because columns are missing (only QQP may have some).
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist. --glue-dir must name the folder of the standard GLUE download, which holds "
            f"{path.parent.name}/{path.name}."
        )
    lines = path.read_bytes().decode("utf-8-sig").split("\n")  # MRPC begins with a byte order mark
    cells = [(number, line.removesuffix("\r").split("\t")) for number, line in enumerate(lines, 1) if line.strip()]
    columns = COLA_COLUMNS if task.folder == "CoLA" else cells.pop(0)[1] if cells else []
    if missing := {*task.texts, task.label} - set(columns):
        raise ValueError(f"{path} has no column {min(missing)!r}; its header is {', '.join(columns) or 'empty'}.")
    rows: Rows = []
    short = 0
    for number, row in cells:
        where = f"{path}, line {number}"
        if len(row) < len(columns) and short < task.short_rows:
            short += 1
            continue
        if len(row) != len(columns):
            raise ValueError(f"{where}: {len(row)} columns; the header has {len(columns)}.")
        named = dict(zip(columns, row, strict=True))
        rows.append([*[*(named[text] for text in task.texts), None][:2], read_label(task, named[task.label], where)])
    return rows, short


def read_label(task: Task, word: str, where: str) -> float:
    """Return a class index, or a score."""
    if word in task.words:
        return task.words.index(word)
    with contextlib.suppress(ValueError):
        if not task.words and 0 <= float(word) <= 5:
            return float(word)
    label = f"label must be one of {', '.join(task.words)}" if task.words else "score must be a number in [0, 5]"
    raise ValueError(f"{where}: the {label}, got {word!r}.")


def hub_rows(name: str) -> dict[str, Rows]:
    """Return the rows of the hub's nyu-mll/glue."""
    from datasets import load_dataset

    texts, rows = TASKS[name].hub_texts or TASKS[name].texts, {}
    for split, part in load_dataset("nyu-mll/glue", name).items():
        if not split.startswith("test"):  # its labels are secret
            key = {"validation": "dev"}.get(split, split.removeprefix("validation_"))
            rows[key] = [[*[*(row[text] for text in texts), None][:2], row["label"]] for row in part]
    return rows


# --- model, method, loss and metrics ----------------------------------------------------------------------------------


class BertOnGlue:
    """A BERT with a head for the task; SQuAT's quantizers; Adam."""

    warmup_epochs, workers = 0.0, 0

    def __init__(self, options: GlueOptions) -> None:
        self.name, self.task = options.model, TASKS[options.task]
        self.metric = next(iter(self.task.metrics))
        rows, source = load_rows(options)
        every = rows.pop("train")
        measured = f"the full dev set ({', '.join(f'{len(part):,} {key} rows' for key, part in rows.items())})"
        chosen, held, part, words, measured = training.choose_rows(len(every), options, measured)
        train = [every[row] for row in chosen]
        rows = {"holdout": [every[row] for row in held]} if held else rows
        digest = hashlib.sha256(repr([train, rows]).encode()).hexdigest()[:16]
        self.facts = {"recipe": "bert_glue", "task": options.task, "data": source + words, "data_sha256": digest,
                      "evaluated_on": measured, "max_length": options.max_length}  # fmt: skip
        voice.say(f"{source}{words}\nMetrics are measured on {measured}.")
        self.tokenizer = self._pretrained(AutoTokenizer, self.name)
        self.max_length = min(options.max_length, self.tokenizer.model_max_length)
        self.train: Any = self._encoded(train)
        self.part = by_length(self._encoded([every[row] for row in part]))
        self.dev = {key: by_length(self._encoded(some)) for key, some in rows.items()}
        self.lengths: list[int] | None = [len(row["input_ids"]) for row in self.train]
        self.collate: Any = DataCollatorWithPadding(self.tokenizer)

    def _encoded(self, rows: Rows) -> list[Json]:
        columns = [list(column) for column in zip(*rows, strict=True)]
        texts = columns[:1] if columns[1][0] is None else columns[:2]
        encoded = self.tokenizer(*texts, truncation=True, max_length=self.max_length)
        encoded["labels"] = columns[2] if self.task.words else [float(score) for score in columns[2]]
        return [dict(zip(encoded, values, strict=True)) for values in zip(*encoded.values(), strict=True)]

    def _pretrained(self, auto_class: Any, name: str | Path, **arguments: Any) -> Any:
        return auto_class.from_pretrained(offline.minilm_dir() if name == EMBEDDED_MODEL else name, **arguments)

    def model(self, folder: Path | None) -> nn.Module:
        """Return the model of a folder or the one to start from, with a new head unless it has one that fits."""
        head: Json = {"num_labels": 1, "problem_type": "regression"}
        if words := self.task.words:
            names = {"id2label": dict(enumerate(words)), "label2id": {word: i for i, word in enumerate(words)}}
            head = {"num_labels": len(words), "problem_type": "single_label_classification", **names}
        head |= {"dtype": torch.float32, "ignore_mismatched_sizes": True}
        model: nn.Module = self._pretrained(AutoModelForSequenceClassification, folder or self.name, **head)
        return model

    def save(self, folder: Path, model: Any, weights: Mapping[str, Tensor]) -> None:
        """Write what `from_pretrained` reads, and the tokenizer."""
        model.save_pretrained(folder, state_dict=weights)
        self.tokenizer.save_pretrained(folder)

    def prepare(self, model: nn.Module, config: Json, batches: Iterator[Json]) -> torch.optim.Optimizer:
        """Quantize the model as the preset's paper or SQuAT's does; return the method's optimizer, around Adam."""
        method = parse_method(config["method"])
        if method.quantizes:
            method.quantize_(model, config, method.rules or qsam.presets.squat_bert)  # qsam
            qsam.calibrate(model, islice(batches, training.CALIBRATION_BATCHES))  # qsam
        return method.optimizer(model, torch.optim.Adam, config, lr=config.get("lr", 0.0), fused=True)  # qsam

    def loss(self, model: nn.Module, batch: Json) -> tuple[Tensor, Tensor]:
        """Return the model's squared error or cross entropy, and the scores or logits."""
        found = model(**batch)
        return found.loss, found.logits

    def metrics(self, predictions: Any, labels: Any) -> dict[str, float]:
        """Return the task's metrics; 0 for one that is 0/0, as GLUE prints it."""
        p = predictions.argmax(-1) if self.task.words else predictions.squeeze(-1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # scipy and scikit-learn warn of constant answers
            return {name: float(np.nan_to_num(of(labels, p))) for name, of in self.task.metrics.items()}

    def after_training_(self, model: nn.Module, config: Json, batches: Iterator[Json]) -> None:
        """Do nothing: a BERT has no running statistics."""


def by_length(rows: list[Json]) -> list[Json]:
    """Sort rows by their number of tokens, which saves padding where the order does not matter."""
    return sorted(rows, key=lambda row: len(row["input_ids"]))


# --- the command ------------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    return training.command("bert_glue", partial(read_options, arguments), BertOnGlue)


def read_options(arguments: Sequence[str] | None) -> GlueOptions:
    """Read and check the command line."""
    options: GlueOptions = training.parse_options(GlueOptions, DEMO, arguments)
    check_task(options.task)
    return options


def check_task(task: str) -> None:
    """Refuse a task that is none, and name the nearest."""
    if task not in TASKS:
        near = difflib.get_close_matches(task.lower().replace("-", ""), TASKS, n=2)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(f"`--task` must be one of {', '.join(TASKS)}, got {task!r}.{hint}")


if __name__ == "__main__":
    sys.exit(main())
