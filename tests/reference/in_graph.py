"""What the twins share: fake quantization in the graph, with plain autograd.

A twin is a float model whose own Parameters are the latents w. Each forward replaces them by Q(w) through
``torch.func.functional_call``; autograd does the rest. Nothing of qsam is used; only the grids and the initial scales
are read off a quantized model.

Products and sums are written in the order in which qsam computes them, so that equality can be bitwise.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.func import functional_call

LONGEST_RELATIVE_STEP = 0.01

Perturbation = dict[str, tuple[Tensor, Tensor]]
"""e of each tensor, as a direction and its coefficient."""


def plus(x: Tensor, e: tuple[Tensor, Tensor]) -> Tensor:
    """Return x + e, rounded once: ``x + d * c`` would round the product too."""
    direction, coefficient = e
    return torch.addcmul(x, direction, coefficient)


@dataclasses.dataclass
class Grid:
    """The levels of one quantizer, and its scale, a leaf."""

    low: int
    high: int
    scale: Tensor
    group_size: int | None = None
    masked: bool = True


def lsq(x: Tensor, grid: Grid, count: int) -> Tensor:
    """Return LSQ's Q(x), with its gradients.

    dQ/dx = 1[low < v < high],   dQ/ds = low, high or round(v) - v,   times gs = 1 / sqrt(count * high)
    """
    v = (x / grid.scale).detach()
    below, above = v <= grid.low, v >= grid.high
    value = torch.round(v.clamp(grid.low, grid.high)) * grid.scale.detach()
    slope = torch.where(below, grid.low, torch.where(above, grid.high, torch.round(v) - v))
    mask = ~(below | above) if grid.masked else torch.ones_like(below)
    gradient_scale = (count * grid.high) ** -0.5
    s = grid.scale.view_as(grid.scale)
    s.register_hook(lambda gradient: gradient * gradient_scale)
    return value + mask * (x - x.detach()) + slope * (s - s.detach())


def quantized_weight(w: Tensor, grid: Grid) -> Tensor:
    grouped = w if grid.group_size is None else w.reshape(w.shape[0], -1, grid.group_size)
    return lsq(grouped, grid, count=w.numel() // grid.scale.numel()).reshape(w.shape)


def quantized_input(x: Tensor, grid: Grid) -> Tensor:
    return lsq(x, grid, count=x[0].numel())


class ScaleDescent:
    """One rule for the step of the scales.

    Args:
        kind: "sgd": ``s <- s - r ds``. "cut": the same, no longer than 1 % of s. "normalized": ``s <- s (1 - r ds /
            sqrt(v))``, v the bias-corrected average of ds^2 with decay .999, cut likewise.
        rate: r.
    """

    def __init__(self, kind: str, rate: float) -> None:
        self.kind, self.rate = kind, rate
        self.root: dict[Tensor, Tensor] = {}
        self.count: dict[Tensor, int] = {}

    @torch.no_grad()
    def step(self, s: Tensor) -> None:
        if s.grad is None:
            return
        if self.kind == "sgd":
            s.sub_(s.grad, alpha=self.rate)
            return
        move = self.normalized(s) * s if self.kind == "normalized" else s.grad
        s -= (self.rate * move).clamp(-LONGEST_RELATIVE_STEP * s, LONGEST_RELATIVE_STEP * s)

    def normalized(self, s: Tensor) -> Tensor:
        """Return ds / sqrt(v), from the root of v / (1 - .999), in units in which no square leaves the range of fp32."""
        root = self.root.get(s, torch.zeros_like(s))
        t = self.count.get(s, 0) + 1
        unit = torch.maximum(root, s.grad.abs()).clamp_min(torch.finfo(s.dtype).tiny)
        root = (0.999 * (root / unit).square() + (s.grad / unit).square()).sqrt() * unit
        self.root[s], self.count[s] = root, t
        return torch.where(root > 0, s.grad / root * math.sqrt((1 - 0.999**t) / (1 - 0.999)), 0)


def balanced(base: torch.optim.Optimizer, latents: list[Tensor]) -> tuple[str, float]:
    """Return the rule and rate at which the scales take the weights' relative step."""
    (group,) = base.param_groups
    if isinstance(base, torch.optim.SGD):
        return "cut", group["lr"] / (1 - group["momentum"])
    mean_square = sum(float(w.detach().square().sum()) for w in latents) / sum(w.numel() for w in latents)
    return "normalized", min(group["lr"] / math.sqrt(mean_square), LONGEST_RELATIVE_STEP)


