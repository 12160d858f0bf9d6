import errno
import re
import sys
from pathlib import Path

import pytest
import torch

from recipes.runs import (
    CHECKPOINT,
    CONFIG,
    RESULTS,
    Run,
    differences,
    git_commit,
    read_json,
    replacing,
    restore_rng_,
    rng_state,
    versions,
    write_json,
)
from tests.reliability import fault

needs_full_device = pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")


def started(folder: Path, **config: object) -> Run:
    run = Run(folder, {"lr": 1e-5, "fp32": {"epochs": 5}, **config})
    run.start()
    return run


def fill_the_disk_for(path: Path) -> None:
    """Let the next replacement of `path` go to a device that is always full."""
    path.with_name(f"{path.name}.partial").symlink_to("/dev/full")


def no_model(folder: Path) -> None:
    (folder / "weights").write_bytes(b"1")


def test_a_new_folder_is_no_obstacle(tmp_path: Path) -> None:
    run = Run(tmp_path / "new", {"lr": 1})
    run.check(resume=False)
    assert not run.folder.exists()  # a check writes nothing
    assert run.load_checkpoint() is None


def test_an_unfinished_run_is_continued_only_when_asked(tmp_path: Path) -> None:
    run = started(tmp_path / "run")
    run.check(resume=True)
    with pytest.raises(ValueError, match="holds an unfinished run of this configuration: --resume continues it"):
        run.check(resume=False)


def test_a_finished_run_is_never_written_again(tmp_path: Path) -> None:
    run = started(tmp_path / "run")
    run.save_checkpoint({"step": 3})
    run.finish({"metric": 0.5}, no_model)
    assert run.is_finished
    assert not (run.folder / CHECKPOINT).exists()
    assert (run.model_folder / "weights").read_bytes() == b"1"
    assert run.results()["metric"] == 0.5
    assert run.results()["config"] == run.config
    run.check(resume=True)
    with pytest.raises(ValueError, match="holds a finished run of this configuration: --resume skips it"):
        run.check(resume=False)


@pytest.mark.parametrize("resume", [False, True])
def test_another_configuration_is_refused_and_the_difference_named(tmp_path: Path, resume: bool) -> None:
    started(tmp_path / "run")
    other = Run(tmp_path / "run", {"lr": 2e-5, "fp32": {"epochs": 3}})
    sentence = "lr is 1e-05 there and 2e-05 here; fp32.epochs is 5 there and 3 here. Give the same settings, or"
    with pytest.raises(ValueError, match=re.escape(sentence)):
        other.check(resume)


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ValueError, match=r"holds files but no run\.json: it is not a run"):
        Run(tmp_path, {}).check(resume=True)


def test_what_an_interrupted_start_leaves_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / f"{CONFIG}.partial").touch()
    Run(tmp_path, {}).check(resume=False)


@fault(
    "an error while the trained model is saved",
    happens="the error; the next start saves it again",
    kept="the last checkpoint",
)
def test_an_interrupted_finish_is_repeated(tmp_path: Path) -> None:
    run = started(tmp_path / "run")

    def torn(folder: Path) -> None:
        no_model(folder)
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        run.finish({"metric": 0.5}, torn)
    assert not run.is_finished
    run.finish({"metric": 0.5}, no_model)
    assert sorted(path.name for path in run.folder.iterdir()) == ["model", RESULTS, CONFIG]


def test_differences_of_nested_configurations() -> None:
    assert differences({"a": 1, "b": {"c": 2}}, {"a": 1, "b": {"c": 2}}) == []
    assert differences({"a": 1}, {"b": None}) == ["a is 1 there and None here"]


def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path) -> None:
    run = started(tmp_path / "run")
    run.save_checkpoint({"w": torch.tensor([1.0, 2.0]), "progress": {"step": 3, "history": [{"loss": 0.1}]}})
    state = run.load_checkpoint()
    assert state is not None
    assert torch.equal(state["w"], torch.tensor([1.0, 2.0]))
    assert state["progress"] == {"step": 3, "history": [{"loss": 0.1}]}


def test_a_torn_checkpoint_is_named(tmp_path: Path) -> None:
    run = started(tmp_path / "run")
    run.save_checkpoint({"w": torch.zeros(1000)})
    path = run.folder / CHECKPOINT
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"checkpoint\.pt cannot be read .* delete .* to start that run again"):
        run.load_checkpoint()


def test_a_checkpoint_is_data_and_not_code(tmp_path: Path) -> None:
    run = started(tmp_path / "run")
    run.save_checkpoint({"path": tmp_path})  # an object that only a full unpickler would build
    with pytest.raises(ValueError, match="cannot be read"):
        run.load_checkpoint()


@fault(
    "a full disk while a checkpoint is written",
    happens="OSError with the file's name and the reason",
    kept="the last checkpoint; no half file stays",
)
@needs_full_device
def test_a_full_disk_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    run = started(tmp_path / "run")
    run.save_checkpoint({"step": 1})
    fill_the_disk_for(run.folder / CHECKPOINT)
    with pytest.raises(
        OSError, match=r"checkpoint\.pt cannot be written: No space left on device\. What was there"
    ) as got:
        run.save_checkpoint({"step": 2, "w": torch.zeros(100_000)})
    assert got.value.errno == errno.ENOSPC
    assert run.load_checkpoint() == {"step": 1}
    assert not (run.folder / f"{CHECKPOINT}.partial").is_symlink()


@fault(
    "an exception while a file is written",
    happens="the exception, as it is",
    kept="the file that was there",
)
def test_an_error_while_writing_leaves_the_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError, match="torn"), replacing(path) as handle:
        handle.write(b"new")
        raise RuntimeError("torn")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_json_comes_back_and_knows_no_nan(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"é": [1, 2.5, None]})
    assert read_json(path) == {"é": [1, 2.5, None]}
    with pytest.raises(ValueError, match="Out of range float"):
        write_json(path, {"loss": float("nan")})
    assert read_json(path) == {"é": [1, 2.5, None]}
    path.write_text("{")
    with pytest.raises(ValueError, match=r"x\.json is not JSON"):
        read_json(path)


def test_the_random_generator_goes_back() -> None:
    state = rng_state()
    first = torch.rand(3)
    restore_rng_(state)
    assert torch.equal(torch.rand(3), first)


def test_versions_and_commit_are_recorded() -> None:
    found = versions()
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["torch"] == torch.__version__.partition("+")[0] or found["torch"] == torch.__version__
    assert {"qsam", "transformers", "scikit-learn", "scipy", "numpy"} <= set(found)
    commit = git_commit()
    assert commit is None or re.fullmatch("[0-9a-f]{40}(-dirty)?", commit)
