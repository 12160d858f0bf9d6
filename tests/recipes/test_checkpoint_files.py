"""Checkpoint files that are torn, flipped, foreign or evil, and disks that are full: told by name, nothing lost."""

import contextlib
import os
import pickle
import random
import resource
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from recipes.progress import Progress, restore_, save_checkpoint
from recipes.runs import CHECKPOINT, Run
from tests.models import MLP
from tests.optim.methods import METHODS, assert_same, everything, train
from tests.reliability import fault

(QAT,) = (method for method in METHODS if method.name == "qat")


@contextlib.contextmanager
def disk_with_room_for(count: int) -> Iterator[None]:
    """Let the kernel refuse to make any file longer than this, for this process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (count, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class Training:
    """A model, its optimizer and a scheduler, with their checkpoint in a folder."""

    def __init__(self, folder: Path, steps: int, bits: int = 4) -> None:
        self.run = Run(folder, {"lr": 1e-3})
        self.run.start()
        self.model = MLP.quantized(bits=bits)
        self.optimizer = QAT(self.model)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1.0)
        train(self.optimizer, self.model, MLP, steps)

    def save(self) -> None:
        parts = {"model": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler}
        save_checkpoint(self.run, Progress(step=2), parts)

    def restore(self) -> Progress:
        return restore_(self.run, self.model, self.optimizer, self.scheduler)

    def tensors(self) -> dict[str, torch.Tensor]:
        return everything(self.optimizer, self.model)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    training = Training(tmp_path_factory.mktemp("saved"), steps=2)
    training.save()
    return (training.run.folder / CHECKPOINT).read_bytes()


def refused(tmp_path: Path, content: bytes, message: str) -> None:
    """Assert that a training refuses this file, and goes on as if it had not been there."""
    calm, disturbed = Training(tmp_path / "calm", steps=1), Training(tmp_path / "disturbed", steps=1)
    (disturbed.run.folder / CHECKPOINT).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        disturbed.restore()
    for training in (calm, disturbed):
        train(training.optimizer, training.model, MLP, 1, start=1)
    assert_same(disturbed.tensors(), calm.tensors())


def test_the_file_itself_is_good(tmp_path: Path, saved: bytes) -> None:
    training = Training(tmp_path, steps=0)
    (tmp_path / CHECKPOINT).write_bytes(saved)
    assert training.restore().step == 2
    assert_same(training.tensors(), Training(tmp_path, steps=2).tensors())


TORN = r"checkpoint\.pt cannot be read \(.*\): delete .* to start that run again\."


@fault(
    "a checkpoint that ends too early",
    happens="one line with the file and the reason",
    kept="the run as it is in memory; the file, for whoever wants to look at it",
)
@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_checkpoint_is_refused(share: float, tmp_path: Path, saved: bytes) -> None:
    refused(tmp_path, saved[: int(len(saved) * share)], TORN)


def flipped(content: bytes, chance: random.Random) -> bytes:
    spoiled = bytearray(content)
    spoiled[chance.randrange(len(spoiled))] ^= 1 << chance.randrange(8)
    return bytes(spoiled)


@fault(
    "a bit that flips anywhere in a checkpoint",
    happens="one line with the file; or nothing, where the bit lies in the padding and no value differs",
    kept="no wrong value is ever loaded",
)
def test_a_flipped_bit_is_refused_or_harmless(tmp_path: Path, saved: bytes) -> None:
    chance, training = random.Random(0), Training(tmp_path, steps=0)
    (tmp_path / CHECKPOINT).write_bytes(saved)
    good, loud = training.run.load_checkpoint(), 0
    for _ in range(300):
        (tmp_path / CHECKPOINT).write_bytes(flipped(saved, chance))
        try:
            found = training.run.load_checkpoint()
        except ValueError as error:
            loud += "cannot be read" in str(error)
        else:
            assert same(found, good)
    assert loud > 100


def same(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def test_torch_itself_reads_a_flipped_bit_in_a_tensor(tmp_path: Path) -> None:
    """Why the recipe compares the checksums: if this fails, torch does it by now, and the sentence in the docs goes."""
    torch.save({"w": torch.zeros(1000)}, tmp_path / "x.pt")
    content = (tmp_path / "x.pt").read_bytes()
    place = content.index(b"\0" * 4000) + 2000
    (tmp_path / "x.pt").write_bytes(content[:place] + b"\1" + content[place + 1 :])
    assert int(torch.load(tmp_path / "x.pt", weights_only=True)["w"].count_nonzero()) == 1
    with zipfile.ZipFile(tmp_path / "x.pt") as archive:
        assert archive.testzip() is not None


class Evil:
    """What unpickles to a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.path),)


@fault(
    "a checkpoint that holds code",
    happens="one line with the file: it is read as data (`weights_only=True`)",
    kept="everything: the code is not run",
)
@pytest.mark.parametrize("form", ["torch.save", "pickle"])
def test_code_in_a_checkpoint_is_not_run(form: str, tmp_path: Path) -> None:
    folder = tmp_path / "made by the checkpoint"
    path = tmp_path / "evil.pt"
    if form == "torch.save":
        torch.save({"model": Evil(folder)}, path)
    else:
        path.write_bytes(pickle.dumps(Evil(folder)))
    refused(tmp_path, path.read_bytes(), TORN)
    assert not folder.exists()
    if form == "torch.save":  # and it is evil indeed
        torch.load(path, weights_only=False)
        assert folder.is_dir()


FOREIGN: list[tuple[object, str]] = [
    ([1, 2], r"cannot be read \(it holds a list, not a dict\)"),
    ({"weight": torch.zeros(2)}, r"is of another training \(it has no 'model'\): delete the folder to start that run"),
]


@fault(
    "a file of something else in the checkpoint's place, or the checkpoint of another model or other bits",
    happens="one line with the folder and the first difference",
    kept="the optimizer and its latents",
)
@pytest.mark.parametrize(("content", "message"), FOREIGN)
def test_a_checkpoint_of_something_else_is_refused(content: object, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "x.pt")
    refused(tmp_path, (tmp_path / "x.pt").read_bytes(), message)


def test_a_checkpoint_of_other_bits_is_refused(tmp_path: Path, saved: bytes) -> None:
    training = Training(tmp_path, steps=1, bits=2)
    (tmp_path / CHECKPOINT).write_bytes(saved)
    state = training.optimizer.state_dict()
    with pytest.raises(ValueError, match=r"of another training \('0\.weight' is LSQ\(bits=2.*\) here and LSQ\(bits=4"):
        training.restore()
    assert same(training.optimizer.state_dict(), state)


@fault(
    "a disk that has room for the first half of a checkpoint",
    happens="OSError with the file's name: no success is claimed",
    kept="the last checkpoint, bit for bit; no half file stays; the training in memory goes on and saves later",
)
@pytest.mark.parametrize("share", [0.1, 0.5, 0.95])
def test_half_a_checkpoint_never_replaces_a_whole_one(share: float, tmp_path: Path) -> None:
    training = Training(tmp_path, steps=1)
    training.save()
    path = tmp_path / CHECKPOINT
    before = path.read_bytes()
    train(training.optimizer, training.model, MLP, 1, start=1)
    with (
        disk_with_room_for(int(share * len(before))),
        pytest.raises(OSError, match=r"checkpoint\.pt cannot be written: .*What was there is kept"),
    ):
        training.save()
    assert path.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == [CHECKPOINT, "run.json"]
    training.save()
    after = training.tensors()
    training.restore()
    assert_same(training.tensors(), after)
