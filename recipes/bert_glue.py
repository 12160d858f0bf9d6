"""BERT on GLUE: fine-tune in full precision, then train with quantized weights, and compare methods.

    python -m recipes.bert_glue --task cola --method lsq squat --glue-dir DIR --seed 0 1 2
    torchrun --nproc_per_node=2 -m recipes.bert_glue ...

With `torchrun` each process trains on its part of every batch (`--batch-size` stays that of all together), each
evaluates everything, and the first one writes; see docs/distributed.md.
The lines that qsam needs are marked `# qsam`. All methods of a task and seed start from the same full-precision model.
Each run is a folder, `OUTPUT_DIR/<task>-<method>-w<bits>a<bits>-seed<seed>/`; `recipes/runs.py` says what is in it.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

if not __package__:  # python recipes/bert_glue.py
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

import qsam
from recipes import ranks
from recipes.bert_glue_model import (
    DEVICE,
    Data,
    calibration_batches,
    evaluate,
    load_data,
    load_model,
    logits_of,
    loss_of,
    save_model,
)
from recipes.bert_glue_options import parse_options
from recipes.bert_glue_plan import load_rows, planned_runs, training_steps
from recipes.glue_tasks import Task
from recipes.methods import parse_method
from recipes.progress import Progress, restore_, save_checkpoint
from recipes.report import report
from recipes.runs import Run
from recipes.text_batches import epoch_batches

DIAGNOSTICS_EVERY = 10
"""Steps between two looks at the optimizer's diagnostics; even, for SQuAT's `next_batch` perturbs in odd steps only."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with ranks.process_group():
            run_all(arguments)
    except (ValueError, OSError, SafetensorError) as error:
        print(f"bert_glue: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("bert_glue: interrupted; the same command with --resume goes on.", file=sys.stderr)
        return 130
    return 0


def run_all(arguments: Sequence[str] | None) -> None:
    """Run every method with every seed, then print and draw the comparison."""
    options = parse_options(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    with ranks.first_goes_first():
        rows = load_rows(options)
        data = load_data(rows, options.model, options.max_length)
    say(f"{rows.splits.source}\nMetrics are measured on {rows.evaluated_on}.")
    runs = planned_runs(options, rows)
    for (method, seed), run in runs.items():
        ranks.wait()  # what a run of before has written is there, and nobody has begun with this one
        if ranks.from_first(run.is_finished):
            if ranks.is_first():
                run.tidy()
            say(f"{run.folder.name}: finished before.")
        elif method == "fp32":
            fine_tune(run, data, options.save_every)
        else:
            train_method(run, runs["fp32", seed].model_folder, data, options.save_every)
    if ranks.is_first():
        report(options.output_dir, options.task)


def say(text: str) -> None:
    """Print, once."""
    if ranks.is_first():
        print(text, flush=True)


def fine_tune(run: Run, data: Data, save_every: int) -> None:
    """Fine-tune the pretrained model in full precision."""
    if ranks.is_first():
        run.start()
    torch.manual_seed(run.config["seed"])  # the head is drawn here
    model = load_model(run.config["model"], data.task)
    ranks.part_ways(run.config["seed"])
    optimizer = torch.optim.Adam(model.parameters(), fused=True, lr=run.config["lr"])
    progress = train_(model, optimizer, data, run, save_every)
    finish(run, model, None, data, progress)


def train_method(run: Run, start: Path, data: Data, save_every: int) -> None:
    """Quantize the fine-tuned model, if the method does, and train it, unless it is rounding alone."""
    if ranks.is_first():
        run.start()
    config, method = run.config, parse_method(run.config["method"])
    model = load_model(str(start), data.task)
    coverage = None
    if method.quantizes:
        coverage = qsam.quantize_(  # qsam
            model, rules=qsam.presets.squat_bert, **method.quantization(config)
        )
        if any(row.quantizer is not None for row in coverage.inputs):
            qsam.calibrate(model, calibration_batches(data, config["batch_size"], config["seed"]))  # qsam
    if not method.trains:
        qsam.write_(model)  # qsam
        return finish(run, model, coverage, data, Progress())
    torch.manual_seed(config["seed"])
    ranks.part_ways(config["seed"])
    optimizer = method.optimizer(model, torch.optim.Adam, config, fused=True, lr=config["lr"])  # qsam
    return finish(run, model, coverage, data, train_(model, optimizer, data, run, save_every))


def train_(model: nn.Module, optimizer: torch.optim.Optimizer, data: Data, run: Run, save_every: int) -> Progress:
    """Train with a cosine schedule, from the run's checkpoint if there is one; full precision and quantized alike."""
    config = run.config
    rows = data.train.lengths
    steps = training_steps(config, len(rows))
    scheduler = LambdaLR(optimizer, lambda step: (1 + math.cos(math.pi * step / steps)) / 2)
    progress = restore_(run, model, optimizer, scheduler)
    wrapped = ranks.wrapped(model)
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}

    def forward_backward(inputs: dict[str, Tensor], labels: Tensor, weight: float) -> float:
        optimizer.zero_grad()
        loss = weight * loss_of(data.task, logits_of(wrapped, inputs, config["precision"]), labels)
        loss.backward()
        progress.passes += 1
        return loss.item()

    quiet = None if ranks.is_first() else True  # None: off where there is no terminal
    with tqdm(total=steps, initial=progress.step, desc=run.folder.name, disable=quiet, dynamic_ncols=True) as bar:
        while progress.step < steps:
            epoch = len(progress.history)
            batches = epoch_batches(rows, config["batch_size"], seed=config["seed"], epoch=epoch)
            start, end = epoch * len(batches), min((epoch + 1) * len(batches), steps)
            model.train()
            for batch in batches[progress.step - start : end - start]:
                begin = time.perf_counter()
                inputs, labels = data.train.batch(ranks.own_rows(batch), DEVICE)
                closure = partial(forward_backward, inputs, labels, ranks.weight_of(batch))
                loss = ranks.mean(optimizer.step(closure))  # qsam: as often as the method has passes
                scheduler.step()
                progress.add_step(loss, time.perf_counter() - begin)
                if progress.step % DIAGNOSTICS_EVERY == 1:
                    progress.add(diagnostics(optimizer))
                bar.set_postfix(loss=f"{loss:.3f}", **last_metric(progress, data.task), refresh=False)
                bar.update()
                if progress.step % save_every == 0 and progress.step < end:
                    save_checkpoint(run, progress, parts)
            progress.end_epoch(
                {key: evaluate(model, data.task, dev, config["precision"]) for key, dev in data.dev.items()}
            )
            save_checkpoint(run, progress, parts)
            if ranks.is_first():
                tqdm.write(f"{run.folder.name}: {progress.line(steps)}")
    return progress


def diagnostics(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Return what a qsam optimizer says of its last step: what the perturbation added to the loss, and the rounding."""
    if not hasattr(optimizer, "diagnostics"):
        return {}
    found = optimizer.diagnostics()  # qsam
    return {name: found[name] for name in ("rise", "quantization_noise_norm", "clipped_share") if name in found}


def last_metric(progress: Progress, task: Task) -> dict[str, str]:
    """Return the main metric after the last finished epoch, for the progress bar."""
    if not progress.history:
        return {}
    first = next(iter(progress.history[-1]["dev"].values()))
    return {task.main_metric: f"{first[task.main_metric]:.4f}"}


def finish(run: Run, model: nn.Module, coverage: qsam.Coverage | None, data: Data, progress: Progress) -> None:
    """Evaluate in fp32, as whoever loads the model will, and write the model and the results."""
    dev = {name: evaluate(model, data.task, rows, "fp32") for name, rows in data.dev.items()}
    first = next(iter(dev.values()))
    results = {
        "metric_name": data.task.main_metric,
        "metric": first[data.task.main_metric],
        "dev": dev,
        "dev_loss": first["loss"],
        "train_loss": evaluate(model, data.task, data.train_part, "fp32")["loss"],
        "train_loss_rows": len(data.train_part.labels),
        "epochs": progress.history,
        "steps": progress.step,
        "passes": progress.passes,
        "seconds": progress.seconds,
        "threads": torch.get_num_threads(),
        "device": DEVICE.type,
    }
    if ranks.is_first():
        run.finish(results, partial(save_model, model=model, tokenizer=data.tokenizer, coverage=coverage))


if __name__ == "__main__":
    sys.exit(main())
