"""Laws of a quantizer that draws noise while an optimizer's pass runs: it holds a ``qsam.quantizers.Noise``."""

from __future__ import annotations

import torch

from qsam.quantizers import Noise, Quantizer
from qsam.testing.battery import SHORT
from qsam.testing.case import Case, claim, same
from qsam.testing.table import law
from qsam.testing.universal import PLAIN, gradients


def draws_noise(q: Quantizer) -> bool:
    """Whether ``q`` holds a stream of noise."""
    return any(isinstance(module, Noise) for module in q.modules())


def noisy(case: Case) -> Quantizer:
    """Return the quantizer as a pass of an optimizer sees it: in training, its streams on."""
    q = case.build().train()
    for module in q.modules():
        if isinstance(module, Noise):
            module.on = True
    return q


@law(draws_noise, inputs=SHORT)
def noise_is_finite(case: Case) -> None:
    """With the noise on, output and gradients are finite."""
    q = noisy(case)
    out = q(case.x)
    claim(out.shape == case.x.shape and out.dtype == case.x.dtype, "noise must keep shape and dtype of the input.")
    claim(out.isfinite(), "a finite input must give a finite output with the noise on.", x=case.x, got=out)
    for grad in gradients(q, case.x, torch.ones_like(case.x)):
        claim(grad.isfinite(), "a gradient must be finite with the noise on.", got=grad)


@law(draws_noise, inputs=PLAIN)
def noise_repeats_within_a_step(case: Case) -> None:
    """All passes of a step, and the pull-back, draw the same noise, and no global generator moves."""
    q, seed = noisy(case), torch.get_rng_state()
    claim(same(q(case.x), q(case.x)), "a second pass of one step must draw the same noise.", x=case.x)
    claim(torch.equal(seed, torch.get_rng_state()), "noise must not come from the global random state.")


@law(draws_noise, inputs=("normal",))
def noise_differs_from_step_to_step(case: Case) -> None:
    """``update`` goes on to the next draw."""
    q = noisy(case)
    first = q(case.x)
    q.update(case.x)
    claim(not torch.equal(q(case.x), first), "after `update` the noise must be another: advance the stream there.")
