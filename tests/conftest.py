"""One thread for tensors of some hundred entries, and Hypothesis without chance: CI sees what we see."""

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

pytest.register_assert_rewrite("qsam.testing")  # before it is imported: a broken law then shows what it compared

torch.set_num_threads(int(os.environ.get("QSAM_TEST_THREADS", "1")))

settings.register_profile(
    "qsam",
    derandomize=True,
    deadline=None,
    max_examples=40,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],  # about the speed of the machine, like a deadline
)
settings.register_profile("thorough", settings.get_profile("qsam"), max_examples=200)  # make test-all
settings.load_profile("qsam")

_KIN = {"joint", "squat-next_batch"}
"""Methods that share all their code with others: their tests of what every method promises are long."""
_ALL_METHODS = {"test_twins.py", "test_steps.py", "test_order.py"}
"""Where what is tested is the method itself."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of kin as long, before long tests are deselected."""
    for item in items:
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        if str(parameters.get("method")) in _KIN and item.path.name not in _ALL_METHODS:
            item.add_marker(pytest.mark.long)
