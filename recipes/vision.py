"""Image classifiers: train in full precision, then with quantized weights and inputs, and compare methods.

    python -m recipes.vision --data cifar10 --model resnet20 --method lsq saq squat --seed 0 1 2
    python -m recipes.vision --data PHOTOS --model resnet18 --pretrained --optimizer adamw --lr 1e-4 --augment timm
    torchrun --nproc_per_node=2 -m recipes.vision ...

The loop, with the lines that qsam needs, is in `recipes/training.py`; options, outputs, resuming and errors are those
of `recipes.bert_glue`. Each run is a folder, `OUTPUT_DIR/<data>-<model>-<method>-w<bits>a<bits>-seed<seed>/`. The first
layer and the head have 8 bits, attention probabilities stay float; docs/vision.md says why.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

if not __package__:  # python recipes/vision.py
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
from torch import Tensor, nn
from torch.nn import functional

import qsam
from recipes import ranks
from recipes.experiment import DEVICE, TRAIN_LOSS_ROWS, Batch, Experiment, Metrics
from recipes.picture_batches import (
    Augmented,
    Look,
    batches_of,
    evaluation_transform,
    in_order,
    shuffled,
    training_transform,
)
from recipes.pictures import Pictures, PictureSet, load_pictures
from recipes.plan import planned_runs
from recipes.report import report
from recipes.runs import Json
from recipes.subsets import part_of
from recipes.training import command, run_planned
from recipes.vision_model import load_model, look_of, new_model, save_model
from recipes.vision_options import VisionOptions, parse_vision_options

EVALUATION_ROWS = 200


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    return command("vision", partial(run_all, arguments))


def run_all(arguments: Sequence[str] | None) -> None:
    """Run every method with every seed, then print and draw the comparison."""
    options = parse_vision_options(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    with ranks.first_goes_first():
        images = load_pictures(options.data, options.data_dir, options.train_rows, options.holdout)
    look = look_of(options.model, images.side, options.image_size)
    shared = what_decides(options, images, look)
    ranks.say(f"{images.source}\nMetrics are measured on {images.evaluated_on}.")
    runs = planned_runs(options, shared, {"reestimate_batchnorm": options.reestimate_batchnorm})
    run_planned(runs, ImageClassification(images, look, options), options.save_every)
    if ranks.is_first():
        report(options.output_dir, shared["task"])


def what_decides(options: VisionOptions, images: PictureSet, look: Look) -> Json:
    """Return the recipe's own part of a run's configuration."""
    names = ("pretrained", "optimizer", "momentum", "weight_decay", "warmup_epochs", "label_smoothing", "augment")
    return {
        "recipe": "vision",
        "task": f"{images.name}-{options.model}",
        "data": images.source,
        "data_sha256": images.fingerprint(),
        "evaluated_on": images.evaluated_on,
        "image_size": look.size,
        **{name: getattr(options, name) for name in (*names, "auto_augment")},
    }


class ImageClassification(Experiment):
    """A network with one output a class; cross entropy; SGD or AdamW."""

    metric = "top1"

    def __init__(self, images: PictureSet, look: Look, options: VisionOptions) -> None:
        self.images, self.look, self.options = images, look, options
        self.rows = len(images.train)
        part = part_of(range(self.rows), TRAIN_LOSS_ROWS)
        self.train_part = images.train.some(part)

    def order(self, config: Json, epoch: int) -> list[list[int]]:
        """Return shuffled batches."""
        return shuffled(self.rows, config["batch_size"], config["seed"], epoch)

    def loaded(self, batches: Iterable[Sequence[int]], config: Json, epoch: int) -> Iterator[Batch]:
        """Yield augmented batches."""
        transform = training_transform(self.look, config["augment"], config["auto_augment"])
        dataset = Augmented(self.images.train, transform, config["seed"], epoch)
        return batches_of(dataset, batches, DEVICE, self.options.workers)

    def part_batches(self) -> Iterator[Batch]:
        """Yield the fixed part of the training images."""
        return self._plain(self.train_part)

    def new_model(self, config: Json) -> nn.Module:
        """Return the new or pretrained model."""
        model = new_model(config["model"], len(self.images.names), self.look.size, config["pretrained"])
        return model.to(DEVICE)

    def load_model(self, folder: Path) -> nn.Module:
        """Return the full-precision model."""
        return load_model(folder)

    def save_model(self, folder: Path, model: nn.Module, coverage: qsam.Coverage | None) -> None:
        """Write weights, what rebuilds the model, and the quantizers."""
        facts = {"model": self.options.model, "classes": self.images.names, **vars(self.look)}
        save_model(folder, model, facts, coverage)

    def base(self, model: nn.Module, config: Json) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
        """Return SGD or AdamW; only matrices and kernels decay."""
        owned = [(name, p) for name, p in model.named_parameters() if p.requires_grad and "_quantizer." not in name]
        groups = [
            {"params": [p for _, p in owned if p.dim() >= 2], "weight_decay": config["weight_decay"]},
            {"params": [p for _, p in owned if p.dim() < 2], "weight_decay": 0.0},
        ]
        if config["optimizer"] == "adamw":
            return torch.optim.AdamW, {"params": groups, "lr": config["lr"], "fused": True}
        return torch.optim.SGD, {"params": groups, "lr": config["lr"], "momentum": config["momentum"], "fused": True}

    def warmup(self, config: Json) -> int:
        """Return the steps of `--warmup-epochs`."""
        return round(config["warmup_epochs"] * len(self.order(config, 0)))

    def loss(self, model: nn.Module, inputs: Any, labels: Tensor, config: Json) -> Tensor:
        """Return the cross entropy, with smoothed labels in training."""
        logits = logits_of(model, inputs, config["precision"])
        return functional.cross_entropy(logits, labels, label_smoothing=config.get("label_smoothing", 0.0))

    def evaluate(self, model: nn.Module, precision: str) -> dict[str, Metrics]:
        """Return loss and accuracy on the dev images."""
        return {name: self._measured(model, some, precision) for name, some in self.images.dev.items()}

    def evaluate_training(self, model: nn.Module) -> tuple[Metrics, int]:
        """Return the same on the fixed part of the training images, not augmented."""
        return self._measured(model, self.train_part, "fp32"), len(self.train_part)

    def after_training_(self, model: nn.Module, config: Json) -> None:
        """Measure BatchNorm's statistics anew, if asked for; a full-precision run has no such setting."""
        if count := config.get("reestimate_batchnorm", 0):
            batches = self.loaded(self.order(config, 0)[:count], config, 0)
            qsam.reestimate_batchnorm(model, [images for images, _ in batches])  # qsam

    def _plain(self, pictures: Pictures) -> Iterator[Batch]:
        dataset = Augmented(pictures, evaluation_transform(self.look))
        return batches_of(dataset, in_order(len(pictures), EVALUATION_ROWS), DEVICE, self.options.workers)

    @torch.no_grad()
    def _measured(self, model: nn.Module, pictures: Pictures, precision: str) -> Metrics:
        model.eval()
        loss = right = 0.0
        for images, labels in self._plain(pictures):
            logits = logits_of(model, images, precision)
            loss += float(functional.cross_entropy(logits, labels, reduction="sum"))
            right += float((logits.argmax(-1) == labels).sum())
        if not torch.tensor(loss).isfinite():
            raise ValueError("the model's outputs hold NaN or infinity: the training has diverged. Lower --lr.")
        return {"loss": loss / len(pictures), "top1": right / len(pictures)}


def logits_of(model: nn.Module, images: Tensor, precision: str) -> Tensor:
    """Run the model; bf16 is autocast over fp32 weights. The logits are fp32."""
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
        logits: Tensor = model(images)
    return logits.float()


if __name__ == "__main__":
    sys.exit(main())
