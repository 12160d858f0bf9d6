"""DiffQ: pseudo-noise instead of rounding, annealed to rounding.

    Q~(x; s) = x + s * ((1 - a) * u + a * (round(v) - v)),   v = x / s,   u ~ U(-.5, .5),   a = min(step / T, 1)

inside the limits, and s * Qn or s * Qp outside. u has the variance of a rounding error but does not depend on x. At
a = 0, dQ~/dx = 1 and dQ~/ds = u are therefore true derivatives.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qsam.quantizers.base import register_quantizer
from qsam.quantizers.noise import Noisy


@register_quantizer("diffq")
class DiffQ(Noisy):
    """Pseudo-quantization noise while an optimizer's pass runs, LSQ's rounding at any other time and after T steps.

    Arguments as :class:`~qsam.quantizers.base.Quantizer`. The model that is evaluated, saved and deployed is the
    rounded one.

    Attributes:
        anneal_steps: T, in optimizer steps; an integer >= 1. Set it on the instances after ``quantize_``, or in a
            subclass with another name.

    Example:
        >>> q = DiffQ(bits=4, axis=0)
        >>> q.observe_(torch.linspace(-8, 7, 16))
        >>> x = torch.tensor([2.3, 9.0])
        >>> q(x).tolist()
        [2.0, 7.0]
        >>> q.noise.on = True  # what an optimizer does in its passes
        >>> u = q.noise(x)
        >>> torch.allclose(q(x), torch.stack([2.3 + u[0], torch.tensor(7.0)]))
        True

    References:
        Défossez, Adi, Synnaeve, Differentiable Model Compression via Pseudo Quantization Noise, arXiv 2104.09987.

    Differs from the paper: the noise ends at T (the authors' code draws it until the model is evaluated); the step
    size is learned, at fixed bits, with LSQ's gradient scale (theirs follows from the range of the weights and the
    bits, which are learned); what lies outside the limits is clipped, as in LSQ.
    """

    anneal_steps: int = 1000

    def noisy_codes(self, v: Tensor, u: Tensor) -> Tensor:
        """Return ``v + (1 - a) * u + a * (round(v) - v)``."""
        if self.anneal_steps < 1:
            raise ValueError(
                f"`anneal_steps` must be an integer >= 1, got {self.anneal_steps}: for no noise, use 'lsq'."
            )
        share = (self.noise.step / self.anneal_steps).clamp(max=1).to(v.dtype)
        rounded = torch.round(v)
        mixture = v + torch.lerp(u, rounded - v, share)
        return torch.where(share < 1, mixture, rounded)

    def extra_repr(self) -> str:
        """Show the settings in ``print(model)``, and in the optimizer's checkpoint, which refuses another T."""
        return f"{super().extra_repr()}, anneal_steps={self.anneal_steps}"
