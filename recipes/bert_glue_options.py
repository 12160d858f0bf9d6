"""The command line of `recipes.bert_glue`: its settings, their defaults, and what makes no sense."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from recipes.glue_tasks import TASKS, get_task
from recipes.methods import PASSES, parse_method, settings_help

EMBEDDED_MODEL = "embedded-minilm-l6"

DEFAULTS: dict[str, Any] = {
    "method": ["lsq", "squat"],
    "bits": 2,
    "activation_bits": 8,
    "rho": 0.1,
    "schedule": "same_batch",
    "epochs": 32,
    "fp32_epochs": 5,
    "batch_size": 32,
    "lr": 1e-5,
    "fp32_lr": 5e-5,
    "max_length": 128,
    "model": EMBEDDED_MODEL,
    "seed": [0],
    "output_dir": Path("runs/glue"),
}
"""The paper's settings, where it prints them."""

_SMALL = {
    "train_rows": 2500,
    "fp32_epochs": 2,
    "fp32_lr": 1e-4,
    "epochs": 1,
    "lr": 1e-4,
    "rho": 0.005,
    "schedule": "fused",
}

DEMO: dict[str, dict[str, Any]] = {"stsb": _SMALL, "movies": _SMALL}
"""Small settings of `--demo`, by task; what the command line says goes before them.

Rate and rho were chosen on 15 % of STS-B's training rows, held out, with the others for training (one seed; LSQ:
Pearson .731 at lr 5e-5, .753 at 1e-4; SQuAT at 1e-4: .749 at rho .005, .711 at .02). Fewer rows keep it under
ten minutes.
"""


@dataclass(frozen=True)
class Options:
    """What the command line said; `--help` describes each."""

    task: str
    method: list[str]
    bits: int
    activation_bits: int
    rho: float
    schedule: str
    model: str
    epochs: int
    fp32_epochs: int
    batch_size: int
    lr: float
    fp32_lr: float
    scale_lr: list[float] | None
    max_length: int
    seed: list[int]
    max_steps: int | None
    train_rows: int | None
    holdout: float | None
    glue_dir: Path | None
    hub: bool
    threads: int | None
    precision: str
    output_dir: Path
    tag: str | None
    save_every: int
    resume: bool
    demo: bool


def parse_options(arguments: Sequence[str] | None = None) -> Options:
    """Read and check the command line.

    Args:
        arguments: the words after the program's name; None is those of this process.

    Returns:
        The options, those that were left out set to `--demo`'s values or the defaults.

    Raises:
        ValueError: if a value makes no sense.
    """
    parser = _parser()
    first = parser.parse_args(arguments)
    if first.demo:
        if get_task(first.task).name not in DEMO:
            raise ValueError(f"`--demo` has settings for {' and '.join(DEMO)}, not for {first.task}: leave it out.")
        parser.set_defaults(**DEMO[first.task], output_dir=Path("runs/glue-demo"), method=None)
    options = Options(**vars(parser.parse_args(arguments)))
    if options.demo:
        options = _demo(options)
    _check(options)
    for method in options.method:
        parse_method(method).check(method_settings(options))
    return options


def method_settings(options: Options) -> dict[str, Any]:
    """Return what the command line sets for every method that has it."""
    return {name: getattr(options, name) for name in ("bits", "activation_bits", "scale_lr", "rho", "schedule")}


def default_precision() -> str:
    """Return "bf16" where the hardware computes in it, else "fp32"."""
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    return "bf16" if torch.cpu.get_capabilities().get("avx512_bf16", False) else "fp32"


def _demo(options: Options) -> Options:
    methods = options.method or ["fp32", "rtn", "lsq", "squat", f"lsq{PASSES[options.schedule]:g}x"]
    return Options(**{**vars(options), "method": methods, "resume": True})


