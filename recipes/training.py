"""Everything that both recipes share: options, run folders, the Hugging Face Trainer, and the comparison at the end.

A run is a folder of the output folder, named after task, method, bits and seed:

    run.json        the settings, written first; a run of other settings in the same folder is refused
    checkpoint-N/   the Trainer's checkpoints, with `whole.json` once they are complete; removed at the end
    model/          the trained model, `qsam.json` and the course of the training; complete as soon as it is there
    results.json    written last: a run that has it is finished, and skipped

The lines that qsam needs are marked. Hugging Face's Trainer is the loop; examples/by_hand.py shows one by hand.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import torch
import transformers
from accelerate import PartialState
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from tqdm import tqdm
from transformers import EvalPrediction, HfArgumentParser, Trainer, TrainerCallback, TrainingArguments

import qsam
from qsam.integrations.trainer import TrainerMixin
from recipes.compare import RESULTS, report
from recipes.methods import PASSES, parse_method
from recipes.offline import fixed_order
from recipes.voice import voice

Json = dict[str, Any]
CONFIG, WHOLE, MODEL, COURSE, FIT = "run.json", "whole.json", "model", "course.json", "fit.json"
PART_ROWS = 1_000
"""Rows of the fixed part of the training set that the final training loss and the sharpness are measured on."""

CALIBRATION_BATCHES, SHARPNESS_STEPS = 8, 8
FIT_STEPS, FIT_SECONDS, FIT_MARGIN = 8, 10.0, 1.3
"""Steps that `--fit-minutes` times per method after the first one, seconds after which two are enough, and the factor
by which later steps may take longer."""

TIMEOUT = int(os.environ.get("QSAM_TIMEOUT", "600"))
"""Seconds that a process waits for the others."""


def default_precision() -> str:
    """Return "bf16" if the hardware computes in it, else "fp32"."""
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    return "bf16" if torch.cpu.get_capabilities().get("avx512_bf16", False) else "fp32"


def option(default: Any, words: str) -> Any:
    """Return a field of an options class: its default and its words in `--help`."""
    kind = {"default_factory": lambda: list(default)} if isinstance(default, list) else {"default": default}
    return field(**kind, metadata={"help": words})


@dataclass
class Options:
    """The options of every recipe."""

    method: list[str] = option(["lsq", "squat"], "fp32, rtn, lsq, or an optimizer of qsam; lsq2x has twice the steps; "
                               "saq:case=1,rho=.02 sets one method's own. fp32 is run in any case")  # fmt: skip
    bits: int = option(2, "bits of the weights")
    activation_bits: int = option(8, "bits of the layers' inputs")
    rho: float = option(0.1, "radius of the perturbation, for the methods that have one")
    schedule: Literal["same_batch", "next_batch", "fused"] = option("same_batch", "squat: 3, 1.5 or 2 passes per step")
    model: str = option("", "folder or name of the model")
    epochs: float = option(32.0, "epochs of quantization-aware training")
    fp32_epochs: float = option(5.0, "epochs of full-precision training")
    batch_size: int = option(32, "rows per batch, over all processes")
    lr: float = option(1e-5, "learning rate of quantization-aware training")
    fp32_lr: float = option(5e-5, "learning rate of full-precision training")
    scale_lr: list[float] = option([], "rate of the scales: one, or weights' and activations'; else balanced")
    max_steps: int | None = option(None, "cap on the steps of each phase (lsq3x: three times as many)")
    seed: list[int] = option([0], "every method runs once per seed")
    train_rows: int | None = option(None, "train on a fixed random part of the training rows")
    holdout: float | None = option(None, "set this fraction of the training rows apart, and measure there")
    sharpness: list[float] = option([], "radii: how far can the training loss rise within each (SQuAT's Algorithm 2)")
    threads: int | None = option(None, "threads of torch; a resumed run is exact with the same number")
    precision: Literal["fp32", "bf16"] = option(default_precision(), "bf16 is autocast over fp32 weights")
    output_dir: Path = option(Path("runs"), "folder of the runs")
    tag: str | None = option(None, "a word in the names of the runs' folders, to keep settings apart (fp32 is shared)")
    save_every: int = option(500, "steps between checkpoints; each epoch ends with one too")
    resume: bool = option(True, "continue unfinished runs and skip finished ones; --no-resume refuses them")
    fit_minutes: float = option(0.0, "shorten the training to about so many minutes in all, after timing its steps")
    demo: bool = option(False, "fp32, rtn, squat, and lsq at squat's passes, in minutes")

    def method_settings(self) -> Json:
        """Return the settings that each method has which takes them."""
        shared = {name: getattr(self, name) for name in ("bits", "activation_bits", "rho", "schedule")}
        return shared | ({"scale_lr": self.scale_lr} if self.scale_lr else {})


def parse_options(
    options_class: type[Options], demo: Json, arguments: Sequence[str] | None, ranges: Sequence[Range] = ()
) -> Any:
    """Read and check a command line; with `--demo`, the options that it leaves out have the values in `demo`.

    Raises:
        ValueError: with the flag, the values that it takes and the one that was given.
    """
    parser: Any = HfArgumentParser(options_class, allow_abbrev=False)  # type: ignore[arg-type]
    (options,) = parser.parse_args_into_dataclasses(args=arguments, look_for_args_file=False)
    if options.demo:
        methods = ["fp32", "rtn", f"lsq{PASSES[demo.get('schedule', options.schedule)]:g}x", "squat"]
        parser.set_defaults(**{"method": methods, "fit_minutes": 8.0, **demo})
        (options,) = parser.parse_args_into_dataclasses(args=arguments, look_for_args_file=False)
    for names, fits, words in (*RANGES, *ranges):
        for name in names:
            if not fits(getattr(options, name)):
                raise ValueError(f"`--{name.replace('_', '-')}` must be {words}, got {getattr(options, name)}.")
    for method in options.method:
        parse_method(method).configured(options.method_settings())
    return options


Range = tuple[tuple[str, ...], Callable[[Any], bool], str]
RANGES: list[Range] = [
    (("bits", "activation_bits"), lambda v: 2 <= v <= 8, "an integer in [2, 8]"),
    (("batch_size", "max_steps", "train_rows", "threads", "save_every"), lambda v: v is None or v >= 1, "at least 1"),
    (("epochs", "fp32_epochs"), lambda v: 0 < v < math.inf, "finite and above 0"),
    (("rho", "lr", "fp32_lr", "fit_minutes"), lambda v: 0 <= v < math.inf, "finite and not negative"),
    (("scale_lr",), lambda v: len(v) <= 2 and all(0 <= rate < math.inf for rate in v),
     "one rate, or two (weights, activations), not negative"),
    (("sharpness",), lambda v: all(0 < rho < math.inf for rho in v), "radii above 0"),
    (("holdout",), lambda v: v is None or 0 < v < 1, "a fraction between 0 and 1"),
    (("tag",), lambda v: v is None or bool(re.fullmatch(r"[\w.=-]+", v)), "letters, digits and . _ = - only"),
    (("seed",), lambda v: min(v) >= 0, "no negative number"),
]  # fmt: skip
"""Which values the options take: names, test, and words for the error."""


Experiment = Any
"""A recipe's part: one data set and one kind of model. It has

    facts                        its own settings that decide results, "task" and "evaluated_on" among them
    train, part, dev             datasets: training rows, a fixed part of them, and by name those that are measured on
    collate(rows), lengths       makes a batch, a dict with "labels"; tokens per training row, or None
    rules, warmup_epochs, workers, metric                  metric: the name of the main one
    new_model(config), load_model(folder), save_model(folder, model)          an ordinary checkpoint, on the grid
    base(model, config)          the base optimizer's class and its keywords, "params" among them if it has groups
    loss(model, batch)           the mean loss over the rows, and the outputs
    metrics(predictions, labels)
    after_training_(model, config, batches)
