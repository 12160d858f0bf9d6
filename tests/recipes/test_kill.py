"""The recipe is killed, again and again, at moments that nobody chose: what it ends with has the bits of a calm run."""

import dataclasses
import os
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


@pytest.fixture
def victims(tmp_path: Path) -> Iterator[Victims]:
    found = Victims(tmp_path)
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
    victims.start([*arguments, "--output-dir", str(out)])
    assert victims.wait() == 2
    begin = time.monotonic()
    last, size = last_checkpoint(out), (out / SQUAT / "checkpoint.pt").stat().st_size
    obstacle.unlink()
    victims.start([*arguments, "--output-dir", str(out)])
    assert victims.wait() == 0
    return Calm(out, time.monotonic() - begin, last, size)


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
    child = victims.start(arguments)
    time.sleep(chance.uniform(0, calm.seconds))
    os.kill(child, signal.SIGKILL)  # it is the server's child: until the server has answered, the number is its own
    return victims.wait()


def while_it_writes(victims: Victims, arguments: list[str], out: Path, calm: Calm, chance: random.Random) -> int:
    """Kill it when a file that is not complete is there; of such moments, let some pass."""
    child = victims.start(arguments)
    moments, limit = chance.randrange(6), time.monotonic() + 3 * calm.seconds
    while time.monotonic() < limit:
        torn = [path for name in NAMES for path in (out / name).glob("*.partial") if path.stat_exists()]
        if torn and not (moments := moments - 1) > 0:
            break
        time.sleep(0.0005)
    os.kill(child, signal.SIGKILL)
    return victims.wait()


def at_a_byte(victims: Victims, arguments: list[str], out: Path, calm: Calm, chance: random.Random) -> int:
    """Let the kernel end it in the middle of the write that takes a file beyond some length, of any order of magnitude."""
    victims.start(arguments, last_byte=int(calm.size ** chance.uniform(0.3, 1)))
    return victims.wait()


WAYS = (after_a_while, while_it_writes, at_a_byte)


def kill_until_it_ends(
    kills: int, victims: Victims, arguments: list[str], out: Path, calm: Calm, chance: random.Random
) -> list[str]:
    """Kill the recipe up to ``kills`` times, each time in another way, then let it end; return how it was killed."""
    done: list[str] = []
    obstacle = hold_back_the_end(out)
    arguments = [*arguments, "--output-dir", str(out)]
    while len(done) < kills:
        way = WAYS[(len(done) + chance.randrange(2)) % len(WAYS)]
        ended = way(victims, arguments, out, calm, chance)
        if ended not in KILLED:
            assert ended == 2, way  # all steps are done
            break
        done.append(way.__name__)
    victims.start(arguments)
    assert victims.wait() == 2
    assert_same_bits(last_checkpoint(out), calm.last)
    obstacle.unlink()
    return done
