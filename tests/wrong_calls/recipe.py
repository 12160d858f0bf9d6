"""Recipe: see book.py."""

from recipes.bert_glue_options import parse_options
from recipes.runs import Run
from tests.wrong_calls.book import wrong


@wrong(
    ValueError,
    "`task` must be one of cola, sst2, mrpc, stsb, qqp, mnli, qnli, rte, movies, got 'stbs'. Did you mean stsb?",
)
def _():
    parse_options(["--task", "stbs"])


@wrong(ValueError, "`--bits` must be an integer in [2, 8], got 1.")
def _():
    parse_options(["--bits", "1"])


@wrong(ValueError, "`--activation-bits` must be an integer in [2, 8], got 9.")
def _():
    parse_options(["--activation-bits", "9"])


@wrong(ValueError, "`--epochs` must be at least 1, got 0.")
def _():
    parse_options(["--epochs", "0"])


@wrong(ValueError, "`--batch-size` must be at least 1, got 0.")
def _():
    parse_options(["--batch-size", "0"])


@wrong(ValueError, "`--rho` must be finite and not negative, got -1.0.")
def _():
    parse_options(["--rho", "-1"])


@wrong(ValueError, "`--lr` must be finite and not negative, got nan.")
def _():
    parse_options(["--lr", "nan"])


@wrong(ValueError, "`--scale-lr` is one rate, or two (weights, activations), not negative: got [1.0, 2.0, 3.0].")
def _():
    parse_options(["--scale-lr", "1", "2", "3"])


@wrong(ValueError, "`--holdout` must be a fraction between 0 and 1, got 1.5.")
def _():
    parse_options(["--holdout", "1.5"])


@wrong(ValueError, "`--max-length` must be at least 8, got 2.")
def _():
    parse_options(["--max-length", "2"])


@wrong(ValueError, "`--tag` must be letters, digits and . _ = - only, got '../x'.")
def _():
    parse_options(["--tag", "../x"])


@wrong(ValueError, "`--seed` must not be negative, got [-1].")
def _():
    parse_options(["--seed", "-1"])


@wrong(ValueError, "`--demo` has settings for stsb and movies, not for cola: leave it out.")
def _():
    parse_options(["--demo", "--task", "cola"])


@wrong(ValueError, "FOLDER holds files but no run.json: it is not a run. Choose another folder.")
def _(folder):
    (folder / "thesis.tex").touch()
    Run(folder, {}).check(resume=True)


@wrong(
    ValueError,
    "FOLDER holds a run of another configuration: lr is 0.1 there and 0.2 here. Give the same "
    "settings, or another --output-dir or --tag.",
)
def _(folder):
    Run(folder, {"lr": 0.1}).start()
    Run(folder, {"lr": 0.2}).check(resume=True)


@wrong(ValueError, "FOLDER holds an unfinished run of this configuration: --resume continues it; or delete the folder.")
def _(folder):
    Run(folder, {"lr": 0.1}).start()
    Run(folder, {"lr": 0.1}).check(resume=False)


@wrong(
    ValueError,
    "FOLDER/run.json is not JSON (Expecting property name enclosed in double quotes: line 1 column "
    "2 (char 1)): something else wrote it. Delete its folder.",
)
def _(folder):
    (folder / "run.json").write_text("{")
    Run(folder, {}).check(resume=True)


@wrong(
    ValueError,
    "FOLDER/checkpoint.pt cannot be read (File is not a zip file): delete FOLDER to start that run again.",
)
def _(folder):
    (folder / "checkpoint.pt").write_bytes(b"PK torn")
    Run(folder, {}).load_checkpoint()
