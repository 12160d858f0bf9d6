"""BERT on GLUE: fine-tune in full precision, then train with quantized weights, and compare methods.

    python -m recipes.bert_glue --task cola --method lsq squat saq:case=1 --glue-dir GLUE --seed 0 1 2
    torchrun --nproc_per_node=2 -m recipes.bert_glue ...

This file holds what is particular to GLUE: the tasks, their rows and metrics, and the model. `recipes/training.py` has
the rest: options, run folders, the Trainer. Without --glue-dir and --hub the rows and the model are those of
`recipes/offline.py`. All methods of a seed start from one full-precision model.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # python recipes/bert_glue.py
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
if __name__ == "__main__":
    from recipes.voice import voice

    voice.begin("bert_glue: importing torch and transformers.")

import difflib
import hashlib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

import qsam
from recipes import offline
from recipes.training import (
    Json,
    Options,
    Range,
    chosen_rows,
    command,
    held_out_words,
    option,
    parse_options,
    prepare,
    run_all,
)
from recipes.voice import voice

EMBEDDED_MODEL = "embedded-minilm-l6"
Rows = list[list[Any]]
"""Rows of a task: text, second text or None, label."""


@dataclass(frozen=True)
class Task:
    """Where a task's rows are, in the GLUE download and on the hub, and how they are measured.

    Attributes:
        folder: Its folder in the download.
        texts: Its text columns there.
        label: Its label column there.
        words: The labels as the file spells them, in the order of the class index; empty: a score in [0, 5].
        hub_texts: The text columns on the hub, if their names differ.
        metrics: By name, the main one first.
        short_rows: Rows with missing columns that the official files have.
    """

    folder: str
    texts: tuple[str, ...]
    label: str
    words: tuple[str, ...]
    metrics: dict[str, Callable[[Any, Any], float]]
    hub_texts: tuple[str, ...] = ()
    short_rows: int = 0


Metrics = dict[str, Callable[[Any, Any], float]]
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
EMBEDDED = {"stsb": offline.stsb, "movies": offline.movies}

DEMO: Json = {
    "train_rows": 2500,
    "fp32_epochs": 2.0,
    "fp32_lr": 1e-4,
    "epochs": 1.0,
    "lr": 1e-4,
    "rho": 0.005,
    "schedule": "fused",
    "output_dir": Path("runs/glue-demo"),
}
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    return command("bert_glue", partial(_main, arguments))


def _main(arguments: Sequence[str] | None) -> None:
    ranges: list[Range] = [(("max_length",), lambda v: v >= 8, "at least 8")]
    options: GlueOptions = parse_options(GlueOptions, DEMO, arguments, ranges)
    if options.task not in TASKS:
        near = difflib.get_close_matches(options.task.lower().replace("-", ""), TASKS, n=2)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(f"`--task` must be one of {', '.join(TASKS)}, got {options.task!r}.{hint}")
    prepare(options)
    voice.begin(f"bert_glue: reading the rows of {options.task} and the model.")
    run_all(options, BertOnGlue(options))


# --- rows -------------------------------------------------------------------------------------------------------------


def load_rows(options: GlueOptions) -> tuple[dict[str, Rows], str]:
    """Return the rows by split ("train"; "dev", or "matched" and "mismatched"), and where they came from.

    No source stands in for another.

    Raises:
        ConnectionError: if the hub does not give the rows.
        FileNotFoundError: if a file is missing.
        ValueError: if a row cannot be read, or the options contradict each other.
    """
    task = TASKS[options.task]
    embedded = options.task == "movies" or (options.task in EMBEDDED and options.model == EMBEDDED_MODEL)
    if options.hub and options.glue_dir is not None:
        raise ValueError("`--hub` and `--glue-dir` are two sources of the same rows: give one of them.")
    if options.task == "movies" and (options.hub or options.glue_dir is not None):
        raise ValueError("movies is not in GLUE: leave `--hub` and `--glue-dir` out.")
    short = 0
    if options.glue_dir is not None:
        files = {"dev": "dev"} if options.task != "mnli" else {"matched": "dev_matched", "mismatched": "dev_mismatched"}
        rows = {}
        for split, name in {"train": "train", **files}.items():
            rows[split], skipped = read_tsv(task, options.glue_dir / task.folder / f"{name}.tsv")
            short += skipped
        source = f"{options.task} from the {task.folder} folder of a GLUE download"
    elif options.hub or not embedded:
        rows, source = hub_rows(options.task), f"{options.task} from the hub's nyu-mll/glue"
    else:
        rows, source = EMBEDDED[options.task](), f"{options.task} from a package archive (recipes/offline.py)"
    counts = ", ".join(f"{len(part):,} {split} rows" for split, part in rows.items())
    return rows, f"{source}: {counts}; {short or 'none'} skipped because columns are missing."


def read_tsv(task: Task, path: Path) -> tuple[Rows, int]:
    """Read a file of the GLUE download: tab-separated, without quoting; only a line feed ends a row.

    Returns:
        The rows, and how many were skipped because columns are missing (only QQP may have some).

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: with the line, if a column or a label is wrong.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist. --glue-dir must name the folder of the standard GLUE download, which holds "
            f"{path.parent.name}/{path.name}."
        )
    try:
        text = path.read_bytes().decode("utf-8-sig")  # MRPC begins with a byte order mark
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error.reason}).") from error
    lines = [
        (number, line.removesuffix("\r").split("\t")) for number, line in enumerate(text.split("\n"), 1) if line.strip()
    ]
    columns = COLA_COLUMNS if task.folder == "CoLA" else lines.pop(0)[1] if lines else []
    if not lines:
        raise ValueError(f"{path} has no rows.")
    if missing := [name for name in (*task.texts, task.label) if name not in columns]:
        raise ValueError(f"{path} has no column {missing[0]!r}; its header is {', '.join(columns)}.")
    places = [columns.index(name) for name in (*task.texts, task.label)]
    rows, short = [], 0
    for number, cells in lines:
        if len(cells) < len(columns) and short < task.short_rows:
            short += 1
            continue
        if len(cells) != len(columns):
            raise ValueError(f"{path}, line {number}: {len(cells)} columns; the header has {len(columns)}.")
        *texts, label = (cells[place] for place in places)
        rows.append([texts[0], texts[1] if len(texts) > 1 else None, read_label(task, label, f"{path}, line {number}")])
    return rows, short


