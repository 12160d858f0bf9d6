"""CIFAR-10, CIFAR-100, Flowers-102 and Oxford-IIIT Pet: downloaded once, from where their authors keep them.

CIFAR is read from its binary version: the other one is made of pickles, which run code when they are opened. The two
others are read by torchvision (one MATLAB file, and text).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from recipes.pictures import Arrays, Files, Pictures, PictureSet, official

CIFAR_PIXELS = 3 * 32 * 32


@dataclass(frozen=True)
class Cifar:
    """One of the two.

    Attributes:
        url: of the archive, binary version.
        md5: as its page prints it.
        folder: that it unpacks into.
        train: names of the training files.
        test: name of the test file.
        names: name of the file with the names of the classes.
        label_bytes: before each image; the last of them is the class.
    """

    url: str
    md5: str
    folder: str
    train: tuple[str, ...]
    test: str
    names: str
    label_bytes: int


CIFAR: Mapping[str, Cifar] = {
    "cifar10": Cifar(
        "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
        "c32a1d4ab5d03f1284b67883e8d87530",
        "cifar-10-batches-bin",
        tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
        "test_batch.bin",
        "batches.meta.txt",
        1,
    ),
    "cifar100": Cifar(
        "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
        "03b5dce01913d631647c71ecec9e9cb8",
        "cifar-100-binary",
        ("train.bin",),
        "test.bin",
        "fine_label_names.txt",
        2,
    ),
}


def cifar(name: str, root: Path) -> PictureSet:
    """Load CIFAR-10 or CIFAR-100.

    Raises:
        FileNotFoundError: if it is not there and cannot be downloaded.
        ValueError: if a file is cut short.
    """
    kind = CIFAR[name]
    folder = root / kind.folder
    if not (folder / kind.test).is_file():
        _fetch(name, kind, root)
    names = (folder / kind.names).read_text(encoding="utf-8").split()
    train = _join([read_cifar(folder / file, kind.label_bytes) for file in kind.train])
    test = _join([read_cifar(folder / kind.test, kind.label_bytes)])
    where = f"{name} (A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009), binary version"
    return official(name, names, train, test, where=where, part="test")


def read_cifar(path: Path, label_bytes: int) -> tuple[np.ndarray, list[int]]:
    """Read records of labels and 3 x 32 x 32 bytes.

    Returns:
        Images of shape `(N, 32, 32, 3)`, and their labels.

    Raises:
        ValueError: if the file does not hold whole records.
    """
    raw = np.fromfile(path, dtype=np.uint8)
    record = label_bytes + CIFAR_PIXELS
    if not raw.size or raw.size % record:
        raise ValueError(f"{path} has {raw.size} bytes, no multiple of {record}: delete it to download it again.")
    rows = raw.reshape(-1, record)
    images = rows[:, label_bytes:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images), rows[:, label_bytes - 1].tolist()


def flowers102(root: Path) -> PictureSet:
    """Load Flowers-102: its training and validation images to train on, its test images to measure on."""
    from torchvision.datasets import Flowers102

    parts = {split: _torchvision(lambda split=split: Flowers102(root, split, download=True), "flowers102", root)
             for split in ("train", "val", "test")}  # fmt: skip
    train = [(path, label) for part in ("train", "val") for path, label in _pairs(parts[part])]
    names, where = [str(label) for label in range(102)], "Flowers-102 (Nilsback and Zisserman, 2008)"
    return official("flowers102", names, _files(train), _files(_pairs(parts["test"])), where=where, part="test")


def oxford_pets(root: Path) -> PictureSet:
    """Load Oxford-IIIT Pet: its trainval images to train on, its test images to measure on."""
    from torchvision.datasets import OxfordIIITPet

    parts = {split: _torchvision(lambda split=split: OxfordIIITPet(root, split, download=True), "oxford_pets", root)
             for split in ("trainval", "test")}  # fmt: skip
    train, test = (_files(_pairs(parts[split])) for split in ("trainval", "test"))
    where = "Oxford-IIIT Pet (Parkhi 2012, CC BY-SA 4.0)"
    return official("oxford_pets", list(parts["trainval"].classes), train, test, where=where, part="test")


def _torchvision(load: Callable, name: str, root: Path):
    try:
        return load()
    except (OSError, RuntimeError) as error:
        raise _not_fetched(name, root, error) from error


def _pairs(dataset) -> list[tuple[Path, int]]:
    files = dataset._image_files if hasattr(dataset, "_image_files") else dataset._images
    return list(zip(map(Path, files), map(int, dataset._labels), strict=True))


def _files(pairs: list[tuple[Path, int]]) -> Pictures:
    return Pictures(Files([path for path, _ in pairs]), list(range(len(pairs))), [label for _, label in pairs])


def _join(parts: list[tuple[np.ndarray, list[int]]]) -> Pictures:
    labels = [label for _, some in parts for label in some]
    return Pictures(Arrays(np.concatenate([images for images, _ in parts])), list(range(len(labels))), labels)


def _fetch(name: str, kind: Cifar, root: Path) -> None:
    from torchvision.datasets.utils import download_and_extract_archive

    try:
        download_and_extract_archive(kind.url, str(root), md5=kind.md5)
    except (OSError, RuntimeError) as error:
        raise _not_fetched(name, root, error) from error


def _not_fetched(name: str, root: Path, error: Exception) -> FileNotFoundError:
    return FileNotFoundError(
        f"{name} is not in {root} and cannot be downloaded ({error}). Needed once: the network, or "
        "its unpacked archive put there by hand."
    )


LOADERS: Mapping[str, Callable[[Path], PictureSet]] = {
    "cifar10": lambda root: cifar("cifar10", root),
    "cifar100": lambda root: cifar("cifar100", root),
    "flowers102": flowers102,
    "oxford_pets": oxford_pets,
}
"""By name; each is given the folder for downloads."""
