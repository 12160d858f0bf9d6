"""One thread for tensors of some hundred entries, and Hypothesis without chance: CI sees what we see."""

import importlib.util
import os

import pytest
import torch
from hypothesis import HealthCheck, settings

pytest.register_assert_rewrite("qsam.testing")  # before it is imported: a broken law then shows what it compared

torch.set_num_threads(int(os.environ.get("QSAM_TEST_THREADS", "1")))

# torchvision, which timm needs, has no build for the oldest torch
needs_timm = ["recipes/test_vision.py", "world/test_benchmarks.py"]
collect_ignore = [] if importlib.util.find_spec("timm") else needs_timm

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
