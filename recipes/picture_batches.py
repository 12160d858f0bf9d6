"""Images as batches of tensors: shuffled, augmented, normalized; each the same however often a run was resumed."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from recipes.pictures import Pictures

Transform = Callable[[Image.Image], Tensor]


@dataclass(frozen=True)
class Look:
    """What a model wants to see.

    Attributes:
        size: side of the square image, in pixels.
        mean: subtracted from each channel, in units of 1 = white.
        std: by which the rest is divided.
        interpolation: how images are resized.
        crop: share of the resized image that the evaluation's centre crop keeps.
    """

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    crop: float = 1.0


def evaluation_transform(look: Look) -> Transform:
    """Resize, crop at the centre, normalize: timm's evaluation."""
    from timm.data.transforms_factory import create_transform

    transform: Transform = create_transform(look.size, crop_pct=look.crop, **_common(look))
    return transform


def training_transform(look: Look, augment: str, auto_augment: str | None = None) -> Transform:
    """Return the augmentation of that name.

    Args:
        look: what the model wants to see.
        augment: ``"none"``, ``"shift"`` (random crop of the image padded by an eighth), ``"crop"`` (the same, and a
            horizontal flip) or ``"timm"`` (its random resized crop, flip and jitter).
        auto_augment: one of timm's policies.
    """
    from timm.data.transforms_factory import create_transform

    if augment == "none":
        return evaluation_transform(look)
    if augment == "timm":
        transform: Transform = create_transform(look.size, is_training=True, auto_augment=auto_augment, **_common(look))
        return transform
    return _shift(look, flip=augment == "crop")


def _shift(look: Look, flip: bool) -> Transform:
    from torchvision import transforms

    return transforms.Compose(
        [
            transforms.Resize((look.size, look.size), transforms.InterpolationMode(look.interpolation)),
            transforms.RandomCrop(look.size, padding=look.size // 8),
            *([transforms.RandomHorizontalFlip()] if flip else []),
            transforms.ToTensor(),
            transforms.Normalize(look.mean, look.std),
        ]
    )


def _common(look: Look) -> dict[str, Any]:
    return {"mean": look.mean, "std": look.std, "interpolation": look.interpolation}


@dataclass(frozen=True)
class Augmented(Dataset):
    """Transformed images; what is random in one of them is a function of seed, epoch and its number.

    Attributes:
        pictures: the images.
        transform: what is done to each.
        seed: of the run.
        epoch: of the run.
    """

    pictures: Pictures
    transform: Transform
    seed: int = 0
    epoch: int = 0

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Tensor, int]]:
        """Return several at once: what DataLoader asks for, if it is there."""
        with random_numbers_kept():
            return [self._drawn(index) for index in indices]

    def _drawn(self, index: int) -> tuple[Tensor, int]:
        draw = int(np.random.SeedSequence((self.seed, self.epoch, index)).generate_state(1)[0])
        random.seed(draw)
        np.random.seed(draw)
        torch.default_generator.manual_seed(draw)
        return self.transform(self.pictures.image(index)), self.pictures.labels[index]


@contextlib.contextmanager
def random_numbers_kept() -> Iterator[None]:
    """Put the generators of Python, numpy and torch's CPU back at the end: transforms draw from all three."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


def batches_of(
    dataset: Augmented, batches: Iterable[Sequence[int]], device: torch.device, workers: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield these batches of images, `(rows, 3, size, size)`, and labels, loaded by so many processes.

    The images are laid out channels last, and so is what convolutions make of them: on a CPU that is faster.
    """
    # A generator of its own: the loader draws a number when it starts, and a resumed run starts it once more.
    loader = DataLoader(
        dataset, batch_sampler=[list(b) for b in batches], num_workers=workers, generator=torch.Generator()
    )
    for images, labels in loader:
        yield images.to(device, memory_format=torch.channels_last), labels.to(device)


def shuffled(rows: int, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Return the batches of an epoch; the last one may be smaller."""
    order = np.random.default_rng((seed, epoch)).permutation(rows).tolist()
    return [order[i : i + batch_size] for i in range(0, rows, batch_size)]


def in_order(rows: int, batch_size: int) -> list[range]:
    """Return all rows in batches, in order."""
    return [range(i, min(i + batch_size, rows)) for i in range(0, rows, batch_size)]
