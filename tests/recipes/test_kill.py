"""A run that is killed at any moment goes on to the same bits; several processes train one model."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.recipes.tiny_glue import comparable, results, weights, words

ROOT = Path(__file__).resolve().parents[2]
PYTHONPATH = os.pathsep.join([str(ROOT), *sys.path])
ENVIRONMENT = {**os.environ, "PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1", "QSAM_TIMEOUT": "60"}
MORE = ["--method", "squat", "--schedule", "next_batch", "--rho", "0.05", "--save-every", 3]
NAMES = ("cola-fp32-seed0", "cola-squat-w2a8-seed0")


def start(arguments: list[str], *launcher: str) -> subprocess.Popen[str]:
    command = [sys.executable, *launcher, "-m", "recipes.bert_glue", *arguments]
    return subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def finish(process: subprocess.Popen[str]) -> str:
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0, printed
    return printed


def files(folder: Path) -> set[tuple[str, int]]:
    found = set()
    for path in folder.glob("*/**/*"):
        with contextlib.suppress(FileNotFoundError):  # it was there a moment ago
            found.add((str(path), path.stat().st_mtime_ns))
    return found


def assert_same(one: Path, other: Path) -> None:
    for name in NAMES:
        assert comparable(results(one, name)) == comparable(results(other, name))
        assert weights(one, name) == weights(other, name)
        scales = [out / name / "model" / "qsam.safetensors" for out in (one, other)]
        assert [path.is_file() for path in scales] == [name != NAMES[0]] * 2
        assert name == NAMES[0] or scales[0].read_bytes() == scales[1].read_bytes()


def kill_after_some_writing(process: subprocess.Popen[str], out: Path, chance: random.Random) -> None:
    """Kill a run just after its n-th change on the disk: within a checkpoint, between two, or while it finishes."""
    seen, writes = files(out), chance.randint(1, 25)
    while process.poll() is None and writes:
        now = files(out)
        writes -= now != seen
        seen = now
        time.sleep(0.0005)
    time.sleep(chance.uniform(0, 0.02))
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    printed, _ = process.communicate()
    assert process.returncode == -signal.SIGKILL, printed  # else it ended before it was killed: draw smaller numbers


@pytest.mark.long
@pytest.mark.parametrize("seed", range(2))
def test_a_run_that_was_killed_three_times_ends_with_the_same_bits(
    seed: int, glue: Path, tiny: Path, tmp_path: Path
) -> None:
    chance = random.Random(seed)
    arguments, apart = (words(glue, tiny, tmp_path / out, *MORE, steps=14) for out in ("killed", "apart"))
    finish(start(apart))
    for _ in range(3):
        kill_after_some_writing(start(arguments), tmp_path / "killed", chance)
    finish(start(arguments))
    assert_same(tmp_path / "killed", tmp_path / "apart")


@pytest.mark.long
def test_two_processes_train_one_model_and_go_on_to_the_same_bits(glue: Path, tiny: Path, tmp_path: Path) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    arguments, apart = (words(glue, tiny, tmp_path / out, *MORE, steps=8) for out in ("killed", "apart"))
    printed = finish(start(apart, *launcher))
    assert printed.count("cola-squat-w2a8-seed0: finished") == 1  # one process speaks
    process = start(arguments, *launcher)
    whole = tmp_path / "killed" / NAMES[1] / "checkpoint-3" / "whole.json"
    while process.poll() is None and not whole.is_file():
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    finish(start(arguments, *launcher))
    assert_same(tmp_path / "killed", tmp_path / "apart")
    assert results(tmp_path / "apart", NAMES[1])["config"]["processes"] == 2
    alone = start(arguments)
    assert "processes is 2 there and 1 here" in alone.communicate(timeout=300)[0]
    assert alone.returncode == 2
