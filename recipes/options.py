"""The settings that every recipe has: their flags, and what makes no sense."""

from __future__ import annotations

import argparse
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from recipes.methods import PASSES, parse_method, settings_help


@dataclass(frozen=True)
class SharedOptions:
    """What the command line of any recipe says; `--help` describes each."""

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
    seed: list[int]
    max_steps: int | None
    train_rows: int | None
    holdout: float | None
    sharpness: list[float]
    threads: int | None
    precision: str
    output_dir: Path
    tag: str | None
    save_every: int
    resume: bool
    demo: bool

    @property
    def method_settings(self) -> dict[str, Any]:
        """What is set for every method that has it."""
        return {name: getattr(self, name) for name in ("bits", "activation_bits", "scale_lr", "rho", "schedule")}


DEMO_METHODS = ("fp32", "rtn", "lsq", "squat")


def for_demo(values: dict[str, Any]) -> dict[str, Any]:
    """Complete the settings of `--demo`: its methods, with LSQ at squat's passes among them; and it resumes."""
    methods = values["method"] or [*DEMO_METHODS, f"lsq{PASSES[values['schedule']]:g}x"]
    return {**values, "method": methods, "resume": True}


def new_parser(program: str, description: str) -> argparse.ArgumentParser:
    """Return a parser with the flags that every recipe has; their defaults are the recipe's."""
    parser = argparse.ArgumentParser(
        prog=program, description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--method", nargs="+", help=settings_help())
    add("--bits", type=int, help="bits of the weights")
    add("--activation-bits", type=int, help="bits of the layers' inputs")
    add("--rho", type=float, help="radius of the perturbation, for the methods that have one")
    add("--schedule", choices=PASSES, help="how squat alternates: 3, 1.5 or 2 passes a step")
    add("--epochs", type=int, help="epochs of quantization-aware training")
    add("--fp32-epochs", type=int, help="epochs of full-precision training")
    add("--batch-size", type=int, help="rows a batch")
    add("--lr", type=float, help="learning rate of quantization-aware training")
    add("--fp32-lr", type=float, help="learning rate of full-precision training")
    add(
        "--scale-lr", type=float, nargs="+", help="rate of the scales: one, or weights' and activations'; else balanced"
    )
    add("--max-steps", type=int, help="cap on the steps of each phase (lsq3x: times 3)")
    add("--seed", type=int, nargs="+", help="one run of everything a seed")
    add("--train-rows", type=int, help="use a fixed random subset of the training rows")
    add(
        "--holdout",
        type=float,
        help="set this fraction of the training rows apart and evaluate there, not on the dev set",
    )
    add(
        "--sharpness",
        type=float,
        nargs="+",
        default=[],
        metavar="RHO",
        help="measure at the end how far the training loss can rise within each of these radii (SQuAT's Algorithm 2)",
    )
    add("--threads", type=int, help="threads of torch; a resumed run is exact with the same number")
    add("--precision", choices=("fp32", "bf16"), default=default_precision(), help="bf16 is autocast over fp32 weights")
    add("--output-dir", type=Path, help="where the runs are written")
    add("--tag", help="a word in the names of the runs' folders, to keep settings apart (fp32 is shared)")
    add("--save-every", type=int, default=500, help="steps between checkpoints; each epoch ends with one too")
    add("--resume", action="store_true", help="continue unfinished runs and skip finished ones")
    add("--demo", action="store_true", help="fp32, rtn, lsq, squat and lsq with squat's passes, in minutes; resumes")
    return parser


def default_precision() -> str:
    """Return "bf16" where the hardware computes in it, else "fp32"."""
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    return "bf16" if torch.cpu.get_capabilities().get("avx512_bf16", False) else "fp32"


def check_shared(options: SharedOptions) -> None:
    """Refuse values that make no sense.

    Raises:
        ValueError: with the flag, what it takes and what was given.
    """
    for name in ("bits", "activation_bits"):
        if not 2 <= getattr(options, name) <= 8:
            raise ValueError(f"`{flag(name)}` must be an integer in [2, 8], got {getattr(options, name)}.")
    for name in ("epochs", "fp32_epochs", "batch_size", "max_steps", "train_rows", "threads", "save_every"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"`{flag(name)}` must be at least 1, got {value}.")
    check_not_negative(options, "rho", "lr", "fp32_lr")
    rates = options.scale_lr or []
    if any(not (math.isfinite(rate) and rate >= 0) for rate in rates) or len(rates) > 2:
        raise ValueError(f"`--scale-lr` is one rate, or two (weights, activations), not negative: got {rates}.")
    if any(not (math.isfinite(rho) and rho > 0) for rho in options.sharpness):
        raise ValueError(f"`--sharpness` takes radii above 0, got {options.sharpness}.")
    if options.holdout is not None and not 0 < options.holdout < 1:
        raise ValueError(f"`--holdout` must be a fraction between 0 and 1, got {options.holdout}.")
    if options.tag is not None and not re.fullmatch(r"[\w.=-]+", options.tag):
        raise ValueError(f"`--tag` must be letters, digits and . _ = - only, got {options.tag!r}.")
    if any(seed < 0 for seed in options.seed):
        raise ValueError(f"`--seed` must not be negative, got {options.seed}.")
    for method in options.method:
        parse_method(method).check(options.method_settings)


def check_not_negative(options: SharedOptions, *names: str) -> None:
    """Refuse a number that is not finite, or below 0."""
    for name in names:
        value = getattr(options, name)
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"`{flag(name)}` must be finite and not negative, got {value}.")


def flag(name: str) -> str:
    """Return how the command line writes the name of a setting."""
    return "--" + name.replace("_", "-")
