"""The command line of `recipes.vision`: its settings, their defaults, and what makes no sense."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipes.options import SharedOptions, check_not_negative, check_shared, for_demo, new_parser

DEFAULTS: dict[str, Any] = {
    "method": ["lsq", "squat"],
    "bits": 4,
    "activation_bits": 4,
    "rho": 0.1,
    "schedule": "fused",
    "model": "resnet20",
    "data": "mnist5k",
    "optimizer": "sgd",
    "epochs": 10,
    "fp32_epochs": 30,
    "batch_size": 100,
    "lr": 0.01,
    "fp32_lr": 0.1,
    "weight_decay": 1e-4,
    "seed": [0],
    "output_dir": Path("runs/vision"),
}

DEMO: dict[str, Any] = {
    "bits": 2,
    "activation_bits": 2,
    "fp32_epochs": 6,
    "epochs": 4,
    "warmup_epochs": 1.0,
    "augment": "shift",
    "output_dir": Path("runs/vision-demo"),
    "method": None,
}
"""Small settings of `--demo`; what the command line says goes before them."""

AUGMENTATIONS = ("none", "shift", "crop", "timm")


@dataclass(frozen=True)
class VisionOptions(SharedOptions):
    """What the command line said; `--help` describes each."""

    data: str
    data_dir: Path | None
    image_size: int | None
    pretrained: bool
    granularity: str
    optimizer: str
    momentum: float
    weight_decay: float
    warmup_epochs: float
    label_smoothing: float
    augment: str
    auto_augment: str | None
    reestimate_batchnorm: int
    workers: int

    @property
    def method_settings(self) -> dict[str, Any]:
        """What is set for every method that has it."""
        return {**super().method_settings, "granularity": self.granularity}


def parse_vision_options(arguments: Sequence[str] | None = None) -> VisionOptions:
    """Read and check the command line.

    Args:
        arguments: the words after the program's name; None is those of this process.

    Returns:
        The options, those that were left out set to `--demo`'s values or the defaults.

    Raises:
        ValueError: if a value makes no sense.
    """
    parser = _parser()
    values = vars(parser.parse_args(arguments))
    if values["demo"]:
        parser.set_defaults(**DEMO)
        values = for_demo(vars(parser.parse_args(arguments)))
    options = VisionOptions(**values)
    _check(options)
    check_shared(options)
    return options


def _check(options: VisionOptions) -> None:
    check_not_negative(options, "momentum", "weight_decay", "warmup_epochs", "label_smoothing")
    if not options.label_smoothing < 1:
        raise ValueError(f"`--label-smoothing` must be below 1, got {options.label_smoothing}.")
    if not options.momentum < 1:
        raise ValueError(f"`--momentum` must be below 1, got {options.momentum}.")
    if options.image_size is not None and options.image_size < 8:
        raise ValueError(f"`--image-size` must be at least 8, got {options.image_size}.")
    for name in ("workers", "reestimate_batchnorm"):
        if getattr(options, name) < 0:
            raise ValueError(f"`--{name.replace('_', '-')}` must not be negative, got {getattr(options, name)}.")
    if options.auto_augment is not None and options.augment != "timm":
        raise ValueError(f"`--auto-augment` needs `--augment timm`, got `--augment {options.augment}`.")


def _parser() -> argparse.ArgumentParser:
    parser = new_parser(
        "vision", "Train an image classifier in full precision, then train it with quantized weights and inputs."
    )
    add = parser.add_argument
    add(
        "--model",
        help="resnet20 or vit_small_image (trained from scratch at the images' own size), embedded-efficientnet-lite0 "
        "(ImageNet weights out of a package archive), or the name of any timm model: resnet18, vit_tiny_patch16_224",
    )
    add("--pretrained", action="store_true", help="start from the weights that timm downloads; else from random ones")
    add(
        "--data",
        help="mnist5k or digits (embedded), cifar10, cifar100, flowers102 or oxford_pets (downloaded once), a folder "
        "of class folders, or of train and val (or test) folders of these, or an .npz file with images and labels",
    )
    add("--data-dir", type=Path, help="where downloaded sets are kept")
    add("--image-size", type=int, help="side of the images in pixels; else the pretrained model's, or the images' own")
    add("--granularity", choices=("per_tensor", "per_channel"), default="per_tensor", help="of the weights' scales")
    add("--optimizer", choices=("sgd", "adamw"), help="the base optimizer")
    add("--momentum", type=float, default=0.9, help="of sgd")
    add("--weight-decay", type=float, help="on matrices and kernels; norms, biases and scales have none")
    add("--warmup-epochs", type=float, default=0.0, help="epochs over which the rates rise, in both phases")
    add("--label-smoothing", type=float, default=0.0, help="share of the label that goes to all classes")
    add(
        "--augment",
        choices=AUGMENTATIONS,
        default="crop",
        help="shift: random crop after padding by an eighth; crop: that and a flip; timm: resized crop, flip, jitter",
    )
    add("--auto-augment", help="one of timm's policies, for example rand-m9-mstd0.5")
    add(
        "--reestimate-batchnorm",
        type=int,
        default=0,
        metavar="BATCHES",
        help="after training, measure the statistics of BatchNorm anew on so many batches",
    )
    add("--workers", type=int, default=0, help="processes that load images")
    parser.set_defaults(**DEFAULTS)
    return parser
