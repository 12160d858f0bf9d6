"""The recipe is killed, again and again, at moments that nobody chose: what it ends with has the bits of a calm run."""

import dataclasses
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.recipes.tiny_glue import comparable, results, weights, words
from tests.recipes.victim import Victims
from tests.reliability import fault

FP32, SQUAT = NAMES = "cola-fp32-seed0", "cola-squat-w2a8-seed0"
KILLED = -signal.SIGKILL, -signal.SIGXFSZ
MORE = ["--method", "squat", "--schedule", "next_batch", "--rho", "0.05", "--save-every", 2, "--resume"]
"""Checkpoints within epochs and between them, in both phases of the alternation, with dropout."""


@pytest.fixture(scope="module")
def victims(glue: Path, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Victims]:
    folder = tmp_path_factory.mktemp("victims")
    found = Victims(folder, words(glue, tiny, folder / "warm", "--method", "lsq", steps=1))
    yield found
    found.close()


@dataclasses.dataclass
class Calm:
    """A run that was never stopped.

    Attributes:
        out: Its folder.
        seconds: How long it took.
        last: The checkpoint after its last step.
        size: The bytes of that file.
    """

    out: Path
    seconds: float
    last: dict[str, Any]
    size: int


def hold_back_the_end(out: Path) -> Path:
    """Let the quantized run fail when all steps are done, so that its last checkpoint stays; return what is in the way."""
    obstacle = out / SQUAT / "model.partial"
    obstacle.parent.mkdir(parents=True)
    obstacle.touch()  # a file, where the recipe wants a folder
    return obstacle


def last_checkpoint(out: Path) -> dict[str, Any]:
    """Return what the checkpoint holds, without the time that it took."""
    state: dict[str, Any] = torch.load(out / SQUAT / "checkpoint.pt", weights_only=True)
    state["progress"].pop("seconds")
    for entry in state["progress"]["history"]:
        entry.pop("seconds")
    return state


def calm_run(victims: Victims, arguments: list[str], out: Path) -> Calm:
    obstacle = hold_back_the_end(out)
    begin = time.monotonic()
    victims.start([*arguments, "--output-dir", str(out)])
    assert victims.wait() == 2
    seconds = time.monotonic() - begin
    last, size = last_checkpoint(out), (out / SQUAT / "checkpoint.pt").stat().st_size
    obstacle.unlink()
    victims.start([*arguments, "--output-dir", str(out)])
    assert victims.wait() == 0
    return Calm(out, seconds, last, size)


def assert_same_bits(ours: Any, theirs: Any, where: str = "checkpoint") -> None:
    """Assert that two checkpoints hold the same keys, types, numbers and tensors."""
    assert type(ours) is type(theirs), where
    if isinstance(ours, torch.Tensor):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), where
    elif isinstance(ours, dict):
        assert list(ours) == list(theirs), where
        for key in ours:
            assert_same_bits(ours[key], theirs[key], f"{where}[{key!r}]")
    elif isinstance(ours, list | tuple):
        assert len(ours) == len(theirs), where
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            assert_same_bits(a, b, f"{where}[{i}]")
    else:
        assert ours == theirs, where


# --- ways to kill -------------------------------------------------------------------------------------------------


def after_a_while(victims: Victims, arguments: list[str], out: Path, calm: Calm, chance: random.Random) -> int:
    victims.start(arguments)
    time.sleep(chance.uniform(0, calm.seconds))
    return victims.kill()


def while_it_writes(victims: Victims, arguments: list[str], out: Path, calm: Calm, chance: random.Random) -> int:
    """Kill it when a file that is not complete is there; of such moments, let some pass."""
    victims.start(arguments)
    moments, seen, limit = chance.randrange(8), False, time.monotonic() + calm.seconds
    while time.monotonic() < limit:
        before, seen = seen, any(is_torn(path) for name in NAMES for path in (out / name).glob("*.partial"))
        if seen and not before:
            moments -= 1
            if moments < 0:
                break
        time.sleep(0.0002)
    return victims.kill()


def is_torn(path: Path) -> bool:
    return path.name != "model.partial" or path.is_dir()  # the file of that name is our obstacle


def at_a_byte(victims: Victims, arguments: list[str], out: Path, calm: Calm, chance: random.Random) -> int:
    """Let the kernel end it in the middle of the write that takes a file beyond some length, of any order of magnitude."""
    victims.start(arguments, last_byte=int(calm.size ** chance.uniform(0.3, 1)))
    return victims.wait()


WAYS = (after_a_while, while_it_writes, at_a_byte)


def kill_often(
    kills: int, victims: Victims, arguments: list[str], out: Path, calm: Calm, chance: random.Random, ended: int
) -> list[str]:
    """Start the recipe until it has been killed ``kills`` times, or has ended by itself; return how it was killed."""
    done: list[str] = []
    while len(done) < kills:
        way = WAYS[len(done) % len(WAYS)]
        code = way(victims, arguments, out, calm, chance)
        if code == ended:
            break
        assert code in KILLED, (way.__name__, code)
        done.append(way.__name__)
    return done


def killed_run(kills: int, victims: Victims, arguments: list[str], out: Path, calm: Calm, seed: int) -> list[str]:
    """Kill a run up to ``kills`` times while it trains, and up to twice while it finishes; compare it with the calm one."""
    chance = random.Random(seed)
    obstacle = hold_back_the_end(out)
    arguments = [*arguments, "--output-dir", str(out)]
    done = kill_often(kills, victims, arguments, out, calm, chance, ended=2)
    victims.start(arguments)
    assert victims.wait() == 2
    assert_same_bits(last_checkpoint(out), calm.last)
    obstacle.unlink()
    done += kill_often(2, victims, arguments, out, calm, chance, ended=0)
    victims.start(arguments)
    assert victims.wait() == 0
    for name in NAMES:
        assert comparable(results(out, name)) == comparable(results(calm.out, name))
        assert weights(out, name) == weights(calm.out, name)
        assert files(out / name) == files(calm.out / name)
    return done


def killed_runs(kills: int, victims: Victims, arguments: list[str], folder: Path) -> list[str]:
    """Kill as many runs as it takes: one may end by itself before its moment comes."""
    calm = calm_run(victims, arguments, folder / "calm")
    done: list[str] = []
    for seed in range(100):
        done += killed_run(kills - len(done), victims, arguments, folder / f"killed{seed}", calm, seed)
        if len(done) >= kills:
            break
    return done


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@fault(
    "`SIGKILL` at a random moment of training, of evaluating and of writing (the start of a file, its middle, its end, "
    "between two files)",
    happens="the same command with `--resume` goes on from the last complete checkpoint",
    kept="every bit: the last checkpoint (weights, latents, scales, moments, random numbers, data order, means) and the "
    "results are those of a run that was never stopped, and no other file is left",
)
@pytest.mark.long
def test_a_run_that_was_killed_three_times_ends_with_the_same_bits(
    victims: Victims, glue: Path, tiny: Path, tmp_path: Path
) -> None:
    arguments = words(glue, tiny, tmp_path, *MORE, steps=7)
    assert len(killed_runs(3, victims, arguments, tmp_path)) >= 3


@pytest.mark.long
def test_runs_that_were_killed_fifty_times_end_with_the_same_bits(
    victims: Victims, glue: Path, tiny: Path, tmp_path: Path
) -> None:
    arguments = words(glue, tiny, tmp_path, *MORE, steps=14)
    done = killed_runs(50, victims, arguments, tmp_path)
    assert len(done) >= 50
    assert min(done.count(way.__name__) for way in WAYS) >= 5