def read_label(task: Task, word: str, where: str) -> float:
    """Return a class index, or a score.

    Raises:
        ValueError: with the place, if it is neither.
    """
    if task.words:
        if word not in task.words:
            raise ValueError(f"{where}: the label must be one of {', '.join(task.words)}, got {word!r}.")
        return task.words.index(word)
    try:
        score = float(word)
    except ValueError:
        score = float("nan")
    if not 0.0 <= score <= 5.0:
        raise ValueError(f"{where}: the score must be a number in [0, 5], got {word!r}.")
    return score


def hub_rows(name: str) -> dict[str, Rows]:
    """Return the rows of the hub's nyu-mll/glue.

    Raises:
        ConnectionError: if the hub does not give them.
    """
    from datasets import load_dataset

    try:
        found = load_dataset("nyu-mll/glue", name)
    except (OSError, ValueError) as error:  # what `datasets` raises offline, without and with other tasks in its cache
        raise ConnectionError(
            f"The hub did not give {name} of nyu-mll/glue: {error}. Without the hub, give --glue-dir a GLUE download, "
            "or use the offline default, which has stsb and movies."
        ) from error
    texts = TASKS[name].hub_texts or TASKS[name].texts
    names = {"validation": "dev", "validation_matched": "matched", "validation_mismatched": "mismatched"}
    rows = {}
    for split in [name for name in ("train", *names) if name in found]:
        columns = [found[split][column] for column in (*texts, "label")]
        rows[names.get(split, split)] = [
            [row[0], row[1] if len(texts) > 1 else None, row[-1]] for row in zip(*columns, strict=True)
        ]
    return rows


# --- the model --------------------------------------------------------------------------------------------------------