def _check(options: Options) -> None:
    get_task(options.task)
    for name in ("bits", "activation_bits"):
        if not 2 <= getattr(options, name) <= 8:
            raise ValueError(f"`{_flag(name)}` must be an integer in [2, 8], got {getattr(options, name)}.")
    for name in ("epochs", "fp32_epochs", "batch_size", "max_steps", "train_rows", "threads", "save_every"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"`{_flag(name)}` must be at least 1, got {value}.")
    for name in ("rho", "lr", "fp32_lr"):
        value = getattr(options, name)
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"`{_flag(name)}` must be finite and not negative, got {value}.")
    if (
        any(not (math.isfinite(rate) and rate >= 0) for rate in options.scale_lr or [])
        or len(options.scale_lr or []) > 2
    ):
        raise ValueError(
            f"`--scale-lr` is one rate, or two (weights, activations), not negative: got {options.scale_lr}."
        )
    if options.holdout is not None and not 0 < options.holdout < 1:
        raise ValueError(f"`--holdout` must be a fraction between 0 and 1, got {options.holdout}.")
    if options.max_length < 8:
        raise ValueError(f"`--max-length` must be at least 8, got {options.max_length}.")
    if options.tag is not None and not re.fullmatch(r"[\w.=-]+", options.tag):
        raise ValueError(f"`--tag` must be letters, digits and . _ = - only, got {options.tag!r}.")
    if any(seed < 0 for seed in options.seed):
        raise ValueError(f"`--seed` must not be negative, got {options.seed}.")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bert_glue",
        description="Fine-tune BERT on a GLUE task in full precision, then train it with quantized weights.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--task", default="stsb", help=f"one of {', '.join(TASKS)}")
    add("--method", nargs="+", help=settings_help())
    add("--bits", type=int, help="bits of the weights of the encoder's Linear layers")
    add("--activation-bits", type=int, help="bits of their inputs")
    add("--rho", type=float, help="radius of the perturbation, for the methods that have one")
    add("--schedule", choices=PASSES, help="how squat alternates: 3, 1.5 or 2 passes a step")
    add("--epochs", type=int, help="epochs of quantization-aware training")
    add("--fp32-epochs", type=int, help="epochs of full-precision fine-tuning")
    add("--batch-size", type=int, help="rows a batch")
    add("--lr", type=float, help="learning rate of quantization-aware training")
    add("--fp32-lr", type=float, help="learning rate of full-precision fine-tuning")
    add(
        "--scale-lr", type=float, nargs="+", help="rate of the scales: one, or weights' and activations'; else balanced"
    )
    add("--max-length", type=int, help="tokens after which a row is cut")
    add("--max-steps", type=int, help="cap on the steps of each phase (lsq3x: times 3)")
    add("--seed", type=int, nargs="+", help="one run of everything a seed")
    add("--model", help="folder or hub name (the paper's is bert-base-uncased)")
    add("--glue-dir", type=Path, help="read the rows from this folder, the standard GLUE download")
    add(
        "--hub",
        action="store_true",
        help="read the rows from the hub (else embedded, for stsb and movies with the embedded model)",
    )
    add("--train-rows", type=int, help="use a fixed random subset of the training rows")
    add(
        "--holdout",
        type=float,
        help="set this fraction of the training rows apart and evaluate there, not on the dev set",
    )
    add("--threads", type=int, help="threads of torch; a resumed run is exact with the same number")
    add("--precision", choices=("fp32", "bf16"), default=default_precision(), help="bf16 is autocast over fp32 weights")
    add("--output-dir", type=Path, help="where the runs are written")
    add("--tag", help="a word in the names of the runs' folders, to keep settings apart (fp32 is shared)")
    add("--save-every", type=int, default=500, help="steps between checkpoints; each epoch ends with one too")
    add("--resume", action="store_true", help="continue unfinished runs and skip finished ones")
    add("--demo", action="store_true", help="fp32, rtn, lsq, squat and lsq with squat's passes, in minutes; resumes")
    parser.set_defaults(**DEFAULTS)
    return parser
