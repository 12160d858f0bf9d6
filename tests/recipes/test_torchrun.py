"""The recipes under torchrun: real processes train one model, the first one writes, and a death stops all."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from recipes.bert_glue import main
from recipes.ranks import own_rows, weight_of
from tests.recipes.tiny_glue import comparable, results, weights, words
from tests.recipes.tiny_vision import words as vision_words

ROOT = Path(__file__).resolve().parents[2]


def torchrun(arguments: list[str], recipe: str = "bert_glue") -> subprocess.Popen[str]:
    path = os.pathsep.join([str(ROOT), *sys.path])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    return subprocess.Popen(
        [*command, "-m", f"recipes.{recipe}", *arguments],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "QSAM_TIMEOUT": "20"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(arguments: list[str], recipe: str = "bert_glue") -> str:
    with torchrun(arguments, recipe) as process:
        printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0, printed
    return printed


@pytest.mark.long
def test_two_processes_train_one_model_and_the_first_one_writes(glue: Path, tiny: Path, tmp_path: Path) -> None:
    printed = run(words(glue, tiny, tmp_path, "--method", "squat", "--rho", 0.05, task="stsb", steps=6))
    assert printed.count("Metrics are measured on") == 1
    assert printed.count("stsb-squat-w2a8-seed0: epoch 1,") == 1
    found = results(tmp_path, "stsb-squat-w2a8-seed0")
    assert (found["steps"], found["passes"], found["config"]["processes"]) == (6, 18, 2)
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.long
def test_two_processes_train_one_vision_model(tmp_path: Path) -> None:
    printed = run(vision_words(tmp_path, "--method", "squat", "--rho", 0.05, "--augment", "timm"), "vision")
    assert printed.count("Metrics are measured on") == 1
    found = results(tmp_path, "digits-resnet20-squat-w4a4-seed0")
    assert (found["steps"], found["passes"], found["config"]["processes"]) == (4, 8, 2)
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.long
def test_a_resumed_run_of_two_processes_goes_on_to_the_same_bits(glue: Path, tiny: Path, tmp_path: Path) -> None:
    more = ["--method", "squat", "--rho", 0.05, "--save-every", 4, "--resume"]
    apart, killed = (words(glue, tiny, tmp_path / out, *more, steps=40) for out in ("apart", "killed"))
    run(apart)
    for name in ("cola-fp32-seed0", "cola-squat-w2a8-seed0"):
        checkpoint = tmp_path / "killed" / name / "checkpoint.pt"
        with torchrun(killed) as process:
            while process.poll() is None and not checkpoint.is_file():
                time.sleep(0.01)
            end(process)
        assert checkpoint.is_file(), "it ended before it was killed"
    run(killed)
    for name in ("cola-fp32-seed0", "cola-squat-w2a8-seed0"):
        ours, theirs = (comparable(results(tmp_path / out, name)) for out in ("killed", "apart"))
        assert {**ours, "commit": None} == {**theirs, "commit": None}  # somebody may commit in the meantime
        assert weights(tmp_path / "killed", name) == weights(tmp_path / "apart", name)
    assert main(words(glue, tiny, tmp_path / "apart", *more, steps=40)) == 2, "one process is another run"


def end(process: subprocess.Popen[str]) -> None:
    for child in children(process):
        os.kill(child, signal.SIGKILL)
    process.kill()


def children(process: subprocess.Popen[str]) -> list[int]:
    text = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    return [int(word) for word in text.split()]


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="children are found in /proc")
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_dies_stops_the_others_and_tears_nothing(
    victim: int, glue: Path, tiny: Path, tmp_path: Path
) -> None:
    arguments = words(glue, tiny, tmp_path, "--method", "fp32", "--save-every", 2, "--resume", steps=2000)
    checkpoint = tmp_path / "cola-fp32-seed0" / "checkpoint.pt"
    with torchrun(arguments) as process:
        while process.poll() is None and not checkpoint.is_file():
            time.sleep(0.01)
        os.kill(sorted(children(process))[victim], signal.SIGKILL)
        printed, _ = process.communicate(timeout=90)
    assert process.returncode != 0, printed
    assert torch.load(checkpoint, weights_only=True)["progress"]["step"] >= 2
    assert not (tmp_path / "cola-fp32-seed0" / "results.json").is_file()


def test_one_process_has_all_rows_with_their_own_weight() -> None:
    assert own_rows([3, 1, 2]) == [3, 1, 2]
    assert weight_of([3, 1, 2]) == 1.0
