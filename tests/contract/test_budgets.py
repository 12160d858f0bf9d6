"""A step is read in few files, and a method in few classes."""

import pytest

from qsam.optim import OPTIMIZERS
from tests import budgets

FILES_OF_SQUAT = 16


def test_a_step_of_squat_enters_few_files():
    entered = budgets.files_of_a_step("squat")
    assert len(entered) <= FILES_OF_SQUAT, budgets.short(entered)
    assert any(path.name == "squat.py" for path in entered)


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_a_method_has_at_most_two_own_classes_beside_its_own(name):
    assert len(budgets.own_classes(name)) <= budgets.OWN_CLASSES


def test_no_function_of_the_optimizers_is_above_sixty_lines():
    long = [place for lines, place in budgets.functions() if lines > budgets.LINES_OF_A_FUNCTION]
    assert not [place for place in long if place.startswith("qsam/optim/")]


def test_the_report_names_what_is_over_its_budget(monkeypatch, capsys):
    monkeypatch.setattr(budgets, "LINES_OF_PACKAGE", 10)
    assert budgets.main() == 1
    assert "over" in capsys.readouterr().out
