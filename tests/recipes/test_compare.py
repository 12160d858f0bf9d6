"""The table and the picture of finished runs."""

import json
from pathlib import Path

import pytest

from recipes.compare import ONE_SEED, grouped, main, mean_and_error, notes, read_results, table


def write(folder: Path, method: str, seed: int, metric: float, **settings: object) -> None:
    config = {"task": "cola", "method": method, "seed": seed, "evaluated_on": "the full dev set", **settings}
    dev = {"dev": {"loss": 0.5, "matthews": metric}}
    found = {"config": config, "metric_name": "matthews", "metric": metric, "dev": dev, "dev_loss": 0.5, "train_loss": 0.25,
             "epochs": [{"passes": 4, "dev": dev}], "steps": 2, "passes": 4, "seconds": 1.0, "sharpness": []}  # fmt: skip
    path = folder / f"{method.replace(':', '-')}-{seed}-{len(list(folder.iterdir())) if folder.is_dir() else 0}"
    path.mkdir(parents=True)
    (path / "results.json").write_text(json.dumps(found))


def test_runs_that_differ_in_the_seed_alone_are_one_row(tmp_path: Path) -> None:
    for seed, metric in enumerate((0.1, 0.3)):
        write(tmp_path, "lsq", seed, metric, bits=2, activation_bits=8)
    write(tmp_path, "fp32", 0, 0.5)
    groups = grouped(read_results(tmp_path, "cola"))
    lines = table(groups)
    assert [line.split("  ")[0] for line in lines[2:]] == ["fp32", "lsq W2A8"]
    assert "20.00 ± 10.00" in lines[3]
    assert "50.00" in lines[2]
    assert f"rows with {ONE_SEED}" in notes(groups)


def test_settings_that_differ_are_named(tmp_path: Path) -> None:
    for rho in (0.1, 0.2):
        write(tmp_path, "squat", 0, 0.1, bits=2, activation_bits=8, rho=rho)
    assert [group.label for group in grouped(read_results(tmp_path, "cola"))] == [
        "squat W2A8 rho=0.1",
        "squat W2A8 rho=0.2",
    ]


def test_the_command_draws_and_an_empty_folder_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, "lsq", 0, 0.1, bits=2, activation_bits=8)
    assert main([str(tmp_path), "--task", "cola"]) == 0
    assert (tmp_path / "cola.png").read_bytes().startswith(b"\x89PNG")
    assert ONE_SEED in capsys.readouterr().out
    assert main([str(tmp_path), "--task", "rte"]) == 2
    assert "holds no finished run of rte" in capsys.readouterr().err


def test_a_standard_error_needs_two_values() -> None:
    assert mean_and_error([1.0, 3.0], 1) == "2.0 ± 1.0"
    assert mean_and_error([2.0], 2) == "2.00"
