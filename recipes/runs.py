"""A run is a folder: its configuration, a checkpoint while it trains, and its results once it is finished.

    run.json        the configuration, written first; another configuration in the same folder is refused
    checkpoint.pt   everything that the next step needs; replaced as a whole, removed when the run is finished
    results.json    written last: a folder that has it is finished, and is never written again

Every file is written under another name, flushed to the disk and then renamed: whatever interrupts a run, a full disk
included, the last good file stays.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import subprocess
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

import torch

import qsam

Json = dict[str, Any]

CONFIG = "run.json"
CHECKPOINT = "checkpoint.pt"
RESULTS = "results.json"
MODEL = "model"


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        folder: where its files are.
        config: everything that decides its result, as JSON.
    """

    folder: Path
    config: Json

    @property
    def model_folder(self) -> Path:
        """Where the trained model is, for `from_pretrained`."""
        return self.folder / MODEL

    @property
    def is_finished(self) -> bool:
        """Whether its results are there."""
        return (self.folder / RESULTS).is_file()

    def check(self, resume: bool) -> None:
        """Refuse whatever would lose or mix results. Writes nothing.

        Args:
            resume: whether to go on with an unfinished run, and to skip a finished one.

        Raises:
            ValueError: if the folder holds a run of another configuration or, without `resume`, of this one.
        """
        if not (self.folder / CONFIG).is_file():
            if self.folder.is_dir() and any(path.suffix != ".partial" for path in self.folder.iterdir()):
                raise ValueError(f"{self.folder} holds files but no {CONFIG}: it is not a run. Choose another folder.")
            return
        changes = differences(read_json(self.folder / CONFIG), self.config)
        if changes:
            raise ValueError(
                f"{self.folder} holds a run of another configuration: {'; '.join(changes)}. "
                "Give the same settings, or another --output-dir or --tag."
            )
        if not resume:
            state = "a finished run" if self.is_finished else "an unfinished run"
            cure = "--resume skips it" if self.is_finished else "--resume continues it"
            raise ValueError(f"{self.folder} holds {state} of this configuration: {cure}; or delete the folder.")

    def start(self) -> None:
        """Make the folder and write the configuration, if they are not there."""
        if not (self.folder / CONFIG).is_file():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / CONFIG, self.config)

    def results(self) -> Json:
        """Return what `finish` has written."""
        return read_json(self.folder / RESULTS)

    def save_checkpoint(self, state: Mapping[str, Any]) -> None:
        """Replace the checkpoint.

        Args:
            state: tensors and plain Python values only, so that it can be read with `weights_only=True`.
        """
        with replacing(self.folder / CHECKPOINT) as handle:
            torch.save(state, handle)

    def load_checkpoint(self) -> Json | None:
        """Return the last checkpoint, or None if there is none.

        Raises:
            ValueError: if the file cannot be read, was changed since it was written, or is something else.
        """
        path = self.folder / CHECKPOINT
        if not path.is_file():
            return None
        try:
            _check_sums(path)
            state = torch.load(path, map_location="cpu", weights_only=True)
            if not isinstance(state, dict):
                raise ValueError(f"it holds a {type(state).__name__}, not a dict")
        except Exception as error:  # a torn file makes the unpickler raise whatever comes
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(
                f"{path} cannot be read ({reason}): delete {self.folder} to start that run again."
            ) from error
        return state

    def finish(self, results: Json, save_model: Callable[[Path], None]) -> Json:
        """Save the model, then write the results, then remove the checkpoint.

        Args:
            results: what the run found; the configuration, versions and commit are added.
            save_model: writes the model into the folder that it is given.

        Returns:
            All that was written to `results.json`.
        """
        partial = self.folder / f"{MODEL}.partial"
        for leftover in (partial, self.model_folder):
            shutil.rmtree(leftover, ignore_errors=True)
        partial.mkdir()
        save_model(partial)
        for path in partial.iterdir():
            _sync(path)
        os.replace(partial, self.model_folder)
        _sync(self.folder)
        everything = {**results, "config": self.config, "versions": versions(), "commit": git_commit()}
        write_json(self.folder / RESULTS, everything)
        self.tidy()
        return everything

    def tidy(self) -> None:
        """Remove the checkpoint of a finished run; it may have been stopped between its results and this."""
        (self.folder / CHECKPOINT).unlink(missing_ok=True)


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Say where two configurations differ.

    Args:
        old: the one that is there.
        new: the one that is wanted.
        prefix: the name of the section they are in.

    Returns:
        One sentence a differing entry, empty if they are equal.

    Example:
        >>> differences({"lr": 1e-5, "fp32": {"epochs": 5}}, {"lr": 1e-5, "fp32": {"epochs": 3}})
        ['fp32.epochs is 5 there and 3 here']
    """
    found = []
    for key in dict.fromkeys([*old, *new]):
        there, here = old.get(key), new.get(key)
        if isinstance(there, Mapping) and isinstance(here, Mapping):
            found += differences(there, here, f"{prefix}{key}.")
        elif there != here:
            found.append(f"{prefix}{key} is {there!r} there and {here!r} here")
    return found


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Open a file that takes the place of `path` once it is complete and on the disk; on an error nothing changes.

    Raises:
        OSError: if it cannot be written: a full disk, say.
    """
    partial = path.with_name(f"{path.name}.partial")
    try:
        with partial.open("wb") as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(partial, path)
        _sync(path.parent)  # else the new name may be lost with the power
    except BaseException as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        if isinstance(error, OSError):
            raise OSError(error.errno, f"{path} cannot be written: {error.strerror}. What was there is kept") from error
        raise


def _sync(path: Path) -> None:
    """Have a file, or the names in a folder, on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _check_sums(path: Path) -> None:
    """Compare every part of a zip file with its checksum: `torch.load` does not, and would read flipped bits."""
    with zipfile.ZipFile(path) as archive:
        torn = archive.testzip()
    if torn is not None:
        raise ValueError(f"its part {torn} differs from its checksum")


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file as a whole; NaN and infinity are refused, as JSON has none."""
    with replacing(path) as handle:
        handle.write((json.dumps(content, indent=1, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> Json:
    """Read a JSON file.

    Raises:
        ValueError: if it is not JSON.
    """
    try:
        content: Json = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): something else wrote it. Delete its folder.") from error
    return content


def rng_state() -> Json:
    """Return the state of torch's random generators, for a checkpoint."""
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), "cuda": devices}


def restore_rng_(state: Mapping[str, Any]) -> None:
    """Put the random generators back where `rng_state` found them."""
    torch.set_rng_state(state["cpu"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])


def versions() -> dict[str, str]:
    """Return the versions of Python, the machine's kind, and every package that a recipe's numbers depend on."""
    found = {
        "qsam": qsam.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
    }
    for name in ("torch", "torchvision", "timm", "transformers", "datasets", "scikit-learn", "scipy", "numpy"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def git_commit() -> str | None:
    """Return the commit of this source tree, with "-dirty" if files of it changed since; None outside of git."""
    command = ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        result = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return result.stdout.strip() or None if result.returncode == 0 else None
