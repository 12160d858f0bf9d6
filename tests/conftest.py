"""One thread for tensors of some hundred entries, and Hypothesis without chance: CI sees what we see."""

import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)

settings.register_profile(
    "qsam",
    derandomize=True,
    deadline=None,
    max_examples=100,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],  # about the speed of the machine, like a deadline
)
settings.load_profile("qsam")