class InGraph:
    """A model whose quantization is part of its graph, its base optimizer and its scale rule.

    Args:
        model: A float model; it is trained in place.
        weights: The grid of each quantized Parameter.
        inputs: The grid of each module's input.
        base: Optimizer class, and its arguments.
        scale_lr: As qsam's.
        rho: Radius.
        max_grad_norm: As qsam's.
        period: The scales' step comes once in so many steps of the weights.
    """

    masked = True
    """Whether dw carries the clip mask."""

    def __init__(
        self,
        model: nn.Module,
        weights: dict[str, Grid],
        inputs: dict[str, Grid],
        base: type[torch.optim.Optimizer],
        arguments: dict[str, float],
        scale_lr: float | tuple[float, float] | None = None,
        rho: float = 0.1,
        max_grad_norm: float | None = None,
        period: int = 1,
    ) -> None:
        self.model, self.weights, self.inputs = model, weights, inputs
        self.rho, self.max_grad_norm, self.period = rho, max_grad_norm, period
        self.parameters = dict(model.named_parameters())
        self.base = base(model.parameters(), **arguments)
        for grid in weights.values():
            grid.masked = self.masked
        for name, grid in inputs.items():
            model.get_submodule(name).register_forward_pre_hook(_input_hook(grid), with_kwargs=True)
        self.scale_rules = self._scale_rules(scale_lr)
        self.count = 0

    def _scale_rules(self, scale_lr: float | tuple[float, float] | None) -> list[tuple[Tensor, ScaleDescent]]:
        if scale_lr is None:
            kind, rate = (
                balanced(self.base, [self.parameters[name] for name in self.weights]) if self.weights else ("", 0)
            )
            rates = (rate, rate)
        else:
            kind, rates = "sgd", scale_lr if isinstance(scale_lr, tuple) else (scale_lr, scale_lr)
        rules = [ScaleDescent(kind, rate) for rate in rates]
        groups = [list(self.weights.values()), list(self.inputs.values())]
        return [(grid.scale, rule) for grids, rule in zip(groups, rules, strict=True) for grid in grids]

    # --- passes ---------------------------------------------------------------------------------------------------

    def loss(self, loss, batch, e: Perturbation | None = None) -> Tensor:
        """Return L(Q(w) + e)."""
        self.Q = self.quantized()
        at = {name: plus(q, e[name]) if e else q for name, q in self.Q.items()}

        def forward(*args, **kwargs):
            return functional_call(self.model, {**at, **self.buffers}, args, kwargs)

        return loss(forward, batch)

    def quantized(self) -> dict[str, Tensor]:
        """Return Q(w) by name."""
        return {name: quantized_weight(self.parameters[name], grid) for name, grid in self.weights.items()}

    def first(self, loss, batch) -> Tensor:
        """Return L(Q(w)): this pass moves the buffers and the random numbers."""
        self.random_state = torch.get_rng_state()
        self.buffers = {}
        return self.loss(loss, batch)

    def again(self, loss, batch, e: Perturbation | None = None) -> Tensor:
        """Return L(Q(w) + e) for the same random numbers, leaving them and the buffers as they are."""
        self.buffers = {name: b.clone() for name, b in self.model.named_buffers()}
        with self._same_random_numbers():
            return self.loss(loss, batch, e)

    @contextlib.contextmanager
    def _same_random_numbers(self) -> Iterator[None]:
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(self.random_state)
            yield

    def ascent(self, g: dict[str, Tensor]) -> Perturbation:
        """Return e = rho * g / ||g||, one norm over all tensors."""
        norm = torch.stack([t.norm() for t in g.values()]).norm()
        return {name: (t, 1 / norm * self.rho) for name, t in g.items()}

    # --- updates --------------------------------------------------------------------------------------------------

    def forget_gradients(self) -> None:
        for tensor in [*self.parameters.values(), *(s for s, _ in self.scale_rules)]:
            tensor.grad = None

    def step_weights(self) -> None:
        """Step w and the float parameters; the scales' gradients stay."""
        if self.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.max_grad_norm)
        self.base.step()
        self.base.zero_grad()

    def step_scales(self) -> None:
        for s, rule in self.scale_rules:
            rule.step(s)
        self.forget_gradients()


def _input_hook(grid: Grid):
    def hook(module, args, kwargs):
        if args:
            return (quantized_input(args[0], grid), *args[1:]), kwargs
        name = next(iter(kwargs))
        return args, {**kwargs, name: quantized_input(kwargs[name], grid)}

    return hook
