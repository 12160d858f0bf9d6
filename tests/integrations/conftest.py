"""Frameworks keep settings in the process: each test starts without those of the last."""

import pytest


@pytest.fixture(autouse=True)
def no_settings_of_the_last_run(monkeypatch):
    from accelerate.state import AcceleratorState, GradientState

    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
