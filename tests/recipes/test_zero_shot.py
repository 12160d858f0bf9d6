"""The zero-shot recipe on a tiny BERT: every source of inputs, no look at training rows, going on, and failed games."""

import collections
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

import qsam
from recipes import training
from recipes.zero_shot import Ascent, RandomTokens, ZeroShot, ZeroShotOptions, main, read_options
from tests.recipes.tiny_glue import TRAIN_ROWS, comparable, results, weights, words

METHODS = ["rtn", "rtn:activations=per_token", "lsq@random", "lsq", "saq@frozen", "saq", "lsq@real"]
PASSES = [0, 0, 3, 6, 6, 9, 3]
Capture = pytest.CaptureFixture[str]


def arguments_of(glue: Path, tiny: Path, out: Path, *more: object, task: str = "cola", steps: int = 3) -> list[str]:
    own = ["--generator", tiny, "--length", 4, "--generator-lr", 1e-3]
    return words(glue, tiny, out, *own, *more, task=task, steps=steps)


def test_every_row_of_the_table_trains_and_counts_its_passes(
    glue: Path, tiny: Path, tmp_path: Path, capsys: Capture
) -> None:
    assert main(arguments_of(glue, tiny, tmp_path)) == 0
    found = [json.loads(path.read_text()) for path in tmp_path.glob("*/results.json")]
    assert {result["config"]["method"]: result["passes"] for result in found} == {
        "fp32": 3, **dict(zip(METHODS, PASSES, strict=True))
    }  # fmt: skip
    assert {result["steps"] for result in found} == {0, 3}
    printed = capsys.readouterr().out
    assert all(re.search(rf"^{re.escape(method)} W2A8 ", printed, re.MULTILINE) for method in METHODS)
    entry = results(tmp_path, "cola-saq-w2a8-seed0")["epochs"][-1]["generator"]
    assert entry["steps"] == 3
    assert {"divergence", "generator_divergence", "spread", "outside"} < set(entry)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "cola-saq-w2a8-seed0" / "model")
    qsam.quantize_(model, spec=tmp_path / "cola-saq-w2a8-seed0" / "model")
    assert all(len(layer.attention.self.query.weight.unique()) <= 4 for layer in model.bert.encoder.layer)


@pytest.mark.parametrize(
    "more", [["--tokens", "hard", "--hidden", "0.5"], ["--tokens", "soft", "--trained", "adapter"]]
)
def test_a_pair_of_texts_and_the_options_of_the_generator_work(
    more: list[str], glue: Path, tiny: Path, tmp_path: Path
) -> None:
    arguments = arguments_of(glue, tiny, tmp_path, "--method", "saq", *more, "--generator-sees", "theta+e", task="stsb")
    assert main(arguments) == 0
    assert results(tmp_path, "stsb-saq-w2a8-seed0")["passes"] == 3 * (2 + 2)


def test_inputs_have_the_shape_of_the_tokenizer(glue: Path, tiny: Path, tmp_path: Path) -> None:
    experiment = ZeroShot(read_options(arguments_of(glue, tiny, tmp_path, task="stsb")))
    x = RandomTokens(experiment.template, experiment.inputs)(experiment.batch([7, 8])["z"])
    encoded = experiment.tokenizer("w1 w2 w3 w4", "w5 w6 w7 w8")
    assert x.keys() == encoded.keys()
    special = experiment.template >= 0
    assert x["token_type_ids"][0].tolist() == encoded["token_type_ids"]
    assert x["input_ids"][1][special].tolist() == torch.tensor(encoded["input_ids"])[special].tolist()
    assert not set(x["input_ids"][:, ~special].ravel().tolist()) & set(experiment.tokenizer.all_special_ids)
    assert torch.equal(experiment.batch([8])["z"], experiment.batch([7, 8])["z"][1:])


def test_the_demonstration_has_the_ceiling_the_ablations_and_less_time_than_the_glue_demonstration() -> None:
    options = read_options(["--demo"])
    assert options.method == ["fp32", "rtn", "lsq@random", "lsq", "saq@frozen", "saq", "lsq@real"]
    assert (options.fit_minutes, options.output_dir) == (6.0, Path("runs/zero-shot-demo"))
    assert read_options(["--demo", "--fit-minutes", "2"]).fit_minutes == 2.0


# --- no training row --------------------------------------------------------------------------------------------------


class Rows(list):
    """Rows that note who reads them."""

    def __init__(self, rows: list, reads: collections.Counter, reader: list[str]) -> None:
        super().__init__(rows)
        self.reads, self.reader = reads, reader

    def __getitem__(self, index):
        self.reads[self.reader[0]] += 1
        return super().__getitem__(index)

    def __iter__(self):
        self.reads[self.reader[0]] += len(self)
        return super().__iter__()


