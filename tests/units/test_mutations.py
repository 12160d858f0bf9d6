"""The runner of tests/mutations.py, on a checkout of one module and one test; and its list, on this one."""

import json

import pytest

from tests import mutations, variations
from tests.mutations import MUTATIONS, ROOT, Mutation, run, run_all

CAUGHT = Mutation("toy.py", "a + b", "a - b")
SURVIVES = Mutation("toy.py", "is even", "is not odd")
BREAKS = Mutation("toy.py", "def add", "def subtract")
ENDLESS = Mutation("toy.py", "    return a + b", "    while True: pass")


@pytest.fixture
def toy(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # a plugin may import torch
    root = tmp_path / "toy"
    root.mkdir()
    (root / "toy.py").write_text('def add(a, b):\n    """The sum of odd numbers is even."""\n    return a + b\n')
    (root / "test_toy.py").write_text("from toy import add\n\ndef test_sum():\n    assert add(1, 3) == 4\n")
    return root


def outcomes(report):
    return {name: outcome["outcome"] for name, outcome in report["outcomes"].items()}


def test_a_change_is_caught_if_a_test_fails_or_cannot_run_and_survives_otherwise(toy, tmp_path):
    file, text = tmp_path / "out.json", (toy / "toy.py").read_text()
    report = run_all([CAUGHT, SURVIVES, BREAKS], toy, ["test_toy.py"], file, jobs=3)
    assert outcomes(report) == {str(CAUGHT): "caught", str(SURVIVES): "survived", str(BREAKS): "caught"}
    assert report["outcomes"][str(CAUGHT)]["by"] == "FAILED test_toy.py::test_sum"
    assert json.loads(file.read_text()) == report
    assert (toy / "toy.py").read_text() == text


def test_a_second_call_runs_only_what_is_new(toy, tmp_path, monkeypatch):
    file = tmp_path / "out.json"
    first = run_all([CAUGHT], toy, ["test_toy.py"], file)
    ran = []
    monkeypatch.setattr(
        mutations,
        "run",
        lambda root, arguments, mutation, timeout: ran.append(mutation) or run(root, arguments, mutation),
    )
    second = run_all([CAUGHT, SURVIVES], toy, ["test_toy.py"], file)
    assert ran == [None, SURVIVES]
    assert second["outcomes"][str(CAUGHT)] == first["outcomes"][str(CAUGHT)]
    with pytest.raises(ValueError, match=r"out\.json was written with the arguments \['test_toy\.py'\]: give those"):
        run_all([CAUGHT], toy, ["-k", "sum"], file)


@pytest.mark.long
def test_an_endless_loop_is_caught(toy):
    assert run(toy, ["test_toy.py"], ENDLESS, timeout=5)["by"] == "timeout"


def test_tests_that_fail_without_a_change_or_are_none_say_nothing(toy, tmp_path):
    with pytest.raises(RuntimeError, match="pytest ended with code 5"):
        run(toy, ["-k", "nothing"])
    CAUGHT.apply(toy)
    with pytest.raises(
        RuntimeError, match=r"the tests fail without a change \(FAILED test_toy\.py::test_sum\): mend them"
    ):
        run_all([SURVIVES], toy, ["test_toy.py"], tmp_path / "out.json")


def test_a_change_that_does_not_apply_is_refused(toy):
    with pytest.raises(ValueError, match=r"toy\.py: 'multiply' -> '' occurs 0 times: it must occur once"):
        Mutation("toy.py", "multiply", "").apply(toy)


def test_the_old_text_of_every_mutation_occurs_once():
    counts = {str(m): (ROOT / m.file).read_text(encoding="utf-8").count(m.old) for m in MUTATIONS}
    assert {name for name, count in counts.items() if count != 1} == set()
    assert len(counts) == len(MUTATIONS) and all(m.old != m.new for m in MUTATIONS)


def test_the_variations_run_files_that_are_there():
    assert [path for path in variations.CORE if not (ROOT / path).exists()] == []
