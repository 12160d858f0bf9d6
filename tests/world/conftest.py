"""Frameworks keep settings in the process: each test starts without those of the last."""

import sys

import pytest


@pytest.fixture(autouse=True)
def no_settings_of_the_last_run(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    yield
    if state := sys.modules.get("accelerate.state"):
        state.AcceleratorState._reset_state(reset_partial_state=True)
        state.GradientState._reset_state()
