"""Ternary weights: a quantizer for qsam in a package of its own."""

import torch
from torch import nn

import qsam


@qsam.register_quantizer("ternary")
class Ternary(qsam.Quantizer):
    """Q(w) = s * round(clip(w / s, -1, 1)): levels -s, 0 and s; s is learned, and starts as in TWN (1605.04711)."""

    def __init__(self, *, bits, granularity="per_tensor", **arguments):
        if granularity != "per_tensor":
            raise ValueError("`ternary` has one scale per tensor: leave `granularity` at 'per_tensor'.")
        super().__init__(bits=2, **arguments)  # three levels take two bits, whatever was asked for
        self.scale = nn.Parameter(torch.ones(1))

    @torch.no_grad()
    def init_(self, w):
        large = w.abs()[w.abs() >= 0.7 * w.abs().mean()]
        self.scale.copy_(large.mean())

    def forward(self, w):
        s = self.scale.abs().clamp_min(torch.finfo(torch.float32).tiny)
        v = (w / s).clamp(-1, 1)
        return ((v + (v.round() - v).detach()) * s).to(w.dtype)
