"""The loop of all recipes: train in full precision, quantize, train with quantized weights, evaluate, compare.

The lines that qsam needs are marked `# qsam`. All methods of a seed start from the same full-precision model. Each run
is a folder; `recipes/runs.py` says what is in it.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

import qsam
from recipes import ranks
from recipes.experiment import DEVICE, Experiment
from recipes.methods import parse_method
from recipes.plan import training_steps
from recipes.progress import Progress, restore_, save_checkpoint
from recipes.runs import Json, Run

DIAGNOSTICS_EVERY = 10
"""Steps between two looks at the optimizer's diagnostics; even, for SQuAT's `next_batch` perturbs in odd steps only."""

CALIBRATION_BATCHES = 8
SHARPNESS_STEPS = 8


def command(name: str, run_all: Callable[[], None]) -> int:
    """Run a recipe's command line; say what went wrong in a sentence.

    Args:
        name: the recipe's.
        run_all: does everything.

    Returns:
        The exit code: 0; 2 for what the user can mend; 130 after an interruption.
    """
    try:
        with ranks.process_group():
            run_all()
    except (ValueError, OSError, SafetensorError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{name}: interrupted; the same command with --resume goes on.", file=sys.stderr)
        return 130
    return 0


def run_planned(runs: Mapping[tuple[str, int], Run], experiment: Experiment, save_every: int) -> None:
    """Run every method with every seed that is not finished.

    Args:
        runs: by method and seed, the full-precision ones before what starts from them.
        experiment: data, model, loss and metrics.
        save_every: steps between two checkpoints.
    """
    for (method, seed), run in runs.items():
        ranks.wait()  # what a run of before has written is there, and nobody has begun with this one
        if ranks.from_first(run.is_finished):
            if ranks.is_first():
                run.tidy()
            ranks.say(f"{run.folder.name}: finished before.")
            continue
        if ranks.is_first():
            run.start()
        if method == "fp32":
            train_full_precision(run, experiment, save_every)
        else:
            train_method(run, runs["fp32", seed], experiment, save_every)


def train_full_precision(run: Run, experiment: Experiment, save_every: int) -> None:
    """Train the pretrained or new model in full precision."""
    torch.manual_seed(run.config["seed"])  # what is not pretrained is drawn here
    model = experiment.new_model(run.config)
    ranks.part_ways(run.config["seed"])
    base, arguments = experiment.base(model, run.config)
    optimizer = base(**{"params": model.parameters(), **arguments})
    progress = train_(model, optimizer, experiment, run, save_every)
    finish(run, model, None, experiment, progress)


def train_method(run: Run, start: Run, experiment: Experiment, save_every: int) -> None:
    """Quantize the full-precision model, if the method does, and train it, unless it is rounding alone."""
    config, method = run.config, parse_method(run.config["method"])
    model = experiment.load_model(start.model_folder)
    coverage = None
    if method.quantizes:
        coverage = qsam.quantize_(model, rules=experiment.rules, **method.quantization(config))  # qsam
        if any(row.quantizer is not None for row in coverage.inputs):
            qsam.calibrate(model, calibration_batches(experiment, config))  # qsam
    if not method.trains:
        qsam.write_(model)  # qsam
        return finish(run, model, coverage, experiment, Progress())
    torch.manual_seed(config["seed"])
    ranks.part_ways(config["seed"])
    base, arguments = experiment.base(model, config)
    optimizer = method.optimizer(model, base, config, **arguments)  # qsam
    progress = train_(model, optimizer, experiment, run, save_every)
    return finish(run, model, coverage, experiment, progress)


def calibration_batches(experiment: Experiment, config: Json) -> list[Any]:
    """Return the inputs of the first training batches."""
    batches = experiment.order(config, 0)[:CALIBRATION_BATCHES]
    return [inputs for inputs, _ in experiment.loaded(batches, config, 0)]


def train_(
    model: nn.Module, optimizer: torch.optim.Optimizer, experiment: Experiment, run: Run, save_every: int
) -> Progress:
    """Train with a cosine schedule, from the run's checkpoint if there is one; full precision and quantized alike."""
    config = run.config
    steps = training_steps(config, experiment.rows)
    scheduler = LambdaLR(optimizer, partial(rate_factor, steps=steps, warmup=experiment.warmup(config)))
    progress = restore_(run, model, optimizer, scheduler)
    wrapped = ranks.wrapped(model)
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}

    def forward_backward(inputs: Any, labels: Tensor, weight: float) -> float:
        optimizer.zero_grad()
        loss = weight * experiment.loss(wrapped, inputs, labels, config)
        loss.backward()
        progress.passes += 1
        return loss.item()

    quiet = None if ranks.is_first() else True  # None: off where there is no terminal
    with tqdm(total=steps, initial=progress.step, desc=run.folder.name, disable=quiet, dynamic_ncols=True) as bar:
        while progress.step < steps:
            epoch = len(progress.history)
            batches = experiment.order(config, epoch)
            start, end = epoch * len(batches), min((epoch + 1) * len(batches), steps)
            model.train()
            left = batches[progress.step - start : end - start]
            loaded = experiment.loaded([ranks.own_rows(batch) for batch in left], config, epoch)
            for batch, (inputs, labels) in zip(left, loaded, strict=True):
                begin = time.perf_counter()
                closure = partial(forward_backward, inputs, labels, ranks.weight_of(batch))
                loss = ranks.mean(optimizer.step(closure))  # qsam: as often as the method has passes
                scheduler.step()
                progress.add_step(loss, time.perf_counter() - begin)
                if progress.step % DIAGNOSTICS_EVERY == 1:
                    progress.add(diagnostics(optimizer))
                bar.set_postfix(loss=f"{loss:.3f}", **last_metric(progress, experiment), refresh=False)
                bar.update()
                if progress.step % save_every == 0 and progress.step < end:
                    save_checkpoint(run, progress, parts)
            progress.end_epoch(experiment.evaluate(model, config["precision"]))
            save_checkpoint(run, progress, parts)
            if ranks.is_first():
                tqdm.write(f"{run.folder.name}: {progress.line(steps)}")
    return progress


