"""A tiny BERT through the whole recipe, on rows in the format of each task's official files."""

import contextlib
import dataclasses
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import AutoModelForSequenceClassification
from transformers.utils import logging as transformers_logging

import qsam
from recipes.archives import default_cache_dir
from recipes.bert_glue import main
from recipes.bert_glue_model import evaluate, load_data
from recipes.bert_glue_options import DEMO, parse_options
from recipes.bert_glue_rows import load_rows
from recipes.embedded import VADER
from tests.optim.methods import long_but
from tests.recipes.tiny_glue import FORMATS, METRICS, TRAIN_ROWS, comparable, results, weights, words
from tests.reliability import fault

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _settings_of_transformers() -> Iterator[None]:
    """The recipe silences transformers for its own process; here others share it."""
    verbosity = transformers_logging.get_verbosity()
    yield
    transformers_logging.set_verbosity(verbosity)
    transformers_logging.enable_progress_bar()


# --- every task and every method ----------------------------------------------------------------------------------


@pytest.mark.parametrize("task", long_but(["cola", "stsb", "mnli"], FORMATS))
def test_every_task_runs_and_writes_what_it_found(task: str, glue: Path, tiny: Path, tmp_path: Path) -> None:
    assert main(words(glue, tiny, tmp_path, "--method", "squat", "--rho", "0.05", task=task)) == 0
    names = ["matched", "mismatched"] if task == "mnli" else ["dev"]
    for name, passes in ((f"{task}-fp32-seed0", 5), (f"{task}-squat-w2a8-seed0", 15)):
        found = results(tmp_path, name)
        assert list(found["dev"]) == names
        for values in found["dev"].values():
            assert list(values) == ["loss", *METRICS.get(task, ["accuracy"])]
        main_metric = METRICS.get(task, ["accuracy"])[0]
        assert (found["metric_name"], found["metric"]) == (main_metric, found["dev"][names[0]][main_metric])
        assert found["dev_loss"] == found["dev"][names[0]]["loss"]
        assert found["train_loss_rows"] == TRAIN_ROWS
        assert (found["steps"], found["passes"]) == (5, passes)
        assert found["config"]["evaluated_on"].startswith("the full dev set (10 ")
    assert (tmp_path / f"{task}.png").is_file()


def test_movies_runs_on_its_embedded_rows(tiny: Path, tmp_path: Path) -> None:
    if not (default_cache_dir() / VADER.file_name).is_file():
        pytest.skip(f"{VADER.file_name} is not in the cache")
    arguments = ["--task", "movies", "--model", str(tiny), "--output-dir", str(tmp_path), "--max-steps", "2"]
    arguments += ["--train-rows", "100", "--holdout", "0.1", "--threads", "1", "--precision", "fp32"]
    assert main([*arguments, "--method", "rtn"]) == 0
    assert results(tmp_path, "movies-rtn-w2a8-seed0")["metric_name"] == "accuracy"