"""


def held_out(count: int, fraction: float) -> tuple[list[int], list[int]]:
    """Return which of `count` rows stay, and a fixed random part that is set apart.

    Raises:
        ValueError: if one of them would be empty.
    """
    held = round(fraction * count)
    if not 0 < held < count:
        raise ValueError(f"`--holdout` {fraction} of {count} training rows leaves nothing on one side.")
    order = fixed_order(count)
    return sorted(order[held:]), sorted(order[:held])


def chosen_rows(count: int, options: Options) -> tuple[list[int], list[int], list[int], str]:
    """Return of `count` training rows those to train on, those held out, a part for the final loss, and words."""
    rows, held, words = list(range(count)), [], ""
    if options.train_rows is not None and options.train_rows < count:
        rows = sorted(fixed_order(count)[: options.train_rows])
        words = f" Training uses a fixed random part of {len(rows):,} training rows."
    if options.holdout is not None:
        kept, apart = held_out(len(rows), options.holdout)
        rows, held = [rows[row] for row in kept], [rows[row] for row in apart]
    return rows, held, [rows[row] for row in sorted(fixed_order(len(rows))[:PART_ROWS])], words


def held_out_words(held: list[int]) -> str:
    """Say on which rows a run with `--holdout` is measured."""
    return f"{len(held):,} training rows that are held out of training (a fixed random part), not the dev set"


def command(name: str, run_all: Callable[[], None]) -> int:
    """Run a recipe's command line; say what went wrong in a sentence.

    Returns:
        The exit code: 0; 2 for mistakes that the user can mend; 130 after an interruption.
    """
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        run_all()
    except (ValueError, OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "PytorchStreamWriter" not in str(error):  # torch.save on a full disk
            raise
        print(f"{name}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{name}: interrupted; the same command goes on.", file=sys.stderr)
        return 130
    finally:
        voice.end()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return 0


def prepare(options: Options) -> None:
    """Set the number of threads, and join the processes that `torchrun` started."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(seconds=TIMEOUT))
        if options.batch_size % processes():
            raise ValueError(f"`--batch-size` must be a multiple of {processes()} processes, got {options.batch_size}.")