def test_no_training_row_is_read(glue: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = read_options(
        arguments_of(glue, tiny, tmp_path, "--method", "rtn", "lsq@random", "saq", "lsq@real", steps=2)
    )
    experiment, reads, reader, train = ZeroShot(options), collections.Counter(), [""], training.train
    experiment.rows = Rows(experiment.rows, reads, reader)

    def noted(run, *arguments):
        reader[0] = run.config["method"]
        return train(run, *arguments)

    monkeypatch.setattr(training, "train", noted)
    training.run_all(options, experiment)
    assert {method for method in reads if reads[method]} == {"fp32", "lsq@real"}
    assert reads["lsq@real"] >= 2 * 4


@pytest.mark.long
def test_other_training_rows_give_the_same_student(glue: Path, tiny: Path, tmp_path: Path) -> None:
    """The teacher is given: whatever else the student learned from the rows would show."""
    arguments = arguments_of(glue, tiny, tmp_path / "a", "--method", "saq", "lsq@random", "rtn")
    assert main(arguments) == 0
    shutil.copytree(tmp_path / "a" / "cola-fp32-seed0", tmp_path / "b" / "cola-fp32-seed0")
    options: ZeroShotOptions = read_options(
        arguments_of(glue, tiny, tmp_path / "b", "--method", "saq", "lsq@random", "rtn")
    )
    experiment = ZeroShot(options)
    experiment.rows = experiment.rows[:1] * TRAIN_ROWS
    training.run_all(options, experiment)
    for name in ("saq", "lsq-random", "rtn"):
        assert weights(tmp_path / "a", f"cola-{name}-w2a8-seed0") == weights(tmp_path / "b", f"cola-{name}-w2a8-seed0")


# --- going on, and failed games ---------------------------------------------------------------------------------------


def test_a_run_that_was_stopped_goes_on_to_the_same_bits(
    glue: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def arguments(out: str) -> list[str]:
        return arguments_of(glue, tiny, tmp_path / out, "--method", "saq", "--save-every", 2, steps=4)

    step = Ascent.on_step_end

    def stop(self, args, state, control, **more):
        if state.global_step == 3:
            raise OSError("the machine is gone")
        step(self, args, state, control, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Ascent, "on_step_end", stop)
        assert main(arguments("stopped")) == 2
    assert main(arguments("stopped")) == main(arguments("whole")) == 0
    assert "cola-saq-w2a8-seed0: going on from checkpoint-2." in capsys.readouterr().out
    name = "cola-saq-w2a8-seed0"
    assert weights(tmp_path / "stopped", name) == weights(tmp_path / "whole", name)
    assert comparable(results(tmp_path / "stopped", name)) == comparable(results(tmp_path / "whole", name))


@pytest.mark.long
def test_a_game_that_fails_says_so_and_keeps_the_last_checkpoint(
    glue: Path, tiny: Path, tmp_path: Path, capsys: Capture
) -> None:
    more = [
        "--method",
        "saq",
        "--generator-lr",
        "100",
        "--trained",
        "adapter",
        "--batch-size",
        "22",
        "--save-every",
        "10",
    ]
    assert main(arguments_of(glue, tiny, tmp_path, *more, steps=40)) == 2
    assert re.search(r"zero_shot: step \d+: the generator has left the range .* The last checkpoint is kept\.",
                     capsys.readouterr().err)  # fmt: skip
    assert list(tmp_path.glob("cola-saq-w2a8-seed0/checkpoint-*/game.pt"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--task", "stbs"], r"`--task` must be one of .*, got 'stbs'\. Did you mean stsb"),
        (
            ["--method", "saq@data"],
            r"`--method saq@data`: after the @ comes one of generator, frozen, random, real, got",
        ),
        (["--method", "saq@"], r"`--method saq@`: after the @ comes the source of a quantized model's inputs"),
        (
            ["--method", "fp32@real"],
            r"`--method fp32@real`: after the @ comes the source of a quantized model's inputs",
        ),
        (["--length", "0"], r"`--length` must be finite and above 0, got 0\."),
        (["--generator", "./nowhere"], r".*nowhere"),
    ],
)
def test_bad_input_is_one_clear_line(
    more: list[str], message: str, glue: Path, tiny: Path, tmp_path: Path, capsys: Capture
) -> None:
    assert main(arguments_of(glue, tiny, tmp_path, *more)) == 2
    assert re.fullmatch(rf"zero_shot: .*{message}.*\n", capsys.readouterr().err)