COSTS = {
    "fp32": (6, 6),
    "rtn": (0, 0),
    "lsq": (6, 6),
    "lsq1.5x": (9, 9),
    "lsq2x": (12, 12),
    "sam": (6, 12),
    "joint": (6, 12),
    "saq": (6, 12),
    "saq:case=1,rho=.02": (6, 12),
    "saq:case=2,normalize_weights=true": (6, 12),
    "squat": (6, 18),
    "squat:schedule=fused,direction=asam,every=2": (6, 9),
    "saq:direction=momentum": (6, 6),
    "qat:weights=diffq,granularity=per_channel": (6, 6),
    "qat:weights=fixed_step,activations=null,bits=4": (6, 6),
}
"""Steps and passes of each method when 6 steps are asked for."""
METHODS = list(COSTS)
PERTURBING = {method for method, (steps, passes) in COSTS.items() if passes > steps} | {"saq:direction=momentum"}


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One command with every method, on STS-B with activations of 3 bits."""

    arguments: list[str]
    out: Path
    printed: str

    def name(self, method: str) -> str:
        bits = "" if method in {"fp32", "sam"} else f"-w{4 if 'bits=4' in method else 2}a3"
        return f"stsb-{re.sub('[:,]', '-', method)}{bits}-seed0"


@pytest.fixture(scope="module")
def comparison(glue: Path, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    out = tmp_path_factory.mktemp("comparison")
    more = ["--method", *METHODS, "--activation-bits", "3", "--rho", "0.01"]
    arguments = words(glue, tiny, out, *more, task="stsb", steps=6)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main(arguments) == 0
    return Comparison(arguments, out, printed.getvalue())


@pytest.mark.parametrize(("method", "steps", "passes"), [(m, *cost) for m, cost in COSTS.items()])
def test_every_method_counts_its_passes_and_has_a_row(
    method: str, steps: int, passes: int, comparison: Comparison
) -> None:
    found = results(comparison.out, comparison.name(method))
    assert (found["steps"], found["passes"]) == (steps, passes)
    label = method if method in {"fp32", "sam"} else f"{method} W{4 if 'bits=4' in method else 2}A3"
    row = re.search(rf"^{re.escape(label)} .*$", comparison.printed, re.MULTILINE)
    assert row is not None
    assert row.group().split()[-5:-2] == [str(len(found["epochs"])), str(steps), str(passes)]
    assert f"{100 * found['metric']:.2f}" in row.group()


def test_one_seed_is_not_called_evidence(comparison: Comparison) -> None:
    assert "one seed: a demonstration, not evidence" in comparison.printed


def test_the_perturbation_of_the_methods_that_perturb_is_logged(comparison: Comparison) -> None:
    rises = {
        method: "mean_rise" in str(results(comparison.out, comparison.name(method))["epochs"]) for method in METHODS
    }
    assert {method for method, logged in rises.items() if logged} == PERTURBING - {"saq:direction=momentum"}


@pytest.mark.parametrize("method", ["lsq", "joint", "saq", "squat"])
@pytest.mark.long
def test_a_training_at_rate_zero_is_rounding(method: str, glue: Path, tiny: Path, tmp_path: Path) -> None:
    assert main(words(glue, tiny, tmp_path, "--method", "rtn", method, "--lr", 0, "--scale-lr", 0, task="stsb")) == 0
    rounded, trained = (results(tmp_path, f"stsb-{name}-w2a8-seed0") for name in ("rtn", method))
    assert trained["dev"] == rounded["dev"]


@pytest.mark.parametrize(("schedule", "passes"), [("next_batch", 9), ("fused", 12)])
def test_squats_schedules_cost_what_lsqs_variants_are_named_after(
    schedule: str, passes: int, glue: Path, tiny: Path, tmp_path: Path
) -> None:
    assert main(words(glue, tiny, tmp_path, "--method", "squat", "--schedule", schedule, steps=6)) == 0
    found = results(tmp_path, "cola-squat-w2a8-seed0")
    assert found["passes"] == passes
    assert all("mean_rise" in entry for entry in found["epochs"][:1])


def test_several_seeds_are_one_row_with_a_standard_error(
    glue: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(glue, tiny, tmp_path, "--method", "lsq", "--seed", 0, 1, task="stsb")) == 0
    first, second = (results(tmp_path, f"stsb-lsq-w2a8-seed{seed}") for seed in (0, 1))
    assert first["metric"] != second["metric"]
    printed = capsys.readouterr().out
    assert re.search(r"lsq W2A8 +-?\d+\.\d\d ± \d+\.\d\d", printed)
    assert "mean ± standard error over the seeds" in printed


def test_a_run_is_a_function_of_its_seed(glue: Path, tiny: Path, tmp_path: Path) -> None:
    for out in ("a", "b"):
        assert main(words(glue, tiny, tmp_path / out, "--method", "squat")) == 0
    for name in ("cola-fp32-seed0", "cola-squat-w2a8-seed0"):
        assert comparable(results(tmp_path / "a", name)) == comparable(results(tmp_path / "b", name))
        assert weights(tmp_path / "a", name) == weights(tmp_path / "b", name)


def test_bf16_is_a_setting_of_the_training_and_not_of_the_measurement(glue: Path, tiny: Path, tmp_path: Path) -> None:
    arguments = words(glue, tiny, tmp_path, "--method", "lsq")
    arguments[arguments.index("--precision") + 1] = "bf16"
    assert main(arguments) == 0
    found = results(tmp_path, "cola-lsq-w2a8-seed0")
    assert found["config"]["precision"] == "bf16"
    assert evaluated_again(arguments, tmp_path / "cola-lsq-w2a8-seed0") == found["dev"]["dev"]


# --- what a run leaves ----------------------------------------------------------------------------------------------


def evaluated_again(arguments: list[str], folder: Path) -> dict[str, float]:
    """Load a run's model as its user would, and measure it."""
    rows = load_rows(parse_options(arguments))
    data = load_data(rows, str(folder / "model"), 128)
    model = AutoModelForSequenceClassification.from_pretrained(folder / "model")
    if (folder / "model" / "qsam.json").is_file():
        qsam.quantize_(model, spec=folder / "model" / "qsam.json")
    return evaluate(model, rows.task, next(iter(data.dev.values())), "fp32")