class BertOnGlue:
    """A BERT with a head for the task; SQuAT's quantizers; Adam."""

    rules, warmup_epochs, workers = qsam.presets.squat_bert, 0.0, 0

    def __init__(self, options: GlueOptions) -> None:
        self.task = TASKS[options.task]
        self.metric = next(iter(self.task.metrics))
        rows, source = load_rows(options)
        every = rows.pop("train")
        measured = f"the full dev set ({', '.join(f'{len(part):,} {key} rows' for key, part in rows.items())})"
        chosen, held, part, words = chosen_rows(len(every), options)
        train = [every[row] for row in chosen]
        if held:
            rows, measured = {"holdout": [every[row] for row in held]}, held_out_words(held)
        digest = hashlib.sha256(repr([train, rows]).encode()).hexdigest()[:16]
        self.facts = {"recipe": "bert_glue", "task": options.task, "data": source + words, "data_sha256": digest,
                      "evaluated_on": measured, "max_length": options.max_length}  # fmt: skip
        voice.say(f"{source}{words}\nMetrics are measured on {measured}.")
        self.tokenizer = self._pretrained(AutoTokenizer, options.model)
        self.max_length = min(options.max_length, self.tokenizer.model_max_length)
        self.train, self.part = self._encoded(train), by_length(self._encoded([every[row] for row in part]))
        self.dev = {key: by_length(self._encoded(some)) for key, some in rows.items()}
        self.lengths = [len(row["input_ids"]) for row in self.train]
        self.collate = DataCollatorWithPadding(self.tokenizer)

    def _encoded(self, rows: Rows) -> list[Json]:
        texts = [[row[0] for row in rows], *([[row[1] for row in rows]] if rows[0][1] is not None else [])]
        encoded = self.tokenizer(*texts, truncation=True, max_length=self.max_length)
        kind: Any = int if self.task.words else float
        return [
            {**{name: column[i] for name, column in encoded.items()}, "labels": kind(row[2])}
            for i, row in enumerate(rows)
        ]

    def _pretrained(self, auto_class: Any, model: str, **arguments: Any) -> Any:
        """Load a model or tokenizer; no other takes the place of one that cannot be loaded."""
        if model == EMBEDDED_MODEL:
            return auto_class.from_pretrained(offline.minilm_dir(), **arguments)
        if not Path(model).is_dir() and (Path(model).is_absolute() or model.startswith(".") or model.count("/") > 1):
            raise FileNotFoundError(f"the model {model!r} is not a folder, and no name on the hub either.")
        try:
            return auto_class.from_pretrained(model, **arguments)
        except OSError as error:
            raise OSError(f"the model {model!r} cannot be loaded; no other takes its place. {error}") from error

    def new_model(self, config: Json) -> nn.Module:
        """Return the pretrained model with a head for the task, new unless it has one that fits."""
        labels: Json = {"num_labels": 1, "problem_type": "regression"}
        if self.task.words:
            labels = {
                "id2label": dict(enumerate(self.task.words)),
                "label2id": {w: i for i, w in enumerate(self.task.words)},
            }
        labels |= {"dtype": torch.float32, "ignore_mismatched_sizes": True}
        model: nn.Module = self._pretrained(AutoModelForSequenceClassification, config["model"], **labels)
        return model

    def load_model(self, folder: Path) -> nn.Module:
        """Return a fine-tuned model."""
        return self.new_model({"model": str(folder)})

    def save_model(self, folder: Path, model: Any) -> None:
        """Write what `from_pretrained` reads, and the tokenizer."""
        floats = {name: value for name, value in model.state_dict().items() if "_quantizer." not in name}
        model.save_pretrained(folder, state_dict=floats)
        self.tokenizer.save_pretrained(folder)

    def base(self, model: nn.Module, config: Json) -> tuple[type[torch.optim.Optimizer], Json]:
        """Return the paper's Adam."""
        return torch.optim.Adam, {"lr": config["lr"] if "lr" in config else 0.0, "fused": True}

    def loss(self, model: nn.Module, batch: Json) -> tuple[Tensor, Tensor]:
        """Return squared error or cross entropy, and the scores or logits."""
        labels = batch["labels"]
        logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits.float()
        if not self.task.words:
            return functional.mse_loss(logits.squeeze(-1), labels.float()), logits
        return functional.cross_entropy(logits, labels), logits

    def metrics(self, predictions: Any, labels: Any) -> dict[str, float]:
        """Return the task's metrics; 0 for one that is 0/0, as GLUE prints it."""
        p = predictions.argmax(-1) if self.task.words else predictions.squeeze(-1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # scipy and scikit-learn warn of constant answers
            found = {name: float(np.nan_to_num(of(labels, p))) for name, of in self.task.metrics.items() if len(p) > 1}
        return found or dict.fromkeys(self.task.metrics, 0.0)

    def after_training_(self, model: nn.Module, config: Json, batches: Any) -> None:
        """Do nothing: a BERT has no running statistics."""


def by_length(rows: list[Json]) -> list[Json]:
    """Sort rows by their number of tokens, which saves padding where the order does not matter."""
    return sorted(rows, key=lambda row: len(row["input_ids"]))


if __name__ == "__main__":
    sys.exit(main())
