"""The sets that are downloaded, read from files in their official layouts; nothing is fetched here."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import Flowers102

from recipes.downloaded_pictures import CIFAR, read_cifar
from recipes.pictures import PictureSet, load_pictures

CHANCE = np.random.default_rng(0)


def record(labels: list[int]) -> tuple[bytes, np.ndarray]:
    """One image as CIFAR's binary version has it: labels, then all red bytes, all green, all blue, row by row."""
    image = CHANCE.integers(0, 256, (32, 32, 3), dtype=np.uint8)
    return bytes(labels) + image.transpose(2, 0, 1).tobytes(), image


@pytest.mark.parametrize("name", CIFAR)
def test_cifar_is_read_from_its_binary_version(name: str, tmp_path: Path) -> None:
    kind = CIFAR[name]
    folder = tmp_path / kind.folder
    folder.mkdir()
    expected = {}
    for number, file in enumerate([*kind.train, kind.test]):
        pairs = [record([7] * (kind.label_bytes - 1) + [(number + i) % 3]) for i in range(2)]
        (folder / file).write_bytes(b"".join(raw for raw, _ in pairs))
        expected[file] = [image for _, image in pairs]
    (folder / kind.names).write_text("ant\nbee\ncat\n\n")
    found = load_pictures(name, tmp_path)
    assert found.names == ["ant", "bee", "cat"]
    assert (len(found.train), len(found.dev["dev"])) == (2 * len(kind.train), 2)
    images = [image for file in kind.train for image in expected[file]]
    assert all((np.array(found.train.image(i)) == image).all() for i, image in enumerate(images))
    assert found.train.labels == [(number + i) % 3 for number in range(len(kind.train)) for i in range(2)]
    assert found.evaluated_on == "the full test set (2 images)"


def test_a_file_of_cifar_that_was_cut_is_refused(tmp_path: Path) -> None:
    (tmp_path / "test.bin").write_bytes(record([1])[0][:-1])
    with pytest.raises(ValueError, match=r"test\.bin has 3072 bytes, no multiple of 3073: delete it"):
        read_cifar(tmp_path / "test.bin", 1)


def colours(path: Path, count: int) -> None:
    path.mkdir(parents=True)
    for i in range(1, count + 1):
        Image.new("RGB", (10, 8), (20 * i, 0, 0)).save(path / f"image_{i:05d}.jpg")


def red(found: PictureSet, part: str) -> list[int]:
    pictures = found.train if part == "train" else found.dev["dev"]
    return [round(np.array(pictures.image(i))[..., 0].mean() / 20) for i in range(len(pictures))]


def test_flowers_trains_on_train_and_val_and_measures_on_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from scipy.io import savemat

    monkeypatch.setattr(Flowers102, "_check_integrity", lambda self: True)  # else it wants the official checksums
    folder = tmp_path / "flowers-102"
    colours(folder / "jpg", 7)
    savemat(folder / "imagelabels.mat", {"labels": np.array([[1, 2, 3, 101, 102, 2, 5]])})
    savemat(
        folder / "setid.mat",
        {"trnid": np.array([[1, 2]]), "valid": np.array([[4, 7]]), "tstid": np.array([[3, 5, 6]])},
    )
    found = load_pictures("flowers102", tmp_path)
    assert (red(found, "train"), found.train.labels) == ([1, 2, 4, 7], [0, 1, 100, 4])
    assert (red(found, "dev"), found.dev["dev"].labels) == ([3, 5, 6], [2, 101, 1])
    assert len(found.names) == 102


def test_pets_trains_on_trainval_and_measures_on_test(tmp_path: Path) -> None:
    folder = tmp_path / "oxford-iiit-pet"
    colours(folder / "images", 0)
    (folder / "annotations").mkdir()
    for split, rows in {"trainval": [("Abyssinian_1", 1), ("beagle_2", 2)], "test": [("beagle_3", 2)]}.items():
        lines = [f"{name} {label} 1 1" for name, label in rows]
        (folder / "annotations" / f"{split}.txt").write_text("\n".join(lines) + "\n")
        for name, _ in rows:
            number = int(re.sub(r"\D", "", name))
            Image.new("RGB", (10, 8), (20 * number, 0, 0)).save(folder / "images" / f"{name}.jpg")
    found = load_pictures("oxford_pets", tmp_path)
    assert (red(found, "train"), found.train.labels) == ([1, 2], [0, 1])
    assert (red(found, "dev"), found.dev["dev"].labels) == ([3], [1])
    assert found.names == ["Abyssinian", "Beagle"]


def test_a_set_that_cannot_be_downloaded_names_its_folder_and_no_other_takes_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.datasets.utils.download_and_extract_archive", unreachable)
    with pytest.raises(FileNotFoundError, match=r"cifar10 is not in .* and cannot be downloaded \(no route to host\)"):
        load_pictures("cifar10", tmp_path)
