"""Shared parts of the recipes: options, run folders, the Hugging Face Trainer, and the results.

A run is a folder of the output folder, named after task, method, bits and seed:

    run.json        the settings, written first; a run of other settings in the same folder is refused
    checkpoint-N/   the Trainer's checkpoints, with `whole.json` once they are complete; removed at the end
    model/          the trained model: an ordinary checkpoint with `qsam.json`
    results.json    written last: a run that has it is finished, and skipped
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
from importlib.metadata import distributions, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import transformers
from accelerate import PartialState
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from transformers import EvalPrediction, HfArgumentParser, Trainer, TrainerCallback, TrainingArguments

import qsam
from qsam.integrations.trainer import TrainerMixin
from recipes.compare import RESULTS, flat, report, widths
from recipes.methods import PASSES, parse_method
from recipes.offline import fixed_order
from recipes.voice import voice

Json = dict[str, Any]
CONFIG, WHOLE, FIT = "run.json", "whole.json", "fit.json"
PART_ROWS = 1_000  # of the training set: the final training loss and the sharpness are measured on them
CALIBRATION_BATCHES, SHARPNESS_STEPS = 8, 8
FIT_STEPS, FIT_SECONDS, FIT_MARGIN = 9, 10.0, 1.3  # timed per method, or fewer in so many seconds; later steps may slow
TIMEOUT = int(os.environ.get("QSAM_TIMEOUT", "600"))  # seconds that a process waits for the others
HAS_BF16 = torch.cuda.is_bf16_supported() if torch.cuda.is_available() else (
    torch.cpu.get_capabilities().get("avx512_bf16", False))  # fmt: skip
MAY_BE_0 = {"rho", "lr", "fp32_lr", "scale_lr", "seed", "fit_minutes", "momentum", "weight_decay", "warmup_epochs",
            "workers", "reestimate_batchnorm", "hidden", "generator_lr", "generator_steps"}  # fmt: skip
PACKAGES = ("torch", "torchvision", "transformers", "accelerate", "timm", "numpy", "scikit-learn", "scipy")
VERSIONS = {"python": platform.python_version(), "qsam": qsam.__version__,
            **{name: version(name) for name in PACKAGES if list(distributions(name=name))}}  # fmt: skip
DESCRIBE = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--match="]

Experiment = Any
"""A recipe's part: one data set and one kind of model. It has

    facts                        its own settings that decide results, "task" and "evaluated_on" among them
    train, part, dev             datasets: training rows, a fixed part of them, and by name those that are measured on
    collate(rows), lengths       makes a batch, a dict with "labels"; tokens per training row, or None
    warmup_epochs, workers       epochs over which the rates rise; processes that load rows
    model(folder)                the float model of a folder; None: the one to start from
    prepare(model, config, batches)           quantizes the model if the method does, and returns the optimizer
    loss(model, batch)           the mean loss over the rows, and the outputs
    metric, metrics(predictions, labels)      the name of the main metric; all of them
    after_training_(model, config, batches)
    save(folder, model, weights)              writes an ordinary checkpoint, on the grid
    callbacks(trainer), figures()             if it has them: callbacks of the Trainer; more for the history per epoch
