"""The search for the scale of least squared error ends where neither of its two halves moves."""

import pytest
import torch

from qsam.functional import integer_limits
from qsam.scales import initial_scale


@pytest.mark.parametrize("bits", [2, 4])
def test_the_mse_scale_is_the_best_step_for_its_own_codes(bits):
    """<q, x> / <q, q>; a search over a grid of steps alone is off by half its spacing, .5 %."""
    x = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    low, high = integer_limits(bits, True)
    step = initial_scale(x, low, high, "mse")
    q = torch.round(x / step[:, None]).clamp(low, high)
    torch.testing.assert_close((q * x).sum(1) / q.square().sum(1), step, rtol=1e-5, atol=0)