@pytest.mark.parametrize("method", METHODS)
def test_the_reloaded_model_has_the_runs_metric(method: str, comparison: Comparison) -> None:
    name = comparison.name(method)
    found = results(comparison.out, name)
    assert evaluated_again(comparison.arguments, comparison.out / name) == found["dev"]["dev"]


def test_plain_from_pretrained_gives_quantized_weights_with_float_activations(
    comparison: Comparison, tmp_path: Path
) -> None:
    name = comparison.name("squat")
    shutil.copytree(comparison.out / name, tmp_path / name)
    (tmp_path / name / "model" / "qsam.json").unlink()
    model, info = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / name / "model", output_loading_info=True
    )
    assert not any(info.values())  # nothing missing, nothing left over
    matrices = [
        p for key, p in model.named_parameters() if re.search(r"layer\.\d+\..*(query|key|value|dense)\.weight", key)
    ]
    assert len(matrices) == 2 * 6
    assert all(p.unique().numel() <= 4 for p in matrices)
    assert model.bert.embeddings.word_embeddings.weight.unique().numel() > 100
    assert evaluated_again(comparison.arguments, tmp_path / name) != results(comparison.out, name)["dev"]["dev"]


def test_a_run_leaves_these_files_and_these_entries(glue: Path, tiny: Path, tmp_path: Path) -> None:
    assert main(words(glue, tiny, tmp_path, "--method", "lsq", "--scale-lr", "0.5", "0.25")) == 0
    folder = tmp_path / "cola-lsq-w2a8-seed0"
    assert sorted(path.name for path in folder.iterdir()) == ["model", "results.json", "run.json"]
    assert {"config.json", "model.safetensors", "tokenizer.json", "qsam.json", "qsam.safetensors"} <= {
        path.name for path in (folder / "model").iterdir()
    }
    found = results(tmp_path, folder.name)
    assert found["config"] == json.loads((folder / "run.json").read_text())
    assert found["config"]["scale_lr"] == [0.5, 0.25]
    assert found["config"]["fp32"] == {"epochs": 100, "lr": 1e-3, "max_steps": 5}
    assert {"epoch", "step", "passes", "seconds", "mean_loss", "dev"} <= set(found["epochs"][0])
    assert found["versions"]["torch"]
    assert "commit" in found


def test_a_holdout_is_cut_from_the_training_rows_and_the_dev_set_is_not_read(
    glue: Path, tiny: Path, tmp_path: Path
) -> None:
    everything = load_rows(parse_options(words(glue, tiny, tmp_path)))
    held = load_rows(parse_options(words(glue, tiny, tmp_path, "--holdout", "0.25", "--seed", 3)))
    assert len(held.splits.dev["holdout"]) == round(TRAIN_ROWS / 4)
    parts = [*held.splits.train, *held.splits.dev["holdout"]]
    assert sorted(map(str, parts)) == sorted(map(str, everything.splits.train))
    assert main(words(glue, tiny, tmp_path, "--holdout", "0.25", "--method", "rtn")) == 0
    found = results(tmp_path, "cola-rtn-w2a8-seed0")
    assert list(found["dev"]) == ["holdout"]
    assert "held out of training" in found["config"]["evaluated_on"]
    assert (tmp_path / "cola-holdout.png").is_file()