"""

# --- options ----------------------------------------------------------------------------------------------------------


def option(default: Any, words: str) -> Any:
    """Return a field of an options class: its default and its words in `--help`."""
    kind = {"default_factory": lambda: list(default)} if isinstance(default, list) else {"default": default}
    return field(**kind, metadata={"help": words})


@dataclass
class Options:
    """The options of every recipe."""

    sources: ClassVar[tuple[str, ...]] = ()  # what may follow the @ of a method
    method: list[str] = option(["lsq", "squat"], "fp32, rtn, lsq, q8bert, qbert, gobo, or an optimizer of qsam; lsq2x "
                               "has twice the steps; saq:case=1,rho=.02 sets one method's own. "
                               "fp32 is run in any case")  # fmt: skip
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
    precision: Literal["fp32", "bf16"] = option("bf16" if HAS_BF16 else "fp32", "bf16 is autocast over fp32 weights")
    output_dir: Path = option(Path("runs"), "folder of the runs")
    save_every: int = option(500, "steps between checkpoints; each epoch ends with one too")
    fit_minutes: float = option(0.0, "shorten the training to about so many minutes in all, after timing its steps")
    demo: bool = option(False, "fp32, rtn, squat, and lsq and recommended at squat's passes, in minutes")

    def method_settings(self) -> Json:
        """Return the settings that each method has which takes them."""
        shared = {name: getattr(self, name) for name in ("bits", "activation_bits", "rho", "schedule")}
        return shared | ({"scale_lr": self.scale_lr} if self.scale_lr else {})


def parse_options(options_class: type[Options], demo: Json, arguments: Sequence[str] | None) -> Any:
    """Read and check a command line; with `--demo`, the options that it leaves out have the values in `demo`."""
    parser: Any = HfArgumentParser(options_class, allow_abbrev=False)  # type: ignore[arg-type]
    (options,) = parser.parse_args_into_dataclasses(args=arguments, look_for_args_file=False)
    if options.demo:
        factor = PASSES[demo.get("schedule", options.schedule)]
        methods = ["fp32", "rtn", f"lsq{factor:g}x", f"recommended{factor:g}x", "squat"]
        parser.set_defaults(**{"method": methods, "fit_minutes": 8.0, **demo})
        (options,) = parser.parse_args_into_dataclasses(args=arguments, look_for_args_file=False)
    for name, value in vars(options).items():
        is_fine = (lambda v: 0 <= v < math.inf) if name in MAY_BE_0 else (lambda v: 0 < v < math.inf)
        numbers = [v for v in (value if isinstance(value, list) else [value]) if type(v) in {int, float}]
        if not all(map(is_fine, numbers)):
            words = "finite and not negative" if name in MAY_BE_0 else "finite and above 0"
            raise ValueError(f"`--{name.replace('_', '-')}` must be {words}, got {value}.")
    for method in options.method:
        parse_method(method).configured(options.method_settings())
        if (source := parse_method(method).source) not in {"", *options.sources}:
            known = f"one of {', '.join(options.sources)}" if options.sources else "nothing in this recipe"
            raise ValueError(f"`--method {method}`: after the @ comes {known}, got {source!r}.")
    return options


def choose_rows(count: int, options: Options, measured: str) -> tuple[list[int], list[int], list[int], str, str]:
    """Return of `count` training rows those to train on, those held out, and a part for the final loss; and words."""
    rows, words = list(range(count)), ""
    held: list[int] = []
    if options.train_rows is not None and options.train_rows < count:
        rows, _ = cut(rows, options.train_rows)
        words = f" Training uses a fixed random part of {len(rows):,} training rows."
    if options.holdout is not None:
        held, rows = cut(rows, round(options.holdout * len(rows)))
        measured = f"{len(held):,} training rows that are held out of training (a fixed random part), not the dev set"
        if not (held and rows):
            raise ValueError(f"`--holdout` {options.holdout} of {count} training rows leaves nothing on one side.")
    return rows, held, cut(rows, PART_ROWS)[0], words, measured


def cut(rows: Sequence[int], count: int) -> tuple[list[int], list[int]]:
    """Return a fixed random part of so many rows, and the others."""
    order = [rows[index] for index in fixed_order(len(rows))]
    return sorted(order[:count]), sorted(order[count:])


# --- runs -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One method with one seed: its folder, and all settings that decide its result."""

    folder: Path
    config: Json

    def check(self) -> None:
        """Refuse to continue a run of other settings."""
        if (self.folder / CONFIG).is_file():
            there, here = flat(read_json(self.folder / CONFIG)), flat(json.loads(json.dumps(self.config)))
            changed = [name for name in {**there, **here} if there.get(name) != here.get(name)]
            words = "; ".join(f"{name} is {there.get(name)!r} there and {here.get(name)!r} here" for name in changed)
            if changed:
                raise ValueError(
                    f"{self.folder} holds a run of other settings: {words}. Give the same settings, another "
                    "--output-dir, or the setting after the method's name (squat:rho=.2), which names the folder too."
                )


