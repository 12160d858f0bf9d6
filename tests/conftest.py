"""One thread for tensors of some hundred entries, and Hypothesis without chance: CI sees what we see."""

import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)

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
