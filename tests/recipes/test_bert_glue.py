"""The recipe on a tiny BERT and rows in the official formats: every task and method, going on, and bad input."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

import qsam
from recipes import training
from recipes.bert_glue import TASKS, BertOnGlue, GlueOptions, load_rows, main, read_tsv
from recipes.compare import ONE_SEED
from recipes.training import Course, parse_options, steps_of
from tests.recipes.tiny_glue import METRICS, TRAIN_ROWS, comparable, results, weights, words

ROOT = Path(__file__).resolve().parents[2]
METHODS = ["lsq", "lsq1.5x", "sam", "joint", "saq:case=1", "squat", "squat:schedule=fused,direction=asam"]
Capture = pytest.CaptureFixture[str]


def options_of(arguments: list[str]) -> GlueOptions:
    found: GlueOptions = parse_options(GlueOptions, {}, arguments)
    return found


# --- rows -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", [task for task in TASKS if task != "movies"])
def test_every_task_is_read_trained_and_measured(task: str, glue: Path, tiny: Path, tmp_path: Path) -> None:
    assert main(words(glue, tiny, tmp_path, "--method", "lsq", task=task, steps=2)) == 0
    found = results(tmp_path, f"{task}-lsq-w2a8-seed0")
    names = METRICS.get(task, ["accuracy"])
    assert list(found["dev"]) == (["matched", "mismatched"] if task == "mnli" else ["dev"])
    assert all(set(values) == {"loss", *names} for values in found["dev"].values())
    assert found["metric_name"] == names[0]
    assert (tmp_path / f"{task}.png").is_file()


def test_rows_that_lack_columns_are_counted_for_qqp_and_a_line_feed_alone_ends_a_row(tmp_path: Path) -> None:
    text = "question1\tquestion2\tis_duplicate\na\tb\t1\nshort\na\u2028a\tb\t0\r\n\n"
    (tmp_path / "train.tsv").write_bytes(text.encode())
    assert read_tsv(TASKS["qqp"], tmp_path / "train.tsv") == ([["a", "b", 1], ["a\u2028a", "b", 0]], 1)


@pytest.mark.parametrize(
    ("task", "text", "message"),
    [
        ("sst2", "sentence\tlabel\na\tmaybe\n", r"line 2: the label must be one of 0, 1, got 'maybe'\."),
        ("sst2", "sentence\tlabel\nshort\n", r"line 2: 1 columns; the header has 2\."),
        ("sst2", "text\tlabel\na\t1\n", r"has no column 'sentence'; its header is text, label\."),
        ("sst2", "", r"has no column 'label'; its header is empty\."),
        *(("stsb", f"sentence1\tsentence2\tscore\na\tb\t{word}\n", rf"a number in \[0, 5\], got '{word}'\.")
          for word in ("five", "-0.1", "5.1", "nan")),
    ],
)  # fmt: skip
def test_a_file_of_another_format_is_refused(task: str, text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "train.tsv").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_tsv(TASKS[task], tmp_path / "train.tsv")


def test_a_holdout_is_cut_from_the_training_rows(glue: Path, tiny: Path, tmp_path: Path) -> None:
    arguments = words(glue, tiny, tmp_path, "--holdout", "0.25", "--method", "rtn", steps=2)
    experiment = BertOnGlue(options_of(arguments))
    held, every = experiment.dev["holdout"], load_rows(options_of(arguments))[0]["train"]
    assert len(held) == round(TRAIN_ROWS / 4)
    assert len(experiment.train) + len(held) == len(every)
    assert main(arguments) == 0
    assert list(results(tmp_path, "cola-rtn-w2a8-seed0")["dev"]) == ["holdout"]


def test_training_rows_are_a_part_of_every_larger_part() -> None:
    parts = [training.cut(range(22), count) for count in (7, 9)]
    assert [sorted(chosen + rest) for chosen, rest in parts] == [list(range(22))] * 2
    assert set(parts[0][0]) < set(parts[1][0])


@pytest.mark.parametrize("task", ["cola", "stsb", "mrpc"])
def test_a_metric_that_is_0_over_0_is_0(task: str, glue: Path, tiny: Path, tmp_path: Path) -> None:
    experiment = BertOnGlue(options_of(words(glue, tiny, tmp_path, task=task)))
    found = experiment.metrics(np.zeros((4, 2 if task != "stsb" else 1)), np.array([0, 1, 0, 1]))
    assert set(found) == set(METRICS[task])
    assert found.get("f1", found.get("matthews", found.get("pearson"))) == 0


# --- methods and results ----------------------------------------------------------------------------------------------


def test_every_method_trains_and_counts_its_passes(glue: Path, tiny: Path, tmp_path: Path) -> None:
    assert main(words(glue, tiny, tmp_path, "--method", "fp32", "rtn", *METHODS, steps=4)) == 0
    found = [json.loads(path.read_text()) for path in tmp_path.glob("*/results.json")]
    passes = {result["config"]["method"]: result["passes"] for result in found}
    assert passes == dict(zip(["fp32", "rtn", *METHODS], [4, 0, 4, 6, 8, 8, 8, 12, 8], strict=True))


@pytest.mark.parametrize(
    ("method", "folder", "passes", "quantizers"),
    [
        ("q8bert", "q8bert-w8a8", 2, ("minmax_ema", "minmax_ema")),
        ("qbert", "qbert-w2a8", 2, ("qbert", "qbert")),
        ("gobo", "gobo-w2a32", 0, ("gobo", None)),
    ],
)
def test_a_preset_trains_with_the_quantizers_of_its_paper(
    method: str, folder: str, passes: int, quantizers: tuple[str, str | None], glue: Path, tiny: Path, tmp_path: Path
) -> None:
    assert main(words(glue, tiny, tmp_path, "--method", method, steps=2)) == 0
    found = results(tmp_path, f"cola-{folder}-seed0")
    assert found["passes"] == passes
    spec = json.loads((tmp_path / f"cola-{folder}-seed0" / "model" / "qsam.json").read_text())
    kinds = [{row["quantizer"] for row in spec[part].values()} for part in ("weights", "inputs")]
    assert kinds == [{name} - {None} for name in quantizers]
    assert ("bert.embeddings.word_embeddings.weight" in spec["weights"]) is (method != "gobo")


def test_a_run_leaves_what_the_docs_say(glue: Path, tiny: Path, tmp_path: Path) -> None:
    more = ["--method", "lsq", "--scale-lr", "0.5", "0.25", "--sharpness", "0.01", "0.05"]
    assert main(words(glue, tiny, tmp_path, *more)) == 0
    folder = tmp_path / "cola-lsq-w2a8-seed0"
    assert sorted(path.name for path in folder.iterdir()) == ["model", "results.json", "run.json"]
    files = {path.name for path in (folder / "model").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "qsam.json", "qsam.safetensors"} <= files
    found = results(tmp_path, folder.name)
    assert found["config"] == json.loads((folder / "run.json").read_text())
    assert found["config"]["scale_lr"] == [0.5, 0.25]
    assert {"epoch", "step", "passes", "seconds", "mean_loss", "dev"} == set(found["epochs"][0])
    assert found["epochs"][-1]["dev"] == found["dev"]
    assert [entry["rho"] for entry in found["sharpness"]] == [0.01, 0.05]
    assert found["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]


@pytest.mark.parametrize("method", ["fp32", "lsq"])
def test_the_reloaded_model_has_the_runs_loss(method: str, glue: Path, tiny: Path, tmp_path: Path) -> None:
    arguments = words(glue, tiny, tmp_path, "--method", method, task="stsb")
    assert main(arguments) == 0
    name = "stsb-fp32-seed0" if method == "fp32" else "stsb-lsq-w2a8-seed0"
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / name / "model", dtype=torch.float32)
    if method == "lsq":
        qsam.quantize_(model, spec=tmp_path / name / "model")
        assert all(len(layer.attention.self.query.weight.unique()) <= 4 for layer in model.bert.encoder.layer)
    experiment = BertOnGlue(options_of(arguments))
    with torch.no_grad():  # one row at a time: no padding, another order of every sum
        batches = [experiment.collate([row]) for row in experiment.dev["dev"]]
        found = [experiment.loss(model.eval(), batch)[0].item() for batch in batches]
    # About a hundred sums over 64 products lie between a row and its loss. Each is within 64 roundings of its terms.
    bound = 100 * 64 * torch.finfo(torch.float32).eps
    assert np.mean(found) == pytest.approx(results(tmp_path, name)["dev_loss"], rel=bound)


def test_a_head_of_another_task_is_drawn_anew(glue: Path, tiny: Path, tmp_path: Path) -> None:
    start = tiny
    for task, labels in (("mnli", 3), ("stsb", 1), ("cola", 2)):
        assert main(words(glue, start, tmp_path, "--method", "fp32", task=task, steps=2)) == 0
        start = tmp_path / f"{task}-fp32-seed0" / "model"
        assert AutoModelForSequenceClassification.from_pretrained(start).num_labels == labels


def test_the_demonstration_fits_the_machine_and_goes_on(
    glue: Path, tiny: Path, tmp_path: Path, capsys: Capture
) -> None:
    arguments = f"--demo --model {tiny} --glue-dir {glue} --output-dir {tmp_path} --batch-size 2 --threads 1".split()
    assert main([*arguments, "--precision", "fp32"]) == 0
    printed = capsys.readouterr().out
    assert ONE_SEED in printed
    for method in ("fp32", "rtn W2A8", "lsq2x W2A8", "recommended2x W2A8", "squat W2A8"):
        assert re.search(rf"^{method} ", printed, re.MULTILINE)
    assert results(tmp_path, "stsb-lsq2x-w2a8-seed0")["passes"] == results(tmp_path, "stsb-squat-w2a8-seed0")["passes"]
    assert set(json.loads((tmp_path / "fit.json").read_text())["seconds_per_step"]) == {
        "fp32",
        "lsq2x",
        "recommended2x",
        "squat",
    }
    assert main([*arguments, "--precision", "fp32"]) == 0  # nothing is left but the table: the fit was kept
    assert capsys.readouterr().out.count("finished before") == 5


def test_a_slow_machine_runs_fewer_epochs(
    glue: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = options_of(words(glue, tiny, tmp_path, "--method", "lsq2x", "--fit-minutes", "1"))
    options.epochs, options.fp32_epochs, options.max_steps = 2.0, 4.0, None
    monkeypatch.setattr(training, "train", lambda *_: Course(times=[9.0, *[5.0] * 8]))
    training.fit_(options, BertOnGlue(options))
    steps = 4 * 6 + 2 * 2 * 6  # fp32, and lsq twice over; 22 rows are 6 batches
    fraction = pytest.approx(60 / (steps * 5.0 * training.FIT_MARGIN), rel=0.1)  # less the time that the timing took
    assert options.epochs / 2.0 == options.fp32_epochs / 4.0 == fraction
    assert steps_of({"method": "lsq", "epochs": options.epochs, "batch_size": 4, "max_steps": None}, 22) == 3  # of 12
    assert steps_of({"method": "lsq1.5x", "epochs": 2, "batch_size": 4, "max_steps": None}, rows=10) == 9


# --- going on ---------------------------------------------------------------------------------------------------------


def test_a_finished_run_is_skipped_and_other_settings_are_refused(
    glue: Path, tiny: Path, tmp_path: Path, capsys: Capture
) -> None:
    arguments = words(glue, tiny, tmp_path, "--method", "squat", steps=2)
    assert main(arguments) == 0
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/**/*")}
    capsys.readouterr()
    assert main(arguments) == 0
    assert capsys.readouterr().out.count("finished before") == 2
    for more, message in (
        (["--rho", "0.2"], "rho is 0.1 there and 0.2 here"),
        (["--fp32-epochs", "50"], "epochs is 100.0 there and 50.0 here"),
    ):
        assert main([*arguments, *more]) == 2
        assert message in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/**/*")} == before
    assert main([*arguments, "squat:rho=.2"]) == 0  # the cure that the message names
    assert {"squat W2A8", "squat:rho=.2 W2A8"} <= set(re.findall(r"^squat\S* W2A8", capsys.readouterr().out, re.M))


def test_a_checkpoint_that_was_torn_or_changed_is_never_used(
    glue: Path, tiny: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = words(glue, tiny, tmp_path, "--method", "fp32", "--save-every", 2, steps=5)

    def stop(*_: object) -> None:
        raise OSError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(BertOnGlue, "save", stop)
        assert main(arguments) == 2
    assert "bert_glue: the disk is full" in capsys.readouterr().err
    folder = tmp_path / "cola-fp32-seed0"
    (folder / "checkpoint-5").mkdir()  # without its mark
    weights_file = folder / "checkpoint-4" / "model.safetensors"
    changed = bytearray(weights_file.read_bytes())
    changed[-1] ^= 1
    weights_file.write_bytes(changed)
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert printed.count("is not complete, or was changed") == 2
    assert "going on from checkpoint-2" in printed
    apart = words(glue, tiny, tmp_path / "apart", "--method", "fp32", "--save-every", 2, steps=5)
    assert main(apart) == 0
    assert weights(tmp_path, folder.name) == weights(tmp_path / "apart", folder.name)
    assert comparable(results(tmp_path, folder.name)) == comparable(results(tmp_path / "apart", folder.name))


def test_a_training_that_diverges_says_so(glue: Path, tiny: Path, tmp_path: Path, capsys: Capture) -> None:
    assert main(words(glue, tiny, tmp_path, "--method", "fp32", "--fp32-lr", "1e30")) == 2
    assert re.search(r"the loss of step \d is (nan|inf): the training has diverged", capsys.readouterr().err)


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case",
    [
        (["--task", "stbs"], r"`--task` must be one of .*, got 'stbs'\. Did you mean stsb"),
        (["--bits", "1"], r"`--method lsq`: `bits` must be an integer in \[2, 8\], got 1\."),
        (["--epochs", "0"], r"`--epochs` must be finite and above 0, got 0\.0\."),
        (["--batch-size", "0"], r"`--batch-size` must be finite and above 0, got 0\."),
        (["--rho", "-1"], r"`--rho` must be finite and not negative, got -1\.0\."),
        (["--lr", "nan"], r"`--lr` must be finite and not negative, got nan\."),
        (["--scale-lr", "1", "2", "3"], r"`--method lsq`: `scale_lr` must be None, a number or a pair"),
        (["--sharpness", "0"], r"`--sharpness` must be finite and above 0, got \[0\.0\]\."),
        (["--holdout", "1.5"], r"`--holdout` 1\.5 of 22 training rows leaves nothing on one side\."),
        (["--seed", "-1"], r"`--seed` must be finite and not negative, got \[-1\]"),
        (["--hub"], r"`--hub` and `--glue-dir` are two sources"),
        (["--task", "movies"], r"movies is not in GLUE"),
        (["--glue-dir", "nowhere"], r"CoLA.train\.tsv does not exist\. --glue-dir must name the folder"),
        (["--model", "./nowhere"], r".*\./nowhere"),
        (["--method", "sqat"], r"`--method sqat`: the methods are fp32, rtn, lsq, "),
        (["--method", "saq@real"], r"`--method saq@real`: after the @ comes nothing in this recipe, got 'real'\."),
        (["--method", "saq:case=4"], r"`--method saq:case=4`: .*case"),
        (["--nonsense", "1"], r"Some specified arguments are not used"),
    ],
)
def test_bad_input_is_one_clear_line_and_changes_nothing(
    case: tuple[list[str], str], glue: Path, tiny: Path, tmp_path: Path, capsys: Capture
) -> None:
    more, message = case
    assert main(words(glue, tiny, tmp_path / "out", *more)) == 2
    assert re.fullmatch(rf"bert_glue: .*{message}.*\n", capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_a_hub_that_cannot_be_reached_is_one_line(tmp_path: Path, glue: Path) -> None:
    arguments = ["--task", "cola", "--glue-dir", str(glue), "--model", "bert-base-uncased", "--output-dir", "out"]
    path = os.pathsep.join([str(ROOT), *sys.path])
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": path}
    command = [sys.executable, "-m", "recipes.bert_glue", *arguments]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 2, result.stderr
    assert result.stdout.startswith("bert_glue: importing torch and transformers.\n")
    assert re.search("^bert_glue: .*huggingface", result.stderr, re.MULTILINE)
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.long
def test_a_full_disk_is_one_line_and_the_run_goes_on_later(glue: Path, tiny: Path, tmp_path: Path) -> None:
    arguments, apart = (
        words(glue, tiny, tmp_path / out, "--method", "fp32", "--save-every", 2) for out in ("full", "apart")
    )
    command = [sys.executable, "-c", "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000)); "
               "from recipes.bert_glue import main; sys.exit(main(sys.argv[1:]))", *arguments]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1].startswith("bert_glue: ")
    assert main(arguments) == main(apart) == 0
    name = "cola-fp32-seed0"
    assert comparable(results(tmp_path / "full", name)) == comparable(results(tmp_path / "apart", name))