def rate_factor(step: int, steps: int, warmup: int = 0) -> float:
    """Return the factor of all learning rates, each of which has a full size of its own.

    ``(t + 1) / (W + 1)`` while t < W, else ``(1 + cos(pi * (t - W) / (T - W))) / 2``.

    Args:
        step: t, from 0.
        steps: T, of the whole training.
        warmup: W.

    Example:
        >>> [rate_factor(t, 4) for t in (0, 2, 4)], [rate_factor(t, 6, warmup=3) for t in (0, 1, 2, 3)]
        ([1.0, 0.5, 0.0], [0.25, 0.5, 0.75, 1.0])
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))) / 2


def diagnostics(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Return what a qsam optimizer says of its last step: what the perturbation added to the loss, and the rounding."""
    if not hasattr(optimizer, "diagnostics"):
        return {}
    found = optimizer.diagnostics()  # qsam
    return {name: found[name] for name in ("rise", "quantization_noise_norm", "clipped_share") if name in found}


def last_metric(progress: Progress, experiment: Experiment) -> dict[str, str]:
    """Return the main metric after the last finished epoch, for the progress bar."""
    if not progress.history:
        return {}
    first = next(iter(progress.history[-1]["dev"].values()))
    return {experiment.metric: f"{first[experiment.metric]:.4f}"}


def finish(
    run: Run, model: nn.Module, coverage: qsam.Coverage | None, experiment: Experiment, progress: Progress
) -> None:
    """Evaluate in fp32, as whoever loads the model will, and write the model and the results."""
    if progress.step:
        experiment.after_training_(model, run.config)
    dev = experiment.evaluate(model, "fp32")
    first = next(iter(dev.values()))
    training, rows = experiment.evaluate_training(model)
    results = {
        "metric_name": experiment.metric,
        "metric": first[experiment.metric],
        "dev": dev,
        "dev_loss": first["loss"],
        "train_loss": training["loss"],
        "train_loss_rows": rows,
        "sharpness": [sharpness(model, experiment, rho) for rho in run.config.get("sharpness", ())],
        "epochs": progress.history,
        "steps": progress.step,
        "passes": progress.passes,
        "seconds": progress.seconds,
        "threads": torch.get_num_threads(),
        "device": DEVICE.type,
    }
    if ranks.is_first():
        run.finish(results, partial(experiment.save_model, model=model, coverage=coverage))


def sharpness(model: nn.Module, experiment: Experiment, rho: float) -> Json:
    """Return how far the training loss can rise within a ball of this radius round the model's weights."""
    config = {"precision": "fp32"}

    def closure() -> Tensor:
        model.zero_grad()
        total = torch.zeros(())
        for inputs, labels in experiment.part_batches():
            loss = experiment.loss(model, inputs, labels, config) * len(labels)
            loss.backward()
            total += loss.detach().cpu()
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad /= rows
        return total / rows

    rows = sum(len(labels) for _, labels in experiment.part_batches())
    model.eval()
    said = f"{rows:,} training rows, not augmented, in evaluation mode"
    return asdict(qsam.sharpness(model, closure, rho=rho, steps=SHARPNESS_STEPS, data=said, progress=False))  # qsam
