import math
from pathlib import Path
from typing import Any

import pytest

from recipes.report import grouped, main, mean_and_error, notes, report, table
from recipes.runs import write_json

HEADER = "method pearson spearman dev loss train loss epochs steps passes seconds seeds"


def result(method: str = "squat", seed: int = 0, metric: float = 0.5, **config: Any) -> dict[str, Any]:
    quantized = {} if method == "fp32" else {"bits": 2, "activation_bits": 8}
    dev = {"loss": 0.25, "pearson": metric, "spearman": metric - 0.1}
    entries = [] if method == "rtn" else [{"passes": 30, "dev": {"dev": dev}}, {"passes": 60, "dev": {"dev": dev}}]
    return {
        "metric_name": "pearson",
        "metric": metric,
        "dev": {"dev": dev},
        "dev_loss": 0.25,
        "train_loss": 0.125,
        "epochs": entries,
        "steps": 20,
        "passes": 60,
        "seconds": 7.2,
        "config": {"task": "stsb", "method": method, "seed": seed, "evaluated_on": "rows", **quantized, **config},
    }


def write(folder: Path, *results: dict[str, Any]) -> None:
    for i, content in enumerate(results):
        (folder / f"run{i}").mkdir(parents=True)
        write_json(folder / f"run{i}" / "results.json", content)


def words(line: str) -> str:
    return " ".join(line.split())


def test_the_mean_and_its_standard_error() -> None:
    # mean 2, deviations -1 0 1: s = 1, standard error 1 / sqrt 3
    assert mean_and_error([1.0, 2.0, 3.0], 3) == f"2.000 ± {1 / math.sqrt(3):.3f}"
    assert mean_and_error([0.5], 2) == "0.50"


def test_seeds_are_one_row_and_settings_are_not() -> None:
    groups = grouped([result(seed=0, rho=0.1), result(seed=1, rho=0.1), result(seed=0, rho=0.05)])
    assert [(group.label, len(group.results)) for group in groups] == [
        ("squat W2A8 rho=0.05", 1),
        ("squat W2A8 rho=0.1", 2),
    ]


def test_settings_of_the_full_precision_phase_count_too() -> None:
    groups = grouped([result(fp32={"epochs": 5}), result(fp32={"epochs": 3})])
    assert [group.label for group in groups] == ["squat W2A8 fp32.epochs=3", "squat W2A8 fp32.epochs=5"]


def test_full_precision_comes_first_and_rounding_next() -> None:
    groups = grouped([result("squat"), result("lsq"), result("rtn"), result("fp32")])
    assert [group.label for group in groups] == ["fp32", "rtn W2A8", "lsq W2A8", "squat W2A8"]


def test_the_table_of_two_seeds() -> None:
    lines = table(grouped([result(seed=0, metric=0.5), result(seed=1, metric=0.7)]))
    assert words(lines[0]) == HEADER
    assert words(lines[2]) == "squat W2A8 60.00 ± 10.00 50.00 ± 10.00 0.2500 ± 0.0000 0.1250 ± 0.0000 2 20 60 7 2"
    assert len({len(line) for line in lines}) == 1


def test_two_dev_sets_have_a_column_each() -> None:
    found = result()
    found["dev"] = {"matched": {"loss": 1.0, "accuracy": 0.5}, "mismatched": {"loss": 1.0, "accuracy": 0.25}}
    lines = table(grouped([found]))
    assert words(lines[0]).startswith("method accuracy matched accuracy mismatched dev loss")
    assert words(lines[2]).startswith("squat W2A8 50.00 25.00 0.2500")


def test_one_seed_is_called_a_demonstration() -> None:
    one, two = grouped([result("lsq")]), grouped([result("squat", 0), result("squat", 1)])
    assert notes(one)[1:] == ["one seed: a demonstration, not evidence"]
    assert notes(two)[1:] == ["mean ± standard error over the seeds"]
    assert notes([*one, *two])[1:] == [
        "mean ± standard error over the seeds",
        "rows with one seed: a demonstration, not evidence",
    ]


def test_the_report_prints_and_draws_one_task(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, result("fp32"), result("rtn"), result("lsq"), result(seed=1), result(seed=2), result(task="rte"))
    assert report(tmp_path, "stsb") == [tmp_path / "stsb.png"]
    printed = capsys.readouterr().out
    assert "stsb, measured on rows" in printed
    assert [line.split()[0] for line in printed.splitlines() if line.split()[1:2] == ["W2A8"]] == [
        "rtn",
        "lsq",
        "squat",
    ]
    assert (tmp_path / "stsb.png").read_bytes().startswith(b"\x89PNG")


def test_what_was_measured_on_other_rows_is_not_in_the_same_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held = result(evaluated_on="held-out rows")
    held["dev"] = {"holdout": held["dev"]["dev"]}
    held["epochs"] = []
    other = result(evaluated_on="another dev set")
    write(tmp_path, result(), held, other)
    assert [path.name for path in report(tmp_path, "stsb")] == ["stsb.png", "stsb-holdout.png", "stsb-3.png"]
    assert capsys.readouterr().out.count("measured on") == 3


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, result())
    assert main([str(tmp_path), "--task", "stsb"]) == 0
    assert main([str(tmp_path), "--task", "rte"]) == 2
    assert "holds no finished run of rte" in capsys.readouterr().err
