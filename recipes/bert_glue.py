"""BERT on GLUE: fine-tune in full precision, then train with quantized weights, and compare methods.

    python -m recipes.bert_glue --task cola --method lsq squat --glue-dir DIR --seed 0 1 2

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
from recipes.bert_glue_plan import load_rows, planned_runs, split_method, training_steps
from recipes.glue_tasks import Task
from recipes.progress import Progress, restore_, save_checkpoint
from recipes.report import report
from recipes.runs import Json, Run
from recipes.text_batches import epoch_batches

DIAGNOSTICS_EVERY = 10
"""Steps between two looks at the optimizer's diagnostics; even, for SQuAT's `next_batch` perturbs in odd steps only."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
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
    rows = load_rows(options)
    print(f"{rows.splits.source}\nMetrics are measured on {rows.evaluated_on}.", flush=True)
    runs = planned_runs(options, rows)
    data = load_data(rows, options.model, options.max_length)
    for (method, seed), run in runs.items():
        if run.is_finished:
            run.tidy()
            print(f"{run.folder.name}: finished before.", flush=True)
        elif method == "fp32":
            fine_tune(run, data, options.save_every)
        else:
            quantize(run, runs["fp32", seed].model_folder, data, options.save_every)
    report(options.output_dir, options.task)


def fine_tune(run: Run, data: Data, save_every: int) -> None:
    """Fine-tune the pretrained model in full precision."""
    run.start()
    torch.manual_seed(run.config["seed"])  # the head is drawn here
    model = load_model(run.config["model"], data.task)
    optimizer = torch.optim.Adam(model.parameters(), fused=True, lr=run.config["lr"])
    progress = train_(model, optimizer, data, run, save_every)
    finish(run, model, None, data, progress)


def quantize(run: Run, start: Path, data: Data, save_every: int) -> None:
    """Quantize the fine-tuned model and, unless the method is rounding alone, train it."""
    run.start()
    config = run.config
    model = load_model(str(start), data.task)
    coverage = qsam.quantize_(  # qsam
        model, bits=config["bits"], activation_bits=config["activation_bits"], rules=qsam.presets.squat_bert
    )
    qsam.calibrate(model, calibration_batches(data, config["batch_size"], config["seed"]))  # qsam
    if config["method"] == "rtn":
        qsam.write_(model)  # qsam
        progress = Progress()
    else:
        torch.manual_seed(config["seed"])
        progress = train_(model, quantized_optimizer(model, config), data, run, save_every)
    finish(run, model, coverage, data, progress)


def quantized_optimizer(model: nn.Module, config: Json) -> torch.optim.Optimizer:
    """Return the method's optimizer round the paper's Adam."""
    classes = {"lsq": qsam.QAT, "joint": qsam.JointSAM, "saq": qsam.SAQ, "squat": qsam.SQuAT}  # qsam
    method, _ = split_method(config["method"])
    settings = {name: config[name] for name in ("rho", "schedule") if name in config}
    rates = config["scale_lr"]
    scale_lr = tuple(rates) if rates and len(rates) == 2 else rates[0] if rates else None
    optimizer: torch.optim.Optimizer = classes[method](  # qsam
        model, torch.optim.Adam, fused=True, lr=config["lr"], scale_lr=scale_lr, **settings
    )
    return optimizer


def train_(model: nn.Module, optimizer: torch.optim.Optimizer, data: Data, run: Run, save_every: int) -> Progress:
    """Train with a cosine schedule, from the run's checkpoint if there is one; full precision and quantized alike."""
    config = run.config
    rows = data.train.lengths
    steps = training_steps(config, len(rows))
    scheduler = LambdaLR(optimizer, lambda step: (1 + math.cos(math.pi * step / steps)) / 2)
    progress = restore_(run, model, optimizer, scheduler)
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}

    def forward_backward(inputs: dict[str, Tensor], labels: Tensor) -> float:
        optimizer.zero_grad()
        loss = loss_of(data.task, logits_of(model, inputs, config["precision"]), labels)
        loss.backward()
        progress.passes += 1
        return loss.item()

    with tqdm(total=steps, initial=progress.step, desc=run.folder.name, disable=None, dynamic_ncols=True) as bar:
        while progress.step < steps:
            epoch = len(progress.history)
            batches = epoch_batches(rows, config["batch_size"], seed=config["seed"], epoch=epoch)
            start, end = epoch * len(batches), min((epoch + 1) * len(batches), steps)
            model.train()
            for batch in batches[progress.step - start : end - start]:
                begin = time.perf_counter()
                closure = partial(forward_backward, *data.train.batch(batch, DEVICE))
                loss = optimizer.step(closure)  # qsam: as often as the method has passes
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
    run.finish(results, partial(save_model, model=model, tokenizer=data.tokenizer, coverage=coverage))


if __name__ == "__main__":
    sys.exit(main())
