"""Fake quantization as users write it: a formula with detach tricks in the model's graph, eager or compiled."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

Formula = Callable[[Tensor, Tensor, int, int, float], Tensor]


def lsq(x: Tensor, scale: Tensor, low: int, high: int, grad_scale: float) -> Tensor:
    """Return LSQ's Q(x; s), its gradients by detaching (Esser et al., ICLR 2020, appendix A)."""
    s = scale * grad_scale + (scale - scale * grad_scale).detach()
    v = (x / s).clamp(low, high)
    return ((v.round() - v).detach() + v) * s


def compiled(formula: Formula) -> Formula:
    """Return the formula under torch.compile, one kernel a shape, as it is fastest."""
    torch._dynamo.config.recompile_limit = 64  # past the limit it runs eagerly
    found: Formula = torch.compile(formula, fullgraph=True, dynamic=False)
    return found


class WeightInGraph(nn.Module):
    """A parametrization: the layer uses Q(w), computed in each forward."""

    def __init__(self, weight: Tensor, bits: int, formula: Formula) -> None:
        super().__init__()
        self.limits = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        self.grad_scale = (weight.numel() * self.limits[1]) ** -0.5
        self.scale = nn.Parameter(initial(weight, self.limits[1]))
        self.formula = formula

    def forward(self, weight: Tensor) -> Tensor:
        """Return Q(w)."""
        out: Tensor = self.formula(weight, self.scale, *self.limits, self.grad_scale)
        return out


class InputInGraph(nn.Module):
    """A quantizer that a forward pre-hook calls on a layer's input; the first input sets the scale."""

    def __init__(self, bits: int, formula: Formula) -> None:
        super().__init__()
        self.limits = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        self.scale = nn.Parameter(torch.ones(1))
        self.formula, self.ready = formula, False

    def forward(self, x: Tensor) -> Tensor:
        """Return Q(x)."""
        if not self.ready:
            self.ready = True
            self.scale.data.copy_(initial(x, self.limits[1]))
        grad_scale = (x[0].numel() * self.limits[1]) ** -0.5
        return self.formula(x, self.scale, *self.limits, float(grad_scale))


@torch.no_grad()
def initial(x: Tensor, high: int) -> Tensor:
    """Return the paper's first scale, ``2 mean|x| / sqrt(Qp)``."""
    return (2 * x.abs().mean() / math.sqrt(high)).reshape(1)


def quantize_in_graph_(linear: nn.Linear, bits: int, activation_bits: int, formula: Formula) -> None:
    """Put LSQ into the graph of one layer: its weight and its input."""
    parametrize.register_parametrization(linear, "weight", WeightInGraph(linear.weight, bits, formula))
    linear.add_module("input_in_graph", InputInGraph(activation_bits, formula))
    linear.register_forward_pre_hook(_quantize_input)


def _quantize_input(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    quantizer: Any = module.input_in_graph
    return (quantizer(args[0]), *args[1:])