def processes() -> int:
    """Return the number of processes."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def wait() -> None:
    """Wait until all processes are here."""
    if processes() > 1:
        torch.distributed.barrier()


# --- runs -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One method with one seed: its folder, and all settings that decide its result."""

    folder: Path
    config: Json

    def check(self, resume: bool) -> None:
        """Refuse whatever would lose or mix results; write nothing.

        Raises:
            ValueError: if the folder holds a run of other settings, something else, or any run without `resume`.
        """
        if not (self.folder / CONFIG).is_file():
            if self.folder.is_dir() and any(path.suffix != ".partial" for path in self.folder.iterdir()):
                raise ValueError(f"{self.folder} holds files but no {CONFIG}: it is not a run. Choose another folder.")
            return
        try:
            there = json.loads((self.folder / CONFIG).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{self.folder / CONFIG} is not JSON ({error}): delete the folder.") from error
        if changes := differences(there, json.loads(json.dumps(self.config))):
            raise ValueError(
                f"{self.folder} holds a run of other settings: {'; '.join(changes)}. Give the same settings, or "
                "another --output-dir or --tag."
            )
        if not resume:
            raise ValueError(f"{self.folder} holds this run already: leave --no-resume out, or delete the folder.")

    @property
    def is_finished(self) -> bool:
        """Whether the results are there."""
        return (self.folder / RESULTS).is_file()


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Say where two settings differ, one sentence per entry.

    Example:
        >>> differences({"lr": 1e-5, "fp32": {"epochs": 5}}, {"lr": 1e-5, "fp32": {"epochs": 3}})
        ['fp32.epochs is 5 there and 3 here']
    """
    found = []
    for key in dict.fromkeys([*old, *new]):
        there, here = old.get(key), new.get(key)
        if isinstance(there, Mapping) and isinstance(here, Mapping):
            found += differences(there, here, f"{prefix}{key}.")
        elif there != here:
            found.append(f"{prefix}{key} is {there!r} there and {here!r} here")
    return found


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file as a whole, or not at all; NaN and infinity are refused, because JSON has none."""
    partial_path = path.with_name(f"{path.name}.partial")
    try:
        with partial_path.open("w", encoding="utf-8") as handle:
            handle.write(json.dumps(content, indent=1, allow_nan=False, default=str) + "\n")
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(partial_path, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial_path.unlink()
        raise OSError(error.errno, f"{path} cannot be written: {error.strerror}") from error


def planned_runs(options: Options, facts: Json) -> dict[tuple[str, int], Run]:
    """Return one run per method and seed, the full-precision ones first."""
    fp32: Json = {"epochs": options.fp32_epochs, "lr": options.fp32_lr, "max_steps": options.max_steps}
    own: Json = {"epochs": options.epochs, "lr": options.lr, "max_steps": options.max_steps}
    runs = {}
    for text in dict.fromkeys(["fp32", *options.method]):
        for seed in options.seed:
            config = {**facts, "method": text, "seed": seed, "model": options.model, "batch_size": options.batch_size}
            config |= {"precision": options.precision, "sharpness": options.sharpness, "processes": processes()}
            if text == "fp32":
                config |= fp32
            else:
                method = parse_method(text)
                config |= {
                    **(own if method.trains else {}),
                    **method.configured(options.method_settings()),
                    "fp32": fp32,
                }
            tag = f"-{options.tag}" if options.tag and text != "fp32" else ""
            bits = f"-w{config['bits']}a{config['activation_bits']}" if "bits" in config else ""
            name = f"{facts['task']}-{re.sub('[:,]', '-', text)}{bits}{tag}-seed{seed}"
            runs[text, seed] = Run(Path(options.output_dir) / name, config)
    return runs


def run_all(options: Options, experiment: Experiment) -> None:
    """Run every method with every seed that is not finished, then print and draw the comparison."""
    if options.fit_minutes:
        fit_(options, experiment)
    runs = planned_runs(options, experiment.facts)
    for (text, _), run in runs.items():
        run.check(options.resume or (text == "fp32" and "fp32" not in options.method and run.is_finished))
    wait()
    for (text, seed), run in runs.items():
        if run.is_finished:
            voice.say(f"{run.folder.name}: finished before.")
            continue
        if voice.is_first and not (run.folder / CONFIG).is_file():
            run.folder.mkdir(parents=True, exist_ok=True)
            write_json(run.folder / CONFIG, run.config)
        wait()
        start = None if text == "fp32" else runs["fp32", seed].folder / MODEL
        if not (run.folder / MODEL).is_dir():
            train_(run, experiment, start, options.save_every)
        wait()
        measure(run, experiment)
        wait()
    if voice.is_first:
        report(options.output_dir, experiment.facts["task"])
    wait()


def fit_(options: Options, experiment: Experiment) -> None:
    """Time the first steps of each method, and shorten the epochs so that all of them end within the minutes asked for.

    The fraction is kept in the output folder, so that the same command, started again, has the same settings.
    """
    path = Path(options.output_dir) / FIT
    if not path.is_file():
        runs = [run for (_, seed), run in planned_runs(options, experiment.facts).items() if seed == options.seed[0]]
        begin, minutes, each = time.perf_counter(), 0.0, {}
        with TemporaryDirectory() as scratch:
            start = Path(scratch) / "start"
            start.mkdir()
            experiment.save_model(start, experiment.new_model(runs[0].config))
            for run in runs:
                method = parse_method(run.config["method"])
                if method.name == "rtn":
                    continue
                voice.begin(f"Timing the first steps of {method.text} on this machine.")
                course = train_(Run(Path(scratch) / run.folder.name, run.config), experiment, start, 0, FIT_STEPS + 1)
                each[method.text] = float(np.mean(course.times[1:]))
                minutes += len(options.seed) * steps_of(run.config, len(experiment.train)) * each[method.text] / 60
        left = max(options.fit_minutes / 4, options.fit_minutes - (time.perf_counter() - begin) / 60)
        fraction = min(1.0, left / (FIT_MARGIN * minutes))
        if voice.is_first:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, {"fraction": round(fraction, 3), "minutes": minutes, "seconds_per_step": each})
        wait()
    kept = json.loads(path.read_text(encoding="utf-8"))
    options.epochs *= kept["fraction"]
    options.fp32_epochs *= kept["fraction"]
    voice.say(
        f"Training would take about {kept['minutes']:.1f} minutes on this machine ("
        + ", ".join(f"{name} {seconds:.2f} s" for name, seconds in kept["seconds_per_step"].items())
        + f" per step). --fit-minutes gives {options.fit_minutes:g}: {kept['fraction']:.1%} of its epochs are run."
    )


def steps_of(config: Json, rows: int) -> int:
    """Return the number of steps of a run: its epochs, capped; a method like `lsq3x` takes 3 times as many.

    Example:
        >>> steps_of({"method": "lsq1.5x", "epochs": 2, "batch_size": 4, "max_steps": None}, rows=10)
        9
    """
    steps = math.ceil(config["epochs"] * math.ceil(rows / config["batch_size"]))
    return math.ceil(parse_method(config["method"]).factor * min(steps, config["max_steps"] or steps))


# --- training ---------------------------------------------------------------------------------------------------------


@dataclass
class Course:
    """How far a training is, beside what the Trainer keeps: passes, seconds, losses, and the history per epoch."""

    passes: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    history: list[Json] = field(default_factory=list)
    times: list[float] = field(default_factory=list)


class PassCounter(Trainer):
    """A Trainer that takes its batches and its loss from an experiment, and counts forward-backward passes."""

    def __init__(self, experiment: Experiment, precision: str, **options: Any) -> None:
        self.experiment, self.precision, self.course, self.starts_step = experiment, precision, Course(), False
        super().__init__(data_collator=experiment.collate, compute_metrics=self._metrics, **options)

    def get_train_dataloader(self) -> DataLoader:
        """Return batches whose order follows from the seed and the epoch alone: a resumed run sees the same ones."""
        size = self.args.per_device_train_batch_size
        order = Shuffled(len(self.experiment.train), size * processes(), self.args.seed, self.experiment.lengths)
        loader = DataLoader(
            self.experiment.train,
            size,
            sampler=order,
            collate_fn=self.data_collator,
            num_workers=self.experiment.workers,
        )
        prepared: DataLoader = self.accelerator.prepare(loader)
        return prepared

    def compute_loss(
        self, model: nn.Module, inputs: Json, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the experiment's loss, under autocast if asked for."""
        with torch.autocast(self.args.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            loss, outputs = self.experiment.loss(model, inputs)
        return (loss, {"loss": loss, "logits": outputs}) if return_outputs else loss

    def training_step(self, *arguments: Any, **options: Any) -> Tensor:
        """Run one pass, and stop when the training has diverged."""
        loss: Tensor = super().training_step(*arguments, **options)
        self.course.passes += 1
        if not loss.isfinite():
            raise ValueError(
                f"the loss of step {self.state.global_step + 1} is {loss.item()}: the training has diverged. Lower "
                "--lr, --scale-lr or --rho; the last checkpoint is kept."
            )
        if self.starts_step:
            self.course.losses.append(loss.item())
            self.starts_step = False
        return loss

    def _metrics(self, found: EvalPrediction) -> dict[str, float]:
        if not np.isfinite(found.predictions).all():
            raise ValueError("the model's outputs hold NaN or infinity: the training has diverged. Lower --lr.")
        return self.experiment.metrics(found.predictions, found.label_ids)


class QsamTrainer(TrainerMixin, PassCounter):  # qsam
    """The same, which runs all passes of a step."""


class Follower(TrainerCallback):
    """Keeps the course of a training, says how far it is, and makes checkpoints that a kill cannot spoil."""

    def __init__(self, trainer: PassCounter, name: str, save_every: int) -> None:
        self.trainer, self.name, self.save_every = trainer, name, save_every
        self.bar: Any = None
        self.begin = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Show a bar on a terminal."""
        hidden = None if voice.is_first else True  # None: no bar where there is no terminal
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc=self.name, disable=hidden)
        voice.has_bar = not self.bar.disable
        torch.manual_seed(args.seed + 1_000_003 * args.process_index)  # each process drops out on its own

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Start the clock."""
        self.trainer.starts_step, self.begin = True, time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop the clock; ask for a checkpoint, but at an epoch's end, which asks for one after its evaluation."""
        course, epoch = self.trainer.course, self._steps_per_epoch(args)
        course.times.append(time.perf_counter() - self.begin)
        course.seconds += course.times[-1]
        left = np.mean(course.times) * (state.max_steps - state.global_step)
        loss = np.mean(course.losses[-10:])
        self.bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
        self.bar.update()
        voice.activity = (
            f"{self.name}: step {state.global_step}/{state.max_steps}, loss {loss:.3f}, {left:.0f} s of training left"
        )
        timed = self.save_every == 0 and processes() == 1 and len(course.times) > 2
        if timed and course.seconds > FIT_SECONDS:
            control.should_training_stop = True
        last = state.global_step >= state.max_steps
        control.should_save = self.save_every > 0 and not last and state.global_step % self.save_every == 0
        control.should_save &= state.global_step % epoch != 0

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Begin an entry of the history."""
        course = self.trainer.course
        counts = {"epoch": len(course.history) + 1, "step": state.global_step, "passes": course.passes}
        mean = float(np.mean(course.losses)) if course.losses else None
        course.history.append({**counts, "seconds": course.seconds, "mean_loss": mean, "dev": {}})
        course.losses = []
        goes_on = state.global_step < state.max_steps
        control.should_evaluate = control.should_evaluate and goes_on  # the last evaluation is that of the saved model
        control.should_save = self.save_every > 0 and goes_on

    def on_evaluate(self, args: Any, state: Any, control: Any, **options: Any) -> None:
        """Add to the entry what was measured."""
        entry, metrics = self.trainer.course.history[-1], options["metrics"]
        for key in self.trainer.experiment.dev:
            prefix = f"eval_{key}_"
            if f"{prefix}loss" in metrics:
                entry["dev"][key] = clean(metrics, prefix)
                words = " ".join(f"{name} {value:.4f}" for name, value in entry["dev"][key].items())
                voice.say(
                    f"{self.name}: step {state.global_step}/{state.max_steps}, training loss {entry['mean_loss']:.4f}, "
                    f"{key} {words}, {entry['passes']} passes, {entry['seconds']:.0f} s"
                )

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Write, last of all, what says that a checkpoint is complete."""
        wait()
        if voice.is_first:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            course = {**asdict(self.trainer.course), "times": []}
            write_json(folder / WHOLE, {"files": checksums(folder), "course": course})
        wait()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Take the bar away."""
        self.bar.close()
        voice.has_bar = False

    def _steps_per_epoch(self, args: Any) -> int:
        return math.ceil(len(self.trainer.experiment.train) / (args.per_device_train_batch_size * processes()))


class Shuffled(Sampler[int]):
    """Rows in an order that follows from the seed and the epoch alone; with lengths, neighbours are of like length.

    Without lengths a number is `draw * rows + row`, with another draw per seed and epoch: a dataset draws its
    augmentation from it.
    """

    CHUNK = 50
    """Batches that are sorted by length together: most of the padding goes, most of the randomness stays."""

    def __init__(self, rows: int, batch_size: int, seed: int, lengths: Sequence[int] | None) -> None:
        self.rows, self.batch_size, self.seed, self.lengths, self.epoch = rows, batch_size, seed, lengths, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch; the Trainer does."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.rows

    def __iter__(self) -> Iterator[int]:
        chance = np.random.default_rng((self.seed, self.epoch))
        order = chance.permutation(self.rows)
        if self.lengths is None:
            return iter(((self.seed * 100_000 + self.epoch) * self.rows + order).tolist())
        lengths, size = np.asarray(self.lengths), self.batch_size
        chunks = [order[i : i + self.CHUNK * size] for i in range(0, self.rows, self.CHUNK * size)]
        order = np.concatenate([chunk[np.argsort(lengths[chunk], kind="stable")] for chunk in chunks])
        full = self.rows // size * size  # the smaller batch stays last
        batches = chance.permutation(order[:full].reshape(-1, size))
        return iter([*batches.ravel().tolist(), *order[full:].tolist()])


def train_(
    run: Run, experiment: Experiment, start: Path | None, save_every: int, max_steps: int | None = None
) -> Course:
    """Train a method from its checkpoint if there is one, and save the model; `max_steps` only times the first steps.

    Args:
        run: The run.
        experiment: Data, model, loss and metrics.
        start: Folder of the full-precision model; None: a new model is trained in full precision.
        save_every: Steps between checkpoints.
        max_steps: Number of steps, without evaluation, checkpoint or result.
    """
    config, method = run.config, parse_method(run.config["method"])
    voice.begin(f"{run.folder.name}: loading the model.")
    arguments = trainer_arguments(run, experiment, max_steps)
    torch.manual_seed(config["seed"])  # what is not pretrained is drawn here
    model = (experiment.new_model(config) if start is None else experiment.load_model(start)).to(arguments.device)
    coverage = None
    if method.quantizes:
        voice.begin(f"{run.folder.name}: quantizing the model; the first time on a machine, kernels are compiled.")
        coverage = method.quantize_(model, config, experiment.rules)  # qsam
        if any(row.quantizer is not None for row in coverage.inputs):
            qsam.calibrate(
                model, list(first_batches(experiment, config, CALIBRATION_BATCHES, arguments.device))
            )  # qsam
    base, keywords = experiment.base(model, config)
    if method.trains:
        optimizer = method.optimizer(model, base, config, **keywords)  # qsam
    else:
        optimizer = base(**{"params": model.parameters(), **keywords})
    trainer = (QsamTrainer if method.trains else PassCounter)(
        experiment, config["precision"], model=model, args=arguments, train_dataset=experiment.train,
        eval_dataset=experiment.dev, optimizers=(optimizer, None),
    )  # fmt: skip
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.add_callback(Follower(trainer, run.folder.name, 0 if max_steps else save_every))
    if method.name == "rtn":
        qsam.write_(model)  # qsam
    else:
        trainer.train(resume_from_checkpoint=whole_checkpoint(run.folder, trainer))
    if max_steps:
        return trainer.course
    if trainer.course.passes:
        experiment.after_training_(model, config, first_batches(experiment, config, None, arguments.device))
    if voice.is_first:
        save_trained(run, experiment, model, coverage, trainer)
    return trainer.course


def trainer_arguments(run: Run, experiment: Experiment, max_steps: int | None) -> TrainingArguments:
    """Return the Trainer's settings: the cosine schedule, no clipping, an evaluation after each epoch."""
    config, rows = run.config, len(experiment.train)
    steps = max_steps or (steps_of(config, rows) if "epochs" in config else 1)
    warmup = min(steps // 4, round(experiment.warmup_epochs * math.ceil(rows / config["batch_size"])))
    return TrainingArguments(
        output_dir=str(run.folder), seed=config["seed"], max_steps=steps, warmup_steps=0 if max_steps else warmup,
        per_device_train_batch_size=config["batch_size"] // processes(), per_device_eval_batch_size=64,
        lr_scheduler_type="cosine", learning_rate=config.get("lr", 0.0), max_grad_norm=0.0,
        eval_strategy="no" if max_steps else "epoch", save_strategy="no", save_total_limit=2, logging_strategy="no",
        report_to="none", disable_tqdm=True, label_names=["labels"], remove_unused_columns=False,
        average_tokens_across_devices=False, dataloader_pin_memory=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(), ddp_timeout=TIMEOUT,
        dataloader_num_workers=experiment.workers,
    )  # fmt: skip


def first_batches(experiment: Experiment, config: Json, count: int | None, device: Any) -> Iterator[Json]:
    """Yield the inputs of the first training batches."""
    order = list(Shuffled(len(experiment.train), config["batch_size"], config["seed"], experiment.lengths))
    size = config["batch_size"]
    for begin in range(0, len(order), size)[:count]:
        batch = experiment.collate([experiment.train[row] for row in order[begin : begin + size]])
        yield {name: value.to(device) for name, value in batch.items() if name != "labels"}


def checksums(folder: Path) -> dict[str, int]:
    """Return the CRC-32 of each file of a checkpoint."""
    files = [path for path in sorted(folder.iterdir()) if path.is_file() and path.name != WHOLE]
    return {path.name: zlib.crc32(path.read_bytes()) for path in files}


def whole_checkpoint(folder: Path, trainer: PassCounter) -> str | None:
    """Return the newest complete checkpoint, and give the trainer its course; torn ones are told and removed."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]), reverse=True)
    for path in found:
        try:
            whole = json.loads((path / WHOLE).read_text(encoding="utf-8"))
            torn = whole["files"] != checksums(path)
        except (OSError, ValueError, KeyError):
            torn = True
        if not torn:
            trainer.course = Course(**whole["course"])
            voice.say(f"{folder.name}: going on from {path.name}.")
            wait()
            return str(path)
        voice.say(f"{folder.name}: {path.name} is not complete, or was changed; an older one or the start is taken.")
        wait()  # all processes have looked at it
        if voice.is_first:
            shutil.rmtree(path, ignore_errors=True)
    return None


def save_trained(run: Run, experiment: Experiment, model: Any, coverage: Any, trainer: PassCounter) -> None:
    """Write the model, its quantizers and the course into a folder that appears when it is complete."""
    unfinished = run.folder / f"{MODEL}.partial"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    experiment.save_model(unfinished, model)
    if coverage is not None:
        coverage.save(unfinished)  # qsam
    course = {**asdict(trainer.course), "steps": trainer.state.global_step, "times": []}
    write_json(unfinished / COURSE, course)
    for path in unfinished.iterdir():
        with path.open("rb") as handle:
            os.fsync(handle.fileno())
    os.replace(unfinished, run.folder / MODEL)


# --- the results ------------------------------------------------------------------------------------------------------


def measure(run: Run, experiment: Experiment) -> None:
    """Load the saved model as anybody will, evaluate it in fp32, and write the results."""
    voice.begin(f"{run.folder.name}: measuring the saved model.")
    config, folder = run.config, run.folder / MODEL
    model = load_quantized(experiment, folder)
    arguments = trainer_arguments(run, experiment, 1)
    trainer = PassCounter(experiment, "fp32", model=model, args=arguments)
    trainer.remove_callback(transformers.PrinterCallback)
    dev = {}
    for key, rows in experiment.dev.items():
        dev[key] = clean(trainer.evaluate(rows, metric_key_prefix=key), f"{key}_")
    training = clean(trainer.evaluate(experiment.part, metric_key_prefix="part"), "part_")
    course = json.loads((folder / COURSE).read_text(encoding="utf-8"))
    first = next(iter(dev.values()))
    if course["history"]:
        course["history"][-1]["dev"] = dev
    results = {
        "metric_name": experiment.metric, "metric": first[experiment.metric], "dev": dev, "dev_loss": first["loss"],
        "train_loss": training["loss"], "train_loss_rows": len(experiment.part),
        "sharpness": [sharpness(trainer, model, rho) for rho in config["sharpness"]], "epochs": course["history"],
        "steps": course["steps"], "passes": course["passes"], "seconds": course["seconds"],
        "threads": torch.get_num_threads(), "device": arguments.device.type, "config": config, "versions": versions(),
        "commit": git_commit(),
    }  # fmt: skip
    wait()
    if voice.is_first:
        write_json(run.folder / RESULTS, results)
        for path in run.folder.glob("checkpoint-*"):
            shutil.rmtree(path, ignore_errors=True)
    words = " ".join(f"{name} {value:.4f}" for name, value in first.items())
    voice.say(f"{run.folder.name}: finished, {words}, training loss {training['loss']:.4f}.")
    wait()


def load_quantized(experiment: Experiment, folder: Path) -> nn.Module:
    """Return the model of a finished run, with its quantizers if it has any."""
    model = experiment.load_model(folder)
    if (folder / "qsam.json").is_file():
        qsam.quantize_(model, spec=folder)  # qsam
    return model


def clean(metrics: Mapping[str, float], prefix: str) -> dict[str, float]:
    """Return loss and metrics without the Trainer's prefix and times."""
    names = {name.removeprefix(prefix): value for name, value in metrics.items() if name.startswith(prefix)}
    return {name: float(v) for name, v in names.items() if not name.endswith(("runtime", "_per_second", "_time"))}


def sharpness(trainer: PassCounter, model: nn.Module, rho: float) -> Json:
    """Return how far the training loss can rise within a ball of this radius around the model's weights."""
    rows = trainer.experiment.part
    loader = (
        trainer.get_eval_dataloader(rows)
        if processes() == 1
        else DataLoader(rows, 64, collate_fn=trainer.data_collator)
    )

    def closure() -> Tensor:
        model.zero_grad()
        total = torch.zeros((), device=trainer.args.device)
        for batch in loader:
            inputs = {name: value.to(trainer.args.device) for name, value in batch.items()}
            share = len(inputs["labels"]) / len(rows)
            loss = trainer.compute_loss(model, inputs) * share
            loss.backward()
            total += loss.detach()
        return total

    model.eval()
    said = f"{len(rows):,} training rows, not augmented, in evaluation mode"
    return asdict(qsam.sharpness(model, closure, rho=rho, steps=SHARPNESS_STEPS, data=said, progress=False))  # qsam


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that decide results."""
    found = {"python": platform.python_version(), "qsam": qsam.__version__}
    for name in ("torch", "torchvision", "transformers", "accelerate", "timm", "numpy", "scikit-learn", "scipy"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def git_commit() -> str | None:
    """Return the commit of this file's repository, with "-dirty" if it was changed since; None outside of one."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--match="]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        folder = Path(__file__).parent
        return subprocess.run(
            command, cwd=folder, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()
    return None