def read_json(path: Path) -> Json:
    """Read a JSON file."""
    content: Json = json.loads(path.read_text(encoding="utf-8"))
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file as a whole, or not at all; NaN and infinity are refused, because JSON has none."""
    unfinished = path.with_name(f"{path.name}.partial")
    with unfinished.open("w", encoding="utf-8") as handle:
        handle.write(json.dumps(content, indent=1, allow_nan=False, default=str) + "\n")
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(unfinished, path)


def command(name: str, read_options: Callable[[], Options], experiment: Callable[[Any], Experiment]) -> int:
    """Run a recipe's command line, say what went wrong in a sentence, and return the exit code."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        options = read_options()
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        if "TORCHELASTIC_RUN_ID" in os.environ:
            PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(seconds=TIMEOUT))
        if options.batch_size % processes():
            raise ValueError(f"`--batch-size` must be a multiple of {processes()} processes, got {options.batch_size}.")
        voice.begin(f"{name}: reading the data.")
        run_all(options, experiment(options))
    except (ValueError, OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "PytorchStreamWriter" not in str(error):  # torch.save on a full disk
            raise
        print(f"{name}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{name}: interrupted; the same command goes on.", file=sys.stderr)
        return 130
    finally:
        voice.activity = ""
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return 0


def processes() -> int:
    """Return the number of processes."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def wait() -> None:
    """Wait until all processes are here."""
    if processes() > 1:
        torch.distributed.barrier()


def run_all(options: Options, experiment: Experiment) -> None:
    """Run every method with every seed that is not finished, then print and draw the comparison."""
    if options.fit_minutes:
        fit_(options, experiment)
    runs = planned_runs(options, experiment.facts)
    for run in runs.values():
        run.check()
    wait()
    for (text, seed), run in runs.items():
        if (run.folder / RESULTS).is_file():
            voice.say(f"{run.folder.name}: finished before.")
            continue
        if voice.is_first and not (run.folder / CONFIG).is_file():
            run.folder.mkdir(parents=True, exist_ok=True)
            write_json(run.folder / CONFIG, run.config)
        wait()
        start = None if text == "fp32" else runs["fp32", seed].folder / "model"
        measure(run, experiment, train(run, experiment, start, options.save_every))
    if voice.is_first:
        report(options.output_dir, experiment.facts["task"])
    wait()


def planned_runs(options: Options, facts: Json) -> dict[tuple[str, int], Run]:
    """Return one run per method and seed, the full-precision ones first."""
    fp32: Json = {"epochs": options.fp32_epochs, "lr": options.fp32_lr, "max_steps": options.max_steps}
    own: Json = {"epochs": options.epochs, "lr": options.lr, "max_steps": options.max_steps}
    same = {name: getattr(options, name) for name in ("model", "batch_size", "precision", "sharpness")}
    runs = {}
    for text in dict.fromkeys(["fp32", *options.method]):
        method = parse_method(text)
        settings = (own if method.trains else {}) | method.configured(options.method_settings()) | {"fp32": fp32}
        for seed in options.seed:
            config = {**facts, "method": text, "seed": seed, **same, "processes": processes()}
            config |= fp32 if text == "fp32" else settings
            bits = f"-{widths(config).lower()}" if "bits" in config else ""
            name = f"{facts['task']}-{re.sub('[:,@]', '-', text)}{bits}-seed{seed}"
            runs[text, seed] = Run(Path(options.output_dir) / name, config)
    return runs


def fit_(options: Options, experiment: Experiment) -> None:
    """Time the first steps of each method, and shorten the epochs so that all of them end within the minutes asked for.

    The fraction is kept in the output folder, so that the same command, started again, has the same settings.
    """
    path = Path(options.output_dir) / FIT
    if not path.is_file():
        begin, minutes, each = time.perf_counter(), 0.0, {}
        for (text, seed), run in planned_runs(options, experiment.facts).items():
            if seed == options.seed[0] and parse_method(text).name != "rtn":
                voice.begin(f"Timing the first steps of {text} on this machine.")
                with TemporaryDirectory() as scratch:
                    course = train(Run(Path(scratch), run.config), experiment, None, 0, FIT_STEPS)
                each[text] = float(np.mean(course.times[1:]))
                minutes += len(options.seed) * steps_of(run.config, len(experiment.train)) * each[text] / 60
        left = max(options.fit_minutes / 4, options.fit_minutes - (time.perf_counter() - begin) / 60)
        if voice.is_first:
            path.parent.mkdir(parents=True, exist_ok=True)
            fraction = round(min(1.0, left / (FIT_MARGIN * minutes)), 3)
            write_json(path, {"fraction": fraction, "minutes": minutes, "seconds_per_step": each})
        wait()
    kept = read_json(path)
    options.epochs *= kept["fraction"]
    options.fp32_epochs *= kept["fraction"]
    words = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in kept["seconds_per_step"].items())
    voice.say(
        f"Training would take about {kept['minutes']:.1f} minutes on this machine ({words} per step). --fit-minutes "
        f"gives {options.fit_minutes:g}: {kept['fraction']:.1%} of its epochs are run."
    )


def steps_of(config: Json, rows: int) -> int:
    """Return the number of steps of a run: its epochs, capped; a method like `lsq3x` takes 3 times as many."""
    steps = math.ceil(config["epochs"] * math.ceil(rows / config["batch_size"]))
    return math.ceil(parse_method(config["method"]).factor * min(steps, config["max_steps"] or steps))


# --- training ---------------------------------------------------------------------------------------------------------


@dataclass
class Course:
    """The progress of a training beside the Trainer's state: losses since the last epoch, and the history per epoch."""

    steps: int = 0
    passes: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    history: list[Json] = field(default_factory=list)
    times: list[float] = field(default_factory=list)


class RecipeTrainer(Trainer):
    """A Trainer that takes its batches and its loss from an experiment, and counts forward-backward passes."""

    def __init__(self, experiment: Experiment, precision: str, **options: Any) -> None:
        self.experiment, self.precision, self.course, self.starts_step = experiment, precision, Course(), False
        super().__init__(data_collator=experiment.collate, compute_metrics=self._metrics, **options)
        self.remove_callback(transformers.PrinterCallback)

    def get_train_dataloader(self) -> DataLoader:
        """Return batches whose order follows from the seed and the epoch alone: a resumed run sees the same ones."""
        size, rows, workers = self.args.per_device_train_batch_size, self.experiment.train, self.experiment.workers
        order = Shuffled(len(rows), size * processes(), self.args.seed, self.experiment.lengths)
        loader = DataLoader(rows, size, sampler=order, collate_fn=self.data_collator, num_workers=workers)
        prepared: DataLoader = self.accelerator.prepare(loader)
        return prepared

    def compute_loss(self, model: nn.Module, inputs: Json, return_outputs: bool = False, *_: Any, **__: Any) -> Any:
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

    def scores(self, rows: Any) -> dict[str, float]:
        """Return loss and metrics over rows."""
        found = {name.removeprefix("eval_"): float(value) for name, value in self.evaluate(rows).items()}
        return {
            name: value
            for name, value in found.items()
            if not name.endswith(("epoch", "runtime", "_per_second", "_time"))
        }

    def _metrics(self, found: EvalPrediction) -> dict[str, float]:
        if not np.isfinite(found.predictions).all():
            raise ValueError("the model's outputs hold NaN or infinity: the training has diverged. Lower --lr.")
        return self.experiment.metrics(found.predictions, found.label_ids)


class QsamTrainer(TrainerMixin, RecipeTrainer):  # qsam
    """The same, which runs all passes of a step."""


class Follower(TrainerCallback):
    """Keeps the course of a training, says how far it is, and makes checkpoints that a kill cannot spoil."""

    def __init__(self, trainer: RecipeTrainer, name: str, save_every: int) -> None:
        self.trainer, self.name, self.save_every, self.begin = trainer, name, save_every, 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Start the clock."""
        self.trainer.starts_step, self.begin = True, time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop the clock; ask for a checkpoint, but at an epoch's end, which asks for one after its evaluation."""
        course, step = self.trainer.course, state.global_step
        course.steps = step
        course.times.append(time.perf_counter() - self.begin)
        course.seconds += course.times[-1]
        loss, left = np.mean(course.losses[-10:]), np.mean(course.times) * (state.max_steps - step)
        said = f"{self.name}: step {step}/{state.max_steps}, loss {loss:.3f}, {left:.0f} s of training left"
        voice.activity = said if args.disable_tqdm else ""  # on a terminal the Trainer's bar says it
        if not self.save_every:  # the first steps are timed
            control.should_training_stop |= processes() == 1 and len(course.times) > 2 and course.seconds > FIT_SECONDS
        elif step < state.max_steps:
            epoch = math.ceil(len(self.trainer.experiment.train) / (args.per_device_train_batch_size * processes()))
            control.should_save = step % self.save_every == 0 and step % epoch != 0

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Add an entry to the history; the last evaluation is that of the saved model."""
        course, goes_on = self.trainer.course, bool(self.save_every) and state.global_step < state.max_steps
        entry = {"epoch": len(course.history) + 1, "step": state.global_step, "passes": course.passes,
                 "seconds": course.seconds, "mean_loss": float(np.mean(course.losses)), "dev": {}}  # fmt: skip
        entry |= getattr(self.trainer.experiment, "figures", dict)()
        course.history.append(entry)
        course.losses = []
        for key, rows in self.trainer.experiment.dev.items() if goes_on else ():
            entry["dev"][key] = self.trainer.scores(rows)
            words = " ".join(f"{name} {value:.4f}" for name, value in entry["dev"][key].items())
            said = f"training loss {entry['mean_loss']:.4f}, {key} {words}, {course.passes} passes"
            voice.say(f"{self.name}: step {state.global_step}/{state.max_steps}, {said}, {course.seconds:.0f} s")
        control.should_save = goes_on

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Write, last of all, what says that a checkpoint is complete."""
        wait()
        if voice.is_first:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            write_json(folder / WHOLE, {"files": checksums(folder), "course": asdict(self.trainer.course)})
        wait()


class Shuffled(Sampler[int]):
    """Rows in an order that follows from the seed and the epoch alone; with lengths, neighbours are of like length.

    Without lengths a number is `draw * rows + row`, with another draw per seed and epoch: a dataset draws its
    augmentation from it.
    """

    CHUNK = 50  # batches that are sorted by length together: most padding goes, most of the randomness stays

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
        chunks = np.split(order, range(self.CHUNK * size, self.rows, self.CHUNK * size))
        order = np.concatenate([chunk[np.argsort(lengths[chunk], kind="stable")] for chunk in chunks])
        full = self.rows // size * size  # the smaller batch stays last
        return iter([*chance.permutation(order[:full].reshape(-1, size)).ravel().tolist(), *order[full:].tolist()])


def train(
    run: Run, experiment: Experiment, start: Path | None, save_every: int, max_steps: int | None = None
) -> Course:
    """Train a method from its checkpoint if there is one, and save the model; `max_steps` only times first steps."""
    config, method, name = run.config, parse_method(run.config["method"]), run.folder.name
    voice.begin(f"{name}: preparing the model; the first time on a machine, qsam compiles its kernels.")
    arguments = trainer_arguments(run, experiment, max_steps)
    torch.manual_seed(config["seed"])  # what is not pretrained is drawn here
    model = experiment.model(start).to(arguments.device)
    optimizer = experiment.prepare(model, config, batches_of(experiment, config, arguments.device))
    trainer = (QsamTrainer if method.trains else RecipeTrainer)(
        experiment, config["precision"], model=model, args=arguments, train_dataset=experiment.train,
        optimizers=(optimizer, None),
    )  # fmt: skip
    for callback in getattr(experiment, "callbacks", lambda _: [])(trainer):
        trainer.add_callback(callback)
    trainer.add_callback(Follower(trainer, name, 0 if max_steps else save_every))
    torch.manual_seed(config["seed"] + 1_000_003 * arguments.process_index)  # each process drops out on its own
    if method.name == "rtn":
        qsam.write_(model)  # qsam
    else:
        trainer.train(resume_from_checkpoint=whole_checkpoint(run.folder, trainer))
        experiment.after_training_(model, config, batches_of(experiment, config, arguments.device))
    if voice.is_first and not max_steps:
        (run.folder / "model").mkdir(exist_ok=True)
        weights = {name: value for name, value in model.state_dict().items() if "_quantizer." not in name}
        experiment.save(run.folder / "model", model, weights)
        if (coverage := qsam.coverage_of(model)) is not None:
            coverage.save(run.folder / "model")  # qsam
    wait()
    return trainer.course


def trainer_arguments(run: Run, experiment: Experiment, max_steps: int | None) -> TrainingArguments:
    """Return the Trainer's settings: the cosine schedule and no clipping."""
    config, rows, has_gpu = run.config, len(experiment.train), torch.cuda.is_available()
    steps = max_steps or (steps_of(config, rows) if "epochs" in config else 1)
    warmup = min(steps // 4, round(experiment.warmup_epochs * math.ceil(rows / config["batch_size"])))
    return TrainingArguments(
        output_dir=str(run.folder), seed=config["seed"], max_steps=steps, warmup_steps=0 if max_steps else warmup,
        per_device_train_batch_size=config["batch_size"] // processes(), per_device_eval_batch_size=64,
        lr_scheduler_type="cosine", learning_rate=config.get("lr", 0.0), max_grad_norm=0.0, save_strategy="no",
        save_total_limit=2, logging_strategy="no", report_to="none", label_names=["labels"],
        disable_tqdm=not (voice.is_first and sys.stderr.isatty()), remove_unused_columns=False,
        average_tokens_across_devices=False, ddp_timeout=TIMEOUT, dataloader_pin_memory=has_gpu,
        use_cpu=not has_gpu, dataloader_num_workers=experiment.workers,
    )  # fmt: skip


def batches_of(experiment: Experiment, config: Json, device: Any) -> Iterator[Json]:
    """Yield the inputs of the training batches."""
    size, rows = config["batch_size"], experiment.train
    order = list(Shuffled(len(rows), size, config["seed"], experiment.lengths))
    for begin in range(0, len(order), size):
        batch = experiment.collate([rows[row] for row in order[begin : begin + size]])
        yield {name: value.to(device) for name, value in batch.items() if name != "labels"}


def checksums(folder: Path) -> dict[str, int]:
    """Return the CRC-32 of each file of a checkpoint."""
    files = [path for path in sorted(folder.iterdir()) if path.is_file() and path.name != WHOLE]
    return {path.name: zlib.crc32(path.read_bytes()) for path in files}


def whole_checkpoint(folder: Path, trainer: RecipeTrainer) -> str | None:
    """Return the newest complete checkpoint, and give the trainer its course; torn ones are told and removed."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]), reverse=True)
    for path in found:
        with contextlib.suppress(OSError, ValueError, KeyError):
            whole = read_json(path / WHOLE)
            if whole["files"] == checksums(path):
                trainer.course = Course(**{**whole["course"], "times": []})
                voice.say(f"{folder.name}: going on from {path.name}.")
                wait()
                return str(path)
        voice.say(f"{folder.name}: {path.name} is not complete, or was changed; an older one or the start is taken.")
        wait()  # all processes have looked at it
        if voice.is_first:
            shutil.rmtree(path, ignore_errors=True)
    return None


# --- the results ------------------------------------------------------------------------------------------------------


def measure(run: Run, experiment: Experiment, course: Course) -> None:
    """Load the saved model as anybody will, evaluate it in fp32, and write the results."""
    voice.begin(f"{run.folder.name}: measuring the saved model.")
    config, folder = run.config, run.folder / "model"
    git = shutil.which("git")
    commit = subprocess.run(DESCRIBE, capture_output=True, text=True, check=False).stdout.strip() if git else None
    model = experiment.model(folder)
    if (folder / "qsam.json").is_file():
        qsam.quantize_(model, spec=folder)  # qsam
    trainer = RecipeTrainer(experiment, "fp32", model=model, args=trainer_arguments(run, experiment, 1))
    dev = {key: trainer.scores(rows) for key, rows in experiment.dev.items()}
    train_loss, first = trainer.scores(experiment.part)["loss"], next(iter(dev.values()))
    if course.history:
        course.history[-1]["dev"] = dev
    results = {
        "metric_name": experiment.metric, "metric": first[experiment.metric], "dev": dev, "dev_loss": first["loss"],
        "train_loss": train_loss, "train_loss_rows": len(experiment.part),
        "sharpness": [sharpness(trainer, model, rho) for rho in config["sharpness"]], "epochs": course.history,
        "steps": course.steps, "passes": course.passes, "seconds": course.seconds, "threads": torch.get_num_threads(),
        "device": trainer.args.device.type, "config": config, "versions": VERSIONS, "commit": commit or None,
    }  # fmt: skip
    wait()
    if voice.is_first:
        write_json(run.folder / RESULTS, results)
        for path in run.folder.glob("checkpoint-*"):
            shutil.rmtree(path, ignore_errors=True)
    words = " ".join(f"{name} {value:.4f}" for name, value in first.items())
    voice.say(f"{run.folder.name}: finished, {words}, training loss {train_loss:.4f}.")
    wait()


def sharpness(trainer: RecipeTrainer, model: nn.Module, rho: float) -> Json:
    """Return how far the training loss can rise within a ball of this radius around the model's weights."""
    rows, device = trainer.experiment.part, trainer.args.device

    def closure() -> Tensor:
        model.zero_grad()
        total = torch.zeros((), device=device)
        for batch in DataLoader(rows, 64, collate_fn=trainer.data_collator):
            inputs = {name: value.to(device) for name, value in batch.items()}
            loss = trainer.compute_loss(model, inputs) * len(inputs["labels"]) / len(rows)
            loss.backward()
            total += loss.detach()
        return total

    said = f"{len(rows):,} training rows, not augmented, in evaluation mode"
    return asdict(qsam.sharpness(model.eval(), closure, rho=rho, steps=SHARPNESS_STEPS, data=said, progress=False))