def test_a_head_of_another_task_is_drawn_anew(glue: Path, tiny: Path, tmp_path: Path) -> None:
    assert main(words(glue, tiny, tmp_path, "--method", "fp32", task="mnli")) == 0
    tuned = tmp_path / "mnli-fp32-seed0" / "model"
    assert main(words(glue, tuned, tmp_path, "--method", "fp32", task="stsb")) == 0
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "stsb-fp32-seed0" / "model").num_labels == 1


def test_training_rows_are_a_fixed_subset(glue: Path, tiny: Path, tmp_path: Path) -> None:
    rows = load_rows(parse_options(words(glue, tiny, tmp_path, "--train-rows", 7)))
    assert len(rows.splits.train) == 7
    assert "fixed random subset of 7 of the 22" in rows.splits.source


def test_the_demonstration(glue: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "--demo",
        "--task",
        "stsb",
        "--model",
        str(tiny),
        "--glue-dir",
        str(glue),
        "--output-dir",
        str(tmp_path),
    ]
    arguments += ["--max-steps", "2", "--threads", "1", "--precision", "fp32"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "one seed: a demonstration, not evidence" in printed
    for method in ("fp32", "rtn W2A8", "lsq W2A8", "squat W2A8"):
        assert re.search(rf"^{method} ", printed, re.MULTILINE)
    matched = next(path for path in tmp_path.iterdir() if re.match(r"stsb-lsq[\d.]+x-", path.name))
    squat = next(path for path in tmp_path.iterdir() if path.name.startswith("stsb-squat-"))
    assert results(tmp_path, matched.name)["passes"] == results(tmp_path, squat.name)["passes"]
    assert results(tmp_path, squat.name)["config"]["rho"] == DEMO["stsb"]["rho"]
    assert main(arguments) == 0  # a second time: nothing to do but the table
    assert capsys.readouterr().out.count("finished before") == 5


# --- going on -------------------------------------------------------------------------------------------------------


def test_a_finished_run_is_refused_and_with_resume_skipped(
    glue: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = words(glue, tiny, tmp_path, "--method", "fp32")
    assert main(arguments) == 0
    before = (tmp_path / "cola-fp32-seed0" / "results.json").stat().st_mtime_ns
    assert main(arguments) == 2
    assert "holds a finished run of this configuration: --resume skips it" in capsys.readouterr().err
    assert main([*arguments, "--resume"]) == 0
    assert (tmp_path / "cola-fp32-seed0" / "results.json").stat().st_mtime_ns == before
    assert main(words(glue, tiny, tmp_path, "--method", "rtn")) == 0  # the full-precision run is there to be used
    assert (tmp_path / "cola-fp32-seed0" / "results.json").stat().st_mtime_ns == before


def test_another_full_precision_start_is_refused(
    glue: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(glue, tiny, tmp_path, "--method", "fp32")) == 0
    assert main(words(glue, tiny, tmp_path, "--method", "rtn", "--fp32-epochs", 50)) == 2
    assert "epochs is 100 there and 50 here" in capsys.readouterr().err


def test_a_tag_keeps_settings_apart(glue: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words(glue, tiny, tmp_path, "--method", "squat", "--rho", "0.1")) == 0
    assert main(words(glue, tiny, tmp_path, "--method", "squat", "--rho", "0.2")) == 2
    assert "rho is 0.1 there and 0.2 here" in capsys.readouterr().err
    assert main(words(glue, tiny, tmp_path, "--method", "squat", "--rho", "0.2", "--tag", "wide")) == 0
    printed = capsys.readouterr().out
    assert "squat W2A8 rho=0.1 " in printed
    assert "squat W2A8 rho=0.2 " in printed


def killed(arguments: list[str], checkpoint: Path) -> None:
    """Run the recipe in a process of its own, and kill it without warning once it has written a checkpoint."""
    path = os.pathsep.join([str(ROOT), *sys.path])
    command = [sys.executable, "-m", "recipes.bert_glue", *arguments, "--resume"]
    before = checkpoint.stat().st_mtime_ns if checkpoint.is_file() else 0
    with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None and not (checkpoint.is_file() and checkpoint.stat().st_mtime_ns > before):
            time.sleep(0.002)
        process.kill()
    assert checkpoint.is_file(), "it ended before it was killed"


def check_that_both_found_the_same(one: Path, other: Path, names: list[str]) -> None:
    for name in names:
        assert comparable(results(one, name)) == comparable(results(other, name))
        assert weights(one, name) == weights(other, name)


@pytest.mark.long  # test_kill.py stops runs at worse moments
def test_a_run_interrupted_twice_goes_on_to_the_same_bits(glue: Path, tiny: Path, tmp_path: Path) -> None:
    # 6 steps an epoch: checkpoints within epochs and between them, in both phases of the alternation
    more = ["--method", "squat", "--schedule", "next_batch", "--rho", "0.05", "--save-every", 5]
    arguments, apart = (words(glue, tiny, tmp_path / out, *more, steps=36) for out in ("twice", "apart"))
    fp32, name = "cola-fp32-seed0", "cola-squat-w2a8-seed0"
    assert main(apart) == 0
    shutil.copytree(tmp_path / "apart" / fp32, tmp_path / "twice" / fp32)
    checkpoint = tmp_path / "twice" / name / "checkpoint.pt"
    killed(arguments, checkpoint)
    if Path("/dev/full").exists():  # the second time, the disk is full when the next checkpoint is due
        checkpoint.with_name("checkpoint.pt.partial").unlink(missing_ok=True)
        checkpoint.with_name("checkpoint.pt.partial").symlink_to("/dev/full")
        assert main([*arguments, "--resume"]) == 2
    assert not (tmp_path / "twice" / name / "results.json").is_file()
    assert main([*arguments, "--resume"]) == 0
    check_that_both_found_the_same(tmp_path / "twice", tmp_path / "apart", [name])


@pytest.mark.long
@pytest.mark.parametrize("method", ["lsq", "lsq1.5x", "joint", "saq", "squat"])
def test_a_killed_run_of_any_method_goes_on_to_the_same_bits(
    method: str, glue: Path, tiny: Path, tmp_path: Path
) -> None:
    more = ["--method", method, "--rho", "0.05", "--save-every", 7, "--precision", "bf16"]
    arguments, apart = (words(glue, tiny, tmp_path / out, *more, task="stsb", steps=60) for out in ("killed", "apart"))
    names = ["stsb-fp32-seed0", f"stsb-{method}-w2a8-seed0"]
    assert main(apart) == 0
    for name in names:
        killed(arguments, tmp_path / "killed" / name / "checkpoint.pt")
    assert not (tmp_path / "killed" / names[1] / "results.json").is_file()
    assert main([*arguments, "--resume"]) == 0
    check_that_both_found_the_same(tmp_path / "killed", tmp_path / "apart", names)


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case",
    [
        (["--task", "stbs"], r"`task` must be one of .*, got 'stbs'\. Did you mean stsb"),
        (["--bits", "1"], r"`--bits` must be an integer in \[2, 8\], got 1\."),
        (["--activation-bits", "9"], r"`--activation-bits` must be an integer in \[2, 8\], got 9\."),
        (["--epochs", "0"], r"`--epochs` must be at least 1, got 0\."),
        (["--rho", "-1"], r"`--rho` must be finite and not negative, got -1\.0\."),
        (["--lr", "nan"], r"`--lr` must be finite and not negative, got nan\."),
        (["--scale-lr", "1", "2", "3"], r"`--scale-lr` is one rate, or two \(weights, activations\)"),
        (["--holdout", "1.5"], r"`--holdout` must be a fraction between 0 and 1, got 1\.5\."),
        (["--holdout", "0.001"], r"`--holdout` 0\.001 of 22 training rows leaves nothing on one side\."),
        (["--tag", "../x"], r"`--tag` must be letters, digits and \. _ = - only, got '\.\./x'\."),
        (["--seed", "-1"], r"`--seed` must not be negative"),
        (["--demo"], r"`--demo` has settings for stsb and movies, not for cola"),
        (["--hub"], r"`hub` and `glue_dir` are two sources"),
        (["--glue-dir", "nowhere"], r"CoLA.train\.tsv does not exist\. --glue-dir must name the folder"),
        (["--model", "./nowhere"], r"the model '\./nowhere' is not a folder, and no name on the hub either\."),
        (["--task", "qqp", "--glue-dir", "broken"], r"train\.tsv, line 3: the label must be one of 0, 1, got 'maybe'"),
    ],
)
def test_bad_input_is_one_clear_line(
    case: tuple[list[str], str], glue: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more, message = [word.replace("broken", str(tmp_path / "broken")) for word in case[0]], case[1]
    (tmp_path / "broken" / "QQP").mkdir(parents=True)
    (tmp_path / "broken" / "QQP" / "train.tsv").write_text("question1\tquestion2\tis_duplicate\na\tb\t1\na\tb\tmaybe\n")
    assert main(words(glue, tiny, tmp_path / "out", *more)) == 2
    printed = capsys.readouterr().err
    assert re.fullmatch(rf"bert_glue: .*{message}.*\n", printed)
    assert not (tmp_path / "out").exists()


def test_an_unknown_method_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--method", "sqat"]) == 2
    assert capsys.readouterr().err.startswith("bert_glue: `--method sqat`: the methods are fp32, rtn, lsq, ")


def test_a_hub_that_cannot_be_reached_is_an_error_and_a_script_may_be_run_by_its_path(
    tmp_path: Path, glue: Path
) -> None:
    arguments = ["--task", "cola", "--glue-dir", str(glue), "--model", "bert-base-uncased", "--output-dir", "out"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": ""}
    result = subprocess.run(
        [sys.executable, str(ROOT / "recipes" / "bert_glue.py"), *arguments],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 2, result.stderr
    assert "the model 'bert-base-uncased' cannot be loaded; no other takes its place" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


@fault(
    "a full disk at any file of a run",
    happens="one line, exit code 2",
    kept="the run: `--resume` ends with the same bits",
)
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize("file", ["run.json", "checkpoint.pt", "results.json"])
def test_a_full_disk_is_a_clear_error_and_the_run_goes_on_later(
    file: str, glue: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = words(glue, tiny, tmp_path / "full", "--method", "fp32")
    folder = tmp_path / "full" / "cola-fp32-seed0"
    folder.mkdir(parents=True)
    (folder / f"{file}.partial").symlink_to("/dev/full")
    assert main(arguments) == 2
    assert re.search(rf"{re.escape(file)} cannot be written: No space left on device", capsys.readouterr().err)
    assert main([*arguments, "--resume"]) == 0
    assert main(words(glue, tiny, tmp_path / "apart", "--method", "fp32")) == 0
    assert comparable(results(tmp_path / "full", folder.name)) == comparable(results(tmp_path / "apart", folder.name))


def test_a_torn_checkpoint_is_a_clear_error(
    glue: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = words(glue, tiny, tmp_path, "--method", "fp32")
    assert main(arguments) == 0
    (tmp_path / "cola-fp32-seed0" / "results.json").unlink()
    (tmp_path / "cola-fp32-seed0" / "checkpoint.pt").write_bytes(b"PK torn")
    assert main([*arguments, "--resume"]) == 2
    assert "checkpoint.pt cannot be read" in capsys.readouterr().err


@fault(
    "a training that diverges",
    happens="one line with the step and what to lower, exit code 2",
    kept="the last checkpoint, which is finite",
)
def test_a_training_that_diverges_says_so_and_keeps_its_checkpoint(
    glue: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = words(glue, tiny, tmp_path, "--method", "fp32", "--fp32-lr", "1e30", "--save-every", 1)
    assert main(arguments) == 2
    assert re.search(r"the loss of step \d is (nan|inf): the training has diverged", capsys.readouterr().err)
    assert (tmp_path / "cola-fp32-seed0" / "checkpoint.pt").is_file()
